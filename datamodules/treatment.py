"""From records of a treatment to step events: infusion rates that add up, ventilation that ends when charting stops."""

import polars as pl

from datamodules.cohort import RAW_EVENTS

SILENCE = 360  # minutes without any sign of a ventilator after which it is taken for off
SHORTEST = 30  # minutes; shorter spells of ventilation are taken for charting errors


def rate_events(intervals: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Turn infusion intervals into the total rate at every change.

    Intervals of one drug that overlap add (two pumps); a rate holds until the next event of the same stay and drug.

    Args:
        intervals: ``stay_id, start_minute, end_minute, drug, rate`` at least, as in ``cohort.VASOPRESSORS``.

    Returns:
        ``cohort.RAW_EVENTS``: one row per stay, drug and minute at which an interval starts or ends, in the unit of ``rate``.

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
    return _raw(changes.with_columns(value=total.round(6).clip(lower_bound=0), concept="drug").sort("stay_id", "concept", "minute"))


def ventilation_events(signs: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Turn charted signs of breathing support into step events of the concept ``ventilation``.

    A spell of one level goes from the first sign of it to the first sign of another level, or to six hours after its last
    sign when nothing more is charted; spells under half an hour are dropped (both limits: ricu's eICU rule). The 0 after
    six silent hours uses nothing but the past, so it is safe to show to a model.

    Args:
        signs: ``stay_id, minute, level``; level 0 = none, 1 = non-invasive, 2 = invasive. Of several at one minute, the highest holds.

    Returns:
        ``cohort.RAW_EVENTS``.
    """
    stay = "stay_id"
    marks = signs.lazy().group_by(stay, "minute").agg(pl.col("level").max()).sort(stay, "minute")
    previous_level, previous_minute = (pl.col(c).shift().over(stay, order_by="minute") for c in ("level", "minute"))
    starts = (previous_level.is_null() | (previous_level != pl.col("level")) | (pl.col("minute") - previous_minute > SILENCE)).cast(
        pl.Int32
    )
    following = pl.col("minute").shift(-1).over(stay, order_by="minute")
    marks = marks.with_columns(spell=starts.cum_sum().over(stay, order_by="minute"), following=following)
    until = pl.min_horizontal(pl.col("minute") + SILENCE, "following")  # how long this sign holds; the last of a spell ends it
    marks = marks.with_columns(until=until).with_columns(
        length=pl.col("until").max().over(stay, "spell") - pl.col("minute").min().over(stay, "spell")
    )
    marks = marks.filter((pl.col("level") == 0) | (pl.col("length") >= SHORTEST))
    charted = marks.select(stay, "minute", value="level")
    silent = marks.filter((pl.col("level") > 0) & (pl.col("following") > pl.col("until")).fill_null(True))
    both = pl.concat([charted, silent.select(stay, minute="until", value=pl.lit(0))], how="vertical_relaxed")
    return _raw(both.with_columns(concept=pl.lit("ventilation")).sort(stay, "minute"))


def _raw(table: pl.LazyFrame) -> pl.LazyFrame:
    return table.with_columns(unit=pl.lit(None, pl.String)).select(pl.col(c).cast(kind) for c, kind in RAW_EVENTS.items())
