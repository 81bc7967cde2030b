"""How the gradient of a training batch is computed: compiled by ``torch.compile``, and in parts where memory is short.

Shape letters: B samples, N events.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

from datamodules.contract import PADDED, Batch, Triplets

Mode = Literal["default", "reduce-overhead"]  # of torch.compile


class Compiled:
    """``forward`` of a model, compiled once for batches of any number of samples and events.

    With "reduce-overhead", which keeps a CUDA graph of every shape, batches of triplets are padded to a few lengths.

    Args:
        forward: maps a batch to logits.
        mode: of ``torch.compile``.

    Raises:
        ValueError: torch.compile cannot do it, as where there is no C++ compiler to make code for a CPU.
    """

    def __init__(self, forward: Callable[[Batch], Tensor], mode: Mode):
        self.graphs = mode == "reduce-overhead"
        self.forward = torch.compile(forward, mode=None if mode == "default" else mode)

    def __call__(self, batch: Batch) -> Tensor:
        if self.graphs:
            batch = padded(batch)
            torch.compiler.cudagraph_mark_step_begin()  # the logits of the step before are not read any more
        for name, tensor in zip(batch._fields, batch, strict=True):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # has no public name that allows for a batch of one sample
            if isinstance(batch, Triplets) and name in PADDED:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        try:
            return self.forward(batch)
        except TorchDynamoException as error:
            if "out of memory" in str(error):
                raise
            raise ValueError(
                f"torch.compile cannot make the steps of this model here: {str(error).splitlines()[0]}; leave --model.compile out"
            ) from error


def padded(batch: Batch) -> Batch:
    """Triplets with more padding, so that their length N is one of four between a power of two and the next."""
    if not isinstance(batch, Triplets):
        return batch
    length = batch.time.shape[1]
    step = 2 ** max((length - 1).bit_length() - 3, 0)
    return batch._replace(**{name: F.pad(getattr(batch, name), (0, -length % step)) for name in PADDED})


def divided(batch: Batch, parts: int) -> list[Batch]:
    """The batch in ``parts`` of as many samples each, or one more."""
    columns = [tensor.tensor_split(min(parts, len(batch.row))) for tensor in batch]
    return [type(batch)(*fields) for fields in zip(*columns, strict=True)]


def in_parts(
    model: nn.Module, objective: Callable[[Batch], tuple[Tensor, Any]], batch: Batch, parts: int
) -> tuple[Tensor, Any]:
    """The objective of a batch whose gradient is computed part by part, so that only one part's activations are in memory.

    Args:
        model: with the parameters.
        objective: maps a batch to a mean and the number of values that it is the mean of.
        batch: of B samples.
        parts: how many.

    Returns:
        The mean over the batch, whose ``backward`` gives the gradients that are already computed, and the number of values.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(parameters)
    total: Any = 0.0
    counted: Any = 0
    for part in divided(batch, parts):
        loss, count = objective(part)
        if not count:
            continue
        with torch.autocast(loss.device.type, enabled=False):  # as where Lightning derives a loss
            gradients = torch.autograd.grad(loss * count, parameters, allow_unused=True)
        sums = [s if g is None else g if s is None else s.add_(g) for s, g in zip(sums, gradients, strict=True)]
        total, counted = total + loss.detach() * count, counted + count
    derived = {p: s / counted for p, s in zip(parameters, sums, strict=True) if s is not None}
    return _Derived.apply(total / counted, list(derived.values()), *derived), counted


class _Derived(torch.autograd.Function):
    """A value whose gradients of some parameters are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(slope * gradient for gradient in ctx.gradients)
