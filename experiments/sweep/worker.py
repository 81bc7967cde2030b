"""``python -m experiments.sweep.worker``: the processes of this machine, and what one of them does."""

import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import optuna
import polars as pl
import torch
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import cli, fit, tracking, train
from experiments.files import console
from experiments.run_directory import code, configuration
from experiments.sweep.locks import server_lost
from experiments.sweep.space import flag
from experiments.sweep.study import Study

NOT_OPTIONS = (
    "model",
    "data",
    "trainer",
    "finetune",
    "resume",
    "trial",
)  # arguments of ``train`` that are described apart
RENEW = 75  # exit status of a worker whose device is not to be trusted any more; another process takes its place
LOSSES = 20  # workers that may be lost without any progress in the study before the sweep gives up
LAUNCHER_PREFIXES = ("SLURM_", "PMI_", "OMPI_")  # left out of a worker's environment: a trial is a process of its own
LAUNCHER_VARIABLES = (
    "WANDB_SERVICE",  # of the command's own process: it would keep the run of a worker that was killed open
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


class Workers:
    """Starts the processes of this machine and starts anew those that were killed, until the study has no trial left."""

    def __init__(self, order: dict[str, Any], number: int):
        self.order, self.number = order, number
        self.folder = Path(order["folder"])
        # of this host and command: several may share the folder, such as the tasks of one srun
        self.log_name = f"worker-{platform.node()}-{os.getpid()}"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES) and k not in LAUNCHER_VARIABLES
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(_cores() // number, 1)))
        # this very package, even where the current folder holds another one named experiments
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
        )
        self.environment = environment
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        self.devices = visible or [str(i) for i in range(torch.cuda.device_count())]

    def log(self, index: int) -> Path:
        """What a worker prints, and those that take its place."""
        return self.folder / f"{self.log_name}-{index}.log"

    def start(self, index: int) -> None:
        environment = dict(self.environment)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[index % len(self.devices)]
        with self.log(index).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "experiments.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        assert process.stdin is not None
        process.stdin.write(
            json.dumps({**self.order, "parent": os.getpid()}).encode()
        )  # not an argument: the storage may hold a password
        process.stdin.close()
        self.processes[index] = process

    def run(self, study: Study) -> None:
        before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        total, monitor = self.order["trials"], self.order["terms"]["monitor"]
        text = TextColumn("{task.description}")
        with Progress(
            text,
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bar:
            task = bar.add_task(self.order["name"], total=total)
            console.print(
                f"{self.folder}: {total} trials, {self.number} worker{'s' * (self.number > 1)}; {self.log_name}-*.log say more",
                soft_wrap=True,
            )
            try:
                for index in range(self.number):
                    self.start(index)
                ended = {t.number for t in study.trials() if t.state.is_finished()}
                progress, losses, last = -1, 0, False
                while not last:
                    last, trials = not self.processes, study.trials()
                    for trial in trials:
                        if trial.state.is_finished() and trial.number not in ended:
                            ended.add(trial.number)
                            console.print(outcome(trial, monitor), soft_wrap=True, highlight=False)
                    best = study.best(trials)
                    shown = (
                        f"{self.order['name']}, best {best.value:.4f} (trial {best.number})"
                        if best
                        else self.order["name"]
                    )
                    bar.update(task, completed=len(ended), description=shown)
                    if (now := len(ended) + sum(len(t.intermediate_values) for t in trials)) != progress:
                        progress, losses = now, 0
                    losses += self._replace_lost()
                    if losses > LOSSES:
                        raise ValueError(f"workers end again and again without any progress; {self.log(0)} says why")
                    time.sleep(0.5)
            finally:
                self._stop()
                signal.signal(signal.SIGTERM, before)

    def _replace_lost(self) -> int:
        lost = 0
        for index, process in list(self.processes.items()):
            if (status := process.poll()) is None:
                continue
            if status == 0:
                del self.processes[index]
            elif status in (2, 130):  # what ``cli.guarded`` makes of a mistake that concerns every trial
                messages = [m for m in self.log(index).read_text().splitlines() if m.startswith("ehr: ")]
                raise ValueError(
                    messages[-1].removeprefix("ehr: ") if messages else f"worker {index} ended: see {self.log(index)}"
                )
            else:
                lost += 1
                self.start(index)
        return lost

    def _stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def outcome(trial: FrozenTrial, monitor: str) -> str:
    """What became of a trial, in one line."""
    parameters = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    if trial.state == TrialState.COMPLETE:
        text = f"{monitor} {trial.value:.4f}"
    elif trial.state == TrialState.PRUNED:
        text = f"pruned after epoch {max(trial.intermediate_values, default=0)}"
    else:
        text = f"failed: {trial.user_attrs.get('reason', 'no reason was recorded')}"
    if "repeats" in trial.user_attrs:
        text = f"repeats trial {trial.user_attrs['repeats']}, not trained again"
    return f"trial {trial.number:3d}  {text}  [dim]{parameters}[/]"


def work(order: dict[str, Any]) -> None:
    """Run trials of a study until none is left, or until the process that started this one is gone."""
    with Study(order["name"], order["storage"], order["terms"]) as study:
        while os.getppid() == order["parent"]:
            trial = study.claim(order["trials"])
            if trial is not None:
                attempt(study, trial, order)
            elif study.finished(order["trials"]):
                return
            else:
                time.sleep(1)  # another process may die, and its trial is then ours


def attempt(study: Study, trial: Trial, order: dict[str, Any]) -> None:
    """Train one trial and say in the study what became of it; goes on where a process before this one left it."""
    folder, run_name = Path(order["folder"]), f"trial-{trial.number:04d}"
    monitor = order["terms"]["monitor"]
    arguments = ["-c", str(folder / "train.yaml"), *(flag(k, v) for k, v in trial.params.items())]
    arguments += [f"--runs={folder}", f"--name={run_name}", "--data.split=val"]

    def report(epoch: int, row: dict[str, float]) -> None:
        if (epoch + 1) % every == 0:  # else the row may repeat what an earlier epoch was measured at
            study.report(trial, epoch, row.get(monitor, math.nan))
        if os.getppid() != order["parent"]:
            raise KeyboardInterrupt

    try:
        values = cli.configured("train", arguments)
        every = values["trainer"].get("check_val_every_n_epoch") or 1
        others = {name: value for name, value in values.items() if name not in NOT_OPTIONS}
        config = configuration(values["model"], {"data": values["data"]}, values["trainer"], **others)
        facts = {
            "config": yaml.safe_dump(config),
            "seed": values["seed"],
            "run": str(folder / run_name),
            "code": code(),
        }
        for key, fact in (facts | {"host": platform.node()}).items():
            trial.set_user_attr(key, fact)
        train.train(**{**values, "resume": True}, trial=fit.Trial(order["name"], trial.number, trial.params, report))
        best = _best_epoch(folder / run_name / "metrics.csv", monitor)
        study.end(trial, TrialState.COMPLETE, best[monitor], metrics=best)
    except optuna.TrialPruned:
        study.end(trial, TrialState.PRUNED)
        tracking.end({"state": "pruned"})
    except KeyboardInterrupt:
        study.release_without_penalty(trial)
        raise
    except OSError:
        raise  # the disk: no fault of the trial
    except SystemExit:
        study.end(trial, TrialState.FAIL, reason="its command line was refused: see the worker's log")
    except ValueError as error:
        print(f"{run_name}: {error}", flush=True)
        study.end(trial, TrialState.FAIL, reason=str(error))
        tracking.end({"state": "failed"}, failed=True)
    except Exception as error:
        if server_lost(error):
            raise
        traceback.print_exc()
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(
            r"out of memory|can't allocate memory", str(error)
        )
        message = " ".join(str(error).split())[:500]
        study.end(trial, TrialState.FAIL, reason=cli.NO_MEMORY if memory else f"{type(error).__name__}: {message}")
        tracking.end({"state": "failed"}, failed=True)
        raise SystemExit(RENEW) from error


def _best_epoch(path: Path, monitor: str) -> dict[str, float]:
    """The row of metrics.csv with the best value of ``monitor``, among the epochs that were validated.

    Raises:
        ValueError: there is none.
    """
    epochs = pl.read_csv(path)
    if monitor in epochs.columns:
        epochs = epochs.filter(pl.col(monitor).cast(pl.Float64, strict=False).is_finite())
    if monitor not in epochs.columns or epochs.is_empty():
        raise ValueError(f"no epoch has a value of {monitor}: is --trainer.check_val_every_n_epoch above max_epochs?")
    descending = fit.MONITORS[monitor] == "max"
    return epochs.sort(monitor, descending=descending, maintain_order=True).row(0, named=True)


def _cores() -> int:
    """Cores that this process may use, where the system tells; macOS tells only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    cli.guarded(lambda: work(json.load(sys.stdin)), "ehr sweep --help")
