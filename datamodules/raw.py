"""Opens a publisher's raw tables: the one place that knows how files write null, time, whole number and text.

Read as the same table, whatever program exported it: ``.csv.gz``, ``.csv`` or ``.parquet`` (a file or a folder of
parts), names of files and columns in any case, any order and number of columns, a byte order mark, Windows line ends,
every field in quotes.

========  ============================================================================================================
null      nothing, ``""``, NA, N/A, NULL, null, \\N, NaN, nan, NaT; in columns of numbers and times also None and "."
time      ``2121-01-01 10:00:00``; with T or /, without seconds, with fractions of a second (dropped) or without a time
of
          day (midnight); a zone (Z, UTC, -05:00) or an aware type is dropped: times are read as the clock on the wall
whole     80023, also 80023.0, 8.0023e4 and in quotes; a fraction is refused
number    1.5, 1e1, " 1.5 ", 1,000.5 (commas only between thousands)
text      UTF-8; bytes that are not UTF-8 become one unreadable character each, which units.csv knows in "°F"
========  ============================================================================================================

Refused, with file, column, what was expected and what was found: anything else in such a column, a missing column, a
file that is empty, cut off or in UTF-16.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

import polars as pl

SUFFIXES = (".csv.gz", ".csv", ".parquet")
TYPES: dict[str, pl.DataType] = {
    "int": pl.Int64(),
    "float": pl.Float64(),
    "str": pl.String(),
    "time": pl.Datetime("us"),
}
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "time": "a time as YYYY-MM-DD hh:mm:ss",
}
NULL = ("", "NA", "N/A", "NULL", "null", "\\N", "NaN", "nan", "NaT")
NULL_NUMBER = (*NULL, "None", ".")
SECONDS = "%Y-%m-%d %H:%M:%S"
CLOCK = (
    r"^(?P<y>\d{4})[-/](?P<m>\d{1,2})[-/](?P<d>\d{1,2})"
    r"(?:(?:T| +)(?P<H>\d{1,2}):(?P<M>\d{2})(?::(?P<S>\d{2})(?:[.,]\d+)?)?)?"
    r"\s*(?:Z|[A-Z]{3,4}|[A-Za-z_]+/[A-Za-z_]+|[+-]\d{2}:?(?:\d{2})?)?$"
)
THOUSANDS = r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$"
T = TypeVar("T")
_careful: set[Path] = set()  # files in which something was met that the plain and fast way of reading refuses


def find(root: Path, table: str) -> Path | None:
    """The file of ``table`` (such as ``"icu/chartevents"``) under ``root`` in any case and format, or None."""
    folder = root
    *parents, name = table.split("/")
    for part in parents:
        folder = next((p for p in _children(folder) if p.is_dir() and p.name.lower() == part.lower()), folder)
    wanted = [name.lower() + suffix for suffix in SUFFIXES]
    candidates = [p for p in _children(folder) if p.name.lower() in wanted]
    return min(candidates, key=lambda p: wanted.index(p.name.lower()), default=None)


def columns(root: Path, table: str) -> list[str]:
    """The column names of ``table`` in lower case; empty where the table is not there."""
    path = find(root, table)
    return [name.strip().lower() for name in _header(path)] if path else []


def scan(
    root: Path,
    table: str,
    columns: dict[str, str],
    optional: dict[str, str] | None = None,
    only: tuple[str, Iterable[int]] | None = None,
) -> pl.LazyFrame:
    """Open one raw table lazily.

    Args:
        root: folder with the publisher's files.
        table: path of the table below ``root`` without suffix, such as ``"hosp/labevents"``.
        columns: the columns that are read -> "int", "float", "str" or "time".
        optional: further ones, all null where the file does not have them.
        only: a column of ``columns`` and the whole numbers in it whose rows are kept; the others are not parsed at all.

    Returns:
        A lazy frame with exactly these columns, in lower case. ``attempt`` runs it.

    Raises:
        FileNotFoundError: no file of that name is there.
        ValueError: the file is empty, cut off, or lacks a column.
    """
    path = find(root, table)
    if path is None:
        raise FileNotFoundError(
            f"no table {table} in {root}: expected {root / table}.csv.gz (or .csv, .parquet); "
            f"set --data.root to the folder that holds it"
        )
    header = _header(path)
    actual = {name.strip().lower(): name for name in header}
    missing = [c for c in columns if c not in actual]
    if missing:
        raise ValueError(
            f"{path}: column {', '.join(missing)} is missing; expected {', '.join(columns)}, found {', '.join(header)}"
        )
    present = columns | {c: kind for c, kind in (optional or {}).items() if c in actual}
    if _is_parquet(path):
        table_of_strings = pl.scan_parquet(path)
        kinds = table_of_strings.collect_schema()
    else:
        encoding: Literal["utf8", "utf8-lossy"] = "utf8-lossy" if path in _careful else "utf8"
        table_of_strings = pl.scan_csv(path, infer_schema=False, encoding=encoding)
        kinds = pl.Schema(dict.fromkeys(header, pl.String()))
    for c, kind in present.items():
        _check_type(path, c, kinds[actual[c]], kind)
    if only is not None:
        column, numbers = only
        written = pl.col(actual[column])
        if kinds[actual[column]] == pl.String and path not in _careful:
            code = written.cast(pl.Int64, strict=False)
            other = code.is_null() & written.is_not_null()  # another spelling: parsing it ends in the careful way
            kept = code.is_in(list(numbers)) | other
        else:
            kept = _parsed(actual[column], column, kinds[actual[column]], "int", True).is_in(list(numbers))
        table_of_strings = table_of_strings.filter(kept)
    parsed = [_parsed(actual[c], c, kinds[actual[c]], kind, path in _careful) for c, kind in present.items()]
    absent = [pl.lit(None, TYPES[kind]).alias(c) for c, kind in (optional or {}).items() if c not in actual]
    return table_of_strings.select(*parsed, *absent)


def read(root: Path, table: str, columns: dict[str, str], optional: dict[str, str] | None = None) -> pl.DataFrame:
    """A small table at once; arguments and errors of ``scan`` and ``attempt``."""
    return attempt(root, table, lambda: scan(root, table, columns, optional).collect())


def attempt(root: Path, table: str, run: Callable[[], T]) -> T:
    """Run what reads ``table``; what polars says becomes one error that names the file and what to do.

    Args:
        root: folder with the publisher's files.
        table: the table that is read.
        run: opens the table with ``scan`` and reads it; called once more where the file is not written in the plain
            way.
    """
    path = find(root, table) or root / table
    try:
        return run()
    except (pl.exceptions.PolarsError, ValueError, OSError) as error:
        message = " ".join(str(error).split("\n\n")[0].split())
        if "os error" in message or isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
            raise  # disk full, no permission: not the table's fault
        if any(word in message for word in ("unexpected end of file", "corrupt", "deflate", "out of specification")):
            raise ValueError(f"{path}: the file is cut off or damaged ({message}); download it again") from error
        if isinstance(error, pl.exceptions.PolarsError) and path not in _careful:
            _careful.add(path)
            return attempt(root, table, run)
        if message.startswith("column "):  # of ``_repaired``
            raise ValueError(f"{path}: {message}; repair the row or download the file again") from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{path}: the table cannot be read: {message}; repair it or download the file again"
        ) from error


def parquet(path: Path, needed: Iterable[str]) -> tuple[pl.LazyFrame, pl.Schema]:
    """A parquet file whose columns have types already, and these.

    Raises:
        ValueError: the file is damaged, or lacks a column.
    """
    try:
        frame = pl.scan_parquet(path, hive_partitioning=False)
        schema = frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: the file is cut off or damaged ({error}); write it again") from error
    missing = [c for c in needed if c not in schema]
    if missing:
        raise ValueError(
            f"{path}: column {', '.join(missing)} is missing; expected {', '.join(needed)}, found {', '.join(schema)}"
        )
    return frame, schema


def number(text: pl.Expr) -> pl.Expr:
    """Free text -> number, null where it holds none: ``"16"``, ``" 1,000 "``, ``"50 %"``, ``".4"``."""
    bare = text.str.replace("%", "", literal=True).str.strip_chars()
    plain = pl.when(bare.str.contains(THOUSANDS)).then(bare.str.replace_all(",", "", literal=True)).otherwise(bare)
    value = plain.cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def censored(text: pl.Expr) -> pl.Expr:
    """The number of a laboratory's text, a limit such as ``">16.00"`` or ``"<0.2"`` taken for the value itself."""
    return number(text.str.strip_chars().str.replace(r"(?i)^(>=|<=|>|<|greater than|less than)\s*", ""))


