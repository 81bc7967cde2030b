"""A hospital system given as tables in memory, for tests of what comes after the raw files."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.hospitals.base import Hospital, Tables
from datamodules.schema import EVENTS, STAYS, as_events, conform

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


def of_stays(charted: dict[int, list[Row]]) -> Tables:
    """One table of ``minute, concept, value`` and, where it is given, ``known_minute``, by stay."""
    rows = [(s, m, c, v, None, *known) for s, found in charted.items() for m, c, v, *known in found]
    return {"charted": events(rows)}


def people(count: int, **columns: Any) -> pl.DataFrame:
    """Stays 1 .. ``count`` of as many patients, one in four of whom dies; ``columns`` replace theirs."""
    rng = np.random.default_rng(count)
    given = {
        "stay_id": np.arange(count) + 1,
        "patient_id": [f"p{i}" for i in range(count)],
        "hospital_id": [f"h{i % 12}" for i in range(count)],
        "stay_number": 1,
        "age": rng.uniform(20, 90, count).round(),
        "sex": [float(i % 2) for i in range(count)],
        "unit": ["medical" if i % 3 else "neuro" for i in range(count)],
        "admit_minute": -rng.integers(0, 3000, count),
        "icu_minutes": 60 * 60,
        "death_minute": [2000 + 10 * i if i % 4 == 0 else None for i in range(count)],
        "hospital_death": [i % 4 == 0 for i in range(count)],
    }
    return conform(pl.DataFrame({**given, **columns}), STAYS, "toy")
