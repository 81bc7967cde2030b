"""From records of a treatment to events: infusion rates that add up, vasopressor load, volumes by the hour, urine per kg and hour."""

import polars as pl

from datamodules.concepts import CONCEPT
from datamodules.schema import RAW_EVENTS

# Norepinephrine equivalents: mimic-code ``medication/norepinephrine_equivalent_dose.sql`` (after Goradia 2021,
# doi:10.1016/j.jcrc.2020.11.002). Rates in mcg/kg/min, vasopressin in units/h. ricu counts dopamine /150, vasopressin /0.4 per unit/min.
NOREPINEPHRINE_EQUIVALENT = {
    "norepinephrine": 1.0,
    "epinephrine": 1.0,
    "phenylephrine": 1 / 10,
    "dopamine": 1 / 100,
    "vasopressin": 2.5 / 60,
}
CHANGE_OVER = 180  # minutes over which a rise or fall of the vasopressor load is measured
SILENCE = 360  # minutes without any sign of a ventilator after which it is taken for off
SHORTEST = 30  # minutes; shorter spells of ventilation are taken for charting errors


def rate_events(intervals: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Turn infusion intervals into the total rate at every change.

    Intervals of one drug that overlap add (two pumps); a rate holds until the next event of the same stay and drug.

    Args:
        intervals: ``stay_id, start_minute, end_minute, drug, rate`` at least, as in ``schema.VASOPRESSORS``.

    Returns:
        ``schema.RAW_EVENTS``: one row per stay, drug and minute at which an interval starts or ends, in the unit of ``rate``.

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
        ``schema.RAW_EVENTS``.
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


def estimated_events(intervals: pl.LazyFrame | pl.DataFrame) -> pl.LazyFrame:
    """Step events of ``vasopressor_estimated``: 1 while the rate of any running vasopressor rests on an assumed concentration or unit.

    Args:
        intervals: schema ``schema.VASOPRESSORS``.
    """
    assumed = intervals.lazy().filter("estimated").with_columns(drug=pl.lit("vasopressor_estimated"), rate=pl.lit(1.0))
    return rate_events(assumed).with_columns(pl.col("value").clip(0, 1))


def volume_events(intervals: pl.LazyFrame, concept: str) -> pl.LazyFrame:
    """Spread volumes evenly over the time in which they ran: one event an hour of the stay, at the end of each piece.

    Args:
        intervals: ``stay_id, start_minute, end_minute, volume`` (mL).
        concept: name of the concept.

    Returns:
        ``schema.RAW_EVENTS`` in mL; a piece is charted in its last minute, when all of it has run.

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
    first, last = pl.max_horizontal(start, pl.col("hour") * 60), pl.min_horizontal("end_minute", pl.col("hour") * 60 + 60)
    value = pl.col("volume") * (last - first) / (pl.col("end_minute") - start)
    summed = pieces.select("stay_id", minute=last - 1, value=value).group_by("stay_id", "minute").agg(pl.col("value").sum())
    return _raw(summed.with_columns(concept=pl.lit(concept)))


def derived(events: pl.DataFrame) -> pl.DataFrame:
    """Vasopressor load, its change over 3 hours, and urine per kg and hour, from the events of whole stays.

    Args:
        events: ``stay, minute, concept, value`` in the concepts' units.

    Returns:
        The same columns: ``norepinephrine_equivalent`` and ``norepinephrine_equivalent_change`` (mcg/kg/min, at every step; positive:
        rising, equal to the load itself: started within 3 hours, negative: falling) and ``urine_rate`` (mL/kg/h: the volume
        over the time since urine was charted before, which is taken for at least 1 and at most 24 hours, and the last
        charted weight). Nothing is derived for stays without these records; a value uses only what was charted by its minute.
    """
    weights = pl.LazyFrame({"concept": list(NOREPINEPHRINE_EQUIVALENT), "weight": list(NOREPINEPHRINE_EQUIVALENT.values())})
    lazy = events.lazy()
    rates = lazy.join(weights.with_columns(pl.col("concept").cast(CONCEPT)), on="concept")
    # wherever two values stand at one minute the order is fixed, so that the same store comes of every run
    before = pl.col("value").shift(fill_value=0).over("stay", "concept", order_by=["minute", "value"])
    changes = rates.with_columns(change=(pl.col("value") - before) * pl.col("weight")).select("stay", "minute", "change")
    undone = changes.with_columns(minute=pl.col("minute") + CHANGE_OVER, change=-pl.col("change"))
    load, drift = _total(changes), _total(pl.concat([changes, undone]))

    urine = lazy.filter(pl.col("concept") == "urine").group_by("stay", "minute").agg(pl.col("value").sort().sum()).sort("stay", "minute")
    weight = lazy.filter(pl.col("concept") == "weight").select("stay", "minute", weight="value").sort("stay", "minute")
    minutes = pl.col("minute") - pl.col("minute").shift().over("stay", order_by="minute")
    urine = urine.with_columns(hours=minutes / 60).filter(pl.col("hours") <= 24).sort("minute")
    urine = urine.join_asof(weight.sort("minute", "weight"), on="minute", by="stay", check_sortedness=False).drop_nulls("weight")
    flow = urine.select("stay", "minute", value=pl.col("value") / pl.col("weight") / pl.col("hours").clip(lower_bound=1))

    named = {
        "norepinephrine_equivalent": load.with_columns(pl.col("value").clip(lower_bound=0)),
        "norepinephrine_equivalent_change": drift,
        "urine_rate": flow,
    }
    tables = [
        t.select("stay", "minute", pl.lit(name, CONCEPT).alias("concept"), pl.col("value").cast(pl.Float32)) for name, t in named.items()
    ]
    return pl.concat(tables).collect()


def _total(changes: pl.LazyFrame) -> pl.LazyFrame:
    summed = changes.group_by("stay", "minute").agg(pl.col("change").sort().sum()).sort("stay", "minute")
    return summed.select("stay", "minute", value=pl.col("change").cum_sum().over("stay").round(6))


def _raw(table: pl.LazyFrame) -> pl.LazyFrame:
    return table.with_columns(unit=pl.lit(None, pl.String)).select(pl.col(c).cast(kind) for c, kind in RAW_EVENTS.items())
