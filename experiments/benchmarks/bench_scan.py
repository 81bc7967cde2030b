"""`make bench`: the selective scan beside every other one that runs on a CPU: time, memory, error, and the floor of the machine.

All implementations run in one process in turns, in float32, and must first agree with ours. Results go to ``scan.csv`` (times) and
``scan_checks.csv`` (memory, error, a whole model) in ``experiments/results``.

Shape letters: B samples, L steps, D channels, N states a channel.
"""

import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import polars as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

from datamodules.contract import Batch, Spec, Triplets
from ehrmodels import scan_cpp
from ehrmodels.base import ICUModule
from ehrmodels.hymate import HyMaTE
from ehrmodels.scan import selective_scan, selective_scan_reference

Scan = Callable[..., Tensor]  # arguments and meaning of ``selective_scan``
Shape = tuple[int, int, int, int]  # B, L, D, N

SHAPES: tuple[Shape, ...] = ((32, 256, 128, 16), (32, 600, 128, 16), (16, 1024, 128, 16), (4, 4096, 256, 16))
SMALL: Shape = (2, 37, 8, 4)  # where outputs and gradients of all are compared with the reference
ROUNDS, SECONDS = 7, 15.0  # rounds at a shape, and the time after which an implementation begins no other
OURS, LOOP, PSCAN, ASSOCIATIVE = "ours", "plain loop, autograd", "mambapy pscan", "torch associative_scan"
COMPILED = "ours, EHR_SCAN=cpp"
SLOW_PATH, MAMBA_REF, FLOOR = "transformers slow path", "mamba-ssm selective_scan_ref", "floor of torch operations"
# Least ratio to ours by length, forward and training. Ours is to be within 1.5 times the floor.
TARGETS: dict[str, tuple[dict[int, float], dict[int, float]]] = {
    PSCAN: ({256: 6, 600: 12, 1024: 12, 4096: 12}, {256: 7, 600: 10, 1024: 10, 4096: 10}),
    LOOP: (dict.fromkeys((256, 600, 1024, 4096), 4), dict.fromkeys((256, 600, 1024, 4096), 5)),
    MAMBA_REF: (dict.fromkeys((256, 600, 1024, 4096), 15), {1024: 300}),
    FLOOR: (dict.fromkeys((256, 600, 1024, 4096), 0.67), dict.fromkeys((256, 600, 1024, 4096), 0.67)),
}
TRAINED = {
    SLOW_PATH: (256,),
    MAMBA_REF: (256, 1024),
}  # lengths: their backward pass is quadratic in L and takes minutes
RESULTS = Path(__file__).parents[1] / "results"
console = Console(width=None if sys.stdout.isatty() else 150)


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    scans = implementations()
    agree(scans)
    record("scan", [row for shape in SHAPES for row in times(shape, scans)], "Selective scan, float32")
    longest = SHAPES[-1]
    checks = [*memory(longest, scans), *whole_model(scans), *(row for shape in SHAPES for row in errors(shape))]
    record("scan_checks", checks, "Selective scan: memory, error, a whole model")


