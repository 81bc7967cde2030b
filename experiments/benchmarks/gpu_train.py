"""Training as `make gpu-check` measures it: models, batches, scans, torch.compile and the ways in which samples come."""

import gc
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from datamodules.module import ICUDataModule, SyntheticMIMICIV
from ehrmodels.base import ICUModule
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE
from experiments.benchmarks.gpu_measure import (
    PATHS,
    Deadline,
    Row,
    attempt,
    idle,
    mark,
    measured,
    peak_memory,
    scanning,
    seconds,
    start_memory,
    synchronize,
)

STEPS, LEAST, SECONDS = 300, 30, 4.0  # measured after warming up: at most; at least, and then for so long
WARMUP, PROFILED = 20, 20  # steps
SAMPLES = {"resident": None, "4 processes": 4, "0 processes": 0}  # how they come -> num_workers
COMPILE = (None, "default", "reduce-overhead")
MODELS: dict[str, Callable[..., ICUModule]] = {
    "Fusion": Fusion,
    **{f"HyMaTE {a}": partial(HyMaTE, attention=a) for a in ("variable", "token", "channel")},
}
SPEED, WAITING, IDLE = "stays a second", "% of time waiting for data", "% of time without a kernel running"
LOSS = "loss, last quarter over first"
TARGETS = {WAITING: "at most 5", IDLE: "at most 20"}
FASTEST = {"Fusion": "at least 20,000", "HyMaTE": "at least 8,000"}  # in batches of at least 256


class Setting(NamedTuple):
    """How a model is trained."""

    model: str
    batch: int
    samples: str = "resident"
    compile: str | None = None

    def __str__(self) -> str:
        return f"{self.model}, batches of {self.batch}, {self.samples}, {self.compile or 'eager'}"


def settings(models: Sequence[str], batches: Sequence[int]) -> list[Setting]:
    """All that are measured, those that tell most first; what comes from processes is not also compiled."""
    ways: list[Any] = [("resident", mode) for mode in COMPILE] + [(s, None) for s in SAMPLES if s != "resident"]
    places = itertools.product(range(len(ways)), range(len(batches)))
    order = sorted(places, key=sum)  # of the first ways all batches, of the first batches all ways
    return [Setting(model, batches[b], *ways[w]) for w, b in order for model in models]


def simulated(folder: Path, stays: int) -> ICUDataModule:
    """The data that all train on; they are kept in ``folder``."""
    data = SyntheticMIMICIV(root=str(folder / f"mimiciv-{stays}"), stays=stays, cache=str(folder / "store"))
    data.prepare_data()
    data.setup()
    return data


