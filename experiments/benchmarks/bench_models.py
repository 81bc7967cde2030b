"""`make bench`: training throughput of the models on batches of PhysioNet 2012, beside a Transformer encoder and an LSTM.

``--root`` names the folder with the published files. Without it stays are simulated that are as long as those of 2012, which is all
that the time depends on. Results go to ``experiments/results/throughput.csv``, and those of torch.compile, on one epoch of all models,
to ``compile.csv`` (of some models alone: ``--compile Fusion,GRUD``, which prints them and leaves the file as it is).

Shape letters: B samples, N observations, D width.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

import ehrmodels
from datamodules.contract import Batch, Spec, Triplets
from datamodules.dictionary import CONCEPTS, mapping
from datamodules.hospitals.physionet2012 import HOURS
from datamodules.module import ICUDataModule, PhysioNet2012
from datamodules.schema import STAYS, conform
from ehrmodels.base import ICUModule
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE, scalar_embedding
from experiments.benchmarks.bench_scan import RESULTS, console, record, seconds, training_step

WIDTH, LAYERS, STATE, HEADS = 64, 3, 16, 4
BATCH, BATCHES = 32, 25  # stays in a batch; batches of an epoch that are timed
# Quantiles of the observations of a stay in sets b and c (7,991 stays, mean 468): what simulated stays are drawn from.
QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
LENGTHS = (3, 57, 273, 384, 460, 545, 700, 832, 1208)


COMPILED: dict[str, tuple[Any, dict[str, Any]]] = {  # at their defaults
    "Fusion": (ehrmodels.Fusion, {}),
    "Fusion concat": (ehrmodels.Fusion, {"fusion": "concat"}),
    "Fusion cross_attention": (ehrmodels.Fusion, {"fusion": "cross_attention"}),
    **{
        name: (getattr(ehrmodels, name), {})
        for name in ("TabM", "LSTM", "BiLSTM", "TCN", "GRUD", "Transformer", "STraTS")
    },
    **{f"HyMaTE {a}": (ehrmodels.HyMaTE, {"attention": a}) for a in ("variable", "token", "channel")},
    "HyMaTEForecast": (ehrmodels.HyMaTEForecast, {}),
    "Mamba": (ehrmodels.Mamba, {}),
}


class Simulated(PhysioNet2012):
    """Stays as long as those of PhysioNet 2012, with random observations."""

    name = "SimulatedLengths2012"

    def __init__(self, stays: int = 6000, **kwargs: object):
        super().__init__(str(Path(__file__).parent), **kwargs)  # type: ignore[arg-type]
        self.count = stays

    def files(self) -> list[Path]:
        return [Path(__file__)]

    def extraction(self) -> dict[str, int]:
        return {"stays": self.count}

    def stays(self) -> pl.DataFrame:
        died = np.random.default_rng(1).random(self.count) < 0.14
        stays = pl.DataFrame({"stay_id": np.arange(self.count), "hospital_death": died}).with_columns(
            patient_id=pl.col("stay_id").cast(pl.String),
            hospital_id=pl.when(pl.col("stay_id") % 2 == 0).then(pl.lit("b")).otherwise(pl.lit("c")),
            stay_number=1,
            age=60.0,
            icu_minutes=HOURS * 60,
        )
        return conform(stays, STAYS, "simulated stays")

    def tables(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        rng = np.random.default_rng(0)
        length = np.interp(rng.random(self.count), QUANTILES, LENGTHS).round().astype(int)
        owner = np.repeat(np.arange(self.count), length)
        variables = mapping("physionet").filter(pl.col("challenge") == "2012")
        chosen = variables[rng.integers(len(variables), size=len(owner))]
        low, high = (
            chosen["concept"].replace_strict({c.name: getattr(c, side) for c in CONCEPTS}).to_numpy()
            for side in ("low", "high")
        )
        minute = rng.integers(HOURS * 60, size=len(owner)).astype(np.int32)
        records = {"stay_id": owner, "minute": minute, "parameter": chosen["variable"], "value": rng.uniform(low, high)}
        return {"records": pl.LazyFrame(records)}


class Operations(TorchDispatchMode):
    """Counts what a GPU would have to be told to do, one by one: operations, without those that only look at memory anew."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        made = [t for t in (result if isinstance(result, list | tuple) else [result]) if isinstance(t, Tensor)]
        looks = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, Tensor)}
        in_place = function._schema.is_mutable
        new = any(t.untyped_storage().data_ptr() not in looks for t in made)
        self.count += in_place or (new and "empty" not in function.__name__)
        return result


