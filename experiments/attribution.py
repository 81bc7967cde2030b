"""What variables account for in the predictions of a split, by several methods, and whether that is true.

References:
  [1] Zeiler & Fergus 2014, arXiv:1311.2901: attribution by leaving out.
  [2] Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820: leaving out what an attribution calls important must hurt sooner than
      leaving out at random.
  [3] Adebayo et al. 2018, arXiv:1810.03292: an attribution that hardly changes when the model has learned nothing tells nothing of it.
  [4] Fisher, Rudin, Dominici 2019, arXiv:1801.01489: permutation importance.

Shape letters: N samples, V variables, T hours.
"""

import sys
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from datamodules.contract import STATISTICS, Batch, Spec, unlabelled
from datamodules.dictionary import BY_NAME
from datamodules.module import ICUDataModule
from ehrmodels import Fusion, HyMaTE, ICUModule, attribution
from ehrmodels.trees import FittedAtOnce
from experiments import metrics
from experiments.files import console

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of a sample's variables that the deletion test leaves out
REPEATS = 3  # random orders, another for every sample in each
MOST = 500  # samples that are explained: the model goes over them once for each variable, and for each share and order
CHECKED = 150  # of them that untrained models are explained on
UNTRAINED = 2  # of them
REPLICATES = 300  # resamples of patients for what permutation costs
ALIKE = 0.5  # rank correlation with an untrained model's parts from which on a method fails
AT_ONCE = 32  # samples of which gradients are taken
SHOWN = 15  # variables in a figure
METHODS = {
    "importance": "left out", "gradients": "integrated gradients", "shap": "SHAP", "fusion_weight": "fusion weight",
    "attention": "attention of its hours",
}  # fmt: skip


class Explained(NamedTuple):
    """What is known of samples, in the order of ``groups``."""

    groups: list[np.ndarray]  # rows of each batch
    target: Tensor  # (N,), or (N, K)
    output: Tensor  # (N,) log odds, or values; the mean over labels where there are several
    probability: Tensor  # (N,) or the value
    parts: dict[str, np.ndarray]  # method -> (N, V) part of the output, or weight
    hourly: np.ndarray | None  # (N, T, V) parts of the events of each hour, of ``gradients``
    charted: np.ndarray  # (N, V) whether there is anything to leave out
    observations: np.ndarray  # (N, V) in the window


def methods(model: ICUModule) -> list[str]:
    """Names of the methods that explain a model, ``importance`` first: the change of the output without a variable [1].

    ``shap`` are exact for trees, ``gradients`` are integrated along the path from an empty record, ``fusion_weight`` is HyMaTE's and
    ``attention`` Fusion's. All but ``importance`` are in ``ehrmodels.attribution``.
    """
    if isinstance(model, FittedAtOnce):
        return ["importance", "shap"]
    of_model = {
        "gradients": attribution.integrable(model),
        "fusion_weight": isinstance(model, HyMaTE),
        "attention": isinstance(model, Fusion),
    }
    return ["importance", *(name for name, has in of_model.items() if has)]


def drawn(data: ICUDataModule, most: int) -> list[np.ndarray]:
    """Rows that are explained, ``most`` of the split or all, in groups as large as its batches of like samples are."""
    batches = list(data.predict_dataloader().sampler)
    rows, share = np.concatenate(batches), np.concatenate([np.full(len(b), 1 / len(b)) for b in batches])
    some = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
    rows, group = rows[some], np.floor(np.cumsum(share[some]) - share[some] + 1e-6)  # of a batch that is full at 1
    return np.split(rows, np.flatnonzero(np.diff(group)) + 1)


