"""``ehr explain``: which variables a model's predictions rest on, and whether that is true: the deletion test.

Reference: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820: leaving out what an attribution calls important must hurt sooner than
leaving out at random.
"""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from datamodules.contract import Spec, Triplets, unlabelled
from datamodules.module import ICUDataModule
from datamodules.tasks import TASKS
from datamodules.views import CLIP
from ehrmodels import ICUModule, load
from ehrmodels.hymate import HyMaTE, chosen, sums
from experiments import figures, files, report
from experiments.evaluate import opened
from experiments.files import console

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of a stay's observations that the deletion test leaves out
REPEATS = 3  # random orders, another for every stay in each
MOST = 800  # stays of the deletion test, which goes over them once for each share and order
SHOWN = 15  # variables in a figure


def explain(
    ckpt: str,
    out: str,
    data: ICUDataModule | None = None,
    stay: str | None = None,
    model: type[ICUModule] | None = None,
) -> None:
    """Show which variables the predictions of a HyMaTE checkpoint rest on, for a cohort and for one stay, and test it.

    Writes ``attribution.csv`` (a row a variable: its share of the fusion weights, the weight of one observation of it, its part of the
    log odds in absolute value, means over stays), ``deletion.csv`` and ``cohort.png`` (the same, and AUROC when a stay's observations
    are left out, those of the variable with the greatest weight per observation first, beside random orders of variables), and ``stay.png``.

    Args:
        ckpt: Checkpoint of HyMaTE, such as runs/NAME/best.ckpt.
        out: Folder for the results.
        data: Hospital system; default: the one that the checkpoint was trained on. --data.split chooses train, val, test or all.
        stay: stay_id of the stay to draw; default: the one with the highest predicted probability.
        model: Class of the checkpoint's model, where it is your own, below HyMaTE.
    """
    network = load(ckpt, model)
    if not isinstance(network, HyMaTE) or not network.supervised:
        raise ValueError(
            f"{ckpt} holds a {type(network).__name__}: expected a HyMaTE, whose fusion weights are explained"
        )
    _, data = opened(ckpt, data, model)
    ids, shown = data.samples["stay_id"].cast(pl.String), data.rows(data.split)
    if stay is not None:
        shown = shown[(ids.gather(shown) == stay).to_numpy()]
        if not len(shown):
            raise ValueError(
                f"stay {stay} is not in split {data.split!r} of {data.root}; choose another --stay or --data.split"
            )
    with torch.inference_mode():
        step = f"attributing {len(data.rows(data.split)):,} samples"
        result = pl.concat([_attribution(network, batch) for batch in _followed(data.predict_dataloader(), step)])
        deletion = _deletion(network, data)
    variables = _per_variable(result, network)
    drawn = result.filter(pl.col("row").is_in(shown)).sort("probability" if stay is None else "row", descending=True)
    if drawn.is_empty():
        raise ValueError(
            "no observation to draw in " + (f"stay {stay}" if stay else f"split {data.split!r}") + "; choose another"
        )
    row = int(drawn["row"][0])
    one: Triplets = data.batch(np.array([row]))  # type: ignore[assignment]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "attribution.csv", variables.write_csv(float_precision=5))
    files.write_text(folder / "deletion.csv", deletion.write_csv(float_precision=5))
    _draw_cohort(
        variables, deletion, f"{data.name} {data.split}, {result['row'].n_unique():,} samples", folder / "cohort.png"
    )
    minute = int(data.samples["minute"][row])
    _draw_stay(one, drawn.filter(pl.col("row") == row), network.spec, ids[row], minute, folder / "stay.png")
    report.print_table(
        variables.head(SHOWN).with_columns(pl.col(pl.Float64).round(4)), "what predictions rest on", console
    )
    console.print(
        f"wrote attribution.csv, deletion.csv, cohort.png and stay.png ({ids[row]}) to {folder}", soft_wrap=True
    )


