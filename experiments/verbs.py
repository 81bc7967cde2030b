"""What ``ehr`` does: one plain typed function a verb; its docstring is its ``--help``."""

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch

from datamodules.contract import Spec
from datamodules.module import EICU, ICUDataModule
from ehrmodels.base import ICUModule, load, read_checkpoint
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE, HyMaTEForecast
from experiments import distributed, files, report, run, tracking
from experiments.files import console
from experiments.run import MONITORS

__all__ = ["Fusion", "HyMaTE", "HyMaTEForecast", "evaluate", "finetune", "predict", "train"]
Monitor = Literal["val_auroc_auprc", "val_auroc", "val_auprc", "val_loss"]


def train(
    model: ICUModule,
    data: ICUDataModule,
    trainer: dict[str, Any],
    config: str,
    name: str | None = None,
    runs: str = "runs",
    seed: int = 0,
    monitor: Monitor = "val_auroc_auprc",
    patience: int = 10,
    resume: bool = False,
    init_from: str | None = None,
    finetune: ICUDataModule | None = None,
    finetune_learning_rate: float | None = None,
    finetune_epochs: int = 10,
    checkpoint_minutes: float = 10.0,
    wandb: Literal["offline", "online"] | None = None,
    trial: run.Trial | None = None,
) -> None:
    """Train a model, score its best checkpoint on the test split, and, with ``--finetune EICU``, transfer it.

    Args:
        model: The network: Fusion or HyMaTE; HyMaTEForecast trains HyMaTE's layers without outcomes, for --init_from.
        data: Hospital system: MIMICIV, EICU, PhysioNet2012, PhysioNet2019, Tables, SyntheticMIMICIV or SyntheticEICU.
        trainer: Arguments of lightning.Trainer.
        config: The whole configuration as YAML, kept in the run directory.
        name: Name of the run; default: data, model and seed.
        runs: Folder that holds the run directories.
        seed: Seed of initial weights, dropout and order of batches. The split has its own, --data.seed.
        monitor: Validation metric that chooses the best checkpoint and stops training; val_auroc_auprc is their sum.
        patience: Epochs without improvement after which training stops.
        resume: Continue a run that was interrupted.
        init_from: Checkpoint whose weights, variables and scaler training starts from, such as one of HyMaTEForecast.
        finetune: Second hospital system: scored zero-shot, then fine-tuned and scored again on the same held-out patients.
        finetune_learning_rate: Peak learning rate of fine-tuning; default: a fifth of the model's.
        finetune_epochs: Most epochs of fine-tuning.
        checkpoint_minutes: Minutes between checkpoints within an epoch; one is written after each epoch in any case.
        wandb: Also log to Weights & Biases (aggregates only): offline or online.
        trial: What a sweep adds.
    """
    folder = Path(runs) / (name or f"{data.name}-{type(model).__name__}-{seed}".lower())
    recipe = run.Recipe(trainer, seed, monitor, patience, checkpoint_minutes)
    tracking.check(wandb)
    with distributed.joined(trainer), run.opened(folder, config, resume, "--name"):
        if not model.supervised and (monitor != "val_loss" or finetune is not None):
            raise ValueError(
                f"{type(model).__name__} predicts no outcome: set --monitor val_loss, leave out --finetune"
            )
        if finetune is not None:
            finetune.files()  # say at once, not after training, that the second system is not there
        torch.manual_seed(seed)
        data.view, data.labelled = model.view, model.supervised
        data.prepare_data()
        if init_from is not None:
            _adopt_variables(data, Path(init_from))
        data.setup()
        target = data.targets("train")
        assert data.spec is not None
        model.start(data.spec, _pos_weight(target) if model.supervised else 1.0)
        if init_from is not None:
            model.begin_with(Path(init_from))
        if monitor != "val_loss":
            _check_validation(data)
        model.facts = {
            "data": _description(data),
            "split_hash": data.split_hash(),
            "seed": seed,
        }
        positive = f", {int(target.sum()):,} positive" if model.supervised else ""
        console.print(
            f"{folder}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(data.spec.variables)} variables; "
            f"{len(target):,} training samples{positive}",
            soft_wrap=True,
        )
        if not (folder / "metrics.json").exists():
            logger = tracking.logger(wandb, folder, config, monitor, [data.name, type(model).__name__], trial)
            run.fit(folder, model, data, recipe, logger, trial and trial.report)
        if not model.supervised:
            loss = pl.read_csv(folder / "metrics.csv")["val_loss"].min()
            files.write_json({"val_loss": loss}, folder / "metrics.json")
            tracking.end({"val_loss": loss})
            console.print(f"next: ehr train -c FILE --init_from {folder / 'best.ckpt'}", soft_wrap=True)
            return
        predictions, result = run.conclude(folder, data)
        if wandb is not None:
            tracking.end(tracking.scores(data.split, result))
        if finetune is None:
            report.show({data.name: result}, console)
            report.draw({data.name: predictions}, folder / "report.png")
            console.print(
                f"picture: {folder / 'report.png'}\nnext: ehr evaluate --ckpt {folder / 'best.ckpt'} --data NAME --data.root FOLDER",
                soft_wrap=True,
            )
        else:
            start = {f"{data.name} (source)": (predictions, result)}
            place = folder / f"finetune-{finetune.name}"
            _transfer(
                folder / "best.ckpt",
                finetune,
                place,
                recipe,
                finetune_learning_rate,
                finetune_epochs,
                wandb,
                config,
                start,
            )