def explained(
    model: ICUModule,
    data: ICUDataModule,
    groups: list[np.ndarray],
    names: Collection[str],
    step: str | None = None,
) -> Explained:
    """The parts that the variables have in the predictions of samples.

    Args:
        model: in evaluation.
        data: set up as the model reads them.
        groups: rows of each batch.
        names: of ``methods``.
        step: what is said while it goes on.
    """
    charted = [data.charted(rows) for rows in groups]
    batches = [moved(data.batch(rows), model) for rows in groups]
    raw = [model(batch) for batch in batches]
    output = [_scalar(one) for one in raw]
    parts: dict[str, np.ndarray] = {}
    hourly = None
    if "importance" in names:
        parts["importance"] = _left_out(model, data, groups, charted, output, step)
    for name in {"gradients", "shap"} & set(names):
        method: Any = attribution.shap if name == "shap" else attribution.integrated_gradients
        pieces = [piece for rows in groups for piece in np.split(rows, range(AT_ONCE, len(rows), AT_ONCE))]
        every = followed(pieces, f"{step}: {name}") if step and name == "gradients" else pieces
        of = []
        for rows in every:
            empty = data.batch(rows, without=np.ones((len(rows), len(model.spec.variables)), bool))
            of.append(method(model, moved(data.batch(rows), model), moved(empty, model)))
        parts[name] = torch.cat([one.variable for one in of]).double().cpu().numpy()
        if of[0].hourly is not None:
            hourly = torch.cat([one.hourly for one in of]).cpu().numpy()
    for name in {"fusion_weight", "attention"} & set(names):
        parts[name] = torch.cat([attribution.attention(model, b) for b in batches]).cpu().numpy()  # type: ignore[misc]
    number = STATISTICS.index("number")
    observations = [data.batch(rows, view="summary").summary[..., number].numpy() for rows in groups]
    return Explained(
        groups,
        torch.cat([batch.target for batch in batches]).cpu(),
        torch.cat(output),
        _scalar(model.prediction(torch.cat(raw))),
        {name: parts[name] for name in methods(model) if name in parts},
        hourly,
        np.concatenate(charted),
        np.concatenate(observations),
    )


def _left_out(
    model: ICUModule,
    data: ICUDataModule,
    groups: list[np.ndarray],
    charted: list[np.ndarray],
    output: list[Tensor],
    step: str | None,
) -> np.ndarray:
    """(N, V) Output less that without each variable that a sample has [1]."""
    part = [np.zeros(has.shape) for has in charted]
    variables: Any = range(len(model.spec.variables))
    if step:
        variables = followed(variables, f"{step}: {len(variables)} variables of {sum(map(len, groups)):,} samples")
    for v in variables:
        for rows, has, whole, into in zip(groups, charted, output, part, strict=True):
            mine = np.flatnonzero(has[:, v])
            if len(mine):
                without = np.zeros((len(mine), has.shape[1]), bool)
                without[:, v] = True
                into[mine, v] = (whole[mine] - _output(model, data.batch(rows[mine], without=without))).numpy()
    return np.concatenate(part)


def moved(batch: Batch, model: ICUModule) -> Batch:
    return type(batch)(*(t.to(model.device) for t in batch))


def followed(items: Collection[Any], step: str) -> Iterable[Any]:
    """The items, with a bar on a terminal and else a line that says what takes so long."""
    if sys.stderr.isatty():
        return track(items, step, console=Console(stderr=True), transient=True)
    console.print(step, soft_wrap=True, highlight=False)
    return items


def deletion(
    model: ICUModule, data: ICUDataModule, cohort: Explained, step: str | None = "deletion test"
) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """What is left of AUROC without a share of each sample's variables, and how far the output moves [2].

    Returns:
        ``order, share, auroc, change``: a row for each method, or random order, and share.
        Method -> (N,) how much further the output moves than in a random order, the mean over shares.
    """
    target = cohort.target
    known = ~unlabelled(target)
    both = model.kind.classes and target.ndim == 1 and 0 < target[known].sum() < known.sum()
    rng = np.random.default_rng(0)
    measures: list[dict[str, Any]] = []
    moves: dict[str, list[np.ndarray]] = {}

    def measure(order: str, share: float, output: Tensor) -> None:
        auroc = float(binary_auroc(output[known], target[known].long())) if both else None
        change = (output - cohort.output).abs()
        moves.setdefault(order, []).append(change.numpy())
        measures.append({"order": order, "share": share, "auroc": auroc, "change": float(change.mean())})

    plan = [(name, s) for name in cohort.parts for s in SHARES] + [
        ("random", s) for s in SHARES for _ in range(REPEATS)
    ]
    begin = np.cumsum([0, *map(len, cohort.groups)])
    for order, share in followed(plan, f"{step}: {len(plan)} passes over {len(target):,} samples") if step else plan:
        by = rng.random(cohort.charted.shape) if order == "random" else np.abs(cohort.parts[order])
        without = first(by, cohort.charted, share)
        outputs = [
            _output(model, data.batch(rows, without=without[a : a + len(rows)]))
            for rows, a in zip(cohort.groups, begin, strict=False)
        ]
        measure(order, share, torch.cat(outputs))
    further = {name: np.mean(moves[name], 0) - np.mean(moves["random"], 0) for name in cohort.parts}
    for order in (*cohort.parts, "random"):
        measure(order, 0.0, cohort.output)
    schema = {"order": pl.String, "share": pl.Float64, "auroc": pl.Float64, "change": pl.Float64}
    table = pl.DataFrame(measures, schema=schema)
    place = {name: k for k, name in enumerate((*cohort.parts, "random"))}
    return table.sort(pl.col("order").replace_strict(place), "share", maintain_order=True), further


