"""Predictions -> metrics with patient-clustered bootstrap intervals, tables and one picture."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from datamodules.dictionary import CONCEPTS
from experiments import files

REPLICATES = 1000
METRICS = ("auroc", "auprc", "min_re_pr", "brier", "sensitivity", "specificity", "ppv", "npv", "alerts_per_100_stays")


def score(predictions: pl.DataFrame, threshold: float, replicates: int = REPLICATES) -> dict[str, Any]:
    """Metrics of a predictions table, each with a 95 % interval.

    Args:
        predictions: columns ``stay_id, patient_id, target, probability``; rows without a target are left out.
        threshold: probability from which on an alert is raised; chosen on validation data, never on these.
        replicates: bootstrap resamples of patients (all rows of a patient go together); 0 gives no intervals.

    Returns:
        ``{metric: {"value", "low", "high"}}`` for every name in ``METRICS`` and ``n``, ``n_positive``, ``n_patients``,
        ``n_stays``, ``threshold``. ``min_re_pr`` is the largest over thresholds of the smaller of recall and precision
        (event 1 score of the 2012 challenge). A metric that needs both classes is null where only one occurs.
    """
    measure, patient = _measure(predictions, threshold)
    point = measure(np.ones(len(patient)))
    drawn = [measure(counts[patient]) for counts in _resamples(patient, replicates)]
    result: dict[str, Any] = {}
    for k, name in enumerate(METRICS):
        spread = np.array([d[k] for d in drawn])
        spread = spread[np.isfinite(spread)]
        low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (np.nan, np.nan)
        result[name] = {"value": _plain(point[k]), "low": _plain(low), "high": _plain(high)}
    result |= {"n": len(patient), "n_positive": int(measure.y.sum())}
    result |= {
        "n_patients": int(patient.max()) + 1,
        "n_stays": int(measure.first_of_stay.sum()),
        "threshold": threshold,
    }
    return result


def difference(
    first: pl.DataFrame, second: pl.DataFrame, replicates: int = REPLICATES
) -> dict[str, dict[str, float | None]]:
    """AUROC and AUPRC of ``second`` less those of ``first`` on the same samples, with paired intervals: both see the same resamples.

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
    (one, patient_one), (two, patient_two) = _measure(first, 0.5), _measure(second, 0.5)

    def gap(counts: np.ndarray) -> list[float]:
        return [b - a for a, b in zip(one(counts[patient_one])[:2], two(counts[patient_two])[:2], strict=True)]

    drawn = np.array([gap(counts) for counts in _resamples(patient_one, replicates)])
    spread = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    point = gap(np.ones(int(patient_one.max()) + 1))
    return {
        m: {"value": _plain(point[k]), "low": _plain(spread[0, k]), "high": _plain(spread[1, k])}
        for k, m in enumerate(METRICS[:2])
    }


def _measure(predictions: pl.DataFrame, threshold: float) -> tuple["_Measure", np.ndarray]:
    """The measure of the rows with a known target, and the number of the patient that each belongs to."""
    known = (
        predictions.drop_nulls("target")
        .filter(pl.col("target").is_not_nan())
        .sort("probability", descending=True, maintain_order=True)
    )
    if known.is_empty():
        raise ValueError(
            "no row with a known outcome to score; use `ehr predict` for patients whose outcome is unknown"
        )
    p, y = known["probability"].to_numpy(), known["target"].to_numpy().astype(np.float64)
    last_of_tie = np.append(p[1:] != p[:-1], True)
    return _Measure(p, y, known["stay_id"].is_first_distinct().to_numpy(), last_of_tie, threshold), known[
        "patient_id"
    ].rank("dense").to_numpy() - 1


