"""Selective scan and depthwise causal convolution of Mamba: the CUDA kernels where they import, else Triton's scan, else PyTorch.

References:
  [1] Gu & Dao 2023, arXiv:2312.00752, section 3: h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t, y_t = C_t h_t + D u_t.
  [2] github.com/state-spaces/mamba: the signature and meaning of ``selective_scan_fn``; Dao-AILab/causal-conv1d: ``causal_conv1d_fn``.

The PyTorch scan does the arithmetic of the plain loop with few, large, contiguous, in-place operations. It walks the sequence in
chunks of T steps whose states fit the cache: all decays ``a`` and inputs ``x`` of a chunk in one call each, one ``addcmul_`` a step
for the recurrence, all outputs in one matrix product. Forward keeps only the state at the start of every chunk, O(L / T); backward
computes the chunk's states again and runs the adjoint recurrence the same way. Nothing is divided by a product of decays, so that
nothing under- or overflows however strong the decay is. States are float32 whatever the inputs are (float64 for float64).

Shape letters: B samples, L steps, D channels, N states a channel, G groups of channels that share B and C (1 in Mamba), T steps a chunk.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ehrmodels.kernels import exporting, kernel_for

CHUNK = 2**19  # elements of a chunk's states: the two to three such float32 buffers (2 MiB each) stay in the cache
LOG2E = math.log2(math.e)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Mamba-1's selective scan with the signature and meaning of mamba-ssm's ``selective_scan_fn`` [2].

    Runs mamba-ssm's CUDA kernel on CUDA tensors where it is installed; else that of ``scan_triton``, which also has gradients through
    the last state and, with ``torch.use_deterministic_algorithms``, takes its place since its gradients repeat bit by bit; else
    PyTorch, which also does float64 and more than 256 states. ``EHR_SCAN=cuda`` or ``triton`` makes that kernel's
    absence an error, ``EHR_SCAN=torch`` uses neither. ``EHR_SCAN=cpp`` builds ``scan_cpp`` for the CPU.

    Args:
        u: (B, D, L) input.
        delta: (B, D, L) step sizes.
        A: (D, N) real, usually negative.
        B: (B, N, L), (B, G, N, L), or constant (D, N).
        C: likewise.
        D: (D,) weight of the direct path.
        z: (B, D, L) gate: the output is multiplied by silu(z).
        delta_bias: (D,) added to ``delta``.
        delta_softplus: Apply softplus to ``delta`` after the bias.
        return_last_state: Also return the state after the last step.

    Returns:
        (B, D, L) in the type of ``u``; with ``return_last_state`` also (B, D, N) in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not agree, or A is complex.
        RuntimeError: ``EHR_SCAN`` asks for a kernel that is not there; or a gradient of a gradient is asked for, which there is none of.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    beyond = ["float64"] * (u.dtype == torch.float64) + ["more than 256 states"] * (A.shape[1] > 256)
    through_last = return_last_state and torch.is_grad_enabled()  # the CUDA kernel would take that gradient for 0
    ordered = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()  # it sums by atomic additions
    kernel = kernel_for(
        "selective_scan_cuda",
        "mamba_ssm.ops.selective_scan_interface",
        u,
        [
            *beyond,
            *["a gradient through the last state"] * through_last,
            *["gradients that repeat bit by bit"] * ordered,
        ],
        instead="Triton or else PyTorch",
    )
    if kernel is not None:
        delta, B, C, z = (None if t is None else t.to(u.dtype) for t in (delta, B, C, z))  # it takes one type only
        D, delta_bias = (None if t is None else t.float() for t in (D, delta_bias))
        return _by_kernel(kernel, u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if kernel_for("triton", "ehrmodels.scan_triton", u, beyond, "triton") is not None:
        return _fused(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    wide = torch.promote_types(u.dtype, torch.float32)
    x, step = (_time_major(t, wide) for t in (u, delta))
    if delta_bias is not None:
        step = step + delta_bias.to(wide)
    if delta_softplus:
        step = F.softplus(step)
    b, c, groups = _grouped(B.to(wide), C.to(wide), u)
    a = A.to(wide).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()  # (G, N, D / G)
    x5, step5 = (t.unflatten(2, (groups, -1)).contiguous() for t in (x, step))  # (L, B, G, D / G)
    b, c = b.contiguous(), c.contiguous()
    if exporting():
        y, last = _exported(x5, step5, a, b, c)
    else:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x5, step5, a, b, c))
        compiled = kernel_for(
            "ehrmodels.scan_cpp", "ehrmodels.scan_cpp", u, ["float64"] * (wide == torch.float64), "cpp"
        )
        run = _scan if compiled is None else torch.ops.ehr.scan_cpp
        y, last, _ = run(x5, step5, a, b, c, keep)
    y = y.flatten(2)
    if D is not None:
        y = y + x * D.to(wide)
    if z is not None:
        y = y * F.silu(_time_major(z, wide))
    y = y.to(u.dtype).permute(1, 2, 0)
    return (y, last.transpose(2, 3).flatten(1, 2)) if return_last_state else y


@torch.compiler.disable  # torch.compile cannot look into the extension
def _by_kernel(kernel: Any, *arguments: Any) -> Any:
    return kernel.selective_scan_fn(*arguments)


def _fused(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Any:
    """``selective_scan`` by ``scan_triton``: all of it in one kernel, each input in its own type."""
    b, c, groups = _grouped(B, C, u)
    x, step, gate = (
        None if t is None else _time_major(t, t.dtype).unflatten(2, (groups, -1)) for t in (u, delta, z)
    )  # (L, B, G, D / G)
    a, direct, bias = (
        None if t is None else t.float().unflatten(0, (groups, -1)).contiguous() for t in (A, D, delta_bias)
    )
    given = x, step, a, b, c, direct, gate, bias
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, last, _ = torch.ops.ehr.scan_triton(*given, delta_softplus, keep)
    y = y.flatten(2).permute(1, 2, 0)
    return (y, last.flatten(1, 2)) if return_last_state else y


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """``selective_scan`` as a plain loop over the steps under autograd, straight from the equations: to compare with."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    wide = torch.promote_types(u.dtype, torch.float32)
    x, step, A = u.to(wide), delta.to(wide), A.to(wide)
    if delta_bias is not None:
        step = step + delta_bias.to(wide)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    b, c = (_of_channels(t.to(wide), u) for t in (B, C))  # (B, D, N, L)
    state, outputs = torch.zeros_like(x[..., 0, None] * A), []
    for now, moved, b_t, c_t in zip(step.unbind(2), (step * x).unbind(2), b.unbind(3), c.unbind(3), strict=True):
        state = torch.exp(now.unsqueeze(2) * A) * state + moved.unsqueeze(2) * b_t
        outputs.append((state * c_t).sum(-1))
    y = torch.stack(outputs, 2)
    if D is not None:
        y = y + x * D.to(wide)[:, None]
    if z is not None:
        y = y * F.silu(z.to(wide))
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Depthwise causal convolution: y_t = bias + sum over k of weight_k x_(t - K + 1 + k), with zeros before the first step.

    Runs causal-conv1d's CUDA kernel on CUDA tensors where it is installed, else PyTorch; ``EHR_SCAN`` as in ``selective_scan``.

    Args:
        x: (B, D, L).
        weight: (D, K).
        bias: (D,).
        activation: None, or "silu" (also called "swish").

    Returns:
        (B, D, L) in the type of ``x``.

    Raises:
        ValueError: shapes do not agree, or the activation is another.
        RuntimeError: ``EHR_SCAN=cuda`` and there is no kernel.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', found {activation!r}")
    if (
        x.ndim != 3
        or weight.ndim != 2
        or weight.shape[0] != x.shape[1]
        or (bias is not None and bias.shape != x.shape[1:2])
    ):
        raise ValueError(
            f"expected x (B, D, L), weight (D, K), bias (D,), found {tuple(x.shape)}, {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)}"
        )
    beyond = {"float64": x.dtype == torch.float64, "a width other than 2, 3 or 4": weight.shape[1] not in (2, 3, 4)}
    kernel = kernel_for("causal_conv1d_cuda", "causal_conv1d", x, [what for what, asked in beyond.items() if asked])
    if kernel is not None:
        x = x if x.shape[1] % 8 == 0 else x.contiguous()  # it reads (B, L, D) in memory only for such D
        return kernel.causal_conv1d_fn(
            x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation=activation
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, shift = (
        weight.to(wide),
        torch.zeros(len(weight), dtype=wide, device=x.device) if bias is None else bias.to(wide),
    )
    if exporting():
        y = F.conv1d(F.pad(x.to(wide), (weight.shape[1] - 1, 0)), weight[:, None], shift, groups=len(weight))
    else:
        y = _convolve(_time_major(x, wide).contiguous(), weight, shift).permute(1, 2, 0)
    return (F.silu(y) if activation else y).to(x.dtype)


# ---- the scan ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ehr::scan", mutates_args=())
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (L, B, G, D), last state (B, G, N, D) and, with ``keep``, the state before every chunk (L / T, B, G, N, D).

    Args:
        u: (L, B, G, D), D channels a group.
        delta: (L, B, G, D).
        A: (G, N, D).
        B: (L, B, G, N).
        C: (L, B, G, N).
        keep: whether a backward pass will follow.
    """
    steps, batch, groups, width = u.shape
    states = A.shape[1]
    size = _chunk(batch * A.numel())
    a, h = (u.new_empty(min(size, steps), batch, groups, states, width) for _ in range(2))
    each_a, each_h = a.unbind(), h.unbind()
    y, last = torch.empty_like(u), u.new_zeros(batch, groups, states, width)
    starts = u.new_empty(-(-steps // size) if keep else 0, batch, groups, states, width)
    rate, moved = A * LOG2E, delta * u
    for number, first in enumerate(range(0, steps, size)):
        count = min(size, steps - first)
        part = slice(first, first + count)
        if keep:
            starts[number] = last
        _states(rate, delta[part], moved[part], B[part], a[:count], h[:count], each_a, each_h, last)
        last.copy_(each_h[count - 1])
        flat = batch * groups * count
        torch.bmm(C[part].view(flat, 1, states), h[:count].view(flat, states, width), out=y[part].view(flat, 1, width))
    return y, last, starts


def _states(
    rate: Tensor,
    delta: Tensor,
    moved: Tensor,
    B: Tensor,
    a: Tensor,
    h: Tensor,
    each_a: Any,
    each_h: Any,
    before: Tensor,
) -> None:
    """Fill ``a`` (T, B, G, N, D) with decays and ``h`` with states, from the state ``before`` the chunk."""
    torch.mul(delta.unsqueeze(3), rate, out=a).exp2_()
    torch.mul(B.unsqueeze(4), moved.unsqueeze(3), out=h)
    for t in range(len(a)):
        each_h[t].addcmul_(each_a[t], before)
        before = each_h[t]


def _chunk(elements: int) -> int:
    """T, steps a chunk, for states of so many elements a step."""
    return max(CHUNK // max(elements, 1), 1)


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, (groups, states, width) = u.shape[1], A.shape
    size = _chunk(batch * A.numel())
    return (
        torch.empty_like(u),
        u.new_empty(batch, groups, states, width),
        u.new_empty(-(-u.shape[0] // size) if keep else 0, batch, groups, states, width),
    )


@torch.library.custom_op("ehr::scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C.

    With g_t the gradient of the state h_t: g_t = C_t dy_t + a_(t+1) g_(t+1), and w_t = g_t a_t h_(t-1) is that of delta_t A.
    """
    steps, batch, groups, width = u.shape
    states = A.shape[1]
    size = _chunk(batch * A.numel())
    a, g = (u.new_empty(min(size, steps), batch, groups, states, width) for _ in range(2))
    h = u.new_empty(min(size, steps) + 1, batch, groups, states, width)  # h[0]: the state before the chunk
    each_a, each_g, each_h = a.unbind(), g.unbind(), h.unbind()
    du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
    dA, carried = u.new_zeros(batch, groups, states, width), dlast.clone()
    rate, moved = A * LOG2E, delta * u
    each_delta = delta.unsqueeze(3).unbind()
    for number in reversed(range(len(starts))):
        first = number * size
        count = min(size, steps - first)
        part = slice(first, first + count)
        h[0] = starts[number]
        _states(rate, delta[part], moved[part], B[part], a[:count], h[1 : count + 1], each_a, each_h[1:], each_h[0])
        torch.mul(C[part].unsqueeze(4), dy[part].unsqueeze(3), out=g[:count])
        each_g[count - 1].add_(carried)
        for t in reversed(range(count - 1)):
            each_g[t].addcmul_(each_a[t + 1], each_g[t + 1])
        torch.mul(each_a[0], each_g[0], out=carried)
        flat = batch * groups * count
        gradient, state = g[:count].view(flat, states, width), h[1 : count + 1].view(flat, states, width)
        torch.bmm(state, dy[part].view(flat, width, 1), out=dC[part].view(flat, states, 1))
        torch.bmm(gradient, moved[part].view(flat, width, 1), out=dB[part].view(flat, states, 1))
        torch.bmm(B[part].view(flat, 1, states), gradient, out=du[part].view(flat, 1, width))
        a[:count].mul_(h[:count]).mul_(g[:count])  # w
        for t in range(count):
            dA.addcmul_(each_a[t], each_delta[first + t])
        torch.mul(a[:count], A, out=g[:count])
        torch.sum(g[:count], 3, out=ddelta[part])
    ddelta.addcmul_(du, u)
    return du.mul_(delta), ddelta, dA.sum(0), dB, dC


@_scan_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (u, delta, A, B, C))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or every backward pass would fill a gradient of zeros for the kept states
    ctx.save_for_backward(*inputs[:5], output[2])


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, starts = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy.contiguous()
    dlast = u.new_zeros(starts.shape[1:]) if dlast is None else dlast.contiguous()
    return *_scan_backward(dy, dlast, u, delta, A, B, C, starts), None


