"""The selective scan as two Triton kernels, forward and backward, with softplus, the direct path and the gate inside.

A program takes one sample and a block of channels, and walks the sequence in chunks of T steps. A chunk is one tile (T, W, N) of
which a thread holds all T steps of one channel's state, since W x N fills the threads: ``_at`` is then a register and no more, the
recurrence a chain of T multiply-adds, and all T exponentials are free of each other. A chunk's inputs are asked for one chunk ahead.
Forward keeps the state before every chunk; backward computes a chunk's states again from it and runs the adjoint recurrence.
Nothing is divided by a product of decays. What several programs add to, each writes apart and torch sums: no atomics, and so the
same bits each time. The arithmetic is float32 whatever the inputs are.

Triton brings its own compiler for the GPU, but has the C compiler of the machine build a few lines that start its kernels. With
``TRITON_INTERPRET=1``, set before Triton is first imported, the kernels run in NumPy on a CPU, slowly: to test them.

Shape letters: B samples, L steps, G groups of channels that share B and C (1 in Mamba), W channels a group, N states a channel.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# With 16 states, T x W inputs are then one a thread, and the backward pass takes nearly all registers that a thread may have.
CHUNK = 16  # T
WARPS = 4

LOG2E = tl.constexpr(math.log2(math.e))
LINEAR = tl.constexpr(20.0)  # from here on softplus is the identity, as in torch


# ---- the kernels ------------------------------------------------------------------------------------------------------------
# Tensors are (L, B, G, W) or (L, B, G, N) with any strides of the first two axes, such as u_l and u_b, and the last two in one row.


@triton.jit(do_not_specialize=["L", "samples"])
def _forward(
    u, delta, A, B, C, D, z, bias, y, last, starts, L, samples, G, W, N,
    u_l, u_b, delta_l, delta_b, B_l, B_b, C_l, C_b, z_l, z_b,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    sample, group, _, w, is_w = _place(G, W, WIDE)
    n = tl.arange(0, STATES)[None, :]
    is_n = n < N
    t = tl.arange(0, T)[:, None, None]
    one_state, is_state = (sample * G * W + w[:, None]) * N + n, is_w[:, None] & is_n
    all_states = samples.to(tl.int64) * G * W * N
    rate = tl.load(A + w[:, None] * N + n, is_state, 0.0) * LOG2E
    shift = tl.load(bias + w, is_w, 0.0)[None, :] if bias is not None else 0.0
    direct = tl.load(D + w, is_w, 0.0)[None, :] if D is not None else None
    u, delta = u + sample * u_b + w[None, :], delta + sample * delta_b + w[None, :]
    B, C = B + sample * B_b + group * N + n, C + sample * C_b + group * N + n
    z = z + sample * z_b + w[None, :] if z is not None else None
    y += sample * G * W + w[None, :]
    h = tl.zeros((WIDE, STATES), tl.float32)
    row = tl.arange(0, T)[:, None].to(tl.int64)
    ahead = _read(u, delta, B, C, z, u_l, delta_l, B_l, C_l, z_l, row, L, is_w, is_n)
    for _chunk in range(0, L, T):
        x, raw, b, c, gate = _float32(ahead)
        ahead = _read(u, delta, B, C, z, u_l, delta_l, B_l, C_l, z_l, row + T, L, is_w, is_n)
        inside = (row < L) & is_w[None, :]
        step, _slope = _steps(raw + shift, inside, SOFTPLUS)
        if starts is not None:
            tl.store(starts + one_state, h, is_state)
            starts += all_states
        a = tl.exp2(step[:, :, None] * rate[None, :, :])
        states = (step * x)[:, :, None] * b[:, None, :]
        for i in tl.static_range(T):
            h = _at(a, t, i) * h + _at(states, t, i)
            states = tl.where(t == i, h[None, :, :], states)
        out = tl.sum(states * c[:, None, :], 2)
        if D is not None:
            out += direct * x
        if z is not None:
            out *= gate * tl.sigmoid(gate)
        tl.store(y + row * samples * G * W, out, inside)
        row += T
    tl.store(last + one_state, h, is_state)


@triton.jit(do_not_specialize=["L", "samples"])
def _backward(
    dy, dlast, u, delta, A, B, C, D, z, bias, starts, du, ddelta, dA, dB, dC, dD, dz, dbias, L, samples, G, W, N,
    dy_l, dy_b, u_l, u_b, delta_l, delta_b, B_l, B_b, C_l, C_b, z_l, z_b,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """With g_t the gradient of the state h_t: g_t = C_t dy_t + a_(t+1) g_(t+1), and w_t = g_t a_t h_(t-1) is that of delta_t A."""
    sample, group, block, w, is_w = _place(G, W, WIDE)
    n = tl.arange(0, STATES)[None, :]
    is_n = n < N
    t = tl.arange(0, T)[:, None, None]
    one_state, is_state = (sample * G * W + w[:, None]) * N + n, is_w[:, None] & is_n
    all_states = samples.to(tl.int64) * G * W * N
    rate = tl.load(A + w[:, None] * N + n, is_state, 0.0)
    shift = tl.load(bias + w, is_w, 0.0)[None, :] if bias is not None else 0.0
    direct = tl.load(D + w, is_w, 0.0)[None, :] if D is not None else None
    dy += sample * dy_b + w[None, :]
    u, delta = u + sample * u_b + w[None, :], delta + sample * delta_b + w[None, :]
    B, C = B + sample * B_b + group * N + n, C + sample * C_b + group * N + n
    z = z + sample * z_b + w[None, :] if z is not None else None
    of_w, of_n = sample * G * W + w[None, :], (sample * G + group) * N + n
    chunks = tl.cdiv(L, T)
    starts += (chunks - 1) * all_states + one_state
    shared = (
        block * samples.to(tl.int64) * L * G * N + of_n
    )  # where this block's part of the gradients of B and C begins
    carried = tl.load(dlast + one_state, is_state, 0.0) if dlast is not None else tl.zeros((WIDE, STATES), tl.float32)
    of_A = tl.zeros((WIDE, STATES), tl.float32)
    of_D, of_bias = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
    row = (chunks - 1) * T + tl.arange(0, T)[:, None].to(tl.int64)
    ahead = _read(u, delta, B, C, z, u_l, delta_l, B_l, C_l, z_l, row, L, is_w, is_n)
    dy_ahead = tl.load(dy + row * dy_l, (row < L) & is_w[None, :], 0.0)
    h_ahead = tl.load(starts, is_state, 0.0)
    for chunk in range(0, chunks):
        x, raw, b, c, gate = _float32(ahead)
        dout, h = dy_ahead.to(tl.float32), h_ahead
        ahead = _read(u, delta, B, C, z, u_l, delta_l, B_l, C_l, z_l, row - T, L, is_w, is_n)
        dy_ahead = tl.load(dy + (row - T) * dy_l, (row >= T) & is_w[None, :], 0.0)
        starts -= all_states
        h_ahead = tl.load(starts, is_state & (chunk < chunks - 1), 0.0)
        inside = (row < L) & is_w[None, :]
        step, slope = _steps(raw + shift, inside, SOFTPLUS)
        moved = step * x
        a = tl.exp2(step[:, :, None] * (rate * LOG2E)[None, :, :])
        kept = moved[:, :, None] * b[:, None, :]  # becomes a_t h_(t-1)
        states = kept
        for i in tl.static_range(T):
            rest = _at(a, t, i) * h
            h = rest + _at(states, t, i)
            kept = tl.where(t == i, rest[None, :, :], kept)
        states += kept
        if z is not None:
            open = tl.sigmoid(gate)
            out = tl.sum(states * c[:, None, :], 2)
            if D is not None:
                out += direct * x
            tl.store(dz + of_w + row * samples * G * W, dout * out * open * (1 + gate * (1 - open)), inside)
            dout *= gate * open
        tl.store(dC + shared + row * samples * G * N, tl.sum(states * dout[:, :, None], 1), (row < L) & is_n)
        g = dout[:, :, None] * c[:, None, :]
        for i in tl.static_range(T):
            now = _at(g, t, T - 1 - i) + carried
            g = tl.where(t == T - 1 - i, now[None, :, :], g)
            carried = now * _at(a, t, T - 1 - i)
        tl.store(dB + shared + row * samples * G * N, tl.sum(g * moved[:, :, None], 1), (row < L) & is_n)
        kept *= g  # w
        of_A += tl.sum(kept * step[:, :, None], 0)
        of_moved = tl.sum(g * b[:, None, :], 2)
        of_step = tl.where(inside, (of_moved * x + tl.sum(kept * rate[None, :, :], 2)) * slope, 0.0)
        of_u = of_moved * step
        if D is not None:
            of_u += direct * dout
            of_D += tl.sum(dout * x, 0)
        of_bias += tl.sum(of_step, 0)
        tl.store(du + of_w + row * samples * G * W, of_u, inside)
        tl.store(ddelta + of_w + row * samples * G * W, of_step, inside)
        row -= T
    tl.store(dA + one_state, of_A, is_state)
    if D is not None:
        tl.store(dD + sample * G * W + w, of_D, is_w)
    if bias is not None:
        tl.store(dbias + sample * G * W + w, of_bias, is_w)


@triton.jit
def _place(G, W, WIDE: tl.constexpr):
    """Of this program: sample, group, number of its block in that, the block's channels, and which of them there are."""
    blocks = tl.cdiv(W, WIDE)
    number = tl.program_id(0)
    group, block = number // blocks % G, number % blocks
    column = block * WIDE + tl.arange(0, WIDE)
    return (number // blocks // G).to(tl.int64), group, block, group * W + column, column < W


@triton.jit
def _read(u, delta, B, C, z, u_l, delta_l, B_l, C_l, z_l, row, L, is_w, is_n):
    """Tiles (T, W) and (T, N) of the steps ``row``, 0 beyond the sequence; without a gate, u stands for it."""
    is_step = (row >= 0) & (row < L)
    inside, is_b = is_step & is_w[None, :], is_step & is_n
    x = tl.load(u + row * u_l, inside, 0.0)
    raw = tl.load(delta + row * delta_l, inside, 0.0)
    gate = tl.load(z + row * z_l, inside, 0.0) if z is not None else x
    return x, raw, tl.load(B + row * B_l, is_b, 0.0), tl.load(C + row * C_l, is_b, 0.0), gate


@triton.jit
def _float32(tiles):
    x, raw, b, c, gate = tiles
    return x.to(tl.float32), raw.to(tl.float32), b.to(tl.float32), c.to(tl.float32), gate.to(tl.float32)


@triton.jit
def _steps(raw, inside, SOFTPLUS: tl.constexpr):
    """Step sizes, 0 beyond the sequence so that the state stays what it is; and their derivative by ``raw``."""
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        grown = tl.exp(tl.minimum(raw, LINEAR))
        whole = 1 + grown  # rounded; the quotient below gives back what it lost, so that small steps keep their digits
        lost = grown / tl.where(whole == 1, 1.0, whole - 1)
        soft = tl.where(whole == 1, grown, tl.log(whole) * lost)
        slope = tl.where(raw > LINEAR, 1.0, grown / whole)
        raw = tl.where(raw > LINEAR, raw, soft)
    return tl.where(inside, raw, 0.0), slope


@triton.jit
def _at(tile, t, i):
    """Step ``i`` of a tile (T, W, N)."""
    return tl.sum(tl.where(t == i, tile, 0.0), 0)


@triton.jit
def _one(x):
    tl.store(x, 1.0)


# ---- the operator -----------------------------------------------------------------------------------------------------------


def try_out() -> None:
    """Compile and run a kernel of one line; whatever is missing raises."""
    if torch.cuda.is_available():
        x = torch.zeros(1, device="cuda")
        _one[(1,)](x)
        assert x.item() == 1


@torch.library.custom_op("ehr::scan_triton", mutates_args=())
def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (L, B, G, W), last state (B, G, W, N) and, with ``keep``, the state before every chunk (L / T, B, G, W, N).

    Args:
        u: (L, B, G, W).
        delta: (L, B, G, W).
        A: (G, W, N) in float32, as D and the bias are.
        B: (L, B, G, N).
        C: (L, B, G, N).
        D: (G, W).
        z: (L, B, G, W).
        bias: (G, W).
        softplus: of delta, after the bias.
        keep: whether a backward pass will follow.
    """
    y, last, starts = _empty(u, A, keep)
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": bias}
    _run(_forward, softplus, given | {"y": y, "last": last, "starts": starts if keep else None})
    return y, last, starts


def _empty(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    chunks, state = -(-u.shape[0] // CHUNK) if keep else 0, (u.shape[1], *A.shape)
    return u.new_empty(u.shape), A.new_empty(state), A.new_empty(chunks, *state)


scan.register_fake(lambda u, delta, A, B, C, D, z, bias, softplus, keep: _empty(u, A, keep))


@torch.library.custom_op("ehr::scan_triton_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    starts: Tensor,
    softplus: bool,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z and bias, as many of them as there are."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": bias}
    given = {name: t for name, t in given.items() if t is not None}
    parts = dict.fromkeys("BC", -(-u.shape[3] // _wide(A))) | dict.fromkeys(("A", "D", "bias"), u.shape[1])
    found = {
        name: A.new_empty(parts[name], *t.shape) if name in parts else t.new_empty(t.shape) for name, t in given.items()
    }
    absent = dict.fromkeys(("D", "z", "bias", "dD", "dz", "dbias"))
    tensors = absent | given | {f"d{name}": t for name, t in found.items()}
    dlast = None if dlast is None else dlast.contiguous()
    _run(_backward, softplus, tensors | {"dy": dy, "dlast": dlast, "starts": starts})
    return [t.sum(0).to(given[name].dtype) if name in parts else t for name, t in found.items()]


scan_backward.register_fake(
    lambda dy, dlast, u, delta, A, B, C, D, z, bias, starts, softplus: [
        t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, bias) if t is not None
    ]
)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.set_materialize_grads(False)  # or every backward pass would fill a gradient of zeros for the kept states
    ctx.save_for_backward(*tensors, output[2])


def _backward_of(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    found = iter(scan_backward(dy, dlast, *tensors, starts, ctx.softplus))
    return *(None if t is None else next(found) for t in tensors), None, None


scan.register_autograd(_backward_of, setup_context=_keep_for_backward)


def _run(kernel: Any, softplus: bool, tensors: dict[str, Tensor | None]) -> None:
    """One program for each sample and block of channels, on the tensors' device."""
    strides: dict[str, int] = {}
    for name in tensors.keys() & {"dy", "u", "delta", "B", "C", "z"}:
        t = tensors[name]
        if t is not None and not _in_rows(t):
            t = t.contiguous()
        tensors[name] = t
        strides[f"{name}_l"], strides[f"{name}_b"] = (0, 0) if t is None else t.stride()[:2]
    u, A = tensors["u"], tensors["A"]
    assert u is not None and A is not None
    (steps, samples, groups, width), wide = u.shape, _wide(A)
    with torch.cuda.device_of(u):
        kernel[(samples * groups * -(-width // wide),)](
            **tensors,
            **strides,
            L=steps,
            samples=samples,
            G=groups,
            W=width,
            N=A.shape[2],
            SOFTPLUS=softplus,
            T=CHUNK,
            WIDE=wide,
            STATES=triton.next_power_of_2(A.shape[2]),
            num_warps=WARPS,
        )


def _wide(A: Tensor) -> int:
    """Channels of a block, which with their states are a thread each."""
    return max(32 * WARPS // triton.next_power_of_2(A.shape[2]), 1)


def _in_rows(t: Tensor) -> bool:
    """Whether the last two axes lie in memory as one row."""
    return (t.shape[3] == 1 or t.stride(3) == 1) and (t.shape[2] == 1 or t.stride(2) == t.shape[3])
