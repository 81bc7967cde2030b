"""eICU: the inputs of SOFA from the raw tables, and which tables each hospital fills.

Sources of the rules:
  [E] eicu-code ``concepts/pivoted`` (MIT), https://github.com/MIT-LCP/eicu-code
  [P] choices of this project, measured on the demo

A table that a hospital does not fill says nothing about its patients, so ``hospitals`` tells which it fills.
"""

from pathlib import Path
from typing import Literal

import polars as pl

from datamodules import eicu
from datamodules.concepts import BY_NAME, CONCEPT
from datamodules.sofa import TUBE, Inputs, gcs_total
from datamodules.tables import reading, scan

DAY = 24 * 60
GCS = ("gcs_eyes", "gcs_verbal", "gcs_motor")
SCORED = ("pao2", "fio2", "platelets", "bilirubin_total", "mean_bp", "creatinine", "urine", "ventilation", "gcs", *GCS)
# The tier of dose that a treatment string names -> a rate inside it (mcg/kg/min): SOFA asks for nothing more than the tier.
TIER_RATE = {"<=0.1": 0.05, ">0.1": 0.2, "<=5": 3.0, "5-15": 10.0, ">15": 20.0}
TREATMENT_HOLDS = 60  # minutes; a treatment row says that the drug runs when it is written, the 24-hour window does the rest [P]
COVERAGE = {"medication": "medication", "infusion": "infusionDrug", "treatment": "treatment", "microbiology": "microLab"}
TERMS = Path(__file__).parent / "terms"