class Baseline(nn.Module):
    """The triplet embedding of HyMaTE, a layer of its own, the mean over the observations, a linear head. No dropout: with it the
    Transformer would take torch's slower attention.
    """

    def __init__(self, spec: Spec):
        super().__init__()
        self.variable = nn.Embedding(len(spec.variables) + 1, WIDTH, padding_idx=0)
        self.value, self.time = scalar_embedding(WIDTH), scalar_embedding(WIDTH)
        self.static, self.head = nn.Linear(len(spec.statics), WIDTH), nn.Linear(2 * WIDTH, 1)

    def mix(self, x: Tensor, padded: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D); ``padded`` (B, N) is True where there is no observation."""
        raise NotImplementedError

    def forward(self, batch: Triplets) -> Tensor:
        padded = torch.arange(batch.time.shape[1]) >= batch.length.clamp(min=1)[:, None]
        x = self.variable(batch.variable) + self.value(batch.value[..., None]) + self.time(batch.time[..., None])
        x = self.mix(x, padded).masked_fill(padded[..., None], 0).sum(1) / (~padded).sum(1, keepdim=True)
        return self.head(torch.cat([x, self.static(batch.static)], -1)).squeeze(-1)


class Transformer(Baseline):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def mix(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padded)


class LSTM(Baseline):
    """Not packed: padding is on the right and little, and packing costs more on a CPU than it saves."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)

    def mix(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.lstm(x)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.bench_models", description="training throughput"
    )
    parser.add_argument(
        "--root", help="folder with the files of PhysioNet 2012; default: simulated stays of the same lengths"
    )
    parser.add_argument("--compile", help="only compile these models, such as Fusion,GRUD")
    given = parser.parse_args()
    root, chosen = given.root, given.compile
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.manual_seed(0)
    data: PhysioNet2012 = PhysioNet2012(root, batch_size=BATCH) if root else Simulated(batch_size=BATCH)
    what = "PhysioNet 2012" if root else "simulated stays as long as those of PhysioNet 2012"
    if not root:
        console.print("no --root: lengths of stays are simulated")
    if not chosen:
        title = f"Training, {what}: forward, backward, optimiser step; {BATCH} stays a batch"
        record("throughput", throughput(data), title)
    title = f"torch.compile in training, {what}: an epoch of batches of {BATCH} stays"
    folder, rows = Path(tempfile.mkdtemp()) if chosen else RESULTS, []
    for name in chosen.split(",") if chosen else COMPILED:
        rows.append(compiling(name, data))
        record("compile", rows, title, folder)  # each takes minutes


def throughput(data: ICUDataModule, count: int = BATCHES) -> list[dict[str, str]]:
    """One row a model, timed in turns on the same stays: ``count`` batches that lie evenly between the longest and the shortest."""
    data.view, data.summary = "triplets", True
    data.prepare_data()
    data.setup()
    assert data.spec is not None
    epoch, load = loaded(data)
    length = torch.cat([batch.length for batch in epoch]).numpy()
    unsorted = np.random.default_rng(0).permutation(length)
    bucketed = padding([batch.length.numpy() for batch in epoch])
    mixed = padding(np.split(unsorted, np.arange(data.batch_size, len(unsorted), data.batch_size)))
    epoch.sort(key=lambda batch: batch.time.shape[1])
    sample = [epoch[i] for i in np.linspace(0, len(epoch) - 1, min(count, len(epoch))).round().astype(int)]
    data.view = "grid"
    loading = {"triplets": load, "grid": loaded(data)[1]}  # seconds a stay
    grids = [data.batch(batch.row.numpy()) for batch in sample]
    models = named(data.spec)
    taken = timed(models, {"triplets": list(sample), "grid": grids})
    stays = sum(len(batch.target) for batch in sample)
    speed = {name: stays / s for name, s in taken.items()}
    rows = []
    for name, model in models.items():
        view = getattr(model, "view", "triplets")
        row = {
            "model": name,
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "stays a second": f"{speed[name]:.1f}",
        }
        row |= {
            "/ Transformer": f"{speed[name] / speed['Transformer encoder']:.2f}",
            "minutes an epoch": f"{len(length) / speed[name] / 60:.1f}",
        }
        row |= {"loader % of the time": f"{100 * loading[view] / (loading[view] + 1 / speed[name]):.2f}"}
        of_tokens = view == "triplets"
        row |= {
            "padding %": f"{100 * bucketed:.1f}" if of_tokens else "",
            "padding % unsorted": f"{100 * mixed:.1f}" if of_tokens else "",
        }
        rows.append(row)
    console.print(
        f"{len(length):,} training stays of {length.mean():.0f} observations in the mean, {length.max()} at most"
    )
    return rows


