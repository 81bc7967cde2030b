"""eICU infusion rates: what ``infusionDrug`` charts in a dozen units -> mcg/kg/min (vasopressin: units/h).

Sources of the rules:
  [C] eicu-code ``concepts/pivoted/pivoted-infusion.sql`` (MIT): the spellings of the drugs, in
      ``eicu_infusion_names.csv``
  [B] Bennett 2023, doi:10.1093/gigascience/giad041: weight, time and mass conversion, typical concentrations, validity
      of a record
"""

from pathlib import Path

import polars as pl

from datamodules import raw
from datamodules.dictionary import BY_NAME, words
from datamodules.hospitals.base import Tables
from datamodules.hospitals.eicu import flowsheet
from datamodules.schema import INFUSIONS, as_events

# charted unit, lower case without spaces -> (mcg per minute in one unit of it, whether it is already per kg)
MASS: dict[str, tuple[float, bool]] = {
    "mcg/kg/min": (1, True),
    "mcg/kg/hr": (1 / 60, True),
    "mg/kg/min": (1000, True),
    "mg/kg/hr": (1000 / 60, True),
    "nanograms/kg/min": (1 / 1000, True),
    "nanograms/kg/hr": (1 / 60000, True),
    "mcg/min": (1, False),
    "mcg/hr": (1 / 60, False),
    "mg/min": (1000, False),
    "mg/hr": (1000 / 60, False),
    "nanograms/min": (1 / 1000, False),
}
# vasopressin only: units per hour in one charted unit, and whether it has to be multiplied by the weight
UNITS: dict[str, tuple[float, bool]] = {
    "units/hr": (1, False),
    "units/min": (60, False),
    "units/kg/hr": (1, True),
    "units/kg/min": (60, True),
}
VOLUME: dict[str, float] = {"ml/hr": 1 / 60, "ml/min": 1}  # mL per minute in one charted unit

# Typical concentration for rows charted in mL/h, whose bag is never described in the rows themselves; mcg/mL [B].
# Milrinone: the only ready-made bag in the names of [C] is 40 mg in 200 mL. Vasopressin: units/mL, 20 units in 100 mL
# of the same list. [B]'s 2.65 mcg/mL x 0.53 units/mcg = 1.4 units/mL would turn the demo's median of 12 mL/h into 0.28
# units/min, seven times the 0.04 units/min that rows in native units have; 0.2 units/mL gives 0.04.
CONCENTRATION: dict[str, float] = {
    "norepinephrine": 32,
    "epinephrine": 40,
    "dopamine": 1600,
    "dobutamine": 2000,
    "phenylephrine": 200,
    "milrinone": 200,
    "vasopressin": 0.2,
}
VASOPRESSIN_UNITS_PER_MCG = 0.53  # [B]
HOLDS = 300  # minutes for which a record holds when no other follows: a longer gap ends an episode [B]

INFUSION_ROWS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "minute": pl.Int32(),
    "drug": pl.String(),
    "charted": pl.String(),  # the rate as charted
    "number": pl.Float64(),  # what it says, null where it is no number
    "source_unit": pl.String(),  # last parenthesis of the name in lower case without spaces, "" where there is none
    "kind": pl.String(),  # native, zero, scaled, weight, concentration, unresolved
    "weight": pl.Float64(),  # kg, null unknown
    "weight_source": pl.String(),  # infusion, admission, flowsheet (the last one charted), null unknown
    "rate": pl.Float64(),  # mcg/kg/min (vasopressin: units/h), null where it cannot be told or is negative
}


def kept(root: Path) -> pl.LazyFrame:
    """Rows of ``infusionDrug`` with the columns that are read, everything charted as text."""
    columns = {
        "patientunitstayid": "int",
        "infusionoffset": "int",
        "drugname": "str",
        "drugrate": "str",
        "patientweight": "str",
    }
    table = raw.scan(root, "infusionDrug", columns).rename({"patientunitstayid": "stay_id", "infusionoffset": "minute"})
    return table.filter(pl.col("minute").is_not_null()).cast({"minute": pl.Int32})


