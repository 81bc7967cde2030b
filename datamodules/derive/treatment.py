"""From records of a treatment to events: infusion rates that add up, vasopressor load, volumes by the hour, urine per
kg and hour.

Everything here looks back only: no event changes when what follows it is taken away.
"""

import polars as pl

from datamodules.dictionary import CONCEPT
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
GCS_PARTS = ("gcs_eyes", "gcs_verbal", "gcs_motor")


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


def derived(events: pl.DataFrame) -> pl.DataFrame:
    """Vasopressor load, its change over 3 hours, urine per kg and hour, and the total coma scale, from the events of
    whole stays.

    Args:
        events: ``stay, minute, known_minute, concept, value`` in the concepts' units, no row twice.

    Returns:
        The same columns: ``norepinephrine_equivalent`` and ``norepinephrine_equivalent_change`` (mcg/kg/min, at every
        step; positive: rising, equal to the load itself: started within 3 hours, negative: falling), ``urine_rate``
        (mL/kg/h: the volume over the time since urine was charted before, which is taken for at least 1 and at most 24
        hours, and the last charted weight) and ``gcs`` (where its three parts are charted at one minute without a
        total). Nothing is derived for stays without these records; a value uses only what was known when its record
        was.
    """
    columns = ("stay", "minute", "known_minute", "concept", "value")
    present = set(events["concept"].unique())
    named: dict[str, pl.LazyFrame] = {}
    if present & set(NOREPINEPHRINE_EQUIVALENT):
        named |= _loads(events.lazy())
    if "urine" in present:
        named["urine_rate"] = _urine_rate(events.lazy())
    if present & set(GCS_PARTS):
        named["gcs"] = _gcs(events.lazy())
    if not named:
        return events.select(columns).clear()
    tables = [
        t.with_columns(pl.lit(name, CONCEPT).alias("concept"), pl.col("value").cast(pl.Float32))
        for name, t in named.items()
    ]
    return pl.concat([t.select(columns) for t in tables]).collect()


def _loads(events: pl.LazyFrame) -> dict[str, pl.LazyFrame]:
    schema = {"concept": CONCEPT, "weight": pl.Float64()}
    weights = pl.LazyFrame(list(NOREPINEPHRINE_EQUIVALENT.items()), schema=schema, orient="row")
    rates = events.join(weights, on="concept")
    # wherever two values stand at one minute the order is fixed, so that the same store comes of every run
    before = pl.col("value").shift(fill_value=0).over("stay", "concept", order_by=["minute", "value"])
    changes = rates.with_columns(change=(pl.col("value") - before) * pl.col("weight")).select(
        "stay", "minute", "change"
    )
    undone = changes.with_columns(minute=pl.col("minute") + CHANGE_OVER, change=-pl.col("change"))

    def total(steps: pl.LazyFrame) -> pl.LazyFrame:
        summed = steps.group_by("stay", "minute").agg(pl.col("change").sort().sum()).sort("stay", "minute")
        return summed.select(
            "stay", "minute", known_minute="minute", value=pl.col("change").cum_sum().over("stay").round(6)
        )

    load = total(changes).with_columns(pl.col("value").clip(lower_bound=0))
    return {"norepinephrine_equivalent": load, "norepinephrine_equivalent_change": total(pl.concat([changes, undone]))}


def _urine_rate(events: pl.LazyFrame) -> pl.LazyFrame:
    charted = events.filter(pl.col("concept") == "urine").group_by("stay", "minute")
    urine = charted.agg(pl.col("value").sort().sum(), pl.col("known_minute").max()).sort("stay", "minute")
    before = pl.col("minute", "known_minute").shift().over("stay", order_by="minute").name.suffix("_before")
    urine = urine.with_columns(before)
    in_order = pl.col("known_minute_before") <= pl.col("known_minute")
    # a volume that was entered after this one cannot be what came before it: look for the one that was there
    late = urine.filter(~in_order)
    earlier = late.select("stay", "minute", "known_minute").join(
        urine.select("stay", "minute", "known_minute"), on="stay", suffix="_other"
    )
    earlier = earlier.filter(
        pl.col("minute_other") < pl.col("minute"), pl.col("known_minute_other") <= pl.col("known_minute")
    )
    earlier = earlier.group_by("stay", "minute").agg(minute_before=pl.col("minute_other").max())
    mended = (
        late.drop("minute_before")
        .join(earlier, on=["stay", "minute"], how="left")
        .select(urine.collect_schema().names())
    )
    urine = pl.concat([urine.filter(in_order), mended])
    hours = (pl.col("minute") - pl.col("minute_before")) / 60
    weight = events.filter(pl.col("concept") == "weight").select("stay", "known_minute", kg="value")
    urine = urine.with_columns(hours=hours).filter(pl.col("hours") <= 24).sort("known_minute")
    urine = urine.join_asof(weight.sort("known_minute", "kg"), on="known_minute", by="stay", check_sortedness=False)
    per_kg_hour = pl.col("value") / pl.col("kg") / pl.col("hours").clip(lower_bound=1)
    return urine.drop_nulls("kg").select("stay", "minute", "known_minute", value=per_kg_hour)


def _gcs(events: pl.LazyFrame) -> pl.LazyFrame:
    at = ["stay", "minute"]
    charted = events.filter(pl.col("concept").is_in(GCS_PARTS)).group_by(*at, "concept")
    parts = charted.agg(pl.col("value").max(), pl.col("known_minute").min())
    whole = parts.group_by(at).agg(pl.col("value").sum(), pl.col("known_minute").max(), pl.len())
    whole = whole.filter(pl.col("len") == len(GCS_PARTS)).drop("len")
    totals = events.filter(pl.col("concept") == "gcs").group_by(at).agg(total_known=pl.col("known_minute").min())
    whole = whole.join(totals, on=at, how="left")
    return whole.filter((pl.col("total_known") > pl.col("known_minute")).fill_null(True)).drop("total_known")
