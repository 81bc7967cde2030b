"""MIMIC-IV: what several stages read of the kept rows: minutes of a stay, infusions, urine."""

import polars as pl

from datamodules.dictionary import BY_NAME, mapping
from datamodules.hospitals.base import Tables

WITHDRAWN = "Rewritten"  # statusdescription of a row that was never given, by the publisher's documentation


def minutes(time: str | pl.Expr) -> pl.Expr:
    """Whole minutes from ``intime`` to ``time``, rounded down."""
    time = pl.col(time) if isinstance(time, str) else time
    return ((time - pl.col("intime")).dt.total_seconds() // 60).cast(pl.Int32)


def infusion_rows(tables: Tables) -> pl.LazyFrame:
    """Vasopressor rows of ``icu/inputevents`` with a charted rate, in mcg/kg/min (vasopressin: units/h).

    Unit rules of mimic-code ``concepts/medication``: norepinephrine in mg/kg/min counts x 1000 unless the weight is
    charted as 1 kg; phenylephrine in mcg/min is divided by the weight; vasopressin in units/min counts x 60. ``rate``
    is null where the unit is not one of these. A row that stands twice or was withdrawn has the reason in ``dropped``.
    """
    unit = pl.col("rateuom").str.to_lowercase().str.replace_all(" ", "")
    unit = unit.str.replace("minute", "min").str.replace("hour", "h").str.replace("hr", "h")
    kg = BY_NAME["weight"]
    rate, weight = pl.col("rate"), pl.when(pl.col("patientweight").is_between(kg.low, kg.high)).then("patientweight")
    per_kg = (
        pl.when(unit == "mcg/kg/min").then(rate)
        .when((unit == "mg/kg/min") & (pl.col("patientweight") == 1)).then(rate)
        .when(unit == "mg/kg/min").then(rate * 1000)
        .when(unit == "mcg/min").then(rate / weight)
        .when(unit == "mcg/kg/h").then(rate / 60)
        .when(unit == "mcg/h").then(rate / 60 / weight)
    )  # fmt: skip
    per_hour = pl.when(unit == "units/h").then(rate).when(unit == "units/min").then(rate * 60)
    vasopressin = pl.col("drug") == "vasopressin"
    charted = tables["icu/inputevents"].filter(pl.col("drug").is_not_null(), pl.col("rate").is_not_null())
    return once(charted).join(tables["icu/icustays"].select("stay_id", "intime"), on="stay_id").select(
        stay_id="stay_id",
        start_minute=minutes("starttime"),
        end_minute=minutes("endtime"),
        known_minute=minutes("starttime"),
        drug="drug",
        rate=pl.when(vasopressin).then(per_hour).otherwise(per_kg),
        unit=pl.when(vasopressin).then(pl.lit("units/h")).otherwise(pl.lit("mcg/kg/min")),
        estimated=pl.lit(False),
        charted="rate",
        rateuom=pl.col("rateuom").fill_null("no unit"),
        dropped="dropped",
    )  # fmt: skip


def once(infused: pl.LazyFrame) -> pl.LazyFrame:
    """Add ``dropped``: "duplicate" for a row that is equal to one before it, "withdrawn" for one that was never
    given."""
    row = [c for c in infused.collect_schema().names() if c not in ("drug", "antibiotic")]
    repeated = ~pl.struct(row).is_first_distinct()
    withdrawn = (pl.col("statusdescription") == WITHDRAWN).fill_null(False)
    return infused.with_columns(
        dropped=pl.when(withdrawn).then(pl.lit("withdrawn")).when(repeated).then(pl.lit("duplicate"))
    )


def urine_rows(tables: Tables) -> pl.LazyFrame:
    """Volumes in mL, irrigant put in negative however it is signed (mimic-code ``urine_output.sql``): with ``dropped``.

    Item 227510 ("TF Residual"), listed as urine by some pipelines, is gastric residual and is not in the list.
    """
    rows = tables["icu/outputevents"]
    repeated = ~pl.struct(rows.collect_schema().names()).is_first_distinct()
    roles = (
        mapping("mimiciv")
        .filter(pl.col("table") == "outputevents")
        .select("itemid", put_in=pl.col("role") == "irrigant_in")
    )
    rows = rows.with_columns(dropped=pl.when(repeated).then(pl.lit("duplicate"))).join(roles.lazy(), on="itemid")
    rows = rows.with_columns(put_in=pl.col("put_in").fill_null(False)).join(
        tables["icu/icustays"].select("stay_id", "intime"), on="stay_id"
    )
    return rows.select(
        "stay_id",
        "put_in",
        "dropped",
        minute=minutes("charttime"),
        known_minute=minutes(pl.max_horizontal("charttime", "storetime")),
        value=pl.when("put_in").then(-pl.col("value").abs()).otherwise("value"),
        unit="valueuom",
    )
