"""Recalibration: a rising map of a model's probabilities, fitted on patients of another hospital system.

References:
  [1] Platt 1999: a slope and an intercept on the logit, towards targets that are a little short of 0 and 1.
  [2] Guo, Pleiss, Sun, Weinberger 2017, arXiv:1706.04599: a slope alone, the inverse of the temperature.
  [3] Zadrozny & Elkan 2002: isotonic regression.
  [4] Janssen et al. 2008, doi:10.1016/j.jclinepi.2007.04.018: an intercept alone, for another prevalence.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

Method = Literal["prevalence", "temperature", "platt", "isotonic"]
METHODS: tuple[str, ...] = get_args(Method)
LEAST = 1e-7  # probability below which, and 1 less it above which, a logit is taken to be that of it


class Calibration(NamedTuple):
    """What is made of a probability: ``slope`` and ``intercept`` on its logit or, of isotonic, straight lines between knots.

    Attributes:
        method: one of ``METHODS``.
        patients: on how many it was fitted.
        slope: of the logit.
        intercept: of the logit.
        knots: probabilities, rising, between which isotonic is a straight line; empty for the others.
        values: what they become.
    """

    method: str
    patients: int
    slope: float = 1.0
    intercept: float = 0.0
    knots: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, content: Any) -> "Calibration | None":
        """From what a checkpoint holds.

        Raises:
            ValueError: it is none.
        """
        if content is None:
            return None
        try:
            made = cls(**content)
            assert made.method in METHODS and len(made.knots) == len(made.values)
            return made._replace(knots=tuple(map(float, made.knots)), values=tuple(map(float, made.values)))
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"the entry calibration of a checkpoint must be a map by one of {', '.join(METHODS)}, found {content}"
            ) from error

    def plain(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {**self._asdict(), "knots": list(self.knots), "values": list(self.values)}

    def __call__(self, probability: Tensor) -> Tensor:
        """(B,) recalibrated probabilities."""
        if self.method != "isotonic":
            return torch.sigmoid(self.slope * torch.logit(probability, LEAST) + self.intercept)
        x, y = (probability.new_tensor(part) for part in (self.knots, self.values))
        wide = x.diff()
        # a sum over pieces, and no search among them, since every exchange format can do it
        past = torch.minimum((probability[:, None] - x[:-1]).clamp(min=0), wide)
        return y[0] + (past * (y.diff() / wide)).sum(1)


def fitted(method: str, probability: np.ndarray, outcome: np.ndarray, patients: int) -> Calibration:
    """The map of a method that makes the outcomes of some patients most likely.

    Args:
        method: prevalence: an intercept [4]; temperature: a slope [2]; platt: both [1]; isotonic: any that rises [3].
        probability: (N,).
        outcome: (N,) 0 or 1.
        patients: whose these are.

    Raises:
        ValueError: one outcome does not occur, or no map is likeliest, or it turns the ranking round.
    """
    positive = int(outcome.sum())
    if not 0 < positive < len(outcome):
        raise ValueError(
            f"recalibration needs both outcomes: the {patients:,} patients have {positive:,} positives among {len(outcome):,} samples; "
            "give more patients"
        )
    if method == "isotonic":
        return _isotonic(probability, outcome, patients)
    x, target = logit(probability), outcome.astype(np.float64)
    if method == "platt":
        negative = len(outcome) - positive
        target = np.where(outcome == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    slope, intercept = logistic(x, target, method != "prevalence", method != "temperature")
    if not np.isfinite([slope, intercept]).all() or slope <= 0:
        what = "ranks them the wrong way round" if slope <= 0 else "parts their outcomes without an error"
        raise ValueError(
            f"recalibration by {method} fails: the model {what} on these {patients:,} patients; give more patients, or "
            "--transfer.recalibrate prevalence"
        )
    return Calibration(method, patients, slope, intercept)


def logit(probability: np.ndarray) -> np.ndarray:
    """(N,) logarithms of odds, finite."""
    clipped = np.clip(np.asarray(probability, np.float64), LEAST, 1 - LEAST)
    return np.log(clipped) - np.log1p(-clipped)


def logistic(x: np.ndarray, target: np.ndarray, slope: bool = True, intercept: bool = True) -> tuple[float, float]:
    """Slope and intercept of ``x`` (N,) that make targets (N,) between 0 and 1 likeliest, by Newton's method; one that is not
    asked for stays 1 or 0. NaN where there is no likeliest."""
    free = [k for k, wanted in enumerate((slope, intercept)) if wanted]
    features = np.stack([x, np.ones_like(x)], 1)

    def loss(at: np.ndarray) -> float:
        z = features @ at
        return float(np.sum(np.logaddexp(0, z) - target * z))

    at = np.array([1.0, 0.0])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(features @ at, -500, 500)))
        columns = features[:, free]
        gradient, curvature = columns.T @ (target - p), columns.T @ (columns * (p * (1 - p))[:, None])
        try:
            step = np.linalg.solve(curvature, gradient)
        except np.linalg.LinAlgError:
            break
        now, moved = loss(at), at.copy()
        for halving in range(30):
            moved[free] = at[free] + step / 2**halving
            if loss(moved) <= now:
                break
        done, at = bool(np.abs(moved - at).max() < 1e-9), moved
        if done:
            return float(at[0]), float(at[1])
    return float("nan"), float("nan")


def _isotonic(probability: np.ndarray, outcome: np.ndarray, patients: int) -> Calibration:
    """Both ends of every level are knots."""
    from scipy.optimize import isotonic_regression

    x, place, count = np.unique(probability.astype(np.float64), return_inverse=True, return_counts=True)
    mean = np.bincount(place, outcome) / count
    rising = isotonic_regression(mean, weights=count.astype(np.float64))
    ends = np.unique(np.concatenate([rising.blocks[:-1], rising.blocks[1:] - 1]))
    knots, values = x[ends].tolist(), rising.x[ends].tolist()
    if len(knots) == 1:
        knots, values = [knots[0], knots[0] + 1.0], values * 2
    return Calibration("isotonic", patients, knots=tuple(knots), values=tuple(values))