def record(name: str, rows: list[dict[str, str]], title: str, folder: Path = RESULTS) -> None:
    """Print the rows as a table and write them to ``NAME.csv``."""
    table = Table(title=f"{title}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    pl.DataFrame(rows).write_csv(folder / f"{name}.csv")


# ---- the implementations ----------------------------------------------------------------------------------------------------


def implementations() -> dict[str, Scan]:
    """Every implementation that is there; the others are named and left out."""
    found: dict[str, Scan] = {OURS: selective_scan, LOOP: around(loop), ASSOCIATIVE: around(associative)}
    others: dict[str, Callable[[], Scan]] = {
        COMPILED: compiled,
        PSCAN: lambda: around(importlib.import_module("mambapy.pscan").pscan),
        SLOW_PATH: lambda: importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan,
        MAMBA_REF: mamba_ssm,
    }
    for name, load in others.items():
        try:
            found[name] = load()
        except (ImportError, AttributeError, RuntimeError) as error:
            console.print(f"{name}: not there, left out ({error})")
    return found


def compiled() -> Scan:
    """Ours with its loops in C++."""
    scan_cpp.try_out()

    def scan(*given: Any) -> Tensor:
        with mock.patch.dict(os.environ, EHR_SCAN="cpp"):
            return selective_scan(*given)

    return scan


def around(states: Callable[[Tensor, Tensor], Tensor]) -> Scan:
    """A whole scan from ``states``, which gives h (B, L, D, N) with h_t = a_t h_(t-1) + x_t from a and x, both (B, L, D, N)."""

    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        delta_bias: Tensor,
        delta_softplus: bool,
    ) -> Tensor:
        step = delta.transpose(1, 2) + delta_bias
        step = F.softplus(step) if delta_softplus else step
        a = torch.exp(step.unsqueeze(3) * A)
        x = (step * u.transpose(1, 2)).unsqueeze(3) * B.transpose(1, 2).unsqueeze(2)
        y = (states(a, x) @ C.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
        return (y + u * D.unsqueeze(1)) * F.silu(z)

    return scan


def loop(a: Tensor, x: Tensor) -> Tensor:
    """One step after the other. ``unbind`` takes all steps apart at once: to index one in the loop would cost a gradient of the size
    of the whole sequence at every step of the backward pass, which is what makes it quadratic in L elsewhere.
    """
    h, states = torch.zeros_like(x[:, 0]), []
    for now, given in zip(a.unbind(1), x.unbind(1), strict=True):
        h = now * h + given
        states.append(h)
    return torch.stack(states, 1)


def associative(a: Tensor, x: Tensor) -> Tensor:
    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return associative_scan(combine, (a, x), dim=1, combine_mode="generic")[1]  # "pointwise" needs a GPU


def mamba_ssm() -> Scan:
    """mamba-ssm's own reference, from an installation without its CUDA kernels: what it imports beside is replaced by empty modules."""
    spec = find_spec("mamba_ssm")
    if spec is None:
        raise ImportError("no module named mamba_ssm")
    package, norm = ModuleType("mamba_ssm"), ModuleType("layer_norm")
    package.__path__ = list(spec.submodule_search_locations or [])
    norm._layer_norm_fwd = None  # type: ignore[attr-defined]
    empty = {
        "mamba_ssm": package,
        "mamba_ssm.ops.triton.layer_norm": norm,
        "selective_scan_cuda": ModuleType("selective_scan_cuda"),
    }
    with mock.patch.dict(sys.modules, empty):
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref


# ---- inputs and one call ----------------------------------------------------------------------------------------------------


def inputs(shape: Shape) -> list[Tensor]:
    """u, delta, A, B, C, D, z and delta_bias as a Mamba block has them at the start of training: softplus gives steps of 0.001 to 0.1."""
    samples, steps, width, states = shape
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    bias = torch.exp(torch.rand(width, generator=generator) * 4.6 - 6.9).expm1().log()
    A = -torch.arange(1.0, states + 1).repeat(width, 1)
    u, delta, z = normal(samples, width, steps), 0.1 * normal(samples, width, steps), normal(samples, width, steps)
    given = [u, delta, A, normal(samples, states, steps), normal(samples, states, steps), normal(width), z, bias]
    return [t.requires_grad_() for t in given]


def spread(shape: Shape) -> list[Tensor]:
    """The same with delta * A spread from -1e-6 to -80, evenly in the logarithm, and no softplus to come."""
    given = [t.detach() for t in inputs(shape)]
    generator = torch.Generator().manual_seed(1)
    given[1] = torch.exp(torch.empty_like(given[1]).uniform_(0, 1, generator=generator) * 15.895 - 11.513)  # 1e-5 to 80
    given[2] = -torch.exp(torch.empty_like(given[2]).uniform_(-1, 0, generator=generator) * 2.3026)  # 0.1 to 1
    given[7] = torch.zeros_like(given[7])
    return [t.requires_grad_() for t in given]


def gradients(scan: Scan, given: list[Tensor], softplus: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the gradients of all inputs for a gradient of ones."""
    y = scan(*given, softplus)
    return y.detach(), torch.autograd.grad(y, given, torch.ones_like(y))


def agree(scans: dict[str, Scan]) -> None:
    """Refuse to time an implementation that computes something else."""
    given = inputs(SMALL)
    y, gradient = gradients(selective_scan_reference, given)
    for name, scan in scans.items():
        other, others = gradients(scan, given)
        close(other, y, 1e-4, f"{name}, output")
        for expected, found in zip(gradient, others, strict=True):
            close(found, expected, 1e-4, f"{name}, gradient")
    console.print(f"outputs and gradients agree: {', '.join(scans)}")


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda said: f"{what}: {said}")


# ---- time -------------------------------------------------------------------------------------------------------------------


def times(shape: Shape, scans: dict[str, Scan]) -> list[dict[str, str]]:
    """Median milliseconds of every implementation at one shape, forward (no gradients wanted) and training (forward and backward)."""
    given = inputs(shape)
    with torch.no_grad():
        y = scans[OURS](*given, True)
        for name, scan in scans.items():
            close(scan(*given, True), y, 1e-3, f"{name} at {shape}")
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {}
    for name, scan in scans.items():
        trained = shape[1] in TRAINED.get(name, (shape[1],))
        works[name] = (partial(scan, *given, True), partial(gradients, scan, given) if trained else None)
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    works[FLOOR] = (partial(floor, elements, 1, 1), partial(floor, elements, 2, 5))
    forward, train = alternate(works, f"{shape}")
    base = statistics.median(forward[OURS]), statistics.median(train[OURS])
    rows = []
    for name in works:
        row = {"B, L, D, N": ", ".join(map(str, shape)), "implementation": name}
        for what, taken, ours, targets in zip(
            ("forward", "training"), (forward, train), base, TARGETS.get(name, ({}, {})), strict=True
        ):
            middle = statistics.median(taken[name]) if taken[name] else None
            target = targets.get(shape[1]) if middle else None
            ratio = middle / ours if middle else 0.0
            said = f"{target:g}, {'met' if ratio >= target else 'missed'}" if target else ""
            row |= (
                {f"{what} ms": f"{1e3 * middle:,.1f}", f"{what} / ours": f"{ratio:.2f}"}
                if middle
                else {f"{what} ms": "", f"{what} / ours": ""}
            )
            row[f"{what} target"] = said
        rows.append(row)
    return rows


def alternate(
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]], label: str
) -> tuple[dict[str, list[float]], ...]:
    """Seconds of the forward and of the training call of each work, in turns."""
    forward: dict[str, list[float]] = {name: [] for name in works}
    train: dict[str, list[float]] = {name: [] for name in works}
    with console.status(label) as status:
        for number in range(ROUNDS):
            for name, (ahead, both) in works.items():
                if sum(forward[name]) + sum(train[name]) > SECONDS:
                    continue
                status.update(
                    f"{label}, round {number + 1} of {ROUNDS}: {name}{' (this one takes minutes)' if name in TRAINED and both else ''}"
                )
                with torch.no_grad():
                    forward[name].append(seconds(ahead))
                if both:
                    train[name].append(seconds(both))
    console.print(f"{label}: {', '.join(f'{name} {len(taken)}' for name, taken in forward.items())} rounds")
    return forward, train


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def floor(elements: int, exps: int, multiply_adds: int) -> None:
    """The least that PyTorch operations must do over so many state elements, in pieces that stay in the cache.

    A forward pass: one exp (the decays) and one multiply-add (the states). Training: two and five (decays and states again in the
    backward pass, the adjoint states, the gradients of delta and A).
    """
    a, b, c = torch.full((2**18,), -0.1), torch.zeros(2**18), torch.zeros(2**18)
    for _ in range(-(-elements // len(a))):
        for _ in range(exps):
            torch.exp(a, out=b)
        for _ in range(multiply_adds):
            c.addcmul_(a, b)


# ---- memory -----------------------------------------------------------------------------------------------------------------


def memory(shape: Shape, scans: dict[str, Scan]) -> list[dict[str, str]]:
    """Peak memory of a training step, each in a process of its own, above what the process held before."""
    if not Path("/proc/self/status").exists():
        console.print("peak memory: left out, it is read from /proc")
        return []
    peak = {name: measured_alone(name, shape) for name in (OURS, LOOP, PSCAN) if name in scans}
    return [
        check(
            "peak MB of a training step, ours / other",
            shape,
            f"{peak[OURS]:,.0f}",
            name,
            f"{peak[name]:,.0f}",
            peak[OURS] / peak[name],
            most,
        )
        for name, most in ((LOOP, 0.25), (PSCAN, None))
        if name in peak
    ]


def measured_alone(name: str, shape: Shape) -> float:
    code = f"from experiments.benchmarks import bench_scan; print(bench_scan.growth({name!r}, {shape!r}))"
    out = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=RESULTS.parents[1]
    )
    return float(out.stdout.split()[-1])


def growth(name: str, shape: Shape) -> float:
    """Megabytes that a training step adds at its peak to this process."""
    scan = implementations()[name]
    gradients(scan, inputs(SMALL))  # what is loaded once does not count
    given = inputs(shape)
    before = resident("VmRSS")
    gradients(scan, given)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


# ---- a whole model, and error -----------------------------------------------------------------------------------------------


def whole_model(scans: dict[str, Scan], count: int = 32, events: int = 600, rounds: int = 3) -> list[dict[str, str]]:
    """Stays a second in training of HyMaTE (width 64, three Mamba blocks) at so many events, with our scan and with mambapy's in its place."""
    if PSCAN not in scans:
        return []
    spec = Spec([f"v{i}" for i in range(40)], [""] * 40, ["age"], [0.0] * 40, [1.0] * 40, [0.0], [1.0], {"window": 48})
    time_of = torch.rand(count, events).sort(1)[0] * 2 - 1
    length, target = torch.full((count,), events), (torch.arange(count) % 2).float()
    batch = Triplets(
        torch.randn(count, 1),
        torch.zeros(count, 0, 16),
        time_of,
        torch.randint(1, 41, (count, events)),
        torch.randn(count, events),
        length,
        target,
        length,
    )
    model = HyMaTE(width=64, layers=3, state=16, piecewise=False, summary=False, members=1)
    model.initialise(spec, 1.0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    taken: dict[str, list[float]] = {OURS: [], PSCAN: []}
    training_step(model, optimizer, batch)
    with console.status("whole model") as status:
        for number in range(rounds):
            for name, found in taken.items():
                status.update(f"whole model, round {number + 1} of {rounds}: {name}")
                with mock.patch("ehrmodels.mamba.selective_scan", scans[name]):
                    found.append(seconds(partial(training_step, model, optimizer, batch)))
    speed = {name: count / statistics.median(found) for name, found in taken.items()}
    what, shape = (
        "stays a second in training, HyMaTE of 3 Mamba blocks, width 64",
        (count, events, 2 * model.width, model.state),
    )
    return [check(what, shape, f"{speed[OURS]:.1f}", PSCAN, f"{speed[PSCAN]:.1f}", speed[OURS] / speed[PSCAN], least=7)]


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward and the optimiser's step on one batch."""
    optimizer.zero_grad()
    if isinstance(model, ICUModule):
        loss = model.objective(batch)[0]
    else:
        loss = F.binary_cross_entropy_with_logits(model(batch), batch.target)
    loss.backward()
    optimizer.step()


def errors(shape: Shape) -> Iterable[dict[str, str]]:
    """Largest error of ours relative to the largest value, of outputs and of any input's gradient, against the loop in float64."""
    with console.status(f"{shape}: error against float64"):
        given = spread(shape)
        y, gradient = gradients(selective_scan, given, softplus=False)
        exact, exacts = gradients(around(loop), [t.detach().double().requires_grad_() for t in given], softplus=False)
    for what, error, most in (
        ("relative error of outputs", relative(y, exact), 1e-5),
        ("relative error of gradients", max(map(relative, gradient, exacts)), 1e-4),
    ):
        yield check(what, shape, f"{error:.1e}", "float64", "", error, most)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def check(
    what: str,
    shape: Shape,
    ours: str,
    other: str,
    theirs: str,
    value: float,
    most: float | None = None,
    least: float | None = None,
) -> dict[str, str]:
    """One row of ``scan_checks.csv``."""
    target = f"at most {most:g}" if most else f"at least {least:g}" if least else ""
    met = "" if not target else "yes" if (value <= most if most else value >= (least or 0)) else "no"
    row = {"what": what, "B, L, D, N": ", ".join(map(str, shape)), "ours": ours, "other": other, "of other": theirs}
    return row | {"ratio": f"{value:.2f}" if theirs else "", "target": target, "met": met}


if __name__ == "__main__":
    main()
