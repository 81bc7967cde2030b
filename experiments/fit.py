"""Training itself: the trainer with its callbacks, what is refused beforehand, and why it stopped."""

import gc
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import polars as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar

from datamodules.module import ICUDataModule
from ehrmodels.base import ICUModule, is_distributed
from experiments import distributed, mistakes, run_directory
from experiments.files import console
from experiments.resume import Epochs, Files, Report
from experiments.settings import TRAINER_DEFAULTS

MONITORS = {
    "cv_auroc_auprc": "max",
    "val_auroc_auprc": "max",
    "val_auroc": "max",
    "val_auprc": "max",
    "val_loss": "min",
}


NOISE = (  # what Lightning says of choices that are made here on purpose
    *("does not have many workers", "number of training batches", "exists and is not empty", "LeafSpec"),
    *("Checkpoint directory", "your dataloader is not resumable", "`srun` command is available"),
    "could not find the monitored key",  # ``fit`` says so itself, at the end
)


@contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile Lightning says nothing but errors, and does not warn of what is done on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for words in NOISE:
                warnings.filterwarnings("ignore", f".*{words}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Recipe(NamedTuple):
    """How to train: arguments of lightning.Trainer, the seed, what chooses the best epoch and stops (None: the last is kept),
    how often to save, and after how many epochs to stop in any case, whatever the schedule is made for."""

    trainer: dict[str, Any]
    seed: int
    monitor: str | None
    patience: int
    checkpoint_minutes: float
    last: int | None = None


class Trial(NamedTuple):
    """What a training run is told when it is a trial of a sweep.

    ``report`` is called with (epoch, metrics) after every epoch; what it raises ends the training.
    """

    study: str
    number: int
    params: dict[str, Any]
    report: Report


def check(recipe: Recipe) -> None:
    """Refuse what cannot train, before anything is read.

    Raises:
        ValueError: names the flag.
    """
    trainer, seed, monitor, patience, minutes, _ = recipe
    if monitor is not None and monitor not in MONITORS:
        raise ValueError(f"--monitor {monitor} is not known; choose among {', '.join(MONITORS)}")
    if not minutes >= 0:
        raise ValueError(f"--checkpoint_minutes must be at least 0, found {minutes}")
    if patience < 0:
        raise ValueError(f"--patience must be at least 0, found {patience}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, found {seed}")
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs is not None and (epochs == 0 or epochs < -1):
        raise ValueError(f"--trainer.max_epochs must be at least 1, found {epochs}")
    if epochs == -1 and steps == -1:
        raise ValueError(
            "--trainer.max_epochs -1 has no end, and the learning rate falls to 0 over the training: give a number of "
            "epochs, or --trainer.max_steps"
        )
    if steps == 0 or steps < -1:
        raise ValueError(f"--trainer.max_steps must be at least 1, found {steps}")
    for name in ("limit_train_batches", "limit_val_batches"):
        limit = trainer.get(name)
        if limit is not None and not limit > 0:
            use = "train on" if "train" in name else "choose the best epoch and the threshold from"
            raise ValueError(f"--trainer.{name} {limit:g} leaves nothing to {use}: give more than 0")
    if trainer.get("overfit_batches"):
        raise ValueError(
            "--trainer.overfit_batches is not supported: it would validate on training samples; use "
            "--trainer.limit_train_batches"
        )
    if trainer.get("accumulate_grad_batches", 1) < 1:
        raise ValueError(
            f"--trainer.accumulate_grad_batches must be at least 1, found {trainer['accumulate_grad_batches']}"
        )


def fit(
    folder: Path,
    model: ICUModule,
    data: ICUDataModule,
    recipe: Recipe,
    logger: Any,
    report: Report | None = None,
) -> lightning.Trainer:
    """Train ``model`` on ``data``, continuing from ``last.ckpt`` where there is one; leaves ``best.ckpt`` and ``metrics.csv``.

    ``last.ckpt`` is written after every epoch, and within an epoch every ``checkpoint_minutes``. The random numbers of an epoch
    depend on the seed, the epoch and the process alone, and a checkpoint within an epoch holds where they are, so a run that was
    killed and continued ends at the same weights as an unbroken one.

    Where memory runs out, training begins again at ``last.ckpt`` with every batch computed in twice as many parts, whose gradients
    are summed.
    """
    begin = None if (folder / "last.ckpt").exists() else {k: deepcopy(v) for k, v in model.state_dict().items()}
    while True:
        try:
            return _fitted(folder, model, data, recipe, logger, report)
        except (RuntimeError, MemoryError) as error:
            if not mistakes.out_of_memory(error):
                raise
            parts = 2 * model.parts
            own_steps = type(model).training_step is not ICUModule.training_step
            divisible = not own_steps and model.penalty is None and model.compile_mode != "reduce-overhead"
            if is_distributed() or not divisible or parts > data.batch_size:
                raise
        model.parts = parts
        model.zero_grad()
        model.compiled = None
        if not (folder / "last.ckpt").exists():
            model.load_state_dict(begin)
        gc.collect()
        torch.cuda.empty_cache()
        console.print(
            f"out of memory: training goes on from its last checkpoint, each batch of up to {data.batch_size} samples in {parts} parts "
            "whose gradients are summed",
            soft_wrap=True,
        )


def _fitted(
    folder: Path, model: ICUModule, data: ICUDataModule, recipe: Recipe, logger: Any, report: Report | None
) -> lightning.Trainer:
    trainer, seed, monitor, patience, minutes, last_epoch = recipe
    trainer = {**TRAINER_DEFAULTS, **trainer}
    model.train()  # ``load`` gives it in evaluation mode, in which fine-tuning would go without dropout
    last = folder / "last.ckpt"
    epochs = Epochs(folder / "metrics.csv", seed, last, minutes, report, last_epoch)
    # where nothing is monitored, not the mode of ``newest``: Lightning would not tell their states apart
    mode = MONITORS[monitor] if monitor else "max"
    best = ModelCheckpoint(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)
    newest = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    if monitor is None:  # what would be validated was trained on
        trainer["limit_val_batches"] = 0
    own = _made("callbacks", trainer.pop("callbacks", None))
    stop = []
    if monitor and not any(isinstance(c, EarlyStopping) for c in own):
        stop = [EarlyStopping(monitor, mode=mode, patience=patience, strict=False)]
    callbacks: list[Callback] = [epochs, *stop, best, newest, *own]
    bars = (sys.stderr.isatty() or sys.stdout.isatty()) and not console.quiet
    if bars and not any(isinstance(c, RichProgressBar) for c in own):
        callbacks.append(RichProgressBar(leave=False))
    wanted = trainer.pop("logger", None)
    loggers = [*([logger] if logger is not None else []), *_made("logger", wanted)]
    arguments = {
        **trainer,
        "precision": run_directory.precision(trainer),
        "logger": loggers or wanted is True,
        "callbacks": callbacks,
        "default_root_dir": trainer.get("default_root_dir") or str(folder),
        "enable_progress_bar": bars or any(isinstance(c, RichProgressBar) for c in own),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    fitting = lightning.Trainer(**arguments, plugins=[Files(), *distributed.environment(trainer)])
    data.rank, data.world = fitting.global_rank, fitting.world_size
    data.order_seed, (data.order_epoch, data.order_start) = seed, epochs.position(data.world)
    model.parts = epochs.parts = max(model.parts, epochs.parts)
    distributed.watch_launcher(fitting.strategy.launcher)
    try:
        fitting.fit(model, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stopped
    if not (folder / "best.ckpt").exists():
        raise ValueError(
            f"training ended without a checkpoint: {monitor} was never a number. Was there a validation "
            "(--trainer.max_steps, --trainer.check_val_every_n_epoch, --trainer.val_check_interval), and is there a sample in its split?"
        )
    device = fitting.strategy.root_device
    parts = f", batches in {model.parts} parts" * (model.parts > 1)
    console.print(
        f"on {device} in {arguments['precision']}{parts}; memory: {run_directory.memory(device)}", soft_wrap=True
    )
    return fitting


def why_stopped(folder: Path, monitor: str | None, trainer: dict[str, Any]) -> str:
    """A sentence on how long a run was trained, why it stopped, and which epoch is kept."""
    rows = pl.read_csv(folder / "metrics.csv")
    if monitor is None:
        return f"trained {len(rows)} epoch{'s' * (len(rows) != 1)} and kept the last"
    ranked = rows.drop_nulls(monitor).sort(monitor, descending=MONITORS[monitor] == "max", maintain_order=True)
    best = ranked.row(0, named=True)
    done, most = len(rows), trainer.get("max_epochs")
    if most is not None and done >= most > 0:
        reason = "as many as were asked for"
    elif trainer.get("max_steps", -1) > 0:
        reason = "as many as --trainer.max_steps allows"
    else:
        since = int(rows["epoch"][-1]) - int(best["epoch"])
        reason = f"{monitor} had not become better for {since} epochs"
    return f"trained {done} epoch{'s' * (done != 1)}, {reason}; kept: epoch {int(best['epoch'])}, {monitor} {best[monitor]:.4f}"


def _made(what: str, value: Any) -> list[Any]:
    """Callbacks or loggers from what a configuration says of them; objects are taken as they are.

    Raises:
        ValueError: a class cannot be imported, as where its package is not installed, or does not take its arguments.
    """
    if value is None or isinstance(value, bool):
        return []
    made = []
    for entry in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(entry, dict):
            made.append(entry)
            continue
        module, _, name = entry["class_path"].rpartition(".")
        try:
            made.append(getattr(importlib.import_module(module), name)(**(entry.get("init_args") or {})))
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"--trainer.{what} {entry['class_path']}: {error}") from error
    return made
