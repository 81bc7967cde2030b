"""``ehr explain``: which variables a model's predictions rest on, and whether that is true: the deletion test.

A variable matters to a prediction as much as its log odds change when all observations of the variable are taken out of the
record, and whatever a model reads (hours, triplets, summary, what has elapsed) is made anew from those that are left.

References:
  [1] Zeiler & Fergus 2014, arXiv:1311.2901: attribution by leaving out.
  [2] Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820: leaving out what an attribution calls important must hurt sooner than
      leaving out at random.

Shape letters: N samples, V variables.
"""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from datamodules.contract import STATISTICS, Batch, Spec, Triplets, unlabelled
from datamodules.module import ICUDataModule
from datamodules.tasks import TASKS
from datamodules.views import CLIP
from ehrmodels import HyMaTE, ICUModule
from experiments import figures, files, report
from experiments.evaluate import Device, opened, resolved
from experiments.files import console

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of a sample's variables that the deletion test leaves out
REPEATS = 3  # random orders, another for every sample in each
MOST = 800  # samples that are explained: the model goes over them once for each variable, and for each share and order
SHOWN = 15  # variables in a figure


class Explained(NamedTuple):
    """What is known of samples, in the order of ``groups``."""

    groups: list[np.ndarray]  # rows of each batch
    target: Tensor  # (N,), or (N, K)
    output: Tensor  # (N,) log odds, or values; the mean over labels where there are several
    probability: Tensor  # (N,) or the value
    part: np.ndarray  # (N, V) output less that without the variable
    charted: np.ndarray  # (N, V) whether there is anything to leave out
    observations: np.ndarray  # (N, V) in the window
    weight: np.ndarray | None  # (N, V) fusion weights of HyMaTE


