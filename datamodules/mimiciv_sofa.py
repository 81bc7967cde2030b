"""MIMIC-IV: the inputs of SOFA from the raw tables, as mimic-code's SQL takes them.

Sources: mimic-code ``mimic-iv/concepts`` (MIT, https://github.com/MIT-LCP/mimic-code), named at each function. Nothing is
cleaned beyond what that SQL cleans, so that the scores agree with the published derived tables; this is why the values are
read here again instead of being taken from the store's events, which pass the range filter of ``concepts.py``.
"""

from pathlib import Path
from typing import Literal

import polars as pl

from datamodules import mimiciv
from datamodules.mimiciv import IRRIGANT_IN, URINE
from datamodules.sofa import HOURS_BEFORE, TUBE, Inputs, gcs_total
from datamodules.tables import reading, scan

HEART_RATE = 220045
MEAN_BP = (220052, 220181, 225312)
GCS = {220739: "eyes", 223900: "verbal", 223901: "motor"}
GCS_TUBE_TEXT = "No Response-ETT"
FIO2 = 223835
OXYGEN_DEVICE = 226732
OXYGEN_FLOWS = (223834, 227582, 227287)
VENTILATOR_MODES = (223849, 229314)
TEXT_ITEMS = (223900, OXYGEN_DEVICE, *OXYGEN_FLOWS, *VENTILATOR_MODES)
CHARTED = (HEART_RATE, *MEAN_BP, *GCS, FIO2, OXYGEN_DEVICE, *OXYGEN_FLOWS, *VENTILATOR_MODES)
PLATELETS, BILIRUBIN, CREATININE, PAO2, LAB_FIO2, SPECIMEN = 51265, 50885, 50912, 50821, 50816, 52033
CREATININE_MAX = 150  # mg/dL
SCORED = ("norepinephrine", "epinephrine", "dopamine", "dobutamine")  # vasopressin and phenylephrine are not

STATUSES = ("Tracheostomy", "InvasiveVent", "NonInvasiveVent", "HFNC", "SupplementalOxygen", "None")  # the first that is charted holds
VENTILATION_GAP_HOURS = 14
TERMS = Path(__file__).parent / "terms"


def sofa_inputs(root: Path, stays: pl.DataFrame, gcs_intubated: Literal["normal", "carried"] = "normal") -> Inputs:
    """The frames that ``sofa.sofa`` takes. Reads each raw table once and keeps only the rows that SOFA needs."""
    icu = icu_stays(root, stays)
    charted, labs = _charted(root, icu), _labs(root, icu)
    spans = _spans(charted, icu)
    window = spans.select(
        "stay_id", opens=pl.col("first_end") - 60 * (HOURS_BEFORE + 1), closes=pl.col("first_end") + 60 * pl.col("last_hour")
    )

    def records(table: pl.LazyFrame, key: str, lead_minutes: int = 0) -> pl.LazyFrame:
        """Give rows that name a patient or an admission to each of its stays, where the stay's hours are near."""
        joined = table.join(icu.select(key, "stay_id", "intime").unique(), on=key).with_columns(minute=minutes("charttime"))
        near = pl.col("minute").is_between(pl.col("opens") - lead_minutes, "closes")
        return joined.join(window, on="stay_id").filter(near).drop("opens", "closes", "intime", "charttime")

    def lab(item: int, high: float | None = None) -> pl.LazyFrame:
        """Positive values of the stay's own admission (``chemistry.sql``, ``enzyme.sql``, ``complete_blood_count.sql``)."""
        value = pl.col("valuenum")
        rows = labs.filter(pl.col("itemid") == item, value > 0, value <= high if high else True)
        return records(rows.filter(pl.col("hadm_id").is_not_null()).select("hadm_id", "charttime", value="valuenum"), "hadm_id")

    own = icu.select("stay_id", "intime")
    return {
        "spans": spans,
        "gases": records(_gases(labs), "subject_id"),
        "fio2": records(_charted_fio2(charted), "subject_id", lead_minutes=4 * 60),
        "ventilation": _ventilation(charted)
        .join(own, on="stay_id")
        .select("stay_id", start_minute=minutes("start"), end_minute=minutes("end")),
        "platelets": lab(PLATELETS),
        "bilirubin": lab(BILIRUBIN),
        "mean_bp": _mean_bp(charted).join(own, on="stay_id").select("stay_id", "value", minute=minutes("charttime")),
        "pressors": _pressors(root, stays),
        "gcs": gcs_total(_gcs(charted).join(own, on="stay_id").with_columns(minute=minutes("charttime")), gcs_intubated),
        "creatinine": lab(CREATININE, CREATININE_MAX),
        "urine": _urine(root, icu),
    }


