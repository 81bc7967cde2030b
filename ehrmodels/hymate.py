"""HyMaTE: Mamba blocks, then attention, over the observations of a stay as triplets (time, variable, value).

References:
  [1] Mottalib, Phan, Beheshti 2025, arXiv:2509.24118 (HyMaTE). No table and no code are public; what the text leaves open is
      decided here and marked "ours".
  [2] Tipirneni & Reddy 2022, doi:10.1145/3516367 (STraTS): triplet embedding, fusion pooling, forecasting before training.
  [3] Gu & Dao 2023, arXiv:2312.00752 (Mamba).
  [4] Ali et al. 2021, arXiv:2106.09681 (XCiT): attention between channels.

Shape letters: B samples, N observations, V variables, S static features, D width. Observations are in order of time, then variable,
and padded on the right, where nothing that follows can reach them.
"""

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from datamodules.contract import Spec, Triplets
from ehrmodels.base import ICUModule, in_range
from ehrmodels.kernels import exporting
from ehrmodels.layers import AttentionPool, Head, SummaryEmbedding, ValueEmbedding, edges_of
from ehrmodels.mamba import MambaBlock

WINDOW = 2048  # observations that attend to one another; longer stays are attended to in windows of this length
FORECAST_AFTER, FORECAST_HOURS = 12, 2  # [2]: what happens in 2 hours is forecast from at least 12
log = logging.getLogger(__name__)


