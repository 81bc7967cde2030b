"""The contract between data and models: what a batch holds, and what a model is told of the data.

Shape letters: B samples, T hours, N events, F variables, S static features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Samples as an hourly grid; the last hour ends at the prediction time.

    ``value`` is carried forward from the last hour in which the variable was seen and is 0 (the mean) before that; a
    rate is the mean over the hour, one that was set before the window included.
    """

    static: Tensor  # (B, S) standardised; units of care one-hot
    value: Tensor  # (B, T, F) standardised, clipped to +-5
    mask: Tensor  # (B, T, F) 1 where charted in that hour
    since: Tensor  # (B, T, F) hours since last charted, divided by T and clipped to 1 (never charted: 1)
    target: Tensor  # (B,) 1, 0 or NaN (unknown); (B, K) where a task has K labels
    row: Tensor  # (B,) index of the sample in the datamodule's table of samples


class Triplets(NamedTuple):
    """Samples as events in order of time, then variable; padded on the right.

    A rate that runs when the window opens is an event of its first minute.
    """

    static: Tensor  # (B, S)
    time: Tensor  # (B, N) from -1 (start of the window) to 1 (prediction time)
    variable: Tensor  # (B, N) 1 .. F; 0 is padding
    value: Tensor  # (B, N) standardised, clipped to +-5
    length: Tensor  # (B,) events of each sample
    target: Tensor  # (B,)
    row: Tensor  # (B,)

    @property
    def real(self) -> Tensor:
        """(B, N) True where there is an event, False where there is padding."""
        return torch.arange(self.time.shape[1], device=self.time.device) < self.length[:, None]


Batch = Grid | Triplets


class Spec(NamedTuple):
    """What a checkpoint must carry to read another hospital's data as the model expects them. Plain types only."""

    variables: list[str]  # F names in the order of the last axis
    units: list[str]  # their units
    statics: list[str]  # S names
    center: list[float]  # (F,) subtracted from a value in ``units``, fitted on the training split of the source only
    scale: list[float]  # (F,) divided by
    static_center: list[float]  # (S,)
    static_scale: list[float]  # (S,)
    task: dict[str, Any]  # arguments of ``tasks.Task``, ``kind`` and, where there are several, ``labels``

    @property
    def window(self) -> int:
        """T, the hours of history that a sample has: the length of the grid."""
        return int(self.task["window"])

    @property
    def kind(self) -> str:
        """binary, hourly_binary, regression or multilabel."""
        return str(self.task.get("kind", "binary"))

    @property
    def outputs(self) -> int:
        """K, numbers that are predicted for a sample."""
        return len(self.task.get("labels", [None]))


def unlabelled(target: Tensor) -> Tensor:
    """(B,) True where the outcome, or one of several labels, is unknown."""
    return torch.isnan(target) if target.ndim == 1 else torch.isnan(target).any(-1)
