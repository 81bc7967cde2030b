"""``ehr train``: a model, trained and scored, and with ``--finetune`` transferred."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch

from datamodules import agreement
from datamodules.module import ICUDataModule
from ehrmodels import ICUModule, load
from ehrmodels.checkpoint import read, spec_of
from ehrmodels.trees import FittedAtOnce
from experiments import distributed, files, metrics, page, report, run_directory, tracking
from experiments.evaluate import conclude, kept_apart
from experiments.files import console
from experiments.finetune import DEFAULT, check_validation, transferred
from experiments.fit import Recipe, Trial, check, fit, quiet, why_stopped
from experiments.strategies import Transfer
from experiments.teacher import teacher as cross_fitted

Monitor = Literal["cv_auroc_auprc", "val_auroc_auprc", "val_auroc", "val_auprc", "val_loss"]
WandB = Literal["offline", "online"]


def train(
    model: ICUModule,
    data: ICUDataModule,
    trainer: dict[str, Any] | None = None,
    name: str | None = None,
    runs: str = "runs",
    seed: int = 0,
    monitor: Monitor | None = None,
    patience: int = 10,
    operating_point: str = "youden",
    resume: bool = False,
    init_from: str | None = None,
    teacher: str | None = None,
    finetune: ICUDataModule | None = None,
    finetune_learning_rate: float | None = None,
    finetune_epochs: int = 10,
    transfer: Transfer = DEFAULT,
    checkpoint_minutes: float = 10.0,
    wandb: WandB | None = None,
    trial: Trial | None = None,
) -> dict[str, Any]:
    """Train a model, score its best checkpoint on the test split, and, with ``--finetune EICU``, transfer it.

    Args:
        model: The model: Fusion, HyMaTE, a baseline such as LightGBM, TabM or GRUD, or a class of your own, such as mymodels.GRU;
            HyMaTEForecast trains HyMaTE's layers without outcomes, for --init_from.
        data: Hospital system: MIMICIV, EICU, PhysioNet2012, PhysioNet2019, MEDS, Tables, SyntheticMIMICIV or SyntheticEICU.
        trainer: Arguments of lightning.Trainer; its logger and callbacks join those of this command.
        name: Name of the run; default: that of the YAML file, or data and model, and the seed where it is not 0.
        runs: Folder that holds the run directories.
        seed: Seed of initial weights, dropout and order of batches. The split has its own, --data.seed.
        monitor: Validation metric that chooses the best checkpoint and stops training; default: val_auroc_auprc, the sum of both
            (val_loss for a model that predicts no outcome). cv_auroc_auprc is that of --model.folds, for trees.
        patience: Epochs without improvement until training stops.
        operating_point: Where alerts begin, chosen on the validation split: youden, or a target such as sensitivity=0.9 or npv=0.98. Of
            youden sensitivity + specificity is largest, of a target alerts are fewest; utility, that of the 2019 challenge, is for hourly
            sepsis.
        resume: Continue a run that was interrupted.
        init_from: Checkpoint whose weights, variables and scaler training starts from, such as one of HyMaTEForecast.
        teacher: lightgbm, or a run of LightGBM whose settings are used; trees, cross-fitted inside the training split, whose
            probabilities are nine tenths of what the network is trained towards.
        finetune: Second hospital system; scored zero-shot, then fine-tuned and scored again on the same held-out patients.
        finetune_learning_rate: Peak learning rate of fine-tuning; default: a fifth of the model's with finetune, else the model's.
        finetune_epochs: Most epochs of fine-tuning.
        transfer: How it is carried to the second hospital system.
        checkpoint_minutes: Minutes between checkpoints within an epoch; one is written after each epoch in any case.
        wandb: Also log to Weights & Biases (aggregates only): offline or online.
        trial: What a sweep adds.

    Returns:
        Name of each result -> its scores, as in ``metrics.json``.
    """
    trainer = dict(trainer or {})
    folder = Path(runs) / (name or f"{data.name}-{type(model).__name__}{f'-{seed}' if seed else ''}".lower())
    monitor = monitor or ("val_auroc_auprc" if model.supervised else "val_loss")
    recipe = Recipe(trainer, seed, monitor, patience, checkpoint_minutes)
    check(recipe)
    metrics.check_operating_point(operating_point, asdict(data.task))
    tracking.check(wandb)
    if name is not None and Path(name).name != name:
        raise ValueError(f"--name {name} must be the name of one folder; --runs says where it lies")
    if teacher is not None and (not model.supervised or isinstance(model, FittedAtOnce)):
        raise ValueError(
            f"--teacher is for networks that predict an outcome, and {type(model).__name__} is none: leave it out"
        )
    if not model.supervised and (monitor != "val_loss" or finetune is not None):
        raise ValueError(f"{type(model).__name__} predicts no outcome: set --monitor val_loss, leave out --finetune")
    model.operating_point = operating_point
    if finetune is not None:
        agreement.foresee(finetune, data.options())  # type: ignore[arg-type,attr-defined]
    config = run_directory.configuration(
        model, {"data": data, "finetune": finetune}, trainer, name=folder.name, runs=runs, seed=seed, monitor=monitor,
        patience=patience, operating_point=operating_point, init_from=init_from, teacher=teacher, checkpoint_minutes=checkpoint_minutes,
        finetune_learning_rate=finetune_learning_rate, finetune_epochs=finetune_epochs, transfer=transfer, wandb=wandb,
    )  # fmt: skip
    with quiet(), distributed.distributed_run(trainer):
        with run_directory.opened(folder, config, resume, "--name", train):
            if finetune is not None:
                transfer.runs(type(model))  # refuses what it cannot do
                finetune.files()  # type: ignore[attr-defined]  # say at once, not after training, that they are not there
            results = _train(folder, model, data, recipe, config, init_from, teacher, wandb, trial)
            if results is None:
                return {}
            predictions, result = results
            if finetune is None and trial is None:
                report.show({data.name: result}, console)
                console.print(
                    f"report: {folder / 'report.html'}\nnext: ehr evaluate --ckpt {folder / 'best.ckpt'} --data NAME --data.root FOLDER",
                    soft_wrap=True,
                )
        if finetune is None:
            return {data.name: result}
        source = {f"{data.name} (source)": (predictions, result)}
        return transferred(
            folder / "best.ckpt", finetune, folder / f"{transfer}-{finetune.name}", recipe, transfer, data, finetune_learning_rate,
            finetune_epochs, operating_point, wandb, type(model), resume=None, beside=source,
        )  # fmt: skip


def _train(
    folder: Path,
    model: ICUModule,
    data: ICUDataModule,
    recipe: Recipe,
    config: dict[str, Any],
    init_from: str | None,
    teacher: str | None,
    wandb: WandB | None,
    trial: Trial | None,
) -> tuple[pl.DataFrame, dict[str, Any]] | None:
    """Train in an opened run directory and score the split of the data; None for a model that predicts no outcome."""
    torch.manual_seed(recipe.seed)
    data.labelled = model.supervised
    data.serve(model)
    if init_from is not None:
        checkpoint = read(init_from)
        data.adopt(spec_of(checkpoint, init_from), checkpoint["ehr"]["trained_on"], own_task=True)
    data.prepare_data()
    data.setup()
    target = data.targets("train")
    assert data.spec is not None
    model.initialise(data.spec, data.positive_weight() if model.supervised else 1.0)
    if init_from is not None:
        model.begin_with(Path(init_from))
    if recipe.monitor != "val_loss":
        check_validation(data)
    model.facts |= {"seed": recipe.seed, "code": run_directory.code()}
    run_directory.record(folder, run_directory.data_facts(data))
    positive = f", {int(target.sum()):,} positive" if model.supervised else ""
    console.print(
        f"{folder}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(data.spec.variables)} variables; "
        f"{len(target):,} training samples{positive}",
        soft_wrap=True,
    )
    device: Any = "auto"
    if not (folder / "metrics.json").exists():
        if teacher is not None:
            data.teacher = cross_fitted(teacher, data)
        logger = tracking.logger(wandb, folder, config, recipe.monitor, [data.name, type(model).__name__], trial)
        device = fit(folder, model, data, recipe, logger, trial and trial.report).strategy.root_device
    stopped = why_stopped(folder, recipe.monitor, recipe.trainer)
    if not model.supervised:
        files.write_json({"val_loss": pl.read_csv(folder / "metrics.csv")["val_loss"].min()}, folder / "metrics.json")
        console.print(f"{stopped}\nnext: ehr train -c FILE --init_from {folder / 'best.ckpt'}", soft_wrap=True)
        return None
    predictions, result = conclude(folder, data, stopped, device, type(model))[""]
    tracking.end(tracking.scores(result["split"], result))
    if trial is None:
        title = f"{folder.name}: {data.spec.task['name']}"
        kept = load(folder / "best.ckpt", type(model))
        thresholds = kept_apart(folder, result["split"])
        page.write(folder, title, data, {data.name: predictions}, {data.name: result}, kept, thresholds)
    return predictions, result
