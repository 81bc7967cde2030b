"""Which kernel runs: a compiled CUDA one where it imports and can do what is asked for, else Triton's, else PyTorch; and why not.

``EHR_SCAN=torch`` never uses a kernel; ``EHR_SCAN=cuda`` or ``triton`` uses no other, and makes a missing one an error instead of a
silent fallback. Of the convolution there is none in Triton. ``EHR_SCAN=cpp`` has the machine's C++ compiler build the scan for its CPU.
"""

import importlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)
HINTS = dict.fromkeys(("selective_scan_cuda", "causal_conv1d_cuda"), " (`make gpu-check` builds it)")


def kernel_for(
    extension: str,
    interface: str,
    x: Tensor,
    beyond: Sequence[str] = (),
    choice: str = "cuda",
    instead: str = "PyTorch",
) -> ModuleType | None:
    """The module ``interface`` for tensors on CUDA where its compiled ``extension`` imports; None: use what comes after it.

    Args:
        extension: module that must import first, such as the compiled selective_scan_cuda, or triton.
        interface: module whose functions call it.
        x: one of the tensors.
        beyond: what is asked for that the kernel cannot do.
        choice: value of ``EHR_SCAN`` that asks for this kernel.
        instead: what comes after it, to say so.

    Raises:
        ValueError: ``EHR_SCAN`` has another value.
        RuntimeError: ``EHR_SCAN`` asks for the kernel and it cannot be used.
    """
    wanted = os.environ.get("EHR_SCAN", "")
    if wanted not in ("", "cuda", "triton", "cpp", "torch"):
        raise ValueError(f"EHR_SCAN={wanted} is not known; expected cuda, triton, cpp or torch, or leave it unset")
    by_itself = not wanted and x.is_cuda and choice != "cpp"
    if (wanted != choice and not by_itself) or exporting():
        return None
    devices = {"cpu"} if choice == "cpp" else {"cuda"}
    if choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1":  # to be tested
        devices.add("cpu")
    module: ModuleType | None = None
    if x.device.type not in devices:
        reason = f"the tensors are on {x.device.type}"
    elif beyond:
        reason = f"it cannot do {', '.join(beyond)}"
    else:
        module, reason = _found(extension, interface, instead)
    if module is None and wanted == choice:
        raise RuntimeError(f"EHR_SCAN={choice}, but {extension} cannot be used: {reason}; EHR_SCAN=torch does without")
    return module


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export or ONNX traces the model.

    Asked outside the trace: up to torch 2.11 ``is_exporting`` is also true within torch.compile, which must have the fast
    form instead of the exportable one.
    """
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # or torch.compile would trace the imports
def _found(extension: str, interface: str, instead: str) -> tuple[ModuleType | None, str]:
    return _imported(extension, interface, instead)


@cache
def _imported(extension: str, interface: str, instead: str) -> tuple[ModuleType | None, str]:
    """The interface, or why not: mamba_ssm may import where its Mamba-1 kernel was not built, so the kernel is asked for first.

    Triton imports where it cannot compile for the device, or has no C compiler for what starts a kernel, so it is tried out.
    """
    try:
        importlib.import_module(extension)
        module = importlib.import_module(interface)
        getattr(module, "try_out", bool)()
        return module, ""
    except Exception as error:
        log.warning("%s is not used (%s): %s does its work, more slowly", extension, error, instead)
        return None, f"{error}{HINTS.get(extension, '')}"
