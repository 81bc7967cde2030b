"""TabM: a multilayer perceptron with an ensemble head on the summary of the window.

References:
  [1] Gorishniy, Kotelnikov, Babenko 2024, arXiv:2410.24210 (TabM), with the piecewise-linear embeddings that it recommends;
      here the members part after the first layer, which all share.
"""

from typing import Any

import torch
from torch import Tensor

from datamodules.contract import Spec, Summary
from ehrmodels.base import ICUModule, in_range
from ehrmodels.layers import Head, SummaryEmbedding


class TabM(ICUModule):
    """Multilayer perceptron of many members [1] on the statistics of the window.

    Args:
        width: Width of the layers.
        layers: Hidden layers of the members, after one that they share.
        embedding: Numbers that each statistic becomes.
        members: Networks, which share most of their weights.
        dropout: Dropout of every layer.
        kwargs: As in ``ICUModule``.
    """

    view = "summary"

    def __init__(
        self,
        width: int = 256,
        layers: int = 2,
        embedding: int = 8,
        members: int = 16,
        dropout: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        in_range(1, None, width=width, embedding=embedding, members=members)
        in_range(0, None, layers=layers)
        in_range(0, 1, dropout=dropout)
        self.width, self.layers, self.embedding = width, layers, embedding
        self.members, self.dropout = members, dropout

    def build(self, spec: Spec) -> None:
        self.summarised = SummaryEmbedding(spec, self.dropout, self.embedding, self.width)
        joined = self.width + len(spec.statics)
        self.head = Head(joined, spec, self.dropout, self.members, self.width, self.layers)

    def forward(self, batch: Summary) -> Tensor:
        """Logits from a ``Summary``: (B,), or (B, K) for K labels; in training those of every member, (..., M)."""
        return self.head(torch.cat([self.summarised(batch.summary), batch.static], -1))