def _check_type(path: Path, name: str, stored: pl.DataType, kind: str) -> None:
    """Refuse a parquet column whose type can only be cast into what it does not mean, as a number into a time."""
    text = isinstance(stored, pl.String | pl.Categorical | pl.Enum | pl.Null)
    suits = isinstance(stored, pl.Datetime | pl.Date) if kind == "time" else stored.is_numeric() or stored == pl.Boolean
    if kind != "str" and not text and not suits:
        raise ValueError(
            f"{path}: column {name}: expected {EXPECTED[kind]}, found the type {stored}; "
            f"convert the column or download the file again"
        )


def _parsed(actual: str, name: str, stored: pl.DataType, kind: str, careful: bool) -> pl.Expr:
    """Column ``actual`` of type ``stored`` as ``kind``, under its lower-case name.

    The plain way runs inside polars and fails at the first text in another spelling; ``attempt`` then comes back for
    the careful way.
    """
    column = pl.col(actual)
    if isinstance(stored, pl.Categorical | pl.Enum):
        column, stored = column.cast(pl.String), pl.String()
    if kind == "str":
        if stored == pl.String:
            return pl.when(~column.is_in(NULL)).then(column).alias(name)
        return column.cast(pl.String).alias(name)
    if stored != pl.String:
        if isinstance(stored, pl.Datetime) and stored.time_zone:
            column = column.dt.replace_time_zone(None)
        if stored.is_float():
            column = column.fill_nan(None)
        if kind == "int" and (stored.is_float() or stored.is_decimal()):
            return column.map_batches(lambda s: _whole_of(s, name), TYPES[kind], is_elementwise=True).alias(name)
        return column.cast(TYPES[kind]).alias(name)
    if not careful:
        if kind == "time":
            return column.str.to_datetime(SECONDS, time_unit="us").alias(name)
        return (
            column.cast(TYPES[kind]).alias(name)
            if kind == "int"
            else column.cast(TYPES[kind]).fill_nan(None).alias(name)
        )
    parse = {"int": _whole, "float": _number, "time": _time}[kind]
    return column.map_batches(lambda s: parse(s, name), TYPES[kind], is_elementwise=True).alias(name)