def _resamples(patient: np.ndarray, replicates: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn, per replicate; the same for the same number of patients."""
    patients = int(patient.max()) + 1
    rng = np.random.default_rng(0)
    return (rng.multinomial(patients, np.full(patients, 1 / patients)).astype(np.float64) for _ in range(replicates))


class _Measure:
    """The metrics of one weighting of the rows; rows are sorted by falling probability."""

    def __init__(
        self, p: np.ndarray, y: np.ndarray, first_of_stay: np.ndarray, last_of_tie: np.ndarray, threshold: float
    ):
        self.p, self.y, self.first_of_stay, self.tie, self.alert = p, y, first_of_stay, last_of_tie, p >= threshold
        self.error = (p - y) ** 2

    def __call__(self, w: np.ndarray) -> list[float]:
        true, false = np.cumsum(w * self.y)[self.tie], np.cumsum(w * (1 - self.y))[self.tie]
        positive, negative = true[-1], false[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, fall_out = np.append(0, true / positive), np.append(0, false / negative)
            precision = np.nan_to_num(true / (true + false))
            auroc = np.sum(np.diff(fall_out) * (recall[1:] + recall[:-1]) / 2)
            auprc = np.sum(np.diff(recall) * precision)
            best = np.max(np.minimum(recall[1:], precision))
            tp, fp = np.sum(w * self.y * self.alert), np.sum(w * (1 - self.y) * self.alert)
            tn, fn = negative - fp, positive - tp
            total = positive + negative
            alerts = 100 * (tp + fp) / np.sum(w * self.first_of_stay)
            if not positive > 0:
                auprc = best = np.nan
            return [
                auroc,
                auprc,
                best,
                np.sum(w * self.error) / total,
                tp / positive,
                tn / negative,
                tp / (tp + fp),
                tn / (tn + fn),
                alerts,
            ]


def choose_threshold(predictions: pl.DataFrame) -> float:
    """The probability with the largest sensitivity + specificity - 1 (Youden 1950); 0.5 where only one class occurs."""
    known = predictions.filter(pl.col("target").is_not_nan()).sort("probability", descending=True)
    p, y = known["probability"].to_numpy(), known["target"].to_numpy()
    if not 0 < y.sum() < len(y):
        return 0.5
    gain = np.cumsum(y) / y.sum() - np.cumsum(1 - y) / (1 - y).sum()
    gain[np.append(p[1:] == p[:-1], False)] = -1
    return float(p[np.argmax(gain)])


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Print results side by side: a row each, metrics with intervals."""
    table = Table(title="intervals: 95 %, bootstrap over patients", show_lines=True)
    for heading in ("", "n", "positive", "AUROC", "AUPRC", "NPV", "sensitivity", "specificity", "Brier"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for name, r in results.items():
        cells = [_cell(r[m]) for m in ("auroc", "auprc", "npv", "sensitivity", "specificity", "brier")]
        table.add_row(name, str(r["n"]), str(r["n_positive"]), *cells)
    console.print(table)
    few = [name for name, r in results.items() if min(r["n_positive"], r["n"] - r["n_positive"]) < 30]
    if few:
        console.print(
            f"[yellow]fewer than 30 positives or negatives ({', '.join(few)}): these scores are too uncertain to mean anything[/]"
        )


def draw(predictions: dict[str, pl.DataFrame], path: Path) -> None:
    """ROC, precision-recall and calibration curves of one or more predictions tables as one PNG."""
    with figure(path, (13, 4.2)) as drawn:
        _draw_curves(predictions, drawn)


@contextmanager
def figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure of ``size`` inches to draw on, which becomes a PNG afterwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawn)
    yield drawn
    content = io.BytesIO()
    drawn.savefig(content, dpi=110, format="png")
    files.write(path, content.getvalue())


def _draw_curves(predictions: dict[str, pl.DataFrame], figure: Any) -> None:
    roc, pr, calibration = figure.subplots(1, 3)
    top = 0.0
    for colour, (name, table) in enumerate(predictions.items()):
        known = table.filter(pl.col("target").is_not_nan()).sort("probability", descending=True)
        p, y = known["probability"].to_numpy(), known["target"].to_numpy()
        if not 0 < y.sum() < len(y):
            continue
        true, false = np.cumsum(y), np.cumsum(1 - y)
        style = {"color": f"C{colour}", "label": f"{name} (n = {len(y)})", "linewidth": 1.6}
        roc.plot(np.append(0, false / false[-1]), np.append(0, true / true[-1]), **style)
        pr.plot(true / true[-1], true / (true + false), **style)
        pr.axhline(y.mean(), color=f"C{colour}", linewidth=0.8, linestyle=":")
        bins = np.array_split(np.arange(len(p))[::-1], min(10, max(int(y.sum()) // 5, 2)))
        predicted, observed = [p[b].mean() for b in bins], [y[b].mean() for b in bins]
        calibration.plot(predicted, observed, marker="o", markersize=4, **style)
        top = max(top, *predicted, *observed)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    calibration.plot([0, top], [0, top], color="grey", linewidth=0.8, linestyle=":")
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    pr.set(title="Precision-recall (dotted: prevalence)", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    calibration.set(
        title="Calibration (equal groups of samples)", xlabel="predicted probability", ylabel="observed share"
    )
    if len(roc.lines) > 1:  # none has both outcomes otherwise
        roc.legend(loc="lower right", fontsize=9)


def print_table(table: pl.DataFrame, title: str, console: Console) -> None:
    """Print a small table whole, numbers to the right."""
    shown = Table(title=title, title_justify="left")
    for name, kind in table.schema.items():
        widest = max((len(f"{v:,}" if isinstance(v, int) else str(v)) for v in table[name]), default=1)
        shown.add_column(
            name.replace("_", " "), justify="right" if kind.is_numeric() else "left", min_width=min(widest, 40)
        )
    for row in table.iter_rows():
        shown.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row))
    console.print(shown)


def concepts() -> pl.DataFrame:
    """The concept list as a table: name, unit, plausible range, how an hour's values become one, source of the range."""
    return pl.DataFrame(CONCEPTS, schema=list(CONCEPTS[0]._fields), orient="row")


def _cell(metric: dict[str, float | None]) -> str:
    if metric["value"] is None:
        return "-"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f}\n[dim]{metric['low']:.3f}-{metric['high']:.3f}[/]"


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
