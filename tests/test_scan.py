"""The selective scan and the causal convolution: against the plain loop, in every type, when compiled and exported, and the kernel's choice."""

import itertools
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ehrmodels.kernels
import ehrmodels.scan
from ehrmodels.mamba import MambaBlock
from ehrmodels.scan import causal_conv1d, selective_scan, selective_scan_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# torch's own use of what it has deprecated, while it compiles or exports
library_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
exact = {"rtol": 1e-9, "atol": 1e-10}  # in float64


@pytest.fixture(autouse=True)
def no_choice_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EHR_SCAN", raising=False)


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Tensor, Tensor], None]:
    """Lets the scan walk in chunks of so many steps."""
    return lambda steps, u, A: monkeypatch.setattr(ehrmodels.scan, "CHUNK", steps * len(u) * A.numel())


@pytest.fixture
def found() -> Iterator[None]:
    """No memory of kernels from before the test, nor after it."""
    ehrmodels.kernels._imported.cache_clear()
    yield
    ehrmodels.kernels._imported.cache_clear()


def inputs(
    batch: int, width: int, steps: int, states: int, kind: tuple[str, str] = ("variable", "variable")
) -> dict[str, Tensor]:
    """Random float64 inputs, all of them given; ``kind`` is the form of B and C."""
    rng = torch.Generator().manual_seed(batch + 10 * width + 100 * steps)
    shapes = {
        "variable": (batch, states, steps),
        "two groups": (batch, 2, states, steps),
        "all groups": (batch, width, states, steps),
        "constant": (width, states),
    }
    wanted = [(batch, width, steps)] * 2 + [
        (width, states),
        shapes[kind[0]],
        shapes[kind[1]],
        (width,),
        (batch, width, steps),
        (width,),
    ]
    given = {
        name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in zip(NAMES, wanted, strict=True)
    }
    given["A"] = -given["A"].exp()
    return given


def sized(product: float, batch: int, width: int, steps: int, states: int) -> dict[str, Tensor]:
    """Float32 inputs whose delta * A reaches ``product`` and comes within a factor of 20 of it; no softplus or bias between."""
    rng = torch.Generator().manual_seed(0)
    given = {name: value.float() for name, value in inputs(batch, width, steps, states).items() if name != "delta_bias"}
    given["delta"] = torch.rand(batch, width, steps, generator=rng) * 0.9 + 0.1
    given["A"] = product * (torch.rand(width, states, generator=rng) * 0.5 + 0.5)
    return given


def run(scan: Callable[..., Any], given: dict[str, Tensor], **options: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of ``scan`` and the gradients of a random weighting of all of them."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    outputs = scan(**leaves, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return [o.detach() for o in outputs], dict(zip(leaves, gradients, strict=True))


def same(given: dict[str, Tensor], **options: bool) -> None:
    """The scan and the plain loop agree in everything."""
    outputs, gradients = run(selective_scan, given, **options)
    expected, expected_gradients = run(selective_scan_reference, given, **options)
    assert len(outputs) == 1 + options.get("return_last_state", False)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **exact)
    for name in given:
        torch.testing.assert_close(
            gradients[name], expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}", **exact
        )


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


# ---- the same as the plain loop ---------------------------------------------------------------------------------------------


def test_the_loop_follows_the_equations() -> None:
    """One channel, one state, two steps, by hand."""
    u, delta, B, C = (torch.tensor([[pair]]) for pair in ([2.0, 3.0], [0.5, 1.5], [1.0, -2.0], [4.0, 0.5]))
    first = 0.5 * 1.0 * 2.0
    second = math.exp(1.5 * -0.7) * first + 1.5 * -2.0 * 3.0
    for scan in (selective_scan, selective_scan_reference):
        y, last = scan(u, delta, torch.tensor([[-0.7]]), B, C, D=torch.tensor([10.0]), return_last_state=True)
        torch.testing.assert_close(y, torch.tensor([[[4.0 * first + 20.0, 0.5 * second + 30.0]]]))
        torch.testing.assert_close(last, torch.tensor([[[second]]]))


