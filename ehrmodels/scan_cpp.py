"""The selective scan on a CPU as compiled loops: ``scan_cpp.cpp``, built by the machine's C++ compiler when ``EHR_SCAN=cpp`` asks for it.

The loops are a library of their own that knows nothing of torch, so that building takes a second or two. It is kept in the cache
under a name made of the source, the compiler and the processor, written whole, and found there from then on: any number of
processes may build it at once. The scan proper is all that is compiled; softplus, direct path and gate are torch's.

Shape letters: B samples, L steps, G groups of channels that share B and C, N states a channel, D channels a group.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -shared -fPIC"
)
CHUNK = 16  # steps between two kept states


def try_out() -> None:
    """Build and load the loops; a RuntimeError says why not."""
    _loops()


@cache
def _loops() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        raise RuntimeError("there is no C++ compiler; install g++ or clang++, or name one in CXX")
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    made_of = [SOURCE.read_text(), FLAGS, compiler, about, platform.machine(), _processor()]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    library = Path(os.environ.get("EHR_CACHE", ".cache")).absolute() / "scan" / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            new = Path(folder) / library.name
            command = [compiler, *FLAGS.split(), str(SOURCE), "-o", str(new)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
            new.replace(library)
    return ctypes.CDLL(str(library))


def _processor() -> str:
    """What distinguishes processors for which the compiler makes different code: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


@torch.library.custom_op("ehr::scan_cpp", mutates_args=())
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (L, B, G, D), last state (B, G, N, D) and, with ``keep``, the state before every chunk (L / T, B, G, N, D).

    Args:
        u: (L, B, G, D) in float32 and one piece of memory, as all of them.
        delta: (L, B, G, D).
        A: (G, N, D).
        B: (L, B, G, N).
        C: (L, B, G, N).
        keep: whether a backward pass will follow.
    """
    y, last, starts = _empty(u, A, keep)
    _run("scan_forward", u, A, [u, delta, A, B, C, y, last, starts if keep else None])
    return y, last, starts


def _empty(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    chunks, state = -(-u.shape[0] // CHUNK) if keep else 0, (u.shape[1], *A.shape)
    return torch.empty_like(u), u.new_empty(state), u.new_empty(chunks, *state)


_scan.register_fake(lambda u, delta, A, B, C, keep: _empty(u, A, keep))


@torch.library.custom_op("ehr::scan_cpp_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C."""
    du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
    dA = u.new_empty(u.shape[1], *A.shape)
    _run("scan_backward", u, A, [dy, dlast, u, delta, A, B, C, starts, du, ddelta, dA, dB, dC])
    return du, ddelta, dA.sum(0), dB, dC


_scan_backward.register_fake(
    lambda dy, dlast, u, delta, A, B, C, starts: tuple(torch.empty_like(t) for t in (u, delta, A, B, C))
)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or every backward pass would fill a gradient of zeros for the kept states
    ctx.save_for_backward(*inputs[:5], output[2])


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, starts = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy.contiguous()
    dlast = dy.new_zeros(starts.shape[1:]) if dlast is None else dlast.contiguous()
    return *_scan_backward(dy, dlast, *inputs, starts), None


_scan.register_autograd(_backward, setup_context=_keep_for_backward)


def _run(name: str, u: Tensor, A: Tensor, tensors: list[Tensor | None]) -> None:
    """Call a loop for all pairs of a sample and a group, shared out among as many threads as torch uses."""
    (steps, samples, groups, width), states = u.shape, A.shape[1]
    pairs, loop = samples * groups, getattr(_loops(), name)
    assert all(t is None or (t.is_contiguous() and t.dtype == torch.float32) for t in tensors)
    sizes = [ctypes.c_long(n) for n in (steps, pairs, groups, states, width, CHUNK)]
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    count = max(min(torch.get_num_threads(), pairs), 1)
    bounds = [pairs * k // count for k in range(count + 1)]
    parts = [(ctypes.c_long(a), ctypes.c_long(b), *sizes, *pointers) for a, b in pairwise(bounds)]
    others = [threading.Thread(target=loop, args=part) for part in parts[1:]]
    for thread in others:
        thread.start()
    loop(*parts[0])
    for thread in others:
        thread.join()
