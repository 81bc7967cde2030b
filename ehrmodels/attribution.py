"""Which part of a model's output each variable accounts for, and networks and trees that learned nothing, to check such parts against.

References:
  [1] Sundararajan, Taly, Yan 2017, arXiv:1703.01365: integrated gradients; computed by captum.
  [2] Lundberg et al. 2020, doi:10.1038/s42256-019-0138-9: SHAP values of trees.
  [3] Adebayo et al. 2018, arXiv:1810.03292: attributions must change when what was learned is destroyed.

Shape letters: B samples, T hours, N events, F variables, S static features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.contract import Batch, Grid, Spec, Triplets
from ehrmodels.base import ICUModule
from ehrmodels.baselines import MOST, STraTS, TripletEmbedding, latest
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE, chosen, sums
from ehrmodels.layers import SummaryEmbedding
from ehrmodels.trees import FittedAtOnce, features_of

STEPS = 20  # points of the integral
TOGETHER = 160  # samples times points that are in memory at once


class Parts(NamedTuple):
    """What of an output, less that of a record without observations, each input accounts for."""

    variable: Tensor  # (B, F) in all
    hourly: Tensor | None  # (B, T, F) what of it the events of each hour say; the summary is of no hour
    rest: Tensor  # (B,) what belongs to no variable: the static features that follow from several


def integrated_gradients(model: ICUModule, batch: Batch, empty: Batch) -> Parts:
    """Integrated gradients [1] of networks along the path on which a record appears from nothing.

    Of a grid, value, mask and time since go from those of an hour without observations to their own; of triplets the embedding of
    variable and value grows from 0, the time staying; of a summary the embedding of each statistic grows from that of a
    record without observations.

    Args:
        model: network, in evaluation, that is ``integrable``.
        batch: the samples.
        empty: the same samples without any observation.

    """
    from captum.attr import IntegratedGradients

    assert integrable(model)

    count, width = len(batch.row), len(model.spec.variables)
    if isinstance(model, STraTS) and isinstance(batch, Triplets) and batch.time.shape[1] > MOST:
        batch = latest(batch)[0]
    gates = {"static": torch.ones_like(batch.static)}
    if model.summary or model.view == "summary":
        gates["summary"] = torch.ones(count, width, device=batch.static.device)
    if isinstance(batch, Grid):
        gates["hours"] = torch.ones_like(batch.value)
    elif isinstance(batch, Triplets):
        gates["events"] = torch.ones_like(batch.time)
    names, kind, nothing = list(gates), type(batch), type(empty)(*(t[:1] for t in empty))
    with torch.inference_mode(False), torch.enable_grad(), _gated(model, nothing) as gated:
        outside = tuple(t.clone() for t in (*batch, empty.static))  # tensors of inference mode know no gradient

        def output(*tensors: Tensor) -> Tensor:
            gate = dict(zip(names, tensors, strict=False))
            *fields, static = tensors[len(names) :]
            record = kind(*fields)
            record = record._replace(static=static + gate["static"] * (record.static - static))
            unread = sum(0 * t.flatten(1).sum(1) for t in gate.values())  # captum wants every gate to have a gradient
            return gated(record, gate) + unread

        parts = IntegratedGradients(output, multiply_by_inputs=False).attribute(
            tuple(t.clone() for t in gates.values()), baselines=(0.0,) * len(gates), additional_forward_args=outside,
            n_steps=STEPS, internal_batch_size=max(count, TOGETHER),
        )  # fmt: skip
    part = dict(zip(names, (t.detach() for t in parts), strict=True))
    variable, rest = _of_statics(part["static"], model.spec)
    hourly = None
    if "hours" in part:
        hourly = part["hours"]
        variable = variable + hourly.sum(1)
    if "events" in part:
        hourly = _by_hour(part["events"], batch, model.spec)
        variable = variable + sums(part["events"], batch, width)  # type: ignore[arg-type]
    if "summary" in part:
        variable = variable + part["summary"]
    return Parts(variable, hourly, rest)


def integrable(model: ICUModule) -> bool:
    """Whether ``integrated_gradients`` knows where a model reads its inputs."""
    if isinstance(model, FittedAtOnce):
        return False
    summary = model.summary or model.view == "summary"
    return not summary or sum(isinstance(m, SummaryEmbedding) for m in model.modules()) == 1


def shap(model: FittedAtOnce, batch: Batch, empty: Batch) -> Parts:
    """SHAP values [2] of models that are fitted at once; of a linear one its terms, less those of a record without observations."""
    features, without = (features_of(b.static, b.summary).cpu().numpy() for b in (batch, empty))
    part = torch.as_tensor(model.contributions(features, without), dtype=torch.float32, device=batch.static.device)
    static, summary = part.split([batch.static.shape[1], part.shape[1] - batch.static.shape[1]], 1)
    variable, rest = _of_statics(static, model.spec)
    return Parts(variable + summary.view(len(part), len(model.spec.variables), -1).sum(-1), None, rest)


@torch.no_grad()
def attention(model: ICUModule, batch: Batch) -> Tensor | None:
    """(B, F) What a model attends to: of HyMaTE the fusion weights of a variable's observations, of Fusion those of the hours in which
    a variable was charted. None of other models."""
    if isinstance(model, HyMaTE):
        return model.attribute(batch)[0]  # type: ignore[arg-type]
    if isinstance(model, Fusion):
        return (model.hours(batch) * batch.mask).sum(1)  # type: ignore[arg-type, union-attr]
    return None


def untrained(model: ICUModule, batches: Sequence[Batch], seed: int) -> ICUModule:
    """A model of the same shape that has learned nothing [3]: a network before training, trees of shuffled outcomes.

    Args:
        model: that was trained.
        batches: samples with outcomes, of which trees are grown.
        seed: another model for each.
    """
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),
    ):  # parameters of inference mode know no gradient
        torch.manual_seed(seed)
        fresh = type(model)(**model.hparams)
        fresh.initialise(model.spec)
        if isinstance(fresh, FittedAtOnce):
            features = torch.cat([features_of(b.static, b.summary) for b in batches]).cpu()
            target = torch.cat([b.target for b in batches]).cpu()
            labelled = ~torch.isnan(target)
            features, target = features[labelled], target[labelled]
            fresh.fitted = fresh.fit_rows((features.numpy(), target[torch.randperm(len(target))].numpy()))
    return fresh.to(model.device).eval()


def swapped(batch: Batch, other: Batch, mine: Tensor, spec: Spec) -> Batch:
    """The samples with the variables ``mine`` (F,) of others, whatever is made of them, and all else their own."""
    static = torch.tensor([k is not None and bool(mine[k]) for k in _variable_of(spec)], device=batch.static.device)
    fields = {"static": torch.where(static, other.static, batch.static)}
    if batch.summary.shape[1]:
        fields["summary"] = torch.where(mine[:, None], other.summary, batch.summary)
    if isinstance(batch, Grid):
        for name in ("value", "mask", "since"):
            fields[name] = torch.where(mine, getattr(other, name), getattr(batch, name))
    if not isinstance(batch, Triplets):
        return batch._replace(**fields)
    assert isinstance(other, Triplets)
    taken = torch.cat([mine.new_zeros(1), mine])
    keep = torch.cat([batch.real & ~taken[batch.variable], other.real & taken[other.variable]], 1)
    time, variable, value = (
        torch.cat([getattr(batch, name), getattr(other, name)], 1) for name in ("time", "variable", "value")
    )
    order = variable.argsort(dim=1, stable=True)  # by time, then variable
    order = order.gather(1, time.gather(1, order).argsort(dim=1, stable=True))
    keep, time, variable, value = (t.gather(1, order) for t in (keep, time, variable, value))
    length = torch.full_like(batch.length, time.shape[1])
    joined = batch._replace(time=time, variable=variable, value=value, length=length, **fields)
    return chosen(joined, keep)


# ---- inside of networks ------------------------------------------------------------------------------------------------------------


@contextmanager
def _gated(model: ICUModule, nothing: Batch) -> Iterator[Callable[[Batch, dict[str, Tensor]], Tensor]]:
    """A function of a batch and of gates, which say how much of each input is there, that gives outputs (B,).

    Args:
        model: network.
        nothing: one sample without observations.
    """
    gate: dict[str, Tensor] = {}
    embedded: list[Tensor] = []  # the summary of no observations
    hooks: list[Any] = []

    def of_summary(module: nn.Module, inputs: tuple[Tensor]) -> Any:
        (x,) = inputs
        if "summary" not in gate:
            embedded.append(x.detach())
            return None
        each = gate["summary"].repeat_interleave(x.shape[1] // gate["summary"].shape[1], 1)
        return (embedded[0] + each * (x - embedded[0]),)

    def of_event(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        return x * gate["events"][..., None] if "events" in gate else x

    if model.summary or model.view == "summary":
        (layer,) = (m for m in model.modules() if isinstance(m, SummaryEmbedding))
        hooks.append(layer.drop.register_forward_pre_hook(of_summary))
    events = [m for m in model.modules() if isinstance(m, HyMaTE | TripletEmbedding)]
    for owner in events:
        hooks += [owner.variable.register_forward_hook(of_event), owner.value.register_forward_hook(of_event)]
    try:
        with torch.no_grad():
            model(nothing)

        def output(record: Batch, gates: dict[str, Tensor]) -> Tensor:
            gate.update(gates)
            if "hours" in gates:
                grown = {
                    name: getattr(nothing, name) + gates["hours"] * (getattr(record, name) - getattr(nothing, name))
                    for name in ("value", "mask", "since")
                }
                record = record._replace(**grown)
            elif isinstance(record, Triplets) and not events:  # a network of one's own
                record = record._replace(value=record.value * gates["events"])
            logit = model(record)
            return logit.mean(-1) if logit.ndim > 1 else logit

        yield output
    finally:
        for hook in hooks:
            hook.remove()


def _variable_of(spec: Spec) -> list[int | None]:
    """Of each static feature the variable that it tells of: "number of heart_rate"; None: of none, or of several."""
    places = {name: k for k, name in enumerate(spec.variables)}
    return [places.get(name.split()[-1]) if " " in name else None for name in spec.statics]


def _of_statics(part: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Parts of static features (B, S) as those of the variables that they tell of (B, F), and the sum of the others (B,)."""
    variable, rest = part.new_zeros(len(part), len(spec.variables)), part.new_zeros(len(part))
    for s, k in enumerate(_variable_of(spec)):
        if k is None:
            rest = rest + part[:, s]
        else:
            variable[:, k] += part[:, s]
    return variable, rest


def _by_hour(part: Tensor, batch: Any, spec: Spec) -> Tensor:
    """Parts of events (B, N) summed in hours (B, T, F)."""
    width = len(spec.variables)
    hour = ((batch.time + 1) / 2 * spec.window + 1e-4).long().clamp(0, spec.window - 1)
    cell = (hour * (width + 1) + batch.variable) * batch.real
    into = part.new_zeros(len(part), spec.window * (width + 1))
    return into.scatter_add(1, cell, part * batch.real).view(len(part), spec.window, width + 1)[..., 1:]
