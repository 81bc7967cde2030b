"""A training run: its directory, its callbacks, and what is measured at its end."""

import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import polars as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins import TorchCheckpointIO
from rich.console import Console
from rich.progress import track

from datamodules.module import ICUDataModule, Split
from ehrmodels.base import ICUModule, load, read_checkpoint
from experiments.files import console, save, write_json, write_parquet, write_text
from experiments.report import choose_threshold, score

MONITORS = {"val_auroc_auprc": "max", "val_auroc": "max", "val_auprc": "max", "val_loss": "min"}


class Trial(NamedTuple):
    """What a training run is told when it is a trial of a sweep.

    ``report`` is called with (epoch, metrics) after every epoch; what it raises ends the training.
    """

    study: str
    number: int
    params: dict[str, Any]
    report: Callable[[int, dict[str, float]], None]


@contextmanager
def opened(folder: Path, config: str, resume: bool, option: str) -> Iterator[None]:
    """Make the run directory, or take up the one that is there; one in which nothing came to be trained is removed again.

    Args:
        folder: the run directory.
        config: the whole configuration as YAML.
        resume: whether an unfinished run may be continued.
        option: the flag that names another directory, for messages.

    Raises:
        ValueError: the directory holds another run, or an unfinished one and ``resume`` is not set.
    """
    written, environment = folder / "config.yaml", folder / "environment.txt"
    if written.exists():
        if written.read_text() != config:
            raise ValueError(f"{folder} holds a run with another configuration ({written}); choose another {option}, or delete the folder")
        if not resume and not (folder / "metrics.json").exists():
            raise ValueError(
                f"{folder} holds an unfinished run of this configuration; add --resume to continue it, or choose another {option}"
            )
    elif _trained(folder):
        raise ValueError(
            f"{folder} holds a run without config.yaml, which another command wrote; choose another {option}, or delete the folder"
        )
    else:
        if resume:
            console.print(f"nothing to resume in {folder}: starting anew", soft_wrap=True)
        folder.mkdir(parents=True, exist_ok=True)
        packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions())
        write_text(environment, "\n".join([f"python=={platform.python_version()}", f"platform: {platform.platform()}", *packages]) + "\n")
        write_text(written, config)
    try:
        yield
    except Exception:
        if not _trained(folder):
            for path in (written, environment, folder / "metrics.csv"):
                path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def _trained(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("best.ckpt", "last.ckpt", "metrics.json"))