def intervals(tables: Tables, stays: pl.DataFrame) -> pl.LazyFrame:
    """Infusion intervals with a known rate, schema ``schema.INFUSIONS``; a rate of 0 says that the drug is known to be
    off.

    A record holds until the next record of the same stay and drug, whatever its unit (a next record whose rate cannot
    be told ends what is known), and with no next record within 5 hours for those 5 hours [B]: whether one follows is
    not known before. [B] itself looks ahead and lets the last record of an episode hold for 1 hour only. Of several
    records in one minute one within the accepted range counts, then the most direct ``kind`` (one pump is often
    charted in mcg/min and in mL/h), then the highest rate. A rate above the range stays, for the drug runs: the store
    clips it. ``estimated`` marks rates through an assumed concentration; the use of the admission weight is not
    marked, since eICU charts a weight with under 4 % of the pressor rows and nearly every rate would carry the mark.
    """
    order = pl.Enum(["native", "zero", "scaled", "weight", "concentration", "unresolved"])
    rows = infusion_rows(tables, stays)
    rows = rows.with_columns(
        kind=pl.when(pl.col("rate").is_null()).then(pl.lit("unresolved")).otherwise("kind").cast(order),
        beyond=(pl.col("rate") > _highest()).fill_null(True),
    )
    at = ["stay_id", "drug", "minute"]
    rows = rows.sort(*at, "beyond", "kind", pl.col("rate"), descending=[False] * 5 + [True])
    rows = rows.unique(["stay_id", "drug", "minute"], keep="first", maintain_order=True)
    following = pl.col("minute").shift(-1).over("stay_id", "drug", order_by="minute")
    unit = (
        pl.when(pl.col("drug") == "vasopressin")
        .then(pl.lit(BY_NAME["vasopressin"].unit))
        .otherwise(pl.lit("mcg/kg/min"))
    )
    return (
        rows.with_columns(
            start_minute="minute",
            end_minute=pl.min_horizontal(following, pl.col("minute") + HOLDS),
            known_minute="minute",
            unit=unit,
            estimated=pl.col("kind") == "concentration",
        )
        .filter(pl.col("rate").is_not_null())
        .select(pl.col(c).cast(dtype) for c, dtype in INFUSIONS.items())
    )


def refused(tables: Tables, stays: pl.DataFrame) -> pl.LazyFrame:
    """Rows whose rate cannot be told, as events with the reason: they are counted, not stored."""
    rows = infusion_rows(tables, stays).filter(pl.col("rate").is_null())
    reason = (
        pl.when(pl.col("number").is_null()).then(pl.lit("not_a_number"))
        .when(pl.col("kind") == "unresolved").then(pl.lit("unmapped_unit"))
        .when(pl.col("weight").is_null() & (pl.col("kind") != "native")).then(pl.lit("unmapped_unit"))
        .otherwise(pl.lit("out_of_range"))
    )  # fmt: skip
    unit = pl.when(pl.col("source_unit") == "").then(pl.lit("no unit")).otherwise("source_unit")
    return as_events(rows.with_columns(concept="drug", value="number", unit=unit, dropped=reason))


