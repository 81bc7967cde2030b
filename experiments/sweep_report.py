"""What a sweep found: text, ``trials.csv``, ``best.yaml`` and ``sweep.png``."""

import io
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from optuna.trial import FrozenTrial, TrialState

from experiments.files import console, write, write_text
from experiments.report import figure
from experiments.study import Study, value


def summarise(study: Study, folder: Path, monitor: str, name: str) -> None:
    """Print and write the summary of a study into its folder."""
    trials, best, importance = study.trials(), study.best(), study.importance()
    count = {state: sum(t.state == state for t in trials) for state in TrialState}
    pruned = count[TrialState.PRUNED] / max(len(trials), 1)
    console.print(
        f"\n{name}: {len(trials)} trials, {count[TrialState.COMPLETE]} complete, {count[TrialState.PRUNED]} pruned ({pruned:.0%}), "
        f"{count[TrialState.FAIL]} failed",
        highlight=False,
    )
    for trial in trials:
        if trial.state == TrialState.FAIL:
            console.print(f"  trial {trial.number} failed: {trial.user_attrs.get('reason')}", soft_wrap=True, highlight=False)
    _table(trials, monitor).write_csv(buffer := io.BytesIO())
    write(folder / "trials.csv", buffer.getvalue())
    if best is None:
        raise ValueError(f"no trial of {name} was completed; {folder / 'trials.csv'} lists them, {folder}/worker-*.log say more")
    write_text(folder / "best.yaml", _train(best, folder))
    console.print(f"best: trial {best.number}, {monitor} {best.value:.4f}, {best.user_attrs['run']}", soft_wrap=True, highlight=False)
    width = max(map(len, best.params))
    for parameter, chosen in sorted(best.params.items(), key=lambda p: -importance.get(p[0], 0)):
        share = f"   importance {importance[parameter]:.2f}" if parameter in importance else ""
        console.print(
            f"  {parameter:{width}}  {chosen:.4g}{share}" if isinstance(chosen, float) else f"  {parameter:{width}}  {chosen}{share}"
        )
    _draw(trials, importance, study.maximised, folder / "sweep.png", monitor, name)
    console.print(f"wrote best.yaml, trials.csv and sweep.png to {folder}\nnext: ehr train -c {folder / 'best.yaml'}", soft_wrap=True)


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


def _draw(trials: list[FrozenTrial], importance: dict[str, float], maximised: bool, path: Path, monitor: str, name: str) -> None:
    """History, epochs and importance above; below, every parameter against the value of its trials."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
    better: Any = max if maximised else min
    parameters = sorted(complete[0].params, key=lambda p: -importance.get(p, 0))
    columns = max(3, min(len(parameters), 4))
    rows = -(-len(parameters) // columns)
    with figure(path, (4.3 * columns, 3.6 * (1 + rows))) as drawn:
        grid = drawn.add_gridspec(1 + rows, columns * 12)
        history, epochs, shares = (drawn.add_subplot(grid[0, i * columns * 4 : (i + 1) * columns * 4]) for i in range(3))
        drawn.suptitle(f"{name}: {len(trials)} trials, {len(complete)} complete, {len(pruned)} pruned")
        at = [t.number for t in complete]
        values = [value(t) for t in complete]
        history.scatter(at, values, s=18, color="C0", label="complete")
        low = sorted(values)[len(values) // 20] if maximised else min(values)
        high = max(values) if maximised else sorted(values)[-1 - len(values) // 20]
        margin = 0.25 * (high - low) or 0.1
        last = [min(max(better(t.intermediate_values.values()), low - margin), high + margin) for t in pruned]
        history.scatter(
            [t.number for t in pruned], last, s=18, color="grey", marker="x", linewidth=1, label="pruned (or worse)", clip_on=False
        )
        history.step(at, [better(values[: i + 1]) for i in range(len(values))], where="post", color="C1", label="best so far")
        history.set(title="History", xlabel="trial", ylabel=monitor)
        history.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        history.set_ylim(low - margin, high + margin)
        for group, colour in ((pruned, "lightgrey"), (complete, "C0")):
            for t in group:
                epochs.plot(list(t.intermediate_values), list(t.intermediate_values.values()), color=colour, linewidth=0.8, alpha=0.7)
        top = better(complete, key=value)
        epochs.plot(
            list(top.intermediate_values), list(top.intermediate_values.values()), color="C1", linewidth=2, label=f"trial {top.number}"
        )
        epochs.set(title="Epochs (grey: pruned)", xlabel="epoch", ylabel=monitor)
        epochs.legend(fontsize=8)
        if importance:
            names = list(importance)[::-1]
            shares.barh(names, [importance[n] for n in names], color="C2")
            shares.set(title="Importance (PED-ANOVA)", xlabel="share")
        else:
            shares.set(title="Importance: too few trials")
        for i, parameter in enumerate(parameters):
            row, column = divmod(i, columns)
            axis = drawn.add_subplot(grid[1 + row, column * 12 : column * 12 + 12])
            words = not all(isinstance(t.params[parameter], int | float) and not isinstance(t.params[parameter], bool) for t in complete)
            axis.scatter([str(t.params[parameter]) if words else t.params[parameter] for t in complete], values, s=16, color="C0")
            axis.scatter(
                [str(top.params[parameter]) if words else top.params[parameter]], [top.value], s=60, color="C1", marker="*", zorder=3
            )
            if getattr(top.distributions[parameter], "log", False):
                axis.set_xscale("log")
            axis.set(xlabel=parameter, ylabel=monitor if column == 0 else "", ylim=(low - margin, high + margin))