_scan.register_autograd(_backward, setup_context=_keep_for_backward)


def _exported(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The same as ``_scan`` with torch's scan operator, which torch.export and ONNX know."""
    from torch._higher_order_ops import scan as scan_operator  # has no public name yet

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, delta, b, c = now
        h = torch.exp(delta.unsqueeze(2) * A) * h + b.unsqueeze(3) * (delta * u).unsqueeze(2)
        return h, (c.unsqueeze(3) * h).sum(2)

    last, y = scan_operator(step, u.new_zeros(u.shape[1], *A.shape), (u, delta, B, C))
    return y, last


# ---- the convolution --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ehr::causal_conv", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(L, B, D) from x (L, B, D), weight (D, K) and bias (D,)."""
    y = torch.addcmul(bias, x, weight[:, -1])
    for back in range(1, min(weight.shape[1], len(x))):
        y[back:].addcmul_(x[:-back], weight[:, -1 - back])
    return y


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("ehr::causal_conv_backward", mutates_args=())
def _convolve_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = dy * weight[:, -1], torch.zeros_like(weight)
    dweight[:, -1] = (dy * x).sum((0, 1))
    for back in range(1, min(weight.shape[1], len(x))):
        dx[:-back].addcmul_(dy[back:], weight[:, -1 - back])
        dweight[:, -1 - back] = (dy[back:] * x[:-back]).sum((0, 1))
    return dx, dweight, dy.sum((0, 1))


@_convolve_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight))