def fit(
    folder: Path,
    model: ICUModule,
    data: ICUDataModule,
    trainer: dict[str, Any],
    seed: int,
    monitor: str,
    patience: int,
    logger: Any,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train ``model`` on ``data``, continuing from ``last.ckpt`` where there is one; leaves ``best.ckpt`` and ``metrics.csv``.

    The random numbers of an epoch depend on ``seed`` and the epoch alone and a checkpoint is written after every epoch, so a
    run that was killed and continued ends at the same weights as an unbroken one.
    """
    if str(trainer.get("devices", 1)) != "1" or trainer.get("num_nodes", 1) != 1:
        raise ValueError(f"--trainer.devices {trainer.get('devices')}: training on several devices is not supported yet; expected 1")
    data.order_seed = seed
    model.train()  # ``load`` gives it in evaluation mode, in which fine-tuning would go without dropout
    best = ModelCheckpoint(folder, "best", monitor=monitor, mode=MONITORS[monitor], enable_version_counter=False)
    newest = ModelCheckpoint(folder, "last", enable_version_counter=False)
    stop = EarlyStopping(monitor, mode=MONITORS[monitor], patience=patience)
    callbacks: list[Callback] = [_Epochs(folder / "metrics.csv", seed, report), stop, best, newest]
    if sys.stderr.isatty() or sys.stdout.isatty():
        callbacks.append(RichProgressBar(leave=False))
    precision = trainer.get("precision") or (
        "bf16-mixed" if torch.cuda.is_available() and trainer.get("accelerator") != "cpu" else "32-true"
    )
    arguments = {**trainer, "precision": precision, "logger": logger or False, "callbacks": callbacks, "default_root_dir": str(folder)}
    bars = any(isinstance(c, RichProgressBar) for c in callbacks)
    arguments |= {"enable_progress_bar": bars, "enable_model_summary": False, "num_sanity_val_steps": 0, "plugins": [_Files()]}
    last = folder / "last.ckpt"
    if last.exists():
        data.order_epoch = read_checkpoint(last)["epoch"] + 1
    fitting = lightning.Trainer(**arguments)
    try:
        fitting.fit(model, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stopped
    if not (folder / "best.ckpt").exists():
        raise ValueError(f"training ended without a checkpoint: {monitor} was never a number; is there a sample in the validation split?")


class _Files(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them.

    Lightning's own way is a file in /tmp that is moved: where the run directory is on another disk that is a copy, and a run
    that is killed meanwhile leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))


class _Epochs(Callback):
    """Seeds every epoch and writes one row of ``metrics.csv`` after each; stops when the loss is no number any more."""

    def __init__(self, path: Path, seed: int, report: Callable[[int, dict[str, float]], None] | None):
        self.path, self.seed, self.report = path, seed, report
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # a run that was killed after its last epoch must not train one more: Lightning keeps the count, not the decision
        trainer.should_stop = any(c.wait_count >= c.patience for c in trainer.early_stopping_callbacks)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # not on_train_epoch_start: loaders draw a number after it, except in the first epoch of a process
            torch.manual_seed(int(np.random.SeedSequence((self.seed, trainer.current_epoch)).generate_state(1)[0]))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch, "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]}
        row |= {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
        if not all(math.isfinite(row.get(name, 0.0)) for name in ("train_loss", "val_loss")):
            raise ValueError(
                f"the loss is not a number any more in epoch {trainer.current_epoch} (train {row.get('train_loss')}, validation "
                f"{row.get('val_loss')}): lower the learning rate or --trainer.gradient_clip_val and train again"
            )
        self.rows.append(row)
        if trainer.is_global_zero:
            table = [",".join(row), *(",".join(repr(v) for v in r.values()) for r in self.rows)]
            write_text(self.path, "\n".join(table) + "\n")
            shown = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k.startswith(("train", "val")))
            console.print(f"epoch {trainer.current_epoch:3d}  {shown}", highlight=False, soft_wrap=True)
            if self.report is not None:
                self.report(trainer.current_epoch, row)


def predict(model: ICUModule, data: ICUDataModule, split: Split) -> pl.DataFrame:
    """Score every sample of a split once.

    Returns:
        ``stay_id, patient_id, minute, target, probability, split``, one row a sample, sorted by stay and minute; ``minute``
        is the prediction time since ICU admission; ``target`` is NaN where unknown.
    """
    data.view = model.view
    data.split = split
    data.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    rows, probabilities = [], []
    loader = data.predict_dataloader()
    with torch.inference_mode():
        for batch in track(
            loader, f"scoring {split}", console=Console(stderr=True), transient=True, disable=len(loader) < 50 or not sys.stderr.isatty()
        ):
            moved = type(batch)(*(t.to(device) for t in batch))
            row, probability = model.predict_step(moved, 0)
            rows.append(row.cpu().numpy())
            probabilities.append(probability.cpu().numpy())
    table = data.samples[np.concatenate(rows)].with_columns(probability=np.concatenate(probabilities))
    columns = ["stay_id", "patient_id", "minute", pl.col("target").cast(pl.Float64).fill_null(float("nan")), "probability", "split"]
    return table.select(columns).sort("stay_id", "minute")


def conclude(folder: Path, data: ICUDataModule) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Score ``best.ckpt``: choose the threshold on val and write it into the checkpoint, then measure val and the data's split."""
    best = folder / "best.ckpt"
    model = load(best)
    chosen = data.split
    validation = predict(model, data, "val")
    threshold = choose_threshold(validation)
    checkpoint = read_checkpoint(best)
    checkpoint["ehr"]["threshold"] = threshold
    save(checkpoint, best)
    held_out = len(data.rows(chosen)) > 0
    if not held_out:
        console.print(f"[yellow]no stay of these data is in split {chosen!r}: the validation split is shown instead[/]")
    scored = predict(model, data, chosen) if held_out and chosen != "val" else validation
    data.split = chosen
    both = pl.concat([validation, scored]).unique(["stay_id", "minute"], maintain_order=True)
    write_parquet(both, folder / "predictions.parquet")
    result: dict[str, Any] = {"val": score(validation, threshold)}
    if scored is not validation:
        result[chosen] = score(scored, threshold)
    write_json(result, folder / "metrics.json")
    return scored, result[chosen if held_out else "val"]
