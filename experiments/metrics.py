"""Predictions -> metrics, each with an interval from resampled patients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

REPLICATES = 1000


class Counts(NamedTuple):
    """What every metric is computed from: weighted counts of rows that are sorted by falling probability.

    A curve has a point for each distinct probability, taken as the threshold, the greatest first.
    """

    recall: np.ndarray  # of each point; NaN without positives
    fall_out: np.ndarray  # 1 - specificity; NaN without negatives
    precision: np.ndarray
    true_alerts: float  # positives above the threshold; NaN where there is none
    false_alerts: float
    positives: float
    negatives: float
    stays: float
    squared_error: float  # summed

    @property
    def true_silence(self) -> float:
        """Negatives below the threshold."""
        return self.negatives - self.false_alerts

    @property
    def false_silence(self) -> float:
        """Positives below the threshold."""
        return self.positives - self.true_alerts


class Metric(NamedTuple):
    """An entry of ``METRICS``.

    Attributes:
        value: its value, NaN where it has none.
        label: what tables call it; None: not shown there.
        digits: decimals that tables show.
    """

    value: Callable[[Counts], float]
    label: str | None
    digits: int = 3


def _area(counts: Counts) -> float:
    recall = np.append(0, counts.recall)
    return np.sum(np.diff(counts.fall_out, prepend=0) * (recall[1:] + recall[:-1]) / 2)


# In the order in which tables show them.
METRICS: dict[str, Metric] = {
    "auroc": Metric(_area, "AUROC"),
    "auprc": Metric(lambda c: np.sum(np.diff(c.recall, prepend=0) * c.precision), "AUPRC"),
    "brier": Metric(lambda c: c.squared_error / (c.positives + c.negatives), "Brier"),
    "sensitivity": Metric(lambda c: c.true_alerts / c.positives, "sensitivity"),
    "specificity": Metric(lambda c: c.true_silence / c.negatives, "specificity"),
    "ppv": Metric(lambda c: c.true_alerts / (c.true_alerts + c.false_alerts), "PPV"),
    "npv": Metric(lambda c: c.true_silence / (c.true_silence + c.false_silence), "NPV"),
    "alerts_per_100_stays": Metric(lambda c: 100 * (c.true_alerts + c.false_alerts) / c.stays, "alerts/100 stays", 1),
    # the largest over thresholds of the smaller of recall and precision: event 1 score of the 2012 challenge
    "min_re_pr": Metric(lambda c: np.max(np.minimum(c.recall, c.precision)), None),
}


def score(predictions: pl.DataFrame, threshold: float | None, replicates: int = REPLICATES) -> dict[str, Any]:
    """Metrics of a predictions table, each with a 95 % interval.

    Args:
        predictions: columns ``stay_id, patient_id, target, probability``; rows without a target are left out.
        threshold: probability from which on an alert is raised; chosen on validation data, never on these. None: there
            is none, and the metrics of alerts are null.
        replicates: bootstrap resamples of patients (all rows of a patient go together); 0 gives no intervals.

    Returns:
        ``{metric: {"value", "low", "high"}}`` for every name in ``METRICS`` and ``n``, ``n_positive``, ``n_patients``,
        ``n_stays``, ``threshold``. A metric that needs both classes is null where only one occurs.

    Raises:
        ValueError: no row has a target, or a probability is not a number.
    """
    rows = Rows(predictions, threshold)
    point = rows.metrics(METRICS)
    drawn = np.array([rows.metrics(METRICS, times) for times in _resamples(rows.patients, replicates)])
    return _with_intervals(METRICS, point, drawn) | {
        "n": len(rows.outcome),
        "n_positive": int(rows.outcome.sum()),
        "n_patients": rows.patients,
        "n_stays": int(rows.first_of_stay.sum()),
        "threshold": threshold,
    }


def difference(
    first: pl.DataFrame, second: pl.DataFrame, replicates: int = REPLICATES
) -> dict[str, dict[str, float | None]]:
    """AUROC and AUPRC of ``second`` less those of ``first``, with paired intervals: both see the same resamples.

    Args:
        first: predictions as ``score`` takes them.
        second: other predictions of the same stays and minutes.
        replicates: bootstrap resamples of patients.

    Returns:
        ``{"auroc": {"value", "low", "high"}, "auprc": ...}``; an interval that excludes 0 is a difference.

    Raises:
        ValueError: the two tables are not of the same samples.
    """
    key = ["patient_id", "stay_id", "minute"]
    if not first.select(key).sort(key).equals(second.select(key).sort(key)):
        raise ValueError(
            "two predictions can only be compared on the same samples; evaluate both on the same data and split"
        )
    names = ("auroc", "auprc")
    one, two = Rows(first, None), Rows(second, None)
    point = np.subtract(two.metrics(names), one.metrics(names))
    drawn = [
        np.subtract(two.metrics(names, times), one.metrics(names, times))
        for times in _resamples(one.patients, replicates)
    ]
    return _with_intervals(names, point, np.array(drawn))


def text(name: str, result: dict[str, Any]) -> str:
    """A metric of what ``score`` returns, for people: ``0.859 (0.835-0.882)``, or ``-`` where it has no value."""
    value, low, high = (result[name][part] for part in ("value", "low", "high"))
    if value is None:
        return "-"
    digits = METRICS[name].digits
    return f"{value:.{digits}f}" + ("" if low is None else f" ({low:.{digits}f}-{high:.{digits}f})")


class Rows:
    """The rows of a predictions table whose target is known, by falling probability.

    Raises:
        ValueError: there is none, or a probability is not a number.
    """

    def __init__(self, predictions: pl.DataFrame, threshold: float | None):
        wrong = len(predictions) - predictions["probability"].is_finite().sum()
        if wrong:
            raise ValueError(
                f"{wrong:,} of {len(predictions):,} predicted probabilities are not finite numbers: the model's weights "
                "or its input are not either; train it again with a lower learning rate"
            )
        labelled = (
            predictions.drop_nulls("target")
            .filter(pl.col("target").is_not_nan())
            .sort("probability", descending=True, maintain_order=True)
        )
        if labelled.is_empty():
            raise ValueError(
                "no row with a known outcome to score; use `ehr predict` for patients whose outcome is unknown"
            )
        self.probability = labelled["probability"].to_numpy()
        self.outcome = labelled["target"].to_numpy().astype(np.float64)
        self.first_of_stay = labelled["stay_id"].is_first_distinct().to_numpy()
        self._patient = labelled["patient_id"].rank("dense").to_numpy() - 1
        self.patients = int(self._patient.max()) + 1
        self._last_of_tie = np.append(self.probability[1:] != self.probability[:-1], True)
        alert: Any = np.nan if threshold is None else self.probability >= threshold
        self._true, self._false = self.outcome * alert, (1 - self.outcome) * alert
        self._squared_error = (self.probability - self.outcome) ** 2

    def counts(self, weight: np.ndarray | None = None) -> Counts:
        """The counts under a weight of each row; default: each counts once."""
        w = np.ones(len(self.outcome)) if weight is None else weight
        true = np.cumsum(w * self.outcome)[self._last_of_tie]
        false = np.cumsum(w * (1 - self.outcome))[self._last_of_tie]
        with np.errstate(invalid="ignore", divide="ignore"):
            return Counts(
                recall=true / true[-1],
                fall_out=false / false[-1],
                precision=np.nan_to_num(true / (true + false)),
                true_alerts=w @ self._true,
                false_alerts=w @ self._false,
                positives=true[-1],
                negatives=false[-1],
                stays=w @ self.first_of_stay,
                squared_error=w @ self._squared_error,
            )

    def metrics(self, names: Iterable[str], times: np.ndarray | None = None) -> list[float]:
        """The named metrics with each patient taken so many ``times``; default: once."""
        counts = self.counts(None if times is None else times[self._patient])
        with np.errstate(invalid="ignore", divide="ignore"):
            return [METRICS[name].value(counts) for name in names]


def choose_threshold(predictions: pl.DataFrame, operating_point: str = "youden") -> float | None:
    """``ehrmodels.kinds.threshold`` of the rows of a predictions table whose target is known."""
    from ehrmodels.kinds import threshold  # here, since ``ehr prepare`` prints tables without torch

    labelled = predictions.filter(pl.col("target").is_not_nan())
    return threshold(labelled["probability"].to_torch(), labelled["target"].to_torch(), operating_point)


def _resamples(patients: int, replicates: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn, per replicate; the same for the same number of patients."""
    rng, share = np.random.default_rng(0), np.full(patients, 1 / patients)
    return (rng.multinomial(patients, share).astype(np.float64) for _ in range(replicates))


def _with_intervals(names: Iterable[str], point: Sequence[float] | np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """Each value with the middle 95 % of those ``drawn`` (replicates, names); null where it is no number."""
    result: dict[str, Any] = {}
    for k, name in enumerate(names):
        finite = drawn[np.isfinite(drawn[:, k]), k] if len(drawn) else drawn
        low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
        triple = {"value": point[k], "low": low, "high": high}
        result[name] = {part: float(value) if np.isfinite(value) else None for part, value in triple.items()}
    return result