def first(by: np.ndarray, charted: np.ndarray, share: float) -> np.ndarray:
    """(N, V) A share of the variables that each sample has: those that are greatest in ``by``."""
    place = np.where(charted, -by, np.inf).argsort(1, kind="stable").argsort(1, kind="stable")
    return place < np.round(share * charted.sum(1, keepdims=True))


def checks(
    model: ICUModule, data: ICUDataModule, cohort: Explained, further: dict[str, np.ndarray], step: str
) -> pl.DataFrame:
    """Whether each method tells of the model: a row a method.

    ``deletion`` is how much further the output moves than in a random order [2], ``alike`` the rank correlation, within a sample, of
    the parts' sizes with those of a model that learned nothing [3], each with a 95 % interval over patients. A method passes where
    the first is above 0 and the second is below 0.5, with their whole intervals.

    Args:
        model: in evaluation.
        data: set up as the model reads them.
        cohort: its samples.
        further: what ``deletion`` gives.
        step: what is said while it goes on.
    """
    patients = data.samples["patient_id"].gather(np.concatenate(cohort.groups)).rank("dense").to_numpy() - 1
    some = [
        rows for rows, end in zip(cohort.groups, np.cumsum([*map(len, cohort.groups)]), strict=True) if end <= CHECKED
    ]
    some = some or [cohort.groups[0][:CHECKED]]
    count = sum(map(len, some))
    batches = [moved(data.batch(rows), model) for rows in some]
    names, alike = list(cohort.parts), {name: np.zeros((UNTRAINED, count)) for name in cohort.parts}
    for seed in range(UNTRAINED):
        other = attribution.untrained(model, batches, seed)
        parts = explained(other, data, some, names, f"{step} {seed + 1} of {UNTRAINED}").parts
        for name in names:
            alike[name][seed] = _rank_correlation(
                np.abs(cohort.parts[name][:count]), np.abs(parts[name]), cohort.charted[:count]
            )
    rows = []
    for name in names:
        moved_by = _interval(further[name], patients)
        like = _interval(np.nanmean(alike[name], 0), patients[:count])
        passed = moved_by[1] > 0 and like[2] < ALIKE
        rows.append((name, *moved_by, *like, len(patients), count, passed))
    columns = [
        "method", "deletion", "deletion_low", "deletion_high", "alike", "alike_low", "alike_high", "samples", "checked", "passed",
    ]  # fmt: skip
    return pl.DataFrame(rows, columns, orient="row")


def permutation(model: ICUModule, data: ICUDataModule, cohort: Explained, step: str) -> pl.DataFrame:
    """What AUROC loses when a group of variables is that of another sample [4]: ``group, variables, auroc_loss, low, high``.

    Empty where there is no AUROC.
    """
    known = ~unlabelled(cohort.target).numpy()
    groups = list(dict.fromkeys(_group(name) for name in model.spec.variables))
    schema = dict.fromkeys(("auroc_loss", "low", "high"), pl.Float64)
    target = cohort.target.numpy()
    if not model.kind.classes or target.ndim > 1 or not 0 < target[known].sum() < known.sum():
        return pl.DataFrame(schema={"group": pl.String, "variables": pl.Int64, **schema})
    rows = np.concatenate(cohort.groups)
    others = np.split(np.random.default_rng(0).permutation(rows), np.cumsum([*map(len, cohort.groups)])[:-1])
    patients = data.samples["patient_id"].gather(rows)
    whole = _predictions(cohort.output, target, patients)
    found = []
    for group in followed(groups, f"{step}: {len(groups)} passes over {len(rows):,} samples"):
        mine = torch.tensor([_group(name) == group for name in model.spec.variables], device=model.device)
        outputs = []
        for own, other in zip(cohort.groups, others, strict=True):
            batch, beside = (moved(data.batch(each), model) for each in (own, other))
            outputs.append(_scalar(model(attribution.swapped(batch, beside, mine, model.spec))))
        less = metrics.difference(_predictions(torch.cat(outputs), target, patients), whole, REPLICATES)["auroc"]
        found.append((group, int(mine.sum()), less["value"], less["low"], less["high"]))
    table = pl.DataFrame(found, ["group", "variables", *schema], orient="row")
    return table.sort("auroc_loss", descending=True, maintain_order=True)


def per_variable(cohort: Explained, spec: Spec) -> pl.DataFrame:
    """Means over samples, the most important variable of the first method first; that method's are ``importance``."""
    part, has = next(iter(cohort.parts.values())), cohort.charted
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
    others = {name: np.abs(of).mean(0, dtype=np.float64) for name, of in cohort.parts.items() if name != "importance"}
    table = pl.DataFrame({**columns, **others}).filter(pl.col("charted") > 0)
    return table.sort("importance", descending=True, maintain_order=True)


