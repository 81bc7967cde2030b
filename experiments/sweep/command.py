"""``ehr sweep``: many processes, each with one trial at a time on its own device, draw configurations of ``ehr train`` from one study."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import optuna
import polars as pl
import torch
from optuna.trial import Trial, TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from datamodules.module import ICUDataModule
from experiments import cli, run, verbs
from experiments.files import console, write_text
from experiments.run import MONITORS
from experiments.sweep.report import summarise
from experiments.sweep.study import Study, distributions, server_lost

RENEW = 75  # exit status of a worker whose device is not to be trusted any more; another process takes its place
LOSSES = 20  # workers that may be lost without any progress in the study before the sweep gives up
GONE = ("SLURM_", "PMI_", "OMPI_")  # a trial is a process of its own, wherever it was started
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def sweep(
    data: ICUDataModule,
    trainer: dict[str, Any],
    config: str,
    space: dict[str, Any],
    name: str = "sweep",
    runs: str = "runs",
    trials: int = 40,
    workers: int | None = None,
    storage: str | None = None,
    sampler_seed: int = 0,
    monitor: verbs.Monitor = "val_auroc_auprc",
) -> None:
    """Search the hyper-parameters of ``ehr train``; takes all its flags, which say what every trial starts from.

    Every worker is a process that runs one trial at a time on its own device. The same command again, on this machine or, with
    --storage postgresql://..., on another, joins the study or goes on with it. Each trial is a run directory, runs/NAME/trial-NUMBER;
    its value is the best --monitor of its epochs. Trials are scored on the validation split alone. At the end: best.yaml (for ehr
    train), trials.csv and sweep.png in runs/NAME.

    Args:
        data: Hospital system.
        trainer: Arguments of lightning.Trainer.
        config: What every trial starts from, as YAML.
        space: What is searched: flag of train without dashes: a list of choices, or {low, high} with log: true or step.
        name: Name of the study.
        runs: Folder that holds run directories; the study's is runs/NAME.
        trials: Trials in all, those of other machines and of earlier commands included.
        workers: Processes on this machine, one a GPU in turn; default: the number of GPUs, or 1.
        storage: A journal file for the processes of one machine, or postgresql://user@host/database for those of several;
            default: study.journal in the study's folder.
        sampler_seed: Seed of the sampler (TPE).
        monitor: Validation metric that is optimised and pruned by.
    """
    if str(trainer.get("devices", 1)) != "1" or trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            "one trial runs on one device: leave --trainer.devices and --trainer.num_nodes at 1 and use --workers instead"
        )
    if trials < 1 or (workers is not None and workers < 1):
        raise ValueError(f"--trials and --workers must be at least 1, found {trials} and {workers}")
    folder = Path(runs) / name
    settings = {
        "space": space,
        "config": config,
        "monitor": monitor,
        "direction": MONITORS[monitor],
        "sampler_seed": sampler_seed,
        "warmup": max(int(trainer.get("max_epochs") or 0) // 4, 1),
    }
    check(config, space)
    data.prepare_data()  # once, and before any worker says that the files are not there
    folder.mkdir(parents=True, exist_ok=True)
    order: dict[str, Any] = {
        "name": name,
        "storage": storage or str(folder / "study.journal"),
        "settings": settings,
        "folder": str(folder),
        "trials": trials,
    }
    try:
        with Study(name, order["storage"], settings) as study:
            if not study.trials() and (old := sorted(folder.glob("trial-*"))):
                raise ValueError(
                    f"{folder} holds trials of another study, such as {old[0].name}: choose another --name, or delete the folder"
                )
            write_text(folder / "train.yaml", config)
            if not study.finished(trials):
                _Workers(order, workers or max(torch.cuda.device_count(), 1)).run(study)
            summarise(study, folder, monitor, name)
    except Exception as error:
        if server_lost(error):
            said = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(
                f"the server of --storage is gone ({said}): when it is back, the same command goes on"
            ) from error
        raise


def check(config: str, space: dict[str, Any]) -> None:
    """Try the ends of every range and every choice as flags of ``ehr train``.

    Raises:
        ValueError: the entries are no search space, or a value is not possible.
        SystemExit: a name is no flag, or a value is of another kind than it takes; the parser has said so.
    """
    distributions(space)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.yaml"
        path.write_text(config)
        for name, entry in space.items():
            for value in entry if isinstance(entry, list) else (entry["low"], entry["high"]):
                cli.configured("train", ["-c", str(path), _flag(name, value)])


def _flag(name: str, value: Any) -> str:
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


# ---- this machine's processes ------------------------------------------------------------------------------------------------


class _Workers:
    """Starts the processes of this machine and starts anew those that were killed, until the study has no trial left."""

    def __init__(self, order: dict[str, Any], number: int):
        self.order, self.number = order, number
        self.folder = Path(order["folder"])
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(GONE) and k not in RANKS}
        environment.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // number, 1)))
        # this very package, even where the current folder holds another one named experiments
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
        )
        self.environment = environment
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        self.devices = visible or [str(i) for i in range(torch.cuda.device_count())]

    def start(self, index: int) -> None:
        environment = dict(self.environment)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[index % len(self.devices)]
        with (self.folder / f"worker-{index}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "experiments.sweep.command"],
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
        total, monitor = self.order["trials"], self.order["settings"]["monitor"]
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
                f"{self.folder}: {total} trials, {self.number} worker{'s' * (self.number > 1)}; worker-*.log say more",
                soft_wrap=True,
            )
            try:
                for index in range(self.number):
                    self.start(index)
                said = {t.number for t in study.trials() if t.state.is_finished()}
                progress, losses, last = -1, 0, False
                while not last:
                    last, trials = not self.processes, study.trials()
                    for trial in trials:
                        if trial.state.is_finished() and trial.number not in said:
                            said.add(trial.number)
                            console.print(_line(trial, monitor), soft_wrap=True, highlight=False)
                    best = study.best(trials)
                    shown = (
                        f"{self.order['name']}, best {best.value:.4f} (trial {best.number})"
                        if best
                        else self.order["name"]
                    )
                    bar.update(task, completed=len(said), description=shown)
                    if (now := len(said) + sum(len(t.intermediate_values) for t in trials)) != progress:
                        progress, losses = now, 0
                    losses += self._replace_lost()
                    if losses > LOSSES:
                        raise ValueError(
                            f"workers end again and again without any progress; {self.folder}/worker-0.log says why"
                        )
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
                log = (self.folder / f"worker-{index}.log").read_text()
                said = [line for line in log.splitlines() if line.startswith("ehr: ")]
                raise ValueError(
                    said[-1].removeprefix("ehr: ")
                    if said
                    else f"worker {index} ended: see {self.folder}/worker-{index}.log"
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


def _line(trial: optuna.trial.FrozenTrial, monitor: str) -> str:
    parameters = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    if trial.state == TrialState.COMPLETE:
        said = f"{monitor} {trial.value:.4f}"
    elif trial.state == TrialState.PRUNED:
        said = f"pruned after epoch {max(trial.intermediate_values, default=0)}"
    else:
        said = f"failed: {trial.user_attrs.get('reason', 'no reason was recorded')}"
    return f"trial {trial.number:3d}  {said}  [dim]{parameters}[/]"


# ---- one worker ----------------------------------------------------------------------------------------------------------------


def work(order: dict[str, Any]) -> None:
    """Run trials of a study until none is left, or until the process that started this one is gone."""
    with Study(order["name"], order["storage"], order["settings"]) as study:
        while os.getppid() == order["parent"]:
            trial = study.claim(order["trials"])
            if trial is not None:
                attempt(study, trial, order["name"], Path(order["folder"]), order["parent"])
            elif study.finished(order["trials"]):
                return
            else:
                time.sleep(1)  # another process may die, and its trial is then ours


def attempt(study: Study, trial: Trial, name: str, folder: Path, parent: int) -> None:
    """Train one trial and say in the study what became of it; goes on where a process before this one left it."""
    place = f"trial-{trial.number:04d}"
    arguments = ["-c", str(folder / "train.yaml"), *(_flag(k, v) for k, v in trial.params.items())]
    arguments += [f"--runs={folder}", f"--name={place}", "--data.split=val"]

    def report(epoch: int, row: dict[str, float]) -> None:
        study.report(trial, epoch, row[monitor])
        if os.getppid() != parent:
            raise KeyboardInterrupt

    try:
        values = cli.configured("train", arguments)
        monitor = values["monitor"]
        for key, fact in (
            ("config", values["config"]),
            ("seed", values["seed"]),
            ("run", str(folder / place)),
            ("host", platform.node()),
        ):
            trial.set_user_attr(key, fact)
        verbs.train(**{**values, "resume": True}, trial=run.Trial(name, trial.number, trial.params, report))
        epochs = pl.read_csv(folder / place / "metrics.csv").sort(
            monitor, descending=MONITORS[monitor] == "max", maintain_order=True
        )
        best = epochs.row(0, named=True)
        study.end(trial, TrialState.COMPLETE, best[monitor], metrics=best)
    except optuna.TrialPruned:
        study.end(trial, TrialState.PRUNED)
        verbs.end_log({"state": "pruned"})
    except KeyboardInterrupt:
        study.spare(trial)
        raise
    except OSError:
        raise  # the disk: no fault of the trial
    except SystemExit:
        study.end(trial, TrialState.FAIL, reason="its command line was refused: see the worker's log")
    except ValueError as error:
        print(f"{place}: {error}", flush=True)
        study.end(trial, TrialState.FAIL, reason=str(error))
        verbs.end_log({"state": "failed"}, failed=True)
    except Exception as error:
        if server_lost(error):
            raise
        traceback.print_exc()
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(
            r"out of memory|can't allocate memory", str(error)
        )
        said = " ".join(str(error).split())[:500]
        study.end(trial, TrialState.FAIL, reason=cli.NO_MEMORY if memory else f"{type(error).__name__}: {said}")
        verbs.end_log({"state": "failed"}, failed=True)
        raise SystemExit(RENEW) from error


if __name__ == "__main__":
    cli.guarded(lambda: work(json.load(sys.stdin)), "ehr sweep --help")
