"""Raw tables: every format and spelling opens as one table, and every damaged file gives an error that says which, why and what to do."""

import gzip
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from datamodules import raw
from datamodules.dictionary import conversion

COLUMNS = {"stay_id": "int", "value": "float", "charttime": "time", "note": "str"}
HEADER = "stay_id,value,charttime,note"
GOOD = f"{HEADER},other\n1,2.5,2110-01-02 03:04:05,a,x\n2,,,,\n"
NOON = datetime(2110, 1, 2, 3, 4, 5)
ROWS = [(1, 2.5, NOON, "a"), (2, None, None, None)]
MANY = HEADER + "\n" + "".join(f"{i},{i / 7},2110-01-02 03:04:{i % 60:02d},n{i % 13}\n" for i in range(30_000))


def collect(root: Path) -> pl.DataFrame:
    return raw.attempt(root, "icu/notes", lambda: raw.scan(root, "icu/notes", COLUMNS).collect(engine="streaming"))


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


# ---- formats and names ------------------------------------------------------------------------------------------------------


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
    assert dict(read.schema) == {c: raw.TYPES[kind] for c, kind in COLUMNS.items()}


def test_parquet_with_text_and_other_widths_of_number(tmp_path: Path) -> None:
    path = put(tmp_path, b"", "notes.parquet")
    frame = pl.read_csv(GOOD.encode(), infer_schema=False).with_columns(pl.col("stay_id").cast(pl.Int16))
    frame.write_parquet(path)
    assert collect(tmp_path).rows() == ROWS


def test_a_folder_of_parquet_parts_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "icu" / "Notes.parquet"
    folder.mkdir(parents=True)
    frame = pl.read_csv(GOOD.encode(), infer_schema=False)
    for i in range(2):
        frame[i : i + 1].write_parquet(folder / f"part-{i}.parquet")
    assert collect(tmp_path).rows() == ROWS
    assert raw.columns(tmp_path, "icu/notes") == [*COLUMNS, "other"]


def test_gzip_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    head, *lines = GOOD.splitlines(keepends=True)
    put(tmp_path, b"".join(gzip.compress(part.encode()) for part in (head, *lines)), "notes.csv.gz")
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
        "\ufeff" + GOOD.replace("stay_id,value", '"stay_id","value"').replace("\n", "\r\n"),
        f"row,{GOOD}".replace("\n1,", "\n0,1,").replace("\n2,", "\n1,2,"),
        '"other","NOTE","CharTTime","value","stay_id"\n"x","a","2110-01-02 03:04:05","2.5","1"\n"","","","","2"\n',
    ],
    ids=[
        *("byte order mark", "windows lines", "upper case", "quotes", "space after comma", "no last newline"),
        *("byte order mark, quotes and windows lines", "a further first column", "another order, all in quotes"),
    ],
)
def test_harmless_spellings_of_a_csv(tmp_path: Path, content: str) -> None:
    put(tmp_path, content.encode())
    assert collect(tmp_path).rows() == ROWS


def test_the_smallest_download_is_preferred_and_a_flat_folder_does(tmp_path: Path) -> None:
    flat = tmp_path / "notes.csv"
    flat.write_text(GOOD)
    assert raw.find(tmp_path, "icu/notes") == flat
    packed = tmp_path / "notes.csv.gz"
    packed.write_bytes(gzip.compress(GOOD.encode()))
    assert raw.find(tmp_path, "icu/notes") == packed
    assert raw.find(tmp_path, "icu/note") is None
    assert raw.columns(tmp_path, "icu/notes") == [*COLUMNS, "other"]
    assert raw.columns(tmp_path, "icu/nothing") == []


def test_a_column_that_may_be_absent_is_null(tmp_path: Path) -> None:
    put(tmp_path, GOOD.encode())
    read = raw.read(tmp_path, "icu/notes", {"stay_id": "int"}, {"storetime": "time", "note": "str", "unit": "str"})
    assert read.schema == {"stay_id": pl.Int64, "note": pl.String, "storetime": pl.Datetime("us"), "unit": pl.String}
    assert read.rows() == [(1, "a", None, None), (2, None, None, None)]


@pytest.mark.parametrize("stored", [pl.String, pl.Int32, pl.Float64])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_only_the_rows_with_some_numbers_are_parsed(tmp_path: Path, suffix: str, stored: Any) -> None:
    path = put(tmp_path, b"", f"notes.{suffix}")
    frame = pl.DataFrame({"itemid": [7, 8, 7, 9, None], "value": ["1", "no number", "2", "none either", "nor this"]})
    frame = frame.cast({"itemid": stored})
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    assert only_sevens(tmp_path).rows() == [(7, 1.0), (7, 2.0)]


