"""`make bench`: how long one stay takes: the network alone, its ONNX file, and a step of following (chart an hour, cut, predict).

Stays are simulated, as long as those of PhysioNet 2012; weights are those before training, since times do not depend on them. Each
time is the least of some rounds, on which other processes weigh less. Results go to ``experiments/results/latency.csv``.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import torch

from datamodules.live import Live
from datamodules.module import ICUDataModule
from ehrmodels import Fusion, HyMaTE, ICUModule, LightGBM
from ehrmodels.export import inputs, to_onnx
from ehrmodels.trees import features_of
from experiments.benchmarks.bench_models import Simulated
from experiments.benchmarks.bench_scan import console, record

ROUNDS, THREADS = 3, (1, 2)
STAYS = 4000  # that the trees are grown on
MODELS: dict[str, Callable[[], ICUModule]] = {
    "Fusion": Fusion,
    "HyMaTE, attention between observations": HyMaTE,
    "HyMaTE, attention between variables": lambda: HyMaTE(attention="variable"),
    "LightGBM": LightGBM,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.bench_latency", description="latency")
    parser.add_argument(
        "--stays", type=int, default=20, help="stays that are followed; five times as many are scored one by one"
    )
    stays = parser.parse_args().stays
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    data = Simulated(STAYS)
    rows = [row for name, make in MODELS.items() for row in measured(name, make(), data, stays)]
    record("latency", rows, f"Latency of one stay in ms, least of {ROUNDS} rounds, simulated as long as PhysioNet 2012")


def measured(name: str, model: ICUModule, data: ICUDataModule, stays: int) -> Iterator[dict[str, str]]:
    """A row for each number of threads."""
    data.serve(model)
    data.prepare_data()
    data.setup()
    assert data.spec is not None
    model.initialise(data.spec, 1.0)
    if isinstance(model, LightGBM):
        train = data.batch(data.rows("train"))
        model.fitted = model.fit_rows((features_of(train.static, train.summary).numpy(), train.target.numpy()))
    model.eval()
    batches = [data.batch(np.array([row])) for row in range(5 * stays)]
    size = str(sum(p.numel() for p in model.parameters()))
    with tempfile.TemporaryDirectory() as folder, console.status(name):
        path = Path(folder) / "model.onnx"
        to_onnx(model, str(path))
        for threads in THREADS:
            torch.set_num_threads(threads)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            given = [{n: getattr(batch, n).numpy() for n in inputs(model)} for batch in batches]
            network = timed([partial(model.predict_step, b, 0) for b in batches])
            onnx = timed([partial(session.run, None, g) for g in given])
            difference = max(
                abs(float(model.predict_step(b, 0)[1][0]) - float(session.run(None, g)[0][0]))
                for b, g in zip(batches, given, strict=True)
            )
            step = np.min([followed(model, data, stays) for _ in range(ROUNDS)], 0)
            yield {
                "model": name,
                "parameters": "" if isinstance(model, LightGBM) else f"{int(size):,}",
                "ONNX file, MB": f"{path.stat().st_size / 1e6:.1f}",
                "threads": str(threads),
                **{
                    f"{what}, p50 / p99": " / ".join(f"{1e3 * t:.1f}" for t in np.quantile(times, (0.5, 0.99)))
                    for what, times in (("PyTorch", network), ("ONNX Runtime", onnx), ("step", step))
                },
                "ONNX differs by": f"{difference:.0e}",
            }


def timed(calls: list[Callable[[], Any]]) -> np.ndarray:
    """Seconds of each call."""
    with torch.inference_mode():
        calls[0]()
        return np.min([[_seconds(call) for call in calls] for _ in range(ROUNDS)], 0)


def followed(model: ICUModule, data: ICUDataModule, stays: int) -> list[float]:
    """Seconds of every hour of some stays: charted, cut and predicted."""
    live = Live(model.spec, model.view, model.summary)
    live.admit(data.store.stays.head(stays))
    hours = data.store.frame(0, stays).with_columns(hour=pl.col("known_minute") // 60).sort("stay_id", "hour")
    taken = []
    for part in hours.partition_by("stay_id", "hour", maintain_order=True):
        stay, hour = part["stay_id"][0], part["hour"][0]
        events = part.drop("hour")

        def step(stay: int = stay, events: pl.DataFrame = events, minute: int = 60 * hour + 60) -> None:
            live.chart(events)
            model.predict_step(live.batch(stay, minute), 0)

        with torch.inference_mode():
            taken.append(_seconds(step))
    return taken


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
