"""From records of a treatment to events: infusion rates that add up, vasopressor load, volumes by the hour, urine per
kg and hour.

Everything here looks back only: no event changes when what follows it is taken away.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import polars as pl

from datamodules.dictionary import NAMES
from datamodules.schema import as_events

# Norepinephrine equivalents: mimic-code ``medication/norepinephrine_equivalent_dose.sql`` (after Goradia 2021,
# doi:10.1016/j.jcrc.2020.11.002). Rates in mcg/kg/min, vasopressin in units/h. ricu counts dopamine /150, vasopressin
# /0.4 per unit/min.
NOREPINEPHRINE_EQUIVALENT = {
    "norepinephrine": 1.0,
    "epinephrine": 1.0,
    "phenylephrine": 1 / 10,
    "dopamine": 1 / 100,
    "vasopressin": 2.5 / 60,
}
CHANGE_OVER = 180  # minutes over which a rise or fall of the vasopressor load is measured
SILENCE = 360  # minutes without any sign of a ventilator after which it is taken for off
PRESSORS = [NAMES.index(name) for name in NOREPINEPHRINE_EQUIVALENT]
PER_RATE = np.array([NOREPINEPHRINE_EQUIVALENT.get(name, 0) for name in NAMES])  # of each concept
URINE, WEIGHT, GCS, *PARTS = map(NAMES.index, ("urine", "weight", "gcs", "gcs_eyes", "gcs_verbal", "gcs_motor"))
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # stay, minute, known, concept, value
Derived = tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]  # concept; stay, minute, known, value


def rate_events(intervals: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Turn infusion intervals into the total rate at every change.

    Intervals of one drug that overlap add (two pumps); a rate holds until the next event of the same stay and drug.

    Args:
        intervals: ``stay_id, start_minute, end_minute, drug, rate`` at least, as in ``schema.INFUSIONS``.

    Returns:
        ``schema.EVENTS``: one row per stay, drug and minute at which an interval starts or ends, in the unit of
            ``rate``.

    Example:
        >>> intervals = pl.DataFrame({"stay_id": [1, 1], "start_minute": [0, 30], "end_minute": [60, 90],
        ...                           "drug": ["dopamine", "dopamine"], "rate": [4.0, 2.0]})
        >>> rate_events(intervals).select("minute", "value").collect().rows()
        [(0, 4.0), (30, 6.0), (60, 2.0), (90, 0.0)]
    """
    table = intervals.lazy().filter(pl.col("rate").is_not_null())
    starts = table.select("stay_id", "drug", minute="start_minute", change="rate")
    ends = table.select("stay_id", "drug", minute="end_minute", change=-pl.col("rate"))
    changes = pl.concat([starts, ends]).group_by("stay_id", "drug", "minute").agg(pl.col("change").sum())
    total = pl.col("change").cum_sum().over("stay_id", "drug", order_by="minute")
    # sums of floats leave dust such as 1e-17 where the infusion has ended, which would read as "still running"
    return as_events(
        changes.with_columns(value=total.round(6).clip(lower_bound=0), concept="drug").sort(
            "stay_id", "concept", "minute"
        )
    )