def evaluate(ckpt: str, out: str, data: ICUDataModule | None = None) -> None:
    """Score a checkpoint on a split of any hospital system.

    Nothing is fitted: scaler, variables and threshold are those of the checkpoint. Writes ``metrics.json`` (``auroc``, ``auprc``,
    ... each with ``value``, ``low``, ``high``; ``n``, ``n_positive``) and ``predictions.parquet`` (``stay_id, patient_id, minute,
    target, probability, split``) and ``report.png``.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        out: Folder for the results.
        data: Hospital system; default: the one that the checkpoint was trained on. --data.split chooses train, val, test or all.
    """
    assert data is not None  # the parser fills it in from the checkpoint
    folder = Path(out)
    if (folder / "last.ckpt").exists():
        raise ValueError(f"{folder} holds a training run, whose results would be lost; choose another --out")
    model = load(Path(ckpt))
    data.adopt(model.spec)
    predictions = run.predict(model, data, data.split)
    result = report.score(predictions, model.facts.get("threshold", 0.5))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_parquet(predictions, folder / "predictions.parquet")
    files.write_json(
        {**result, "data": data.name, "split": data.split, "checkpoint": str(ckpt)}, folder / "metrics.json"
    )
    name = f"{data.name} {data.split}"
    report.show({name: result}, console)
    report.draw({name: predictions}, folder / "report.png")
    console.print(f"wrote metrics.json, predictions.parquet and report.png to {folder}", soft_wrap=True)


def finetune(
    ckpt: str,
    trainer: dict[str, Any],
    config: str,
    data: ICUDataModule | None = None,
    out: str | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    epochs: int = 10,
    checkpoint_minutes: float = 10.0,
    resume: bool = False,
    wandb: Literal["offline", "online"] | None = None,
) -> None:
    """Transfer a checkpoint: score it zero-shot on another hospital system, fine-tune it there, score it again.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        trainer: Arguments of lightning.Trainer.
        config: The whole configuration as YAML, kept in the run directory.
        data: Second hospital system; default: EICU.
        out: Run directory; default: finetune-<data> beside the checkpoint.
        seed: Seed of dropout and order of batches.
        learning_rate: Peak learning rate; default: a fifth of the source's.
        epochs: Most epochs.
        checkpoint_minutes: Minutes between checkpoints within an epoch; one is written after each epoch in any case.
        resume: Continue a fine-tuning that was interrupted.
        wandb: Also log to Weights & Biases (aggregates only): offline or online.
    """
    data = data or EICU()
    folder = Path(out) if out else Path(ckpt).parent / f"finetune-{data.name}"
    load(Path(ckpt))
    tracking.check(wandb)
    with distributed.joined(trainer), run.opened(folder, config, resume, "--out"):
        recipe = run.Recipe(trainer, seed, "val_auroc_auprc", 5, checkpoint_minutes)
        _transfer(Path(ckpt), data, folder, recipe, learning_rate, epochs, wandb, config, {})


