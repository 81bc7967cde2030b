"""What a sweep found: text, ``trials.csv``, ``best.yaml`` and ``sweep.png``."""

import io
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from experiments.figures import figure
from experiments.files import console, write, write_text
from experiments.sweep.study import Study, value


def summarise(study: Study, folder: Path, monitor: str, name: str) -> None:
    """Print and write the summary of a study into its folder."""
    trials, importance = study.trials(), study.importance()
    best = study.best(trials)
    count = {state: sum(t.state == state for t in trials) for state in TrialState}
    pruned = count[TrialState.PRUNED] / max(len(trials), 1)
    console.print(
        f"\n{name}: {len(trials)} trials, {count[TrialState.COMPLETE]} complete, {count[TrialState.PRUNED]} pruned ({pruned:.0%}), "
        f"{count[TrialState.FAIL]} failed",
        highlight=False,
    )
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
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
    better: Any = max if maximised else min
    values = [value(t) for t in complete]
    worst = sorted(values, reverse=not maximised)[len(values) // 20]  # beyond it, points are drawn at the edge
    margin = 0.2 * abs(value(top) - worst) or 0.1
    limits = sorted([worst - margin * (1 if maximised else -1), value(top) + margin * (1 if maximised else -1)])
    parameters = sorted(top.params, key=lambda p: -importance.get(p, 0))
    rows = -(-len(parameters) // 4)
    with figure(path, (16, 4 + 3.2 * rows)) as drawn:
        upper, lower = drawn.subfigures(2, 1, height_ratios=[4, 3.2 * rows])
        drawn.suptitle(
            f"{name}: {len(trials)} trials, {len(complete)} complete, {len(pruned)} pruned (outliers at the edge)"
        )
        history, epochs, shares = upper.subplots(1, 3)
        inside = [min(max(better(t.intermediate_values.values()), limits[0]), limits[1]) for t in pruned]
        history.scatter(
            [t.number for t in complete],
            [min(max(v, limits[0]), limits[1]) for v in values],
            s=18,
            color="C0",
            label="complete",
        )
        history.scatter(
            [t.number for t in pruned],
            inside,
            s=18,
            color="grey",
            marker="x",
            linewidth=1,
            label="pruned, best until then",
            clip_on=False,
        )
        best = [better(values[: i + 1]) for i in range(len(values))]
        history.step([t.number for t in complete], best, where="post", color="C1", label="best so far")
        history.set(title="History", xlabel="trial", ylabel=monitor, ylim=limits)
        history.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        for group, colour in ((pruned, "lightgrey"), (complete, "C0")):
            for t in group:
                epochs.plot(
                    list(t.intermediate_values),
                    list(t.intermediate_values.values()),
                    color=colour,
                    linewidth=0.8,
                    alpha=0.7,
                )
        epochs.plot(
            list(top.intermediate_values),
            list(top.intermediate_values.values()),
            color="C1",
            linewidth=2,
            label=f"trial {top.number}",
        )
        epochs.set(title="Epochs (grey: pruned)", xlabel="epoch", ylabel=monitor)
        epochs.legend(fontsize=8)
        names = list(importance)[::-1]
        shares.barh(names, [importance[n] for n in names], color="C2")
        shares.set(title="Importance (PED-ANOVA)" if importance else "Importance: too few trials", xlabel="share")
        axes = lower.subplots(rows, 4, sharey=True, squeeze=False)
        for axis in axes.flat[len(parameters) :]:
            axis.set_visible(False)
        for axis, parameter in zip(axes.flat, parameters, strict=False):
            known: Any = top.distributions[parameter]
            if isinstance(known, CategoricalDistribution):
                where = {t.number: known.choices.index(t.params[parameter]) for t in complete}
                axis.set_xticks(range(len(known.choices)), map(str, known.choices))
                axis.set_xlim(-0.5, len(known.choices) - 0.5)
            else:
                where = {t.number: t.params[parameter] for t in complete}
                axis.set_xscale("log" if known.log else "linear")
                if isinstance(known, IntDistribution) and known.high - known.low < 10:
                    axis.set_xticks(range(known.low, known.high + 1))
            axis.scatter(list(where.values()), values, s=16, color="C0")
            axis.scatter([where[top.number]], [value(top)], s=80, color="C1", marker="*", zorder=3)
            axis.set(xlabel=parameter, ylim=limits)
        for axis in axes[:, 0]:
            axis.set_ylabel(monitor)
