"""Finds and opens a publisher's raw tables: .csv.gz, .csv or .parquet, any case, checked columns, clear errors."""

import csv
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

SUFFIXES = (".csv.gz", ".csv", ".parquet")
TYPES: dict[str, pl.DataType] = {
    "int": pl.Int64(),
    "float": pl.Float64(),
    "str": pl.String(),
    "time": pl.Datetime("us"),
}


def find(root: Path, table: str) -> Path | None:
    """The file of ``table`` (such as ``"icu/chartevents"``) under ``root`` in any case and format, or None."""
    folder = root
    *parents, name = table.split("/")
    for part in parents:
        folder = next((p for p in _children(folder) if p.is_dir() and p.name.lower() == part.lower()), folder)
    wanted = [name.lower() + suffix for suffix in SUFFIXES]
    found = [p for p in _children(folder) if p.name.lower() in wanted]
    return min(found, key=lambda p: wanted.index(p.name.lower()), default=None)


def columns(root: Path, table: str) -> list[str]:
    """The column names of ``table`` in lower case; empty where the table is not there."""
    path = find(root, table)
    return [name.strip().lower() for name in _header(path)] if path else []


def scan(root: Path, table: str, columns: dict[str, str]) -> pl.LazyFrame:
    """Open one raw table lazily.

    Args:
        root: folder with the publisher's files.
        table: path of the table below ``root`` without suffix, such as ``"hosp/labevents"``.
        columns: the columns that are read -> "int", "float", "str" or "time" ("YYYY-MM-DD hh:mm:ss").

    Returns:
        A lazy frame with exactly these columns, in lower case. Empty fields are null.

    Raises:
        FileNotFoundError: no file of that name is there.
        ValueError: the file is empty, cut off, or lacks a column.
    """
    path = find(root, table)
    if path is None:
        raise FileNotFoundError(
            f"no table {table} in {root}: expected {root / table}.csv.gz (or .csv, .parquet); set --data.root to the folder that holds it"
        )
    header = _header(path)
    actual = {name.strip().lower(): name for name in header}
    missing = [c for c in columns if c not in actual]
    if missing:
        raise ValueError(f"{path}: column {', '.join(missing)} is missing; expected {', '.join(columns)}, found {', '.join(header)}")
    chosen = [pl.col(actual[c]).alias(c) for c in columns]
    if _is_parquet(path):
        lazy = pl.scan_parquet(path).select(chosen)
        texts = [c for c, kind in lazy.collect_schema().items() if kind == pl.String and columns[c] == "time"]
        return _times(lazy, texts).cast({c: TYPES[kind] for c, kind in columns.items()})  # type: ignore[arg-type]
    direct = {actual[c]: TYPES[kind] for c, kind in columns.items() if kind != "time"}
    lazy = pl.scan_csv(path, schema_overrides=direct, infer_schema=False).select(chosen)
    return _times(lazy, [c for c, kind in columns.items() if kind == "time"])


def read(root: Path, table: str, columns: dict[str, str]) -> pl.DataFrame:
    """A small table at once; arguments and errors of ``scan`` and ``reading``."""
    with reading(root, table):
        return scan(root, table, columns).collect()


@contextmanager
def reading(root: Path, table: str) -> Iterator[None]:
    """Turn what polars says while ``table`` is read into one error that names the file and what to do."""
    try:
        yield
    except (pl.exceptions.ComputeError, pl.exceptions.InvalidOperationError, pl.exceptions.SchemaError, OSError) as error:
        if "os error" in str(error) or isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
            raise  # disk full, no permission: not the table's fault
        path = find(root, table) or root / table
        said = " ".join(str(error).split("\n\n")[0].split())
        if any(word in said for word in ("unexpected end of file", "corrupt", "deflate", "out of specification")):
            raise ValueError(f"{path}: the file is cut off or damaged ({said}); download it again") from error
        raise ValueError(
            f"{path}: expected numbers, and times as YYYY-MM-DD hh:mm:ss, but {said}; repair the row or download the file again"
        ) from error


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _header(path: Path) -> list[str]:
    if _is_parquet(path):
        with reading(path.parent, path.stem):
            return pl.scan_parquet(path).collect_schema().names()
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix.lower() == ".gz" else path.open(encoding="utf-8-sig") as file:
            first = file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the file is cut off or damaged ({error}); download it again") from error
    if not first.strip():
        raise ValueError(f"{path}: the file is empty, expected a header line; download it again")
    return next(csv.reader([first]))


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _times(lazy: pl.LazyFrame, texts: list[str]) -> pl.LazyFrame:
    return lazy.with_columns(pl.col(c).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us") for c in texts)
