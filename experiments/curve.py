"""What strategies of transfer are worth with so many patients of the target: a queue of runs of ``ehr finetune``, and its table."""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.module import ICUDataModule
from ehrmodels import ICUModule
from experiments import metrics, report
from experiments.compare import COMPARED, Run, check_samples, signed
from experiments.evaluate import opened
from experiments.figures import figure
from experiments.files import console, write
from experiments.metrics import METRICS, REPLICATES, Rows
from experiments.strategies import Transfer
from experiments.trainings import Training, begun, check_all, check_one_device, complete

CALIBRATION = ("ece", "slope", "intercept")  # shown where it was recalibrated
REFERENCES = ("zero_shot", "target_only")  # what a strategy has to beat
Drawn = dict[tuple[str, int], np.ndarray]  # strategy and patients -> (draws, 1 + replicates, names)


def curve(
    ckpt: Path,
    target: ICUDataModule,
    folder: Path,
    runs: list[Transfer],
    workers: int | None,
    config: dict[str, Any],
    model: type[ICUModule],
) -> dict[str, Any]:
    """Do every run, each in its own process and folder, and print what each strategy reaches with so many patients.

    The same command again goes on where it was. Writes ``transfer.csv`` (a row a strategy and size: means over draws, standard
    deviation over draws, intervals over patients, differences from zero_shot and target_only on the same patients) and
    ``transfer.png``.

    Args:
        ckpt: the source's checkpoint.
        target: second hospital system.
        folder: of the runs.
        runs: one for each strategy, size and draw.
        workers: processes; None: one a GPU, or one.
        config: of ``ehr finetune``; of each run, its own part of ``transfer`` takes the place of the whole.
        model: class of the checkpoint's model.

    Returns:
        Name of each run -> its scores.

    Raises:
        ValueError: a run failed, or runs are asked to use several devices each.
    """
    check_one_device(config["trainer"], "a transfer's queue", "--transfer.workers")
    if (folder / "last.ckpt").exists():
        raise ValueError(f"{folder} holds a training run; choose another --out")
    _, target = opened(ckpt, target, model)  # once, and before any worker says that the files are not there
    config["data"]["init_args"].update(target.options())  # type: ignore[attr-defined]  # as the model has them
    patient = target.samples["patient_id"].gather(np.concatenate([target.rows("train"), target.rows("val")]))
    everyone = patient.n_unique()
    most = max(run.patients or 0 for run in runs)
    if most > everyone:
        raise ValueError(
            f"--transfer.sizes {most:,}: {target.root} has {everyone:,} patients in train and val; ask for fewer, or all"
        )
    trainings = {run: Training(str(folder), str(run), "finetune") for run in runs}
    place = {"ckpt": str(ckpt), **({} if model.__module__.startswith("ehrmodels") else {"model": _path(model)})}
    configurations = {}
    for run, training in trainings.items():
        own = {**deepcopy(config), **place, "transfer": asdict(run), "seed": config["seed"] + int(run.draw)}
        configurations[training] = {key: value for key, value in own.items() if key != "out"}
    alone = begun(folder, configurations, "choose another --out")
    complete(folder, list(configurations), workers)
    check_all(list(configurations), folder)
    with alone:
        _summarised(folder, trainings, target, everyone)
    return {str(training): training.result()[1] for training in trainings.values()}


def _path(model: type) -> str:
    return f"{model.__module__}.{model.__qualname__}"


def _summarised(folder: Path, trainings: dict[Transfer, Training], target: ICUDataModule, everyone: int) -> None:
    """Print and write the table, the picture, and what to use."""
    runs = {transfer: Run.read(str(training.run)) for transfer, training in trainings.items()}
    split: Any = target.split
    check_samples(list(runs.values()), split)
    utility = all(run.utility for run in runs.values())
    ranking = [name for name in COMPARED if name != "utility" or utility]
    names = [*ranking, *(CALIBRATION if any(transfer.recalibrate for transfer in runs) else ())]
    draws: dict[tuple[str, int], list[np.ndarray]] = {}
    minutes: dict[tuple[str, int], list[float]] = {}
    for transfer, run in runs.items():
        size = (transfer.patients or everyone) if transfer.trains else 0
        drawn = Rows(run.rows(split), run.threshold, utility).drawn(names, REPLICATES)
        draws.setdefault((transfer.label, size), []).append(drawn)
        minutes.setdefault((transfer.label, size), []).append(trainings[transfer].state()["minutes"])
    stacked = {key: np.array(parts) for key, parts in draws.items()}
    table = tabulated(stacked, names).with_columns(
        minutes=pl.Series([float(np.mean(minutes[key])) for key in stacked]), everyone=pl.lit(everyone)
    )
    write(folder / "transfer.csv", table.write_csv().encode())
    rows = next(iter(runs.values())).rows(split)
    title = f"{target.name}, {split} split: n = {len(rows):,}, {int(rows['target'].sum()):,} events; 95 % intervals: bootstrap over patients; * without 0"
    report.print_table(readable(table, names), title, console)
    for sentence in advice(table):
        console.print(sentence, soft_wrap=True, highlight=False)
    draw(table, ranking, folder / "transfer.png", f"{target.name}, {split} split")
    console.print(f"wrote transfer.csv and transfer.png to {folder}", soft_wrap=True)


