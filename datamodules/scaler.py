"""The variables and the scaler that a model is told of, fitted on training samples only, and batches made with them."""

import copy

import numpy as np
import polars as pl
import torch

from datamodules.agreement import HOURS, task_of
from datamodules.contract import Batch, Grid, Spec, Summary, Triplets, View
from datamodules.dictionary import BY_NAME, CARE_UNITS, CONCEPTS
from datamodules.hospitals.base import Hospital
from datamodules.scores import SCORES, scores
from datamodules.store import Store
from datamodules.summary import STATISTICS
from datamodules.tasks import OUTCOMES, STATICS
from datamodules.views import CLIP, Thinning, Views

FIT_SAMPLES = 8192  # training samples from which the scaler is fitted
# Quantiles at which values and statistics are cut into bins: close together where the few are who are very ill. Bins of
# equal number lost 0.003 of AUROC and 0.008 of AUPRC in a cross-validation inside the training split of PhysioNet 2012.
_TAIL = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4)
LEVELS = (0.0, *_TAIL, 0.5, *(1 - level for level in reversed(_TAIL)), 1.0)
NUMBER, PER_HOUR = "number of ", "number per hour of "  # names of what has elapsed, after HOURS


def fit(hospital: Hospital, store: Store, stay: np.ndarray, minute: np.ndarray) -> Spec:
    """Choose the variables and fit the scaler on the samples of the training split.

    Args:
        hospital: its options: task, treatment, statics, seed.
        store: its events.
        stay: (N,) stay indices of the training samples.
        minute: (N,) their prediction times.

    Raises:
        ValueError: there is no sample, or no value in any window.
    """
    if not len(stay):
        raise ValueError(f"no stay in the training split of {hospital.root}: give more stays")
    everyone = np.unique(stay)
    rng = np.random.default_rng(hospital.seed)
    rows = (
        np.sort(rng.choice(len(stay), FIT_SAMPLES, replace=False)) if len(stay) > FIT_SAMPLES else np.arange(len(stay))
    )
    stay, minute = stay[rows], minute[rows]
    allowed = [c for c in CONCEPTS if hospital.treatment or not c.treatment]
    views = Views(store, [c.name for c in allowed], hospital.task.window_hours)
    moments = np.zeros((3, len(allowed)))
    pieces = np.array_split(np.arange(len(stay)), max(len(stay) // 256, 1))
    for piece in pieces:
        value, mask, _ = views.hourly(stay[piece], minute[piece])
        value = np.where(mask, value, 0).astype(np.float64)  # sums of squares need the digits
        moments += [mask.sum((0, 1)), value.sum((0, 1)), (value**2).sum((0, 1))]
    count, first, second = moments
    seen = count > 0
    if not seen.any():
        raise ValueError(f"no value of any known variable in the training windows of {hospital.root}")
    names = [c.name for c, s in zip(allowed, seen, strict=True) if s]
    center = first[seen] / count[seen]
    scale = np.sqrt(np.maximum(second[seen] / count[seen] - center**2, 0))
    rate = np.array([BY_NAME[n].hourly == "rate" for n in names])
    scale = np.where(rate, np.sqrt(second[seen] / count[seen]), scale)  # a rate keeps 0 at 0: off
    center, scale = np.where(rate, 0, center), np.where(scale > 1e-6, scale, 1)
    views = Views(store, names, hospital.task.window_hours)
    summary = np.concatenate([views.summary(stay[piece], minute[piece]) for piece in pieces])
    charted = [views.events(stay[piece], minute[piece])[2:] for piece in pieces]
    variable, value = (np.concatenate(column) for column in zip(*charted, strict=True))
    standard = (value - center[variable]) / scale[variable]
    quantiles = [_quantiles(standard[variable == k]) for k in range(len(names))]
    static_names, raw = static_columns(store.stays, hospital.statics)
    elapsed = hospital.task.hourly if hospital.elapsed is None else hospital.elapsed
    derived = hospital.task.hourly if hospital.scores is None else hospital.scores
    mine = raw[stay if elapsed or derived else everyone]
    if elapsed:
        static_names = [*static_names, HOURS, *(NUMBER + n for n in names), *(PER_HOUR + n for n in names)]
        mine = np.concatenate([mine, views.elapsed(stay, minute)], 1)
    if derived:
        static_names = [*static_names, *SCORES]
        mine = np.concatenate([mine, scores(summary[..., STATISTICS.index("last")], names)], 1)
    mine = np.where(np.isnan(mine).all(0), 0, mine)
    static_center, static_scale = np.nan_to_num(np.nanmean(mine, 0)), np.nanstd(mine, 0)
    onehot = np.array(["=" in n for n in static_names], bool)
    static_center = np.where(onehot, 0, static_center)
    static_scale = np.where(onehot | ~(static_scale > 1e-6), 1, static_scale)
    return Spec(
        variables=names,
        units=[BY_NAME[n].unit for n in names],
        statics=static_names,
        center=center.tolist(),
        scale=scale.tolist(),
        static_center=static_center.tolist(),
        static_scale=static_scale.tolist(),
        task=task_of(hospital),
        quantiles=quantiles,
        summary_quantiles=[_quantiles(column) for column in summary.reshape(len(summary), -1).T],
    )


def _quantiles(values: np.ndarray) -> list[float]:
    """The quantiles ``LEVELS`` of the values that are numbers; all 0 where there is none."""
    values = values[~np.isnan(values)]
    return np.quantile(values, LEVELS).tolist() if len(values) else [0.0] * len(LEVELS)


def static_columns(stays: pl.DataFrame, statics: list[str]) -> tuple[list[str], np.ndarray]:
    """Names and raw values (stays, S) of static features; ``unit`` becomes one column per kind of unit."""
    assert not set(statics) & set(OUTCOMES)
    names = [n for s in statics for n in ([f"unit={u}" for u in CARE_UNITS] if s == "unit" else [s])]
    columns = [
        (pl.col("unit") == n[5:]).cast(pl.Float32) if n.startswith("unit=") else pl.col(n).cast(pl.Float32)
        for n in names
    ]
    values = stays.select(c.alias(n) for c, n in zip(columns, names, strict=True)).fill_null(float("nan")).to_numpy()
    return names, values.reshape(len(stays), len(names))


class Inputs:
    """What a model is shown of samples: static features, with what has elapsed and derived scores, the summary, and its
    view.

    Args:
        stays: schema ``STAYS``, those of ``views``.
        spec: of the model.
        views: of the spec's variables.
    """

    def __init__(self, stays: pl.DataFrame, spec: Spec, views: Views):
        wanted = [s for s in STATICS if s in spec.statics or any(n.startswith(f"{s}=") for n in spec.statics)]
        names, raw = static_columns(stays, wanted)
        of_stay = [n for n in spec.statics if n in names]
        self.raw = raw[:, [names.index(n) for n in of_stay]]
        self.spec, self.views = spec, views
        self.elapsed, self.scores = HOURS in spec.statics, SCORES[0] in spec.statics
        self.center, self.scale = np.array(spec.static_center, np.float32), np.array(spec.static_scale, np.float32)

    def static(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """(B, S) of pairs of stay index and prediction minute; unknown is the mean."""
        raw = self.raw[stay]
        if self.elapsed:
            raw = np.concatenate([raw, self.views.elapsed(stay, minute)], 1)
        if self.scores:
            raw = np.concatenate([raw, scores(self.views.last(stay, minute), self.views.variables)], 1)
        return np.nan_to_num(np.clip((raw - self.center) / self.scale, -CLIP, CLIP)).astype(np.float32)

    def batch(
        self,
        view: View,
        summary: bool,
        stay: np.ndarray,
        minute: np.ndarray,
        without: np.ndarray | None = None,
        thinning: Thinning | None = None,
    ) -> Batch:
        """Samples in a view; their targets are not known, and their rows count from 0.

        Args:
            view: that the model reads.
            summary: whether it reads the summary, too, which otherwise has no variables.
            stay: (B,) indices.
            minute: (B,) of prediction.
            without: (B, F) variables of each sample that are left out of its record, whatever is made of it.
            thinning: of training.
        """
        inputs = self
        if without is not None:
            inputs = copy.copy(self)
            inputs.views = self.views.less(without)
        views, count = inputs.views, len(stay)
        statistics = np.zeros((count, 0, len(STATISTICS)), np.float32)
        if summary or view == "summary":
            statistics = views.summary(stay, minute, thinning)
        first = torch.from_numpy(inputs.static(stay, minute)), torch.from_numpy(statistics)
        last = torch.full((count,), torch.nan), torch.arange(count)
        if view == "grid":
            return Grid(*first, *views.grid(self.spec, stay, minute, thinning), *last)
        if view == "triplets":
            return Triplets(*first, *views.triplets(self.spec, stay, minute, thinning), *last)
        return Summary(*first, *last)
