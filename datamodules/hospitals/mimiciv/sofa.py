"""MIMIC-IV: the inputs of SOFA from the raw tables, as mimic-code's SQL takes them.

Sources: mimic-code ``mimic-iv/concepts`` (MIT, https://github.com/MIT-LCP/mimic-code), named at each function. Nothing
    is
cleaned beyond what that SQL cleans, so that the scores agree with the published derived tables; this is why the raw
rows are taken instead of the store's events, which pass the range filter of ``concepts.csv``.

The SQL looks back over whole stays: an episode of ventilation ends where the next status is charted, and a patient is
there until the last heart rate. So a score of the whole record may rest on what came later; with ``before`` it is made
from the past only.
"""

from functools import cache

import polars as pl

from datamodules.derive.sofa import HOURS_BEFORE, TUBE, Inputs
from datamodules.dictionary import mapping, words
from datamodules.hospitals.base import Tables
from datamodules.hospitals.mimiciv.records import minutes, urine_rows

GCS_PARTS = {"gcs_eyes": "eyes", "gcs_verbal": "verbal", "gcs_motor": "motor"}
GCS_TUBE_TEXT = "No Response-ETT"
CREATININE_MAX = 150  # mg/dL
PLATELETS, BILIRUBIN, CREATININE, PAO2, LAB_FIO2 = (
    51265,
    50885,
    50912,
    50821,
    50816,
)  # the items of the SQL and no others
LABS = (PLATELETS, BILIRUBIN, CREATININE, PAO2, LAB_FIO2)
SCORED_CONCEPTS = ("heart_rate", "mean_bp", "fio2", "ventilation", "gcs_eyes", "gcs_verbal", "gcs_motor")
SCORED = ("norepinephrine", "epinephrine", "dopamine", "dobutamine")  # vasopressin and phenylephrine are not
STATUSES = (
    "Tracheostomy",
    "InvasiveVent",
    "NonInvasiveVent",
    "HFNC",
    "SupplementalOxygen",
    "None",
)  # the first charted holds
VENTILATION_GAP_HOURS = 14


@cache
def charted_items(concept: str | None = None, role: str | None = None) -> list[int]:
    """Items of ``icu/chartevents`` with a concept or a role."""
    table = mapping("mimiciv").filter(pl.col("table") == "chartevents")
    return table.filter(pl.col("concept") == concept if concept else pl.col("role") == role)["itemid"].to_list()


@cache
def specimen_items() -> list[int]:
    """Items of ``hosp/labevents`` that name the specimen of a blood gas."""
    return mapping("mimiciv").filter(pl.col("role") == "specimen")["itemid"].to_list()