class Meter(Callback):
    """Marks when each batch has arrived and when its step has ended, keeps its loss, and ends the training.

    Args:
        device: that trains.
        warm: steps that do not count.
        most: of those that do; fewer are measured where they take long.
    """

    def __init__(self, device: torch.device, warm: int, most: int):
        self.device, self.before, self.begun = device, start_memory(device), time.perf_counter()
        self.warm, self.most, self.last = warm, most, 0
        self.first_step = self.warmed = self.graphs = 0.0
        self.starts: list[Any] = []
        self.ends: list[Any] = []
        self.sizes: list[int] = []
        self.losses: list[Tensor] = []
        self.profile: Any = None
        self.idle: float | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(mark(self.device))
        self.sizes.append(len(batch.row))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach().float())
        self.ends.append(mark(self.device))
        done, now = len(self.ends), time.perf_counter()
        if done == 1:
            synchronize(self.device)
            self.first_step = time.perf_counter() - self.begun
        if done == self.warm:
            self.warmed, self.graphs = now, counters["stats"]["unique_graphs"]
        after = done - self.warm
        if not self.last and (after >= self.most or (after >= LEAST and now - self.warmed > SECONDS)):
            self.last = done
            self._start_profile()
        if self.last and (self.profile is None or done == self.last + PROFILED):
            self._stop_profile()
            trainer.should_stop = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.profile is not None:
            self.profile.stop()  # or the next could not start

    def _start_profile(self) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.profile = profile(
                activities=[ProfilerActivity.CUDA], acc_events=True
            )  # or it warns of its own default
            self.profile.start()
            self.profiled = time.perf_counter()

    def _stop_profile(self) -> None:
        if self.profile is None:
            return
        synchronize(self.device)
        whole = 1e6 * (time.perf_counter() - self.profiled)
        self.profile.stop()
        ran = [e for e in self.profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        kernels = [e for e in ran if not e.name.startswith(("Memcpy", "Memset"))]
        self.idle = idle([(e.time_range.start, e.time_range.end) for e in kernels], whole)
        self.profile = None

    def result(self) -> dict[str, float | None]:
        """What was measured after warming up, by name; peak memory, graphs and loss are of all steps."""
        first, last, quarter = self.warm, self.last, max(self.last // 4, 1)
        whole = seconds(self.ends[first - 1], self.ends[last - 1])
        waiting = sum(
            seconds(*pair) for pair in zip(self.ends[first - 1 : last - 1], self.starts[first:last], strict=True)
        )
        loss, graphs = torch.stack(self.losses[:last]), counters["stats"]["unique_graphs"]
        return {
            SPEED: sum(self.sizes[first:last]) / whole,
            WAITING: 100 * waiting / whole,
            IDLE: None if self.idle is None else 100 * self.idle,
            "peak MB": peak_memory(self.device, self.before),
            "seconds to the first step": self.first_step,
            "graphs compiled": graphs,
            "graphs compiled after warming up": graphs - self.graphs,
            LOSS: float(loss[-quarter:].mean() / loss[:quarter].mean()),
        }


def train_all(
    data: ICUDataModule,
    device: torch.device,
    waiting: list[Setting],
    columns: Sequence[str],
    deadline: Deadline,
    final: bool = True,
    steps: int = STEPS,
) -> Iterator[list[Row]]:
    """Train in every setting with every scan; the loss must be finite and fall.

    Args:
        data: set up.
        device: that trains.
        waiting: settings; those that were measured are taken away.
        columns: scans that can be used, the fastest first. PyTorch's is slow and measured in one setting alone.
        deadline: when to begin nothing more.
        final: what is left then gets a row that says so.
        steps: that are measured at most.
    """
    while waiting and (final or deadline.left()):
        setting = waiting.pop(0)
        found: dict[str, dict[str, float | None]] = {}
        rows: list[Row] = []
        for column in chosen(setting, columns):
            call = partial(train, setting, data, column, device, steps, found)
            rows += attempt(f"{setting}, {PATHS[column]}", call, deadline)
        for measure in next(iter(found.values()), {}):
            target = TARGETS.get(measure, "")
            if measure == SPEED and setting.batch >= 256:
                target = FASTEST[setting.model.split()[0]]
            values = {column: result[measure] for column, result in found.items()}
            limit = 1.0 if measure == LOSS else None
            rows.append(measured(str(setting), measure, values, limit, target))
        yield rows


def chosen(setting: Setting, columns: Sequence[str]) -> list[str]:
    """The scans that a setting is measured with; where samples come from processes the fastest will do."""
    if setting.model == "Fusion":
        return ["pytorch"]  # has no scan
    plain = setting.samples == "resident" and setting.compile is None
    fast = [c for c in columns if c != "pytorch" or (plain and setting.batch == 64)]
    return fast if setting.samples == "resident" else fast[:1]


def train(
    setting: Setting,
    data: ICUDataModule,
    column: str,
    device: torch.device,
    steps: int,
    found: dict[str, dict[str, float | None]],
) -> list[Row]:
    """Train a new model; ``found`` gets what ``Meter`` measured; no rows."""
    data.trainer = None  # the one before keeps its model and samples
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = MODELS[setting.model](compile=setting.compile)
    data.view, data.batch_size, data.num_workers = model.view, setting.batch, SAMPLES[setting.samples]
    assert data.spec is not None
    model.initialise(data.spec, data.positive_weight())
    epoch = -(-len(data.rows("train")) // setting.batch)  # in which resident samples are made
    meter = Meter(device, max(WARMUP, epoch), steps)
    with scanning(column), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning asks for more workers
        lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=meter.warm + steps + PROFILED,  # the learning rate falls until then
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
