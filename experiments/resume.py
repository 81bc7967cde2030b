"""What makes a training that was killed go on at the very batch: the seed of every epoch, and checkpoints that hold where it is."""

import csv
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchCheckpointIO

from ehrmodels.base import Mean
from ehrmodels.checkpoint import read
from experiments import distributed
from experiments.files import console, save, write_text

Report = Callable[[int, dict[str, float]], None]


class Files(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them.

    Lightning's own way is a file in /tmp that is moved: where the run directory is on another disk that is a copy, and a run
    that is killed meanwhile leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))


class Epochs(Callback):
    """Seeds every epoch and writes one row of ``metrics.csv`` after each; stops when the loss is no number any more.

    Within an epoch it writes ``last``, with all that a checkpoint after an epoch does without: the batch, the random numbers of
    every process and the training loss so far.

    Args:
        path: ``metrics.csv``.
        seed: of dropout and order of batches.
        last: the checkpoint ``last.ckpt``.
        minutes: between checkpoints within an epoch.
        report: called with (epoch, metrics) after every epoch; what it raises ends the training.
        most: epochs after which training ends, whatever the schedule is made for.
    """

    def __init__(
        self, path: Path, seed: int, last: Path, minutes: float, report: Report | None, most: int | None = None
    ):
        self.most = most
        self.path, self.seed, self.last, self.seconds, self.report = path, seed, last, 60 * minutes, report
        self.rows: list[dict[str, float]] = []
        self.within: dict[str, Any] | None = None  # of a checkpoint within an epoch
        self.world, self.saved, self.validated = 1, 0.0, False
        self.parts = 1  # in which batches are computed, where memory is short

    def position(self, world: int) -> tuple[int, int]:
        """Epoch and batch at which training goes on.

        Raises:
            ValueError: ``last`` is damaged, or was written by another number of processes.
        """
        self.world = world
        if not self.last.exists():
            return 0, 0
        checkpoint = read(
            self.last,
            "copy best.ckpt over it to continue from the best epoch, or delete it to train anew, and run the same command with --resume",
        )
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if state.get("world", 1) != world:
            raise ValueError(
                f"{self.last} was written by a training on {state.get('world', 1)} processes, this is one on {world}: continue with the "
                "same --trainer.devices and --trainer.num_nodes, or choose another --name"
            )
        self.parts = state.get("parts", 1)
        within = state.get("within")
        return (checkpoint["epoch"], within["batch"]) if within else (checkpoint["epoch"] + 1, 0)

    @property
    def state_key(self) -> str:
        return "_Epochs"  # as in the checkpoints of earlier versions

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "world": self.world, "within": self.within, "parts": self.parts}

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
        trainer.should_stop = any(c.wait_count >= max(c.patience, 1) for c in trainer.early_stopping_callbacks)
        trainer.should_stop |= len(self.rows) == self.most
        distributed.end_with_sigterm()
        self.saved = time.monotonic()
        # what an epoch without a validation is judged by
        validated = [row for row in self.rows if "val_loss" in row]
        trainer.callback_metrics.update(
            {k: torch.tensor(v) for row in validated[-1:] for k, v in row.items() if k.startswith("val")}
        )
        if self.within:
            pl_module.losses["train"] = Mean(*self.within["train_loss"])

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.validated = not trainer.sanity_checking

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
            or not pl_module.resumes_within
            or done % trainer.accumulate_grad_batches
            or done % (trainer.val_check_batch or 1) == 0
        ):
            return  # gradients are in the making, or a checkpoint follows in any case
        if not distributed.broadcast(time.monotonic() - self.saved >= self.seconds):
            return
        drawn = (torch.get_rng_state(), torch.cuda.get_rng_state() if pl_module.device.type == "cuda" else None)
        loss = pl_module.losses["train"]
        self.within = {
            "batch": done,
            "random": distributed.all_gather(drawn),
            "train_loss": (loss.total, int(loss.count)),
        }
        trainer.save_checkpoint(self.last)
        self.within, self.saved = None, time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.saved = time.monotonic()
        row: dict[str, float] = {
            "epoch": trainer.current_epoch,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        metrics = {**trainer.callback_metrics, "train_loss": pl_module.losses["train"].value()}
        row |= {k: float(v) for k, v in sorted(metrics.items()) if self.validated or not k.startswith("val")}
        self.validated = False
        if not all(math.isfinite(row.get(name, 0.0)) for name in ("train_loss", "val_loss")):
            raise ValueError(
                f"the loss is not a number any more in epoch {trainer.current_epoch} (train {row.get('train_loss')}, validation "
                f"{row.get('val_loss')}): lower the learning rate or --trainer.gradient_clip_val and train again"
            )
        self.rows.append(row)
        trainer.should_stop |= len(self.rows) == self.most
        if trainer.is_global_zero:
            write_text(self.path, self._table())
            shown = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k.startswith(("train", "val", "cv")))
            console.print(f"epoch {trainer.current_epoch:3d}  {shown}", highlight=False, soft_wrap=True)
        if self.report is not None:
            self._tell(self.report, trainer, row)

    def _tell(self, report: Report, trainer: lightning.Trainer, row: dict[str, float]) -> None:
        """Report an epoch from the first process; what that raises is raised in all of them, so that none waits for another."""
        raised: Exception | None = None
        if trainer.is_global_zero:
            try:
                report(trainer.current_epoch, row)
            except Exception as error:
                raised = error
        for reason in distributed.all_gather(raised):
            if reason is not None:
                raise reason

    def _table(self) -> str:
        """The rows as CSV; what an epoch does not have is empty."""
        columns = max((list(row) for row in self.rows), key=len)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: repr(v) for k, v in row.items()} for row in self.rows)
        return text.getvalue()


def _moved(value: Any, old: str, new: str) -> Any:
    """``value`` with the folder ``new`` for ``old`` in every path."""
    if isinstance(value, dict):
        return {_moved(k, old, new): _moved(v, old, new) for k, v in value.items()}
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value
