"""Scores that clinicians derive from several variables, of the last value of each: what a network would have to divide.

References:
  [1] Allgoewer & Burri 1967: shock index. [2] Rice et al. 2007, doi:10.1378/chest.07-0617: SpO2/FiO2 beside PaO2/FiO2.
  [3] Bone et al. 1992, doi:10.1378/chest.101.6.1644: SIRS. [4] Vincent et al. 1996, doi:10.1007/BF01709751: SOFA.

Shape letters: B samples, F variables.
"""

import numpy as np

# A point of SOFA [4] for each limit that a value lies below, or reaches.
BELOW: dict[str, tuple[float, ...]] = {"platelets": (150, 100, 50, 20), "mean_bp": (70,), "gcs": (15, 13, 10, 6)}
REACHED: dict[str, tuple[float, ...]] = {"bilirubin_total": (1.2, 2, 6, 12), "creatinine": (1.2, 2, 3.5, 5)}
_LIMITS = [f"{name} below {', '.join(map(str, limits))}" for name, limits in BELOW.items()]
_LIMITS += [f"{name} of at least {', '.join(map(str, limits))}" for name, limits in REACHED.items()]
MEANING = {
    "shock index": "heart_rate / systolic_bp",  # [1]
    "pulse pressure": "systolic_bp - diastolic_bp",
    "BUN over creatinine": "bun / creatinine",
    "SpO2 over FiO2": "100 spo2 / fio2",  # [2]
    "PaO2 over FiO2": "100 pao2 / fio2",
    "SIRS criteria": "how many are met: temperature above 38 or below 36; heart_rate above 90; respiratory_rate above "
    "20 or paco2 below 32; wbc above 12 or below 4",  # of those that can be told [3]
    "partial SOFA": f"how many limits are passed: {'; '.join(_LIMITS)}",  # without drugs, urine, ventilation [4]
}
SCORES = tuple(MEANING)


def scores(last: np.ndarray, variables: list[str]) -> np.ndarray:
    """(B, 7) ``SCORES`` from the last value of each variable (B, F), in its unit; NaN where none of it is known."""
    column = {name: last[:, k].astype(np.float64) for k, name in enumerate(variables)}
    unknown = np.full(len(last), np.nan)

    def value(name: str) -> np.ndarray:
        return column.get(name, unknown)

    share = value("fio2") / 100
    sirs = [
        _any((value("temperature"), np.greater, 38), (value("temperature"), np.less, 36)),
        _any((value("heart_rate"), np.greater, 90)),
        _any((value("respiratory_rate"), np.greater, 20), (value("paco2"), np.less, 32)),
        _any((value("wbc"), np.greater, 12), (value("wbc"), np.less, 4)),
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            value("heart_rate") / value("systolic_bp"),
            value("systolic_bp") - value("diastolic_bp"),
            value("bun") / value("creatinine"),
            value("spo2") / share,
            value("pao2") / share,
        ]
    points = [_points(value(name), np.less, limits) for name, limits in BELOW.items()]
    points += [_points(value(name), np.greater_equal, limits) for name, limits in REACHED.items()]
    return np.stack([*ratios, _total(sirs), _total(points)], 1)


def _any(*criteria: tuple[np.ndarray, np.ufunc, float]) -> np.ndarray:
    """1 where a criterion is met, 0 where none is, NaN where no value is known."""
    met = np.stack([compare(value, limit) for value, compare, limit in criteria])
    told = np.stack([~np.isnan(value) for value, _, _ in criteria])
    return np.where(told.any(0), met.any(0).astype(np.float64), np.nan)


def _points(value: np.ndarray, passes: np.ufunc, limits: tuple[float, ...]) -> np.ndarray:
    """How many limits a value passes; NaN where it is not known."""
    return np.where(np.isnan(value), np.nan, np.sum([passes(value, limit) for limit in limits], 0))


def _total(parts: list[np.ndarray]) -> np.ndarray:
    """The sum of what is known; NaN where nothing is."""
    table = np.stack(parts)
    return np.where(np.isnan(table).all(0), np.nan, np.nansum(table, 0))
