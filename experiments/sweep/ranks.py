"""A trial on several devices: its worker starts a process a device, its ranks, and alone talks to the study.

The worker is no rank itself and holds no device, so whatever happens to a rank, the study hears of it. The first rank tells the
worker of every epoch and is told whether to go on, which it hands to the others; the first word on how training ended, of any
rank, ends the others. Ranks live as long as one training, and no longer than their worker.
"""

import multiprocessing
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

import optuna
import torch

from experiments import cli, distributed, fit, tracking, train
from experiments.processes import why_failed

ALIKE_SECONDS = 5  # in which the first rank also says what another has failed of
CLOSING_SECONDS = 30  # that it then has for its run at Weights & Biases


class RankLostError(Exception):
    """A rank ended without a word, as one that is killed does."""


def train_on(devices: int, arguments: list[str], trial: fit.Trial) -> None:
    """Train, or go on with, a trial in as many processes as it has devices.

    Args:
        devices: those of this machine that the worker may use.
        arguments: of ``ehr train``.
        trial: what a sweep adds; its ``report`` is called here.

    Raises:
        ValueError: training failed; says why.
        OSError: the disk failed.
        RankLostError: a rank was killed.
        Exception: whatever ``trial.report`` raises.
    """
    # Ranks meet at a store of this process: one of the first rank would need a port that is still free when it gets there.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning"])  # takes longest, and neither starts threads nor looks for a GPU
    processes, lines = [], list[Connection]()
    try:
        for rank in range(devices):
            line, its_end = context.Pipe()
            told = (its_end, rank, store.port, arguments, trial[:3])
            process = context.Process(target=_rank, args=told)
            process.start()
            its_end.close()
            processes.append(process)
            lines.append(line)
        word, speaker = _listen(lines, trial)
        if speaker is lines[0] or lines[0].poll(ALIKE_SECONDS):
            processes[0].join(CLOSING_SECONDS)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    if word is not None:
        raise word


def _listen(lines: list[Connection], trial: fit.Trial) -> tuple[Exception | None, Connection]:
    """Hand on the epochs of the first rank until it has trained, or any has failed: the word on that, and whose it is."""
    first, left = lines[0], list(lines)
    while True:
        heard = {line: _word(line) for line in wait(left) if isinstance(line, Connection)}
        # a rank that failed says so before it ends, which others that end of it notice later: words come first
        for line, word in heard.items():
            if isinstance(word, Exception) and not isinstance(word, RankLostError):
                return word, line
        for line, word in heard.items():
            if isinstance(word, RankLostError):
                raise word
            if isinstance(word, tuple):
                try:
                    trial.report(*word)
                except optuna.TrialPruned:
                    line.send(False)
                else:
                    line.send(True)
            elif line is first:
                return None, line
            else:
                left.remove(line)


def _word(line: Connection) -> Any:
    """(epoch, metrics), an error, or None where training is over."""
    try:
        return line.recv()
    except (EOFError, ConnectionError):
        return RankLostError("a process of the trial was killed")


def _rank(line: Connection, rank: int, port: int, arguments: list[str], trial: tuple[str, int, dict[str, Any]]) -> None:
    """One of the processes of a training; what it says last is None, or the error that ended it."""
    distributed.join(rank, port)

    def report(epoch: int, row: dict[str, float]) -> None:
        line.send((epoch, row))
        if not line.recv():
            raise optuna.TrialPruned(f"pruned after epoch {epoch}")

    try:
        values = cli.configured("train", arguments)
        train.train(**{**values, "resume": True}, trial=fit.Trial(*trial, report))
        line.send(None)
    except (optuna.TrialPruned, OSError) as error:
        line.send(error)
        if isinstance(error, optuna.TrialPruned):
            tracking.end({"state": "pruned"})
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        line.send(ValueError(str(error) if isinstance(error, ValueError) else why_failed(error)))
        tracking.end({"state": "failed"}, failed=True)
