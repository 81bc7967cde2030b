"""Triton's scan through ``selective_scan``: against the plain loop in float64. On a GPU where there is one, else in Triton's interpreter."""

import importlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ehrmodels.kernels
from ehrmodels.mamba import MambaBlock
from ehrmodels.scan import selective_scan, selective_scan_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither does torch see a GPU nor is Triton interpreted", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]'")
scan_triton = importlib.import_module("ehrmodels.scan_triton")

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
OPTIONAL = ("D", "z", "delta_bias")
TRUNCATED = 2 if DEVICE.type == "cpu" else 1  # the interpreter cuts digits off where a GPU rounds
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of exp in the interpreter: 1 / inf is meant
library_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def patched_once() -> Iterator[None]:
    """The interpreter replaces Triton's language at every call within a kernel, most of its time: once a file of code is enough."""
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, {}

    def once(fn: Any) -> Any:
        if id(fn.__globals__) not in scopes:
            scopes[id(fn.__globals__)] = patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch
    for scope in scopes.values():
        scope.restore()


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other kernel; and short chunks, so that few steps are several."""
    monkeypatch.setenv("EHR_SCAN", "triton")
    monkeypatch.setattr(scan_triton, "CHUNK", 4)


def inputs(
    batch: int, width: int, steps: int, states: int, kind: tuple[str, str] = ("variable", "variable")
) -> dict[str, Tensor]:
    """Random float32 inputs, all of them given; ``kind`` is the form of B and C."""
    rng = torch.Generator().manual_seed(batch + 10 * width + 100 * steps)
    forms = {
        "variable": (batch, states, steps),
        "two groups": (batch, 2, states, steps),
        "all groups": (batch, width, states, steps),
        "constant": (width, states),
    }
    whole, each = (batch, width, steps), (width,)
    shapes = [whole, whole, (width, states), forms[kind[0]], forms[kind[1]], each, whole, each]
    given = {name: torch.randn(shape, generator=rng).to(DEVICE) for name, shape in zip(NAMES, shapes, strict=True)}
    given["A"] = -given["A"].exp()
    return given


def run(scan: Any, given: dict[str, Tensor], **options: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of ``scan`` and the gradients of a random weighting of all of them."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    outputs = scan(**leaves, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=rng).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return [o.detach() for o in outputs], dict(zip(leaves, gradients, strict=True))


def near(given: dict[str, Tensor], output: float = 1e-5, gradient: float = 1e-4, **options: bool) -> None:
    """Outputs and gradients are near those of the plain loop in float64, by their largest value, and have the type of their input."""
    outputs, gradients = run(selective_scan, given, **options)
    expected, exact = run(selective_scan_reference, {name: t.double() for name, t in given.items()}, **options)
    assert len(outputs) == 1 + options.get("return_last_state", False)
    for number, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
        assert ours.dtype == (torch.float32 if number else given["u"].dtype)
        assert error(ours, theirs) <= (1e-5 if number else output)
    for name, value in given.items():
        assert gradients[name].dtype == value.dtype
        assert error(gradients[name], exact[name]) <= gradient, name


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


# ---- values and gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [c for n in range(4) for c in itertools.combinations(OPTIONAL, n)], ids=str)
def test_every_option_equals_the_loop(absent: tuple[str, ...]) -> None:
    given = {name: value for name, value in inputs(1, 3, 5, 4).items() if name not in absent}
    softplus = "z" not in absent
    if not softplus:
        given["delta"] = given["delta"].abs()
    near(given, delta_softplus=softplus, return_last_state="D" in absent)


@pytest.mark.parametrize(
    ("batch", "width", "steps", "states"),
    [(1, 3, 1, 5), (2, 3, 4, 5), (1, 2, 9, 1), (2, 19, 5, 8), (1, 2, 3, 130)],  # 16 channels of 8 states are a block
    ids=str,
)
def test_every_shape_equals_the_loop(batch: int, width: int, steps: int, states: int) -> None:
    near(inputs(batch, width, steps, states), delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize(
    "kind",
    [("two groups", "two groups"), ("all groups", "variable"), ("constant", "constant"), ("two groups", "constant")],
    ids=" and ".join,
)
def test_every_form_of_b_and_c_equals_the_loop(kind: tuple[str, str]) -> None:
    near(inputs(1, 2, 5, 2, kind), delta_softplus=True)


def test_the_default_chunk_equals_the_loop_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("EHR_SCAN", "triton")
    given = inputs(1, 8, 2 * scan_triton.CHUNK + 3, 16)
    near(given, delta_softplus=True)
    y, gradients = run(selective_scan, given, delta_softplus=True)
    monkeypatch.setenv("EHR_SCAN", "torch")
    expected, exact = run(selective_scan, given, delta_softplus=True)
    for name, ours, theirs in [("y", y[0], expected[0]), *((n, gradients[n], exact[n]) for n in given)]:
        assert 0 < error(ours, theirs.double()) <= 1e-5, name  # 0: it was the same path


@pytest.mark.parametrize("product", [-1e-6, -1.0, -80.0])
def test_slow_and_fast_decay_are_near_float64(product: float) -> None:
    given = inputs(1, 3, 9, 4)
    given |= {"delta": torch.rand_like(given["u"]) * 0.9 + 0.1, "A": product * (torch.rand_like(given["A"]) / 2 + 0.5)}
    del given["delta_bias"]
    near(given, return_last_state=True)


@pytest.mark.parametrize("bias", [-12.0, -5.0, 25.0])
def test_small_and_large_steps_of_softplus_are_near_float64(bias: float) -> None:
    given = inputs(1, 3, 5, 4)
    del given["z"], given["D"]  # which would hide small values
    near({**given, "delta_bias": torch.full_like(given["delta_bias"], bias)}, delta_softplus=True)


@pytest.mark.parametrize(
    "changes",
    [{"delta": 1e4, "A": -16.0, "u": 1e10}, {"delta_bias": -100.0}, {"delta_bias": 100.0}, {"z": -1e4}, {"A": -1e30}],
    ids=str,
)
def test_extreme_inputs_give_finite_outputs_and_gradients(changes: dict[str, float]) -> None:
    given = inputs(1, 3, 5, 4)
    given |= {name: torch.full_like(given[name], value) for name, value in changes.items()}
    outputs, gradients = run(selective_scan, given, delta_softplus=True, return_last_state=True)
    assert all(torch.isfinite(t).all() for t in [*outputs, *gradients.values()])


@pytest.mark.parametrize(("kind", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_is_rounded_at_the_ends_only(kind: torch.dtype, rounding: float) -> None:
    given = {name: t.to(kind) for name, t in inputs(1, 5, 9, 5).items()}
    near(given, TRUNCATED * rounding, 4 * TRUNCATED * rounding, delta_softplus=True, return_last_state=True)
    mixed = {name: t.float() if name in ("A", "D", "delta_bias") else t for name, t in given.items()}
    near(mixed, TRUNCATED * rounding, 4 * TRUNCATED * rounding, delta_softplus=True)


def test_the_order_of_memory_does_not_matter() -> None:
    given = inputs(2, 3, 5, 4)
    turned = {name: t.permute(2, 0, 1).contiguous().permute(1, 2, 0) if t.ndim == 3 else t for name, t in given.items()}
    turned["z"] = torch.cat([given["z"]] * 2, 1)[:, :3]  # as in a Mamba block
    (y, gradients), (other, others) = (run(selective_scan, each, delta_softplus=True) for each in (given, turned))
    assert torch.equal(y[0], other[0])
    assert all(torch.equal(gradients[name], others[name]) for name in given)


@pytest.mark.parametrize("name", NAMES)
def test_each_input_may_be_the_only_one_with_a_gradient(name: str) -> None:
    given = inputs(1, 2, 3, 2)
    _, expected = run(selective_scan, given)
    leaf = given[name].clone().requires_grad_()
    y = selective_scan(**{**given, name: leaf})
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    assert torch.equal(torch.autograd.grad(y, leaf, weights)[0], expected[name])


def test_the_last_state_alone_has_its_gradient() -> None:
    given = {name: t for name, t in inputs(1, 2, 5, 3).items() if name not in OPTIONAL}

    def last(scan: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        state = scan(**leaves, delta_softplus=True, return_last_state=True)[1]
        return dict(
            zip(leaves, torch.autograd.grad(state.sum(), list(leaves.values()), allow_unused=True), strict=True)
        )

    ours, exact = last(selective_scan, given), last(selective_scan_reference, {n: t.double() for n, t in given.items()})
    assert all(error(ours[name], exact[name]) <= 1e-4 for name in ("u", "delta", "A", "B"))
    assert exact["C"] is None and not ours["C"].any()


def test_it_repeats_to_the_last_bit_and_keeps_nothing_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given, kept = inputs(2, 19, 5, 8), []
    run_kernel = scan_triton._run

    def keep(kernel: Any, softplus: bool, tensors: dict[str, Tensor | None]) -> None:
        kept.append(None if tensors["starts"] is None else tuple(tensors["starts"].shape))
        run_kernel(kernel, softplus, tensors)

    monkeypatch.setattr(scan_triton, "_run", keep)
    first, second = (run(selective_scan, given, delta_softplus=True)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in given)
    selective_scan(**given, delta_softplus=True)
    with torch.no_grad():
        selective_scan(**{name: t.requires_grad_() for name, t in given.items()}, delta_softplus=True)
    assert kept == [(2, 2, 1, 19, 8)] * 4 + [None] * 2  # the state before every chunk


# ---- the operator, the block, and the choice --------------------------------------------------------------------------------


@library_warnings
@pytest.mark.parametrize("whole", [True, False])
def test_the_scan_is_a_well_formed_operator(whole: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 1, 1, 2), (3, 1, 1, 2), (1, 2, 4), (3, 1, 1, 4), (3, 1, 1, 4), (1, 2), (3, 1, 1, 2), (1, 2)]
    given = [torch.rand(shape, generator=rng).to(DEVICE) if whole or k < 5 else None for k, shape in enumerate(shapes)]
    y, last, starts = torch.ops.ehr.scan_triton(*given, True, True)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")  # a compiled block has the others
    backward = (y, last if whole else None, *given, starts, True)
    torch.library.opcheck(torch.ops.ehr.scan_triton_backward.default, backward, test_utils=quick)
    leaves = [t if t is None else t.requires_grad_() for t in given]
    torch.library.opcheck(torch.ops.ehr.scan_triton.default, (*leaves, True, True), test_utils=quick)


@library_warnings
def test_a_compiled_block_equals_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    block, x = MambaBlock(4, d_state=2).to(DEVICE), torch.randn(1, 5, 4, device=DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for call, choice in ((compiled, "triton"), (block, "triton"), (block, "torch")):
        monkeypatch.setenv("EHR_SCAN", choice)
        y = call(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-6)


def test_what_it_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(1, 2, 3, 2)
    with pytest.raises(RuntimeError, match=r"EHR_SCAN=triton, but triton cannot be used: it cannot do float64"):
        selective_scan(**{name: t.double() for name, t in given.items()})
    with pytest.raises(RuntimeError, match="more than 256 states"):
        selective_scan(**inputs(1, 2, 3, 257))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu; EHR_SCAN=torch does without"):
        selective_scan(**{name: t.cpu() for name, t in given.items()})


def test_it_comes_between_the_cuda_kernel_and_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a device that says it is CUDA: the kernel if it is there, else Triton's, and each that is not says so once."""
    triton, x = ("triton", "ehrmodels.scan_triton"), SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    monkeypatch.delenv("EHR_SCAN")
    monkeypatch.setattr(ehrmodels.kernels, "_imported", ehrmodels.kernels._imported.__wrapped__)
    assert ehrmodels.kernels.kernel_for(*triton, x, choice="triton") is scan_triton
    monkeypatch.setenv("EHR_SCAN", "cuda")
    assert ehrmodels.kernels.kernel_for(*triton, x, choice="triton") is None
    monkeypatch.setenv("EHR_SCAN", "triton")
    assert ehrmodels.kernels.kernel_for("selective_scan_cuda", "mamba_ssm", x) is None
    assert not caplog.records

    def broken() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(scan_triton, "try_out", broken)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="triton cannot be used: Failed to find C"):
        ehrmodels.kernels.kernel_for(*triton, x, choice="triton")
    monkeypatch.delenv("EHR_SCAN")
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert ehrmodels.kernels.kernel_for("selective_scan_cuda", "mamba_ssm", x, instead="Triton or else PyTorch") is None
    assert ehrmodels.kernels.kernel_for(*triton, x, choice="triton") is None
    said = [record.getMessage() for record in caplog.records]
    assert "Triton or else PyTorch does its work" in said[1] and "PyTorch does its work" in said[2]
    assert isinstance(scan_triton, ModuleType)