def icu_stays(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Ids, admission and discharge of the given stays."""
    columns = {"stay_id": "int", "subject_id": "int", "hadm_id": "int", "intime": "time", "outtime": "time"}
    with reading(root, "icu/icustays"):
        return scan(root, "icu/icustays", columns).join(stays.lazy().select("stay_id"), on="stay_id", how="semi").collect().lazy()


def minutes(time: str) -> pl.Expr:
    """Whole minutes from ``intime`` to ``time``, rounded down."""
    return ((pl.col(time) - pl.col("intime")).dt.total_seconds() // 60).cast(pl.Int32).alias("minute")


def _charted(root: Path, icu: pl.LazyFrame) -> pl.LazyFrame:
    """The few items of ``icu/chartevents`` that are needed, in memory; text is kept for text items only."""
    columns = {
        "subject_id": "int",
        "stay_id": "int",
        "charttime": "time",
        "storetime": "time",
        "itemid": "int",
        "value": "str",
        "valuenum": "float",
    }
    table = scan(root, "icu/chartevents", columns).filter(pl.col("itemid").is_in(CHARTED)).join(icu, on="subject_id", how="semi")
    small = table.with_columns(value=pl.when(pl.col("itemid").is_in(TEXT_ITEMS)).then("value"))
    with reading(root, "icu/chartevents"):
        return small.collect(engine="streaming").lazy()


def _labs(root: Path, icu: pl.LazyFrame) -> pl.LazyFrame:
    columns = {
        "subject_id": "int",
        "hadm_id": "int",
        "specimen_id": "int",
        "itemid": "int",
        "charttime": "time",
        "value": "str",
        "valuenum": "float",
    }
    items = (PLATELETS, BILIRUBIN, CREATININE, PAO2, LAB_FIO2, SPECIMEN)
    table = scan(root, "hosp/labevents", columns).filter(pl.col("itemid").is_in(items)).join(icu, on="subject_id", how="semi")
    with reading(root, "hosp/labevents"):
        return table.with_columns(value=pl.when(pl.col("itemid") == SPECIMEN).then("value")).collect(engine="streaming").lazy()


def _spans(charted: pl.LazyFrame, icu: pl.LazyFrame) -> pl.LazyFrame:
    """From the first charted heart rate, up to the whole clock hour, to the last (``icustay_times.sql``, ``icustay_hourly.sql``)."""
    times = (
        charted.filter(pl.col("itemid") == HEART_RATE)
        .group_by("stay_id")
        .agg(first=pl.col("charttime").min(), last=pl.col("charttime").max())
    )
    up = (pl.col("first") - pl.duration(microseconds=1)).dt.truncate("1h") + pl.duration(hours=1)
    clock_hours = (pl.col("last").dt.truncate("1h") - pl.col("first").dt.truncate("1h")).dt.total_hours()
    known = icu.join(times, on="stay_id").with_columns(up=up)
    return known.select("stay_id", first_minute=minutes("first"), first_end=minutes("up"), last_hour=clock_hours.cast(pl.Int32))


def _gases(labs: pl.LazyFrame) -> pl.LazyFrame:
    """Arterial blood gases with their own FiO2 in % (``bg.sql``): fractions become percent, what is neither is dropped."""
    value = pl.col("valuenum")
    percent = pl.when(value > 20, value <= 100).then(value).when(value > 0.2, value <= 1).then(100 * value)

    def item(number: int, of: pl.Expr) -> pl.Expr:
        return of.filter(pl.col("itemid") == number).max()

    gases = labs.filter(pl.col("itemid").is_in((PAO2, LAB_FIO2, SPECIMEN))).group_by("specimen_id")
    return (
        gases.agg(
            pl.col("subject_id").max(),
            pl.col("charttime").max(),
            pao2=item(PAO2, value),
            fio2=item(LAB_FIO2, percent),
            specimen=item(SPECIMEN, pl.col("value")),
        )
        .filter(pl.col("specimen") == "ART.", pl.col("pao2").is_not_null())
        .drop("specimen", "specimen_id")
    )


def _charted_fio2(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Charted FiO2 in % by patient and time (``bg.sql``), cleaned as ``_gases`` but with 20 % taken for room air."""
    value = pl.col("valuenum")
    percent = pl.when(value >= 20, value <= 100).then(value).when(value > 0.2, value <= 1).then(100 * value)
    table = charted.filter(pl.col("itemid") == FIO2).group_by("subject_id", "charttime").agg(value=percent.max())
    return table.drop_nulls("value")


def _mean_bp(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Mean arterial pressure: the average of catheter and cuff at one time (``vitalsign.sql``)."""
    inside = charted.filter(pl.col("itemid").is_in(MEAN_BP), pl.col("valuenum") > 0, pl.col("valuenum") < 300)
    return inside.group_by("stay_id", "charttime").agg(value=pl.col("valuenum").mean())


def _gcs(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Eyes, verbal and motor score charted at one time; the text for a tube makes verbal 0 (``gcs.sql``)."""
    value = pl.when(pl.col("value") == GCS_TUBE_TEXT, pl.col("itemid") == 223900).then(TUBE).otherwise("valuenum")
    rows = charted.filter(pl.col("itemid").is_in(list(GCS)), pl.col("stay_id").is_not_null()).with_columns(score=value)
    parts = (pl.col("score").filter(pl.col("itemid") == item).max().alias(part) for item, part in GCS.items())
    return rows.group_by("stay_id", "charttime").agg(parts)


def _ventilation(charted: pl.LazyFrame) -> pl.LazyFrame:
    """Episodes of invasive ventilation: ``stay_id, start, end`` (``ventilation.sql``, ``oxygen_delivery.sql``, ``ventilator_setting.sql``).

    An episode lasts while one status is charted and ends with the next one, or with its own last record if nothing follows
    within 14 clock hours. An oxygen device counts only where an oxygen flow was charted at the same time: so the SQL does it.
    """
    terms = pl.read_csv(TERMS / "mimiciv_ventilation_status.csv").lazy()
    rank = terms.select(
        "itemid", value="charted_text", rank=pl.col("status").replace_strict(STATUSES, range(len(STATUSES)), return_dtype=pl.Int8)
    )
    text = charted.filter(pl.col("value").is_not_null())
    at = ["subject_id", "charttime"]
    flows = text.filter(pl.col("itemid").is_in(OXYGEN_FLOWS)).group_by(at).agg(flow_stay=pl.col("stay_id").max())
    latest = pl.col("value").sort_by("storetime", "value", descending=True, nulls_last=True).first()
    devices = charted.filter(pl.col("itemid") == OXYGEN_DEVICE).group_by(*at, "itemid").agg(pl.col("stay_id").max(), value=latest)
    devices = devices.join(flows, on=at).with_columns(stay_id=pl.coalesce("flow_stay", "stay_id")).drop("flow_stay")
    modes = text.filter(pl.col("itemid").is_in(VENTILATOR_MODES), pl.col("stay_id").is_not_null())
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


def _pressors(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Infusions in mcg/kg/min (``medication/norepinephrine.sql`` and its three neighbours), by the unit rules of ``mimiciv.py``.

    The SQL takes a unit that it does not know for mcg/kg/min; here such a rate is not scored.
    """
    rows = mimiciv.vasopressors(root, stays).lazy().filter(pl.col("drug").is_in(SCORED))
    return rows.select("stay_id", "drug", "rate", "start_minute", "end_minute")


def _urine(root: Path, icu: pl.LazyFrame) -> pl.LazyFrame:
    """Charted volumes in mL (``urine_output.sql``)."""
    rows = scan(root, "icu/outputevents", {"stay_id": "int", "itemid": "int", "charttime": "time", "value": "float"})
    volume = pl.when(pl.col("itemid") == IRRIGANT_IN, pl.col("value") > 0).then(-pl.col("value")).otherwise("value")
    kept = rows.filter(pl.col("itemid").is_in(URINE)).join(icu, on="stay_id")
    return kept.select("stay_id", minute=minutes("charttime"), value=volume)