def draw_cohort(variables: pl.DataFrame, deletion: pl.DataFrame, title: str, unit: str, figure: Any) -> None:
    """How far each variable moves the predictions, of HyMaTE its fusion weights, and the deletion test, on a figure."""
    top = variables.head(SHOWN).reverse()
    weighted = "fusion_weight" in top.columns
    bars, *weights, curve = figure.subplots(1, 3 if weighted else 2, width_ratios=(1.3, *[0.7] * weighted, 1))
    place = np.arange(len(top))
    names = [f"{v.replace('_', ' ')} ({c:.0%})" for v, c in zip(top["variable"], top["charted"], strict=True)]
    bars.barh(place, top["raises"], 0.7, color="C3", label="raises")
    bars.barh(place, -top["lowers"], 0.7, color="C0", label="lowers")
    bars.axvline(0, color="0.4", linewidth=0.8)
    bars.set_yticks(place, names)
    bars.set(title=title, xlabel=f"part of the {unit}, mean over samples\n(in brackets: share that has the variable)")
    bars.legend(loc="lower right", fontsize=9)
    for axes in weights:
        axes.barh(place, top["fusion_weight"], 0.7, color="0.6")
        axes.set_yticks(place, [])
        axes.set(title="Fusion weight", xlabel="mean over samples")
    measure = "auroc" if deletion["auroc"].null_count() == 0 else "change"
    for colour, (order,) in enumerate(deletion.select("order").unique(maintain_order=True).iter_rows()):
        part = deletion.filter(pl.col("order") == order).group_by("share", maintain_order=True)
        spread = part.agg(
            pl.col(measure).mean().alias("mean"),
            pl.col(measure).min().alias("low"),
            pl.col(measure).max().alias("high"),
        )
        chance = order == "random"
        look: dict[str, Any] = {"color": "0.5" if chance else f"C{colour}", "linestyle": "--" if chance else "-"}
        label = "random order" if chance else f"first by {METHODS[order]}"
        curve.plot(spread["share"] * 100, spread["mean"], marker="o", markersize=4, label=label, **look)
        curve.fill_between(spread["share"] * 100, spread["low"], spread["high"], color=look["color"], alpha=0.2)
    name = "AUROC" if measure == "auroc" else f"mean change of the {unit}"
    curve.set(title="Deletion test", xlabel="% of a sample's variables left out", ylabel=name)
    curve.legend(fontsize=9)


def unit_of(spec: Spec) -> str:
    return "prediction" if spec.kind == "regression" else "log odds"


# ---- small things ------------------------------------------------------------------------------------------------------------------


def _group(name: str) -> str:
    return BY_NAME[name].group if name in BY_NAME else "other"


def _predictions(output: Tensor, target: np.ndarray, patients: pl.Series) -> pl.DataFrame:
    order = np.arange(len(target))
    columns = {"stay_id": order, "patient_id": patients, "minute": 0, "target": target.astype(np.float64)}
    return pl.DataFrame({**columns, "probability": output.sigmoid().numpy()})


def _output(model: ICUModule, batch: Batch) -> Tensor:
    """(N,) Log odds, or values."""
    return _scalar(model(moved(batch, model)))


def _scalar(output: Tensor) -> Tensor:
    """(N,): the mean over labels where there are several."""
    return (output.mean(-1) if output.ndim > 1 else output).double().cpu()


def _rank_correlation(a: np.ndarray, b: np.ndarray, charted: np.ndarray) -> np.ndarray:
    """(N,) Spearman's, of two tables (N, V), among the variables that a sample has; NaN where that cannot be told."""
    index, variable = np.nonzero(charted)
    table = pl.DataFrame({"sample": index, "a": a[index, variable], "b": b[index, variable]})
    by = table.group_by("sample").agg(pl.corr("a", "b", method="spearman"))
    result = np.full(len(a), np.nan)
    result[by["sample"].to_numpy()] = by["a"].fill_null(float("nan")).to_numpy()
    return result


def _interval(values: np.ndarray, patients: np.ndarray) -> tuple[float, float, float]:
    """The mean of what is a number, and its 95 % interval over resamples of patients."""
    number = ~np.isnan(values)
    count = int(patients.max()) + 1
    total = np.bincount(patients[number], values[number], count)
    samples = np.bincount(patients[number], minlength=count)
    means = [float(times @ total) / max(float(times @ samples), 1.0) for times in metrics.resamples(count, 1000)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(total.sum() / samples.sum()), float(low), float(high)