def _repaired(
    text: pl.Series, fast: pl.Series, repair: Callable[[pl.Expr], pl.Expr], name: str, expected: str
) -> pl.Series:
    """``fast`` with the rows that it could not read in another spelling; what is neither null nor readable is an
    error."""
    unread = text.is_not_null() & fast.is_null()
    if not unread.any():
        return fast
    odd = pl.DataFrame({"row": unread.arg_true(), "text": text.filter(unread).str.strip_chars()})
    odd = odd.filter(~pl.col("text").is_in(NULL_NUMBER)).with_columns(value=repair(pl.col("text")))
    wrong = odd.filter(pl.col("value").is_null())
    if len(wrong):
        raise ValueError(f"column {name}: expected {expected}, found {wrong['text'][0]!r}")
    return fast.scatter(odd["row"], odd["value"]) if len(odd) else fast


def _whole(text: pl.Series, name: str) -> pl.Series:
    def repair(odd: pl.Expr) -> pl.Expr:
        value = odd.cast(pl.Float64, strict=False)
        return pl.when(value.round() == value).then(value).cast(pl.Int64, strict=False)

    return _repaired(text, text.cast(pl.Int64, strict=False), repair, name, EXPECTED["int"])


def _whole_of(number: pl.Series, name: str) -> pl.Series:
    """Whole numbers that a parquet file holds in another type, as pandas writes a column with gaps."""
    whole = number.cast(pl.Int64, strict=False)
    wrong = number.filter((whole.is_null() | (whole.cast(number.dtype) != number)) & number.is_not_null())
    if len(wrong):
        raise ValueError(f"column {name}: expected {EXPECTED['int']}, found {wrong[0]}")
    return whole


def _number(text: pl.Series, name: str) -> pl.Series:
    fast = text.cast(pl.Float64, strict=False)
    read = _repaired(text, fast, lambda odd: number(pl.when(~odd.str.contains("%")).then(odd)), name, EXPECTED["float"])
    return read.fill_nan(None)


def _time(text: pl.Series, name: str) -> pl.Series:
    def repair(odd: pl.Expr) -> pl.Expr:
        parts = odd.str.extract_groups(CLOCK).struct
        date = pl.concat_str(*(parts.field(p).str.zfill(2) for p in "ymd"), separator="-")
        clock = pl.concat_str(*(parts.field(p).fill_null("00").str.zfill(2) for p in "HMS"), separator=":")
        return pl.concat_str(date, clock, separator=" ").str.to_datetime(SECONDS, time_unit="us", strict=False)

    fast = text.str.to_datetime(SECONDS, time_unit="us", strict=False)
    return _repaired(text, fast, repair, name, EXPECTED["time"])


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _header(path: Path) -> list[str]:
    if _is_parquet(path):
        try:
            return pl.scan_parquet(path).collect_schema().names()
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{path}: the file is cut off or damaged ({error}); download it again") from error
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            line = file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the file is cut off or damaged ({error}); download it again") from error
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: expected UTF-8, found UTF-16; save it as UTF-8")
    first = line.decode("utf-8-sig", "replace")
    if not first.strip():
        raise ValueError(f"{path}: the file is empty, expected a header line; download it again")
    return next(csv.reader([first]))


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"
