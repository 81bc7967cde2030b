"""A training run: its directory, its callbacks, and what is measured at its end."""

import math
import platform
import sys
import time
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

from datamodules.hospitals.base import Split
from datamodules.module import ICUDataModule
from ehrmodels.base import ICUModule, Mean, load, read_checkpoint, several
from experiments import distributed
from experiments.files import console, save, write_json, write_parquet, write_text
from experiments.metrics import choose_threshold, score

MONITORS = {"val_auroc_auprc": "max", "val_auroc": "max", "val_auprc": "max", "val_loss": "min"}


class Recipe(NamedTuple):
    """How to train: arguments of lightning.Trainer, the seed, what chooses the best epoch and stops, and how often to save."""

    trainer: dict[str, Any]
    seed: int
    monitor: str
    patience: int
    checkpoint_minutes: float


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
    if console.quiet:  # one of several processes; the first has the directory
        yield
        return
    written, environment = folder / "config.yaml", folder / "environment.txt"
    if written.exists():
        if written.read_text() != config:
            raise ValueError(
                f"{folder} holds a run with another configuration ({written}); choose another {option}, or delete the folder"
            )
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
        write_text(
            environment,
            "\n".join([f"python=={platform.python_version()}", f"platform: {platform.platform()}", *packages]) + "\n",
        )
        write_text(written, config)
    try:
        yield
    except Exception:
        if not _trained(folder):
            for path in (written, environment, folder / "metrics.csv", folder / "wandb_id"):
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
    recipe: Recipe,
    logger: Any,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train ``model`` on ``data``, continuing from ``last.ckpt`` where there is one; leaves ``best.ckpt`` and ``metrics.csv``.

    ``last.ckpt`` is written after every epoch, and within an epoch every ``checkpoint_minutes``. The random numbers of an epoch
    depend on the seed, the epoch and the process alone, and a checkpoint within an epoch holds where they are, so a run that was
    killed and continued ends at the same weights as an unbroken one.
    """
    trainer, seed, monitor, patience, checkpoint_minutes = recipe
    if not checkpoint_minutes >= 0:
        raise ValueError(f"--checkpoint_minutes must be at least 0, found {checkpoint_minutes}")
    model.train()  # ``load`` gives it in evaluation mode, in which fine-tuning would go without dropout
    last = folder / "last.ckpt"
    epochs = _Epochs(folder / "metrics.csv", seed, last, checkpoint_minutes, report)
    best = ModelCheckpoint(folder, "best", monitor=monitor, mode=MONITORS[monitor], enable_version_counter=False)
    newest = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    stop = EarlyStopping(monitor, mode=MONITORS[monitor], patience=patience)
    callbacks: list[Callback] = [epochs, stop, best, newest]
    if (sys.stderr.isatty() or sys.stdout.isatty()) and not console.quiet:
        callbacks.append(RichProgressBar(leave=False))
    precision = trainer.get("precision") or (
        "bf16-mixed" if torch.cuda.is_available() and trainer.get("accelerator") != "cpu" else "32-true"
    )
    arguments = {
        **trainer,
        "precision": precision,
        "logger": logger or False,
        "callbacks": callbacks,
        "default_root_dir": str(folder),
    }
    bars = any(isinstance(c, RichProgressBar) for c in callbacks)
    arguments |= {
        "enable_progress_bar": bars,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    fitting = lightning.Trainer(**arguments, plugins=[_Files(), *distributed.environment(trainer)])
    data.rank, data.world = fitting.global_rank, fitting.world_size
    data.order_seed, (data.order_epoch, data.order_start) = seed, epochs.position(data.world)
    distributed.watch_launcher(fitting.strategy.launcher)
    try:
        fitting.fit(model, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stopped
    if not (folder / "best.ckpt").exists():
        raise ValueError(
            f"training ended without a checkpoint: {monitor} was never a number; is there a sample in the validation split?"
        )


class _Files(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them.

    Lightning's own way is a file in /tmp that is moved: where the run directory is on another disk that is a copy, and a run
    that is killed meanwhile leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))


class _Epochs(Callback):
    """Seeds every epoch and writes one row of ``metrics.csv`` after each; stops when the loss is no number any more.

    Within an epoch it writes ``last``, with all that a checkpoint after an epoch does without: the batch, the random numbers of
    every process and the training loss so far.
    """

    def __init__(
        self, path: Path, seed: int, last: Path, minutes: float, report: Callable[[int, dict[str, float]], None] | None
    ):
        self.path, self.seed, self.last, self.seconds, self.report = path, seed, last, 60 * minutes, report
        self.rows: list[dict[str, float]] = []
        self.within: dict[str, Any] | None = None  # of a checkpoint within an epoch
        self.world, self.saved = 1, 0.0

    def position(self, world: int) -> tuple[int, int]:
        """Epoch and batch at which training goes on.

        Raises:
            ValueError: ``last`` is damaged, or was written by another number of processes.
        """
        self.world = world
        if not self.last.exists():
            return 0, 0
        checkpoint = read_checkpoint(
            self.last,
            "copy best.ckpt over it to continue from the best epoch, or delete it to train anew, and run the same command with --resume",
        )
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if state.get("world", 1) != world:
            raise ValueError(
                f"{self.last} was written by a training on {state.get('world', 1)} processes, this is one on {world}: continue with the "
                "same --trainer.devices and --trainer.num_nodes, or choose another --name"
            )
        within = state.get("within")
        return (checkpoint["epoch"], within["batch"]) if within else (checkpoint["epoch"] + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "world": self.world, "within": self.within}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.within = state_dict["rows"], state_dict.get("within")

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for name, state in checkpoint["callbacks"].items():
            if "dirpath" in state:  # Lightning forgets the best score where the run directory has been moved since
                checkpoint["callbacks"][name] = _moved(state, state["dirpath"], trainer.checkpoint_callback.dirpath)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # a run that was killed after its last epoch must not train one more: Lightning keeps the count, not the decision
        trainer.should_stop = any(c.wait_count >= c.patience for c in trainer.early_stopping_callbacks)
        distributed.end_with_sigterm()
        self.saved = time.monotonic()
        # what an epoch without a validation is judged by
        trainer.callback_metrics.update(
            {k: torch.tensor(v) for row in self.rows[-1:] for k, v in row.items() if k.startswith("val")}
        )
        if self.within:
            pl_module.losses["train"] = Mean(*self.within["train_loss"])

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.within:
            cpu, cuda = self.within["random"][trainer.global_rank]
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)
            self.within = None
        elif (
            batch_idx == 0
        ):  # not on_train_epoch_start: loaders draw a number after it, except in the first epoch of a process
            key = (self.seed, trainer.current_epoch, *([trainer.global_rank] if trainer.global_rank else []))
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if (
            trainer.is_last_batch
            or done % trainer.accumulate_grad_batches
            or done % (trainer.val_check_batch or 1) == 0
        ):
            return  # gradients are in the making, or a checkpoint follows in any case
        if not distributed.agreed(time.monotonic() - self.saved >= self.seconds):
            return
        drawn = (torch.get_rng_state(), torch.cuda.get_rng_state() if pl_module.device.type == "cuda" else None)
        loss = pl_module.losses["train"]
        self.within = {"batch": done, "random": distributed.everyone(drawn), "train_loss": (loss.total, loss.count)}
        trainer.save_checkpoint(self.last)
        self.within, self.saved = None, time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.saved = time.monotonic()
        row: dict[str, float] = {
            "epoch": trainer.current_epoch,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        said = {**trainer.callback_metrics, "train_loss": pl_module.losses["train"].value()}
        row |= {k: float(v) for k, v in sorted(said.items())}
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


def _moved(value: Any, old: str, new: str) -> Any:
    """``value`` with the folder ``new`` for ``old`` in every path."""
    if isinstance(value, dict):
        return {_moved(k, old, new): _moved(v, old, new) for k, v in value.items()}
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def predict(model: ICUModule, data: ICUDataModule, split: Split) -> pl.DataFrame:
    """Score every sample of a split once; processes that have trained together share the work.

    Returns:
        ``stay_id, patient_id, minute, target, probability, split``, one row a sample, sorted by stay and minute; ``minute``
        is the prediction time since ICU admission; ``target`` is NaN where unknown.
    """
    data.view = model.view
    data.split = split
    data.setup()
    data.rank, data.world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several() else (0, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
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
            moved = type(batch)(*(t.to(device) for t in batch))
            row, probability = model.predict_step(moved, 0)
            rows.append(row.cpu().numpy())
            probabilities.append(probability.cpu().numpy())
    shares = distributed.everyone((np.concatenate(rows), np.concatenate(probabilities)))
    found, said = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    table = data.samples[found].with_columns(probability=said)
    columns = [
        "stay_id",
        "patient_id",
        "minute",
        pl.col("target").cast(pl.Float64).fill_null(float("nan")),
        "probability",
        "split",
    ]
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
    distributed.everyone(None)  # the others read the checkpoint again
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