def _attribution(model: HyMaTE, batch: Triplets) -> pl.DataFrame:
    """A row for each variable that a sample has: ``row, variable, weight, part, observations, probability``."""
    weight, part = model.attribute(batch)
    count = sums(torch.ones_like(batch.value), batch, len(model.spec.variables))
    probability = model.kind.prediction(model(batch), model.pos_weight or 1.0)
    sample, variable = count.nonzero(as_tuple=True)
    names = pl.Series(model.spec.variables)[variable.numpy()]
    columns = {"row": batch.row[sample], "weight": weight[sample, variable], "part": part[sample, variable]}
    columns |= {"observations": count[sample, variable], "probability": probability[sample]}
    return pl.DataFrame({k: v.numpy() for k, v in columns.items()}).with_columns(names.alias("variable"))


def _followed(items: Collection[Any], step: str) -> Iterable[Any]:
    """The items, with a bar on a terminal and else a line that says what takes so long."""
    if sys.stderr.isatty():
        return track(items, step, console=Console(stderr=True), transient=True)
    console.print(step, soft_wrap=True, highlight=False)
    return items


def _per_variable(result: pl.DataFrame, model: HyMaTE) -> pl.DataFrame:
    """Means over samples, the variable with the greatest weight first."""
    n = result["row"].n_unique()
    unit = pl.col("variable").replace_strict(model.spec.variables, model.spec.units).alias("unit")
    return (
        result.group_by("variable")
        .agg(
            weight=pl.col("weight").cast(pl.Float64).sum() / n,
            weight_per_observation=pl.col("weight").cast(pl.Float64).sum() / pl.col("observations").sum(),
            log_odds=pl.col("part").cast(pl.Float64).abs().sum() / n,
            observations=pl.col("observations").cast(pl.Float64).sum() / n,
            charted=pl.len() / n,
        )
        .sort("weight", descending=True)
        .select("variable", unit, pl.exclude("variable"))
    )


def _deletion(model: HyMaTE, data: ICUDataModule) -> pl.DataFrame:
    """``order, share, auroc, change``: what is left of AUROC without a share of each stay's observations, and how far log odds move."""
    generator = torch.Generator().manual_seed(0)
    rows = list(data.predict_dataloader().sampler)
    batches: list[Triplets] = []
    for place in torch.randperm(len(rows), generator=generator).tolist():
        if sum(len(b.row) for b in batches) < MOST:
            batches.append(data.batch(rows[place]))  # type: ignore[arg-type]
    target = torch.cat([b.target for b in batches])
    known = ~unlabelled(target)
    both = 0 < target[known].sum() < known.sum()
    variables = len(model.spec.variables)
    pairs = [model.attribute(b) for b in batches]
    whole = torch.cat([model(b) for b in batches])
    attributed = [
        weight / sums(torch.ones_like(b.value), b, variables).clamp(min=1)
        for b, (weight, _) in zip(batches, pairs, strict=True)
    ]
    measures: list[dict[str, Any]] = []

    def measure(order: str, share: float, logit: Tensor) -> None:
        auroc = float(binary_auroc(logit[known], target[known].long())) if both else None
        measures.append({"order": order, "share": share, "auroc": auroc, "change": float((logit - whole).abs().mean())})

    for order in ("attribution", "random"):
        measure(order, 0.0, whole)
    plan = [("attribution", share) for share in SHARES] + [
        ("random", share) for share in SHARES for _ in range(REPEATS)
    ]
    for order, share in _followed(plan, f"deletion test: {len(plan)} passes over {len(target):,} samples"):
        by = (
            attributed
            if order == "attribution"
            else [torch.rand(len(b.row), variables, generator=generator) for b in batches]
        )
        measure(order, share, torch.cat([model(_without(b, i, share)) for b, i in zip(batches, by, strict=True)]))
    return pl.DataFrame(
        measures, schema={"order": pl.String, "share": pl.Float64, "auroc": pl.Float64, "change": pl.Float64}
    )


def _without(batch: Triplets, importance: Tensor, share: float) -> Triplets:
    """The batch less a share of each sample's observations: those of the variable of greatest ``importance`` (B, V) first."""
    padded = torch.cat([importance.new_full((len(importance), 1), -torch.inf), importance], 1)
    place = padded.gather(1, batch.variable).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return chosen(batch, place >= (share * batch.length[:, None]).round())