def tabulated(drawn: Drawn, names: list[str]) -> pl.DataFrame:
    """A row a strategy and size.

    Args:
        drawn: strategy and patients (zero_shot has 0) -> (draws, 1 + replicates, names), the metrics of the whole and of resamples.
        names: of the metrics.
    """
    records = []
    for (strategy, size), values in drawn.items():
        mean = values.mean(0)
        record: dict[str, Any] = {"strategy": strategy, "patients": size, "draws": len(values)}
        for name, told in metrics.with_intervals(names, mean).items():
            k = names.index(name)
            sd = float(values[:, 0, k].std(ddof=1)) if len(values) > 1 else None
            record |= {name: told["value"], f"{name}_low": told["low"], f"{name}_high": told["high"], f"{name}_sd": sd}
            record |= {f"{name}_least": float(values[:, 0, k].min()), f"{name}_most": float(values[:, 0, k].max())}
        for reference in REFERENCES:
            other = drawn.get((reference, 0 if reference == "zero_shot" else size))
            compared = (
                {}
                if other is None or strategy in REFERENCES[: REFERENCES.index(reference) + 1]
                else (metrics.with_intervals(names, mean - other.mean(0)))
            )
            for name in names:
                told = compared.get(name, {})
                record |= {f"{name}_less_{reference}": told.get("value")}
                record |= {f"{name}_less_{reference}_{end}": told.get(end) for end in ("low", "high")}
        records.append(record)
    numbers = {name: pl.Float64 for record in records for name in record if name.startswith(tuple(names))}
    return pl.DataFrame(records, schema_overrides=numbers).sort("patients", maintain_order=True)


def readable(table: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """What ``tabulated`` returns, for people."""
    records = table.to_dicts()
    shown: dict[str, list[Any]] = {
        "strategy": table["strategy"].to_list(),
        "patients": [f"{n:,}" if n else "-" for n in table["patients"]],
    }
    for name in names:
        label = str(METRICS[name].label)
        shown[label] = [metrics.cell(name, record) for record in records]
        if table[f"{name}_sd"].is_not_null().any():
            shown[f"{label} sd"] = ["-" if r[f"{name}_sd"] is None else f"{r[f'{name}_sd']:.3f}" for r in records]
    for reference in REFERENCES:
        for name in [name for name in names if name in COMPARED]:
            column = f"{name}_less_{reference}"
            if table[column].is_not_null().any():
                shown[f"{METRICS[name].label} less {reference}"] = [signed(r, column) for r in records]
    if "minutes" in table.columns:
        shown["minutes"] = [f"{value:.1f}" for value in table["minutes"]]
    return pl.DataFrame(shown)


def advice(table: pl.DataFrame) -> list[str]:
    """Sentences on what to use with so many patients, and where training on the target alone passes zero-shot.

    The best of several strategies on the very patients that they are measured on is flattered by the choice: what is not clearly
    better than fine-tuning is not called better.
    """
    sentences = []
    trained = table.filter(pl.col("patients") > 0)
    for (size,), rows in trained.group_by("patients", maintain_order=True):
        best = rows.sort(pl.col("auroc") + pl.col("auprc"), descending=True).row(0, named=True)
        gains = []
        for reference in REFERENCES:
            low, high = (best[f"auroc_less_{reference}_{end}"] for end in ("low", "high"))
            if low is not None:
                clear = "above" if low > 0 else "below" if high < 0 else "not clearly apart from"
                gains.append(f"{clear} {reference} ({best[f'auroc_less_{reference}']:+.3f})")
        text = f"with {size:,} patients use {best['strategy']}: AUROC {best['auroc']:.3f}, AUPRC {best['auprc']:.3f}"
        sentences.append(f"{text}{'; AUROC ' if gains else ''}{', '.join(gains)}")
    alone = trained.filter(strategy="target_only").sort("patients")
    zero = table.filter(strategy="zero_shot")
    if len(alone) and len(zero):
        sizes, above = alone["patients"].to_list(), (alone["auroc"] > zero["auroc"][0]).to_list()
        if above[0]:
            sentences.append(f"target_only is above zero_shot from {sizes[0]:,} patients on")
        elif not any(above):
            sentences.append(f"target_only stays below zero_shot up to {sizes[-1]:,} patients")
        else:
            first = above.index(True)
            sentences.append(f"target_only passes zero_shot between {sizes[first - 1]:,} and {sizes[first]:,} patients")
    return sentences


def draw(table: pl.DataFrame, names: list[str], path: Path, title: str) -> None:
    """Each strategy's metrics over the number of patients; a band from the least to the most of the draws."""
    trained = table.filter(pl.col("patients") > 0)
    with figure(path, (11, 4.4)) as drawn:
        axes = drawn.subplots(1, len(names), squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            for zero in table.filter(strategy="zero_shot").to_dicts():
                axis.axhline(zero[name], color="black", linestyle="--", linewidth=1, label="zero_shot")
            for k, ((strategy,), rows) in enumerate(trained.group_by("strategy", maintain_order=True)):
                rows = rows.sort("patients")
                x = rows["patients"].to_numpy()
                axis.plot(x, rows[name].to_numpy(), "o-", color=f"C{k}", label=strategy, markersize=4)
                if (rows["draws"] > 1).any():
                    least, most = rows[f"{name}_least"].to_numpy(), rows[f"{name}_most"].to_numpy()
                    axis.fill_between(x, least, most, color=f"C{k}", alpha=0.15, linewidth=0)
            axis.set_xscale("log")
            sizes = sorted(set(trained["patients"]))
            axis.set_xticks(sizes, [f"{n:,}" for n in sizes], minor=False)
            axis.minorticks_off()
            axis.set_xlabel("patients of the target")
            axis.set_title(METRICS[name].label, fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(fontsize=8, frameon=False)
        drawn.suptitle(f"{title}; bands: least to most of the draws", fontsize=9)
