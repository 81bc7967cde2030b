"""Which kernel runs: a compiled CUDA one where it imports and can do what is asked for, else PyTorch; and why not.

``EHR_SCAN=torch`` never uses a kernel; ``EHR_SCAN=cuda`` makes a missing one an error instead of a silent fallback.
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


def kernel_for(extension: str, interface: str, x: Tensor, beyond: Sequence[str] = ()) -> ModuleType | None:
    """The module ``interface`` for tensors on CUDA where its compiled ``extension`` imports; None: use PyTorch.

    Args:
        extension: compiled module, such as selective_scan_cuda.
        interface: module whose functions call it.
        x: one of the tensors.
        beyond: what is asked for that the kernel cannot do.

    Raises:
        ValueError: ``EHR_SCAN`` has another value.
        RuntimeError: ``EHR_SCAN=cuda`` and the kernel cannot be used.
    """
    wanted = os.environ.get("EHR_SCAN", "")
    if wanted not in ("", "cuda", "torch"):
        raise ValueError(f"EHR_SCAN={wanted} is not known; expected cuda or torch, or leave it unset")
    if wanted == "torch" or (not x.is_cuda and wanted != "cuda") or exporting():
        return None
    module: ModuleType | None = None
    if not x.is_cuda:
        reason = f"the tensors are on {x.device.type}"
    elif beyond:
        reason = f"it cannot do {', '.join(beyond)}"
    else:
        module, reason = _imported(extension, interface)
    if module is None and wanted == "cuda":
        raise RuntimeError(f"EHR_SCAN=cuda, but {extension} cannot be used: {reason}; EHR_SCAN=torch does without")
    return module


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export or ONNX traces the model.

    Asked outside the trace: up to torch 2.11 ``is_exporting`` is also true within torch.compile, which must have the fast
    form instead of the exportable one.
    """
    return torch.compiler.is_exporting()


@cache
def _imported(extension: str, interface: str) -> tuple[ModuleType | None, str]:
    """The interface, or why not: mamba_ssm may import where its Mamba-1 kernel was not built, so the kernel is asked for first."""
    try:
        importlib.import_module(extension)
        return importlib.import_module(interface), ""
    except ImportError as error:
        log.warning("%s is not used (%s): PyTorch does its work, more slowly", extension, error)
        return None, f"{error} (`make gpu-check` builds it)"
