"""Training as `make gpu-check` measures it: every model for a few hundred steps, with the CUDA kernels, Triton's scan and PyTorch's."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.module import ICUDataModule, SyntheticMIMICIV
from ehrmodels.base import ICUModule
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE
from experiments.benchmarks.gpu_build import line

PATHS = {"kernel": "cuda", "triton": "triton", "pytorch": "torch"}  # column -> EHR_SCAN
STEPS, WARMUP, STAYS, WORKERS = 500, 20, 4000, 4
MODELS = {"Fusion": Fusion} | {
    f"HyMaTE {a}": (lambda a=a: HyMaTE(attention=a)) for a in ("token", "variable", "channel")
}


class Row(NamedTuple):
    """One measure of one thing: with the CUDA kernel, Triton, PyTorch, between PyTorch and the others; none may exceed ``limit``."""

    what: str
    measure: str
    kernel: float | None = None
    triton: float | None = None
    pytorch: float | None = None
    between: float | None = None
    limit: float | None = None
    outcome: str = ""


def measured(what: str, measure: str, found: Mapping[str, float | None], limit: float | None = None) -> Row:
    """A row of the values ``found`` by column, judged if there is a limit; what is no number exceeds it."""
    held = limit is not None and all(value is not None and value <= limit for value in found.values())
    outcome = "" if limit is None else "ok" if held else "FAILS"
    return Row(what, measure, limit=limit, outcome=outcome, **found)


def attempt(what: str, call: Callable[[], list[Row]]) -> list[Row]:
    """The rows of ``call``; where it breaks off, one row that says so, which is a failure unless memory was short."""
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


def start_memory(device: torch.device) -> int:
    """Begin to measure; the bytes that are taken now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device, before: int) -> float | None:
    """Most MB above ``before`` since ``start_memory``."""
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6 if device.type == "cuda" else None


class Meter(Callback):
    """Marks when each batch has arrived and when its step has ended, and keeps its loss."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, start_memory(device)
        self.starts: list[Any] = []
        self.ends: list[Any] = []
        self.sizes: list[int] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(mark(self.device))
        self.sizes.append(len(batch.row))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach().float())
        self.ends.append(mark(self.device))

    def result(self) -> dict[str, float | None]:
        """After the first steps: samples a second, time without a batch; of all: peak memory, last quarter's loss over the first's."""
        first, quarter = min(WARMUP, len(self.starts) // 2), max(len(self.losses) // 4, 1)
        whole = seconds(self.starts[first], self.ends[-1])
        waiting = sum(seconds(a, b) for a, b in zip(self.ends[first:], self.starts[first + 1 :], strict=False))
        loss = torch.stack(self.losses)
        return {
            "samples a second": sum(self.sizes[first:]) / whole,
            "% of time waiting for data": 100 * waiting / whole,
            "peak MB": peak_memory(self.device, self.before),
            "loss, last quarter over first": float(loss[-quarter:].mean() / loss[:quarter].mean()),
        }


def train_all(
    device: torch.device, columns: Sequence[str], folder: Path, steps: int = STEPS, stays: int = STAYS
) -> list[Row]:
    """Train every model in every column, and in the first also with processes that build batches; its loss must be finite and fall."""
    data = SyntheticMIMICIV(root=str(folder / f"mimiciv-{stays}"), stays=stays, cache=str(folder / "store"))
    try:
        data.prepare_data()
        data.setup()
    except Exception as error:
        return [Row("training", f"left out: {line(error)}")]
    rows: list[Row] = []
    for name, workers in ((n, w) for n in MODELS for w in (0, WORKERS)):
        what = f"{name}, {workers} workers"
        found: dict[str, dict[str, float | None]] = {}
        data.num_workers = workers
        for column in (columns if name != "Fusion" else ("pytorch",))[: 1 if workers else None]:
            rows += attempt(f"{what}, {column}", partial(train, MODELS[name], data, column, device, steps, found))
        for measure in next(iter(found.values()), {}):
            limit = 1.0 if measure.startswith("loss") else None
            rows.append(measured(what, measure, {column: values[measure] for column, values in found.items()}, limit))
    return rows


def train(
    make: Callable[[], ICUModule],
    data: ICUDataModule,
    column: str,
    device: torch.device,
    steps: int,
    found: dict[str, dict[str, float | None]],
) -> list[Row]:
    """Train a new model; ``found`` gets what ``Meter`` measured; no rows."""
    torch.manual_seed(0)
    model = make()
    data.view = model.view
    assert data.spec is not None
    model.initialise(data.spec, data.positive_weight())
    meter = Meter(device)
    with scanning(column), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning asks for more workers
        lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=[meter],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, data)
    found[column] = meter.result()
    return []
