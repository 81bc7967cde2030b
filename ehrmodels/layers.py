"""Layers that several models share: numbers as piecewise-linear codes of their quantiles, and heads with many members.

References:
  [1] Gorishniy, Rubachev, Babenko 2022, arXiv:2203.05556: piecewise-linear encoding of numbers.
  [2] Wen, Tran, Ba 2020, arXiv:2002.06715: BatchEnsemble.
  [3] Gorishniy, Kotelnikov, Babenko 2024, arXiv:2410.24210: TabM, a network with BatchEnsemble layers, whose members are
      trained by the mean of their losses.

Shape letters: B samples, F features, K bins, D width, M members.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.contract import Spec


def edges_of(quantiles: list[list[float]]) -> Tensor:
    """Quantiles of a ``Spec`` as a table.

    Raises:
        ValueError: there are none.
    """
    if not quantiles:
        raise ValueError("the description of the data holds no quantiles: it is of an earlier version; train anew")
    return torch.tensor(quantiles, dtype=torch.float32)


def spared(*parameters: nn.Parameter) -> None:
    """Exempt parameters from weight decay that have more than one axis, and are biases or scales all the same."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


class PiecewiseLinear(nn.Module):
    """Encoding of numbers by the quantiles between which they lie [1]: (..., F) to (..., F, K).

    Bin k is 0 below its lower edge, 1 above its upper edge, and grows linearly between. Where two edges are the same
    number, the bin is a step there. What is not a number is 0 in all bins.

    Args:
        edges: (F, K + 1) ascending quantiles of each feature.
    """

    lower: Tensor
    width: Tensor

    def __init__(self, edges: Tensor):
        super().__init__()
        width = edges.diff(dim=-1)
        self.register_buffer("lower", edges[:, :-1].clone())
        self.register_buffer("width", torch.where(width > 0, width, torch.finfo(torch.float32).tiny))

    def forward(self, value: Tensor) -> Tensor:
        value = torch.where(torch.isnan(value), -torch.inf, value)  # below every edge
        return ((value[..., None] - self.lower) / self.width).clamp(0, 1)


class SummaryEmbedding(nn.Module):
    """The summary of a sample as a vector: (B, F, 16) in units, NaN where there is nothing to tell, to (B, D).

    Every feature is encoded by its quantiles, embedded by weights of its own with a bias that says that it is there, and
    all are joined by one layer.

    Args:
        spec: with the quantiles of each statistic of each variable.
        dropout: of the embedded features, and of the vector.
        embedding: numbers that each feature becomes.
        width: D.
    """

    def __init__(self, spec: Spec, dropout: float, embedding: int = 8, width: int = 256):
        super().__init__()
        self.width, edges = width, edges_of(spec.summary_quantiles)
        features, bins = edges.shape[0], edges.shape[1] - 1
        self.encode = PiecewiseLinear(edges)
        bound = bins**-0.5
        self.weight = nn.Parameter(torch.empty(features, bins, embedding).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(features, embedding).uniform_(-bound, bound))
        spared(self.bias)
        self.drop = nn.Dropout(dropout)
        self.join = nn.Sequential(nn.Linear(features * embedding, width), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, summary: Tensor) -> Tensor:
        value = summary.flatten(1)
        there = (~torch.isnan(value)).to(self.bias.dtype)[..., None]
        embedded = torch.einsum("bfk,fkd->bfd", self.encode(value), self.weight) + there * self.bias
        return self.join(self.drop(torch.relu(embedded).flatten(1)))


class ValueEmbedding(nn.Module):
    """The value of an observation as a vector, by weights of its variable: a piecewise-linear function through one learned
    point for each quantile [1].

    Maps values (B, N) and variables (B, N), 1 .. F (0 is padding), to (B, N, D).

    Args:
        edges: (F, K + 1) quantiles of each variable's standardised values.
        width: D.
    """

    edges: Tensor

    def __init__(self, edges: Tensor, width: int):
        super().__init__()
        self.register_buffer("edges", F.pad(edges, (0, 0, 1, 0)))  # a row for padding
        self.points = nn.Embedding(self.edges.numel(), width)
        nn.init.normal_(self.points.weight, std=0.5)

    def forward(self, value: Tensor, variable: Tensor) -> Tensor:
        edges = self.edges[variable]  # (B, N, K + 1)
        count = edges.shape[-1]
        lower = ((value[..., None] >= edges).sum(-1) - 1).clamp(0, count - 2)
        low, high = (edges.gather(-1, (lower + k)[..., None]).squeeze(-1) for k in (0, 1))
        share = ((value - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)[..., None]
        below, above = (self.points(variable * count + lower + k) for k in (0, 1))
        return below + share.to(below.dtype) * (above - below)


class AttentionPool(nn.Sequential):
    """A score of each item, (B, M, D) to (B, M, 1): u^T tanh(W c + b)."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))

    def weights(self, x: Tensor, real: Tensor) -> Tensor:
        """Softmax of the scores among the items that are there, (B, M); 0 everywhere where there is none."""
        score = self(x).squeeze(-1).float().masked_fill(~real, torch.finfo(torch.float32).min)
        return torch.softmax(score, 1) * real


class Members(nn.Module):
    """A linear layer of ``members`` networks that share its weights; each scales its inputs and outputs by itself [2].

    Maps (B, M, inputs) to (B, M, outputs).
    """

    def __init__(self, inputs: int, outputs: int, members: int, first: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        # [3]: random signs where the members part, ones after it
        sign = torch.randint(0, 2, (members, inputs)).float() * 2 - 1
        self.into = nn.Parameter(sign if first else torch.ones(members, inputs))
        self.out = nn.Parameter(torch.ones(members, outputs))
        bound = inputs**-0.5
        self.bias = nn.Parameter(torch.empty(members, outputs).uniform_(-bound, bound))
        spared(self.into, self.out, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.into) * self.out + self.bias


class Head(nn.Module):
    """Logits from a vector (B, inputs), by ``members`` networks of ``layers`` hidden layers [3].

    In training each member has a logit of its own: (B, K, M), without K where there is one output. In evaluation there is
    one: of the mean of the members' probabilities, or the mean of values.

    Args:
        inputs: of the vector.
        spec: what is predicted.
        dropout: of each hidden layer.
        members: M.
        width: of the hidden layers.
        layers: hidden layers.
    """

    def __init__(self, inputs: int, spec: Spec, dropout: float, members: int, width: int = 256, layers: int = 2):
        super().__init__()
        self.members, self.classes, outputs = members, spec.kind != "regression", spec.outputs
        sizes = [inputs, *[width] * layers]
        self.hidden = nn.ModuleList(Members(a, b, members, first=k == 0) for k, (a, b) in enumerate(pairwise(sizes)))
        self.drop = nn.Dropout(dropout)
        bound = sizes[-1] ** -0.5
        self.weight = nn.Parameter(torch.empty(members, sizes[-1], outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, outputs).uniform_(-bound, bound))
        spared(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, self.members, -1)
        for layer in self.hidden:
            x = self.drop(torch.relu(layer(x)))
        logit = (torch.einsum("bmd,mdk->bkm", x, self.weight) + self.bias.T).squeeze(1)
        if self.training:
            return logit
        if not self.classes:
            return logit.mean(-1)
        logit = logit.float()
        return F.logsigmoid(logit).logsumexp(-1) - F.logsigmoid(-logit).logsumexp(-1)