def sofa_inputs(tables: Tables, infusions: pl.LazyFrame, labs: str, before: int | None) -> Inputs:
    """The frames that ``sofa.sofa`` takes.

    Args:
        tables: kept rows of some patients.
        infusions: schema ``schema.INFUSIONS``, of these.
        labs: "drawn" or "stored", what makes a laboratory value known; only with ``before``.
        before: use only records known strictly before this minute of their stay; None: all.
    """
    icu = tables["icu/icustays"]
    own = icu.select("stay_id", "intime")
    horizon = own.select("stay_id", ends=pl.col("intime") + pl.duration(minutes=before) if before is not None else None)
    items = [i for concept in SCORED_CONCEPTS for i in charted_items(concept)] + charted_items(role="oxygen_flow")
    charted = tables["icu/chartevents"].filter(pl.col("itemid").is_in(items))
    if before is not None:
        recorded = pl.max_horizontal("charttime", "storetime")
        charted = charted.join(horizon, on="stay_id", how="left").filter((recorded < pl.col("ends")).fill_null(True))
    charted = charted.collect().lazy()  # read once, used by six of the inputs
    draw_or_store = pl.max_horizontal("charttime", "storetime") if labs == "stored" else pl.col("charttime")
    measured = tables["hosp/labevents"].filter(pl.col("itemid").is_in((*LABS, *specimen_items())))
    measured = measured.with_columns(recorded=draw_or_store).collect().lazy()
    spans = _spans(charted, icu)
    window = spans.select(
        "stay_id",
        opens=pl.col("first_end") - 60 * (HOURS_BEFORE + 1),
        closes=pl.col("first_end") + 60 * pl.col("last_hour"),
    )

    def records(table: pl.LazyFrame, key: str, lead_minutes: int = 0) -> pl.LazyFrame:
        """Give rows that name a patient or an admission to each of its stays, where the stay's hours are near."""
        joined = table.join(icu.select(key, "stay_id", "intime").unique(), on=key)
        joined = joined.with_columns(minute=minutes("charttime"), known_minute=minutes("recorded"))
        if before is not None:
            joined = joined.filter(pl.col("known_minute") < before)
        near = pl.col("minute").is_between(pl.col("opens") - lead_minutes, "closes")
        return (
            joined.join(window, on="stay_id")
            .filter(near)
            .drop("opens", "closes", "intime", "charttime", "recorded", "known_minute")
        )

    def lab(item: int, high: float | None = None) -> pl.LazyFrame:
        """Positive values of the stay's own admission (``chemistry.sql``, ``enzyme.sql``,
        ``complete_blood_count.sql``)."""
        value = pl.col("valuenum")
        rows = measured.filter(pl.col("itemid") == item, value > 0, value <= high if high else True)
        rows = rows.filter(pl.col("hadm_id").is_not_null())
        return records(rows.select("hadm_id", "charttime", "recorded", value="valuenum"), "hadm_id")

    pressors = infusions.filter(pl.col("drug").is_in(SCORED))
    if before is not None:
        pressors = pressors.filter(pl.col("known_minute") < before).with_columns(
            pl.col("end_minute").clip(upper_bound=before)
        )
    return {
        "spans": spans,
        "gases": records(_gases(measured), "patient_id"),
        "fio2": records(_charted_fio2(charted), "patient_id", lead_minutes=4 * 60),
        "ventilation": _ventilation(charted)
        .join(own, on="stay_id")
        .select("stay_id", start_minute=minutes("start"), end_minute=minutes("end")),
        "platelets": lab(PLATELETS),
        "bilirubin": lab(BILIRUBIN),
        "mean_bp": _mean_bp(charted).join(own, on="stay_id").select("stay_id", "value", minute=minutes("charttime")),
        "pressors": pressors.select("stay_id", "drug", "rate", "start_minute", "end_minute"),
        "gcs": _gcs(charted).join(own, on="stay_id").with_columns(minute=minutes("charttime")),
        "gcs_totals": pl.LazyFrame(schema={"stay_id": pl.Int64, "minute": pl.Int32, "value": pl.Float64}),
        "creatinine": lab(CREATININE, CREATININE_MAX),
        "urine": _urine(tables, before),
    }


def _spans(charted: pl.LazyFrame, icu: pl.LazyFrame) -> pl.LazyFrame:
    """From the first charted heart rate, up to the whole clock hour, to the last (``icustay_times.sql``,
    ``icustay_hourly.sql``)."""
    times = (
        charted.filter(pl.col("itemid").is_in(charted_items("heart_rate")))
        .group_by("stay_id")
        .agg(first=pl.col("charttime").min(), last=pl.col("charttime").max())
    )
    up = (pl.col("first") - pl.duration(microseconds=1)).dt.truncate("1h") + pl.duration(hours=1)
    clock_hours = (pl.col("last").dt.truncate("1h") - pl.col("first").dt.truncate("1h")).dt.total_hours()
    timed = icu.join(times, on="stay_id").with_columns(up=up)
    return timed.select(
        "stay_id", first_minute=minutes("first"), first_end=minutes("up"), last_hour=clock_hours.cast(pl.Int32)
    )


def _gases(labs: pl.LazyFrame) -> pl.LazyFrame:
    """Arterial blood gases with their own FiO2 in % (``bg.sql``): fractions become percent, what is neither is
    dropped."""
    specimens = specimen_items()
    value = pl.col("valuenum")
    percent = pl.when(value > 20, value <= 100).then(value).when(value > 0.2, value <= 1).then(100 * value)

    def item(number: int, of: pl.Expr) -> pl.Expr:
        return of.filter(pl.col("itemid") == number).max()

    gases = labs.filter(pl.col("itemid").is_in((PAO2, LAB_FIO2, *specimens))).group_by("specimen_id")
    return (
        gases.agg(
            pl.col("patient_id").max(),
            pl.col("charttime").max(),
            pl.col("recorded").max(),
            pao2=item(PAO2, value),
            fio2=item(LAB_FIO2, percent),
            specimen=pl.col("value").filter(pl.col("itemid").is_in(specimens)).max(),
        )
        .filter(pl.col("specimen") == "ART.", pl.col("pao2").is_not_null())
        .drop("specimen", "specimen_id")
    )


