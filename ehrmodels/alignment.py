"""Distances between what a model makes of two hospital systems: added to the loss, they make it read both alike.

References:
  [1] Sun & Saenko 2016, arXiv:1607.01719 (CORAL); [2] Gretton et al. 2012, JMLR 13, and Long et al. 2015,
      arXiv:1502.02791 (MMD, with Gaussian kernels of several widths).

Shape letters: N and M samples of each system, D features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.contract import Batch

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, times the median squared distance


def coral(one: Tensor, other: Tensor) -> Tensor:
    """Squared distance of the covariances of (N, D) and (M, D), over 4 D^2 [1]."""
    return (_covariance(one) - _covariance(other)).square().sum() / (4 * one.shape[1] ** 2)


def _covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.T @ x / (len(x) - 1)


def mmd(one: Tensor, other: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of (N, D) and (M, D), biased, the mean over kernels of several widths [2]."""
    both = torch.cat([one, other])
    squared = (both[:, None] - both[None]).square().sum(-1)
    median = squared.detach()[~torch.eye(len(both), dtype=torch.bool, device=both.device)].median().clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-squared / (width * median)) for width in WIDTHS]).mean(0)
    n = len(one)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


class Alignment:
    """A penalty of training: the distance between what the head reads of one system and of the other.

    Args:
        model: whose ``head`` reads (B, D).
        distance: ``coral`` or ``mmd``.
        weight: of the distance in the loss.
        first: row number from which on samples are of the other system.

    Raises:
        ValueError: the model has no head.
    """

    def __init__(self, model: nn.Module, distance: Callable[[Tensor, Tensor], Tensor], weight: float, first: int):
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Module):
            raise ValueError(f"{type(model).__name__} has no head: what it makes of two systems cannot be aligned")
        self.distance, self.weight, self.first = distance, weight, first
        self.read: Tensor | None = None
        head.register_forward_pre_hook(self._keep)

    def _keep(self, head: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.read = arguments[0]

    def __call__(self, batch: Batch) -> Tensor:
        """The weighted distance of what was read last; 0 where one system has fewer than two samples."""
        assert self.read is not None
        read, others = self.read.float(), batch.row >= self.first
        if min(others.sum(), (~others).sum()) < 2:
            return read.new_zeros(())
        return self.weight * self.distance(read[~others], read[others])
