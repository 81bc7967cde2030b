"""``ehr explain``: which variables a model's predictions rest on, for a cohort and for one stay, and whether that is true.

Shape letters: N samples, V variables, T hours.
"""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from datamodules.contract import Spec, Triplets, unlabelled
from datamodules.module import ICUDataModule
from datamodules.tasks import TASKS
from datamodules.views import CLIP
from ehrmodels import ICUModule
from experiments import attribution, figures, files, report
from experiments.attribution import Explained
from experiments.evaluate import Device, opened, resolved
from experiments.files import console

ROWS = 8  # of a stay's timeline


def explain(
    ckpt: str,
    out: str,
    data: ICUDataModule | None = None,
    stay: str | None = None,
    model: type[ICUModule] | None = None,
    device: Device = "auto",
) -> None:
    """Show which variables the predictions of a checkpoint rest on, for a cohort and for one stay, and test it.

    At most 500 samples are explained, by every method that the model has: the change of the log odds without a variable's
    observations (``importance``), integrated gradients (networks) or SHAP (trees), fusion weights (HyMaTE), attention (Fusion).
    Writes ``attribution.csv`` (a row a variable: of each method the mean size; what ``raises`` and ``lowers`` the log odds),
    ``deletion.csv`` (AUROC without the variables that a method, or chance, puts first), ``checks.csv`` (whether a method does
    better than chance there, and whether it says something else of a model that learned nothing), ``permutation.csv`` (AUROC lost
    when a group of variables is another sample's), ``cohort.png``, ``stay.png`` and ``timeline.png`` (hour by hour).

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        out: Folder for the results.
        data: Hospital system; default: the one that the checkpoint was trained on. --data.split chooses train, val, test or all.
        stay: stay_id of the stay to draw; default: the one with the highest predicted probability of those explained.
        model: Class of the checkpoint's model, where it is your own.
        device: Where to compute; auto: on the GPU where there is one.
    """
    network, data = opened(ckpt, data, model)
    if not network.supervised:
        raise ValueError(
            f"{ckpt} predicts no outcome: train a HyMaTE from it with `ehr train --init_from`, and explain that"
        )
    network.to(resolved(device)).eval()
    ids, shown = data.samples["stay_id"].cast(pl.String), data.rows(data.split)
    if stay is not None:
        shown = shown[(ids.gather(shown) == stay).to_numpy()]
        if not len(shown):
            raise ValueError(
                f"stay {stay} is not in split {data.split!r} of {data.root}; choose another --stay or --data.split"
            )
    names = attribution.methods(network)
    with torch.inference_mode():
        cohort = attribution.explained(network, data, attribution.drawn(data, attribution.MOST), names, "explaining")
        deletion, further = attribution.deletion(network, data, cohort)
        checks = attribution.checks(network, data, cohort, further, "explaining a model that learned nothing")
        permutation = attribution.permutation(network, data, cohort, "permutation")
        row = int(np.concatenate(cohort.groups)[cohort.probability.argmax()]) if stay is None else int(shown.max())
        one = attribution.explained(network, data, [np.array([row])], names)
        history, course = _history(network, data, row, one)
    if not one.charted.any():
        raise ValueError(f"no observation to draw in stay {ids[row]}; choose another --stay")
    variables = attribution.per_variable(cohort, network.spec)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"attribution": variables, "checks": checks, "deletion": deletion, "permutation": permutation}
    for name, table in tables.items():
        files.write_text(folder / f"{name}.csv", table.write_csv(float_precision=5))
    title = f"{data.name} {data.split}, {len(cohort.output):,} samples"
    with figures.figure(folder / "cohort.png", (16 if "fusion_weight" in names else 13, 5.2)) as figure:
        attribution.draw_cohort(variables, deletion, title, attribution.unit_of(network.spec), figure)
    minute, events = int(data.samples["minute"][row]), data.batch(np.array([row]), view="triplets")
    _draw_stay(events, _of_one(one, network.spec), network.spec, ids[row], minute, folder / "stay.png")  # type: ignore[arg-type]
    _draw_timeline(events, one, history, course, network, ids[row], minute, folder / "timeline.png")  # type: ignore[arg-type]
    report.print_table(
        variables.head(attribution.SHOWN).with_columns(pl.col(pl.Float64).round(4)), "what predictions rest on", console
    )
    report.print_table(told(checks), "whether that is true", console)
    if len(permutation):
        shown_groups = permutation.with_columns(pl.col(pl.Float64).round(4))
        report.print_table(shown_groups, "AUROC lost when a group is another sample's", console)
    written = ", ".join([*(f"{name}.csv" for name in tables), "cohort.png", "stay.png"])
    console.print(f"wrote {written} and timeline.png (stay {ids[row]}) to {folder}", soft_wrap=True)


