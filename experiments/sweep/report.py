"""What a sweep found: text, ``trials.csv``, ``best.yaml`` and ``sweep.png``."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from experiments.figures import figure
from experiments.files import console, write, write_text
from experiments.sweep.study import Study, value


def summarise(study: Study, folder: Path, monitor: str, name: str) -> None:
    """Print and write the summary of a study into its folder."""
    trials, importance = study.trials(), study.importance()
    best = study.best(trials)
    repeats = sum("repeats" in t.user_attrs for t in trials)
    count = {state: sum(t.state == state for t in trials) for state in TrialState}
    pruned = count[TrialState.PRUNED] / max(len(trials), 1)
    console.print(
        f"\n{name}: {len(trials)} trials, {count[TrialState.COMPLETE]} complete, {count[TrialState.PRUNED]} pruned ({pruned:.0%}), "
        f"{count[TrialState.FAIL]} failed",
        highlight=False,
    )
    if repeats:
        console.print(f"  {repeats} repeated another's configuration and were not trained again", highlight=False)
    for trial in trials:
        if trial.state == TrialState.FAIL:
            console.print(
                f"  trial {trial.number} failed: {trial.user_attrs.get('reason')}", soft_wrap=True, highlight=False
            )
    _table(trials, monitor).write_csv(buffer := io.BytesIO())
    write(folder / "trials.csv", buffer.getvalue())
    if best is None:
        raise ValueError(
            f"no trial of {name} was completed; {folder / 'trials.csv'} lists them, {folder}/worker-*.log say more"
        )
    write_text(folder / "best.yaml", _train(best, folder))
    console.print(
        f"best: trial {best.number}, {monitor} {best.value:.4f}, {best.user_attrs['run']}",
        soft_wrap=True,
        highlight=False,
    )
    width = max(map(len, best.params))
    for parameter, chosen in sorted(best.params.items(), key=lambda p: -importance.get(p[0], 0)):
        share = f"   importance {importance[parameter]:.2f}" if parameter in importance else ""
        console.print(
            f"  {parameter:{width}}  {chosen:.4g}{share}"
            if isinstance(chosen, float)
            else f"  {parameter:{width}}  {chosen}{share}"
        )
    _draw(trials, best, importance, study.maximised, folder / "sweep.png", monitor, name)
    console.print(
        f"wrote best.yaml, trials.csv and sweep.png to {folder}\nnext: ehr train -c {folder / 'best.yaml'}",
        soft_wrap=True,
    )


def _train(best: FrozenTrial, folder: Path) -> str:
    """The best trial's configuration with the data's own split instead of that of trials, under a name of its own."""
    config = yaml.safe_load(best.user_attrs["config"])
    base = yaml.safe_load((folder / "train.yaml").read_text())
    config["data"]["init_args"]["split"] = base["data"]["init_args"]["split"]
    config |= {"name": f"{folder.name}-best", "runs": str(folder.parent)}
    return f"# Best of {folder}: trial {best.number}.\n" + yaml.safe_dump(config, sort_keys=False)


def _table(trials: list[FrozenTrial], monitor: str) -> pl.DataFrame:
    rows = [
        {
            "trial": t.number,
            "state": t.state.name.lower(),
            monitor: t.value if t.state == TrialState.COMPLETE else None,
            "epochs": len(t.intermediate_values),
            "minutes": t.duration.total_seconds() / 60 if t.duration else None,
            **t.params,
            "repeats": t.user_attrs.get("repeats"),
            "reason": t.user_attrs.get("reason"),
            "run": t.user_attrs.get("run"),
        }
        for t in trials
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _draw(
    trials: list[FrozenTrial],
    top: FrozenTrial,
    importance: dict[str, float],
    maximised: bool,
    path: Path,
    monitor: str,
    name: str,
) -> None:
    """History, epochs and importance above; below, every parameter against the value of its trials, the most important first."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE and math.isfinite(value(t))]
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
    better: Any = max if maximised else min
    values = [value(t) for t in complete]
    worst = sorted(values, reverse=not maximised)[len(values) // 20]  # beyond it, points are drawn at the edge
    margin = 0.2 * abs(value(top) - worst) or 0.1
    limits = sorted([worst - margin * (1 if maximised else -1), value(top) + margin * (1 if maximised else -1)])
    inside = [min(max(v, limits[0]), limits[1]) for v in values]
    parameters = sorted(top.params, key=lambda p: -importance.get(p, 0))
    columns = min(len(parameters), 4)
    rows = -(-len(parameters) // columns)
    with figure(path, (16, 4 + 3.2 * rows)) as drawn:
        upper, lower = drawn.subfigures(2, 1, height_ratios=[4, 3.2 * rows])
        drawn.suptitle(f"{name}: {len(complete)} complete trials, {len(pruned)} pruned (outliers at the edge)")
        history, epochs, *shares = upper.subplots(1, 3 if importance else 2)
        _draw_history(history, complete, pruned, limits, better)
        history.set(title="History", xlabel="trial", ylabel=monitor, ylim=limits)
        for group, colour in ((pruned, "lightgrey"), (complete, "C0")):
            for t in group:
                _draw_epochs(epochs, t, color=colour, linewidth=0.8, markersize=2, alpha=0.7)
        _draw_epochs(epochs, top, color="C1", linewidth=2, markersize=4, label=f"trial {top.number}")
        epochs.set(title="Epochs (grey: pruned)", xlabel="epoch", ylabel=monitor)
        epochs.legend(fontsize=8)
        last = max((e for t in (*complete, *pruned) for e in t.intermediate_values), default=0)
        for axis, greatest in ((history, len(trials) - 1), (epochs, last)):
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_xlim(-0.5, greatest + 0.5)
        for axis in shares:
            names = list(importance)[::-1]
            axis.barh(names, [importance[n] for n in names], color="C2")
            axis.set(title="Importance (PED-ANOVA)", xlabel="share")
        axes = lower.subplots(rows, columns, sharey=True, squeeze=False)
        for axis in axes.flat[len(parameters) :]:
            axis.set_visible(False)
        for axis, parameter in zip(axes.flat, parameters, strict=False):
            position = _scale(axis, top.distributions[parameter])
            axis.scatter([position(t.params[parameter]) for t in complete], inside, s=16, color="C0", clip_on=False)
            axis.scatter([position(top.params[parameter])], [value(top)], s=80, color="C1", marker="*", zorder=3)
            axis.set(xlabel=parameter, ylim=limits)
        for axis in axes[:, 0]:
            axis.set_ylabel(monitor)


def _draw_history(
    axis: Any, complete: list[FrozenTrial], pruned: list[FrozenTrial], limits: list[float], better: Any
) -> None:
    for group, style in (
        (complete, {"color": "C0", "label": "complete"}),
        (pruned, {"color": "grey", "marker": "x", "linewidth": 1, "label": "pruned, best until then"}),
    ):
        heights = [value(t) if group is complete else better(t.intermediate_values.values()) for t in group]
        inside = [min(max(height, limits[0]), limits[1]) for height in heights]
        if group:
            axis.scatter([t.number for t in group], inside, s=18, clip_on=False, **style)
    best = [better(value(t) for t in complete[: i + 1]) for i in range(len(complete))]
    axis.step([t.number for t in complete], best, where="post", color="C1", label="best so far")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _draw_epochs(axis: Any, trial: FrozenTrial, **style: Any) -> None:
    """A trial's values; a marker each, without which a trial of one epoch would not be seen."""
    points = sorted(trial.intermediate_values.items())
    axis.plot([epoch for epoch, _ in points], [height for _, height in points], marker="o", **style)


def _scale(axis: Any, distribution: BaseDistribution) -> Callable[[Any], Any]:
    """Prepare the axis of a parameter; gives where on it a value is drawn."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        turned = {"rotation": 20, "ha": "right"} if sum(len(str(c)) for c in choices) > 30 else {}
        axis.set_xticks(range(len(choices)), map(str, choices), **turned)
        axis.set_xlim(-0.5, len(choices) - 0.5)
        return choices.index
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    whole = isinstance(distribution, IntDistribution)
    if distribution.log and low < high:
        axis.set_xscale("log")
        axis.set_xlim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
        if high / low < 100:  # too few powers of ten to read the scale from
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
        margin = 0.04 * (high - low) or 0.5
        axis.set_xlim(low - margin, high + margin)
    return lambda setting: setting
