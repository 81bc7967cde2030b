"""LSTM-Transformer fusion: a bidirectional LSTM and a Transformer encoder read the same hours side by side.

References:
  [1] Yu, Qin, Zhu 2026, doi:10.1177/08850666261447860: two branches, fused, for mortality in sepsis. Only the abstract is
      public; what it leaves open is decided here and marked "ours".
  [2] Hochreiter & Schmidhuber 1997 (LSTM); Vaswani et al. 2017 (Transformer).

Shape letters: B samples, T hours, F variables, S static features, D width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.contract import Grid, Spec
from ehrmodels.base import ICUModule, in_range
from ehrmodels.layers import AttentionPool, Head, PiecewiseLinear, SummaryEmbedding, edges_of


class Fusion(ICUModule):
    """LSTM-Transformer fusion model over the hourly grid (value, mask, time since last seen).

    Args:
        width: D, width of both branches.
        heads: Attention heads of the Transformer branch.
        lstm_layers: Layers of the bidirectional LSTM.
        transformer_layers: Layers of the Transformer encoder.
        fusion: How the branches join at every hour: "gated" mixes them by a learned gate, "concat" projects both,
            "cross_attention" lets each attend to the other.
        dropout: Dropout in every part.
        piecewise: Read values as piecewise-linear codes of their quantiles instead of as standardised numbers.
        summary: Read the statistics of the window, too, joined before the head.
        members: Networks of the head, which share most of their weights.
        kwargs: As in ``ICUModule``.
    """

    view = "grid"

    def __init__(
        self,
        width: int = 64,
        heads: int = 4,
        lstm_layers: int = 1,
        transformer_layers: int = 2,
        fusion: Literal["gated", "concat", "cross_attention"] = "gated",
        dropout: float = 0.3,
        piecewise: bool = False,
        summary: bool = True,
        members: int = 16,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        in_range(
            1,
            None,
            members=members,
            width=width,
            heads=heads,
            lstm_layers=lstm_layers,
            transformer_layers=transformer_layers,
        )
        in_range(0, 1, dropout=dropout)
        if width % (2 * heads):
            raise ValueError(f"--model.width must be a multiple of twice --model.heads ({2 * heads}), found {width}")
        self.width, self.heads, self.lstm_layers, self.transformer_layers = (
            width,
            heads,
            lstm_layers,
            transformer_layers,
        )
        self.fusion, self.dropout = fusion, dropout
        self.piecewise, self.summary, self.members = piecewise, summary, members

    def build(self, spec: Spec) -> None:
        d, drop = self.width, self.dropout
        numbers = 1  # of a value
        if self.piecewise:
            self.encode = PiecewiseLinear(edges_of(spec.quantiles))
            numbers = self.encode.lower.shape[1]
        self.embed = nn.Sequential(nn.Linear((numbers + 2) * len(spec.variables), d), nn.LayerNorm(d), nn.Dropout(drop))
        self.position = nn.Parameter(torch.randn(spec.window, d) * 0.02)
        self.lstm = nn.LSTM(
            d,
            d // 2,
            self.lstm_layers,
            batch_first=True,
            bidirectional=True,
            dropout=drop if self.lstm_layers > 1 else 0.0,
        )
        layer = nn.TransformerEncoderLayer(d, self.heads, 2 * d, drop, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(
            layer, self.transformer_layers, nn.LayerNorm(d), enable_nested_tensor=False
        )
        if self.fusion == "cross_attention":
            self.to_local = nn.MultiheadAttention(d, self.heads, drop, batch_first=True)
            self.to_global = nn.MultiheadAttention(d, self.heads, drop, batch_first=True)
        self.join = nn.Linear(2 * d, d)
        self.norm = nn.LayerNorm(d)
        self.pool = AttentionPool(d)
        self.static = nn.Sequential(nn.Linear(len(spec.statics), d // 2), nn.GELU(), nn.Dropout(drop))
        joined = 2 * d + d // 2
        if self.summary:
            self.summarised = SummaryEmbedding(spec, drop)
            joined += self.summarised.width
        self.head = Head(joined, spec, drop, self.members)

    def forward(self, batch: Grid) -> Tensor:
        """Logits from a ``Grid``: (B,), or (B, K) for K labels; in training those of every member, (..., M)."""
        fused = self._fused(batch)
        weight = torch.softmax(self.pool(fused), 1)  # (B, T, 1)
        pooled = torch.cat(
            [(weight * fused).sum(1), fused[:, -1]], -1
        )  # (B, 2D): attention over time, and the last hour
        parts = [pooled, self.static(batch.static)]
        if self.summary:
            parts.append(self.summarised(batch.summary))
        return self.head(torch.cat(parts, -1))

    def hours(self, batch: Grid) -> Tensor:
        """(B, T, 1) How much each hour counts in the attention over time, 1 in all; the last hour counts once more by itself."""
        return torch.softmax(self.pool(self._fused(batch)), 1)

    def _fused(self, batch: Grid) -> Tensor:
        """(B, T, D) Every hour as both branches see it."""
        value = self.encode(batch.value).flatten(2) if self.piecewise else batch.value
        x = self.embed(torch.cat([value, batch.mask, batch.since], -1))  # (B, T, D)
        local, _ = self.lstm(x)
        return self.norm(self._fuse(local, self.transformer(x + self.position)))

    def _fuse(self, local: Tensor, wide: Tensor) -> Tensor:
        both = torch.cat([local, wide], -1)  # (B, T, 2D)
        if self.fusion == "gated":  # ours
            gate = torch.sigmoid(self.join(both))
            return gate * local + (1 - gate) * wide
        if self.fusion == "concat":
            return self.join(both)
        seen = self.to_local(local, wide, wide, need_weights=False)[0]
        heard = self.to_global(wide, local, local, need_weights=False)[0]
        return self.join(torch.cat([local + seen, wide + heard], -1))