def explain(
    ckpt: str,
    out: str,
    data: ICUDataModule | None = None,
    stay: str | None = None,
    model: type[ICUModule] | None = None,
    device: Device = "auto",
) -> None:
    """Show which variables the predictions of a checkpoint rest on, for a cohort and for one stay, and test it.

    A variable matters as much as the log odds change without its observations; at most 800 samples are explained. Writes
    ``attribution.csv`` (a row a variable: ``importance``, the mean absolute change; what of it ``raises`` and ``lowers`` the
    log odds; the mean among samples that have the variable; how often it is charted; of HyMaTE also its share of the fusion
    weights), ``deletion.csv`` and ``cohort.png`` (the same, and AUROC when a sample's variables are left out, the most
    important first, beside random orders), and ``stay.png``.

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
    with torch.inference_mode():
        cohort = _explained(network, data, _drawn(data), "explaining")
        deletion = _deletion(network, data, cohort)
        row = int(np.concatenate(cohort.groups)[cohort.probability.argmax()]) if stay is None else int(shown.max())
        one = _explained(network, data, [np.array([row])])
    if not one.charted.any():
        raise ValueError(f"no observation to draw in stay {ids[row]}; choose another --stay")
    variables = _per_variable(cohort, network.spec)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "attribution.csv", variables.write_csv(float_precision=5))
    files.write_text(folder / "deletion.csv", deletion.write_csv(float_precision=5))
    title = f"{data.name} {data.split}, {len(cohort.output):,} samples"
    unit = "prediction" if network.spec.kind == "regression" else "log odds"
    _draw_cohort(variables, deletion, title, unit, folder / "cohort.png")
    minute, events = int(data.samples["minute"][row]), data.batch(np.array([row]), view="triplets")
    _draw_stay(events, _of_one(one, network.spec), network.spec, ids[row], minute, folder / "stay.png")  # type: ignore[arg-type]
    report.print_table(
        variables.head(SHOWN).with_columns(pl.col(pl.Float64).round(4)), "what predictions rest on", console
    )
    console.print(
        f"wrote attribution.csv, deletion.csv, cohort.png and stay.png ({ids[row]}) to {folder}", soft_wrap=True
    )


def _drawn(data: ICUDataModule) -> list[np.ndarray]:
    """Rows that are explained, ``MOST`` of the split or all, in groups as large as its batches of like samples are."""
    batches = list(data.predict_dataloader().sampler)
    rows, share = np.concatenate(batches), np.concatenate([np.full(len(b), 1 / len(b)) for b in batches])
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[:MOST])
    rows, group = rows[drawn], np.floor(np.cumsum(share[drawn]) - share[drawn] + 1e-6)  # of a batch that is full at 1
    return np.split(rows, np.flatnonzero(np.diff(group)) + 1)


def _explained(model: ICUModule, data: ICUDataModule, groups: list[np.ndarray], step: str | None = None) -> Explained:
    """The parts that the variables have in the predictions of samples; ``step`` is said while it goes on."""
    charted = [data.charted(rows) for rows in groups]
    batches = [_moved(data.batch(rows), model) for rows in groups]
    raw = [model(batch) for batch in batches]
    output = [_scalar(one) for one in raw]
    weight = None
    if isinstance(model, HyMaTE):
        weight = np.concatenate([model.attribute(b)[0].cpu().numpy() for b in batches])  # type: ignore[arg-type]
    part = [np.zeros(c.shape) for c in charted]
    variables: Any = range(len(model.spec.variables))
    if step:
        variables = _followed(variables, f"{step}: {len(variables)} variables of {sum(map(len, groups)):,} samples")
    for v in variables:
        for rows, has, whole, into in zip(groups, charted, output, part, strict=True):
            mine = np.flatnonzero(has[:, v])
            if len(mine):
                without = np.zeros((len(mine), has.shape[1]), bool)
                without[:, v] = True
                into[mine, v] = (whole[mine] - _output(model, data.batch(rows[mine], without=without))).numpy()
    number = STATISTICS.index("number")
    observations = [data.batch(rows, view="summary").summary[..., number].numpy() for rows in groups]
    return Explained(
        groups,
        torch.cat([batch.target for batch in batches]).cpu(),
        torch.cat(output),
        _scalar(model.prediction(torch.cat(raw))),
        np.concatenate(part),
        np.concatenate(charted),
        np.concatenate(observations),
        weight,
    )


def _output(model: ICUModule, batch: Batch) -> Tensor:
    """(N,) Log odds, or values."""
    return _scalar(model(_moved(batch, model)))


def _moved(batch: Batch, model: ICUModule) -> Batch:
    return type(batch)(*(t.to(model.device) for t in batch))


def _scalar(output: Tensor) -> Tensor:
    """(N,): the mean over labels where there are several."""
    return (output.mean(-1) if output.ndim > 1 else output).double().cpu()


def _followed(items: Collection[Any], step: str) -> Iterable[Any]:
    """The items, with a bar on a terminal and else a line that says what takes so long."""
    if sys.stderr.isatty():
        return track(items, step, console=Console(stderr=True), transient=True)
    console.print(step, soft_wrap=True, highlight=False)
    return items


def _per_variable(cohort: Explained, spec: Spec) -> pl.DataFrame:
    """Means over samples, the most important variable first."""
    part, has = cohort.part, cohort.charted
    columns = {
        "variable": spec.variables,
        "unit": spec.units,
        "importance": np.abs(part).mean(0),
        "raises": np.maximum(part, 0).mean(0),
        "lowers": np.maximum(-part, 0).mean(0),
        "importance_when_charted": np.abs(part).sum(0) / np.maximum(has.sum(0), 1),
        "charted": has.mean(0),
        "observations": cohort.observations.mean(0, dtype=np.float64),
    }
    if cohort.weight is not None:
        columns["fusion_weight"] = cohort.weight.mean(0, dtype=np.float64)
    return pl.DataFrame(columns).filter(pl.col("charted") > 0).sort("importance", descending=True, maintain_order=True)


def _of_one(one: Explained, spec: Spec) -> pl.DataFrame:
    """``variable, part, probability`` of the only sample, and ``weight`` where there is one; a row for each that it has."""
    columns = {
        "variable": spec.variables,
        "part": one.part[0],
        "probability": [float(one.probability[0])] * len(spec.variables),
    }
    if one.weight is not None:
        columns["weight"] = one.weight[0]
    return pl.DataFrame(columns).filter(one.charted[0])


def _deletion(model: ICUModule, data: ICUDataModule, cohort: Explained) -> pl.DataFrame:
    """``order, share, auroc, change``: what is left of AUROC without a share of each sample's variables, and how far the
    output moves."""
    target = cohort.target
    known = ~unlabelled(target)
    both = model.kind.classes and 0 < target[known].sum() < known.sum()
    rng = np.random.default_rng(0)
    measures: list[dict[str, Any]] = []

    def measure(order: str, share: float, output: Tensor) -> None:
        auroc = float(binary_auroc(output[known], target[known].long())) if both else None
        change = float((output - cohort.output).abs().mean())
        measures.append({"order": order, "share": share, "auroc": auroc, "change": change})

    for order in ("importance", "random"):
        measure(order, 0.0, cohort.output)
    plan = [("importance", s) for s in SHARES] + [("random", s) for s in SHARES for _ in range(REPEATS)]
    for order, share in _followed(plan, f"deletion test: {len(plan)} passes over {len(target):,} samples"):
        by = np.abs(cohort.part) if order == "importance" else rng.random(cohort.part.shape)
        without = _first(by, cohort.charted, share)
        begin = np.cumsum([0, *map(len, cohort.groups)])
        outputs = [
            _output(model, data.batch(rows, without=without[a : a + len(rows)]))
            for rows, a in zip(cohort.groups, begin, strict=False)
        ]
        measure(order, share, torch.cat(outputs))
    schema = {"order": pl.String, "share": pl.Float64, "auroc": pl.Float64, "change": pl.Float64}
    return pl.DataFrame(measures, schema=schema)


def _first(by: np.ndarray, charted: np.ndarray, share: float) -> np.ndarray:
    """(N, V) A share of the variables that each sample has: those that are greatest in ``by``."""
    place = np.where(charted, -by, np.inf).argsort(1, kind="stable").argsort(1, kind="stable")
    return place < np.round(share * charted.sum(1, keepdims=True))


def _draw_cohort(variables: pl.DataFrame, deletion: pl.DataFrame, title: str, unit: str, path: Path) -> None:
    """How far each variable moves the predictions, of HyMaTE its fusion weights, and the deletion test."""
    top = variables.head(SHOWN).reverse()
    weighted = "fusion_weight" in top.columns
    with figures.figure(path, (16 if weighted else 13, 5.2)) as figure:
        bars, *weights, curve = figure.subplots(1, 3 if weighted else 2, width_ratios=(1.3, *[0.7] * weighted, 1))
        place = np.arange(len(top))
        names = [f"{v.replace('_', ' ')} ({c:.0%})" for v, c in zip(top["variable"], top["charted"], strict=True)]
        bars.barh(place, top["raises"], 0.7, color="C3", label="raises")
        bars.barh(place, -top["lowers"], 0.7, color="C0", label="lowers")
        bars.axvline(0, color="0.4", linewidth=0.8)
        bars.set_yticks(place, names)
        bars.set(
            title=title, xlabel=f"part of the {unit}, mean over samples (in brackets: share that has the variable)"
        )
        bars.legend(loc="lower right", fontsize=9)
        for axes in weights:
            axes.barh(place, top["fusion_weight"], 0.7, color="0.6")
            axes.set_yticks(place, [])
            axes.set(title="Fusion weight", xlabel="mean over samples")
        measure = "auroc" if deletion["auroc"].null_count() == 0 else "change"
        for colour, (order, label) in enumerate((("importance", "most important first"), ("random", "random order"))):
            part = deletion.filter(pl.col("order") == order).group_by("share", maintain_order=True)
            spread = part.agg(
                pl.col(measure).mean().alias("mean"),
                pl.col(measure).min().alias("low"),
                pl.col(measure).max().alias("high"),
            )
            curve.plot(spread["share"] * 100, spread["mean"], marker="o", markersize=4, color=f"C{colour}", label=label)
            curve.fill_between(spread["share"] * 100, spread["low"], spread["high"], color=f"C{colour}", alpha=0.2)
        name = "AUROC" if measure == "auroc" else f"mean change of the {unit}"
        curve.set(title="Deletion test", xlabel="% of a sample's variables left out", ylabel=name)
        curve.legend(fontsize=9)


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
    top = result.sort(pl.col("part").abs(), descending=True).head(SHOWN).reverse()
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