def _charted_fio2(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Charted FiO2 in % by patient and time (``bg.sql``), cleaned as ``_gases`` but with 20 % taken for room air."""
    value = pl.col("valuenum")
    percent = pl.when(value >= 20, value <= 100).then(value).when(value > 0.2, value <= 1).then(100 * value)
    table = charted.filter(pl.col("itemid").is_in(charted_items("fio2"))).with_columns(
        recorded=pl.max_horizontal("charttime", "storetime")
    )
    table = table.with_columns(value=percent).drop_nulls("value")
    return table.group_by("patient_id", "charttime").agg(pl.col("value").max(), pl.col("recorded").max())


def _mean_bp(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Mean arterial pressure: the average of catheter and cuff at one time (``vitalsign.sql``)."""
    inside = charted.filter(
        pl.col("itemid").is_in(charted_items("mean_bp")), pl.col("valuenum") > 0, pl.col("valuenum") < 300
    )
    return inside.group_by("stay_id", "charttime").agg(value=pl.col("valuenum").mean())


def _gcs(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Eyes, verbal and motor score charted at one time; the text for a tube makes verbal 0 (``gcs.sql``)."""
    items = {item: part for concept, part in GCS_PARTS.items() for item in charted_items(concept)}
    tube = (pl.col("value") == GCS_TUBE_TEXT) & pl.col("itemid").is_in(charted_items("gcs_verbal"))
    rows = charted.filter(pl.col("itemid").is_in(list(items)), pl.col("stay_id").is_not_null())
    rows = rows.with_columns(score=pl.when(tube).then(TUBE).otherwise("valuenum"))
    parts = (pl.col("score").filter(pl.col("itemid") == item).max().alias(part) for item, part in items.items())
    return rows.group_by("stay_id", "charttime").agg(parts)


def _ventilation(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Episodes of invasive ventilation: ``stay_id, start, end`` (``ventilation.sql``, ``oxygen_delivery.sql``,
    ``ventilator_setting.sql``).

    An episode lasts while one status is charted and ends with the next one, or with its own last record if nothing
    follows within 14 clock hours. An oxygen device counts only where an oxygen flow was charted at the same time: so
    the SQL does it.
    """
    rank = (
        words("mimiciv_ventilation")
        .lazy()
        .select(
            pl.col("itemid").cast(pl.Int64),
            value="text",
            rank=pl.col("status").replace_strict(STATUSES, range(len(STATUSES)), return_dtype=pl.Int8),
        )
    )
    text = charted.filter(pl.col("value").is_not_null())
    at = ["patient_id", "charttime"]
    flows = (
        text.filter(pl.col("itemid").is_in(charted_items(role="oxygen_flow")))
        .group_by(at)
        .agg(flow_stay=pl.col("stay_id").max())
    )
    latest = pl.col("value").sort_by("storetime", "value", descending=True, nulls_last=True).first()
    devices = (
        charted.filter(pl.col("itemid").is_in(charted_items(role="oxygen_device")))
        .group_by(*at, "itemid")
        .agg(pl.col("stay_id").max(), value=latest)
    )
    devices = devices.join(flows, on=at).with_columns(stay_id=pl.coalesce("flow_stay", "stay_id")).drop("flow_stay")
    modes = text.filter(pl.col("itemid").is_in(charted_items(role="ventilator_mode")), pl.col("stay_id").is_not_null())
    modes = modes.group_by(*at, "itemid").agg(pl.col("stay_id").max(), pl.col("value").max())
    status = (
        pl.concat([devices, modes], how="diagonal")
        .join(rank, on=["itemid", "value"])
        .group_by("stay_id", "charttime")
        .agg(pl.col("rank").min())
    )

    def hours(start: pl.Expr, end: pl.Expr) -> pl.Expr:
        return (end.dt.truncate("1h") - start.dt.truncate("1h")).dt.total_hours()

    time = pl.col("charttime")
    same_before = time.shift(1).over("stay_id", "rank", order_by="charttime")
    changed = (pl.col("rank") != pl.col("rank").shift(1).over("stay_id", order_by="charttime")).fill_null(True)
    begins = changed | (hours(same_before, time) >= VENTILATION_GAP_HOURS).fill_null(False)
    following = time.shift(-1).over("stay_id", order_by="charttime")
    held = pl.when(hours(time, following) < VENTILATION_GAP_HOURS).then(following).otherwise(time)
    return (
        status.sort("stay_id", "charttime")
        .with_columns(begins=begins.cast(pl.Int32), held=held)
        .with_columns(episode=pl.col("begins").cum_sum().over("stay_id", order_by="charttime"))
        .group_by("stay_id", "episode")
        .agg(start=time.min(), last=time.max(), end=pl.col("held").max(), rank=pl.col("rank").max())
        .filter(pl.col("rank") == STATUSES.index("InvasiveVent"), pl.col("start") != pl.col("last"))
    )


def _urine(tables: Tables, before: int | None) -> pl.LazyFrame:
    """Charted volumes in mL, irrigant negative (``urine_output.sql``, which counts a row that stands twice as two)."""
    rows = urine_rows(tables).filter(pl.col("dropped").is_null())
    rows = rows if before is None else rows.filter(pl.col("known_minute") < before)
    return rows.select("stay_id", "minute", "value")
