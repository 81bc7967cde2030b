"""What ``ehr prepare --export meds`` writes: stays and events as a dataset of the Medical Event Data Standard, and the
mapping that reads it back (``datamodules/hospitals/meds.py``).

Our minutes count from ICU admission and carry no dates, so the dates of the dataset are made up: a patient's first stay
begins at ``ORIGIN``, each further one at midnight, at least ``APART`` after the record of the one before. Within a stay
times are right to the minute. Each row names its stay in ``stay_id`` and, where it became known later than it is dated,
the time of that in ``known_time``. Outcomes stand where they happened, or at the end of the record, never at admission.
"""

import shutil
from datetime import datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.build import writing
from datamodules.dictionary import CONCEPTS
from datamodules.hospitals.meds import CODES, MAPPING, SPLIT, SPLITS
from datamodules.hospitals.tables import DERIVED
from datamodules.store import Store
from experiments import files

FORMAT = "0.4"  # version of the standard
ORIGIN = datetime(2000, 1, 1)
DAY = 24 * 60
APART = 365 * DAY  # minutes, so that what looks some months ahead or back stays within a record
SHARD = 1_000_000  # events of a shard, about: the rows of a subject stay together
SCHEMA: dict[str, pl.DataType] = {
    "subject_id": pl.Int64(),
    "time": pl.Datetime("us"),
    "code": pl.String(),
    "numeric_value": pl.Float32(),
    "text_value": pl.String(),
    "known_time": pl.Datetime("us"),
    "stay_id": pl.Int64(),
}
TIMES = {  # column of the stays table -> code of the row that stands at that minute
    "admit_minute": "HOSPITAL_ADMISSION",
    "first_minute": "STAY//first_minute",
    "icu_minutes": "ICU_DISCHARGE",
    "sepsis_minute": "STAY//sepsis_minute",
    "discharge_minute": "HOSPITAL_DISCHARGE",
    "death_minute": "MEDS_DEATH",
}
ON_ADMISSION = ("stay_number", "hospital_id", "age", "height", "weight")
AT_THE_END = ("hospital_death", "icu_death")
PATIENT = "STAY//patient_id"  # where it is no whole number, as a subject must be
EARLIER_DEATH = "STAY//death_minute"  # of a stay with another one after it: a subject dies once
SPECIAL = {  # code -> what it means, beside the columns of the stays table and the concepts
    "ICU_ADMISSION//*": "icu_admission:*",
    "GENDER//M": "sex:male",
    "GENDER//F": "sex:female",
    "MEDS_BIRTH": "birth",
    EARLIER_DEATH: "stay:death_minute",
}
RENAMED = pl.col("subject_id").cast(pl.String) != pl.col("patient_id")


def write(folder: Path, name: str, stays: pl.DataFrame, split: pl.Series, store: Store) -> None:
    """Write a folder ``meds`` that is whole or not there; memory does not grow with the number of stays.

    Args:
        folder: where it is to be.
        name: of the hospital system.
        stays: those of the store, schema ``STAYS``, in its order.
        split: "train", "val" or "test" of each, or null.
        store: with the events.

    Raises:
        ValueError: the package of the standard is not installed.
    """
    standard = _standard()
    unfinished, target = folder / ".meds.partial", folder / "meds"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        with writing(folder):
            for part in ("data", "metadata"):
                (unfinished / part).mkdir(parents=True)
            dated = _dated(stays.with_columns(split=split), store)
            for number, shard in enumerate(dated.partition_by("shard", maintain_order=True)):
                _save(_rows(shard, store), standard.DataSchema, unfinished / "data" / f"{number:06d}.parquet")
            _describe(unfinished, name, dated, standard)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _standard() -> Any:
    """The package of the standard, whose schemas every table is made to agree with."""
    try:
        import meds

        return meds
    except ImportError as error:
        raise ValueError(
            f"--export meds needs a package that is not installed ({error}): pip install 'ehr[meds]'"
        ) from error


