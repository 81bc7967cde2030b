"""`make gpu-check`: the CUDA kernels of the Mamba block and Triton's scan beside PyTorch, on the GPU of this machine.

Finds or builds the kernels, compares all with a float64 loop over the steps, times them, and trains every model with each. What
cannot be done here (no compiler, no network, no memory) is said and left out; the exit status is 1 only if a comparison fails.
"""

import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from ehrmodels.scan import causal_conv1d, selective_scan, selective_scan_reference
from experiments.benchmarks.gpu_build import compiler, line, provide, say, version
from experiments.benchmarks.gpu_train import (
    PATHS,
    STAYS,
    STEPS,
    Row,
    attempt,
    mark,
    measured,
    peak_memory,
    scanning,
    seconds,
    start_memory,
    train_all,
)
from experiments.files import console, write_text

RESULT = Path(__file__).parents[1] / "results" / "gpu.csv"
SHAPES = ((1, 128, 1, 16), (2, 64, 100, 16), (3, 40, 333, 5), (32, 128, 600, 16), (4, 256, 4096, 16))  # B, D, L, N
LIMITS = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (2e-2, 5e-2),
}  # of errors of outputs and gradients, over the largest value
FLOOR = 1e-3  # least "largest value": some gradients are 0 in exact arithmetic


def main() -> int:
    """Run every step; 1 if a comparison failed, else 0."""
    if not torch.cuda.is_available():
        say(f"no CUDA device (torch {torch.__version__}): nothing was measured, nothing was written")
        return 0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(os.environ.get("EHR_CACHE", ".cache")) / "gpu-check"
    device, nvcc = torch.device("cuda", torch.cuda.current_device()), compiler()
    gpu = torch.cuda.get_device_properties(device)
    about = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}"
    say(f"{about}; nvcc: {version(nvcc)}")
    for sentence in provide(folder, nvcc, f"{gpu.major}.{gpu.minor}"):
        say(sentence)
    kernels = usable(device)
    rows = compare(device, kernels)
    show(rows, "forward and backward: errors against float64 over the largest value, median time, peak memory")
    whole = {column: ("scan", column) in kernels for column in PATHS} | {"pytorch": True}
    whole["kernel"] &= ("convolution", "kernel") in kernels
    trained = train_all(device, [column for column in PATHS if whole[column]], folder)
    show(trained, f"training: {STEPS} steps in bfloat16 on {STAYS:,} simulated stays")
    return conclude(rows + trained, about)


def conclude(rows: Sequence[Row], device: str) -> int:
    """Write the table of all rows; 1 if a comparison failed, else 0."""
    table = pl.DataFrame([cells(r) for r in rows], schema=list(Row._fields), orient="row")
    write_text(RESULT, table.with_columns(device=pl.lit(device)).write_csv())
    judged = [r.outcome for r in rows if r.outcome]
    failed = sum(outcome != "ok" for outcome in judged)
    say(f"{failed} of {len(judged)} comparisons failed; wrote {RESULT}")
    return int(failed > 0)


def usable(device: torch.device) -> set[tuple[str, str]]:
    """Which operation runs on ``device`` with which column's kernel; says why not of the others."""
    kernels = set()
    for operation in operations((1, 8, 4, 2), torch.float32, device):
        for column in ("kernel", "triton") if operation.name == "scan" else ("kernel",):
            try:
                with scanning(column):
                    derived(operation.run, operation)
                kernels.add((operation.name, column))
            except Exception as error:  # whatever a package says that was built for another torch
                say(f"{operation.name}: no {column}: {line(error)}")
    return kernels


class Operation(NamedTuple):
    """``run`` and ``exact`` map the inputs to an output; ``weight`` weights it."""

    name: str
    run: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: dict[str, Tensor]
    weight: Tensor


