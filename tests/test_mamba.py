"""The Mamba block: its parameters are those of mamba-ssm, and its parallel, plain and step-by-step results are one."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ehrmodels.mamba import MambaBlock

SIZES = [(8, 16, 4, 2), (16, 4, 4, 1), (17, 8, 3, 2), (64, 16, 4, 2), (40, 1, 2, 3)]  # d, N, K, expand


def make(d_model: int = 24, d_state: int = 4, d_conv: int = 4, expand: int = 2) -> MambaBlock:
    torch.manual_seed(0)
    return MambaBlock(d_model, d_state, d_conv, expand)


def sequence(batch: int = 2, steps: int = 9, width: int = 24) -> Tensor:
    return torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(1))


def plain(block: MambaBlock, hidden: Tensor) -> Tensor:
    """The block from the equations of the paper, one step after the other."""
    p = dict(block.named_parameters())
    inner, states = p["A_log"].shape
    rank, steps = p["dt_proj.weight"].shape[1], hidden.shape[1]
    both = hidden @ p["in_proj.weight"].T
    x, gate = both[..., :inner], both[..., inner:]
    back = p["conv1d.weight"].shape[2] - 1
    x = F.conv1d(F.pad(x.mT, (back, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=inner).mT
    x = x * torch.sigmoid(x)
    state, outputs = hidden.new_zeros(len(hidden), inner, states), []
    for t in range(steps):
        now = x[:, t]
        chosen = now @ p["x_proj.weight"].T
        delta = torch.log1p(torch.exp(chosen[:, :rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        B, C = chosen[:, rank : rank + states], chosen[:, rank + states :]
        decay = torch.exp(-p["A_log"].exp() * delta[:, :, None])
        state = decay * state + delta[:, :, None] * B[:, None] * now[:, :, None]
        y = torch.einsum("bdn,bn->bd", state, C) + p["D"] * now
        outputs.append((y * gate[:, t] * torch.sigmoid(gate[:, t])) @ p["out_proj.weight"].T)
    return torch.stack(outputs, 1)


def shuffled(block: MambaBlock) -> MambaBlock:
    """In float64, with A, D and the rest unlike their initial values, so that each of them matters."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=rng)
    return block.double()


def near(ours: Tensor, theirs: Tensor) -> bool:
    """As near as A, D and the bias of delta allow, which are float32 in the scan whatever the rest is."""
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max())


# ---- parameters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "states", "kernel", "expand"), SIZES)
def test_parameters_have_the_names_and_shapes_of_mamba_ssm(width: int, states: int, kernel: int, expand: int) -> None:
    inner, rank = expand * width, math.ceil(width / 16)
    assert {name: tuple(value.shape) for name, value in make(width, states, kernel, expand).state_dict().items()} == {
        "A_log": (inner, states),
        "D": (inner,),
        "in_proj.weight": (2 * inner, width),
        "conv1d.weight": (inner, 1, kernel),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (width, inner),
    }


@pytest.mark.parametrize(("width", "states", "kernel", "expand"), SIZES)
def test_initial_values_are_those_of_the_paper(width: int, states: int, kernel: int, expand: int) -> None:
    block = make(width, states, kernel, expand)
    rank, numbers = math.ceil(width / 16), torch.arange(1, states + 1).float()
    assert torch.equal(block.A_log, numbers.log().expand(expand * width, states))
    assert torch.equal(block.D, torch.ones(expand * width))
    delta = F.softplus(block.dt_proj.bias)
    assert delta.min() >= 1e-3 * (1 - 1e-4) and delta.max() <= 1e-1 * (1 + 1e-4)
    assert block.dt_proj.weight.abs().max() <= rank**-0.5


def test_initial_step_sizes_are_spread_evenly_over_their_logarithm() -> None:
    block = make(512)
    assert 0.9 * 32**-0.5 < block.dt_proj.weight.abs().max() <= 32**-0.5
    place = (F.softplus(block.dt_proj.bias.detach()).log() - math.log(1e-3)) / math.log(100)
    for share in (0.1, 0.5, 0.9):
        assert abs(float(place.quantile(share)) - share) < 0.05