def told(checks: pl.DataFrame) -> pl.DataFrame:
    """The checks in words."""
    number = "{:.2f} ({:.2f} to {:.2f})".format
    rows = [
        (
            attribution.METHODS[row["method"]],
            number(row["deletion"], row["deletion_low"], row["deletion_high"]),
            number(row["alike"], row["alike_low"], row["alike_high"]),
            "passes" if row["passed"] else "FAILS",
        )
        for row in checks.iter_rows(named=True)
    ]
    columns = [
        "method",
        "moves the output further than chance",
        "rank correlation with an untrained model's",
        "verdict",
    ]
    return pl.DataFrame(rows, columns, orient="row")


def _history(
    network: ICUModule, data: ICUDataModule, row: int, one: Explained
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Parts hour by hour, (T, V), the last hour ending at the prediction; and the probability at the end of each, (T,).

    Where there is a prediction every hour they are those of each prediction. Else they are what the events of each hour account
    for in the one prediction, which only integrated gradients tell, and there is no course of probabilities."""
    if not data.task.hourly:
        return (None if one.hourly is None else one.hourly[0]), None
    window = network.spec.window
    samples = data.samples.with_row_index("row").filter(pl.col("stay_id") == data.samples["stay_id"][row])
    samples = samples.filter(pl.col("minute") <= data.samples["minute"][row]).sort("minute").tail(window)
    method = list(one.parts)[:2][-1:]  # the one that costs least
    hours = attribution.explained(network, data, [samples["row"].to_numpy().astype(np.int64)], method)
    parts = np.full((window, len(network.spec.variables)), np.nan)
    course = np.full(window, np.nan)
    last = samples["minute"][-1]
    place = window - 1 - (last - samples["minute"].to_numpy()) // 60
    inside = place >= 0
    parts[place[inside]] = next(iter(hours.parts.values()))[inside]
    course[place[inside]] = hours.probability.numpy()[inside]
    return parts, course


def _of_one(one: Explained, spec: Spec) -> pl.DataFrame:
    """``variable, part, probability`` of the only sample, and ``weight`` where there is one; a row for each that it has."""
    columns = {
        "variable": spec.variables,
        "part": one.parts["importance"][0],
        "probability": [float(one.probability[0])] * len(spec.variables),
    }
    if "fusion_weight" in one.parts:
        columns["weight"] = one.parts["fusion_weight"][0]
    return pl.DataFrame(columns).filter(one.charted[0])


def _draw_stay(one: Triplets, result: pl.DataFrame, spec: Spec, stay: str, minute: int, path: Path) -> None:
    """A stay's observations of the variables that its prediction rests on most, and their parts of it.

    Args:
        one: the sample.
        result: ``variable, part, probability`` and, of HyMaTE, ``weight``.
        spec: what its values are standardised by.
        stay: its stay_id.
        minute: its prediction time since ICU admission.
        path: the picture.
    """
    top = result.sort(pl.col("part").abs(), descending=True).head(attribution.SHOWN).reverse()
    hour = minute / 60 + (one.time[0].numpy() - 1) * spec.window / 2
    variable, value = one.variable[0].numpy(), one.value[0].numpy()
    target = one.target[0]
    numbers = spec.kind == "regression"
    outcome = "unknown" if bool(unlabelled(one.target)[0]) else _told(target, numbers)
    weighted = "weight" in top.columns
    with figures.figure(path, (14, 5.6)) as figure:
        events, parts, *weights = figure.subplots(
            1, 3 if weighted else 2, width_ratios=(2.2, 1, *[1] * weighted), sharey=True
        )
        place = np.arange(len(top))
        labels = []
        for k, name in enumerate(top["variable"]):
            seen = variable == spec.variables.index(name) + 1
            points = events.scatter(
                hour[seen],
                np.full(seen.sum(), k),
                c=value[seen],
                cmap="coolwarm",
                vmin=-3,
                vmax=3,
                s=22,
                edgecolors="0.4",
                linewidths=0.3,
                clip_on=False,
            )
            last = _last(spec, name, value[seen]) if seen.any() else "before the window"
            labels.append(f"{name.replace('_', ' ')}\n{last}")
        figure.colorbar(points, ax=events, label="standard deviations from the mean of training", pad=0.01)
        events.set_yticks(place, labels)
        events.tick_params("y", labelsize=8)
        events.set(title="observations (left: the last value)", xlabel="hours since ICU admission")
        earliest = min([0, *hour[variable > 0]])  # a window may begin before there was anything to see
        events.set_xlim(max(minute / 60 - spec.window, earliest), minute / 60)
        parts.barh(place, top["part"], color=np.where(top["part"].to_numpy() > 0, "C3", "C0"))
        parts.axvline(0, color="0.4", linewidth=0.8)
        parts.set(title=f"part of the {'prediction' if numbers else 'log odds'}")
        for axes in weights:
            axes.barh(place, top["weight"], color="0.6")
            axes.set(title="fusion weight")
        task = TASKS[spec.task["name"]].text
        said = result["probability"][0]
        figure.suptitle(f"stay {stay} at hour {minute / 60:g}: predicted {said:.2f}; {task}: {outcome}")


def _draw_timeline(
    events: Triplets,
    one: Explained,
    history: np.ndarray | None,
    course: np.ndarray | None,
    model: ICUModule,
    stay: str,
    minute: int,
    path: Path,
) -> None:
    """What drove a stay's risk, hour by hour: values in their units, on what their hour adds to the log odds or takes off.

    Args:
        events: the sample.
        one: the same, explained.
        history: (T, V) parts of each hour; None: they cannot be told.
        course: (T,) probability at the end of each hour; None: there is one prediction.
        model: that predicts.
        stay: its stay_id.
        minute: its prediction time since ICU admission.
        path: the picture.
    """
    spec, end = model.spec, minute / 60
    start = max(end - spec.window, min([0, *(end + (events.time[0].numpy() - 1) * spec.window / 2)]))
    size = np.where(one.charted[0], np.abs(one.parts["importance"][0]), 0)
    rows = [k for k in np.argsort(-size, kind="stable")[:ROWS] if size[k] > 0]
    most = max(float(np.nanmax(np.abs(history))), 1e-6) if history is not None and np.isfinite(history).any() else 1.0
    edges = end - spec.window + np.arange(spec.window + 1)
    hour = end + (events.time[0].numpy() - 1) * spec.window / 2
    with figures.figure(path, (11, 1.6 + 1.05 * len(rows))) as figure:
        top, *others = figure.subplots(
            1 + len(rows), 1, sharex=True, height_ratios=(1.4, *[1] * len(rows)), squeeze=False
        )[:, 0]
        shade = None
        if course is not None:
            top.plot(edges[1:], course, color="black", marker=".", markersize=4)
            if model.threshold is not None:
                top.axhline(model.threshold, color="C3", linestyle="--", linewidth=1)
            top.set(ylabel="risk")
        elif history is not None:
            total = history.sum(1)
            top.bar(edges[:-1] + 0.5, total, 0.9, color=np.where(total > 0, "C3", "C0"))
            top.set(ylabel=f"part of the\n{attribution.unit_of(spec)}")
        else:
            top.set_axis_off()
        for axes, k in zip(others, rows, strict=True):
            seen = events.variable[0].numpy() == k + 1
            value = events.value[0].numpy()[seen] * spec.scale[k] + spec.center[k]
            if history is not None:
                shade = axes.pcolormesh(
                    edges, [0, 1], history[None, :, k], cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.55,
                    transform=axes.get_xaxis_transform(), linewidth=0, rasterized=True,
                )  # fmt: skip
            axes.plot(
                hour[seen], value, color="black", marker=".", markersize=4, linewidth=0.8,
                drawstyle="steps-post" if "mcg" in spec.units[k] else "default",
            )  # fmt: skip
            axes.set_ylabel(
                f"{spec.variables[k].replace('_', ' ')}\n{spec.units[k]}",
                rotation=0,
                ha="right",
                va="center",
                fontsize=9,
            )
            if len(value):  # the colours reach from edge to edge and say nothing of it
                low, high = value.min(), value.max()
                room = 0.2 * (high - low) or 0.1 * abs(high) or 1
                axes.set_ylim(low - room, high + room)
            axes.tick_params("y", labelsize=8)
        if shade is not None:
            figure.colorbar(shade, ax=others, pad=0.01, label=f"what the hour adds to the {attribution.unit_of(spec)}")
        (others or [top])[-1].set(xlabel="hours since ICU admission", xlim=(start, end))
        title = f"stay {stay}: predicted {float(one.probability[0]):.2f} at hour {end:g}"
        if course is None and history is not None:
            besides = one.parts["gradients"][0].sum() - history.sum()
            title += f"\nof no hour (summary of the window, what has elapsed): {besides:+.2f}"
        figure.suptitle(title)


def _told(target: Tensor, numbers: bool) -> str:
    """An outcome in words; of several labels, how many are so."""
    if numbers:
        return f"{float(target):g}"
    if target.ndim:
        return f"{int(target.sum())} of {len(target)}"
    return "yes" if target else "no"


def _last(spec: Spec, name: str, standardised: np.ndarray) -> str:
    """The last of a variable's values in its unit; what was clipped is at least, or at most, that."""
    k = spec.variables.index(name)
    now = standardised[-1]
    bound = "" if abs(now) < CLIP else ">= " if now > 0 else "<= "
    return f"{bound}{now * spec.scale[k] + spec.center[k]:.3g} {spec.units[k]}".strip()
