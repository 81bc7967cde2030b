"""Raw tables: every format and spelling opens, and every damaged file gives an error that says which, why and what to do."""

import gzip
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from datamodules import tables

COLUMNS = {"stay_id": "int", "value": "float", "charttime": "time", "note": "str"}
HEADER = "stay_id,value,charttime,note"
GOOD = f"{HEADER},other\n1,2.5,2110-01-02 03:04:05,a,x\n2,,,,\n"
ROWS = [(1, 2.5, datetime(2110, 1, 2, 3, 4, 5), "a"), (2, None, None, None)]
MANY = HEADER + "\n" + "".join(f"{i},{i / 7},2110-01-02 03:04:{i % 60:02d},n{i % 13}\n" for i in range(30_000))


def collect(root: Path) -> pl.DataFrame:
    with tables.reading(root, "icu/notes"):
        return tables.scan(root, "icu/notes", COLUMNS).collect(engine="streaming")


def put(root: Path, content: bytes, name: str = "notes.csv", folder: str = "icu") -> Path:
    (root / folder).mkdir(exist_ok=True)
    path = root / folder / name
    path.write_bytes(content)
    return path


def refused(root: Path, path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        collect(root)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    for word in words:
        assert word in said, (word, said)


@pytest.mark.parametrize(
    "name", ["notes.csv", "Notes.CSV", "notes.csv.gz", "NOTES.CSV.GZ", "notes.parquet", "Notes.Parquet"]
)
@pytest.mark.parametrize("folder", ["icu", "ICU"])
def test_every_format_in_any_case(tmp_path: Path, name: str, folder: str) -> None:
    frame = pl.read_csv(GOOD.encode(), schema_overrides={"charttime": pl.Datetime("ms")})
    path = put(tmp_path, gzip.compress(GOOD.encode()) if name.lower().endswith("gz") else GOOD.encode(), name, folder)
    if name.lower().endswith("parquet"):
        frame.write_parquet(path)
    read = collect(tmp_path)
    assert read.rows() == ROWS
    assert dict(read.schema) == {c: tables.TYPES[kind] for c, kind in COLUMNS.items()}


def test_parquet_with_text_and_other_widths_of_number(tmp_path: Path) -> None:
    path = put(tmp_path, b"", "notes.parquet")
    frame = pl.read_csv(GOOD.encode(), infer_schema=False).with_columns(pl.col("stay_id").cast(pl.Int16))
    frame.write_parquet(path)
    assert collect(tmp_path).rows() == ROWS


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.upper().replace(",A,X", ",a,x"),
        GOOD.replace("stay_id,value", '"stay_id","value"'),
        GOOD.replace("stay_id,value", "stay_id, value"),
        GOOD.rstrip("\n"),
    ],
    ids=["byte order mark", "windows lines", "upper case", "quotes", "space after comma", "no last newline"],
)
def test_harmless_spellings_of_a_csv(tmp_path: Path, content: str) -> None:
    put(tmp_path, content.encode())
    assert collect(tmp_path).rows() == ROWS


def test_the_smallest_download_is_preferred_and_a_flat_folder_does(tmp_path: Path) -> None:
    flat = tmp_path / "notes.csv"
    flat.write_text(GOOD)
    assert tables.find(tmp_path, "icu/notes") == flat
    packed = tmp_path / "notes.csv.gz"
    packed.write_bytes(gzip.compress(GOOD.encode()))
    assert tables.find(tmp_path, "icu/notes") == packed
    assert tables.find(tmp_path, "icu/note") is None
    assert tables.columns(tmp_path, "icu/notes") == [*COLUMNS, "other"]
    assert tables.columns(tmp_path, "icu/nothing") == []


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        collect(tmp_path)
    said = str(caught.value)
    for word in ("no table icu/notes", str(tmp_path), "notes.csv.gz", ".parquet", "--data.root"):
        assert word in said


def test_missing_column(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD.replace("charttime", "chart_time").encode())
    refused(
        tmp_path,
        path,
        "column charttime is missing",
        "expected stay_id, value, charttime, note",
        "found stay_id, value, chart_time",
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.csv", b""), ("notes.csv.gz", b""), ("notes.csv.gz", gzip.compress(b"")), ("notes.csv", b"\n")],
)
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    refused(tmp_path, put(tmp_path, content, name), "empty", "expected a header line", "download it again")


def test_a_header_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    put(tmp_path, HEADER.encode() + b"\n")
    assert collect(tmp_path).shape == (0, 4)


PACKED = gzip.compress(MANY.encode())
HALF = len(PACKED) // 2


@pytest.mark.parametrize(
    "content",
    [PACKED[:12], PACKED[:HALF], PACKED[:10] + b"\xff" * 40 + PACKED[50:], PACKED[:-8] + b"\0" * 8, b"<html>"],
    ids=["cut in the header", "cut in the middle", "damaged in the header", "wrong checksum", "not gzip at all"],
)
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, put(tmp_path, content, "notes.csv.gz"), "cut off or damaged", "download it again")


def test_gzip_damaged_in_the_middle_garbles_values_first(tmp_path: Path) -> None:
    content = PACKED[:HALF] + b"\xff" * 90 + PACKED[HALF + 90 :]
    refused(tmp_path, put(tmp_path, content, "notes.csv.gz"), "download")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = put(tmp_path, b"", "notes.parquet")
    refused(tmp_path, path, "cut off or damaged", "download it again")
    pl.read_csv(GOOD.encode()).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, path, "cut off or damaged", "download it again")


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize(
    ("row", "found", "column"),
    [
        ("one,2.5,2110-01-02 03:04:05,a", "one", "stay_id"),
        ("1,high,2110-01-02 03:04:05,a", "high", "value"),
        ("1,2.5,02/01/2110 03:04,a", "02/01/2110 03:04", "charttime"),
    ],
)
def test_a_value_of_another_type(tmp_path: Path, suffix: str, row: str, found: str, column: str) -> None:
    content = f"{HEADER}\n{row}\n".encode()
    path = put(tmp_path, gzip.compress(content) if suffix == "csv.gz" else content, f"notes.{suffix}")
    if suffix == "parquet":
        pl.read_csv(content, infer_schema=False).write_parquet(path)
    refused(
        tmp_path,
        path,
        "expected numbers, and times as YYYY-MM-DD hh:mm:ss",
        found,
        f"'{column}'",
        "repair the row or download the file again",
    )


def test_another_encoding(tmp_path: Path) -> None:
    refused(tmp_path, put(tmp_path, GOOD.replace("other", "höhe").encode("latin-1")), "cut off or damaged", "utf-8")


def test_what_is_not_the_tables_fault_passes_through(tmp_path: Path) -> None:
    put(tmp_path, GOOD.encode())
    for error in (
        OSError(28, "No space left on device"),
        pl.exceptions.ComputeError("underlying IO error: No space left on device (os error 28)"),
    ):
        with pytest.raises(type(error), match="No space left"), tables.reading(tmp_path, "icu/notes"):
            raise error