def only_sevens(root: Path) -> pl.DataFrame:
    columns = {"itemid": "int", "value": "float"}
    return raw.attempt(
        root, "icu/notes", lambda: raw.scan(root, "icu/notes", columns, only=("itemid", [7, 1])).collect()
    )


@pytest.mark.parametrize("spelling", ["7", "7.0", '"7"', "7e0", " 7 ", "7.000"])
def test_a_number_is_found_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    put(tmp_path, f"itemid,value\n7,1\n8,no number\n{spelling},2\nNA,3\n,4\n".encode())
    assert only_sevens(tmp_path).rows() == [(7, 1.0), (7, 2.0)]


def test_what_is_no_number_is_not_passed_over_as_another_one(tmp_path: Path) -> None:
    path = put(tmp_path, b"itemid,value\n7,1\nabc,2\n")
    with pytest.raises(ValueError, match=f"{path}: column itemid: expected a whole number, found 'abc'"):
        only_sevens(tmp_path)


# ---- spellings of a value ----------------------------------------------------------------------------------------------------

NULLS = ["", '""', "NA", "N/A", "NULL", "null", "\\N", "NaN", "nan", "NaT"]
SPELLINGS: dict[str, list[tuple[str, Any]]] = {
    "int": [(text, None) for text in [*NULLS, "None", "."]]
    + [("80023", 80023), ('"80023"', 80023), ("80023.0", 80023), ("8.0023e4", 80023), ("8.0023E+04", 80023)]
    + [("-3", -3), (" 80023 ", 80023), ("0", 0)],
    "float": [(text, None) for text in [*NULLS, "None", "."]]
    + [("1.5", 1.5), ('"1.5"', 1.5), ("1e1", 10.0), (" 1.5 ", 1.5), ('"1,000.5"', 1000.5), ('"-12,345,678"', -12345678.0)]
    + [("-0.5", -0.5), (".5", 0.5), ("5", 5.0)],
    "time": [(text, None) for text in [*NULLS, "None", "."]]
    + [
        (text, NOON)
        for text in (
            "2110-01-02 03:04:05",
            '"2110-01-02 03:04:05"',
            "2110-01-02T03:04:05",
            "2110/01/02 03:04:05",
            "2110-1-2 3:04:05",
            "2110-01-02 03:04:05.999999",
            "2110-01-02 03:04:05.0",
            "2110-01-02T03:04:05Z",
            "2110-01-02 03:04:05 UTC",
            "2110-01-02 03:04:05-05:00",
            "2110-01-02 03:04:05+0000",
            "2110-01-02T03:04:05.123456789Z",
            "2110-01-02 03:04:05 America/New_York",
            " 2110-01-02 03:04:05 ",
        )
    ]
    + [("2110-01-02 03:04", datetime(2110, 1, 2, 3, 4)), ("2110-01-02", datetime(2110, 1, 2))],
    "str": [(text, None) for text in NULLS]
    + [("None", "None"), (".", "."), ('"a, b"', "a, b"), ("1.0", "1.0"), ('"he said ""no"""', 'he said "no"')],
}  # fmt: skip
CASES = [(kind, text, value) for kind, pairs in SPELLINGS.items() for text, value in pairs]
ORDINARY = {"int": ("4", 4), "float": ("4.25", 4.25), "time": ("2111-01-01 00:00:00", datetime(2111, 1, 1)), "str": ("b", "b")}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["csv", "gz"])
@pytest.mark.parametrize(("kind", "text", "value"), CASES, ids=[f"{kind} {text}" for kind, text, _ in CASES])
def test_spellings(tmp_path: Path, kind: str, text: str, value: Any, packed: bool) -> None:
    """Between ordinary rows, so that neither they nor the rows after them move."""
    plain, meant = ORDINARY[kind]
    content = f"x,y\n{plain},1\n{text},2\n{plain},3\n".encode()
    put(tmp_path, gzip.compress(content) if packed else content, "notes.csv.gz" if packed else "notes.csv")
    read = raw.read(tmp_path, "icu/notes", {"x": kind, "y": "int"})
    assert read.schema["x"] == raw.TYPES[kind]
    assert read.rows() == [(meant, 1), (value, 2), (meant, 3)]


@pytest.mark.parametrize(("kind", "text", "value"), CASES, ids=[f"{kind} {text}" for kind, text, _ in CASES])
def test_spellings_in_parquet_text(tmp_path: Path, kind: str, text: str, value: Any) -> None:
    path = put(tmp_path, b"", "notes.parquet")
    bare = text[1:-1].replace('""', '"') if text.startswith('"') else text
    pl.DataFrame({"x": [ORDINARY[kind][0], bare, None]}).write_parquet(path)
    assert raw.read(tmp_path, "icu/notes", {"x": kind})["x"].to_list() == [ORDINARY[kind][1], value, None]


