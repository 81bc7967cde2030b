"""Kinds of task: the loss, what a model's outputs mean, and the validation metrics, one entry of ``KINDS`` each.

Shape letters: B samples, K outputs of a sample (no axis where there is one).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, Metric, R2Score
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, MultilabelAUROC, MultilabelAveragePrecision


class Kind(NamedTuple):
    """What the base class must know of a kind of task.

    Attributes:
        loss: loss of each output, from outputs and targets, (B,) or (B, K), and the weight of a positive.
        prediction: what is told of a sample, from its outputs and that weight.
        metrics: name -> makes the metric for K outputs; higher is better unless the name is in ``LOWER``.
        monitor: the metrics whose sum chooses the best epoch; empty: the loss does.
        classes: whether a target is 0 or 1, so that positives can be weighted and a threshold raises an alert.
    """

    loss: Callable[[Tensor, Tensor, float], Tensor]
    prediction: Callable[[Tensor, float], Tensor]
    metrics: dict[str, Callable[[int], Metric]]
    monitor: tuple[str, ...]
    classes: bool = False


def _cross_entropy(logit: Tensor, target: Tensor, weight: float) -> Tensor:
    # not a ``torch.tensor``, for which a GPU would wait at every step
    of_positives = torch.full((), weight, device=logit.device)
    return F.binary_cross_entropy_with_logits(logit, target, pos_weight=of_positives, reduction="none")


def _probability(logit: Tensor, weight: float) -> Tensor:
    """The weight multiplies the odds that a network learns, so its logarithm is taken off again."""
    return torch.sigmoid(logit.double() - math.log(weight))


_BINARY = Kind(
    _cross_entropy,
    _probability,
    {"auroc": lambda k: BinaryAUROC(), "auprc": lambda k: BinaryAveragePrecision()},
    ("auroc", "auprc"),
    classes=True,
)

KINDS: dict[str, Kind] = {
    "binary": _BINARY,
    "hourly_binary": _BINARY,
    "multilabel": Kind(
        _cross_entropy,
        _probability,
        {
            "auroc": lambda k: MultilabelAUROC(k),
            "auprc": lambda k: MultilabelAveragePrecision(k),
        },
        ("auroc", "auprc"),
    ),
    "regression": Kind(
        lambda output, target, weight: F.mse_loss(output, target, reduction="none"),
        lambda output, weight: output.double(),
        {"mae": lambda k: MeanAbsoluteError(), "r2": lambda k: R2Score()},
        (),
    ),
}


def threshold(probability: Tensor, target: Tensor, operating_point: str = "youden") -> float | None:
    """The probability from which on an alert is raised, chosen on validation data.

    Args:
        probability: (B,).
        target: (B,) 1 or 0.
        operating_point: ``youden``: the largest sensitivity + specificity; ``sensitivity=0.9``: the fewest alerts that
            still find 90 % of the events; ``npv=0.98``: the fewest alerts such that of those without one 98 % have no
            event. ``utility`` depends on the hours of a stay, which only whole predictions tell: there is none here.

    Returns:
        The threshold; None where only one outcome occurs or no threshold reaches the target.

    Raises:
        ValueError: the operating point is none of these, or a probability is no number.
    """
    name, wanted = check_operating_point(operating_point)
    if not torch.isfinite(probability).all():
        raise ValueError(
            f"{int((~torch.isfinite(probability)).sum())} of {len(probability)} probabilities are no number"
        )
    order = torch.argsort(probability, descending=True, stable=True)
    p, y = probability[order].double(), target[order].double()
    if not 0 < y.sum() < len(y) or name == "utility":
        return None
    true, false = y.cumsum(0), (1 - y).cumsum(0)  # at the threshold p[i]
    last_of_tie = torch.cat([p[1:] != p[:-1], torch.ones(1, dtype=torch.bool, device=p.device)])
    p, sensitivity = p[last_of_tie], (true / true[-1])[last_of_tie]
    if name == "youden":
        excess = true * false[-1] - false * true[-1]  # sensitivity - fall-out without rounding, so that ties are ties
        return float(p[torch.argmax(excess[last_of_tie])])
    if name == "sensitivity":
        enough = sensitivity >= wanted
    else:
        missed, spared = y.sum() - true[last_of_tie], len(y) - y.sum() - false[last_of_tie]
        enough = spared / (missed + spared) >= wanted  # no number where everybody has an alert
    return float(p[torch.argmax(enough.byte())]) if enough.any() else None


def check_operating_point(text: str) -> tuple[str, float]:
    """Name and target of an operating point; see ``threshold``.

    Raises:
        ValueError: it is none.
    """
    name, _, number = text.partition("=")
    try:
        if name in ("youden", "utility") and "=" not in text:
            return name, 0.0
        if name in ("sensitivity", "npv") and 0 < float(number) < 1:
            return name, float(number)
    except ValueError:
        pass
    raise ValueError(
        f"--operating_point {text} is not known; expected youden, utility, or a target such as sensitivity=0.9 "
        "or npv=0.98"
    )
