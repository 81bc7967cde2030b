"""``ehr finetune``: a checkpoint on a second hospital system: scored as it is, fine-tuned, scored again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import polars as pl

from datamodules import agreement, module
from datamodules.module import EICU, ICUDataModule
from ehrmodels import ICUModule, load
from ehrmodels.checkpoint import read, spec_of
from experiments import distributed, metrics, page, report, run_directory, tracking
from experiments.evaluate import Scored, conclude, data_of, kept_apart, opened, predict_split
from experiments.few import best_epochs
from experiments.files import console, save, write_json, write_parquet
from experiments.fit import Recipe, Trial, check, fit, quiet, why_stopped
from experiments.resume import Report
from experiments.strategies import WITH_SOURCE, Transfer

DEFAULT = Transfer()
NO_GAIN = "no number of them clearly lessens the loss of those left out in a cross-validation"
MONITOR, PATIENCE = "val_auroc_auprc", 5


def finetune(
    ckpt: str,
    data: ICUDataModule | None = None,
    trainer: dict[str, Any] | None = None,
    out: str | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    epochs: int = 10,
    transfer: Transfer = DEFAULT,
    source: ICUDataModule | None = None,
    operating_point: str | None = None,
    checkpoint_minutes: float = 10.0,
    resume: bool = False,
    model: type[ICUModule] | None = None,
    wandb: Literal["offline", "online"] | None = None,
    trial: Trial | None = None,
) -> dict[str, Any]:
    """Transfer a checkpoint: score it zero-shot on another hospital system, fine-tune it there, score it again.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        data: Second hospital system; default: EICU.
        trainer: Arguments of lightning.Trainer; its logger and callbacks join those of this command.
        out: Run directory; default: <strategy>-<data> beside the checkpoint.
        seed: Seed of dropout and order of batches.
        learning_rate: Peak learning rate; default: a fifth of the source's with finetune, else the source's.
        epochs: Most epochs.
        transfer: How.
        source: First hospital system, for strategies that train on both; default: the one that the checkpoint was trained on.
        operating_point: Where alerts begin after fine-tuning, chosen on the target's validation split: youden, sensitivity=0.9, npv=0.98,
            utility; default: as the checkpoint's was. Where patients are too few to set some aside, its threshold is kept.
        checkpoint_minutes: Minutes between checkpoints within an epoch; one is written after each epoch in any case.
        resume: Continue a fine-tuning that was interrupted.
        model: Class of the checkpoint's model, where it is your own.
        wandb: Also log to Weights & Biases (aggregates only): offline or online.
        trial: What a queue adds.

    Returns:
        Name of each result -> its scores; of several strategies, sizes or draws, name of each run -> its scores.
    """
    trainer = dict(trainer or {})
    if "max_epochs" in trainer:
        raise ValueError("fine-tuning trains for --epochs: leave --trainer.max_epochs out")
    target = data or EICU()
    folder = Path(out) if out else Path(ckpt).parent / f"{transfer}-{target.name}"
    recipe = Recipe(trainer, seed, MONITOR, PATIENCE, checkpoint_minutes)
    network = load(ckpt, model)
    with quiet(), distributed.distributed_run(trainer):
        return transferred(
            Path(ckpt), target, folder, recipe, transfer, source, learning_rate, epochs, operating_point, wandb, type(network),
            resume, trial=trial,
        )  # fmt: skip


def transferred(
    ckpt: Path,
    target: ICUDataModule,
    folder: Path,
    recipe: Recipe,
    transfer: Transfer,
    source: ICUDataModule | None,
    learning_rate: float | None,
    epochs: int,
    operating_point: str | None,
    wandb: Literal["offline", "online"] | None,
    model: type[ICUModule],
    resume: bool | None = False,
    beside: Scored | None = None,
    trial: Trial | None = None,
) -> dict[str, Any]:
    """Zero-shot and fine-tuned scores of ``ckpt`` on ``target``'s held-out patients, in a run directory of its own.

    Args:
        ckpt: the source's checkpoint.
        target: second hospital system.
        folder: run directory.
        recipe: how to train; the monitor and the number of epochs are those of fine-tuning.
        transfer: the strategy.
        source: first hospital system; None: that of the checkpoint.
        learning_rate: peak; None: that of the strategy.
        epochs: most epochs.
        operating_point: of the fine-tuned model; None: that of the checkpoint.
        wandb: log there, too.
        model: class of the checkpoint's model.
        resume: whether an unfinished run may be continued.
        beside: results that are shown beside these.
        trial: what a queue adds.
    """
    recipe = recipe._replace(trainer={**recipe.trainer, "max_epochs": epochs}, monitor=MONITOR, patience=PATIENCE)
    check(recipe)
    runs = transfer.runs(model)
    if (transfer.sizes != "all" or transfer.recalibrate) and target.split != "test":
        raise ValueError(
            f"--transfer.{'sizes' if transfer.sizes != 'all' else 'recalibrate'} uses the patients of training and validation: score "
            f"the others, --data.split test, not {target.split}"
        )
    joint = any(run.strategy in WITH_SOURCE for run in runs)
    if joint and source is None:
        kind, arguments = data_of(ckpt)
        source = getattr(module, kind)(**arguments)
    spec = spec_of(read(ckpt), ckpt)
    if operating_point is not None:
        metrics.check_operating_point(operating_point, spec.task)
    tracking.check(wandb)
    if learning_rate is not None and not learning_rate >= 0:
        raise ValueError(f"the learning rate of fine-tuning must be at least 0, found {learning_rate}")
    agreement.foresee(target, agreement.options_of(spec))  # type: ignore[arg-type]
    config = run_directory.configuration(
        None, {"data": target, "source": source if joint else None}, recipe.trainer, transfer=transfer, ckpt=str(ckpt), out=str(folder),
        seed=recipe.seed, learning_rate=learning_rate, epochs=epochs, operating_point=operating_point,
        checkpoint_minutes=recipe.checkpoint_minutes, wandb=wandb,
    )  # fmt: skip
    del config["trainer"]["max_epochs"]  # which is --epochs here
    if len(runs) > 1:
        from experiments.curve import curve  # whose queue calls ``finetune``

        return curve(ckpt, target, folder, runs, transfer.workers, config, model)
    (transfer,) = runs
    with run_directory.opened(folder, config, resume, "--out", finetune):
        network, target = opened(ckpt, target, model)
        source_threshold, source_point = network.threshold, network.operating_point
        trained, carried = transfer.strategy != "zero_shot", None
        apart = transfer.patients is None and trained
        if transfer.patients is not None or (transfer.recalibrate and not trained):
            apart = target.limit(transfer.patients, int(transfer.draw), together=not trained)
        if trained and apart:
            check_validation(target)
        elif trained:
            carried = source_threshold
            if transfer.recalibrate:
                raise ValueError(
                    f"{transfer.patients:,} patients are too few to train on some and recalibrate on others: give more, or "
                    f"--transfer.strategy zero_shot --transfer.recalibrate {transfer.recalibrate}"
                )
        run_directory.record(folder, run_directory.data_facts(target))
        console.print(f"{target.name}: {len(target.rows(target.split)):,} {target.split} samples", soft_wrap=True)
        zero = predict_split(network, target, target.split)
        zero_name = f"{target.name} zero-shot"
        about = {"split": target.split, "operating_point": f"{source_point} of the source"}
        scored = {**(beside or {}), zero_name: (zero, {**_score(network, zero, source_threshold), **about})}
        write_parquet(zero, folder / "zero_shot.parquet")
        write_json(scored[zero_name][1], folder / "zero_shot.json")
        if not transfer.trains:
            results = {name: scores for name, (_, scores) in scored.items()}
            write_parquet(zero, folder / "predictions.parquet")
            write_json({target.split: results[zero_name]}, folder / "metrics.json")
            report.show(results, console)
            return results
        facts = {"seed": recipe.seed, "source": str(ckpt), "code": run_directory.code()}

        def made() -> ICUModule:
            ready = transfer.prepared(ckpt, model, target, source, recipe.seed)
            if learning_rate is not None:
                ready.learning_rate = learning_rate
            ready.operating_point = operating_point or source_point
            ready.facts |= facts
            return ready

        device: Any = "auto"
        if not trained:
            stopped = "nothing was trained"
            _keep(ckpt, folder, target, facts, operating_point or source_point)
        else:
            told = trial and trial.report
            if not apart:
                recipe = _for_few(folder, made, target, recipe, transfer, told)
            if recipe.last == 0:
                stopped = "no epoch was trained: the source's weights are kept"
                _keep(ckpt, folder, target, facts, operating_point or source_point)
            else:
                network = made()
                if not (folder / "metrics.json").exists():
                    tags = [target.name, type(network).__name__, transfer.strategy]
                    logger = tracking.logger(wandb, folder, config, recipe.monitor, tags)
                    device = fit(folder, network, target, recipe, logger, told).strategy.root_device
                stopped = why_stopped(folder, recipe.monitor, recipe.trainer)
        label = {"finetune": "fine-tuned", "zero_shot": "recalibrated"}.get(transfer.strategy, transfer.strategy)
        label = label.replace("_", " ")
        done = conclude(folder, target, stopped, device, model, carried, transfer.recalibrate)
        name = f"{target.name} {label}"
        if trained:
            scored[name] = done[""]
        if transfer.recalibrate:
            name = f"{name}, {transfer.recalibrate}"
            scored[name] = done[transfer.recalibrate]
            write_json(done[""][1], folder / "uncalibrated.json")
        after, result = scored[name]
        results = {name: scores for name, (_, scores) in scored.items()}
        if carried is None:  # else the threshold is that of the source in any case
            results[f"{name}, source's threshold"] = {**_score(network, after, source_threshold), **about}
            write_json(results[f"{name}, source's threshold"], folder / "carried.json")
        tracking.end(tracking.scores("zero-shot", scored[zero_name][1]) | tracking.scores(label, result))
        report.show(results, console)
        gap = metrics.difference(zero, after)
        write_json(gap, folder / "difference.json")
        console.print(f"{label} less zero-shot, on the same patients: {_in_words(gap)}", soft_wrap=True)
        if trial is None:
            title = f"{folder.parent.name} to {target.name}: {network.spec.task['name']}"
            tables = {name: table for name, (table, _) in scored.items()}
            kept, thresholds = load(folder / "best.ckpt", model), kept_apart(folder, target.split)
            page.write(folder, title, target, tables, results, kept, thresholds)
            console.print(
                f"report: {folder / 'report.html'}\nnext: ehr predict --ckpt {folder / 'best.ckpt'} --data.root FOLDER --out predictions.parquet",
                soft_wrap=True,
            )
        return results


def _score(network: ICUModule, predictions: pl.DataFrame, threshold: float | None) -> dict[str, Any]:
    return metrics.score(predictions, threshold, task=network.spec.task)


def _in_words(gap: dict[str, dict[str, float | None]]) -> str:
    told = [
        f"{m.upper()} {g['value']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})"
        for m, g in gap.items()
        if g["low"] is not None
    ]
    return ", ".join(told) or "cannot be told, since only one outcome occurs among them"


def _for_few(
    folder: Path,
    made: Callable[[], ICUModule],
    target: ICUDataModule,
    recipe: Recipe,
    transfer: Transfer,
    report: Report | None,
) -> Recipe:
    """Without patients that are set aside for a choice: as many epochs as cross-validation says or, with the source's patients
    beside them, all."""
    recipe = recipe._replace(monitor=None)
    few = f"{transfer.patients:,} patients are too few to set some aside: the source's threshold is kept, and"
    most = recipe.trainer["max_epochs"]
    if transfer.strategy in WITH_SOURCE:
        epochs, why = most, "the source's are beside them"
    elif transfer.strategy != "target_only" and not 0 < target.targets("train").sum() < len(target.rows("train")):
        epochs, why = 0, "only one outcome occurs among them"
    else:
        epochs = best_epochs(folder, made, target, recipe, report)
        why = "then the loss of those left out in a cross-validation is least" if epochs else NO_GAIN
        if transfer.strategy == "target_only" and not epochs:
            epochs = 1
    console.print(f"[yellow]{few} {epochs} of {most} epochs are trained: {why}[/]", soft_wrap=True)
    return recipe._replace(last=epochs)


def _keep(ckpt: Path, folder: Path, target: ICUDataModule, facts: dict[str, Any], operating_point: str) -> None:
    """The source's weights as what came of a run on the target."""
    checkpoint = read(ckpt)
    checkpoint["ehr"] |= {**target.facts(), **facts, "operating_point": operating_point, "calibration": None}
    save(checkpoint, folder / "best.ckpt")


def check_validation(data: ICUDataModule) -> None:
    """Refuse a validation split that has one outcome only.

    Raises:
        ValueError: says how many of each there are.
    """
    target = data.targets("val")
    if not 0 < target.sum() < len(target):
        raise ValueError(
            f"the validation split of {data.root} has {int(target.sum())} positives among {len(target)} samples: both outcomes are needed to "
            "choose the best epoch and the threshold; give more stays or another --data.seed"
        )