def test_a_spelling_met_late_in_a_large_file(tmp_path: Path) -> None:
    """The plain way has read most of it by then; the whole table is read again."""
    content = MANY + '30000,"1,000.5",2110-01-02T03:04:05.5Z,z\n30001.0,NULL,2110-01-03,NA\n'
    put(tmp_path, gzip.compress(content.encode()), "notes.csv.gz")
    read = collect(tmp_path)
    assert len(read) == 30_002
    assert read[-2:].rows() == [(30_000, 1000.5, NOON, "z"), (30_001, None, datetime(2110, 1, 3), None)]
    assert read["stay_id"].to_list() == list(range(30_002))
    assert read["value"][:3].to_list() == [0.0, 1 / 7, 2 / 7]


WRONG = {
    "int": ["one", "1.5", "1,000", "80023.00001", "12a", "99999999999999999999", "2110-01-02", "inf"],
    "float": ["high", "1,00", "10,00.5", "50%", "> 5", "1.2.3", "5 mg"],
    "time": ["02/01/2110 03:04", "2110-13-02 03:04:05", "2110-02-30", "2110-01-02 25:00:00", "yesterday", "7", "2110-01-02 03"],
}  # fmt: skip
EXPECTED = {"int": "a whole number", "float": "a number", "time": "a time as YYYY-MM-DD hh:mm:ss"}


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in WRONG.items() for text in texts])
def test_a_value_of_another_type(tmp_path: Path, suffix: str, kind: str, text: str) -> None:
    content = f'y,other\n{ORDINARY[kind][0]},1\n"{text}",2\n'.encode()
    path = put(tmp_path, gzip.compress(content) if suffix == "csv.gz" else content, f"notes.{suffix}")
    if suffix == "parquet":
        pl.read_csv(content, infer_schema=False).write_parquet(path)
    with pytest.raises(ValueError) as caught:
        raw.read(tmp_path, "icu/notes", {"y": kind})
    assert str(caught.value) == (
        f"{path}: column y: expected {EXPECTED[kind]}, found {text!r}; repair the row or download the file again"
    )


# ---- types of a parquet file -------------------------------------------------------------------------------------------------

STORED: dict[str, tuple[str, pl.Series, list[Any]]] = {
    "naive times of any unit": ("time", pl.Series([NOON, None], dtype=pl.Datetime("ns")), [NOON, None]),
    "aware times": ("time", pl.Series([NOON, None]).dt.replace_time_zone("America/New_York"), [NOON, None]),
    "aware times in UTC": ("time", pl.Series([NOON, None], dtype=pl.Datetime("ms")).dt.replace_time_zone("UTC"), [NOON, None]),
    "dates": ("time", pl.Series([date(2110, 1, 2), None]), [datetime(2110, 1, 2), None]),
    "categories of text": ("str", pl.Series(["a", None], dtype=pl.Categorical), ["a", None]),
    "enum": ("str", pl.Series(["a", None], dtype=pl.Enum(["a"])), ["a", None]),
    "numbers as text": ("str", pl.Series([7, None]), ["7", None]),
    "decimals as a number": ("float", pl.Series([Decimal("1.25"), None]), [1.25, None]),
    "decimals as a whole number": ("int", pl.Series([Decimal("12"), None]), [12, None]),
    "floats as a whole number": ("int", pl.Series([80023.0, None]), [80023, None]),
    "unsigned": ("int", pl.Series([7, None], dtype=pl.UInt16), [7, None]),
    "booleans as a number": ("float", pl.Series([True, None]), [1.0, None]),
    "nothing at all": ("time", pl.Series([None, None]), [None, None]),
    "not a number": ("float", pl.Series([1.5, float("nan")]), [1.5, None]),
    "not a whole number": ("int", pl.Series([1.0, float("nan")]), [1, None]),
    "categories of numbers": ("float", pl.Series(["1,000.5", "NA"], dtype=pl.Categorical), [1000.5, None]),
    "categories of times": ("time", pl.Series(["2110-01-02T03:04:05Z", ""], dtype=pl.Categorical), [NOON, None]),
    "categories of nulls": ("str", pl.Series(["a", "NA"], dtype=pl.Categorical), ["a", None]),
}  # fmt: skip


