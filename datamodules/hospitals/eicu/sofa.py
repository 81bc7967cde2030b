"""eICU: the inputs of SOFA, from the store's events and the tiers of dose that ``treatment`` names.

All of it looks back only, like the events themselves.

Sources of the rules:
  [E] eicu-code ``concepts/pivoted`` (MIT), https://github.com/MIT-LCP/eicu-code
  [P] choices of this project, measured on the demo
"""

import polars as pl

from datamodules.derive.sofa import TUBE, Inputs
from datamodules.dictionary import words
from datamodules.hospitals.base import Tables

DAY = 24 * 60
GCS = ("gcs_eyes", "gcs_verbal", "gcs_motor")
PRESSORS = ("norepinephrine", "epinephrine", "dopamine", "dobutamine")
NEEDED = (
    *("pao2", "fio2", "ventilation", "platelets", "bilirubin_total", "mean_bp", "gcs", "creatinine", "urine"),
    *(*GCS, *PRESSORS),
)
# The tier of dose that a treatment string names -> a rate inside it (mcg/kg/min): SOFA asks for nothing more than the
# tier.
TIER_RATE = {"<=0.1": 0.05, ">0.1": 0.2, "<=5": 3.0, "5-15": 10.0, ">15": 20.0}
TREATMENT_HOLDS = (
    60  # minutes; a treatment row says that the drug runs when it is written, the 24-hour window does the rest [P]
)