_convolve.register_autograd(
    lambda ctx, dy: _convolve_backward(dy.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


# ---- shapes -----------------------------------------------------------------------------------------------------------------


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if A.is_complex() or B.is_complex() or C.is_complex():
        raise ValueError("A, B and C must be real: complex states are not supported")
    if u.ndim != 3 or A.ndim != 2 or len(A) != u.shape[1]:
        raise ValueError(f"expected u (B, D, L) and A (D, N), found {tuple(u.shape)} and {tuple(A.shape)}")
    (batch, width, steps), states = u.shape, A.shape[1]
    for name, tensor, expected in (
        ("delta", delta, u.shape),
        ("z", z, u.shape),
        ("D", D, (width,)),
        ("delta_bias", delta_bias, (width,)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"expected {name} {tuple(expected)}, found {tuple(tensor.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        grouped = (
            tensor.ndim == 4
            and width % tensor.shape[1] == 0
            and (batch, states, steps) == (tensor.shape[0], *tensor.shape[2:])
        )
        plain = tensor.shape == ((width, states) if tensor.ndim == 2 else (batch, states, steps))
        if not grouped and not plain:
            raise ValueError(
                f"expected {name} ({batch}, {states}, {steps}), ({batch}, G, {states}, {steps}) or ({width}, {states}), found {tuple(tensor.shape)}"
            )


def _time_major(t: Tensor, wide: torch.dtype) -> Tensor:
    """(B, D, L) as (L, B, D): as one matrix, whose transposition torch does by blocks, several times faster than that of three axes."""
    if not exporting() and t.is_contiguous():
        return t.to(wide).flatten(0, 1).t().contiguous().unflatten(1, t.shape[:2])
    return t.permute(2, 0, 1).to(wide)


def _grouped(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor, int]:
    """B and C as (L, B, G, N), and G; where one is constant, a channel is a group."""

    def one(t: Tensor) -> Tensor:
        if t.ndim == 2:
            return t.expand(u.shape[2], u.shape[0], *t.shape)
        return (t if t.ndim == 4 else t.unsqueeze(1)).permute(3, 0, 1, 2)

    b, c = one(B), one(C)
    groups = math.lcm(b.shape[2], c.shape[2])
    b, c = (t if t.shape[2] == groups else t.repeat_interleave(groups // t.shape[2], 2) for t in (b, c))
    return b, c, groups


def _of_channels(t: Tensor, u: Tensor) -> Tensor:
    """B or C as (B, D, N, L), for the reference."""
    if t.ndim == 2:
        return t[None, :, :, None].expand(u.shape[0], *t.shape, u.shape[2])
    t = t if t.ndim == 4 else t.unsqueeze(1)
    return t.repeat_interleave(u.shape[1] // t.shape[1], 1)
