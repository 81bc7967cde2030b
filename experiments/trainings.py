"""A queue of trainings, shared by processes that may be killed; ``python -m experiments.imports experiments.trainings`` is one of them.

A training is a file ``queue/NAME.yaml`` of ``ehr train`` or ``ehr finetune``, and the run directory NAME that comes of it. What is left
to do is told by the run directories alone, and who does it by a lock a training, which the kernel frees when its process ends, however
it ends: whoever finds a training neither ended nor locked goes on with it at its last checkpoint.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock, Timeout

from experiments import cli, fit, settings, tracking
from experiments.files import write_json, write_text
from experiments.finetune import finetune
from experiments.processes import RENEW, Standing, Workers, why_failed
from experiments.train import train

ATTEMPTS = 5  # times that a training may lose its process without one more epoch
ON_ONE_DEVICE = ("devices", "num_nodes", "strategy")  # arguments of the trainer that are not for a training to choose
VERBS: dict[str, Callable[..., Any]] = {"train": train, "finetune": finetune}


class Training(NamedTuple):
    """One training of a queue.

    Attributes:
        folder: of the queue.
        name: place of its run directory in there, such as icu/fusion-0.
        verb: train or finetune.
    """

    folder: str
    name: str
    verb: str = "train"

    def __str__(self) -> str:
        return self.name

    @property
    def run(self) -> Path:
        """Its run directory."""
        return Path(self.folder) / self.name

    def queued(self, kind: str) -> Path:
        """Its file in the queue: yaml, what is trained; lock; json, what happened."""
        return Path(self.folder) / "queue" / f"{self.name}.{kind}"

    def state(self) -> dict[str, Any]:
        """``minutes`` of its epochs so far; ``lost``: after how many epochs it last lost its process, and how often;
        ``failed``: why."""
        with suppress(FileNotFoundError):
            return json.loads(self.queued("json").read_text())
        return {"minutes": 0.0, "lost": [0, 0], "failed": None}

    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.scored() or self.state()["failed"] is not None

    def scored(self) -> bool:
        """Whether it was trained and scored."""
        return (self.run / "metrics.json").exists()

    def epochs(self) -> int:
        """How many there are so far."""
        with suppress(FileNotFoundError):
            return max(len((self.run / "metrics.csv").read_text().splitlines()) - 1, 0)
        return 0

    def begin(self, config: dict[str, Any], advice: str) -> None:
        """Put it into the queue, or see that it is what is there; one that failed is tried again.

        Args:
            config: of its verb, without its place.
            advice: what to do where another configuration is there.

        Raises:
            ValueError: there is.
        """
        place = (
            {"name": self.run.name, "runs": str(self.run.parent)} if self.verb == "train" else {"out": str(self.run)}
        )
        config = deepcopy({**config, **place})
        path = self.queued("yaml")
        if path.exists():
            unequal = settings.differences(yaml.safe_load(path.read_text()), config, VERBS[self.verb])
            if unequal:
                raise ValueError(
                    f"{self.run} was begun with another configuration:\n{settings.as_flags(unequal)}\n"
                    f"{advice}, or delete {self.run} and {path}"
                )
        elif self.run.exists():
            raise ValueError(f"{self.run} holds a run of another command; {advice}, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(config, sort_keys=False))
        with suppress(Timeout), FileLock(self.queued("lock"), timeout=0):  # else it is being trained
            if not self.scored():
                write_json({**self.state(), "lost": [0, 0], "failed": None}, self.queued("json"))

    def result(self) -> tuple[Any, dict[str, Any]]:
        """The split that it was made to be scored on, and the scores."""
        return list(json.loads((self.run / "metrics.json").read_text()).items())[-1]

    def outcome(self) -> str:
        """What became of it, in one line."""
        state = self.state()
        if not self.scored():
            return f"{self}  failed: {state['failed']}"
        split, result = self.result()
        scores = "  ".join(
            f"{name.upper()} {result[name]['value']:.3f}"
            for name in ("auroc", "auprc")
            if result[name]["value"] is not None
        )
        return f"{self}  {split} {scores}  {state['minutes']:.1f} minutes"


def check_one_device(trainer: dict[str, Any], place: str, instead: str) -> None:
    """Refuse arguments of the trainer with which one training of a queue would use several devices.

    Args:
        trainer: arguments of lightning.Trainer.
        place: what trains, in the user's words.
        instead: the flag that uses several devices.

    Raises:
        ValueError: names them.
    """
    several = [f"--trainer.{key}" for key in ON_ONE_DEVICE if trainer.get(key) not in (None, 1, "1", "auto")]
    if several:
        raise ValueError(f"{place}: one training runs on one device: leave {', '.join(several)} out, and use {instead}")


def begun(folder: Path, configurations: dict[Training, dict[str, Any]], advice: str) -> FileLock:
    """Put trainings into the queue of a folder; returns the lock of whoever sums them up.

    Args:
        folder: of the queue.
        configurations: of each training, without its place.
        advice: what to do where another configuration is there.
    """
    (folder / "queue").mkdir(parents=True, exist_ok=True)
    alone = FileLock(folder / "queue" / "benchmark.lock")  # the same command may be given twice
    with alone:
        for training, config in configurations.items():
            training.begin(config, advice)
    return alone


def complete(folder: Path, trainings: Sequence[Training], workers: int | None) -> None:
    """Do what is left of trainings in a queue.

    Args:
        folder: of the queue.
        trainings: in the order in which they are begun.
        workers: processes; None: as many as there are GPUs, or 1.
    """
    if all(training.ended() for training in trainings):
        return
    order = {"name": folder.name, "folder": str(folder), "trainings": trainings}
    number = workers or max(torch.cuda.device_count(), 1)
    Workers("experiments.trainings", order, number).run(
        lambda: _standing(folder.name, trainings), len(trainings), "trainings"
    )


def check_all(trainings: Sequence[Training], folder: Path) -> None:
    """Say which trainings failed.

    Raises:
        ValueError: one did.
    """
    failed = [training for training in trainings if not training.scored()]
    if failed:
        reasons = "\n".join(f"  {training.outcome()}" for training in failed)
        raise ValueError(
            f"{len(failed)} of {len(trainings)} trainings failed:\n{reasons}\nthe same command tries them again; {folder}/worker-*.log say more"
        )


def _standing(name: str, trainings: Sequence[Training]) -> Standing:
    ended = {str(training): training.outcome() for training in trainings if training.ended()}
    return Standing(ended, name, len(ended) + sum(training.epochs() for training in trainings))


# ---- the processes -----------------------------------------------------------------------------------------------------------


def work(order: dict[str, Any]) -> None:
    """Train what nobody trains until nothing is left, or until the process that started this one is gone."""
    trainings = [Training(*place) for place in order["trainings"]]
    while os.getppid() == order["parent"]:
        left = [training for training in trainings if not training.ended()]
        if not left:
            return
        for training in left:
            lock = FileLock(training.queued("lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if not training.ended():
                    _attempt(training, trainings.index(training), order)
                    break
            finally:
                lock.release()
        else:
            time.sleep(1)  # another process may die, and its training is then ours


def _attempt(training: Training, number: int, order: dict[str, Any]) -> None:
    """Train one, or go on with it where a process before this one left it."""
    state, path, began = training.state(), training.queued("json"), time.monotonic()
    minutes, epochs = state["minutes"], training.epochs()
    after, losses = state["lost"]
    state["lost"] = [epochs, losses + 1 if after == epochs else 1]
    if state["lost"][1] > ATTEMPTS:
        state["failed"] = (
            f"its process was killed {ATTEMPTS} times in the same epoch: did the machine run out of memory?"
        )
    write_json(state, path)
    if state["failed"]:
        return

    def report(epoch: int, row: dict[str, float]) -> None:
        state["minutes"] = minutes + (time.monotonic() - began) / 60
        write_json(state, path)
        if os.getppid() != order["parent"]:
            raise KeyboardInterrupt

    def failed(reason: str) -> None:
        write_json({**state, "failed": reason}, path)
        tracking.end({"state": "failed"}, failed=True)

    try:
        values = cli.configured(training.verb, ["-c", str(training.queued("yaml"))])
        trial = fit.Trial(order["name"], number, {}, report)
        VERBS[training.verb](**{**values, "resume": True}, trial=trial)
        if not state["minutes"]:  # a model that has no epochs
            state["minutes"] = (time.monotonic() - began) / 60
            write_json(state, path)
    except KeyboardInterrupt:
        write_json({**state, "lost": [0, 0]}, path)  # left to another by intention
        raise
    except OSError:
        raise  # the disk: no fault of the training
    except SystemExit:
        failed("its command line was refused: see the worker's log")
    except ValueError as error:
        print(f"{training}: {error}", flush=True)
        failed(str(error))
    except Exception as error:
        traceback.print_exc()
        failed(why_failed(error))
        raise SystemExit(RENEW) from error


def main() -> None:
    """Do what the order on standard input says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background with it ignored
    cli.guarded(lambda: work(json.load(sys.stdin)), "ehr benchmark --help")
