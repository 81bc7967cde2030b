"""Pictures: what predictions are worth, as curves."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from experiments import files
from experiments.metrics import Counts, Rows, resamples, text

BINS = 30  # of a histogram of predicted risks
BANDS = 200  # resamples of a band


@contextmanager
def figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure of ``size`` inches to draw on, which becomes a PNG afterwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(drawn)
    yield drawn
    content = io.BytesIO()
    drawn.savefig(content, dpi=110, format="png")
    files.write(path, content.getvalue())


def draw_panels(
    predictions: dict[str, pl.DataFrame], results: dict[str, dict[str, Any]], title: str, figure: Any
) -> None:
    """ROC, precision-recall and calibration curves and the predicted risk by outcome, of one or more results.

    Args:
        predictions: of each result, the table that it was scored from.
        results: what ``metrics.score`` says of it.
        title: of the whole; run and task.
        figure: of matplotlib, to draw on; the colours are those of the ROC's legend in every panel.
    """
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    grid = figure.add_gridspec(2, 2)
    roc, pr, calibration = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, 0)))
    cells = grid[1, 1].subgridspec(len(results), 1)
    risks = [figure.add_subplot(cells[k]) for k in range(len(results))]
    for k, (name, result) in enumerate(results.items()):
        rows = Rows(predictions[name], result["threshold"])
        _draw_risk(risks[k], rows, result, f"C{k}")
        if 0 < result["n_positive"] < result["n"]:
            counts = rows.counts()
            _draw_bands(roc, pr, rows, f"C{k}")
            _draw_roc(roc, counts, f"{name}\nAUROC {text('auroc', result)}", f"C{k}")
            _draw_pr(pr, counts, f"{name}\nAUPRC {text('auprc', result)}", f"C{k}")
            _draw_calibration(calibration, rows, f"C{k}")
    largest = calibration.dataLim.max.max()  # small where the outcome is rare
    top = 1.05 * largest if np.isfinite(largest) else 1.0
    if pr.lines:
        pr.plot([], [], color="grey", linestyle=":", label="prevalence")
    for axis, limit in ((roc, 1), (pr, 1), (calibration, top)):
        axis.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
        if not axis.lines:
            axis.text(0.05 * limit, 0.9 * limit, "needs both outcomes", color="0.4")
    for axis in (roc, pr):
        if axis.lines:
            if any(result["threshold"] is not None for result in results.values()):
                axis.plot([], [], "o", color="white", markersize=8, markeredgecolor="black", label="operating point")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, frameon=False)
    for axis in (roc, calibration):
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    pr.set(title="Precision-recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    calibration.set(title="Calibration (equal groups of samples)", xlabel="predicted risk", ylabel="observed share")
    risks[0].set_title("Predicted risk by outcome")
    risks[-1].set_xlabel("predicted risk")
    for axis in risks:
        axis.set_xlim(0, max(other.get_xlim()[1] for other in risks))
        axis.label_outer()
    sizes = [f"{name}: n = {r['n']:,}, {r['n_positive']:,} events" for name, r in results.items()]
    figure.suptitle("\n".join([title, *sizes]), fontsize=11, wrap=True)


def _draw_roc(axis: Any, counts: Counts, label: str, colour: str) -> None:
    axis.plot(np.append(0, counts.fall_out), np.append(0, counts.recall), label=label, **_line(colour))
    _mark(axis, counts.false_alerts / counts.negatives, counts.true_alerts / counts.positives, colour)


def _draw_pr(axis: Any, counts: Counts, label: str, colour: str) -> None:
    """Steps, so that the area below is AUPRC; it begins with the threshold that finds the first positive."""
    first = int(np.argmax(counts.recall > 0))
    precision = np.append(counts.precision[first], counts.precision[first:])
    axis.step(np.append(0, counts.recall[first:]), precision, where="pre", label=label, **_line(colour))
    axis.axhline(counts.positives / (counts.positives + counts.negatives), color=colour, linewidth=1, linestyle=":")
    alerts = counts.true_alerts + counts.false_alerts
    if alerts > 0:
        _mark(axis, counts.true_alerts / counts.positives, counts.true_alerts / alerts, colour)


def _draw_bands(roc: Any, pr: Any, rows: Rows, colour: str) -> None:
    """Where the middle 95 % of the curves of resampled patients lie."""
    share = np.linspace(0, 1, 101)
    sensitivity, precision = [], []
    for times in resamples(rows.patients, BANDS):
        counts = rows.counts(times)
        if not np.isfinite(counts.recall[-1]) or not np.isfinite(counts.fall_out[-1]):
            continue  # one outcome only
        sensitivity.append(np.interp(share, np.append(0, counts.fall_out), np.append(0, counts.recall)))
        point = np.minimum(np.searchsorted(counts.recall, share - 1e-12), len(counts.recall) - 1)
        precision.append(counts.precision[np.maximum(point, int(np.argmax(counts.recall > 0)))])
    for axis, curves in ((roc, sensitivity), (pr, precision)):
        if curves:
            axis.fill_between(share, *np.percentile(curves, [2.5, 97.5], axis=0), color=colour, alpha=0.15, linewidth=0)


def _line(colour: str) -> dict[str, Any]:
    return {"color": colour, "linewidth": 1.6, "clip_on": False, "solid_capstyle": "round"}


def _mark(axis: Any, x: float, y: float, colour: str) -> None:
    """The operating point, where there is a threshold."""
    if np.isfinite(x):
        axis.plot(x, y, "o", markersize=8, color=colour, markeredgecolor="black", clip_on=False, zorder=4)


def _draw_calibration(axis: Any, rows: Rows, colour: str) -> None:
    """Mean prediction and share of events of groups of samples of like risk; fewer groups where events are few."""
    count = min(10, max(int(rows.outcome.sum()) // 5, 2))
    groups = [np.array_split(values[::-1], count) for values in (rows.probability, rows.outcome)]
    predicted, observed = ([group.mean() for group in of] for of in groups)
    axis.plot(predicted, observed, marker="o", markersize=4, color=colour, linewidth=1.6)


def _draw_risk(axis: Any, rows: Rows, result: dict[str, Any], colour: str) -> None:
    """Histograms of the risk of those with and without the event, each as a share of its own."""
    edges = np.linspace(0, max(rows.probability.max(), result["threshold"] or 0, 1e-6), BINS + 1)
    for outcome, style in (
        (0, {"color": "0.75", "label": "without the event"}),
        (1, {"color": colour, "label": "with the event", "histtype": "step", "linewidth": 1.6}),
    ):
        risk = rows.probability[rows.outcome == outcome]
        if len(risk):
            axis.hist(risk, edges, weights=np.full(len(risk), 1 / len(risk)), **style)
    if result["threshold"] is not None:
        style = {"color": "black", "linewidth": 1, "linestyle": "--", "label": f"threshold {result['threshold']:.3g}"}
        axis.axvline(result["threshold"], ymax=0.8, **style)
    axis.set(xlim=(0, edges[-1]), ylim=(0, 1.3 * axis.get_ylim()[1]), ylabel="share")  # room for the legend
    axis.legend(loc="upper right", fontsize=8, frameon=False)
