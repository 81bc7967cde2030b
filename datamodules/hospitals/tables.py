"""One's own hospital without writing code: ``stays.parquet`` and ``events.parquet``, the very files that ``ehr prepare
--out`` writes."""

from pathlib import Path
from typing import Any

import polars as pl

from datamodules import raw
from datamodules.dictionary import CONCEPT, NAMES
from datamodules.hospitals.base import Hospital
from datamodules.hospitals.base import Tables as Kept
from datamodules.schema import STAYS, as_events, conform

# made anew from the others, so that they always agree with them
DERIVED = ("norepinephrine_equivalent", "norepinephrine_equivalent_change", "urine_rate")
COLUMNS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "minute": pl.Int32(),
    "concept": pl.String(),
    "value": pl.Float64(),
}
OPTIONAL: dict[str, pl.DataType] = {"known_minute": pl.Int32(), "unit": pl.String()}


class Tables(Hospital):
    """One's own hospital: ``stays.parquet`` and ``events.parquet`` as ``ehr prepare --out`` writes them.

    ``stays.parquet`` needs ``stay_id`` and ``patient_id``; the other columns of docs/data.md may be absent (unknown).
    ``events.parquet`` needs ``stay_id, minute`` (since ICU admission), ``concept, value``; ``known_minute`` (default:
    ``minute``) and ``unit`` (default: the concept's own) may be absent.

    Args:
        root: Folder with the two files.
    """

    name = "Tables"
    published_ids = False
    raw_tables = ("stays", "events")

    def __init__(self, root: str = "data/tables", **kwargs: Any):
        super().__init__(root, **kwargs)

    def stays(self) -> pl.DataFrame:
        """``stays.parquet`` in schema ``STAYS``; a stay without a number is the patient's first."""
        path, frame = self._open("stays", {"stay_id": STAYS["stay_id"], "patient_id": STAYS["patient_id"]})
        present = {c: kind for c, kind in STAYS.items() if c in frame.collect_schema()}
        table = _cast(path, frame, present).collect()
        table = conform(table, STAYS, str(path))
        return with_defaults(table)

    def tables(self, stays: pl.DataFrame) -> Kept:
        """``events.parquet``."""
        path, frame = self._open("events", COLUMNS)
        present = COLUMNS | {c: kind for c, kind in OPTIONAL.items() if c in frame.collect_schema()}
        return {"events": _cast(path, frame, present)}

    def events(self, tables: Kept, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        """The events; derived variables are made anew."""
        return [given(tables["events"].collect(), f"{self.root}/events.parquet")]

    def _open(self, table: str, needed: dict[str, pl.DataType]) -> tuple[Path, pl.LazyFrame]:
        path = raw.find(self.root, table)
        if path is None or path.suffix != ".parquet":
            raise FileNotFoundError(
                f"no {table}.parquet in {self.root}: expected what `ehr prepare --out` writes; set --data.root"
            )
        return path, raw.parquet(path, needed)[0]


def with_defaults(stays: pl.DataFrame) -> pl.DataFrame:
    """Stays in schema ``STAYS``; one without a number is the patient's first."""
    return stays.with_columns(
        pl.col("stay_number").fill_null(1), pl.col("hospital_id").fill_null("own"), pl.col("unit").fill_null("other")
    )


def given(events: pl.DataFrame, place: str) -> pl.LazyFrame:
    """Events in schema ``EVENTS`` without those that are derived, which are made anew.

    Raises:
        ValueError: a concept is not known, or an event has no stay or minute.
    """
    for column in ("stay_id", "minute"):
        if events[column].null_count():
            raise ValueError(f"{place}: {events[column].null_count():,} events have no {column}; every event needs one")
    named = events.with_columns(pl.col("concept").cast(pl.String).cast(CONCEPT, strict=False))
    if named["concept"].null_count() > events["concept"].null_count():
        unknown = sorted(set(events["concept"].drop_nulls().unique()) - set(NAMES))
        raise ValueError(f"{place}: {', '.join(unknown[:5])} is no concept of dictionary/concepts.csv")
    return as_events(named.lazy().filter(~pl.col("concept").is_in(DERIVED)))


def _cast(path: Path, frame: pl.LazyFrame, kinds: dict[str, pl.DataType]) -> pl.LazyFrame:
    actual = frame.collect_schema()
    for column, kind in kinds.items():
        numbers = actual[column].is_numeric() or actual[column] in (pl.Boolean, pl.Null)
        if kind != pl.String and not numbers:
            raise ValueError(f"{path}: column {column} is {actual[column]}; expected {kind}")
    return frame.select(pl.col(c).cast(kind) for c, kind in kinds.items())
