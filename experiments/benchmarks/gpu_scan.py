"""Scan and convolution as `make gpu-check` compares them: with a float64 loop over the steps, with each other, and by the clock.

Shape letters: B samples, D channels, L steps, N states.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ehrmodels.scan import causal_conv1d, selective_scan, selective_scan_reference
from experiments.benchmarks.gpu_build import line, say
from experiments.benchmarks.gpu_measure import (
    PATHS,
    Deadline,
    Row,
    attempt,
    mark,
    measured,
    peak_memory,
    scanning,
    seconds,
    start_memory,
)

# B, D, L, N, those that tell most first
SHAPES = ((32, 128, 600, 16), (3, 40, 333, 5), (4, 256, 4096, 16), (2, 64, 100, 16), (1, 128, 1, 16))
LIMITS = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (2e-2, 5e-2),
}  # of errors of outputs and gradients, over the largest value
FLOOR = 1e-3  # least "largest value": some gradients are 0 in exact arithmetic
FORWARD, BOTH = "ms forward", "ms forward and backward"


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


def output(operation: Operation) -> None:
    """Only forward, as where nothing is trained."""
    with torch.no_grad():
        operation.run(**operation.inputs)


def last_state(call: Callable[..., Any], operation: Operation, double: bool = False) -> dict[str, Tensor]:
    """The scan's, without gradients: with them the kernel is not used for it."""
    with torch.no_grad():
        inputs = {name: t.double() if double else t for name, t in operation.inputs.items()}
        return {"last state": call(**inputs, return_last_state=True)[1]} if operation.name == "scan" else {}


def compare(
    device: torch.device,
    kernels: set[tuple[str, str]],
    deadline: Deadline,
    shapes: Sequence[Sequence[int]] = SHAPES,
    repeats: int = 15,
) -> Iterator[list[Row]]:
    """Errors, milliseconds and peak memory of every operation in every shape and type, with PyTorch and ``kernels``."""
    for shape, dtype in ((s, d) for s in shapes for d in LIMITS):
        for operation in operations(shape, dtype, device):
            what = f"{operation.name} {tuple(shape)} {str(dtype).removeprefix('torch.')}"
            columns = [c for c in PATHS if c == "pytorch" or (operation.name, c) in kernels]
            yield attempt(what, partial(errors, what, operation, columns, LIMITS[dtype]), deadline)
            yield attempt(what, partial(costs, what, operation, columns, device, repeats), deadline)


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
    """Median milliseconds, of both the peak memory on CUDA in MB above what was taken before, and Triton's time beside the
    kernel's."""
    rows = []
    peaks: dict[str, float | None] = {}
    for measure, call in ((FORWARD, output), (BOTH, partial(derived, operation.run))):
        times: dict[str, float | None] = {}
        for column in columns:
            with scanning(column):
                call(operation)
                before, taken = start_memory(device), []
                for _ in range(repeats):
                    first = mark(device)
                    call(operation)
                    taken.append(seconds(first, mark(device)))
            times[column], peaks[column] = 1000 * statistics.median(taken), peak_memory(device, before)
        rows.append(measured(what, measure, times))
        if times.get("kernel") and times.get("triton"):
            ratio = {"triton": times["triton"] / times["kernel"]}  # type: ignore[operator]
            rows.append(measured(what, f"{measure}, over the kernel's", ratio, target="at most 1.5"))
    return [*rows, measured(what, "peak MB", peaks)]