def _save(table: pl.DataFrame, schema: Any, path: Path) -> None:
    import pyarrow.parquet

    aligned = schema.align(table.to_arrow())
    schema.validate(aligned)
    pyarrow.parquet.write_table(aligned, path)


def _dated(stays: pl.DataFrame, store: Store) -> pl.DataFrame:
    """The stays by subject and number with ``row`` (in the store)``, subject_id, admitted, end`` (of the record)`` and
    shard``."""
    filled = np.diff(store.offsets) > 0
    first, last = (np.where(filled, store.minute[rows], 0) for rows in _ends(store))
    times = [*TIMES, "first", "last"]
    dated = stays.with_row_index("row").with_columns(
        first=pl.Series(first), last=pl.Series(last), subject_id=_subjects(stays["patient_id"]),
        events=pl.Series(np.diff(store.offsets)),
    ).with_columns(begin=pl.min_horizontal(*times, 0).cast(pl.Int64), end=pl.max_horizontal(*times, 0).cast(pl.Int64))  # fmt: skip
    dated = dated.sort("subject_id", "stay_number", "row").with_columns(shard=pl.col("events").cum_sum() // SHARD)
    before = pl.col("end").shift().over("subject_id")
    days = ((before + APART - pl.col("begin")) / DAY).ceil().cast(pl.Int64).fill_null(0).cum_sum().over("subject_id")
    return dated.with_columns(
        admitted=pl.lit(ORIGIN) + pl.duration(days=days),
        shard=pl.col("shard").first().over("subject_id"),
        is_last=pl.int_range(pl.len()).reverse().over("subject_id") == 0,
    )


def _ends(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each stay's first and last event, clipped to those that are there."""
    most = max(len(store.minute) - 1, 0)
    return np.minimum(store.offsets[:-1], most), np.clip(store.offsets[1:] - 1, 0, most)


def _subjects(patients: pl.Series) -> pl.Series:
    """The patients as whole numbers: their own where all of them are, else 1, 2, ... in their order."""
    own = patients.cast(pl.Int64, strict=False)
    if (own.cast(pl.String) == patients).fill_null(False).all():
        return own
    first = patients.to_frame("patient").with_row_index().select(pl.col("index").first().over("patient"))
    return first.to_series().rank("dense").cast(pl.Int64)


def _rows(stays: pl.DataFrame, store: Store) -> pl.DataFrame:
    """Every row of some subjects, schema ``SCHEMA``, as the format wants them sorted: those without a time first."""
    parts = [*_rows_of_stays(stays), *_rows_of_events(stays, store)]
    absent = {c: pl.lit(None, kind).alias(c) for c, kind in SCHEMA.items()}
    whole = [part.with_columns(absent[c] for c in SCHEMA if c not in part.columns) for part in parts]
    rows = pl.concat([part.select(pl.col(c).cast(kind) for c, kind in SCHEMA.items()) for part in whole])
    return rows.sort("subject_id", "time", nulls_last=False, maintain_order=True)


def _rows_of_stays(stays: pl.DataFrame) -> list[pl.DataFrame]:
    """What is known of the stays themselves: each value where it became known."""
    keys, admitted = ("subject_id", "stay_id"), pl.col("admitted")
    unit = pl.concat_str(pl.lit("ICU_ADMISSION//"), pl.col("unit").fill_null(""))
    parts = [stays.select(*keys, time="admitted", code=unit)]
    for column, code in TIMES.items():
        own = pl.lit(code)
        if column == "death_minute":
            own = pl.when("is_last").then(own).otherwise(pl.lit(EARLIER_DEATH))
        time = admitted + pl.duration(minutes=pl.col(column))
        parts.append(stays.filter(pl.col(column).is_not_null()).select(*keys, time=time, code=own))
    end = admitted + pl.duration(minutes=pl.col("end"))
    for columns, at in ((ON_ADMISSION, admitted), (AT_THE_END, end)):
        for column in columns:
            value = {"text_value" if stays.schema[column] == pl.String else "numeric_value": column}
            known = stays.filter(pl.col(column).is_not_null())
            parts.append(known.select(*keys, time=at, code=pl.lit(f"STAY//{column}"), **value))
    male, female = pl.col("sex") == 1, pl.col("sex") == 0
    sex = pl.when(male).then(pl.lit("GENDER//M")).when(female).then(pl.lit("GENDER//F")).otherwise(pl.lit("STAY//sex"))
    parts.append(stays.filter(pl.col("sex").is_not_null()).select(*keys, code=sex, numeric_value="sex"))
    parts.append(stays.filter(RENAMED).select(*keys, code=pl.lit(PATIENT), text_value="patient_id"))
    aged = stays.filter(pl.col("age").is_not_null()).unique("subject_id", keep="first", maintain_order=True)
    year = admitted.dt.year() - pl.col("age").floor().cast(pl.Int32)
    parts.append(aged.select("subject_id", time=pl.datetime(year, 1, 1), code=pl.lit("MEDS_BIRTH")))
    return parts


def _rows_of_events(stays: pl.DataFrame, store: Store) -> list[pl.DataFrame]:
    """The events; what is made of others is left out, since whoever reads them makes it anew."""
    rows = np.sort(stays["row"].to_numpy().astype(np.int64))
    breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    runs = [store.frame(int(rows[first]), int(rows[last - 1]) + 1) for first, last in pairwise(breaks)]
    dates = stays.select("stay_id", "subject_id", "admitted")
    known = pl.when(pl.col("known_minute") != pl.col("minute")).then("known_minute")
    events = pl.concat(runs).filter(~pl.col("concept").cast(pl.String).is_in(DERIVED))
    events = events.join(dates, on="stay_id", maintain_order="left")
    return [
        events.select(
            "subject_id", "stay_id", time=pl.col("admitted") + pl.duration(minutes=pl.col("minute")),
            code=pl.col("concept").cast(pl.String), numeric_value="value",
            known_time=pl.col("admitted") + pl.duration(minutes=known),
        )
    ]  # fmt: skip


def _describe(folder: Path, name: str, stays: pl.DataFrame, standard: Any) -> None:
    """The mapping and the metadata."""
    columns = {f"STAY//{c}": f"stay:{c}" for c in (*ON_ADMISSION, *AT_THE_END, "sex")}
    renamed = {PATIENT: "stay:patient_id"} if stays.select(RENAMED.any()).item() else {}
    meanings = SPECIAL | renamed | {code: f"stay:{c}" for c, code in TIMES.items()} | columns
    lines = [(code, meaning, "", f"{meaning} of --data MEDS") for code, meaning in meanings.items()]
    lines += [(c.name, c.name, c.unit, f"{c.name}, {c.unit}".rstrip(", ")) for c in CONCEPTS if c.name not in DERIVED]
    mapping = pl.DataFrame(lines, schema=["code", "concept", "unit", "description"], orient="row")
    mapping.drop("description").write_csv(folder / MAPPING)
    units = stays.select(code="ICU_ADMISSION//" + pl.col("unit").fill_null("")).unique().sort("code")
    codes = mapping.select("code", "description").filter(~pl.col("code").str.ends_with("*"))
    codes = pl.concat([codes, units.with_columns(description=pl.lit("admission to a unit of this kind"))])
    codes = codes.with_columns(parent_codes=pl.lit(None, pl.List(pl.String)))
    _save(codes, standard.CodeMetadataSchema, folder / CODES)
    published = {ours: theirs for theirs, ours in SPLIT.items()}
    splits = stays.unique("subject_id", keep="first", maintain_order=True).filter(pl.col("split").is_not_null())
    splits = splits.select("subject_id", pl.col("split").replace_strict(published))
    _save(splits, standard.SubjectSplitSchema, folder / SPLITS)
    about = {
        "dataset_name": name,
        "etl_name": "ehr prepare --export meds",
        "etl_version": metadata.version("ehr"),
        "meds_version": FORMAT,
        "raw_source_id_columns": ["stay_id"],
        "other_extension_columns": ["known_time"],
    }
    standard.DatasetMetadataSchema.validate(about)
    files.write_json(about, folder / "metadata" / "dataset.json")
