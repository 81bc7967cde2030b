"""Training on several processes: which of them this one is, what they tell each other, and what happens when one of them ends."""

import logging
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities import rank_zero as fabric_rank_zero
from lightning.pytorch.utilities import rank_zero

from ehrmodels.base import is_distributed
from experiments import files

ENDED = "another process of this training ended; the same command with --resume continues"
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
PARENT = "EHR_TRAINING_PARENT"  # process id of the one that started this one
ALIKE_SECONDS = 10  # in which all processes that fail for one reason have failed
_joined = False  # whether this process is one of a group that another started and hears of
# What torch says in a process that waits for one that is gone.
GONE = re.compile(
    r"Connection (was likely )?(closed|reset)|Broken pipe|pair closure|Socket closed|recvValue|NCCL.*(remote|abort|time)",
    re.I | re.S,
)


@contextmanager
def distributed_run(trainer: dict[str, Any]) -> Iterator[None]:
    """Train as one of the processes that the trainer's arguments ask for; all but the first print nothing and write no file.

    Lightning, torchrun and SLURM each run the whole command once a process. A process that notices that another is gone ends
    with one message, whether it waits for that other one or not.

    Raises:
        ValueError: the arguments suit neither each other nor the number of processes that were started.
    """
    rank, world = _place(trainer)
    if world == 1:
        fabric_rank_zero.rank_zero_only.rank = rank_zero.rank_zero_only.rank = 0  # whatever the environment says
        yield
        return
    if rank:
        files.console.quiet = True
        logging.disable()
        warnings.simplefilter("ignore")
    watch, main = _Watch(rank), threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
        watch.stop()
        for process in watch.children():
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
    except BaseException as error:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as another process is gone
        if _lost(error) and not os.environ.get("EHR_TRACEBACK"):
            watch.end()
        if isinstance(error, KeyboardInterrupt) and _first_is_gone() and not os.environ.get("EHR_TRACEBACK"):
            watch.end()
        if rank and not _joined and isinstance(error, Exception | KeyboardInterrupt):
            time.sleep(
                ALIKE_SECONDS
            )  # the first process says it, and ends this one, if it has failed for the same reason
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(130) from None
        watch.stop()
        for process in watch.children():
            process.kill()
        if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):  # of torch.distributed
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the processes of this training cannot talk to each other: {reason}; see MASTER_ADDR and MASTER_PORT"
            ) from error
        raise
    finally:
        watch.stop()
        if main:
            signal.signal(signal.SIGTERM, handler)


def join(rank: int, port: int) -> None:
    """Become one of the processes of one machine that train together, started by ``multiprocessing``; it ends with its parent.

    Args:
        rank: number of this process among them.
        port: of the parent's ``torch.distributed.TCPStore``, where they meet.
    """
    global _joined
    _joined = True
    files.console.quiet = rank > 0
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is there
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _place(trainer: dict[str, Any]) -> tuple[int, int]:
    """Number of this process among all, and how many there are."""
    strategy, accelerator = trainer.get("strategy") or "auto", trainer.get("accelerator") or "auto"
    if strategy not in STRATEGIES:
        raise ValueError(f"--trainer.strategy {strategy} is not supported; choose among {', '.join(STRATEGIES)}")
    if strategy == "fsdp" and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise ValueError(
            "--trainer.strategy fsdp needs GPUs, and training here would be on the CPU: use --trainer.strategy ddp"
        )
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes") or 1
    rank, world = 0, 1
    if not _alone(trainer):
        arguments = {"devices": devices, "num_nodes": nodes, "strategy": strategy, "accelerator": accelerator}
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        try:
            probe = lightning.Trainer(**arguments, **quiet, plugins=environment(trainer))
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"--trainer.devices {devices} with --trainer.accelerator {accelerator}: {error}"
            ) from error
        rank, world = probe.global_rank, probe.num_devices * probe.num_nodes
    elastic = TorchElasticEnvironment.detect()
    started = (
        int(os.environ["WORLD_SIZE"])
        if elastic
        else int(os.environ["SLURM_NTASKS"])
        if _slurm() and world > 1
        else world
    )
    if started != world:
        who = "torchrun" if elastic else "SLURM"
        time.sleep(ALIKE_SECONDS if int(os.environ["RANK" if elastic else "SLURM_PROCID"]) else 0)  # the first says it
        raise ValueError(
            f"{who} started {started} processes, but --trainer.devices {devices} on --trainer.num_nodes {nodes} make {world}: "
            "give the number of processes of a node as --trainer.devices"
        )
    if world > 1 and not elastic and _slurm() and "SLURM_STEP_ID" not in os.environ:
        raise ValueError(
            f"SLURM has {started} tasks for this job, but srun did not start this process: put srun before the command"
        )
    return rank, world