def predict(ckpt: str, out: str, data: ICUDataModule | None = None) -> None:
    """Write a probability per stay (per hour for hourly tasks) to a parquet file; needs no outcomes.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        out: Parquet file: stay_id, patient_id, minute (prediction time since ICU admission), probability, alert.
        data: Hospital system; default: the one that the checkpoint was trained on. All stays are scored, or those of --data.split.
    """
    assert data is not None
    model = load(Path(ckpt))
    data.labelled = False
    data.adopt(model.spec)
    table = run.predict(model, data, data.split)
    table = table.select(
        "stay_id",
        "patient_id",
        "minute",
        "probability",
        alert=pl.col("probability") >= model.facts.get("threshold", 0.5),
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_parquet(table, path)
    console.print(
        f"wrote {len(table):,} predictions of {table['stay_id'].n_unique():,} stays, {table['alert'].sum():,} alerts, to {path}",
        soft_wrap=True,
    )


def _transfer(
    ckpt: Path,
    target: ICUDataModule,
    folder: Path,
    recipe: run.Recipe,
    learning_rate: float | None,
    epochs: int,
    wandb: Literal["offline", "online"] | None,
    config: str,
    rows: dict[str, tuple[pl.DataFrame, dict[str, Any]]],
) -> None:
    """Zero-shot and fine-tuned scores of ``ckpt`` on ``target``'s held-out patients, beside the ``rows`` that are there already."""
    model = load(ckpt)
    threshold = model.facts.get("threshold", 0.5)
    target.view = model.view
    target.adopt(model.spec)
    target.prepare_data()
    target.setup()
    folder.mkdir(parents=True, exist_ok=True)
    _check_validation(target)
    missing = [v for v in model.spec.variables if not target.has(v)]
    console.print(
        f"{target.name}: {len(target.rows(target.split)):,} {target.split} samples; variables never charted there: {', '.join(missing) or 'none'}",
        soft_wrap=True,
    )
    zero = run.predict(model, target, target.split)
    rows[f"{target.name} zero-shot"] = (zero, report.score(zero, threshold))
    files.write_parquet(zero, folder / "zero_shot.parquet")
    files.write_json(rows[f"{target.name} zero-shot"][1], folder / "zero_shot.json")
    if not (folder / "metrics.json").exists():
        model = load(ckpt)
        model.learning_rate = learning_rate or model.learning_rate / 5
        model.facts = {
            "data": _description(target),
            "split_hash": target.split_hash(),
            "seed": recipe.seed,
            "source": str(ckpt),
        }
        recipe = recipe._replace(
            trainer={**recipe.trainer, "max_epochs": epochs}, monitor="val_auroc_auprc", patience=5
        )
        run.fit(
            folder,
            model,
            target,
            recipe,
            tracking.logger(wandb, folder, config, recipe.monitor, [target.name, type(model).__name__, "finetune"]),
        )
    rows[f"{target.name} fine-tuned"] = run.conclude(folder, target)
    if wandb is not None:
        tracking.end(
            {
                k: v
                for stage in ("zero-shot", "fine-tuned")
                for k, v in tracking.scores(stage, rows[f"{target.name} {stage}"][1]).items()
            }
        )
    report.show({name: result for name, (_, result) in rows.items()}, console)
    gap = report.difference(zero, rows[f"{target.name} fine-tuned"][0])
    files.write_json(gap, folder / "difference.json")
    said = ", ".join(
        f"{m.upper()} {g['value']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})"
        for m, g in gap.items()
        if g["low"] is not None
    )
    console.print(f"fine-tuned less zero-shot, on the same patients: {said}", soft_wrap=True)
    report.draw({name: table for name, (table, _) in rows.items()}, folder / "report.png")
    console.print(
        f"picture: {folder / 'report.png'}\nnext: ehr predict --ckpt {folder / 'best.ckpt'} --data.root FOLDER --out predictions.parquet",
        soft_wrap=True,
    )


def _adopt_variables(data: ICUDataModule, ckpt: Path) -> None:
    """Let ``data`` use variables and scaler of a checkpoint, for its own task.

    Raises:
        ValueError: the samples of ``data`` do not look like those of the checkpoint, or its validation patients were trained on.
    """
    facts = read_checkpoint(ckpt)["ehr"]
    spec, source = Spec(**facts["spec"]), facts.get("data", {})
    arguments = source.get("arguments", {})
    pairs = {
        "hours of a window": (spec.window, data.task.window_hours),
        "static features": (spec.statics, data.static_names()),
        "treatment": (arguments.get("treatment", True), data.treatment),
    }
    if (
        source.get("class") == type(data).__name__
    ):  # patients of one hospital system: those held out here must have been held out there
        pairs |= {f"--data.{n}": (arguments.get(n, getattr(data, n)), getattr(data, n)) for n in ("seed", "split_by")}
    for name, (theirs, mine) in pairs.items():
        if mine != theirs:
            raise ValueError(
                f"--init_from {ckpt} was trained with {name} {theirs}, these data have {mine}: give both the same"
            )
    task = data.task
    data.adopt(spec)
    data.task, data.spec = task, spec._replace(task=asdict(task))


def _pos_weight(target: Any) -> float:
    positive = float(target.sum())
    if not 0 < positive < len(target):
        raise ValueError(
            f"the training split has {int(positive)} positives among {len(target)} samples: both outcomes are needed to train"
        )
    return (len(target) - positive) / positive


def _description(data: ICUDataModule) -> dict[str, Any]:
    """Class and arguments as plain types, which a checkpoint may hold."""
    arguments = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in data.hparams.items()}
    return {"class": type(data).__name__, "arguments": arguments}


def _check_validation(data: ICUDataModule) -> None:
    target = data.targets("val")
    if not 0 < target.sum() < len(target):
        raise ValueError(
            f"the validation split of {data.root} has {int(target.sum())} positives among {len(target)} samples: both outcomes are needed to "
            "choose the best epoch and the threshold; give more stays or another --data.seed"
        )


assert set(MONITORS) == set(Monitor.__args__)  # type: ignore[attr-defined]