def test_parameters_say_how_they_are_to_be_treated() -> None:
    block = make()
    marked = {
        flag: {n for n, p in block.named_parameters() if getattr(p, flag, False)}
        for flag in ("_no_weight_decay", "_no_reinit")
    }
    assert marked == {"_no_weight_decay": {"A_log", "D"}, "_no_reinit": {"dt_proj.bias"}}


@pytest.mark.parametrize(("width", "states", "kernel", "expand"), SIZES)
def test_weights_of_mamba_ssm_load(width: int, states: int, kernel: int, expand: int) -> None:
    reason = "mamba_ssm does not import here"
    theirs = pytest.importorskip("mamba_ssm.modules.mamba_simple", reason=reason, exc_type=ImportError).Mamba(
        width, states, kernel, expand
    )
    block = make(width, states, kernel, expand)
    block.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(block.state_dict(), strict=True)


# ---- results ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "states", "kernel", "expand"), SIZES)
@pytest.mark.parametrize("steps", [1, 9])
def test_the_parallel_result_equals_the_equations(
    width: int, states: int, kernel: int, expand: int, steps: int
) -> None:
    block, x = shuffled(make(width, states, kernel, expand)), sequence(3, steps, width).double()
    assert near(block(x), plain(block, x))


def test_the_gradients_equal_those_of_the_equations() -> None:
    block, x = shuffled(make()), sequence().double().requires_grad_()
    leaves = {"x": x, **dict(block.named_parameters())}
    ours = torch.autograd.grad(block(x).square().mean(), list(leaves.values()))
    theirs = torch.autograd.grad(plain(block, x).square().mean(), list(leaves.values()))
    for name, one, other in zip(leaves, ours, theirs, strict=True):
        assert near(one, other), name


@pytest.mark.parametrize(("width", "states", "kernel", "expand"), SIZES)
def test_the_step_equals_the_parallel_result(width: int, states: int, kernel: int, expand: int) -> None:
    block, x = make(width, states, kernel, expand), sequence(3, 12, width)
    together, at = block(x), block.start(3)
    for t in range(12):
        y, *at = block.step(x[:, t : t + 1], *at)
        assert y.shape == (3, 1, width)
        torch.testing.assert_close(y[:, 0], together[:, t], rtol=1e-5, atol=1e-5)


def test_the_step_leaves_the_states_before_it_alone() -> None:
    block, x = make(), sequence()
    states = block.step(x[:, :1], *block.start(2))[1:]
    copies = [state.clone() for state in states]
    block.step(x[:, 1:2], *states)
    for state, copied in zip(states, copies, strict=True):
        assert torch.equal(state, copied)


def test_later_inputs_change_nothing_before_them() -> None:
    block, x = shuffled(make()), sequence().double()
    before = block(x)
    for t in (1, 5, 8):
        changed = x.clone()
        changed[:, t:] = 7.0
        after = block(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-9, atol=1e-10)
        assert not torch.isclose(after[:, t:], before[:, t:]).all(-1).any()


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    block, x = shuffled(make()), sequence().double()
    padded = block(F.pad(x, (0, 0, 0, 20)))
    assert padded.shape == (2, 29, 24)
    torch.testing.assert_close(padded[:, :9], block(x), rtol=1e-9, atol=1e-10)


def test_samples_do_not_mix() -> None:
    block, x = shuffled(make()), sequence(4).double()
    together = block(x)
    for i in range(4):
        torch.testing.assert_close(block(x[i : i + 1])[0], together[i], rtol=1e-9, atol=1e-10)


def test_bfloat16_autocast_is_finite_and_near() -> None:
    block, x = make(), sequence(steps=50)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    torch.testing.assert_close(y.float(), block(x), rtol=0.1, atol=0.02)
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_bfloat16_autocast_steps_are_near_the_parallel_result() -> None:
    block, x = make(), sequence()
    together, at = block(x), block.start(2)
    with torch.autocast("cpu", torch.bfloat16):
        for t in range(9):
            y, *at = block.step(x[:, t : t + 1], *at)
            torch.testing.assert_close(y[:, 0].float(), together[:, t], rtol=0.1, atol=0.02)
