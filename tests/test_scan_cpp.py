"""The compiled scan of a CPU through ``selective_scan``: against the plain loop in float64; and what is said where it cannot be built."""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ehrmodels.kernels
from ehrmodels import scan_cpp
from ehrmodels.mamba import MambaBlock
from ehrmodels.scan import causal_conv1d, selective_scan, selective_scan_reference

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++")))), reason="there is no C++ compiler"
)
FORMS = ("variable", "two groups", "constant")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EHR_SCAN", "cpp")


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library from before, in memory or in the cache."""
    monkeypatch.setenv("EHR_CACHE", str(tmp_path))
    monkeypatch.setattr(scan_cpp, "_loops", scan_cpp._loops.__wrapped__)
    monkeypatch.setattr(ehrmodels.kernels, "_imported", ehrmodels.kernels._imported.__wrapped__)


def inputs(
    batch: int, width: int, steps: int, states: int, kind: tuple[str, str] = ("variable", "variable")
) -> dict[str, Tensor]:
    """Random float32 inputs; ``kind`` is the form of B and C."""
    rng = torch.Generator().manual_seed(batch + 10 * width + 100 * steps)
    forms = {"variable": (batch, states, steps), "two groups": (batch, 2, states, steps), "constant": (width, states)}
    whole, each = (batch, width, steps), (width,)
    shapes = {"u": whole, "delta": whole, "A": (width, states), "B": forms[kind[0]], "C": forms[kind[1]]}
    shapes |= {"D": each, "z": whole, "delta_bias": each}
    given = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    given["A"] = -given["A"].exp()
    return given


def run(scan: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, last state, and the gradients of a random weighting of both."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    outputs = scan(**leaves, delta_softplus=True, return_last_state=True)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=rng).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("y", "last", *leaves), [*(o.detach() for o in outputs), *gradients], strict=True))


def near(given: dict[str, Tensor]) -> None:
    found = run(selective_scan, given)
    exact = run(selective_scan_reference, {name: t.double() for name, t in given.items()})
    for name, true in exact.items():
        limit = 1e-5 if name in ("y", "last") else 1e-4
        assert float((found[name] - true).abs().max() / true.abs().max().clamp(min=1e-30)) <= limit, name


@needs_compiler
@pytest.mark.parametrize("kind", list(itertools.product(FORMS, repeat=2)), ids=" and ".join)
def test_every_form_of_b_and_c_equals_the_loop(kind: tuple[str, str]) -> None:
    near(inputs(3, 4, 5, 2, kind))


@needs_compiler
@pytest.mark.parametrize(
    ("batch", "width", "steps", "states"), [(1, 1, 1, 1), (2, 70, 16, 5), (3, 9, 17, 16), (1, 130, 50, 3)], ids=str
)
def test_every_shape_equals_the_loop(batch: int, width: int, steps: int, states: int) -> None:
    near(inputs(batch, width, steps, states))


@needs_compiler
@pytest.mark.parametrize("product", [-1e-6, -1.0, -20.0, -80.0, -1e30])
def test_slow_and_fast_decay_are_near_float64(product: float) -> None:
    given = inputs(2, 9, 40, 4)
    near(given | {"A": product * (torch.rand(9, 4) / 2 + 0.5), "delta": torch.rand(2, 9, 40)})


@needs_compiler
def test_what_is_no_number_stays_none() -> None:
    given = inputs(1, 3, 5, 2)
    given["delta"][0, 1, 2] = float("nan")
    y = selective_scan(**given)
    assert torch.isnan(y[0, 1, 2:]).all() and torch.isfinite(y[0, [0, 2]]).all() and torch.isfinite(y[0, 1, :2]).all()


@needs_compiler
def test_threads_change_no_bit() -> None:
    given, threads = inputs(5, 7, 20, 4), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(run(selective_scan, given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own while it compiles
def test_the_scan_is_a_well_formed_operator_and_a_compiled_block_equals_an_eager_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(5, 2, 2, 3), (5, 2, 2, 3), (2, 4, 3), (5, 2, 2, 4), (5, 2, 2, 4)]
    given = [torch.rand(shape, generator=rng, requires_grad=True) for shape in shapes]
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")  # the block has the others
    torch.library.opcheck(torch.ops.ehr.scan_cpp.default, (*given, True), test_utils=quick)
    torch.compiler.reset()
    torch.manual_seed(0)
    block, x = MambaBlock(4, d_state=2), torch.randn(2, 5, 4)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for call, choice in ((compiled, "cpp"), (block, "torch")):
        monkeypatch.setenv("EHR_SCAN", choice)
        y = call(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_it_is_built_once_and_only_where_it_is_asked_for(
    nothing_built: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = inputs(1, 2, 3, 2)
    for choice in ("", "torch"):
        monkeypatch.setenv("EHR_SCAN", choice)
        selective_scan(**given)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("EHR_SCAN", "cpp")
    selective_scan(**given)
    (library,) = (tmp_path / "scan").iterdir()
    before = library.stat()
    selective_scan(**given)
    assert list((tmp_path / "scan").iterdir()) == [library] and library.stat() == before
    assert causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(2, 4)).shape == (1, 2, 3)


def test_what_it_cannot_do_is_told(nothing_built: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = inputs(1, 2, 3, 2)
    with pytest.raises(RuntimeError, match=r"EHR_SCAN=cpp, but .*scan_cpp cannot be used: it cannot do float64"):
        selective_scan(**{name: t.double() for name, t in given.items()})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        RuntimeError, match=r"there is no C\+\+ compiler; install g\+\+ or clang\+\+, or name one in CXX"
    ):
        selective_scan(**given)


@needs_compiler
def test_a_build_that_fails_is_told_and_leaves_nothing(
    nothing_built: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int main( {")
    monkeypatch.setattr(scan_cpp, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"wrong\.cpp.* failed: .*error"):
        selective_scan(**inputs(1, 2, 3, 2))
    assert not list((tmp_path / "scan").iterdir())
