"""Published networks that Fusion and HyMaTE are compared with, each as its paper has it and with one linear head.

References:
  [1] Hochreiter & Schmidhuber 1997 (LSTM); Schuster & Paliwal 1997 (both directions).
  [2] Che, Purushotham, Cho, Sontag, Liu 2018, doi:10.1038/s41598-018-24271-9 (GRU-D): section "GRU-D", equations 9 to 16.
  [3] Bai, Kolter, Koltun 2018, arXiv:1803.01271 (TCN): section 3.
  [4] Vaswani et al. 2017, arXiv:1706.03762 (Transformer), over the hours as van de Water et al. 2024, arXiv:2306.05109 (YAIB).
  [5] Tipirneni & Reddy 2022, doi:10.1145/3516367 (STraTS), whose inputs the hourly baselines have here, too: value, mask and
      time since the last value of every hour, static features by a network of their own, joined before the head.
  [6] Gu & Dao 2023, arXiv:2312.00752 (Mamba), over triplets as Mottalib & Beheshti 2026, arXiv:2606.28623.

Shape letters: B samples, T hours, N observations, F variables, S static features, D width.
"""

import math
from abc import abstractmethod
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from datamodules.contract import Batch, Grid, Spec, Triplets
from ehrmodels.base import ICUModule, in_range
from ehrmodels.hymate import scalar_embedding
from ehrmodels.kernels import exporting
from ehrmodels.layers import AttentionPool
from ehrmodels.mamba import MambaBlock

MOST = 2048  # observations of a stay that STraTS reads: attention costs their square


class Baseline(ICUModule):
    """Base of the baselines: a vector of the record, one of the static features [5], a linear head on both."""

    def __init__(self, width: int, dropout: float, **kwargs: Any):
        super().__init__(**kwargs)
        in_range(1, None, width=width)
        in_range(0, 1, dropout=dropout)
        self.width, self.dropout = width, dropout

    def build(self, spec: Spec) -> None:
        d = self.width
        self.drop = nn.Dropout(self.dropout)
        self.static = nn.Sequential(nn.Linear(len(spec.statics), 2 * d), nn.Tanh(), nn.Linear(2 * d, d), nn.Tanh())
        self.head = nn.Linear(2 * d, spec.outputs)

    @abstractmethod
    def read(self, batch: Any) -> Tensor:
        """The record of each sample as a vector, (B, D)."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits: (B,), or (B, K) for K labels."""
        return self.head(torch.cat([self.drop(self.read(batch)), self.static(batch.static)], -1)).squeeze(-1)


def hours(batch: Grid) -> Tensor:
    """What the hourly baselines read of every hour: (B, T, 3 F)."""
    return torch.cat([batch.value, batch.mask, batch.since], -1)


