"""Models for programs without this package: torch.export and ONNX, with free batch and length.

Shape letters: B samples, T hours, N events, F variables, S static features.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.contract import STATISTICS, VIEWS, Spec
from ehrmodels.base import ICUModule

MOST_SAMPLES, MOST_EVENTS = 4096, 65536  # of a batch


class Scorer(nn.Module):
    """A model as a function of plain tensors, in the order of ``inputs``: gives what ``predict_step`` predicts, (B,) or (B, K)."""

    def __init__(self, model: ICUModule):
        super().__init__()
        self.model = model

    def forward(self, static: Tensor, *tensors: Tensor) -> Tensor:
        unknown = static.new_full(static.shape[:1], torch.nan)
        row = torch.zeros_like(unknown, dtype=torch.int64)
        fields = dict(zip(inputs(self.model)[1:], tensors, strict=True))
        fields.setdefault("summary", static.new_zeros(0))
        batch = VIEWS[self.model.view](static=static, target=unknown, row=row, **fields)
        return self.model.prediction(self.model(batch)).float()


def inputs(model: ICUModule) -> list[str]:
    """Names of the tensors that a model reads: the fields of its view but target, row, and a summary that it does not ask for."""
    unread = {"target", "row", *(() if model.summary or model.view == "summary" else ("summary",))}
    return [name for name in VIEWS[model.view]._fields if name not in unread]


def example(model: ICUModule, samples: int = 3, events: int = 7) -> tuple[Tensor, ...]:
    """Tensors of the shapes that a model reads, in the order of ``inputs``; the longest of the samples has ``events`` events."""
    spec: Spec = model.spec
    static = torch.randn(samples, len(spec.statics))
    summary = torch.randn(samples, len(spec.variables), len(STATISTICS))
    summary[torch.rand_like(summary) < 0.3] = torch.nan
    first = (static, summary) if "summary" in inputs(model) else (static,)
    if model.view == "summary":
        return first
    if model.view == "grid":
        shape = (samples, spec.window, len(spec.variables))
        mask = (torch.rand(shape) < 0.3).float()
        return *first, torch.randn(shape), mask, torch.rand(shape)
    length = torch.randint(1, events + 1, (samples,))
    length[0] = events
    real = torch.arange(events) < length[:, None]
    time = (torch.rand(samples, events) * 2 - 1).sort(1).values * real
    variable = torch.randint(1, len(spec.variables) + 1, (samples, events)) * real
    return *first, time, variable, torch.randn(samples, events) * real, length


def exported(model: ICUModule) -> torch.export.ExportedProgram:
    """The model in torch's exchange format, for any number of samples and, from triplets, of events.

    Args:
        model: with layers; nothing of it is changed.
    """
    tensors = example(model)
    batch = torch.export.Dim("samples", min=1, max=MOST_SAMPLES)
    events = torch.export.Dim("events", min=1, max=MOST_EVENTS)
    free: list[Any] = [
        {0: batch, 1: events} if model.view == "triplets" and t.ndim == 2 and name != "static" else {0: batch}
        for name, t in zip(inputs(model), tensors, strict=True)
    ]
    frozen = Scorer(copy.deepcopy(model).cpu().eval()).requires_grad_(False)
    with torch.no_grad():
        return torch.export.export(frozen, tensors, dynamic_shapes=(free[0], tuple(free[1:])))


def to_onnx(model: ICUModule, path: str) -> None:
    """Write the model as an ONNX file, with the inputs ``inputs(model)`` and the output ``prediction``."""
    names = {"input_names": inputs(model), "output_names": ["prediction"]}
    with torch.no_grad():
        torch.onnx.export(exported(model), (), path, dynamo=True, verbose=False, external_data=False, **names)