@pytest.mark.parametrize(
    "absent", [c for n in range(4) for c in itertools.combinations(("D", "z", "delta_bias"), n)], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_every_option_equals_the_loop(
    absent: tuple[str, ...], softplus: bool, last: bool, chunk: Callable[..., None]
) -> None:
    given = {name: value for name, value in inputs(2, 3, 7, 4).items() if name not in absent}
    if not softplus:
        given["delta"] = given["delta"].abs()
    chunk(3, given["u"], given["A"])
    same(given, delta_softplus=softplus, return_last_state=last)


@pytest.mark.parametrize(
    "kind", list(itertools.product(("variable", "two groups", "all groups", "constant"), repeat=2)), ids=" and ".join
)
def test_every_form_of_b_and_c_equals_the_loop(kind: tuple[str, str], chunk: Callable[..., None]) -> None:
    given = inputs(3, 4, 5, 2, kind)
    chunk(2, given["u"], given["A"])
    same(given, delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_length_equals_the_loop(steps: int, batch: int, chunk: Callable[..., None]) -> None:
    given = inputs(batch, 2, steps, 3)
    chunk(4, given["u"], given["A"])
    same(given, delta_softplus=True, return_last_state=True)


def test_one_step_wider_than_a_chunk_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ehrmodels.scan, "CHUNK", 1)
    same(inputs(2, 3, 5, 4), delta_softplus=True, return_last_state=True)


def test_the_default_chunk_equals_the_loop() -> None:
    given = inputs(4, 64, 300, 16)
    assert 2 * ehrmodels.scan._chunk(4 * 64 * 16) < 300  # three chunks, the last of them not full
    same(given, delta_softplus=True, return_last_state=True)


def test_the_order_of_memory_does_not_matter(chunk: Callable[..., None]) -> None:
    given = inputs(3, 4, 5, 2)
    chunk(2, given["u"], given["A"])
    turned = {name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in given.items()}
    torch.testing.assert_close(selective_scan(**turned), selective_scan(**given), **exact)
    same(turned, delta_softplus=True)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_those_of_finite_differences(last: bool, chunk: Callable[..., None]) -> None:
    given = inputs(2, 2, 5, 2)
    chunk(2, given["u"], given["A"])
    leaves = [value.requires_grad_() for value in given.values()]
    assert torch.autograd.gradcheck(
        lambda *each: selective_scan(*each, delta_softplus=True, return_last_state=last), leaves
    )


def test_the_last_state_alone_has_its_gradient(chunk: Callable[..., None]) -> None:
    given = inputs(2, 2, 5, 2)
    chunk(2, given["u"], given["A"])
    given["delta"] = given["delta"].abs()
    leaves = [given[name].requires_grad_() for name in ("u", "delta", "A", "B")]
    assert torch.autograd.gradcheck(lambda *each: selective_scan(*each, given["C"], return_last_state=True)[1], leaves)


@pytest.mark.parametrize("name", NAMES)
def test_each_input_may_be_the_only_one_with_a_gradient(name: str, chunk: Callable[..., None]) -> None:
    given = inputs(2, 3, 5, 2)
    chunk(2, given["u"], given["A"])
    _, expected = run(selective_scan_reference, given)
    leaf = given[name].clone().requires_grad_()
    outputs = selective_scan(**{**given, name: leaf})
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(outputs, leaf, weights)[0], expected[name], **exact)


# ---- precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [-1e-6, -1e-2, -1.0, -20.0, -80.0])
@pytest.mark.parametrize("shape", [(2, 16, 300, 16), (1, 3, 1, 2), (4, 64, 150, 16)], ids=str)
def test_float32_is_near_float64(product: float, shape: tuple[int, int, int, int]) -> None:
    given = sized(product, *shape)
    outputs, gradients = run(selective_scan, given, return_last_state=True)
    expected, expected_gradients = run(
        selective_scan_reference, {name: value.double() for name, value in given.items()}, return_last_state=True
    )
    assert outputs[0].dtype == torch.float32
    for ours, theirs in zip(outputs, expected, strict=True):
        assert error(ours, theirs) <= 1e-5
    for name in given:
        if expected_gradients[name].abs().max() > 0:  # A has none at a length of 1
            assert error(gradients[name], expected_gradients[name]) <= 1e-4, name
        else:
            assert not gradients[name].any(), name