def sofa_inputs(root: Path, stays: pl.DataFrame, gcs_intubated: Literal["normal", "carried"] = "normal") -> Inputs:
    """The frames that ``sofa.sofa`` takes; hour h of a stay is the minutes (60 h, 60 h + 60] up to its discharge from the unit.

    Values are those of ``eicu.events`` inside the concept's range. Mean pressure is taken as the median of an hour, since the
    5-minute values of the monitor contain flushes and kinks that a minimum would pick up. All blood gases are taken for
    arterial: eICU names no specimen.
    """
    raw = eicu.events(root, stays)
    schema = {"concept": CONCEPT, "low": pl.Float64(), "high": pl.Float64()}
    limits = pl.LazyFrame([(name, BY_NAME[name].low, BY_NAME[name].high) for name in SCORED], schema=schema, orient="row")

    def values(*tables: str) -> pl.LazyFrame:
        rows = pl.concat([raw[table] for table in tables if table in raw]).join(limits, on="concept")
        percent = pl.when((pl.col("concept") == "fio2") & (pl.col("value") <= 1)).then(100 * pl.col("value")).otherwise("value")
        rows = rows.with_columns(value=percent).filter(pl.col("value").is_between("low", "high"))
        with reading(root, tables[0]):
            return rows.select("stay_id", "minute", "concept", "value").collect(engine="streaming").lazy()

    def records(rows: pl.LazyFrame, concept: str) -> pl.LazyFrame:
        return rows.filter(pl.col("concept") == concept).drop("concept")

    lab, breathing = values("lab"), values("respiratoryCare")
    pressure = records(values("vitalPeriodic", "vitalAperiodic", "nurseCharting"), "mean_bp")
    hour = (-(-pl.col("minute") // 60) * 60).cast(pl.Int32)
    lab_fio2 = records(lab, "fio2").group_by("stay_id", "minute").agg(fio2=pl.col("value").max())
    ventilation = _episodes(breathing)
    return {
        "spans": stays.lazy()
        .filter(pl.col("icu_minutes").is_not_null())
        .select(
            "stay_id",
            first_minute=pl.lit(0, pl.Int32),
            first_end=pl.lit(60, pl.Int32),
            last_hour=((pl.col("icu_minutes") - 1) // 60).clip(lower_bound=0),
        ),
        "gases": records(lab, "pao2").rename({"value": "pao2"}).join(lab_fio2, on=["stay_id", "minute"], how="left"),
        "fio2": pl.concat([records(values("respiratoryCharting"), "fio2"), records(lab, "fio2")])
        .group_by("stay_id", "minute")
        .agg(pl.col("value").max()),
        "ventilation": ventilation,
        "platelets": records(lab, "platelets"),
        "bilirubin": records(lab, "bilirubin_total"),
        "mean_bp": pressure.group_by("stay_id", minute=hour).agg(pl.col("value").median()),
        "pressors": pressors(root, stays),
        "gcs": _gcs(root, values("apacheApsVar", "nurseCharting"), ventilation, gcs_intubated),
        "creatinine": records(lab, "creatinine"),
        "urine": records(values("intakeOutput"), "urine"),
    }


def pressors(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Infusion rates in mcg/kg/min; in hospitals without any infusion row, the tiers of dose that ``treatment`` names [E].

    Returns:
        ``stay_id, start_minute, end_minute, drug, rate``; a treatment row counts for the hour in which it is written.
    """
    columns = ["stay_id", "start_minute", "end_minute", "drug", "rate"]
    rates = eicu.vasopressors(root, stays).filter(pl.col("unit") == "mcg/kg/min").select(columns).lazy()
    silent = hospitals(root, stays).filter(~pl.col("infusion"))
    uncovered = stays.join(silent, on="hospital_id", how="semi")
    terms = pl.read_csv(TERMS / "eicu_vasopressor_treatments.csv").lazy()
    tier = pl.col("dose_mcg_per_kg_per_min").str.replace_all(" ", "").replace_strict(TIER_RATE, return_dtype=pl.Float64)
    terms = terms.select("treatmentstring", listed="drug", rate=tier)
    rows = open_table(root, uncovered, "treatment", "treatmentoffset", {"treatmentstring": "str"})
    rows = rows.join(terms, on="treatmentstring", how="left")
    # dobutamine is not in the list, for it constricts no vessel, but SOFA scores it at any rate
    dobutamine = pl.col("treatmentstring").str.ends_with("|dobutamine")
    rows = rows.with_columns(
        drug=pl.when(dobutamine).then(pl.lit("dobutamine")).otherwise("listed"),
        rate=pl.when(dobutamine).then(1.0).otherwise("rate"),
        start_minute=pl.col("minute") - 1,  # an infusion counts from after its start on, the row from its own minute on
        end_minute=pl.col("minute") - 1 + TREATMENT_HOLDS,
    )
    return pl.concat([rates, rows.drop_nulls("rate").select(columns)])


def _episodes(breathing: pl.LazyFrame) -> pl.LazyFrame:
    """Steps of the concept ``ventilation`` -> episodes of invasive ventilation."""
    following = pl.col("minute").shift(-1).over("stay_id", order_by="minute")
    episodes = breathing.with_columns(end_minute=following).filter(pl.col("value") == 2)
    return episodes.select("stay_id", start_minute="minute", end_minute=pl.coalesce("end_minute", "minute"))


def _gcs(root: Path, charted: pl.LazyFrame, ventilation: pl.LazyFrame, gcs_intubated: Literal["normal", "carried"]) -> pl.LazyFrame:
    """Total GCS from its parts, or the charted total at a minute without parts.

    eICU has no text for a tube: a verbal score of 1 on a ventilator (on APACHE's first day: in a stay that it calls
    intubated) is taken for one. The score of APACHE's first day is known, and so counts, at its end only.
    """
    parts = [pl.col("value").filter(pl.col("concept") == part).max().alias(part.removeprefix("gcs_")) for part in GCS]
    rows = charted.filter(pl.col("concept").is_in(GCS)).group_by("stay_id", "minute").agg(parts).sort("minute")
    episodes = ventilation.select("stay_id", "end_minute", minute="start_minute").sort("minute")
    flag = scan(root, "apacheApsVar", {"patientunitstayid": "int", "intubated": "int"}).rename({"patientunitstayid": "stay_id"})
    flag = flag.group_by("stay_id").agg(intubated=(pl.col("intubated") == 1).any())
    rows = rows.join_asof(episodes, on="minute", by="stay_id", check_sortedness=False).join(flag, on="stay_id", how="left")
    first_day = (pl.col("minute") == DAY) & pl.col("intubated")
    tube = (pl.col("verbal") == 1) & ((pl.col("minute") <= pl.col("end_minute")).fill_null(False) | first_day.fill_null(False))
    rows = rows.with_columns(verbal=pl.when(tube).then(TUBE).otherwise("verbal"))
    totals = charted.filter(pl.col("concept") == "gcs").drop("concept").join(rows, on=["stay_id", "minute"], how="anti")
    return pl.concat(
        [gcs_total(rows, gcs_intubated), totals.group_by("stay_id", "minute").agg(pl.col("value").min())], how="vertical_relaxed"
    )


def hospitals(root: Path, stays: pl.DataFrame) -> pl.DataFrame:
    """``hospital_id``, ``stays`` and, for each table that not every hospital fills, whether any of its patients has a row there."""
    everyone = scan(root, "patient", {"patientunitstayid": "int", "hospitalid": "str"}).rename({"hospitalid": "hospital_id"})
    found = stays.group_by("hospital_id").agg(pl.len().alias("stays"))
    for name, table in COVERAGE.items():
        filled = everyone.join(scan(root, table, {"patientunitstayid": "int"}), on="patientunitstayid", how="semi")
        with reading(root, table):
            ids = filled.select("hospital_id").unique().collect(engine="streaming")["hospital_id"]
        found = found.with_columns(pl.col("hospital_id").is_in(ids.implode()).alias(name))
    return found.sort("hospital_id")


def open_table(root: Path, stays: pl.DataFrame, table: str, offset: str, columns: dict[str, str]) -> pl.LazyFrame:
    """``table`` with ``stay_id`` and ``minute`` (from ``offset``) in front of ``columns``, rows of ``stays`` only."""
    rows = scan(root, table, {"patientunitstayid": "int", offset: "int", **columns})
    rows = rows.rename({"patientunitstayid": "stay_id", offset: "minute"}).filter(pl.col("minute").is_not_null())
    return rows.join(stays.lazy().select("stay_id"), on="stay_id", how="semi").with_columns(pl.col("minute").cast(pl.Int32))