def ventilation_events(signs: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Turn signs of breathing support into step events of the concept ``ventilation``.

    A level holds from one sign to the next, or for six hours when nothing more is charted (ricu's rule for eICU,
    Bennett 2023, doi:10.1093/gigascience/giad041); then it is 0. A spell is not dropped for having been short: that is
    known only when it has ended.

    Args:
        signs: ``stay_id, minute, level``; level 0 = none, 1 = non-invasive, 2 = invasive. ``minute`` is when the sign
            was written down. Of several at one minute, the highest holds.

    Returns:
        ``schema.EVENTS``.

    Example:
        >>> signs = pl.DataFrame({"stay_id": [1, 1, 1], "minute": [0, 10, 900], "level": [2, 0, 2]})
        >>> ventilation_events(signs).select("minute", "value").collect().rows()
        [(0, 2.0), (10, 0.0), (900, 2.0), (1260, 0.0)]
    """
    marks = signs.lazy().group_by("stay_id", "minute").agg(pl.col("level").max()).sort("stay_id", "minute")
    following = pl.col("minute").shift(-1).over("stay_id", order_by="minute")
    silent = marks.filter((pl.col("level") > 0) & (following - pl.col("minute") > SILENCE).fill_null(True))
    ended = silent.select("stay_id", minute=pl.col("minute") + SILENCE, value=pl.lit(0))
    steps = pl.concat([marks.select("stay_id", "minute", value="level"), ended], how="vertical_relaxed")
    return as_events(steps.with_columns(concept=pl.lit("ventilation")).sort("stay_id", "minute"))


def estimated_events(intervals: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Step events of ``vasopressor_estimated``: 1 while the rate of any running vasopressor rests on an assumed
    concentration or unit.

    Args:
        intervals: schema ``schema.INFUSIONS``.
    """
    assumed = intervals.lazy().filter("estimated").with_columns(drug=pl.lit("vasopressor_estimated"), rate=pl.lit(1.0))
    return rate_events(assumed).with_columns(pl.col("value").clip(0, 1))


def volume_events(intervals: pl.LazyFrame, concept: str) -> pl.LazyFrame:
    """Spread volumes evenly over the time in which they ran: one event an hour of the stay, at the end of each piece.

    Args:
        intervals: ``stay_id, start_minute, end_minute, volume`` (mL).
        concept: name of the concept.

    Returns:
        ``schema.EVENTS`` in mL; a piece is charted in its last minute, when all of it has run.

    Example:
        >>> bag = pl.LazyFrame({"stay_id": [1], "start_minute": [30], "end_minute": [120], "volume": [900.0]})
        >>> volume_events(bag, "fluids").select("minute", "value").collect().rows()
        [(59, 300.0), (119, 600.0)]
    """
    start, end = pl.col("start_minute"), pl.max_horizontal("end_minute", pl.col("start_minute") + 1)
    hours = intervals.with_columns(end_minute=end).with_columns(
        hour=pl.int_ranges(start.floordiv(60), (pl.col("end_minute") - 1).floordiv(60) + 1)
    )
    pieces = hours.explode("hour")
    first, last = (
        pl.max_horizontal(start, pl.col("hour") * 60),
        pl.min_horizontal("end_minute", pl.col("hour") * 60 + 60),
    )
    value = pl.col("volume") * (last - first) / (pl.col("end_minute") - start)
    summed = (
        pieces.select("stay_id", minute=last - 1, value=value).group_by("stay_id", "minute").agg(pl.col("value").sum())
    )
    return as_events(summed.with_columns(concept=pl.lit(concept)))


def derived(stay: np.ndarray, minute: np.ndarray, known: np.ndarray, concept: np.ndarray, value: np.ndarray) -> Columns:
    """Vasopressor load, its change over 3 hours, urine per kg and hour, and the total coma scale, from the events of
    whole stays.

    In numpy, since it runs whenever something is charted at a bedside: on so few rows a query would take longer to
    plan than all else.

    Args:
        stay: (N,), as all others; rows are in the order of stay, minute, concept and value, none twice.
        minute: when it was charted.
        known: when it was known.
        concept: index into ``dictionary.NAMES``.
        value: in the concept's unit.

    Returns:
        The same columns: ``norepinephrine_equivalent`` and ``norepinephrine_equivalent_change`` (mcg/kg/min, at every
        step; positive: rising, equal to the load itself: started within 3 hours, negative: falling), ``urine_rate``
        (mL/kg/h: the volume over the time since urine was charted before, which is taken for at least 1 and at most 24
        hours, and the last charted weight) and ``gcs`` (where its three parts are charted at one minute without a
        total). Nothing is derived for stays without these records; a value uses only what was known when its record
        was.
    """
    parts: list[Derived] = []
    for make, sources in ((_loads, PRESSORS), (_urine_rate, (URINE, WEIGHT)), (_gcs, (GCS, *PARTS))):
        of = np.isin(concept, sources)
        if of.any():
            parts += make(stay[of], minute[of], known[of], concept[of], value[of])
    columns = [
        (np.zeros(0, np.int64),) * 5,
        *((s, m, k, np.full(len(s), NAMES.index(name)), v) for name, (s, m, k, v) in parts),
    ]
    stay, minute, known, concept, value = (np.concatenate(column) for column in zip(*columns, strict=True))
    return stay, minute, known, concept, value.astype(np.float32)


def _loads(
    stay: np.ndarray, minute: np.ndarray, known: np.ndarray, concept: np.ndarray, value: np.ndarray
) -> Iterator[Derived]:
    order = np.lexsort((concept, stay))  # stable: of one drug by minute, then value
    before = np.append(np.float32(0), value[order][:-1])
    before[_begins(stay[order], concept[order])] = 0
    change = np.empty(len(value))
    change[order] = (value[order] - before) * PER_RATE[concept[order]]
    for name, steps in (
        ("norepinephrine_equivalent", (stay, minute, change)),
        (
            "norepinephrine_equivalent_change",
            (np.append(stay, stay), np.append(minute, minute + CHANGE_OVER), np.append(change, -change)),
        ),
    ):
        of, at, load = _running(*steps)
        yield name, (of, at, at, np.maximum(load, 0) if name == "norepinephrine_equivalent" else load)


def _running(stay: np.ndarray, minute: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stay and minute of each step, and the sum of all changes of the stay up to it."""
    order = np.lexsort((change, minute, stay))  # of one minute, too, so that the same sum comes of every run
    stay, minute, change = stay[order], minute[order], change[order]
    step = _begins(stay, minute)
    stay, minute, total = stay[step], minute[step], np.add.reduceat(change, step)
    for first, end in pairwise([*_begins(stay), len(stay)]):
        np.cumsum(total[first:end], out=total[first:end])
    return stay, minute, total.round(6)


def _urine_rate(
    stay: np.ndarray, minute: np.ndarray, known: np.ndarray, concept: np.ndarray, value: np.ndarray
) -> Iterator[Derived]:
    urine, weight = concept == URINE, concept == WEIGHT
    if not (urine.any() and weight.any()):
        return
    begin = _begins(stay[urine], minute[urine])
    volume, charted = np.add.reduceat(value[urine], begin), np.maximum.reduceat(known[urine], begin)
    of, at = stay[urine][begin], minute[urine][begin]
    # the volume before each, in rows that begin with one of no stay; one that was entered later was not there yet
    stays, minutes, entered = (np.append(-1, column) for column in (of, at, charted))
    before = np.arange(len(of))
    while (late := (stays[before] == of) & (entered[before] > charted)).any():
        before[late] -= 1
    hours = (at - minutes[before]) / 60
    kg = np.lexsort((value[weight], known[weight], stay[weight]))
    last = np.searchsorted(_key(stay, known)[weight][kg], _key(of, charted), side="right") - 1
    whole = (stays[before] == of) & (hours <= 24) & (stay[weight][kg][last] == of) & (last >= 0)
    rate = volume / value[weight][kg][last] / np.maximum(hours, 1)
    yield "urine_rate", (of[whole], at[whole], charted[whole], rate[whole])


def _gcs(
    stay: np.ndarray, minute: np.ndarray, known: np.ndarray, concept: np.ndarray, value: np.ndarray
) -> Iterator[Derived]:
    part = concept != GCS
    cell = _begins(stay[part], minute[part], concept[part])
    if not len(cell):
        return
    best, seen = np.maximum.reduceat(value[part], cell), np.minimum.reduceat(known[part], cell)
    of, at = stay[part][cell], minute[part][cell]
    moment = _begins(of, at)
    score, seen, number = (f.reduceat(c, moment) for f, c in ((np.add, best), (np.maximum, seen), (np.add, of * 0 + 1)))
    of, at = of[moment], at[moment]
    total = _begins(stay[~part], minute[~part])
    charted = np.append(_key(stay, minute)[~part][total], -1)
    entered = np.append(np.minimum.reduceat(known[~part], total) if len(total) else known[:0], 0)
    place = np.searchsorted(charted[:-1], _key(of, at))
    there = (charted[place] == _key(of, at)) & (entered[place] <= seen)
    whole = (number == len(PARTS)) & ~there
    yield "gcs", (of[whole], at[whole], seen[whole], score[whole])


def _begins(*columns: np.ndarray) -> np.ndarray:
    """Of rows in the order of some columns, the first of each combination."""
    if not len(columns[0]):
        return np.zeros(0, np.intp)
    return np.flatnonzero(np.append(True, np.any([column[1:] != column[:-1] for column in columns], 0)))


def _key(stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
    """Stay and minute in one number that sorts by them."""
    return (stay.astype(np.int64) << 32) + minute + 2**31
