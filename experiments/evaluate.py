"""``ehr evaluate``: a checkpoint on any hospital system. Also the predictions that every other verb scores."""

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import track

from datamodules import module
from datamodules.contract import Batch
from datamodules.hospitals import __all__ as SYSTEMS
from datamodules.hospitals.base import Split
from datamodules.module import ICUDataModule
from ehrmodels import ICUModule, load
from ehrmodels.base import is_distributed
from ehrmodels.calibration import Calibration, fitted
from ehrmodels.checkpoint import read
from ehrmodels.step import divided
from experiments import distributed, hospitals, metrics, mistakes, page, report
from experiments.files import console, save, write_json, write_parquet

Device = Literal["auto", "cpu", "cuda"]
Scored = dict[str, tuple[pl.DataFrame, dict[str, Any]]]  # name of a result -> predictions and scores


def evaluate(
    ckpt: str,
    out: str,
    data: ICUDataModule | None = None,
    model: type[ICUModule] | None = None,
    device: Device = "auto",
    by_hospital: int | None = None,
    beside: str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint on a split of any hospital system.

    Nothing is fitted: scaler, variables and threshold are those of the checkpoint. Options of the data that belong to the model
    (task, hours, window, statics, treatment, and on the same hospital system the split) are taken from it; one that contradicts
    it is refused. Writes ``metrics.json`` (``auroc``, ``auprc``, ... each with ``value``, ``low``, ``high``; ``n``,
    ``n_positive``), ``predictions.parquet`` (``stay_id, patient_id, minute, target, probability, split``), ``report.html`` and its
    cards, ``card.md`` and ``data_card.md``.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        out: Folder for the results.
        data: Hospital system; default: the one that the checkpoint was trained on. --data.split chooses train, val, test or all.
        model: Class of the checkpoint's model, where it is your own.
        device: Where to compute; auto: on the GPU where there is one.
        by_hospital: Also score each hospital with at least so many stays with the event, and without; pools AUROC and calibration with
            random effects and draws a forest plot (hospitals.csv, hospitals.png).
        beside: Run directories or folders of evaluate on the same samples, with commas between, that report.html compares this with.

    Returns:
        What ``metrics.json`` holds.
    """
    from experiments import compare  # which imports this file

    folder = Path(out)
    if (folder / "last.ckpt").exists():
        raise ValueError(f"{folder} holds a training run, whose results would be lost; choose another --out")
    if by_hospital is not None and by_hospital < 2:
        raise ValueError(f"--by_hospital must be at least 2, found {by_hospital}")
    others = [compare.Run.read(run) for run in (beside.split(",") if beside else [])]
    network, data = opened(ckpt, data, model)
    predictions = predict_split(network, data, data.split, device)
    result = {
        **metrics.score(predictions, network.threshold, task=network.spec.task),
        "split": data.split,
        "operating_point": network.operating_point,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(predictions, folder / "predictions.parquet")
    written = {**result, "data": data.name, "checkpoint": str(ckpt)}
    write_json(written, folder / "metrics.json")
    report.show({data.name: result}, console)
    title = f"{Path(ckpt).parent.name}: {network.spec.task['name']}"
    files = "metrics.json, predictions.parquet, report.html, card.md and data_card.md"
    if by_hospital is not None:
        hospitals.tell(predictions, data.store.stays, by_hospital, folder, f"{title}, {data.name}")
        files = files.replace(" and", ",") + ", hospitals.csv and hospitals.png"
    compared = None
    if others:
        groups = compare.by_configuration([compare.Run.read(str(folder)), *others])
        this = next(iter(groups))
        compared = compare.readable(compare.contrasts(groups, this, data.split), this)  # type: ignore[arg-type]
    page.write(folder, title, data, {data.name: predictions}, {data.name: result}, network, beside=compared)
    console.print(f"wrote {files} to {folder}", soft_wrap=True)
    return written


def opened(
    ckpt: str | Path, data: ICUDataModule | None, model: type[ICUModule] | None, labelled: bool = True
) -> tuple[ICUModule, ICUDataModule]:
    """A checkpoint's model, and the data set up as it reads them.

    Args:
        ckpt: the checkpoint.
        data: hospital system; None: that of the checkpoint.
        model: class of the model, where it is none of ``ehrmodels``.
        labelled: False: outcomes are not needed.
    """
    network = load(ckpt, model)
    if data is None:
        kind, arguments = data_of(ckpt)
        data = getattr(module, kind)(**arguments)
    data.labelled = labelled
    data.serve(network)
    data.adopt(network.spec, network.facts.get("trained_on"))
    data.prepare_data()
    data.setup()
    return network, data


def data_of(ckpt: str | Path) -> tuple[str, dict[str, Any]]:
    """Class and arguments of the data that a checkpoint was trained on; nothing is imported for it.

    Raises:
        ValueError: it does not say, or names a class that is none of ``datamodules``.
    """
    data = read(ckpt)["ehr"].get("data")
    if not isinstance(data, dict) or not isinstance(data.get("arguments"), dict):
        raise ValueError(f"{ckpt} does not say which data it was trained on: give --data NAME --data.root FOLDER")
    kind = str(data.get("class"))
    if kind not in SYSTEMS:
        raise ValueError(
            f"{ckpt} was trained on {kind}, which is none of {', '.join(SYSTEMS)}: name the data with "
            "--data and --data.root"
        )
    return kind, {k: v for k, v in data["arguments"].items() if v is not None and k not in module.OF_MACHINE}


def resolved(device: Device) -> torch.device:
    """The device of ``--device``.

    Raises:
        ValueError: it is cuda and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out, or give cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def predict_split(
    model: ICUModule, data: ICUDataModule, split: Split, device: Device | torch.device = "auto"
) -> pl.DataFrame:
    """Score every sample of a split once; processes that have trained together share the work.

    Returns:
        ``stay_id, patient_id, minute, target, probability, split``, one row a sample, sorted by stay and minute; ``minute``
        is the prediction time since ICU admission; ``target`` is NaN where unknown.
    """
    chosen, data.split = data.split, split
    data.serve(model)
    data.setup()
    data.rank, data.world = distributed.rank_and_world() if is_distributed() else (0, 1)
    place = device if isinstance(device, torch.device) else resolved(device)
    model.to(place).eval()
    rows, probabilities = [np.zeros(0, np.int64)], [np.zeros(0)]  # a process may have no batch
    loader = data.predict_dataloader()
    with torch.inference_mode():
        for batch in track(
            loader,
            f"scoring {split}",
            console=Console(stderr=True),
            transient=True,
            disable=len(loader) < 50 or not sys.stderr.isatty() or console.quiet,
        ):
            row, probability = _predicted(model, type(batch)(*(t.to(place) for t in batch)))
            rows.append(row.cpu().numpy())
            probabilities.append(probability.cpu().numpy())
    data.split = chosen
    shares = distributed.all_gather((np.concatenate(rows), np.concatenate(probabilities)))
    every_row, every_probability = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    table = data.samples[every_row].with_columns(probability=every_probability)
    target = pl.col("target").cast(pl.Float64).fill_null(float("nan"))
    columns = ["stay_id", "patient_id", "minute", target, "probability", "split"]
    return table.select(columns).sort("stay_id", "minute")


def _predicted(model: ICUModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``predict_step`` says of a batch, by halves where memory runs out."""
    try:
        return model.predict_step(batch, 0)
    except (RuntimeError, MemoryError) as error:
        if not mistakes.out_of_memory(error) or len(batch.row) == 1:
            raise
    torch.cuda.empty_cache()
    halves = [_predicted(model, half) for half in divided(batch, 2)]
    return torch.cat([row for row, _ in halves]), torch.cat([probability for _, probability in halves])


def conclude(
    folder: Path,
    data: ICUDataModule,
    stopped: str,
    device: Device | torch.device,
    model: type[ICUModule],
    carried: float | None = None,
    recalibrate: str | None = None,
) -> Scored:
    """Score ``best.ckpt``: choose the threshold on val and write it into the checkpoint, then measure val and the data's split.

    Where it is recalibrated on val, too, what it was before comes first: its name is empty, and that of the other the method's.

    Args:
        folder: run directory.
        data: what it was trained on.
        stopped: why.
        device: where to compute.
        model: class of the model.
        carried: threshold of the source, where no patients of val were kept apart from training: then only the split is measured.
        recalibrate: method of ``ehrmodels.calibration``.
    """
    best = folder / "best.ckpt"
    network = load(best, model)
    network.calibration = None  # of a run that was killed here
    task, point = network.spec.task, network.operating_point
    tables: dict[str, pl.DataFrame] = {}
    if carried is None:
        tables["val"] = predict_split(network, data, "val", device)
    if data.split not in tables and len(data.rows(data.split)):
        tables[data.split] = predict_split(network, data, data.split, device)
    elif data.split not in tables:
        console.print(
            f"[yellow]no stay of these data is in split {data.split!r}: the validation split is shown instead[/]"
        )
    split = next(reversed(tables))
    scored: Scored = {}
    for name in ("", recalibrate) if recalibrate else ("",):
        about = {"operating_point": point + (" of the source" if carried is not None else ""), "stopped": stopped}
        if name:
            fitting = tables["val"].filter(pl.col("target").is_not_nan())
            network.calibration = fitted(
                name, fitting["probability"].to_numpy(), fitting["target"].to_numpy(), fitting["patient_id"].n_unique()
            )
            tables = {part: recalibrated(table, network.calibration) for part, table in tables.items()}
            about |= {"recalibrated": f"{name} on {network.calibration.patients:,} patients"}
        network.threshold = carried if carried is not None else metrics.choose_threshold(tables["val"], point, task)
        results = {
            part: {**metrics.score(table, network.threshold, task=task), "split": part, **about}
            for part, table in tables.items()
            if name or part == split or not recalibrate
        }
        scored[name] = tables[split], results[split]
    checkpoint = read(best)
    checkpoint["ehr"] |= {
        "threshold": network.threshold,
        "calibration": network.calibration and network.calibration.plain(),
    }
    save(checkpoint, best)
    distributed.all_gather(None)  # the others read the checkpoint again
    written = pl.concat(tables.values()).unique(["stay_id", "minute"], maintain_order=True)
    write_parquet(written, folder / "predictions.parquet")
    write_json(results, folder / "metrics.json")
    return scored


def kept_apart(folder: Path, split: str) -> pl.DataFrame | None:
    """Predictions of a run's validation split, on which thresholds are chosen; None where that is the split that is scored."""
    rows = pl.read_parquet(folder / "predictions.parquet").filter(split="val")
    return None if split == "val" or rows.is_empty() else rows


def recalibrated(predictions: pl.DataFrame, calibration: Calibration) -> pl.DataFrame:
    """Predictions with what a map makes of their probabilities."""
    probability = torch.from_numpy(predictions["probability"].to_numpy().copy())
    return predictions.with_columns(probability=calibration(probability).numpy())
