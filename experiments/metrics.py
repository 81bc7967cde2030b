"""Predictions -> metrics, each with an interval from resampled patients, and paired differences between models.

References:

1. Reyna et al., Early prediction of sepsis from clinical data: the PhysioNet/Computing in Cardiology Challenge 2019, 2020,
   doi:10.1097/CCM.0000000000004145: the utility of alerts.
2. DeLong, DeLong, Clarke-Pearson, Comparing the areas under two or more correlated receiver operating characteristic curves, 1988.
3. Sun, Xu, Fast implementation of DeLong's algorithm, 2014: the same from ranks.
4. Van Calster et al., Calibration: the Achilles heel of predictive analytics, 2019, doi:10.1186/s12916-019-1466-7: slope and intercept.
5. Nixon et al., Measuring calibration in deep learning, 2019, arXiv:1904.01685: adaptive calibration error.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl

REPLICATES = 1000
GROUPS = 10  # of like risk, for the calibration error
NORMAL = 1.959963984540054  # standard errors on either side that hold 95 %
KEY = ["patient_id", "stay_id", "minute"]
NOT_THE_SAME = "two predictions can only be compared on the same samples; evaluate both on the same data and split"
CHALLENGE: dict[str, Any] = {
    "name": "sepsis_onset",
    "hours": 1,
    "lead": 6,
    "after_onset": True,
}  # the task that ``utility`` is defined for
# of an alert: hours from onset at which it begins to be of use, is of most use, and is of none any more; the most that it is
# worth; a silent hour at the last of these; a false alert
EARLY, OPTIMAL, LATE, MOST, MISSED, FALSE_ALERT = -12, -6, 3, 1.0, -2.0, -0.05


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
    gained: float  # utility of the alerts less that of none; NaN without a threshold or where utility is not defined
    gainable: float  # the same of the best possible alerts
    calibration: "Calibration"

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
        everywhere: whether tables show it also where no result has a value of it.
    """

    value: Callable[[Counts], float]
    label: str | None
    digits: int = 3
    everywhere: bool = True


def _area(counts: Counts) -> float:
    recall = np.append(0, counts.recall)
    return np.sum(np.diff(counts.fall_out, prepend=0) * (recall[1:] + recall[:-1]) / 2)


# In the order in which tables show them.
METRICS: dict[str, Metric] = {
    "auroc": Metric(_area, "AUROC"),
    "auprc": Metric(lambda c: np.sum(np.diff(c.recall, prepend=0) * c.precision), "AUPRC"),
    "brier": Metric(lambda c: c.squared_error / (c.positives + c.negatives), "Brier"),
    # mean distance of predicted and observed share over ten groups of like risk, of as many rows each [5]
    "ece": Metric(lambda c: c.calibration.error(), "ECE"),
    # of the logit in a logistic regression of the outcome; below 1, risks are too extreme [4]
    "slope": Metric(lambda c: c.calibration.slope(), "cal. slope", 2),
    # of the same with a slope of 1; below 0, risks are too high [4]
    "intercept": Metric(lambda c: c.calibration.intercept(), "cal. intercept", 2),
    "sensitivity": Metric(lambda c: c.true_alerts / c.positives, "sensitivity"),
    "specificity": Metric(lambda c: c.true_silence / c.negatives, "specificity"),
    "ppv": Metric(lambda c: c.true_alerts / (c.true_alerts + c.false_alerts), "PPV"),
    "npv": Metric(lambda c: c.true_silence / (c.true_silence + c.false_silence), "NPV"),
    "alerts_per_100_stays": Metric(lambda c: 100 * (c.true_alerts + c.false_alerts) / c.stays, "alerts/100 stays", 1),
    # 0: as good as no alert at all; 1: the best possible alerts
    "utility": Metric(lambda c: c.gained / c.gainable if c.gainable else np.nan, "utility", everywhere=False),
    # the largest over thresholds of the smaller of recall and precision: event 1 score of the 2012 challenge
    "min_re_pr": Metric(lambda c: np.max(np.minimum(c.recall, c.precision)), None),
}