def _alone(trainer: dict[str, Any]) -> bool:
    return str(trainer.get("devices", 1)) == "1" and (trainer.get("num_nodes") or 1) == 1


def _slurm() -> bool:
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def environment(trainer: dict[str, Any]) -> list[Any]:
    """Lightning's plugins that say who started the processes, where it would find out wrongly."""
    if TorchElasticEnvironment.detect() or not _slurm():
        return []
    if _alone(trainer):
        return [LightningEnvironment()]  # tasks of one device each know nothing of one another
    os.environ.setdefault(
        "SLURM_NTASKS_PER_NODE", str(int(os.environ["SLURM_NTASKS"]) // (trainer.get("num_nodes") or 1))
    )
    return [SLURMEnvironment(auto_requeue=False)]  # slurm.sh does that, and last.ckpt is all it takes


def rank_and_world() -> tuple[int, int]:
    """Number of this process among those that train together, and how many they are."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in all of them."""
    if not is_distributed():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def broadcast(value: bool) -> bool:
    """What the first process says."""
    if not is_distributed():
        return value
    decision = torch.tensor(float(value), device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.broadcast(decision, 0)
    return bool(decision)


_first: list[tuple[str, int]] = []  # machine and process id of the first process of each machine


def end_with_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: Lightning's answer is to wait for the others, which may never come."""
    if is_distributed():
        mine = (platform.node(), os.getpid(), os.environ.get("LOCAL_RANK", "0"))
        _first[:] = [(machine, process) for machine, process, local in all_gather(mine) if local == "0"]
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _first_is_gone() -> bool:
    """Whether the first process of this machine has ended, which torchrun answers with SIGTERM to the others."""
    for machine, process in _first:
        if machine == platform.node():
            try:
                os.kill(process, 0)
            except OSError:
                return True
    return False


_launchers: list[Any] = []  # of Lightning, which hold the processes that this one has started


def watch_launcher(launcher: Any) -> None:
    """Notice when a process that Lightning's launcher will start ends before its time."""
    _launchers.append(launcher)


def _lost(error: BaseException | None) -> bool:
    """Whether an error, or one in whose course it came, says that another process is gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Watch:
    """Looks twice a second whether the processes that this one depends on are still there."""

    def __init__(self, rank: int):
        self.local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or rank)
        self.by_lightning = (
            PARENT in os.environ
        )  # which makes the first process the parent of all others of its machine
        self.parent = int(os.environ.get(PARENT, os.getppid()))
        self.orphan_ends = self.by_lightning or TorchElasticEnvironment.detect()
        os.environ[PARENT] = str(os.getpid())
        self.over = threading.Event()
        self.once = threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    @staticmethod
    def children() -> list[Any]:
        return [process for launcher in _launchers for process in getattr(launcher, "procs", ())]

    def stop(self) -> None:
        self.over.set()
        os.environ.pop(PARENT, None)

    def _look(self) -> None:
        while not self.over.wait(0.5):
            if self._orphan() or any(process.poll() for process in self.children()):
                self.end()

    def _orphan(self) -> bool:
        return self.orphan_ends and os.getppid() != self.parent

    def end(self) -> None:
        """Say once that another process is gone, and end this one and those that it has started."""
        if not self.once.acquire(blocking=False):
            time.sleep(60)  # another thread is about to end this process
        if self.by_lightning:
            time.sleep(0.2)  # the parent's connections close before it is gone
        if self.over.is_set() and threading.current_thread() is not threading.main_thread():
            return
        for process in self.children():
            process.kill()
        # one of a machine says it: its first process, or where that is gone its second
        if self.local == 0 or (self.local == 1 and self._orphan() == self.by_lightning):
            print(f"ehr: {ENDED}", file=sys.stderr, flush=True)
        os._exit(1)
