"""Pictures: what stands on their axes and in their legends, and that curves and marks are where the scores say."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.figure import Figure

from datamodules.contract import Spec, Triplets
from datamodules.tasks import Task
from experiments import explain, figures, metrics


def table(count: int, share: float, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    target = (rng.random(count) < share).astype(float)
    risk = np.round(1 / (1 + np.exp(2 - 2 * target - rng.normal(size=count))), 2)
    names = np.arange(count)
    return pl.DataFrame({"stay_id": names, "patient_id": names, "minute": 1440, "target": target, "probability": risk})


def panels(tables: dict[str, pl.DataFrame], threshold: float | None = 0.3) -> tuple[Figure, dict[str, dict[str, Any]]]:
    results = {name: metrics.score(rows, threshold, 20) for name, rows in tables.items()}
    figure = Figure(layout="constrained")
    figures.draw_panels(tables, results, "run: death", figure)
    return figure, results


def legend(axis: Any) -> list[str]:
    return [entry.get_text() for entry in axis.get_legend().get_texts()]


def marks(axis: Any) -> list[tuple[float, float]]:
    """Operating points."""
    dots = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    return [(float(dot.get_xdata()[0]), float(dot.get_ydata()[0])) for dot in dots]


def test_curves_and_operating_points_are_those_of_the_scores() -> None:
    figure, results = panels({"source": table(400, 0.2), "fine-tuned": table(300, 0.3, 1)})
    roc, pr = figure.axes[:2]
    for axis, metric in ((roc, "auroc"), (pr, "auprc")):
        assert axis.get_xlim() == axis.get_ylim() == (0, 1)
        assert axis.get_aspect() == 1
        for k, (name, result) in enumerate(results.items()):
            assert legend(axis)[k] == f"{name}\n{metric.upper()} {metrics.text(metric, result)}"
            assert "(0." in legend(axis)[k]
    for place, result in enumerate(results.values()):
        sensitivity, specificity, ppv = (result[name]["value"] for name in ("sensitivity", "specificity", "ppv"))
        assert marks(roc)[place] == pytest.approx((1 - specificity, sensitivity))
        assert marks(pr)[place] == pytest.approx((sensitivity, ppv))
    curves = {axis: [line for line in axis.lines if len(line.get_xdata()) > 5] for axis in (roc, pr)}
    for line, result in zip(curves[roc], results.values(), strict=True):
        x, y = np.array(line.get_xdata()), np.array(line.get_ydata())
        assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(result["auroc"]["value"])
    for line, result in zip(curves[pr], results.values(), strict=True):
        x, y = np.array(line.get_xdata()), np.array(line.get_ydata())
        assert line.get_drawstyle() == "steps-pre"
        assert (x[0], x[-1]) == (0, 1)
        assert np.sum(np.diff(x) * y[1:]) == pytest.approx(result["auprc"]["value"])
    shares = [line.get_ydata()[0] for line in pr.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert shares == pytest.approx([r["n_positive"] / r["n"] for r in results.values()])


def test_the_risk_by_outcome_has_a_panel_each_with_the_threshold() -> None:
    figure, results = panels({"source": table(400, 0.2), "fine-tuned": table(300, 0.3, 1)})
    risks = figure.axes[3:]
    assert len(risks) == len(results)
    for axis in risks:
        assert legend(axis) == ["without the event", "with the event", "threshold 0.3"]
        assert [line.get_xdata()[0] for line in axis.lines] == [0.3]
        assert axis.get_xlim() == risks[0].get_xlim()
        assert sum(bar.get_height() for bar in axis.containers[0]) == pytest.approx(1)


def test_the_title_names_run_task_and_number() -> None:
    rows = table(1200, 0.2)
    figure, _ = panels({"source": rows})
    assert figure.get_suptitle() == f"run: death\nsource: n = 1,200, {int(rows['target'].sum()):,} events"


def test_calibration_reaches_to_its_greatest_group() -> None:
    figure, _ = panels({"source": table(2000, 0.02)})
    calibration = figure.axes[2]
    points = calibration.lines[0].get_xydata()
    assert points.max() < calibration.get_xlim()[1] == calibration.get_ylim()[1] < 1


def test_without_a_threshold_nothing_is_marked() -> None:
    figure, _ = panels({"source": table(400, 0.2)}, None)
    assert not marks(figure.axes[0]) and not marks(figure.axes[1])
    assert "operating point" not in legend(figure.axes[0])
    assert legend(figure.axes[3]) == ["without the event", "with the event"]


def test_a_threshold_that_no_risk_reaches_is_drawn() -> None:
    figure, _ = panels({"source": table(400, 0.2)}, 0.999)
    assert marks(figure.axes[0]) == [(0, 0)]
    assert marks(figure.axes[1]) == []  # a precision of no alerts is no number
    assert figure.axes[3].get_xlim()[1] >= 0.999


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_one_outcome_only(target: float) -> None:
    rows = table(100, 0.2).with_columns(target=target)
    figure, _ = panels({"alone": rows})
    for axis in figure.axes[:3]:
        assert axis.get_legend() is None
        assert [text.get_text() for text in axis.texts] == ["needs both outcomes"]


@pytest.mark.parametrize(("target", "outcome"), [(1.0, "yes"), (0.0, "no"), (float("nan"), "unknown")])
def test_a_stay_is_drawn_in_units_and_hours(target: float, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 24 hours that ends 30 hours after admission."""
    drawn = Figure(layout="constrained")

    @contextmanager
    def kept(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
        yield drawn

    monkeypatch.setattr(figures, "figure", kept)
    task = asdict(Task("mortality_24h", 30, 24))
    spec = Spec(["heart_rate", "lactate"], ["/min", "mmol/L"], [], [80.0, 2.0], [10.0, 1.0], [], [], task)
    one = Triplets(
        torch.zeros(1, 0),
        torch.zeros(1, 0, 16),
        torch.tensor([[-1.0, 0.0, 0.5, 0.0]]),  # the start, the middle and three quarters of the window; padding
        torch.tensor([[1, 2, 1, 0]]),
        torch.tensor([[0.5, 5.0, -1.5, 0.0]]),
        torch.tensor([3]),
        torch.tensor([target]),
        torch.tensor([0]),
    )
    columns = {
        "variable": ["lactate", "heart_rate"],
        "weight": [0.7, 0.3],
        "part": [0.2, -0.1],
        "probability": [0.25] * 2,
    }
    explain._draw_stay(one, pl.DataFrame(columns), spec, "17", 30 * 60, Path("stay.png"))
    events = drawn.axes[0]
    assert [label.get_text() for label in events.get_yticklabels()] == ["heart rate\n65 /min", "lactate\n>= 7 mmol/L"]
    assert events.get_xlim() == (6, 30)
    hours = [points.get_offsets()[:, 0].tolist() for points in events.collections]
    assert hours == [pytest.approx([6, 24]), pytest.approx([18])]
    assert drawn.get_suptitle() == f"stay 17 at hour 30: predicted 0.25; death within the next 24 hours: {outcome}"