@pytest.mark.parametrize(
    ("changes", "softplus"),
    [
        ({"delta": 1e4, "A": -16.0}, False),
        ({"delta": 1e4, "A": -16.0, "u": 1e10}, False),
        ({"delta": 1e4, "A": -16.0}, True),
        ({"delta": 0.0}, False),
        ({"u": 1e10}, True),
        ({"delta_bias": -100.0}, True),
        ({"delta_bias": 100.0}, True),
        ({"z": -1e4}, True),
        ({"z": 1e4}, True),
        ({"A": 0.0}, True),
        ({"A": -1e30}, True),
    ],
    ids=str,
)
def test_extreme_inputs_give_finite_outputs_and_gradients(
    changes: dict[str, float], softplus: bool, chunk: Callable[..., None]
) -> None:
    given = {name: value.float() for name, value in inputs(2, 3, 7, 4).items()}
    given["delta"] = given["delta"].abs()
    given |= {name: torch.full_like(given[name], value) for name, value in changes.items()}
    chunk(3, given["u"], given["A"])
    outputs, gradients = run(selective_scan, given, delta_softplus=softplus, return_last_state=True)
    assert all(torch.isfinite(output).all() for output in outputs)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize(("kind", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_is_rounded_at_the_output_only(kind: torch.dtype, rounding: float) -> None:
    given = {name: value.to(kind) for name, value in inputs(2, 8, 200, 16).items()}
    given["A"] = (given["A"].float() / 50).to(kind)  # long memory: rounded states would drift
    y, last = selective_scan(**given, delta_softplus=True, return_last_state=True)
    wide, wide_last = selective_scan_reference(
        **{name: value.double() for name, value in given.items()}, delta_softplus=True, return_last_state=True
    )
    assert (y.dtype, last.dtype) == (kind, torch.float32)
    assert ((y.double() - wide).abs() <= wide.abs() * rounding + wide.abs().max() * 1e-5).all()
    assert error(last, wide_last) <= 1e-5


@pytest.mark.parametrize(("kind", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_gradients_have_its_type_and_are_near(kind: torch.dtype, rounding: float) -> None:
    given = {name: value.to(kind) for name, value in inputs(2, 8, 50, 4).items()}
    _, gradients = run(selective_scan, given, delta_softplus=True)
    _, expected = run(
        selective_scan_reference, {name: value.double() for name, value in given.items()}, delta_softplus=True
    )
    for name, gradient in gradients.items():
        assert gradient.dtype == kind, name
        assert error(gradient, expected[name]) <= 4 * rounding, name  # the weights of the outputs are rounded too


def test_autocast_does_not_lower_the_precision_of_the_scan() -> None:
    given = {name: value.float() for name, value in inputs(2, 3, 20, 4).items()}
    outputs, gradients = run(selective_scan, given, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_gradients = run(selective_scan, given, delta_softplus=True)
    assert torch.equal(cast[0], outputs[0])
    assert all(torch.equal(cast_gradients[name], gradients[name]) for name in given)


# ---- memory -----------------------------------------------------------------------------------------------------------------


def kept(given: dict[str, Tensor]) -> dict[int, Tensor]:
    """What autograd keeps for the backward pass, each piece of memory once."""
    tensors: dict[int, Tensor] = {}
    leaves = {name: value.requires_grad_() for name, value in given.items()}

    def keep(t: Tensor) -> Tensor:
        tensors[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        selective_scan(**leaves, delta_softplus=True)
    return tensors


def test_far_less_than_all_states_is_kept(chunk: Callable[..., None]) -> None:
    batch, width, steps, states, length = 2, 16, 256, 64, 32
    given = inputs(batch, width, steps, states)
    del given["D"], given["z"]
    chunk(length, given["u"], given["A"])
    tensors = kept(given)
    all_states = batch * width * steps * states
    assert sum(t.untyped_storage().nbytes() // t.itemsize for t in tensors.values()) < all_states / 4
    starts = [t for t in tensors.values() if t.numel() == all_states // length]
    assert [len(t) for t in starts] == [steps // length]


def test_nothing_is_kept_without_gradients() -> None:
    given = inputs(2, 3, 5, 4)
    u, delta, B, C = (given[name].permute(2, 0, 1).unsqueeze(2).contiguous() for name in ("u", "delta", "B", "C"))
    A = given["A"].T[None].contiguous()
    assert torch.ops.ehr.scan(u, delta, A, B, C, False)[2].numel() == 0
    assert torch.ops.ehr.scan(u, delta, A, B, C, True)[2].shape == (1, 2, 1, 4, 3)


@pytest.mark.parametrize("without", ["no_grad", "no input that asks for one"])
def test_the_scan_keeps_nothing_without_gradients(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    scan = ehrmodels.scan._scan
    monkeypatch.setattr(ehrmodels.scan, "_scan", lambda *each: asked.append(each[-1]) or scan(*each))
    given = inputs(2, 3, 5, 4)
    if without == "no_grad":
        given["u"].requires_grad_()
        with torch.no_grad():
            selective_scan(**given)
    else:
        selective_scan(**given)
    assert asked == [False]


# ---- operators, compiled and exported ---------------------------------------------------------------------------------------


def flat(requires_grad: bool = True) -> list[Tensor]:
    """Inputs as the operator takes them, (L, B, G, D) and so on, of two groups."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(5, 2, 2, 3), (5, 2, 2, 3), (2, 4, 3), (5, 2, 2, 4), (5, 2, 2, 4)]
    return [torch.rand(shape, generator=rng).requires_grad_(requires_grad) for shape in shapes]


@library_warnings
@pytest.mark.parametrize("steps", [2, 100])
def test_the_scan_is_a_well_formed_operator(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ehrmodels.scan, "CHUNK", steps * 2 * 24)
    torch.library.opcheck(torch.ops.ehr.scan.default, (*flat(), True))
    torch.library.opcheck(torch.ops.ehr.scan.default, (*flat(False), False))
    u, delta, A, B, C = flat(False)
    y, last, starts = torch.ops.ehr.scan(u, delta, A, B, C, True)
    torch.library.opcheck(torch.ops.ehr.scan_backward.default, (y, last, u, delta, A, B, C, starts))


@library_warnings
def test_the_convolution_is_a_well_formed_operator() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(shape, generator=rng, requires_grad=True) for shape in ((5, 2, 3), (3, 4), (3,)))
    torch.library.opcheck(torch.ops.ehr.causal_conv.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.ehr.causal_conv_backward.default, (x.detach() * 2, x.detach(), weight.detach()))


def convolved_and_scanned(weight: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    u = causal_conv1d(given.pop("u"), weight, activation="silu")
    return selective_scan(u, **given, delta_softplus=True, return_last_state=True)


@library_warnings
def test_compiled_equals_eager_at_every_length(chunk: Callable[..., None]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(convolved_and_scanned, fullgraph=True, backend="aot_eager")
    for steps in (7, 6, 12):
        given = {**inputs(2, 3, steps, 4), "weight": torch.rand(3, 4, dtype=torch.float64)}
        chunk(4, given["u"], given["A"])
        outputs, gradients = run(compiled, given)
        expected, expected_gradients = run(convolved_and_scanned, given)
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **exact)
        for name in given:
            torch.testing.assert_close(gradients[name], expected_gradients[name], **exact)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], expected[0], **exact)


@library_warnings
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")),
    reason="torch's default compiler needs g++ or c++, which is not here",
)
def test_a_block_that_the_default_compiler_has_compiled_equals_an_eager_one() -> None:
    """Gradients of a compiled block, which are the same to all compilers, are looked at with each kernel."""
    torch.compiler.reset()
    torch.manual_seed(0)
    block, x = MambaBlock(8, d_state=4).requires_grad_(False), torch.randn(2, 6, 8)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-6)


@library_warnings
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch looks, not the block
def test_an_exported_block_gives_the_same_numbers_at_another_length(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[dev]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")
    torch.manual_seed(0)
    block = MambaBlock(8, d_state=4).eval()
    file = tmp_path / "block.onnx"
    length = torch.export.Dim("length", min=2, max=1024)
    torch.onnx.export(block, (torch.randn(2, 6, 8),), file, dynamo=True, dynamic_shapes=({1: length},), verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for steps in (6, 41, 2):
        x = torch.randn(2, steps, 8)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), block(x).detach(), rtol=1e-4, atol=1e-5)


# ---- wrong arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("u", (2, 4), "expected u"),
        ("A", (3, 2), "expected u"),
        ("A", (4,), "expected u"),
        ("delta", (2, 4, 6), "expected delta"),
        ("z", (2, 3, 5), "expected z"),
        ("D", (3,), "expected D"),
        ("D", (4, 1), "expected D"),
        ("delta_bias", (5,), "expected delta_bias"),
        ("B", (2, 5, 2), "expected B"),
        ("B", (2, 3, 2, 5), "expected B"),  # 4 channels are not 3 groups
        ("B", (2, 4), "expected B"),
        ("C", (2, 2, 3, 5), "expected C"),
        ("C", (1, 2, 5), "expected C"),
    ],
)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_reference])
def test_shapes_that_do_not_agree_are_named(
    scan: Callable[..., Any], name: str, shape: tuple[int, ...], message: str
) -> None:
    given = inputs(2, 4, 5, 2)
    scan(**given)
    with pytest.raises(ValueError, match=message):
        scan(**{**given, name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_complex_states_are_refused(name: str) -> None:
    given = inputs(2, 4, 5, 2)
    with pytest.raises(ValueError, match="must be real"):
        selective_scan(**{**given, name: given[name].to(torch.complex64)})


def test_wrong_arguments_of_the_convolution_are_named() -> None:
    x, weight = torch.zeros(2, 3, 5), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', found 'relu'"):
        causal_conv1d(x, weight, activation="relu")
    for wrong in ((x[0], weight), (x, weight[:2]), (x, weight[:, None]), (x, weight, torch.zeros(4))):
        with pytest.raises(ValueError, match="expected x"):
            causal_conv1d(*wrong)


# ---- choice of the kernel ---------------------------------------------------------------------------------------------------

KERNELS = [("selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface"), ("causal_conv1d_cuda", "causal_conv1d")]
on_cuda: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))  # stands for a tensor there


@pytest.fixture(params=KERNELS, ids=lambda names: names[1])
def kernel(request: pytest.FixtureRequest, found: None) -> tuple[str, str]:
    return request.param


@pytest.fixture
def installed(kernel: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The interface of a kernel that imports."""
    for name in kernel:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return sys.modules[kernel[1]]


@pytest.fixture
def broken(kernel: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interface imports but its compiled extension does not."""
    for name in kernel:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, kernel[1], ModuleType(kernel[1]))
    (tmp_path / f"{kernel[0]}.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)


def test_tensors_on_cuda_get_the_kernel_and_others_do_not(kernel: tuple[str, str], installed: ModuleType) -> None:
    assert ehrmodels.kernels.kernel_for(*kernel, on_cuda) is installed
    assert ehrmodels.kernels.kernel_for(*kernel, torch.zeros(1)) is None
    assert ehrmodels.kernels.kernel_for(*kernel, on_cuda) is installed


def test_the_kernel_is_not_used_where_that_is_asked_for(
    kernel: tuple[str, str], installed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EHR_SCAN", "torch")
    assert ehrmodels.kernels.kernel_for(*kernel, on_cuda) is None
    monkeypatch.setenv("EHR_SCAN", "cuda")
    assert ehrmodels.kernels.kernel_for(*kernel, on_cuda) is installed


def test_a_broken_kernel_is_left_out_with_one_warning(
    kernel: tuple[str, str], broken: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert [ehrmodels.kernels.kernel_for(*kernel, on_cuda) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert kernel[0] in record.getMessage() and "undefined symbol" in record.getMessage()


def test_a_broken_kernel_that_is_asked_for_is_an_error(
    kernel: tuple[str, str], broken: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EHR_SCAN", "cuda")
    with pytest.raises(RuntimeError, match=f"{kernel[0]} cannot be used: undefined symbol.*EHR_SCAN=torch"):
        ehrmodels.kernels.kernel_for(*kernel, on_cuda)


def test_asking_for_the_kernel_on_a_cpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EHR_SCAN", "cuda")
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu.*EHR_SCAN=torch does without"):
        selective_scan(**inputs(2, 4, 5, 2))
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu.*EHR_SCAN=torch does without"):
        causal_conv1d(torch.zeros(2, 3, 5), torch.zeros(3, 4))
    monkeypatch.setenv("EHR_SCAN", "torch")
    assert selective_scan(**inputs(2, 4, 5, 2)).shape == (2, 4, 5)
    assert causal_conv1d(torch.zeros(2, 3, 5), torch.zeros(3, 4)).shape == (2, 3, 5)


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EHR_SCAN", "jax")
    with pytest.raises(ValueError, match="EHR_SCAN=jax is not known; expected cuda, triton, cpp or torch"):
        selective_scan(**inputs(2, 4, 5, 2))
    with pytest.raises(ValueError, match="EHR_SCAN=jax is not known"):
        causal_conv1d(torch.zeros(2, 3, 5), torch.zeros(3, 4))


def test_the_kernel_gets_every_argument_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: t.float() for name, t in inputs(2, 4, 5, 2).items()}
    expected = selective_scan(**given, delta_softplus=True)
    asked: list[list[str]] = []
    fake = SimpleNamespace(selective_scan_fn=lambda *each: ["kernel", selective_scan_reference(*each)])
    monkeypatch.setattr(
        ehrmodels.scan,
        "kernel_for",
        lambda extension, interface, x, beyond, choice="cuda", **_: (
            None if choice != "cuda" else asked.append(beyond) or (None if beyond else fake)
        ),
    )
    name, output = selective_scan(**given, delta_softplus=True)
    assert name == "kernel"
    torch.testing.assert_close(output, expected)
    selective_scan(**given, return_last_state=True)
    with torch.no_grad():
        selective_scan(**given, return_last_state=True)
    selective_scan(**{name: t.double() for name, t in given.items()})
    selective_scan(**inputs(1, 2, 3, 257))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.testing.assert_close(selective_scan(**given, delta_softplus=True), expected)  # by what comes after it
    with torch.no_grad():
        assert selective_scan(**given, delta_softplus=True)[0] == "kernel"
    last = "a gradient through the last state"
    assert asked == [
        [],
        [last],
        [],
        ["float64"],
        ["float64", "more than 256 states"],
        ["gradients that repeat bit by bit"],
        [],
    ]  # what the kernel cannot do PyTorch does


def test_the_kernel_of_the_convolution_serves_the_widths_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fake = SimpleNamespace(
        causal_conv1d_fn=lambda x, weight, bias, activation: asked.append((weight.shape[1], bias, activation)) or x
    )
    monkeypatch.setattr(
        ehrmodels.scan, "kernel_for", lambda extension, interface, x, beyond, **_: None if beyond else fake
    )
    for width in range(1, 7):
        causal_conv1d(torch.zeros(2, 3, 5), torch.zeros(3, width), activation="silu")
    assert asked == [(width, None, "silu") for width in (2, 3, 4)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every call of a kernel that seems to be there."""
    calls: list[tuple[Any, ...]] = []

    def keep(*each: Any, activation: str | None = None) -> Any:
        calls.append(each)
        return each[0]

    fake = SimpleNamespace(selective_scan_fn=keep, causal_conv1d_fn=keep)
    monkeypatch.setattr(
        ehrmodels.scan, "kernel_for", lambda extension, interface, x, beyond, **_: None if beyond else fake
    )
    return calls


def test_the_kernels_get_one_type(calls: list[tuple[Any, ...]]) -> None:
    given = {name: t.float() for name, t in inputs(2, 4, 5, 2).items()}
    selective_scan(**{**given, "u": given["u"].bfloat16(), "A": given["A"].double()})
    u, delta, A, B, C, _, z, *_ = calls[0]
    assert {t.dtype for t in (u, delta, B, C, z)} == {torch.bfloat16}
    assert A.dtype == torch.float32
    causal_conv1d(torch.zeros(2, 8, 5, dtype=torch.bfloat16), torch.zeros(8, 4), torch.zeros(8))
    assert {t.dtype for t in calls[1]} == {torch.bfloat16}


@pytest.mark.parametrize(("width", "as_it_is"), [(8, True), (6, False)])
def test_the_kernel_of_the_convolution_gets_memory_in_an_order_that_it_knows(
    width: int, as_it_is: bool, calls: list[tuple[Any, ...]]
) -> None:
    x = torch.zeros(5, 2, width).permute(1, 2, 0)  # channels last
    causal_conv1d(x, torch.zeros(width, 4))
    assert (calls[0][0].stride() == x.stride()) == as_it_is
    assert calls[0][0].is_contiguous() != as_it_is


def test_a_kernel_is_not_used_for_what_it_cannot_do(
    kernel: tuple[str, str], installed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ehrmodels.kernels.kernel_for(*kernel, on_cuda, ["float64"]) is None
    monkeypatch.setenv("EHR_SCAN", "cuda")
    with pytest.raises(RuntimeError, match="it cannot do float64"):
        ehrmodels.kernels.kernel_for(*kernel, on_cuda, ["float64"])


# ---- the convolution --------------------------------------------------------------------------------------------------------


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))
    return F.silu(y) if activation else y


def of_convolution(batch: int, width: int, steps: int, kernel: int, bias: bool = True) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(steps)
    shapes = {"x": (batch, width, steps), "weight": (width, kernel)} | ({"bias": (width,)} if bias else {})
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("kernel", [1, 2, 4, 5])
@pytest.mark.parametrize("steps", [1, 3, 4, 9])  # also shorter than the kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_the_convolution_equals_that_of_torch(kernel: int, steps: int, bias: bool, activation: Any) -> None:
    given = of_convolution(2, 3, steps, kernel, bias)
    outputs, gradients = run(causal_conv1d, given, activation=activation)
    expected, expected_gradients = run(convolved, given, activation=activation)
    torch.testing.assert_close(outputs, expected, **exact)
    for name in given:
        torch.testing.assert_close(gradients[name], expected_gradients[name], **exact)


@pytest.mark.parametrize("steps", [2, 6])
def test_gradients_of_the_convolution_are_those_of_finite_differences(steps: int) -> None:
    leaves = [value.requires_grad_() for value in of_convolution(2, 2, steps, 4).values()]
    assert torch.autograd.gradcheck(lambda *each: causal_conv1d(*each, activation="silu"), leaves)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_convolution_in_bfloat16_is_rounded_at_the_output_only(activation: str | None) -> None:
    given = {name: value.bfloat16() for name, value in of_convolution(4, 16, 50, 4).items()}
    y = causal_conv1d(**given, activation=activation)
    wide = convolved(**{name: value.double() for name, value in given.items()}, activation=activation)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - wide).abs() <= wide.abs() * 2**-8 + 1e-6).all()


def test_the_convolution_looks_back_only() -> None:
    given = of_convolution(2, 3, 9, 4)
    before = causal_conv1d(**given)
    given["x"][:, :, 5:] += 1
    after = causal_conv1d(**given)
    assert torch.equal(after[:, :, :5], before[:, :, :5])
    assert (after[:, :, 5:] != before[:, :, 5:]).all()


# ---- other implementations --------------------------------------------------------------------------------------------------


def test_mambapy_gives_the_same_states() -> None:
    pscan = pytest.importorskip("mambapy.pscan", reason="mambapy is not installed").pscan
    given = {name: value.float() for name, value in inputs(2, 4, 37, 3).items()}
    given["delta"] = given["delta"].abs()

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(torch.einsum("bdl,dn->bldn", delta, A))
        return torch.einsum("bldn,bnl->bdl", pscan(decay, torch.einsum("bdl,bnl->bldn", delta * u, B)), C)

    given = {name: given[name] for name in ("u", "delta", "A", "B", "C")}
    outputs, gradients = run(selective_scan, given)
    expected, expected_gradients = run(scan, given)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    for name in given:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "kind", [("variable", "variable"), ("two groups", "two groups"), ("constant", "constant")], ids=" and ".join
)
def test_mamba_ssm_gives_the_same(kind: tuple[str, str]) -> None:
    reason = "mamba_ssm does not import here"
    theirs = pytest.importorskip(
        "mamba_ssm.ops.selective_scan_interface", reason=reason, exc_type=ImportError
    ).selective_scan_ref
    given = {name: value.float() for name, value in inputs(2, 4, 37, 3, kind).items()}
    outputs, gradients = run(selective_scan, given, delta_softplus=True, return_last_state=True)
    expected, expected_gradients = run(theirs, given, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    for name in given:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and the kernels run on nothing else")
def test_the_kernels_equal_torch_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        pytest.importorskip(name, reason=f"{name} is not built", exc_type=ImportError)
    given = {name: value.float().cuda() for name, value in inputs(2, 8, 300, 16).items()}
    convolution = {name: value.float().cuda() for name, value in of_convolution(2, 8, 300, 4).items()}

    def both(choice: str) -> list[Tensor]:
        monkeypatch.setenv("EHR_SCAN", choice)
        rng = torch.Generator().manual_seed(0)
        results: list[Tensor] = []
        for leaves, function in (
            (given, lambda **k: selective_scan(**k, delta_softplus=True)),
            (convolution, causal_conv1d),
        ):
            leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
            y = function(**leaves)
            weights = torch.randn(y.shape, generator=rng).to(y)
            results += [y.detach(), *torch.autograd.grad(y, list(leaves.values()), weights)]
        return results

    for kernel, plain in zip(both("cuda"), both("torch"), strict=True):
        assert error(kernel, plain.double()) <= 1e-3
