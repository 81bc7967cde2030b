"""Sixteen numbers that say how a variable went over a window: what trees read, and what networks read beside the hours.

Shape letters: B samples, F variables, N events.
"""

import numpy as np

MEANING = {  # of observations in the window, if nothing else is said; a rate that runs when it opens counts as one
    "number": "how many",
    "first": "first value",
    "last": "last value, of the window or of the hours before it from which values are carried into the grid",
    "change": "last value less the first, both in the window",
    "minimum": "least value",
    "maximum": "greatest value",
    "mean": "mean of the values",
    "median": "median of the values",
    "sd": "standard deviation around the mean, divided by the number",
    "sum": "sum of the values",
    "hours_since": "hours from the last observation, before the window or in it, to the prediction",
    "hour_of_last": "when that was, in hours since the window opened",
    "late_mean": "mean in the second half of the window",
    "late_minimum": "least value in the second half",
    "late_maximum": "greatest value in the second half",
    "late_sum": "sum in the second half",
}
STATISTICS = tuple(MEANING)
COUNTED = ("number", "sum", "late_sum")  # what says how much there is, and not what it is like


def summarise(
    events: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    carried: np.ndarray,
    shape: tuple[int, int],
    window: int,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Statistics of each variable of each sample.

    Args:
        events: owner (sample), minutes since the window opened, variable, value; each (N,), by owner and minute;
            negative minutes lie before the window and give only ``last`` and when that was.
        carried: (N,) whether an event lies before the window.
        shape: B and F.
        window: hours.
        weight: (N,) how many observations each stands for, where others were left out; default: itself.

    Returns:
        (B, F, 16), in the variables' units, minutes turned into hours. A statistic is NaN where it has no observation
        to be told from; ``number`` is 0 there.
    """
    samples, variables = shape
    owner, minute, variable, value = events
    cells = samples * variables
    cell = owner * variables + variable
    order = np.argsort(cell, kind="stable")  # by minute within each cell
    cell, minute, value, inside = cell[order], minute[order], value[order].astype(np.float64), ~carried[order]
    weight = np.ones(len(cell)) if weight is None else weight[order].astype(np.float64)
    table = np.full((len(STATISTICS), cells), np.nan)
    statistic = dict(zip(STATISTICS, table, strict=True))

    def spread(into: str, of: np.ndarray, numbers: np.ndarray) -> None:
        statistic[into][of] = numbers

    every, _, final = _groups(cell)
    spread("last", every, value[final])
    spread("hours_since", every, window - minute[final] / 60)
    spread("hour_of_last", every, minute[final] / 60)
    cell, minute, value, weight = cell[inside], minute[inside], value[inside], weight[inside]
    seen, begin, end = _groups(cell)
    statistic["number"][:] = 0
    if len(seen):
        number = np.add.reduceat(weight, begin)
        spread("number", seen, number)
        spread("first", seen, value[begin])
        spread("change", seen, value[end] - value[begin])
        spread("minimum", seen, np.minimum.reduceat(value, begin))
        spread("maximum", seen, np.maximum.reduceat(value, begin))
        size = end - begin + 1
        mean = np.add.reduceat(value, begin) / size
        spread("mean", seen, mean)
        spread("sum", seen, np.add.reduceat(value * weight, begin))
        deviation = value - np.repeat(mean, size)
        spread("sd", seen, np.sqrt(np.add.reduceat(deviation**2, begin) / size))
        ascending = value[np.lexsort((value, cell))]
        spread("median", seen, (ascending[begin + (size - 1) // 2] + ascending[begin + size // 2]) / 2)
    late = minute >= 30 * window
    cell, value, weight = cell[late], value[late], weight[late]
    seen, begin, end = _groups(cell)
    if len(seen):
        spread("late_mean", seen, np.add.reduceat(value, begin) / (end - begin + 1))
        spread("late_minimum", seen, np.minimum.reduceat(value, begin))
        spread("late_maximum", seen, np.maximum.reduceat(value, begin))
        spread("late_sum", seen, np.add.reduceat(value * weight, begin))
    return np.ascontiguousarray(table.reshape(len(STATISTICS), samples, variables).transpose(1, 2, 0), np.float32)


def _groups(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of sorted cells: the different ones, and the first and last position of each."""
    if not len(cell):
        return (np.zeros(0, np.intp),) * 3
    begin = np.flatnonzero(np.append(True, cell[1:] != cell[:-1]))
    return cell[begin], begin, np.append(begin[1:], len(cell)) - 1
