"""What the parts of `make gpu-check` share: rows, the time that is left, and marks in the device's queue of work."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from experiments.benchmarks.gpu_build import line

PATHS = {"kernel": "cuda", "triton": "triton", "pytorch": "torch"}  # column -> EHR_SCAN
NO_TIME = "left out: time was up"


class Row(NamedTuple):
    """One measure of one thing: with the CUDA kernel, Triton, PyTorch, between two of them or two runs.

    None may exceed ``limit``, or ``outcome`` says that it fails; ``target`` is told and not judged.
    """

    what: str
    measure: str
    kernel: float | None = None
    triton: float | None = None
    pytorch: float | None = None
    between: float | None = None
    limit: float | None = None
    target: str = ""
    outcome: str = ""


def measured(
    what: str, measure: str, found: Mapping[str, float | None], limit: float | None = None, target: str = ""
) -> Row:
    """A row of the values ``found`` by column, judged if there is a limit; what is no number exceeds it."""
    held = limit is not None and all(value is not None and value <= limit for value in found.values())
    outcome = "" if limit is None else "ok" if held else "FAILS"
    return Row(what, measure, limit=limit, target=target, outcome=outcome, **found)


class Deadline:
    """Until when something new is begun; what has begun then is finished."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return max(self.end - time.monotonic(), 0.0)

    def part(self, share: float) -> "Deadline":
        """An earlier one, after a share of the time that is left."""
        return Deadline(share * self.left())


def attempt(what: str, call: Callable[[], list[Row]], deadline: Deadline) -> list[Row]:
    """The rows of ``call``; one row says that there was no time for it, or that it broke off, which is a failure unless
    memory was short."""
    if not deadline.left():
        return [Row(what, NO_TIME)]
    try:
        return call()
    except torch.cuda.OutOfMemoryError:
        return [Row(what, "left out: not enough memory")]
    except Exception as error:
        return [Row(what, "broke off", outcome=f"FAILS: {line(error)}")]


@contextmanager
def scanning(column: str) -> Iterator[None]:
    """Let ``ehrmodels.scan`` use the "kernel", "triton", or "pytorch"."""
    before = os.environ.get("EHR_SCAN")
    os.environ["EHR_SCAN"] = PATHS[column]
    try:
        yield
    finally:
        del os.environ["EHR_SCAN"]
        if before is not None:
            os.environ["EHR_SCAN"] = before


def mark(device: torch.device) -> Any:
    """A point in time: on CUDA in the device's queue of work, so that nothing waits for it; else on the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(first: Any, last: Any) -> float:
    """Between two marks."""
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> int:
    """Begin to measure; the bytes that are taken now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device, before: int) -> float | None:
    """Most MB above ``before`` since ``start_memory``."""
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6 if device.type == "cuda" else None


def idle(intervals: Sequence[tuple[float, float]], whole: float) -> float | None:
    """Share of a time in which nothing ran.

    Args:
        intervals: beginnings and ends of what ran, in any order; they may overlap.
        whole: the time, in the same unit.

    Returns:
        From 0 to 1; None where nothing is known to have run.
    """
    busy, reached = 0.0, -float("inf")
    for begin, end in sorted(intervals):
        busy += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return max(1 - busy / whole, 0.0) if intervals else None
