"""SOFA by the hour: six organ scores and their sum over the last 24 hours, for any hospital.

References:
  [1] Vincent 1996, The SOFA score, Intensive Care Medicine 22:707, doi:10.1007/BF01709751 (the thresholds)
  [2] Johnson 2018, The MIMIC Code Repository, JAMIA 25:32, doi:10.1093/jamia/ocx084; ``score/sofa.sql`` and the tables
      it reads (MIT): the hour grid, the sources and the 24-hour maximum that are followed here by default
  [3] Bennett 2023, ricu, doi:10.1093/gigascience/giad041 (the alternatives behind the switches)

Words used below:
  minute  whole minutes since ICU admission, rounded down. The times used here are charted without seconds, so the
          fraction that is cut off is the same for every time of a stay and comparing two minutes is exact.
  hour h  the minutes (end - 60, end] with end = ``first_end`` + 60 h. The hours before 0 are scored, because the
          24-hour window looks back into them, and are not put out.
  span    one row a stay: ``first_minute`` (first sign of presence in the ICU), ``first_end`` (end of hour 0),
          ``last_hour``.
  record  one row of a charted value: ``stay_id, minute, value``.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

import polars as pl

COMPONENTS = ("respiration", "coagulation", "liver", "cardiovascular", "cns", "renal")
SOFA: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "end_minute": pl.Int32(),  # end of the hour
    **{
        name: pl.Int8() for name in COMPONENTS
    },  # 0 to 4: worst of the 24 hours that end here, 0 where nothing was measured
    "sofa_24h": pl.Int8(),  # their sum, 0 to 24
}

HOURS_BEFORE = 24  # hours of the grid before hour 0
WINDOW_HOURS = 24
FIO2_VALID_MINUTES = 240  # a charted FiO2 serves the blood gases of the next 4 hours [2]
GCS_CARRY_MINUTES = (
    360  # a part of the GCS that is missing is taken from the record before, if less than 6 hours old [2]
)
GCS_NORMAL = {"eyes": 4, "verbal": 5, "motor": 6}
TUBE = 0  # ``verbal`` of a patient who cannot speak because of a tube
URINE_LOOK_BACK_MINUTES = 23 * 60
URINE_MAX_HOURS = 30
EPISODE_GAP_MINUTES = 300  # records of a drug further apart than 5 hours belong to two episodes [3]
SCORED_PRESSORS = ("dopamine", "dobutamine", "epinephrine", "norepinephrine")


class Inputs(TypedDict):
    """What SOFA needs, whatever the hospital. Frames of a table that is missing may be empty."""

    spans: pl.LazyFrame  # stay_id, first_minute, first_end, last_hour; a stay that is not here gets no row
    gases: pl.LazyFrame  # stay_id, minute, pao2 (mmHg, arterial), fio2 (%, of the same specimen, null if it has none)
    fio2: pl.LazyFrame  # charted inspired oxygen, records in %
    ventilation: pl.LazyFrame  # stay_id, start_minute, end_minute of invasive ventilation, both ends included
    platelets: pl.LazyFrame  # records in 10^9/L
    bilirubin: pl.LazyFrame  # records of total bilirubin in mg/dL
    mean_bp: pl.LazyFrame  # records in mmHg
    pressors: pl.LazyFrame  # stay_id, start_minute, end_minute, drug, rate (mcg/kg/min; a null rate is not scored)
    gcs: pl.LazyFrame  # stay_id, minute, eyes, verbal (0 = cannot be tested because of a tube), motor
    gcs_totals: pl.LazyFrame  # records of the total Glasgow coma scale where its parts are not charted
    creatinine: pl.LazyFrame  # records in mg/dL
    urine: pl.LazyFrame  # records in mL, the volume since the record before


@dataclass(frozen=True)
class Switches:
    """Where pipelines differ in scoring; the defaults are mimic-code's way [2].

    Attributes:
        gcs_intubated: "normal" gives a patient with a tube a GCS of 15, "carried" the last one from before the tube.
        fio2_missing: FiO2 in % for a blood gas without one (21 = room air [3]); null leaves such a gas out.
        pressor_min_minutes: shortest vasopressor episode that counts (0, or 60 as [3]).
        urine_min_hours: charted hours that a 24-hour urine volume needs (22, or 12 as [3]).
    """

    gcs_intubated: Literal["normal", "carried"] = "normal"
    fio2_missing: float | None = None
    pressor_min_minutes: int = 0
    urine_min_hours: float = 22

    def __post_init__(self) -> None:
        if self.gcs_intubated not in ("normal", "carried"):
            raise ValueError(f"--data.sofa: gcs_intubated is {self.gcs_intubated!r}; expected normal or carried")
        if self.fio2_missing is not None and not 20 < self.fio2_missing <= 100:
            raise ValueError(
                f"--data.sofa: fio2_missing is {self.fio2_missing}; expected a percentage such as 21, or null"
            )


def sofa(inputs: Inputs, switches: Switches) -> pl.DataFrame:
    """Score every hour of every stay.

    Args:
        inputs: the measurements.
        switches: where pipelines differ.

    Returns:
        One row a stay and hour from hour 0 on, columns and types of ``SOFA``, sorted.
    """
    ready = pl.collect_all(list(inputs.values()))  # type: ignore[arg-type]  # each is used several times below
    inputs = dict(zip(inputs, (frame.lazy() for frame in ready), strict=True))  # type: ignore[assignment]
    spans = inputs["spans"]
    grid = hour_grid(spans)
    ratio = oxygenation(inputs["gases"], inputs["fio2"], inputs["ventilation"], switches.fio2_missing)
    scale = pl.concat([gcs_total(inputs["gcs"], switches.gcs_intubated), inputs["gcs_totals"]], how="vertical_relaxed")
    lowest, highest = pl.col("value").min(), pl.col("value").max()
    measured = (
        worst(ratio.filter("ventilated"), spans, ratio_ventilated=pl.col("ratio").min()),
        worst(ratio.filter(~pl.col("ventilated")), spans, ratio_spontaneous=pl.col("ratio").min()),
        worst(inputs["platelets"], spans, platelets=lowest),
        worst(inputs["bilirubin"], spans, bilirubin=highest),
        worst(inputs["mean_bp"], spans, mean_bp=lowest),
        running(long_episodes(inputs["pressors"], switches.pressor_min_minutes), spans),
        worst(scale, spans, gcs=lowest),
        worst(inputs["creatinine"], spans, creatinine=highest),
        worst(urine_24h(inputs["urine"], spans, switches.urine_min_hours), spans, urine=highest),
    )
    for table in measured:
        grid = grid.join(table, on=["stay_id", "hour"], how="left")
    return worst_of_day(score(grid)).collect()


def hour_grid(spans: pl.LazyFrame) -> pl.LazyFrame:
    """The hours of every stay, from 24 before hour 0 to ``last_hour``.

    >>> spans = pl.LazyFrame({"stay_id": [7], "first_minute": [5], "first_end": [13], "last_hour": [2]})
    >>> hour_grid(spans).filter(pl.col("hour") >= 0).collect().rows()
    [(7, 0, 13), (7, 1, 73), (7, 2, 133)]
    """
    hours = pl.int_ranges(-HOURS_BEFORE, pl.col("last_hour") + 1, dtype=pl.Int32).alias("hour")
    grid = spans.select("stay_id", "first_end", hours).explode("hour", empty_as_null=False)
    return grid.select("stay_id", "hour", end_minute=(pl.col("first_end") + 60 * pl.col("hour")).cast(pl.Int32))


def worst(records: pl.LazyFrame, spans: pl.LazyFrame, **worst_of: pl.Expr) -> pl.LazyFrame:
    """One row per stay and hour with a record: ``stay_id, hour`` and one column per keyword.

    A record on the stroke of an hour's end belongs to that hour:

    >>> spans = pl.LazyFrame({"stay_id": [7], "first_minute": [5], "first_end": [13], "last_hour": [2]})
    >>> records = pl.LazyFrame({"stay_id": [7, 7, 7], "minute": [13, 14, 73], "value": [60.0, 80.0, 70.0]})
    >>> worst(records, spans, low=pl.col("value").min()).sort("hour").collect().rows()
    [(7, 0, 60.0), (7, 1, 70.0)]
    """
    hour = -((pl.col("first_end") - pl.col("minute")) // 60)  # // rounds down, so this rounds up
    return (
        records.join(spans.select("stay_id", "first_end"), on="stay_id")
        .group_by("stay_id", hour.cast(pl.Int32).alias("hour"))
        .agg(value.alias(name) for name, value in worst_of.items())
    )


def oxygenation(
    gases: pl.LazyFrame, fio2: pl.LazyFrame, ventilation: pl.LazyFrame, fio2_missing: float | None = None
) -> pl.LazyFrame:
    """PaO2/FiO2 of every arterial gas and whether it was drawn on an invasive ventilator [2].

    FiO2 is that of the specimen, else the last one charted in the 4 hours before, else ``fio2_missing`` (%).

    Returns:
        ``stay_id, minute, ratio`` (mmHg per fraction), ``ventilated``. Gases without any FiO2 are left out.
    """
    charted = fio2.filter(pl.col("value") > 0).select("stay_id", "minute", charted="value").sort("minute")
    episodes = ventilation.select("stay_id", "end_minute", minute="start_minute").sort("minute")
    inspired = pl.coalesce("fio2", "charted", pl.lit(fio2_missing, dtype=pl.Float64))
    return (
        gases.sort("minute")
        .join_asof(charted, on="minute", by="stay_id", tolerance=FIO2_VALID_MINUTES, check_sortedness=False)
        .join_asof(
            episodes, on="minute", by="stay_id", check_sortedness=False
        )  # the last episode that began before the gas
        .select(
            "stay_id",
            "minute",
            ratio=100 * pl.col("pao2") / inspired,
            ventilated=(pl.col("minute") <= pl.col("end_minute")).fill_null(False),
        )
        .drop_nulls("ratio")
    )


def gcs_total(gcs: pl.LazyFrame, gcs_intubated: Literal["normal", "carried"] = "normal") -> pl.LazyFrame:
    """Total GCS of every record as [2] counts it.

    A missing part is taken from the record before if that is less than 6 hours old, else it is normal. A patient who
    cannot speak because of a tube counts as 15 as a whole ("normal"), or as on the last record without a tube
    ("carried"), which keeps the coma of a patient who was intubated for it.

    Args:
        gcs: ``stay_id, minute, eyes, verbal, motor``; null = not charted, verbal 0 = cannot be tested because of a
            tube.
        gcs_intubated: "normal" or "carried".

    Returns:
        ``stay_id, minute, value`` (3 to 15).
    """
    parts = tuple(GCS_NORMAL)
    before = {part: pl.col(part).shift(1).over("stay_id", order_by="minute").alias(f"{part}_before") for part in parts}
    recent = pl.col("minute").shift(1).over("stay_id", order_by="minute") > pl.col("minute") - GCS_CARRY_MINUTES
    tube_before = (pl.col("verbal_before") == TUBE).fill_null(False)
    tube = (pl.col("verbal").is_null() & tube_before) | (pl.col("verbal") == TUBE).fill_null(False)

    def filled(part: str) -> pl.Expr:
        carried = pl.when(~tube_before).then(f"{part}_before")  # nothing is carried from a record with a tube
        return pl.coalesce(part, carried, pl.lit(GCS_NORMAL[part]))

    total: pl.Expr = pl.when(~tube).then(pl.sum_horizontal(filled(part) for part in parts))
    if gcs_intubated == "carried":
        total = total.forward_fill().over("stay_id", order_by="minute")
    elif gcs_intubated != "normal":
        raise ValueError(f"gcs_intubated is {gcs_intubated!r}; expected 'normal' or 'carried'")
    return (
        gcs.select("stay_id", "minute", *parts)
        .sort("stay_id", "minute")
        .with_columns(*before.values(), recent=recent)
        .with_columns(pl.when("recent").then(f"{part}_before").alias(f"{part}_before") for part in parts)
        .select("stay_id", "minute", value=total.fill_null(sum(GCS_NORMAL.values())))
    )


def urine_24h(urine: pl.LazyFrame, spans: pl.LazyFrame, urine_min_hours: float = 22) -> pl.LazyFrame:
    """Urine of the last day in mL at every charted volume, where enough of the day was charted [2].

    A volume covers the time since the one before (the first: since ``first_minute``). The volumes charted within the
    last 23 hours are summed, and so are the times they cover; if these are between ``urine_min_hours`` and 30 hours the
    sum is scaled to 24 hours, else there is no value.
    """
    since = pl.col("minute") - pl.coalesce(pl.col("minute").shift(1).over("stay_id", order_by="minute"), "first_minute")
    last_day: dict = {"by": "minute", "window_size": f"{URINE_LOOK_BACK_MINUTES}i", "closed": "both"}
    hours = (pl.col("covered").rolling_sum_by(**last_day).over("stay_id") / 60).round(2)
    volume = pl.col("value").rolling_sum_by(**last_day).over("stay_id")
    return (
        urine.group_by("stay_id", "minute")
        .agg(pl.col("value").sum())
        .join(spans.select("stay_id", "first_minute"), on="stay_id")
        .sort("stay_id", "minute")
        .with_columns(covered=since)
        .with_columns(hours=hours, volume=volume)
        .filter(pl.col("hours").is_between(urine_min_hours, URINE_MAX_HOURS))
        .select("stay_id", "minute", value=pl.col("volume") / pl.col("hours") * 24)
    )


def long_episodes(pressors: pl.LazyFrame, pressor_min_minutes: int = 0) -> pl.LazyFrame:
    """Infusion rows of the drugs that SOFA scores, in episodes of at least ``pressor_min_minutes``.

    Rows of one drug belong to one episode while the next starts no later than 5 hours after all before have ended.
    """
    scored = pressors.filter(pl.col("drug").is_in(SCORED_PRESSORS), pl.col("rate").is_not_null())
    if pressor_min_minutes <= 0:
        return scored
    drug = ["stay_id", "drug"]
    ended = pl.col("end_minute").cum_max().shift(1).over(drug, order_by="start_minute")
    begins = (pl.col("start_minute") > ended + EPISODE_GAP_MINUTES).fill_null(True)
    length = (pl.col("end_minute").max() - pl.col("start_minute").min()).over([*drug, "episode"])
    return (
        scored.filter(pl.col("rate") > 0)
        .sort(*drug, "start_minute")
        .with_columns(begins=begins)
        .with_columns(episode=pl.col("begins").cum_sum().over(drug, order_by="start_minute"))
        .filter(length >= pressor_min_minutes)
    )


def running(pressors: pl.LazyFrame, spans: pl.LazyFrame) -> pl.LazyFrame:
    """Highest rate of each drug that runs at the end of an hour, that is, with start < end of the hour <= stop [2].

    Returns:
        ``stay_id, hour`` and one column per scored drug in mcg/kg/min, null where it does not run.
    """
    first = (pl.col("start_minute") - pl.col("first_end")) // 60 + 1
    last = (pl.col("end_minute") - pl.col("first_end")) // 60
    return (
        pressors.join(spans.select("stay_id", "first_end", "last_hour"), on="stay_id")
        .with_columns(first=first.clip(lower_bound=-HOURS_BEFORE), last=pl.min_horizontal(last, "last_hour"))
        .filter(pl.col("first") <= pl.col("last"))
        .select("stay_id", "drug", "rate", hour=pl.int_ranges("first", pl.col("last") + 1, dtype=pl.Int32))
        .explode("hour", empty_as_null=False)
        .group_by("stay_id", "hour")
        .agg(pl.col("rate").filter(pl.col("drug") == drug).max().alias(drug) for drug in SCORED_PRESSORS)
    )


def score(hours: pl.LazyFrame) -> pl.LazyFrame:
    """Put the six component scores of each hour on its own in place of the measured values; no value scores 0 [1, 2].

    Args:
        hours: ``ratio_ventilated, ratio_spontaneous`` (mmHg), ``platelets`` (10^9/L), ``bilirubin, creatinine``
            (mg/dL), ``mean_bp`` (mmHg), four drug rates (mcg/kg/min), ``gcs``, ``urine`` (mL in 24 hours), and columns
            to keep.
    """

    def below(name: str, *limits: float) -> pl.Expr:
        return pl.sum_horizontal((pl.col(name) < limit).fill_null(False) for limit in limits)

    def from_(name: str, *limits: float) -> pl.Expr:
        return pl.sum_horizontal((pl.col(name) >= limit).fill_null(False) for limit in limits)

    def above(name: str, *limits: float) -> pl.Expr:
        return pl.sum_horizontal((pl.col(name) > limit).fill_null(False) for limit in limits)

    def runs(name: str) -> pl.Expr:
        return (pl.col(name) > 0).fill_null(False).cast(pl.UInt32)

    oliguria = pl.when(pl.col("urine") < 200).then(4).when(pl.col("urine") < 500).then(3).otherwise(0)
    components = {
        # without a ventilator a low ratio scores 2 at most
        "respiration": (below("ratio_ventilated", 400, 300, 200, 100), below("ratio_spontaneous", 400, 300)),
        "coagulation": (below("platelets", 150, 100, 50, 20),),
        "liver": (from_("bilirubin", 1.2, 2, 6, 12),),
        "cardiovascular": (
            below("mean_bp", 70),
            2 * runs("dobutamine"),
            2 * runs("dopamine") + above("dopamine", 5, 15),
            3 * runs("epinephrine") + above("epinephrine", 0.1),
            3 * runs("norepinephrine") + above("norepinephrine", 0.1),
        ),
        "cns": (below("gcs", 15, 13, 10, 6),),
        "renal": (from_("creatinine", 1.2, 2, 3.5, 5), oliguria),
    }
    inputs = (
        "ratio_ventilated",
        "ratio_spontaneous",
        "platelets",
        "bilirubin",
        "mean_bp",
        "gcs",
        "creatinine",
        "urine",
    )
    scored = hours.with_columns(
        pl.max_horizontal(*parts).cast(pl.Int8).alias(name) for name, parts in components.items()
    )
    return scored.drop(*inputs, *SCORED_PRESSORS)


def worst_of_day(hours: pl.LazyFrame) -> pl.LazyFrame:
    """Each component's maximum over an hour and the 23 before it, and their sum, from hour 0 on."""
    last_day = (pl.col(name).rolling_max(WINDOW_HOURS, min_samples=1).over("stay_id") for name in COMPONENTS)
    return (
        hours.sort("stay_id", "hour")
        .with_columns(last_day)
        .filter(pl.col("hour") >= 0)
        .select("stay_id", "end_minute", *COMPONENTS, sofa_24h=pl.sum_horizontal(COMPONENTS).cast(pl.Int8))
        .cast(SOFA)  # type: ignore[arg-type]
    )
