"""Clinical knowledge as data: reads, checks and hashes the tables of ``dictionary/``.

====================  ==========================================================================================
concepts.csv          the variables that every hospital shares: unit, plausible range, how an hour is summed up
units.csv             how a charted unit becomes a concept's own: value * factor + offset
mimiciv.csv           item of MIMIC-IV -> concept; ``role`` says what an item is for beyond that
eicu.csv              column or label of eICU -> concept
physionet.csv         variable of the challenges of 2012 and 2019 -> concept
care_units.csv        name of an intensive care unit -> its kind
word lists            antibiotics.csv, mimiciv_ventilation.csv, eicu_*.csv
====================  ==========================================================================================

Sources of the ranges (column ``source`` of concepts.csv; "(" excludes the limit, "[" includes it):
  V  mimic-code ``measurement/vitalsign.sql`` (MIT)  https://github.com/MIT-LCP/mimic-code
  E  eicu-code ``pivoted/pivoted-lab.sql``, ``pivoted-bg.sql``, ``pivoted-gcs.sql``, ``pivoted-weight.sql`` (MIT)
  R  accepted infusion rates of the public eICU and MIMIC pipelines (Bennett 2023, doi:10.1093/gigascience/giad041)
  P  physiological or assay limits set by this project, wide enough to keep every survivable value
"""

import csv
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

FOLDER = Path(__file__).parent / "dictionary"
CARE_UNITS = ("medical", "surgical", "cardiac", "cardiac_surgery", "neuro", "mixed", "other")
HOURLY = ("mean", "sum", "rate")
SHARED = {"eicu": ("table", "label"), "mimiciv": ("table", "itemid"), "physionet": ("challenge", "variable")}


class Concept(NamedTuple):
    """One clinical variable.

    Attributes:
        name: the name used in every table, model and report.
        unit: the unit in which values are stored.
        low: lower limit of plausible values.
        high: upper limit of plausible values.
        low_open: whether ``low`` itself is implausible, such as a heart rate of 0.
        high_open: whether ``high`` itself is implausible.
        hourly: how an hour's values become one: "mean", "sum" (volumes), or "rate" (a step function that holds from one
            record to the next and is averaged over time; a step outside the range is clipped to it, since dropping it
            would leave the step before in force).
        treatment: whether it is a treatment or, like urine, the response that a treatment is titrated to.
        source: of the range, see the head of this file.
        group: what it is read together with, such as "blood gas".
    """

    name: str
    unit: str
    low: float
    high: float
    low_open: bool
    high_open: bool
    hourly: str
    treatment: bool
    source: str
    group: str


def words(name: str) -> pl.DataFrame:
    """A table of ``dictionary/`` by name, every column as text, empty cells null."""
    return pl.read_csv(FOLDER / f"{name}.csv", infer_schema=False)


