"""``ehr finetune``: a checkpoint on a second hospital system: scored as it is, fine-tuned, scored again."""

from pathlib import Path
from typing import Any, Literal

import polars as pl

from datamodules.module import EICU, ICUDataModule
from ehrmodels import ICUModule, load
from ehrmodels.checkpoint import read, spec_of
from experiments import distributed, figures, metrics, report, run_directory, tracking
from experiments.evaluate import conclude, opened, predict_split
from experiments.files import console, write_json, write_parquet
from experiments.fit import Recipe, check, fit, quiet, why_stopped

MONITOR, PATIENCE = "val_auroc_auprc", 5
Scored = dict[str, tuple[pl.DataFrame, dict[str, Any]]]  # name of a result -> predictions and scores


def finetune(
    ckpt: str,
    data: ICUDataModule | None = None,
    trainer: dict[str, Any] | None = None,
    out: str | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    epochs: int = 10,
    operating_point: str = "youden",
    checkpoint_minutes: float = 10.0,
    resume: bool = False,
    model: type[ICUModule] | None = None,
    wandb: Literal["offline", "online"] | None = None,
) -> dict[str, Any]:
    """Transfer a checkpoint: score it zero-shot on another hospital system, fine-tune it there, score it again.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        data: Second hospital system; default: EICU.
        trainer: Arguments of lightning.Trainer; its logger and callbacks join those of this command.
        out: Run directory; default: finetune-<data> beside the checkpoint.
        seed: Seed of dropout and order of batches.
        learning_rate: Peak learning rate; default: a fifth of the source's.
        epochs: Most epochs.
        operating_point: Where alerts begin after fine-tuning, chosen on the target's validation split: youden, sensitivity=0.9, npv=0.98,
            utility.
        checkpoint_minutes: Minutes between checkpoints within an epoch; one is written after each epoch in any case.
        resume: Continue a fine-tuning that was interrupted.
        model: Class of the checkpoint's model, where it is your own.
        wandb: Also log to Weights & Biases (aggregates only): offline or online.

    Returns:
        Name of each result -> its scores.
    """
    trainer = dict(trainer or {})
    if "max_epochs" in trainer:
        raise ValueError("fine-tuning trains for --epochs: leave --trainer.max_epochs out")
    target = data or EICU()
    folder = Path(out) if out else Path(ckpt).parent / f"finetune-{target.name}"
    recipe = Recipe(trainer, seed, MONITOR, PATIENCE, checkpoint_minutes)
    network = load(ckpt, model)
    with quiet(), distributed.distributed_run(trainer):
        return transfer(
            Path(ckpt), target, folder, recipe, learning_rate, epochs, operating_point, wandb, type(network), resume
        )


def transfer(
    ckpt: Path,
    target: ICUDataModule,
    folder: Path,
    recipe: Recipe,
    learning_rate: float | None,
    epochs: int,
    operating_point: str,
    wandb: Literal["offline", "online"] | None,
    model: type[ICUModule],
    resume: bool | None = False,
    beside: Scored | None = None,
) -> dict[str, Any]:
    """Zero-shot and fine-tuned scores of ``ckpt`` on ``target``'s held-out patients, in a run directory of its own.

    Args:
        ckpt: the source's checkpoint.
        target: second hospital system.
        folder: run directory.
        recipe: how to train; the monitor and the number of epochs are those of fine-tuning.
        learning_rate: peak; None: a fifth of the source's.
        epochs: most epochs.
        operating_point: of the fine-tuned model.
        wandb: log there, too.
        model: class of the checkpoint's model.
        resume: whether an unfinished run may be continued.
        beside: results that are shown beside these.
    """
    recipe = recipe._replace(trainer={**recipe.trainer, "max_epochs": epochs}, monitor=MONITOR, patience=PATIENCE)
    check(recipe)
    metrics.check_operating_point(operating_point, spec_of(read(ckpt), ckpt).task)
    tracking.check(wandb)
    if learning_rate is not None and not learning_rate >= 0:
        raise ValueError(f"the learning rate of fine-tuning must be at least 0, found {learning_rate}")
    config = run_directory.configuration(
        None, {"data": target}, recipe.trainer, ckpt=str(ckpt), out=str(folder), seed=recipe.seed, learning_rate=learning_rate,
        epochs=epochs, operating_point=operating_point, checkpoint_minutes=recipe.checkpoint_minutes, wandb=wandb,
    )  # fmt: skip
    del config["trainer"]["max_epochs"]  # which is --epochs here
    with run_directory.opened(folder, config, resume, "--out", finetune):
        network, target = opened(ckpt, target, model)
        check_validation(target)
        run_directory.record(folder, run_directory.data_facts(target))
        console.print(f"{target.name}: {len(target.rows(target.split)):,} {target.split} samples", soft_wrap=True)
        zero = predict_split(network, target, target.split)
        about = {"split": target.split, "operating_point": f"{network.operating_point} of the source"}
        scored = {
            **(beside or {}),
            f"{target.name} zero-shot": (
                zero,
                {**metrics.score(zero, network.threshold, task=network.spec.task), **about},
            ),
        }
        write_parquet(zero, folder / "zero_shot.parquet")
        write_json(scored[f"{target.name} zero-shot"][1], folder / "zero_shot.json")
        device: Any = "auto"
        if not (folder / "metrics.json").exists():
            network = load(ckpt, model)
            network.learning_rate = network.learning_rate / 5 if learning_rate is None else learning_rate
            network.operating_point = operating_point
            network.facts |= {"seed": recipe.seed, "source": str(ckpt), "code": run_directory.code()}
            tags = [target.name, type(network).__name__, "finetune"]
            logger = tracking.logger(wandb, folder, config, recipe.monitor, tags)
            device = fit(folder, network, target, recipe, logger).strategy.root_device
        stopped = why_stopped(folder, recipe.monitor, recipe.trainer)
        scored[f"{target.name} fine-tuned"] = conclude(folder, target, stopped, device, model)
        after, result = scored[f"{target.name} fine-tuned"]
        tracking.end(
            tracking.scores("zero-shot", scored[f"{target.name} zero-shot"][1]) | tracking.scores("fine-tuned", result)
        )
        results = {name: scores for name, (_, scores) in scored.items()}
        report.show(results, console)
        gap = metrics.difference(zero, after)
        write_json(gap, folder / "difference.json")
        text = ", ".join(
            f"{m.upper()} {g['value']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})"
            for m, g in gap.items()
            if g["low"] is not None
        )
        text = text or "cannot be told, since only one outcome occurs among them"
        console.print(f"fine-tuned less zero-shot, on the same patients: {text}", soft_wrap=True)
        title = f"{folder.parent.name} to {target.name}: {network.spec.task['name']}"
        figures.draw({name: table for name, (table, _) in scored.items()}, results, folder / "report.png", title)
        console.print(
            f"picture: {folder / 'report.png'}\nnext: ehr predict --ckpt {folder / 'best.ckpt'} --data.root FOLDER --out predictions.parquet",
            soft_wrap=True,
        )
        return results


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