def compiling(name: str, data: ICUDataModule, count: int = BATCHES) -> dict[str, str]:
    """What torch.compile does for a model: seconds of its first step, graphs after it and after an epoch of all shapes, and stays a
    second beside those without, timed in turns on ``count`` batches."""
    kind, arguments = COMPILED[name]
    models: dict[str, ICUModule] = {
        "plain": kind(**arguments),
        "compiled": kind(compile="default", **arguments),
    }
    data.serve(models["plain"])
    data.prepare_data()
    data.setup()
    assert data.spec is not None
    for model in models.values():
        torch.manual_seed(0)
        model.initialise(data.spec, 1.0)
        model.train()
    optimizers = {way: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for way, model in models.items()}
    epoch = list(data.train_dataloader())
    torch.compiler.reset()
    counters.clear()
    metrics.reset()
    torch._inductor.config.force_disable_caches = True  # type: ignore[attr-defined] # of earlier runs
    taken: list[float] = []
    graphs: list[int] = []
    for batch in epoch:
        taken.append(seconds(partial(training_step, models["compiled"], optimizers["compiled"], batch)))
        graphs.append(counters["stats"]["unique_graphs"])
        if len(taken) == 1:
            kernels = metrics.generated_kernel_count + counters["inductor"]["extern_calls"]
    sample = [epoch[i] for i in np.linspace(0, len(epoch) - 1, min(count, len(epoch))).round().astype(int)]
    training_step(models["plain"], optimizers["plain"], sample[0])  # makes what the optimiser keeps
    with Operations() as operations:
        training_step(models["plain"], optimizers["plain"], sample[0])
    spent = dict.fromkeys(models, 0.0)
    for batch in sample:
        for way, model in models.items():
            spent[way] += seconds(partial(training_step, model, optimizers[way], batch))
    stays = sum(len(batch.row) for batch in sample)
    return {
        "model": name,
        "seconds to the first step": f"{taken[0]:.1f}",
        "graphs after it": str(graphs[0]),
        "graphs after the epoch": str(graphs[-1]),
        "later steps that compiled": f"{sum(b > a for a, b in pairwise(graphs))} of {len(epoch) - 1}",
        "operations of a step": str(operations.count),
        "kernels, compiled": str(kernels),
        "stays a second": f"{stays / spent['plain']:.1f}",
        "compiled": f"{stays / spent['compiled']:.1f}",
        "ratio": f"{spent['plain'] / spent['compiled']:.2f}",
    }


def named(spec: Spec) -> dict[str, nn.Module]:
    """The models by name, built and in training mode."""
    models: dict[str, nn.Module] = {
        f"HyMaTE, attention between {plural}": HyMaTE(
            width=WIDTH,
            layers=LAYERS,
            state=STATE,
            attention=kind,  # type: ignore[arg-type]
            heads=HEADS,
        )
        for kind, plural in (("variable", "variables"), ("channel", "channels"), ("token", "observations"))
    }
    models |= {
        "Transformer encoder": Transformer(spec),
        "LSTM": LSTM(spec),
        "Fusion (hourly grid)": Fusion(width=WIDTH),
    }
    for model in models.values():
        if isinstance(model, ICUModule):
            model.initialise(spec, 1.0)
        model.train()
    return models


def loaded(data: ICUDataModule) -> tuple[list, float]:
    """The batches of one epoch from the training loader, and the seconds that it takes for one stay."""
    loader = data.train_dataloader()
    next(iter(loader))  # opens files
    start = time.perf_counter()
    batches = list(loader)
    return batches, (time.perf_counter() - start) / sum(len(batch.target) for batch in batches)


def padding(batches: list[np.ndarray]) -> float:
    """Share of padding among the tokens of batches of so many observations each."""
    tokens = sum(len(batch) * max(int(batch.max()), 1) for batch in batches)
    return 1 - sum(int(batch.sum()) for batch in batches) / tokens


def timed(models: dict[str, nn.Module], batches: dict[str, list[Batch]]) -> dict[str, float]:
    """Seconds that each model trains on all batches of its view, the models in turns, after two steps that do not count."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()}
    taken = dict.fromkeys(models, 0.0)
    number = len(batches["triplets"])
    with console.status("training") as status:
        for turn in range(-2, number):
            for name, model in models.items():
                status.update(f"batch {max(turn + 1, 0)} of {number}: {name}")
                batch = batches[getattr(model, "view", "triplets")][turn]
                spent = seconds(partial(training_step, model, optimizers[name], batch))
                taken[name] += spent if turn >= 0 else 0
    return taken


if __name__ == "__main__":
    main()