def sofa_inputs(tables: Tables, events: pl.LazyFrame, stays: pl.DataFrame, before: int | None) -> Inputs:
    """The frames that ``sofa.sofa`` takes; hour h of a stay is the minutes (60 h, 60 h + 60] up to its discharge from
    the unit.

    Mean pressure is taken as the median of an hour, since the 5-minute values of the monitor contain flushes and kinks
    that a minimum would pick up. All blood gases are taken for arterial: eICU names no specimen. Without a discharge
    the hours go on to the last event.

    Args:
        tables: kept rows of some stays.
        events: ``stay_id, minute, known_minute, concept, value`` of these stays.
        stays: these stays.
        before: use only what was known strictly before this minute; None: the whole record.
    """
    needed = events.filter(pl.col("concept").is_in(NEEDED))
    recorded = (needed if before is None else needed.filter(pl.col("known_minute") < before)).collect().lazy()

    def records(concept: str) -> pl.LazyFrame:
        return recorded.filter(pl.col("concept") == concept).select("stay_id", "minute", "value")

    last = events.group_by("stay_id").agg(last=pl.col("minute").max())
    end = pl.coalesce("icu_minutes", pl.col("last") + 1 if before is None else before)
    end = end if before is None else pl.min_horizontal(end, before)
    spans = stays.lazy().join(last, on="stay_id", how="left").with_columns(end=end).filter(pl.col("end").is_not_null())
    hour = (-(-pl.col("minute") // 60) * 60).cast(pl.Int32)
    fio2 = records("fio2").group_by("stay_id", "minute").agg(fio2=pl.col("value").max())
    still = pl.lit(before) if before is not None else pl.col("minute")  # what the last step holds until
    ventilation = _steps(records("ventilation"), still).filter(pl.col("value") == 2)
    parts = [pl.col("value").filter(pl.col("concept") == part).max().alias(part.removeprefix("gcs_")) for part in GCS]
    scale = recorded.filter(pl.col("concept").is_in(GCS)).group_by("stay_id", "minute").agg(parts)
    totals = records("gcs").join(scale, on=["stay_id", "minute"], how="anti")
    return {
        "spans": spans.select(
            "stay_id",
            first_minute=pl.lit(0, pl.Int32),
            first_end=pl.lit(60, pl.Int32),
            last_hour=((pl.col("end") - 1) // 60).clip(lower_bound=0),
        ),
        "gases": records("pao2").rename({"value": "pao2"}).join(fio2, on=["stay_id", "minute"], how="left"),
        "fio2": fio2.rename({"fio2": "value"}),
        "ventilation": ventilation.select("stay_id", start_minute="minute", end_minute="following"),
        "platelets": records("platelets"),
        "bilirubin": records("bilirubin_total"),
        "mean_bp": records("mean_bp").group_by("stay_id", minute=hour).agg(pl.col("value").median()),
        "pressors": _pressors(tables, recorded, still, before),
        "gcs": _tubes(scale, ventilation, tables["apacheApsVar"]),
        "gcs_totals": totals.group_by("stay_id", "minute").agg(pl.col("value").min()),
        "creatinine": records("creatinine"),
        "urine": records("urine"),
    }


def _steps(records: pl.LazyFrame, still: pl.Expr, *of: str) -> pl.LazyFrame:
    """Records of a step function with the minute of the ``following`` one of the same stay (and ``of``), else
    ``still``."""
    following = pl.col("minute").shift(-1).over("stay_id", *of, order_by="minute")
    return records.with_columns(following=pl.coalesce(following, still.cast(pl.Int32)))


def _pressors(tables: Tables, events: pl.LazyFrame, still: pl.Expr, before: int | None) -> pl.LazyFrame:
    """Infusion rates in mcg/kg/min; for a stay without an infusion record so far, the tiers of dose that ``treatment``
    names [E].

    Returns:
        ``stay_id, start_minute, end_minute, drug, rate``; a treatment row counts for the hour in which it is written.
    """
    columns = ["stay_id", "start_minute", "end_minute", "drug", "rate"]
    rates = events.filter(pl.col("concept").is_in(PRESSORS)).with_columns(drug=pl.col("concept").cast(pl.String))
    steps = _steps(rates, still, "drug").with_columns(start_minute="minute", end_minute="following", rate="value")
    steps = steps.filter(pl.col("rate") > 0)
    if "treatment" not in tables:
        return steps.select(columns)
    first = rates.group_by("stay_id").agg(first=pl.col("minute").min())
    tier = pl.col("dose_mcg_per_kg_per_min").str.replace_all(" ", "").replace_strict(TIER_RATE, return_dtype=pl.Float64)
    terms = words("eicu_vasopressor_treatments").lazy().select("treatmentstring", listed="drug", rate=tier)
    rows = tables["treatment"].join(terms, on="treatmentstring", how="left").join(first, on="stay_id", how="left")
    rows = rows.filter((pl.col("minute") < pl.col("first")).fill_null(True))
    if before is not None:
        rows = rows.filter(pl.col("minute") < before)
    # dobutamine is not in the list, for it constricts no vessel, but SOFA scores it at any rate
    dobutamine = pl.col("treatmentstring").str.ends_with("|dobutamine")
    rows = rows.with_columns(
        drug=pl.when(dobutamine).then(pl.lit("dobutamine")).otherwise("listed"),
        rate=pl.when(dobutamine).then(1.0).otherwise("rate"),
        start_minute=pl.col("minute") - 1,  # an infusion counts from after its start on, the row from its own minute on
        end_minute=pl.col("minute") - 1 + TREATMENT_HOLDS,
    )
    return pl.concat([steps.select(columns), rows.drop_nulls(["rate", "drug"]).select(columns)], how="vertical_relaxed")


def _tubes(scale: pl.LazyFrame, ventilation: pl.LazyFrame, apache: pl.LazyFrame) -> pl.LazyFrame:
    """Mark patients who cannot speak because of a tube: ``verbal`` is ``TUBE``.

    eICU has no text for a tube: a verbal score of 1 on a ventilator (on APACHE's first day: in a stay that it calls
    intubated) is taken for one. The score of APACHE's first day is known, and so counts, at its end only.
    """
    episodes = ventilation.select("stay_id", "minute", end_minute="following").sort("minute")
    flag = apache.group_by("stay_id").agg(intubated=(pl.col("intubated") == 1).any())
    rows = scale.sort("minute").join_asof(episodes, on="minute", by="stay_id", check_sortedness=False)
    rows = rows.join(flag, on="stay_id", how="left")
    first_day = (pl.col("minute") == DAY) & pl.col("intubated")
    ventilated = (pl.col("minute") <= pl.col("end_minute")).fill_null(False)
    tube = (pl.col("verbal") == 1) & (ventilated | first_day.fill_null(False))
    return rows.with_columns(verbal=pl.when(tube).then(TUBE).otherwise("verbal"))