def _draw_cohort(variables: pl.DataFrame, deletion: pl.DataFrame, title: str, path: Path) -> None:
    """Bars of the fusion weight of variables beside how often they are charted, and the deletion test."""
    top = variables.head(SHOWN).reverse()
    with figures.figure(path, (13, 5.2)) as figure:
        bars, curve = figure.subplots(1, 2, width_ratios=(1.3, 1))
        place = np.arange(len(top))
        bars.barh(place + 0.2, top["weight"], 0.38, label="share of fusion weight")
        bars.barh(
            place - 0.2,
            top["observations"] / variables["observations"].sum(),
            0.38,
            color="0.75",
            label="share of observations",
        )
        bars.set_yticks(place, top["variable"])
        bars.set(title=title, xlabel="mean over samples")
        bars.legend(loc="lower right", fontsize=9)
        measure = "auroc" if deletion["auroc"].null_count() == 0 else "change"
        for colour, (order, label) in enumerate((("attribution", "greatest weight first"), ("random", "random order"))):
            part = deletion.filter(pl.col("order") == order).group_by("share", maintain_order=True)
            spread = part.agg(
                pl.col(measure).mean().alias("mean"),
                pl.col(measure).min().alias("low"),
                pl.col(measure).max().alias("high"),
            )
            curve.plot(spread["share"] * 100, spread["mean"], marker="o", markersize=4, color=f"C{colour}", label=label)
            curve.fill_between(spread["share"] * 100, spread["low"], spread["high"], color=f"C{colour}", alpha=0.2)
        name = "AUROC" if measure == "auroc" else "mean change of log odds"
        curve.set(title="Deletion test", xlabel="% of a stay's observations left out", ylabel=name)
        curve.legend(fontsize=9)


def _draw_stay(one: Triplets, result: pl.DataFrame, spec: Spec, stay: str, minute: int, path: Path) -> None:
    """A stay's observations of the variables that its prediction rests on most, and their parts of the log odds.

    Args:
        one: the sample.
        result: its rows of ``_attribution``.
        spec: what its values are standardised by.
        stay: its stay_id.
        minute: its prediction time since ICU admission.
        path: the picture.
    """
    top = result.sort("weight", descending=True).head(SHOWN).reverse()
    hour = minute / 60 + (one.time[0].numpy() - 1) * spec.window / 2
    variable, value = one.variable[0].numpy(), one.value[0].numpy()
    target = float(one.target[0])
    outcome = "unknown" if np.isnan(target) else "yes" if target else "no"
    with figures.figure(path, (14, 5.6)) as figure:
        events, weights, parts = figure.subplots(1, 3, width_ratios=(2.2, 1, 1), sharey=True)
        place = np.arange(len(top))
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
        figure.colorbar(points, ax=events, label="standard deviations from the mean of training", pad=0.01)
        last = [_last(spec, name, value[variable == spec.variables.index(name) + 1]) for name in top["variable"]]
        events.set_yticks(
            place, [f"{name.replace('_', ' ')}\n{now}" for name, now in zip(top["variable"], last, strict=True)]
        )
        events.tick_params("y", labelsize=8)
        events.set(title="observations (left: the last value)", xlabel="hours since ICU admission")
        earliest = min(0, *hour[variable > 0])  # a window may begin before there was anything to see
        events.set_xlim(max(minute / 60 - spec.window, earliest), minute / 60)
        weights.barh(place, top["weight"])
        weights.set(title="fusion weight")
        parts.barh(place, top["part"], color=np.where(top["part"].to_numpy() > 0, "C3", "C0"))
        parts.axvline(0, color="0.4", linewidth=0.8)
        parts.set(title="part of the log odds")
        task = TASKS[spec.task["name"]].text
        figure.suptitle(
            f"stay {stay} at hour {minute / 60:g}: predicted {result['probability'][0]:.2f}; {task}: {outcome}"
        )


def _last(spec: Spec, name: str, standardised: np.ndarray) -> str:
    """The last of a variable's values in its unit; what was clipped is at least, or at most, that."""
    k = spec.variables.index(name)
    now = standardised[-1]
    bound = "" if abs(now) < CLIP else ">= " if now > 0 else "<= "
    return f"{bound}{now * spec.scale[k] + spec.center[k]:.3g} {spec.units[k]}".strip()