def score(
    predictions: pl.DataFrame,
    threshold: float | None,
    replicates: int = REPLICATES,
    task: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of a predictions table, each with a 95 % interval.

    Args:
        predictions: columns ``stay_id, patient_id, minute, target, probability``; rows without a target are left out.
        threshold: probability from which on an alert is raised; chosen on validation data, never on these. None: there
            is none, and the metrics of alerts are null.
        replicates: bootstrap resamples of patients (all rows of a patient go together); 0 gives no intervals.
        task: what is predicted, as a model's ``spec.task`` says it; ``utility`` is null without one that it is defined for.

    Returns:
        ``{metric: {"value", "low", "high"}}`` for every name in ``METRICS`` and ``n``, ``n_positive``, ``n_patients``,
        ``n_stays``, ``threshold``. A metric that needs both classes is null where only one occurs.

    Raises:
        ValueError: no row has a target, or a probability is not a number.
    """
    rows = Rows(predictions, threshold, has_utility(task))
    return with_intervals(METRICS, rows.drawn(METRICS, replicates)) | {
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
    if not first.select(KEY).sort(KEY).equals(second.select(KEY).sort(KEY)):
        raise ValueError(NOT_THE_SAME)
    names = ("auroc", "auprc")
    one, two = Rows(first, None), Rows(second, None)
    return with_intervals(names, two.drawn(names, replicates) - one.drawn(names, replicates))


def delong(first: Sequence[pl.DataFrame], second: Sequence[pl.DataFrame]) -> dict[str, float | None]:
    """AUROC of ``second`` less that of ``first`` with an interval and a p-value by DeLong's test of correlated curves.

    Of several tables, such as those of several seeds, the mean of their AUROCs counts: the test is that of a contrast of as
    many curves. It takes rows for independent, so every patient may have one only; else see ``difference``.

    Args:
        first: one or more predictions tables.
        second: one or more others of the same stays and minutes.

    Returns:
        ``value, low, high, p`` (two-sided, of no difference). All but the value are null where the variance is 0 and the value
        is not, or where an outcome occurs less than twice; the value, too, where one does not occur.

    Raises:
        ValueError: the tables are not of the same samples, or a patient has several rows.
    """
    tables = [labelled(table).sort(KEY) for table in (*first, *second)]
    if any(not table.select(*KEY, "target").equals(tables[0].select(*KEY, "target")) for table in tables):
        raise ValueError(NOT_THE_SAME)
    if not one_row_a_patient(tables[0]):
        raise ValueError(
            "DeLong's test takes rows for independent, but some patients have several: use the bootstrap by patient"
        )
    event = tables[0]["target"].to_numpy() == 1
    positives, negatives = int(event.sum()), int((~event).sum())
    if not positives or not negatives:
        return dict.fromkeys(("value", "low", "high", "p"))
    share = [-1 / len(first)] * len(first) + [1 / len(second)] * len(second)
    # of each positive, the share of negatives below it, and of each negative, the share of positives above it; the
    # contrast of the curves is taken here, so that of the matrix of covariances only one entry is left
    above, below = np.zeros(positives), np.zeros(negatives)
    for weight, table in zip(share, tables, strict=True):
        score = table["probability"].to_numpy()
        rank = _midrank(score)
        above += weight * (rank[event] - _midrank(score[event])) / negatives
        below += weight * (1 - (rank[~event] - _midrank(score[~event])) / positives)
    value = float(above.mean())
    if min(positives, negatives) < 2:
        return {"value": value, "low": None, "high": None, "p": None}
    error = math.sqrt(above.var(ddof=1) / positives + below.var(ddof=1) / negatives)
    if error < 1e-12:  # ranks are exact, and so are equal curves but for the rounding of sums
        same = abs(value) < 1e-12
        return {"value": value, **dict.fromkeys(("low", "high"), value if same else None), "p": 1.0 if same else None}
    return {
        "value": value,
        "low": value - NORMAL * error,
        "high": value + NORMAL * error,
        "p": math.erfc(abs(value) / error / math.sqrt(2)),
    }


def one_row_a_patient(predictions: pl.DataFrame) -> bool:
    """Whether rows are those of different patients, as ``delong`` takes them to be."""
    return not predictions["patient_id"].is_duplicated().any()


def _midrank(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 1 on, equal ones sharing the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def has_utility(task: dict[str, Any] | None) -> bool:
    """Whether the utility of the 2019 challenge is defined for a task: its labels must be made as there."""
    return task is not None and all(task.get(key) == value for key, value in CHALLENGE.items())


def alert_gain(hour: np.ndarray) -> np.ndarray:
    """Utility of an alert less that of silence, in an hour of the stay of a patient with sepsis; 0 late after the onset.

    An alert is worth most six hours before the onset, less the farther from it, and is false more than twelve hours before; silence
    costs more and more from six hours before to three hours after.

    Args:
        hour: hours from the onset of sepsis, negative before it; NaN for a patient without.
    """
    early = np.maximum(MOST * (hour - EARLY) / (OPTIMAL - EARLY), FALSE_ALERT)
    late = MOST * (LATE - hour) / (LATE - OPTIMAL)
    silence = np.where(hour <= OPTIMAL, 0.0, MISSED * (hour - OPTIMAL) / (LATE - OPTIMAL))
    gain = np.where(hour <= OPTIMAL, early, late) - silence
    return np.where(np.isnan(hour), FALSE_ALERT, np.where(hour > LATE, 0.0, gain))


def hours_from_onset() -> pl.Expr:
    """Of rows of an hourly task: hours from the onset of sepsis, which the label precedes by six hours; NaN without sepsis."""
    labelled = pl.when(pl.col("target") == 1).then("minute").min().over("stay_id")
    return ((pl.col("minute") - labelled) / 60 - CHALLENGE["lead"]).fill_null(float("nan"))


def text(name: str, result: dict[str, Any]) -> str:
    """A metric of what ``score`` returns, for people: ``0.859 (0.835-0.882)``, or ``-`` where it has no value."""
    value, low, high = (result[name][part] for part in ("value", "low", "high"))
    if value is None:
        return "-"
    digits = METRICS[name].digits
    return f"{value:.{digits}f}" + (
        "" if low is None else f" ({low:.{digits}f}{' to ' if low < 0 else '-'}{high:.{digits}f})"
    )


def cell(name: str, record: dict[str, Any]) -> str:
    """``text`` of a metric from a row of a table: the columns ``name, name_low, name_high``."""
    return text(name, {name: {"value": record[name], "low": record[f"{name}_low"], "high": record[f"{name}_high"]}})


class Calibration(NamedTuple):
    """How far predicted risks are from observed shares, where each patient is taken so many times; computed when it is asked for.

    Attributes:
        rows: of the predictions.
        weight: of each row.
        times: that each patient is taken; None: once.
    """

    rows: "Rows"
    weight: np.ndarray
    times: np.ndarray | None

    def error(self) -> float:
        """The adaptive calibration error."""
        w, starts = self.weight, self.rows._groups
        excess = np.add.reduceat(w * (self.rows.probability - self.rows.outcome), starts)
        return float(np.abs(excess).sum() / w.sum())

    def slope(self) -> float:
        """NaN where an outcome does not occur, or risks are all the same."""
        return self._regression("slope")

    def intercept(self) -> float:
        """NaN where an outcome does not occur."""
        return self._regression("intercept")

    def _regression(self, name: str) -> float:
        regressions = self.rows._regressions
        return regressions[name].estimate(self.times) if name in regressions else float("nan")


class Regression:
    """A logistic regression of outcomes on logits of risks: its slope, or the intercept that it has with a slope of 1.

    Resamples take one Newton step from the estimate of all, whose sums are kept by patient: the linear bootstrap.

    Args:
        x: (N,) logits.
        outcome: (N,) 0 or 1.
        patient: (N,) number of the patient of each row.
        slope: of an intercept and a slope; else the intercept alone.
    """

    def __init__(self, x: np.ndarray, outcome: np.ndarray, patient: np.ndarray, slope: bool):
        from ehrmodels.calibration import logistic  # loads torch

        self.estimates = np.array(logistic(x, outcome, slope=slope))
        self.free = slice(0, 2) if slope else slice(1, 2)
        risk = 1 / (1 + np.exp(-np.clip(self.estimates @ [x, np.ones_like(x)], -500, 500)))
        curvature, gradient = risk * (1 - risk), outcome - risk
        terms = (gradient * x, gradient, curvature * x * x, curvature * x, curvature)
        self.terms = np.stack([np.bincount(patient, term) for term in terms], 1)  # (patients, 5)

    def estimate(self, times: np.ndarray | None) -> float:
        """With each patient taken so many times."""
        at = self.estimates[self.free]
        if times is not None and np.isfinite(at).all():
            g0, g1, h00, h01, h11 = times @ self.terms
            gradient, curvature = (
                np.array([g0, g1])[self.free],
                np.array([[h00, h01], [h01, h11]])[self.free, self.free],
            )
            try:
                at = at + np.linalg.solve(curvature, gradient)
            except np.linalg.LinAlgError:
                return float("nan")
        return float(at[0])


class Rows:
    """The rows of a predictions table whose target is known, by falling probability.

    Raises:
        ValueError: there is none, or a probability is not a number.
    """

    def __init__(self, predictions: pl.DataFrame, threshold: float | None, utility: bool = False):
        wrong = len(predictions) - predictions["probability"].is_finite().sum()
        if wrong:
            raise ValueError(
                f"{wrong:,} of {len(predictions):,} predicted probabilities are not finite numbers: the model's weights "
                "or its input are not either; train it again with a lower learning rate"
            )
        rows = labelled(predictions)
        if utility:
            rows = rows.with_columns(hour=hours_from_onset())
        rows = rows.sort("probability", descending=True, maintain_order=True)
        if rows.is_empty():
            raise ValueError(
                "no row with a known outcome to score; use `ehr predict` for patients whose outcome is unknown"
            )
        self.probability = rows["probability"].to_numpy()
        self.outcome = rows["target"].to_numpy().astype(np.float64)
        self.first_of_stay = rows["stay_id"].is_first_distinct().to_numpy()
        self._patient = rows["patient_id"].rank("dense").to_numpy() - 1
        self.patients = int(self._patient.max()) + 1
        self._last_of_tie = np.append(self.probability[1:] != self.probability[:-1], True)
        alert: Any = np.nan if threshold is None else self.probability >= threshold
        self._true, self._false = self.outcome * alert, (1 - self.outcome) * alert
        self._squared_error = (self.probability - self.outcome) ** 2
        hour = rows["hour"].to_numpy() if utility else np.full(len(rows), np.nan)
        self.gain = alert_gain(hour) if utility else hour
        self._gained, self._gainable = self.gain * alert, self.gain * ((hour >= EARLY) & (hour <= LATE))

    @cached_property
    def _regressions(self) -> "dict[str, Regression]":
        from ehrmodels.calibration import logit  # loads torch

        both = 0 < self.outcome.sum() < len(self.outcome)
        x = logit(self.probability)
        return {
            name: Regression(x, self.outcome, self._patient, name == "slope") for name in ("slope", "intercept") if both
        }

    @cached_property
    def _groups(self) -> np.ndarray:
        """First rows of the groups of like risk; equal risks are in one."""
        first_of_tie = np.maximum.accumulate(
            np.where(np.append(True, self._last_of_tie[:-1]), np.arange(len(self.outcome)), 0)
        )
        bounds = [part[0] for part in np.array_split(np.arange(len(self.outcome)), GROUPS) if len(part)]
        return np.unique(first_of_tie[bounds])

    def counts(self, times: np.ndarray | None = None) -> Counts:
        """The counts with each patient taken so many ``times``; default: once."""
        w = np.ones(len(self.outcome)) if times is None else times[self._patient]
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
                gained=w @ self._gained,
                gainable=w @ self._gainable,
                calibration=Calibration(self, w, times),
            )

    def metrics(self, names: Iterable[str], times: np.ndarray | None = None) -> list[float]:
        """The named metrics with each patient taken so many ``times``; default: once."""
        counts = self.counts(times)
        with np.errstate(invalid="ignore", divide="ignore"):
            return [METRICS[name].value(counts) for name in names]

    def drawn(self, names: Iterable[str], replicates: int) -> np.ndarray:
        """(1 + replicates, names): the named metrics, and those of resamples of patients, which are the same for all rows of the
        same patients, so that differences are paired."""
        names = list(names)
        resampled = [self.metrics(names, times) for times in resamples(self.patients, replicates)]
        return np.array([self.metrics(names), *resampled])

    def most_useful_threshold(self) -> float | None:
        """The probability that as a threshold has the largest utility, the greatest of equals; None where no alert is better."""
        gained = np.cumsum(self.gain)[self._last_of_tie]
        best = int(np.argmax(gained))
        return float(self.probability[self._last_of_tie][best]) if gained[best] > 0 else None


def choose_threshold(
    predictions: pl.DataFrame, operating_point: str = "youden", task: dict[str, Any] | None = None
) -> float | None:
    """``ehrmodels.kinds.threshold`` of the rows of a predictions table whose target is known, or the most useful one."""
    if operating_point == "utility":
        check_operating_point(operating_point, task)
        return Rows(predictions, None, utility=True).most_useful_threshold()
    from ehrmodels.kinds import threshold  # here, since ``ehr prepare`` prints tables without torch

    rows = labelled(predictions)
    return threshold(rows["probability"].to_torch(), rows["target"].to_torch(), operating_point)


def check_operating_point(text: str, task: dict[str, Any] | None) -> None:
    """Refuse an operating point that there is not, or not for a task.

    Raises:
        ValueError: says what is expected.
    """
    from ehrmodels import kinds

    kinds.check_operating_point(text)
    if text == "utility" and not has_utility(task):
        raise ValueError(
            "--operating_point utility is defined for hourly sepsis as in the 2019 challenge alone: expected --data.task "
            f"sepsis_onset --data.hours 1 --data.lead 6 --data.after_onset true, found {_told(task)}; choose youden, or a target "
            "such as sensitivity=0.9"
        )


def _told(task: dict[str, Any] | None) -> str:
    if task is None:
        return "no task"
    return f"--data.task {task.get('name')} " + " ".join(
        f"--data.{key} {str(task.get(key)).lower()}" for key in CHALLENGE if key != "name"
    )


def labelled(predictions: pl.DataFrame) -> pl.DataFrame:
    """Rows whose outcome is known."""
    return predictions.drop_nulls("target").filter(pl.col("target").is_not_nan())


def resamples(patients: int, replicates: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn, per replicate; the same for the same number of patients."""
    rng, share = np.random.default_rng(0), np.full(patients, 1 / patients)
    return (rng.multinomial(patients, share).astype(np.float64) for _ in range(replicates))


def with_intervals(names: Iterable[str], drawn: np.ndarray) -> dict[str, Any]:
    """Each value, the first row of ``drawn`` (1 + replicates, names), with the middle 95 % of the others; null where it is no number."""
    result: dict[str, Any] = {}
    for k, name in enumerate(names):
        finite = drawn[1:, k][np.isfinite(drawn[1:, k])]
        low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
        triple = {"value": drawn[0, k], "low": low, "high": high}
        result[name] = {part: float(value) if np.isfinite(value) else None for part, value in triple.items()}
    return result
