"""The canonical tables that every hospital becomes: one checked schema each.

All minutes count from ICU admission, rounded down; negative ones lie before it. ``known_minute`` is the minute in which
a record became known: that of the record itself unless its source says that it was entered, revised or completed later,
and never earlier. Features, cohorts and risk sets use what was known strictly before the prediction.
"""

import polars as pl

from datamodules.dictionary import CONCEPT

# One row per ICU stay.
STAYS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "patient_id": pl.String(),
    "hospital_id": pl.String(),
    "stay_number": pl.Int32(),  # 1 = the patient's first ICU stay
    "age": pl.Float32(),  # years; "> 89" is 90
    "sex": pl.Float32(),  # 1 male, 0 female, null unknown
    "height": pl.Float32(),  # cm on admission, null where it is only charted later (then it is an event)
    "weight": pl.Float32(),  # kg on admission, likewise
    "unit": pl.String(),  # medical, surgical, cardiac, cardiac_surgery, neuro, mixed, other
    "admit_minute": pl.Int32(),  # hospital admission, negative when it came before the ICU
    "icu_minutes": pl.Int32(),  # length of the ICU stay, null while the patient is there
    "first_minute": pl.Int32(),  # where the record begins, null = on ICU admission
    "discharge_minute": pl.Int32(),  # hospital discharge (or death)
    "death_minute": pl.Int32(),  # death in hospital, null if the patient left alive
    "hospital_death": pl.Boolean(),  # null = unknown
    "icu_death": pl.Boolean(),  # null = unknown
    "sepsis_minute": pl.Int32(),  # onset of sepsis: the publisher's label, else by definition; null = none
}

# Why a row that was read is not kept as it stands; null = it is.
DROPPED = pl.Enum(["duplicate", "withdrawn", "contradictory", "not_a_number", "unmapped_unit", "out_of_range"])

# What a hospital makes of its raw tables. A row that it rejects itself is given with the reason, so that it is counted.
EVENTS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "minute": pl.Int32(),
    "known_minute": pl.Int32(),  # null = ``minute``
    "concept": CONCEPT,
    "value": pl.Float64(),
    "unit": pl.String(),  # as charted; null = the concept's own
    "dropped": DROPPED,
}

# One row per infusion interval of a vasoactive drug.
INFUSIONS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "start_minute": pl.Int32(),
    "end_minute": pl.Int32(),
    "known_minute": pl.Int32(),  # of the start
    "drug": pl.String(),
    "rate": pl.Float64(),  # in ``unit``
    "unit": pl.String(),  # mcg/kg/min; vasopressin in units/h
    "estimated": pl.Boolean(),  # the charted unit or the concentration had to be assumed
}


def conform(frame: pl.DataFrame, schema: dict[str, pl.DataType], what: str) -> pl.DataFrame:
    """``frame`` with exactly the columns of ``schema``; a column that is absent becomes null, an unknown one is
    refused."""
    extra = set(frame.columns) - set(schema)
    if extra:
        raise ValueError(f"{what}: unexpected column {', '.join(sorted(extra))}; expected {', '.join(schema)}")
    absent = [pl.lit(None, dtype).alias(c) for c, dtype in schema.items() if c not in frame.columns]
    return frame.with_columns(absent).select(pl.col(c).cast(dtype) for c, dtype in schema.items())


def as_events(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Lazy rows in schema ``EVENTS``; columns that they lack are null."""
    present = rows.collect_schema()
    return rows.select((pl.col(c) if c in present else pl.lit(None)).cast(kind).alias(c) for c, kind in EVENTS.items())


def check_stays(stays: pl.DataFrame) -> pl.DataFrame:
    """Refuse a stays table with a repeated or missing id."""
    stays = conform(stays, STAYS, "stays")
    if stays.is_empty():
        raise ValueError("no ICU stay found: the stays table of the publisher has no row")
    for column in ("stay_id", "patient_id"):
        if stays[column].null_count():
            raise ValueError(f"stays: {stays[column].null_count()} rows have no {column}; every stay needs one")
    repeated = stays.filter(pl.col("stay_id").is_duplicated())["stay_id"].unique().sort()
    if len(repeated):
        raise ValueError(
            f"stays: stay_id must be unique, found {len(repeated)} ids more than once, such as {repeated[0]}; "
            f"remove the duplicate rows"
        )
    return stays