def operations(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Operation]:
    """Scan and convolution with inputs of (B, D, L, N), laid out in memory and distributed as in a Mamba block at its start."""
    batch, width, steps, states = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        drawn = (scale * torch.randn(size, generator=generator)).to(device, kind)
        return drawn.permute(1, 2, 0) if len(size) == 3 else drawn  # (L, B, D) in memory

    u, delta, z, x, weight = (normal(steps, batch, width, scale=s) for s in (1, 0.5, 1, 1, 1))
    A = -torch.arange(1, states + 1, device=device) * (1 + 0.1 * normal(width, states, kind=torch.float32))
    direct, bias = normal(width, kind=torch.float32), normal(width, kind=torch.float32) - 4.5  # softplus: 0.01
    B, C = normal(steps, batch, states), normal(steps, batch, states)
    scan = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": direct, "z": z, "delta_bias": bias}
    convolution = {"x": x, "weight": normal(width, 4, scale=0.5), "bias": normal(width)}
    switch = {"delta_softplus": True}
    return [
        Operation(
            "scan",
            lambda **t: selective_scan(**t, **switch),
            lambda **t: selective_scan_reference(**t, **switch),
            scan,
            weight,
        ),
        Operation("convolution", lambda **t: causal_conv1d(**t, activation="silu"), convolved, convolution, weight),
    ]


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What ``causal_conv1d`` gives with "silu", by torch's own convolution."""
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight)))


def derived(call: Callable[..., Any], operation: Operation, double: bool = False) -> dict[str, Tensor]:
    """Output and the gradient of every input."""
    leaves = {name: (t.double() if double else t).detach().requires_grad_() for name, t in operation.inputs.items()}
    y = call(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), operation.weight.to(y.dtype))
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def last_state(call: Callable[..., Any], operation: Operation, double: bool = False) -> dict[str, Tensor]:
    """The scan's, without gradients: with them the kernel is not used for it."""
    with torch.no_grad():
        inputs = {name: t.double() if double else t for name, t in operation.inputs.items()}
        return {"last state": call(**inputs, return_last_state=True)[1]} if operation.name == "scan" else {}


def compare(
    device: torch.device, kernels: set[tuple[str, str]], shapes: Sequence[Sequence[int]] = SHAPES, repeats: int = 15
) -> list[Row]:
    """Errors, milliseconds and peak memory of every operation in every shape and type, with PyTorch and ``kernels``."""
    rows: list[Row] = []
    for shape, dtype in ((s, d) for s in shapes for d in LIMITS):
        for operation in operations(shape, dtype, device):
            what = f"{operation.name} {tuple(shape)} {str(dtype).removeprefix('torch.')}"
            columns = [c for c in PATHS if c == "pytorch" or (operation.name, c) in kernels]
            rows += attempt(what, partial(errors, what, operation, columns, LIMITS[dtype]))
            rows += attempt(what, partial(costs, what, operation, columns, device, repeats))
    return rows


def errors(what: str, operation: Operation, columns: Sequence[str], limits: tuple[float, float]) -> list[Row]:
    """Largest errors of the outputs and of the gradients, over the largest exact value."""
    exact, results = derived(operation.exact, operation, True) | last_state(operation.exact, operation, True), {}
    for column in columns:
        with scanning(column):
            results[column] = derived(operation.run, operation) | last_state(operation.run, operation)
    rows = []
    for name, true in exact.items():
        limit, scale = limits[name in operation.inputs], true.abs().max().clamp(min=FLOOR)

        def error(a: Tensor, b: Tensor, scale: Tensor = scale) -> float:
            return float((a.double() - b.double()).abs().max() / scale)

        found = {column: error(result[name], true) for column, result in results.items()}
        others = [error(result[name], results["pytorch"][name]) for c, result in results.items() if c != "pytorch"]
        if others:
            found["between"] = max(others)
        measure = f"error of gradient of {name}" if name in operation.inputs else f"error of {name}"
        rows.append(measured(what, measure, found, limit))
    return rows


def costs(what: str, operation: Operation, columns: Sequence[str], device: torch.device, repeats: int) -> list[Row]:
    """Median milliseconds of forward and backward, and on CUDA their peak memory in MB above what was taken before."""
    times: dict[str, float | None] = {}
    peaks: dict[str, float | None] = {}
    for column in columns:
        with scanning(column):
            derived(operation.run, operation)
            before, marks = start_memory(device), []
            for _ in range(repeats):
                first = mark(device)
                derived(operation.run, operation)
                marks.append(seconds(first, mark(device)))
        times[column], peaks[column] = 1000 * statistics.median(marks), peak_memory(device, before)
    return [measured(what, "milliseconds", times), measured(what, "peak MB", peaks)]


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for heading in ("", "measure", "kernel", "Triton", "PyTorch", "between", "limit", "outcome"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(escape, cells(row)))
    console.print(table)


def cells(row: Row) -> list[str]:
    return ["" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in row]


if __name__ == "__main__":
    sys.exit(main())