@pytest.mark.parametrize("case", STORED)
def test_types_of_a_parquet_file(tmp_path: Path, case: str) -> None:
    kind, stored, meant = STORED[case]
    pl.DataFrame({"x": stored}).write_parquet(put(tmp_path, b"", "notes.parquet"))
    read = raw.read(tmp_path, "icu/notes", {"x": kind})
    assert read["x"].to_list() == meant
    assert read.schema["x"] == raw.TYPES[kind]


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("int", pl.Series([1.0, 1.5])),
        ("int", pl.Series([Decimal("1.50")])),
        ("time", pl.Series([1, 2])),
        ("float", pl.Series([NOON])),
        ("int", pl.Series([NOON])),
        ("int", pl.Series(["x"], dtype=pl.Categorical)),
    ],
    ids=["a fraction", "a decimal fraction", "a number as a time", "a time as a number", "a time as a whole number", "text"],
)  # fmt: skip
def test_a_parquet_column_of_another_type(tmp_path: Path, kind: str, stored: pl.Series) -> None:
    path = put(tmp_path, b"", "notes.parquet")
    pl.DataFrame({"y": stored}).write_parquet(path)
    with pytest.raises(ValueError) as caught:
        raw.read(tmp_path, "icu/notes", {"y": kind})
    said = str(caught.value)
    assert said.startswith(f"{path}: column y: expected {EXPECTED[kind]}, found ")
    assert said.endswith(" or download the file again")


# ---- encodings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["csv", "gz"])
@pytest.mark.parametrize(
    "unit", ["°F".encode(), "°F".encode("latin-1"), "°F".encode().decode("latin-1").encode()], ids=["UTF-8", "latin-1", "twice"]
)  # fmt: skip
def test_a_degree_sign_in_any_encoding_is_a_known_unit(tmp_path: Path, unit: bytes, packed: bool) -> None:
    content = GOOD.encode().replace(b",a,", b"," + unit + b",")
    put(tmp_path, gzip.compress(content) if packed else content, "notes.csv.gz" if packed else "notes.csv")
    read = collect(tmp_path)
    assert read.drop("note").rows() == [row[:3] for row in ROWS]
    assert conversion("temperature", read["note"][0]) == pytest.approx((5 / 9, -160 / 9), abs=1e-3)


def test_a_name_in_another_encoding_harms_only_itself(tmp_path: Path) -> None:
    put(tmp_path, GOOD.replace("other", "höhe").encode("latin-1"))
    assert collect(tmp_path).rows() == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True], ids=["csv", "gz"])
def test_utf_16_is_refused(tmp_path: Path, encoding: str, packed: bool) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    content = (mark + GOOD).encode(encoding)
    path = put(tmp_path, gzip.compress(content) if packed else content, "notes.csv.gz" if packed else "notes.csv")
    refused(tmp_path, path, "expected UTF-8, found UTF-16", "save it as UTF-8")


# ---- files that cannot be read ------------------------------------------------------------------------------------------------


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
    [("notes.csv", b""), ("notes.csv.gz", b""), ("notes.csv.gz", gzip.compress(b"", mtime=0)), ("notes.csv", b"\n")],
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


def test_gzip_of_several_members_cut_in_the_last(tmp_path: Path) -> None:
    both = gzip.compress(GOOD.encode()) + gzip.compress(MANY.partition("\n")[2].encode())
    path = put(tmp_path, both[:-20], "notes.csv.gz")
    refused(tmp_path, path, "cut off or damaged", "download it again")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = put(tmp_path, b"", "notes.parquet")
    refused(tmp_path, path, "cut off or damaged", "download it again")
    pl.read_csv(GOOD.encode()).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, path, "cut off or damaged", "download it again")


def test_what_is_not_the_tables_fault_passes_through(tmp_path: Path) -> None:
    put(tmp_path, GOOD.encode())
    for error in (
        OSError(28, "No space left on device"),
        pl.exceptions.ComputeError("underlying IO error: No space left on device (os error 28)"),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match="No space left"):
            raw.attempt(tmp_path, "icu/notes", fail)


# ---- text that holds a number --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number", "censored"),
    [
        ("16", 16, 16),
        (" 1,000 ", 1000, 1000),
        ("50 %", 50, 50),
        (".4", 0.4, 0.4),
        (">16.00", None, 16),
        ("<= 0.2", None, 0.2),
        ("greater than 5", None, 5),
        ("ERROR", None, None),
        ("inf", None, None),
        ("1,00", None, None),
        (None, None, None),
    ],
)
def test_numbers_in_free_text(text: str | None, number: float | None, censored: float | None) -> None:
    frame = pl.DataFrame({"text": [text]}, schema={"text": pl.String})
    assert frame.select(raw.number(pl.col("text"))).item() == number
    assert frame.select(raw.censored(pl.col("text"))).item() == censored
