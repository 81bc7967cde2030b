"""The canonical tables that every hospital becomes: one checked schema each."""

import polars as pl

from datamodules.concepts import CONCEPT

# One row per ICU stay. All minutes count from ICU admission (negative = before it).
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
    "icu_minutes": pl.Int32(),  # length of the ICU stay
    "first_minute": pl.Int32(),  # where the record begins, null = on ICU admission
    "discharge_minute": pl.Int32(),  # hospital discharge (or death)
    "death_minute": pl.Int32(),  # death in hospital, null if the patient left alive
    "hospital_death": pl.Boolean(),  # null = unknown
    "icu_death": pl.Boolean(),  # null = unknown
    "sepsis_minute": pl.Int32(),  # onset of sepsis where the publisher labels it, null = none or unlabelled
}

# What a source module yields, one lazy frame per raw table; ``unit`` is the charted unit (null = the concept's own).
RAW_EVENTS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "minute": pl.Int32(),
    "concept": CONCEPT,
    "value": pl.Float64(),
    "unit": pl.String(),
}

# One row per infusion interval; ``estimated`` = the charted unit or the weight had to be assumed.
VASOPRESSORS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "start_minute": pl.Int32(),
    "end_minute": pl.Int32(),
    "drug": pl.String(),
    "rate": pl.Float64(),  # in ``unit``
    "unit": pl.String(),  # mcg/kg/min; vasopressin in units/h
    "estimated": pl.Boolean(),
}


def conform(frame: pl.DataFrame, schema: dict[str, pl.DataType], what: str) -> pl.DataFrame:
    """``frame`` with exactly the columns of ``schema``; a column that is absent becomes null, an unknown one is refused."""
    extra = set(frame.columns) - set(schema)
    if extra:
        raise ValueError(f"{what}: unexpected column {', '.join(sorted(extra))}; expected {', '.join(schema)}")
    absent = [pl.lit(None, dtype).alias(c) for c, dtype in schema.items() if c not in frame.columns]
    return frame.with_columns(absent).select(pl.col(c).cast(dtype) for c, dtype in schema.items())


def check_stays(stays: pl.DataFrame) -> pl.DataFrame:
    """Refuse a stays table with a repeated or missing id."""
    stays = conform(stays, STAYS, "stays")
    if stays.is_empty():
        raise ValueError("no ICU stay found: the stays table of the publisher has no row")
    for column in ("stay_id", "patient_id"):
        if stays[column].null_count():
            raise ValueError(f"stays: {stays[column].null_count()} rows have no {column}; every stay needs one")
    twice = stays.filter(pl.col("stay_id").is_duplicated())["stay_id"].unique().sort()
    if len(twice):
        raise ValueError(
            f"stays: stay_id must be unique, found {len(twice)} ids more than once, such as {twice[0]}; remove the duplicate rows"
        )
    return stays
