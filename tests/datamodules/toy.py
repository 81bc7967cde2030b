"""A hospital system given as tables in memory, for tests of what comes after the raw files."""

from pathlib import Path
from typing import Any

import polars as pl

from datamodules.hospitals.base import Hospital, Tables
from datamodules.schema import EVENTS, as_events, conform

Row = tuple[Any, ...]  # stay_id, minute, concept, value, unit, known_minute, reason; the last three may be left out


class Toy(Hospital):
    """Its stays and, per raw table, its events; its files are those that lie in its folder."""

    name = "Toy"

    def __init__(self, root: Path, stays: pl.DataFrame, tables: Tables, **kwargs: Any):
        root.mkdir(parents=True, exist_ok=True)
        super().__init__(str(root), **{"cache": str(root), **kwargs})
        self.given, self.charted = stays, tables

    def files(self) -> list[Path]:
        return sorted(self.root.glob("*.csv"))

    def stays(self) -> pl.DataFrame:
        return self.given

    def tables(self, stays: pl.DataFrame) -> Tables:
        return self.charted

    def events(self, tables: Tables, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        return [as_events(rows) for rows in tables.values()]


def events(rows: list[Row]) -> pl.LazyFrame:
    """Rows in schema ``EVENTS``."""
    names = ("stay_id", "minute", "concept", "value", "unit", "known_minute", "dropped")
    columns = {name: [row[i] if i < len(row) else None for row in rows] for i, name in enumerate(names)}
    kinds = {name: EVENTS[name] for name in names}
    return conform(pl.DataFrame(columns, schema=kinds), EVENTS, "toy").lazy()
