"""The processes of this machine that share a queue of trainings: started, one a device in turn, watched, and replaced when killed."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import cli, mistakes
from experiments.files import console

RENEW = 75  # exit status of a worker whose device is not to be trusted any more; another process takes its place
LOSSES = 20  # workers that may be lost without any progress before the command gives up
LAUNCHER_PREFIXES = (
    "SLURM_",
    "PMI_",
    "OMPI_",
)  # left out of a worker's environment: a training is a process of its own
LAUNCHER_VARIABLES = (
    "WANDB_SERVICE",  # of the command's own process: it would keep the run of a worker that was killed open
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


class Standing(NamedTuple):
    """How far the work is.

    Attributes:
        ended: what has ended -> a line on what became of it.
        shown: a few words beside the bar.
        progress: any number that changes as long as something gets on.
    """

    ended: dict[Any, str]
    shown: str
    progress: int


class Workers:
    """Starts the processes of this machine and starts anew those that were killed, until none is left to do.

    Args:
        module: what a process runs, its ``main``; that reads ``order`` and its parent's process id as JSON, and ends with
            status 0 where nothing is left to do, and 2 where it would be the same for any other.
        order: of whatever the module needs, ``name`` and ``folder``.
        number: of processes.
        devices: of each of them.
    """

    def __init__(self, module: str, order: dict[str, Any], number: int, devices: int = 1):
        self.module, self.order, self.number, self.each = module, order, number, devices
        self.folder = Path(order["folder"])
        # of this host and command: several may share the folder, such as the tasks of one srun
        self.log_name = f"worker-{platform.node()}-{os.getpid()}"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES) and k not in LAUNCHER_VARIABLES
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(_cores() // (number * devices), 1)))
        # this very package, even where the current folder holds another one named experiments
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
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
            own = range(index * self.each, (index + 1) * self.each)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[i % len(self.devices)] for i in own)
        with self.log(index).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "experiments.imports", self.module],
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

    def run(self, standing: Callable[[], "Standing"], total: int, what: str) -> None:
        """Work until all processes have ended by themselves, and show how far they are.

        Args:
            standing: how far the work is; asked twice a second.
            total: how much there is to do.
            what: of what.
        """
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
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
                f"{self.folder}: {total} {what}, {self.number} worker{'s' * (self.number > 1)}"
                f"{f' of {self.each} devices' if self.each > 1 else ''}; {self.log_name}-*.log say more",
                soft_wrap=True,
            )
            try:
                for index in range(self.number):
                    self.start(index)
                told = set(standing().ended)
                progress, losses, last = -1, 0, False
                while not last:
                    last, now = not self.processes, standing()
                    for key, line in now.ended.items():
                        if key not in told:
                            told.add(key)
                            console.print(line, soft_wrap=True, highlight=False)
                    bar.update(task, completed=len(told), description=now.shown)
                    if now.progress != progress:
                        progress, losses = now.progress, 0
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


def why_failed(error: Exception) -> str:
    """One line on an error that nobody foresaw."""
    message = " ".join(str(error).split())[:500]
    return cli.NO_MEMORY if mistakes.out_of_memory(error) else f"{type(error).__name__}: {message}"


def _cores() -> int:
    """Cores that this process may use, where the system tells; macOS tells only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