def _concepts() -> tuple[Concept, ...]:
    rows = []
    with (FOLDER / "concepts.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))  # polars would start its threads: a process that imports this may yet fork
    for row in table:
        name, interval = row["concept"], row["range"]
        try:
            low, high = (float(limit) for limit in interval[1:-1].split(","))
        except ValueError as error:
            raise ValueError(
                f"concepts.csv: {name} has the range {interval!r}; expected such as [0,10] or (0,10]"
            ) from error
        if interval[0] not in "[(" or interval[-1] not in ")]" or not low < high:
            raise ValueError(f"concepts.csv: {name} has the range {interval!r}; expected low < high in brackets")
        if row["hourly"] not in HOURLY or row["treatment"] not in ("", "yes") or row["source"] not in tuple("VERP"):
            entries = row["hourly"], row["treatment"], row["source"]
            raise ValueError(
                f"concepts.csv: {name} has hourly, treatment, source {entries}; "
                f"expected one of {', '.join(HOURLY)}, yes or nothing, V, E, R or P"
            )
        opened = interval[0] == "(", interval[-1] == ")"
        treatment, group = row["treatment"] == "yes", row["group"] or "other"
        rows.append(Concept(name, row["unit"], low, high, *opened, row["hourly"], treatment, row["source"], group))
    repeated = {c.name for c in rows if [other.name for other in rows].count(c.name) > 1}
    if repeated:
        raise ValueError(f"concepts.csv: {', '.join(sorted(repeated))} stands more than once")
    return tuple(rows)


CONCEPTS: tuple[Concept, ...] = _concepts()
NAMES: tuple[str, ...] = tuple(c.name for c in CONCEPTS)
BY_NAME: dict[str, Concept] = {c.name: c for c in CONCEPTS}
CONCEPT = pl.Enum(NAMES)  # the polars type of a ``concept`` column
RATES: tuple[str, ...] = tuple(c.name for c in CONCEPTS if c.hourly == "rate")
_LOW, _HIGH = (np.array([getattr(c, side) for c in CONCEPTS], np.float32) for side in ("low", "high"))
_LOW_OPEN, _HIGH_OPEN = (np.array([getattr(c, side) for c in CONCEPTS]) for side in ("low_open", "high_open"))


def plausible(concept: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Whether each value (N,) lies in the range of its concept (N,), given as an index into ``NAMES``; NaN does not."""
    low, high = _LOW[concept], _HIGH[concept]
    inside = (value >= low) & (value <= high)
    return inside & ~(_LOW_OPEN[concept] & (value == low)) & ~(_HIGH_OPEN[concept] & (value == high))


def clipped(concept: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The values (N,) moved to the nearest limit of their concept."""
    return np.clip(value, _LOW[concept], _HIGH[concept])


def limits(*names: str) -> pl.LazyFrame:
    """``concept, low, high`` of some concepts, to join records with."""
    rows = [(name, BY_NAME[name].low, BY_NAME[name].high) for name in names]
    return pl.LazyFrame(rows, schema={"concept": CONCEPT, "low": pl.Float64(), "high": pl.Float64()}, orient="row")


def spelled(unit: str) -> str:
    """A charted unit without case and blanks, as units.csv lists it."""
    return "".join(unit.lower().split())


@cache
def _factors() -> dict[tuple[str, str], tuple[float, float]]:
    """(concept, charted unit) -> (factor, offset)."""
    factors: dict[tuple[str, str], tuple[float, float]] = {}
    for row in words("units").iter_rows(named=True):
        of_unit = [c.name for c in CONCEPTS if c.unit == (row["unit"] or "")]
        if not of_unit or (row["concept"] is not None and row["concept"] not in of_unit):
            raise ValueError(
                f"units.csv: {row}: expected a concept with its own unit, or none and a unit of some concept"
            )
        for name in [row["concept"]] if row["concept"] else of_unit:
            key = (name, row["charted"])
            if key in factors or row["charted"] != spelled(row["charted"]):
                raise ValueError(f"units.csv: {key} stands more than once, or is not in lower case without blanks")
            factors[key] = float(row["factor"]), float(row["offset"])
    return factors


def conversion(concept: str, charted: str | None) -> tuple[float | None, float | None]:
    """Factor and offset that turn a value in ``charted`` into the concept's own unit; (None, None) where units.csv has
    no rule.

    >>> conversion("fio2", "fraction")
    (100.0, 0.0)
    >>> conversion("sodium", "cups")
    (None, None)
    """
    unit = spelled(charted or "")
    if not unit or unit == spelled(BY_NAME[concept].unit):
        return 1.0, 0.0
    return _factors().get((concept, unit), (None, None))


def concept_of(name: str, *columns: str, **chosen: str) -> pl.DataFrame:
    """Rows of a mapping table ("mimiciv", "eicu", "physionet") with these columns and the type ``CONCEPT`` for
    concepts.

    Args:
        name: the table.
        columns: what to keep beside ``concept``.
        chosen: value that a column must have, such as ``table="lab"``; rows without a concept are left out.
    """
    table = mapping(name).filter(pl.col("concept").is_not_null(), *(pl.col(c) == value for c, value in chosen.items()))
    return table.select(*columns, pl.col("concept").cast(CONCEPT))


@cache
def mapping(name: str) -> pl.DataFrame:
    """A checked mapping table: every concept is known, no item stands twice."""
    table = words(name)
    unknown = set(table["concept"].drop_nulls()) - set(NAMES)
    if unknown:
        raise ValueError(f"{name}.csv: {', '.join(sorted(unknown))} is no concept of concepts.csv")
    repeated = table.filter(pl.struct(SHARED[name]).is_duplicated())
    if len(repeated):
        raise ValueError(f"{name}.csv: {repeated.select(SHARED[name]).row(0)} stands more than once")
    if "itemid" in table.columns:
        table = table.with_columns(pl.col("itemid").cast(pl.Int64))
    return table


def care_unit(hospital: str, charted: pl.Expr, whole: bool = True) -> pl.Expr:
    """The kind of an intensive care unit ("other" where it is not listed) from its name, or from the first part of it
    that is listed."""
    kind = pl.lit("other")
    for row in reversed(words("care_units").filter(pl.col("hospital") == hospital).rows(named=True)):
        named = charted == row["charted"] if whole else charted.str.contains(row["charted"], literal=True)
        kind = pl.when(named).then(pl.lit(row["unit"])).otherwise(kind)
    return kind


def digest(folder: Path, pattern: str) -> str:
    """A hash of the names and bytes of some files."""
    content = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob(pattern)):
        content.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()