class LSTM(Baseline):
    """LSTM [1] over the hours; its state after the last one is what is read.

    Args:
        width: D, width of the state.
        layers: Layers, one upon the other.
        dropout: Dropout between layers and before the head.
        kwargs: As in ``ICUModule``.
    """

    view = "grid"
    directions = 1

    def __init__(self, width: int = 64, layers: int = 1, dropout: float = 0.3, **kwargs: Any):
        super().__init__(width, dropout, **kwargs)
        in_range(1, None, layers=layers)
        self.layers = layers
        if width % self.directions:
            raise ValueError(f"--model.width must be even, one half for each direction, found {width}")

    def build(self, spec: Spec) -> None:
        super().build(spec)
        between = self.dropout if self.layers > 1 else 0.0
        sizes = (3 * len(spec.variables), self.width // self.directions, self.layers)
        self.lstm = nn.LSTM(*sizes, batch_first=True, bidirectional=self.directions > 1, dropout=between)

    def read(self, batch: Grid) -> Tensor:
        _, (state, _) = self.lstm(hours(batch))
        return state[-self.directions :].transpose(0, 1).flatten(1)


class BiLSTM(LSTM):
    """LSTM [1] over the hours in both directions; the last state of each is what is read.

    Args:
        width: D, width of the two states together.
        layers: Layers, one upon the other.
        dropout: Dropout between layers and before the head.
        kwargs: As in ``ICUModule``.
    """

    directions = 2

    def __init__(self, width: int = 64, layers: int = 1, dropout: float = 0.3, **kwargs: Any):
        super().__init__(width, layers, dropout, **kwargs)


class GRUD(Baseline):
    """GRU-D [2] over the hours: between observations values and state decay at trained rates.

    A value decays from the last one towards the mean, the state towards 0. One layer, as published.

    Args:
        width: D, width of the state.
        dropout: Dropout before the head.
        kwargs: As in ``ICUModule``.
    """

    view = "grid"

    def __init__(self, width: int = 64, dropout: float = 0.3, **kwargs: Any):
        super().__init__(width, dropout, **kwargs)

    def build(self, spec: Spec) -> None:
        super().build(spec)
        variables, d = len(spec.variables), self.width
        bound = d**-0.5
        self.value_decay = nn.Parameter(torch.empty(variables).uniform_(-bound, bound))  # W_gamma_x, diagonal
        self.value_decay_bias = nn.Parameter(torch.empty(variables).uniform_(-bound, bound))
        self.state_decay = nn.Linear(variables, d)  # W_gamma_h
        self.inputs = nn.Linear(2 * variables, 3 * d)  # W and V of reset, update and candidate: of values and of masks
        self.gates, self.candidate = nn.Linear(d, 2 * d, bias=False), nn.Linear(d, d, bias=False)  # U

    def read(self, batch: Grid) -> Tensor:
        elapsed = self.elapsed(batch.since)
        kept = torch.exp(-torch.relu(self.value_decay * elapsed + self.value_decay_bias))
        value = batch.value * (batch.mask + (1 - batch.mask) * kept)  # what is carried is the last value; the mean is 0
        inputs = self.inputs(torch.cat([value, batch.mask], -1))
        decay = torch.exp(-torch.relu(self.state_decay(elapsed)))
        state = decay.new_zeros(decay[:, 0].shape)
        for now, kept_state in zip(inputs.unbind(1), decay.unbind(1), strict=True):
            state = state * kept_state
            of_reset, of_update, of_candidate = now.chunk(3, -1)
            reset, update = torch.sigmoid(torch.cat([of_reset, of_update], -1) + self.gates(state)).chunk(2, -1)
            state = (1 - update) * state + update * torch.tanh(of_candidate + self.candidate(reset * state))
        return state

    def elapsed(self, since: Tensor) -> Tensor:
        """delta of [2] in windows: time from the observation before an hour to that hour, even if it has one itself."""
        later = (since[:, :-1] + 1 / self.spec.window).clamp(max=1)
        return torch.cat([since[:, :1], later], 1)


class TCN(Baseline):
    """Temporal convolutional network [3]: causal convolutions over the hours, wider with every level.

    Residual blocks with weight normalisation, each of which joins hours twice as far apart as the one before; what the last
    hour holds is read.

    Args:
        width: D, channels.
        layers: Residual blocks; 0: as many as the window needs to be seen whole.
        kernel: Hours that a convolution joins.
        dropout: Dropout of whole channels after each convolution, and before the head.
        kwargs: As in ``ICUModule``.
    """

    view = "grid"

    def __init__(self, width: int = 64, layers: int = 0, kernel: int = 3, dropout: float = 0.2, **kwargs: Any):
        super().__init__(width, dropout, **kwargs)
        in_range(0, None, layers=layers)
        in_range(2, None, kernel=kernel)
        self.layers, self.kernel = layers, kernel

    def build(self, spec: Spec) -> None:
        super().build(spec)
        # L blocks of two convolutions see 1 + 2 (kernel - 1) (2 ** L - 1) hours
        needed = math.ceil(math.log2((spec.window - 1) / (2 * (self.kernel - 1)) + 1))
        sizes = [3 * len(spec.variables), *[self.width] * (self.layers or max(needed, 1))]
        self.blocks = nn.Sequential(
            *(Residual(a, b, self.kernel, 2**level, self.dropout) for level, (a, b) in enumerate(pairwise(sizes)))
        )

    def read(self, batch: Grid) -> Tensor:
        return self.blocks(hours(batch).transpose(1, 2))[..., -1]


class Residual(nn.Module):
    """Residual block of [3], figure 1b: two causal convolutions; maps (B, inputs, T) to (B, outputs, T)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, dropout: float):
        super().__init__()
        self.before = (kernel - 1) * dilation  # hours of padding, all of them on the left
        self.first = weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(outputs, outputs, kernel, dilation=dilation))
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.drop = nn.Dropout1d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in (self.first, self.second):
            y = self.drop(torch.relu(convolution(F.pad(y, (self.before, 0)))))
        return torch.relu(self.shortcut(x) + y)


class Transformer(Baseline):
    """Transformer encoder [4] over the hours, each of which attends to those before it; the last hour is read.

    Args:
        width: D.
        layers: Layers of the encoder.
        heads: Attention heads, each of width D / heads.
        dropout: Dropout in every layer, and before the head.
        kwargs: As in ``ICUModule``.
    """

    view = "grid"
    causal: Tensor

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.2, **kwargs: Any):
        super().__init__(width, dropout, **kwargs)
        in_range(1, None, layers=layers)
        self.layers, self.heads = layers, _checked(heads, width)

    def build(self, spec: Spec) -> None:
        super().build(spec)
        self.embed = nn.Linear(3 * len(spec.variables), self.width)
        position = torch.arange(spec.window)[:, None]
        angle = position * torch.exp(torch.arange(0, self.width, 2) * (-math.log(10_000) / self.width))
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, : self.width]
        self.register_buffer("position", waves, persistent=False)
        ahead = torch.ones(spec.window, spec.window, dtype=torch.bool).triu(1)
        self.register_buffer("causal", ahead, persistent=False)
        self.encoder = _encoder(self.width, self.heads, self.layers, self.dropout)

    def read(self, batch: Grid) -> Tensor:
        return self.encoder(self.embed(hours(batch)) + self.position, mask=self.causal, is_causal=True)[:, -1]


class STraTS(Baseline):
    """STraTS [5] over triplets: a Transformer over the observations, and attention that sums them up.

    Of a sample with more than 2,048 observations it reads the last ones (the authors: some at random). It learns from outcomes
    alone, without the authors' forecasting before, and the weights of its attention have no dropout.

    Args:
        width: D, width of the embedding.
        layers: Layers of the Transformer.
        heads: Attention heads, each of width D / heads.
        dropout: Dropout of the embedding, of what each layer adds, and before the head.
        learning_rate: Peak learning rate of AdamW.
        kwargs: As in ``ICUModule``.
    """

    view = "triplets"

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.2,
        learning_rate: float = 5e-4,
        **kwargs: Any,
    ):
        super().__init__(width, dropout, learning_rate=learning_rate, **kwargs)
        in_range(1, None, layers=layers)
        self.layers, self.heads = layers, _checked(heads, width)

    def build(self, spec: Spec) -> None:
        super().build(spec)
        d = self.width
        self.embed = TripletEmbedding(len(spec.variables), d)
        self.encoder = _encoder(d, self.heads, self.layers, self.dropout)
        for layer in self.encoder.layers:  # with dropout in it, torch would keep a weight of every pair of observations
            layer.self_attn.dropout = 0.0  # type: ignore[union-attr, assignment]
        self.pool = AttentionPool(d)

    def read(self, batch: Triplets) -> Tensor:
        batch, real = latest(batch)
        position = torch.arange(real.shape[1], device=real.device)
        seen = real | (position == 0)  # nothing at all to attend to would be no number
        x = self.encoder(self.drop(self.embed(batch)), src_key_padding_mask=~seen)
        return (self.pool.weights(x, real).unsqueeze(1).to(x.dtype) @ x).squeeze(1)


class Mamba(Baseline):
    """Mamba [6] over triplets: the embedding of STraTS, Mamba blocks, and the mean over the observations.

    Args:
        width: D, width of the embedding.
        layers: Mamba blocks.
        state: State of each channel in a Mamba block.
        dropout: Dropout of the embedding and before the head.
        learning_rate: Peak learning rate of AdamW.
        kwargs: As in ``ICUModule``; the Mamba blocks' A and D are exempt from weight decay, too.
    """

    view = "triplets"

    def __init__(
        self,
        width: int = 64,
        layers: int = 4,
        state: int = 16,
        dropout: float = 0.2,
        learning_rate: float = 5e-4,
        **kwargs: Any,
    ):
        super().__init__(width, dropout, learning_rate=learning_rate, **kwargs)
        in_range(1, None, layers=layers, state=state)
        self.layers, self.state = layers, state

    def build(self, spec: Spec) -> None:
        super().build(spec)
        d = self.width
        self.embed = TripletEmbedding(len(spec.variables), d)
        self.blocks = nn.ModuleList(MambaBlock(d, self.state) for _ in range(self.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(self.layers + 1))

    def read(self, batch: Triplets) -> Tensor:
        x = self.drop(self.embed(batch))
        for block, norm in zip(self.blocks, self.norms, strict=False):
            x = x + block(norm(x))
        x = self.norms[-1](x) * batch.real[..., None]
        return x.sum(1) / batch.length.clamp(min=1)[:, None].to(x.dtype)


class TripletEmbedding(nn.Module):
    """Time, variable and value of each observation as the sum of three vectors [5]: (B, N, D)."""

    def __init__(self, variables: int, width: int):
        super().__init__()
        self.variable = nn.Embedding(variables + 1, width, padding_idx=0)
        self.value, self.time = scalar_embedding(width), scalar_embedding(width)

    def forward(self, batch: Triplets) -> Tensor:
        return self.variable(batch.variable) + self.value(batch.value[..., None]) + self.time(batch.time[..., None])


def _encoder(width: int, heads: int, layers: int, dropout: float) -> nn.TransformerEncoder:
    """As [4] has it: normalised after each sum, ReLU; hidden layers of twice the width, as in YAIB and [5]."""
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "relu", batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _checked(heads: int, width: int) -> int:
    in_range(1, None, heads=heads)
    if width % heads:
        raise ValueError(f"--model.width must be a multiple of --model.heads ({heads}), found {width}")
    return heads


def latest(batch: Triplets) -> tuple[Triplets, Tensor]:
    """The batch with the last ``MOST`` observations of each sample, and which places hold one, (B, N)."""
    position = torch.arange(batch.time.shape[1], device=batch.time.device)
    first = (batch.length - MOST).clamp(min=0)[:, None]
    if exporting():  # the number of observations is free then
        return batch, batch.real & (position >= first)
    if batch.time.shape[1] <= MOST:
        return batch, batch.real
    place = (first + position[:MOST]).clamp(max=batch.time.shape[1] - 1)
    time, variable, value = (t.gather(1, place) for t in (batch.time, batch.variable, batch.value))
    batch = batch._replace(time=time, variable=variable, value=value, length=batch.length.clamp(max=MOST))
    return batch, batch.real
