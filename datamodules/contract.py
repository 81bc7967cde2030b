"""The contract between data and models: what a batch holds, and what a model is told of the data.

Every view holds ``static``, ``summary``, ``target`` and ``row``. ``summary`` is (B, F, 16), the statistics of
``summary.STATISTICS`` in the variables' units and hours, NaN where there is nothing to tell; a model that does not ask
for it (``ICUModule.summary``) gets one of no variables, (B, 0, 16). In training, ``target`` may lie between 0 and 1: a
teacher's probability mixed with the outcome.

Shape letters: B samples, T hours, N events, F variables, S static features.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.summary import STATISTICS as STATISTICS


class Grid(NamedTuple):
    """Samples as an hourly grid; the last hour ends at the prediction time.

    ``value`` is carried forward from the last hour in which the variable was seen and is 0 (the mean) before that; a
    rate is the mean over the hour, one that was set before the window included.
    """

    static: Tensor  # (B, S) standardised; units of care one-hot; for hourly tasks also what has elapsed, scores
    summary: Tensor  # (B, F, 16)
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
    summary: Tensor  # (B, F, 16)
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


class Summary(NamedTuple):
    """Samples as statistics of each variable over the window."""

    static: Tensor  # (B, S)
    summary: Tensor  # (B, F, 16)
    target: Tensor  # (B,)
    row: Tensor  # (B,)


Batch = Grid | Triplets | Summary
PADDED = ("time", "variable", "value")  # fields of triplets whose second axis is as long as the longest sample


def joined(batches: "list[Batch]") -> "Batch":
    """Batches of one view as one."""
    kind = type(batches[0])
    columns = dict(zip(kind._fields, map(list, zip(*batches, strict=True)), strict=True))
    if kind is Triplets:
        longest = max(time.shape[1] for time in columns["time"])
        for name in PADDED:
            columns[name] = [F.pad(part, (0, longest - part.shape[1])) for part in columns[name]]
    return kind(**{name: torch.cat(parts) for name, parts in columns.items()})


View = Literal["grid", "triplets", "summary"]
VIEWS: dict[str, Any] = {"grid": Grid, "triplets": Triplets, "summary": Summary}


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
    quantiles: list[list[float]] = []  # noqa: RUF012  # (F, K + 1) of standardised values
    summary_quantiles: list[list[float]] = []  # noqa: RUF012  # (F * 16, K + 1) of the summary, in its units

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