class HyMaTE(ICUModule):
    """HyMaTE over event triplets: Mamba blocks, attention, fusion pooling.

    Args:
        width: D, width of the embedding.
        layers: Number of Mamba blocks.
        state: State of each channel in a Mamba block.
        attention: What attends to what after the Mamba blocks: "token" every observation to every other (in windows of 2,048 where
            a stay has more), "variable" every variable to every other after its observations are pooled, "channel" every channel of
            the embedding to every other. The last two cost the same per observation however long the stay is.
        heads: Attention heads, each of width D / heads.
        dropout: Dropout of the embedding, the attention and the pooled vector.
        piecewise: Embed a value by weights of its variable, piecewise-linear between its quantiles; false: by one network for
            all variables, as [1].
        summary: Read the statistics of the window, too, joined before the head.
        members: Networks of the head, which share most of their weights.
        recompute: Compute the inside of each Mamba block again for its gradient instead of keeping it: less memory, more time.
        learning_rate: Peak learning rate of AdamW.
        kwargs: As in ``ICUModule``; the Mamba blocks' A and D are exempt from weight decay, too.
    """

    view = "triplets"

    def __init__(
        self,
        width: int = 64,
        layers: int = 4,
        state: int = 16,
        attention: Literal["token", "variable", "channel"] = "token",
        heads: int = 4,
        dropout: float = 0.2,
        piecewise: bool = True,
        summary: bool = True,
        members: int = 16,
        recompute: bool = False,
        learning_rate: float = 5e-4,
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, **kwargs)
        in_range(1, None, width=width, state=state, heads=heads, members=members)
        in_range(0, None, layers=layers)
        in_range(0, 1, dropout=dropout)
        if width % heads:
            raise ValueError(f"--model.width must be a multiple of --model.heads ({heads}), found {width}")
        self.width, self.layers, self.state, self.attention, self.heads, self.dropout = (
            width,
            layers,
            state,
            attention,
            heads,
            dropout,
        )
        self.piecewise, self.summary, self.members, self.recompute = piecewise, summary, members, recompute

    def build(self, spec: Spec) -> None:
        d = self.width
        self.variable = nn.Embedding(len(spec.variables) + 1, d, padding_idx=0)
        self.value: nn.Module = scalar_embedding(d)
        if self.piecewise:
            self.value = ValueEmbedding(edges_of(spec.quantiles), d)
        self.time = scalar_embedding(d)
        self.drop = nn.Dropout(self.dropout)
        self.blocks = nn.ModuleList(MambaBlock(d, self.state) for _ in range(self.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(self.layers + 1))
        if self.attention == "variable":
            self.of_variable = nn.Linear(3 * d + 1, d)
        self.attention_norm = nn.RMSNorm(d)
        self.query_key_value, self.attended = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.context = nn.Linear(len(spec.statics), d)
        self.feedforward = nn.Sequential(
            nn.RMSNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(2 * d, d)
        )
        if self.attention == "channel":
            self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.pool = AttentionPool(d)
        self.static = nn.Sequential(nn.Linear(len(spec.statics), 2 * d), nn.Tanh(), nn.Linear(2 * d, d), nn.Tanh())
        joined = 2 * d
        if self.summary:
            self.summarised = SummaryEmbedding(spec, self.dropout)
            joined += self.summarised.width
        self.head: nn.Module = Head(joined, spec, self.dropout, self.members)

    def forward(self, batch: Triplets) -> Tensor:
        """Logits from ``Triplets``: (B,), or (B, K) for K labels; in training those of every member, (..., M)."""
        return self.head(self.represent(batch))

    def represent(self, batch: Triplets) -> Tensor:
        """Samples as vectors (B, 2D), or longer with the summary."""
        x, weight = self._items(batch)
        return self._joined((weight.unsqueeze(1).to(x.dtype) @ x).squeeze(1), batch)

    def _joined(self, pooled: Tensor, batch: Triplets) -> Tensor:
        parts = [self.drop(pooled), self.static(batch.static)]
        if self.summary:
            parts.append(self.summarised(batch.summary))
        return torch.cat(parts, -1)

    def attribute(self, batch: Triplets) -> tuple[Tensor, Tensor]:
        """How much a prediction rests on each variable; column k is ``spec.variables[k]``.

        Returns:
            (B, V) fusion weight, summed over the observations of a variable: 0 where it was not observed, 1 in all.
            (B, V) part of the logit: the weighted sum, times the logit's gradient at it. What the summary says is in neither.
        """
        x, weight = self._items(batch)
        pooled = (weight.unsqueeze(1).to(x.dtype) @ x).squeeze(1)
        with torch.inference_mode(False), torch.enable_grad():
            batch = Triplets(*(t.clone() for t in batch))  # tensors of inference mode know no gradient
            pooled = pooled.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.head(self._joined(pooled, batch)).sum(), pooled)
        part = weight * (x @ slope[..., None]).squeeze(-1)
        if self.attention == "variable":
            return weight, part
        return sums(weight, batch, len(self.spec.variables)), sums(part, batch, len(self.spec.variables))

    def _items(self, batch: Triplets) -> tuple[Tensor, Tensor]:
        """What fusion pooling sums, (B, M, D), and its weights (B, M): M observations or, with ``attention`` "variable", variables."""
        real = batch.real
        value = self.value(batch.value, batch.variable) if self.piecewise else self.value(batch.value[..., None])
        x = self.variable(batch.variable) + value + self.time(batch.time[..., None])  # (B, N, D)
        x = self.drop(x)
        for block, norm in zip(self.blocks, self.norms, strict=False):
            recompute = self.recompute and torch.is_grad_enabled()
            x = x + (checkpoint(nn.Sequential(norm, block), x, use_reentrant=False) if recompute else block(norm(x)))
        x = self.norms[-1](x)
        if self.attention == "variable":
            x, real = self._by_variable(x, batch.variable, real)  # (B, V, D), (B, V)
        x = x + self.context(batch.static).unsqueeze(1)  # ours: what an observation means depends on age and the like
        x = x + self.drop(self.attended(self._attend(self.attention_norm(x), real)))
        x = x + self.drop(self.feedforward(x))  # ours
        return x, self.pool.weights(x, real)

    def _by_variable(self, x: Tensor, variable: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, maximum, last and number of each variable's observations, joined (ours): (B, V, D), and which variables occur (B, V)."""
        count, width, variables, precision = x.shape[0], x.shape[-1], len(self.spec.variables), x.dtype
        x = x.float()  # bfloat16 cannot count beyond 256
        slot = (
            torch.arange(count, device=x.device)[:, None] * (variables + 1) + variable * real
        )  # padding goes to slot 0 of its sample
        slot, tokens, slots = slot.flatten(), x.flatten(0, 1), count * (variables + 1)
        number = x.new_zeros(slots).index_add(0, slot, torch.ones_like(slot, dtype=x.dtype))
        mean = x.new_zeros(slots, width).index_add(0, slot, tokens) / number.clamp(min=1)[:, None]
        most = torch.full_like(mean, -torch.inf).scatter_reduce(0, slot[:, None].expand_as(tokens), tokens, "amax")
        position = torch.arange(slot.shape[0], device=x.device)
        last = tokens[position.new_zeros(slots).scatter_reduce(0, slot, position, "amax")]
        pooled = torch.cat([mean, most, last, number.log1p()[:, None]], -1).view(count, variables + 1, -1)[:, 1:]
        present = (number > 0).view(count, -1)[:, 1:]
        pooled = pooled.masked_fill(~present[..., None], 0).to(self.of_variable.weight.dtype)
        return self.of_variable(pooled).to(precision) * present[..., None], present

    def _attend(self, x: Tensor, real: Tensor) -> Tensor:
        """Multi-head attention (B, M, D) among the M items, or among the channels; padded items are not attended to."""
        count, items, width = x.shape
        traced = exporting()  # the number of items is free then, and windows are told by a mask instead of by a shape
        if self.attention != "channel" and not traced and items > WINDOW:
            _warn_long(items)
            padding = -items % WINDOW
            x, real = F.pad(x, (0, 0, 0, padding)).view(-1, WINDOW, width), F.pad(real, (0, padding)).view(-1, WINDOW)
        q, k, v = (
            self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, M, D / heads)
        if self.attention == "channel":  # [4]
            q, k = (F.normalize(t * real[:, None, :, None], dim=2) for t in (q, k))
            weight = torch.softmax(self.temperature * (q.transpose(2, 3) @ k), -1)
            out = v @ weight.transpose(2, 3)
        else:
            position = torch.arange(real.shape[1], device=x.device)
            seen = (real | (position == 0))[:, None, None, :]  # nothing at all to attend to would be no number
            if traced:
                window = position // WINDOW
                first = position % WINDOW == 0  # of each window, for the same reason
                seen = (seen | first) & (window[:, None] == window)
            out = F.scaled_dot_product_attention(q, k, v, seen)
        return out.transpose(1, 2).flatten(2).reshape(count, -1, width)[:, :items]


class HyMaTEForecast(HyMaTE):
    """HyMaTE's forecasting stage, before training: from all observations before a random time, the first value of each variable in
    the next two hours [2]. Needs no outcomes; continue with `ehr train --init_from`.
    """

    supervised = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.summary = False  # that of the window would tell what is forecast

    def build(self, spec: Spec) -> None:
        super().build(spec)
        self.head = nn.Linear(2 * self.width, len(spec.variables))

    def objective(self, batch: Triplets) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._error(batch, torch.rand(len(batch.row), device=batch.time.device))

    def validation_step(self, batch: Triplets, index: int) -> None:  # type: ignore[override]
        place = torch.frac(
            batch.row.double() * 0.6180339887498949
        ).float()  # the same times in every epoch, spread evenly
        self._record("val", *self._error(batch, place), len(batch.row))

    def predict_step(self, batch: Triplets, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        raise ValueError(
            "a HyMaTEForecast checkpoint predicts no outcome: train a HyMaTE from it with `ehr train --init_from`"
        )

    def _error(self, batch: Triplets, place: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the forecast values, in standard deviations, and their number; ``place`` (B,) in [0, 1) chooses the times."""
        past, value, known = forecast_task(batch, place, self.spec.window, len(self.spec.variables))
        error = (self.outputs(past).float() - value) ** 2 * known
        return error.sum() / known.sum().clamp(min=1), known.sum()


def forecast_task(batch: Triplets, place: Tensor, hours: int, variables: int) -> tuple[Triplets, Tensor, Tensor]:
    """Cuts a batch at a time of each sample into the past and what is to be forecast.

    Args:
        batch: whole windows.
        place: (B,) in [0, 1): the cut, from the earliest that leaves 12 hours of past (a third of a window shorter than 36 hours)
            to the latest that leaves 2 hours to forecast.
        hours: length of the window.
        variables: V.

    Returns:
        The past, padded anew; the first value of each variable in the next 2 hours, and 1 where there is one, both (B, V).
    """
    earliest = min(FORECAST_AFTER, hours / 3)
    cut = earliest + place * max(hours - FORECAST_HOURS - earliest, 0)
    when = (batch.time + 1) * hours / 2  # hours since the start of the window
    order = torch.arange(when.shape[1], device=when.device)
    soon = batch.real & (when >= cut[:, None]) & (when < cut[:, None] + FORECAST_HOURS)
    first = torch.full((len(when), variables + 1), when.shape[1], device=when.device)
    first = first.scatter_reduce(1, batch.variable * soon, torch.where(soon, order, when.shape[1]), "amin")[:, 1:]
    known = first < when.shape[1]
    value = batch.value.gather(1, first.clamp(max=when.shape[1] - 1)) * known
    return chosen(batch, when < cut[:, None]), value, known.float()


def chosen(batch: Triplets, keep: Tensor) -> Triplets:
    """The batch with those of its observations only where ``keep`` (B, N) is true, in their order, padded anew on the right."""
    keep = keep & batch.real
    length = keep.sum(1)
    order = (~keep).byte().argsort(dim=1, stable=True)[:, : max(int(length.max()), 1)]
    time, variable, value = (
        t.gather(1, order) * keep.gather(1, order) for t in (batch.time, batch.variable, batch.value)
    )
    return batch._replace(time=time, variable=variable, value=value, length=length)


def sums(values: Tensor, batch: Triplets, variables: int) -> Tensor:
    """``values`` (B, N) of observations summed per variable, (B, V)."""
    return values.new_zeros(len(values), variables + 1).scatter_add(1, batch.variable, values * batch.real)[:, 1:]


def scalar_embedding(width: int) -> nn.Sequential:
    """Embedding of one number, (..., 1) to (..., D) [2]."""
    return nn.Sequential(nn.Linear(1, math.isqrt(width)), nn.Tanh(), nn.Linear(math.isqrt(width), width))


def _warn_long(items: int) -> None:
    if not getattr(_warn_long, "said", False):
        _warn_long.said = True  # type: ignore[attr-defined]
        log.warning(
            "a stay has more than %d observations (padded %d): they attend to one another in windows of %d; "
            "--model.attention variable or channel has no windows",
            WINDOW,
            items,
            WINDOW,
        )