def infusion_rows(tables: Tables, stays: pl.DataFrame) -> pl.LazyFrame:
    """Every charted infusion of a vasoactive drug with its rate in one unit, schema ``INFUSION_ROWS``.

    ``kind`` says how the rate was found: "native" (already in the target unit), "zero" (a rate of 0 or "OFF" is 0 in
    every unit, also where the unit is empty), "scaled" (another unit of mass or time), "weight" (divided by the weight
    charted with the infusion, else that of admission, else the last one charted), "concentration" (mL/h times a typical
    concentration, then by the weight) or "unresolved". A negative rate is null; ``kind`` keeps how it was computed.
    """
    names = words("eicu_infusion_names").lazy()
    lower = pl.col("drugname").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    parts = {
        "name": lower.str.replace(r"\([^()]*\)$", "").str.strip_chars(),
        "source_unit": lower.str.extract(r"\(([^()]*)\)$").fill_null("").str.replace_all(" ", ""),
    }
    table = tables["infusionDrug"].with_columns(**parts).join(names, on="name", how="inner")
    table = table.join(
        stays.lazy().select("stay_id", admission=pl.col("weight").cast(pl.Float64)), on="stay_id", how="inner"
    )
    # of weights that were entered at once (in kg and in lb) always the same one
    last = flowsheet.weights(tables["intakeOutput"]).sort("known_minute", "kg").rename({"known_minute": "minute"})
    table = table.sort("minute").join_asof(last, on="minute", by="stay_id", check_sortedness=False)

    own = raw.number(pl.col("patientweight"))
    own = pl.when(own.is_between(BY_NAME["weight"].low, BY_NAME["weight"].high)).then(own)
    source = (
        pl.when(own.is_not_null())
        .then(pl.lit("infusion"))
        .when(pl.col("admission").is_not_null())
        .then(pl.lit("admission"))
        .when(pl.col("kg").is_not_null())
        .then(pl.lit("flowsheet"))
    )
    charted = pl.col("drugrate").str.strip_chars()
    number = (
        pl.when(charted.str.to_lowercase() == "off")
        .then(0.0)
        .otherwise(raw.number(pl.when(~charted.str.contains("%")).then(charted)))
    )
    table = table.with_columns(weight=pl.coalesce(own, "admission", "kg"), weight_source=source, number=number)

    rate, kind = _rate()
    zero = pl.col("number") == 0
    return (
        table.with_columns(
            rate=pl.when(zero).then(0.0).otherwise(rate),
            kind=pl.when(zero & (kind != "native")).then(pl.lit("zero")).otherwise(kind),
        )
        .with_columns(rate=pl.when(pl.col("rate") >= 0).then("rate"), charted="drugrate")
        .select(pl.col(c).cast(dtype) for c, dtype in INFUSION_ROWS.items())
    )


def _highest() -> pl.Expr:
    """The upper limit of the accepted rates of a row's drug."""
    return pl.col("drug").replace_strict({c: BY_NAME[c].high for c in CONCENTRATION}, return_dtype=pl.Float64)


def _rate() -> tuple[pl.Expr, pl.Expr]:
    """The rate in the target unit (null: unknown) and how it was found, from ``number, source_unit, drug, weight``."""

    def lookup(column: str, table: dict[str, float]) -> pl.Expr:
        return pl.col(column).replace_strict(
            {key: float(value) for key, value in table.items()}, default=None, return_dtype=pl.Float64
        )

    mass = lookup("source_unit", {u: factor for u, (factor, _) in MASS.items()})
    per_kg = lookup("source_unit", {u: kg for u, (_, kg) in MASS.items()}) == 1
    volume = lookup("source_unit", VOLUME)
    concentration = lookup("drug", CONCENTRATION)
    units = lookup("source_unit", {u: factor for u, (factor, _) in UNITS.items()})
    times_kg = lookup("source_unit", {u: kg for u, (_, kg) in UNITS.items()}) == 1
    number, weight, vasopressin = pl.col("number"), pl.col("weight"), pl.col("drug") == "vasopressin"
    per_hour = VASOPRESSIN_UNITS_PER_MCG * 60

    rate = (
        pl.when(vasopressin & units.is_not_null())
        .then(number * units * pl.when(times_kg).then(weight).otherwise(1.0))
        .when(vasopressin & mass.is_not_null())
        .then(number * mass * per_hour * pl.when(per_kg).then(weight).otherwise(1.0))
        .when(vasopressin & volume.is_not_null())
        .then(number * volume * concentration * 60)
        .when(mass.is_not_null())
        .then(number * mass / pl.when(per_kg).then(1.0).otherwise(weight))
        .when(volume.is_not_null())
        .then(number * volume * concentration / weight)
    )
    native = (
        pl.when(vasopressin).then(pl.col("source_unit") == "units/hr").otherwise(pl.col("source_unit") == "mcg/kg/min")
    )
    needs_weight = pl.when(vasopressin).then(times_kg.fill_null(False) | per_kg.fill_null(False)).otherwise(~per_kg)
    kind = (
        pl.when(number.is_null())
        .then(pl.lit("unresolved"))
        .when(native)
        .then(pl.lit("native"))
        .when(volume.is_not_null())
        .then(pl.lit("concentration"))
        .when(mass.is_null() & ~(vasopressin & units.is_not_null()))
        .then(pl.lit("unresolved"))
        .when(needs_weight)
        .then(pl.lit("weight"))
        .otherwise(pl.lit("scaled"))
    )
    return rate, kind
