"""The store: what is counted and converted, that it is the same however it was built, and that no half of one is ever seen."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from datamodules.concepts import CONCEPT, NAMES

from datamodules import cohort, schema
from datamodules.cohort import Store

ROOT = Path(__file__).parents[1]


def stays(count: int = 3, **columns: list) -> pl.DataFrame:
    return pl.DataFrame(
        {"stay_id": [10 * (i + 1) for i in range(count)], "patient_id": [f"p{i}" for i in range(count)], **columns}
    )


def events(rows: list[tuple]) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema=schema.RAW_EVENTS, orient="row")


def build(folder: Path, table: pl.DataFrame, **parts: pl.LazyFrame) -> Store:
    return cohort.build(folder, lambda: table, lambda _: dict(parts), folder.parent)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def rows(store: Store) -> list[tuple]:
    index = np.repeat(store.stays["stay_id"].to_numpy(), np.diff(store.offsets))
    names = [NAMES[c] for c in store.concept]
    return list(zip(index.tolist(), store.minute.tolist(), names, store.value.round(4).tolist(), strict=True))


def test_counts_conversions_and_order(tmp_path: Path) -> None:
    one = events(
        [
            (30, 5, "heart_rate", 80.0, None),
            (30, 5, "heart_rate", 80.0, None),  # the same once more
            (30, 5, "heart_rate", 81.0, "bpm"),  # another value at that minute is another event
            (30, -7, "heart_rate", 60.0, " /MIN"),
            (10, 1, "temperature", 98.6, "°F"),
            (10, 1, "temperature", 37.5, "° C"),
            (10, 1, "temperature", 310.0, "kelvin"),  # unmapped
            (10, 2, "temperature", None, None),
            (10, 2, "temperature", float("nan"), None),
            (10, 2, "temperature", float("inf"), None),
            (10, 2, "temperature", 9.9, None),  # out of range
            (10, 2, "temperature", 50.0, ""),  # the limit itself is kept
            (99, 2, "temperature", 37.0, None),  # no such stay
        ]
    )
    two = events(
        [
            (10, 0, "fio2", 0.4, None),
            (10, 1, "fio2", 0.4, "fraction"),
            (10, 2, "fio2", 40.0, "%"),
            (10, 0, "lactate", 18.016, "mg/dL"),
        ]
    )
    store = build(tmp_path / "s", stays(3, height=[170.0, None, 400.0], weight=[None, None, 70.0]), one=one, two=two)
    assert rows(store) == [
        (10, 0, "lactate", 2.0),
        (10, 0, "height", 170.0),
        (10, 0, "fio2", 40.0),
        (10, 1, "temperature", 37.0),
        (10, 1, "temperature", 37.5),
        (10, 1, "fio2", 40.0),
        (10, 2, "temperature", 50.0),
        (10, 2, "fio2", 40.0),
        (30, -7, "heart_rate", 60.0),
        (30, 0, "weight", 70.0),
        (30, 5, "heart_rate", 80.0),
        (30, 5, "heart_rate", 81.0),
    ]
    assert store.offsets.tolist() == [0, 8, 8, 12]
    told = [
        "concept",
        "rows",
        "events",
        "stays",
        "stays_percent",
        "duplicate",
        "unmapped_unit",
        "not_a_number",
        "out_of_range",
    ]
    assert store.coverage().select(told).rows() == [
        ("heart_rate", 4, 3, 1, 33.3, 1, 0, 0, 0),
        ("temperature", 8, 3, 1, 33.3, 0, 1, 3, 1),
        ("lactate", 1, 1, 1, 33.3, 0, 0, 0, 0),
        ("height", 2, 1, 1, 33.3, 0, 0, 0, 1),
        ("weight", 1, 1, 1, 33.3, 0, 0, 0, 0),
        ("fio2", 3, 3, 1, 33.3, 0, 0, 0, 0),
    ]
    units = {(row["concept"], row["unit"]): row["factor"] for row in store.units().iter_rows(named=True)}
    assert units["temperature", "kelvin"] is None
    assert units["temperature", "°F"] == pytest.approx(5 / 9)
    assert units["heart_rate", " /MIN"] == 1


def test_what_is_derived_does_not_count_a_duplicate_twice(tmp_path: Path) -> None:
    charted = [
        (10, 0, "urine", 100.0, None),
        (10, 120, "urine", 280.0, None),
        (10, 120, "urine", 280.0, "mL"),  # the same once more
        (10, 5, "norepinephrine", 0.1, None),
        (10, 5, "vasopressin", 2.4, None),
        (10, 240, "norepinephrine", 0.05, None),
        (10, 240, "norepinephrine", 0.05, None),
    ]
    store = build(tmp_path / "s", stays(1, weight=[70.0]), one=events(charted))
    found = {(minute, concept): value for _, minute, concept, value in rows(store)}
    load, change = "norepinephrine_equivalent", "norepinephrine_equivalent_change"
    assert found[120, "urine_rate"] == pytest.approx(280 / 70 / 2, abs=1e-3)
    assert [found[5, load], found[240, load]] == pytest.approx([0.2, 0.15], abs=1e-3)
    assert [found[5, change], found[185, change], found[240, change]] == pytest.approx([0.2, 0, -0.05], abs=1e-3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (stays(0), "no ICU stay found"),
        (
            stays(2, stay_number=[1, 1]).with_columns(stay_id=pl.lit(7)),
            "stay_id must be unique, found 1 ids more than once, such as 7",
        ),
        (stays(2).with_columns(patient_id=pl.lit(None)), "2 rows have no patient_id"),
        (stays(2, colour=["red", "blue"]), "unexpected column colour"),
    ],
)
def test_a_wrong_table_of_stays_is_refused(tmp_path: Path, table: pl.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "s", table, one=events([(10, 0, "heart_rate", 80.0, None)]))
    assert not (tmp_path / "s").exists()


def test_no_event_at_all_is_refused(tmp_path: Path) -> None:
    for table in (
        events([]),
        events([(99, 0, "heart_rate", 80.0, None)]),
        events([(10, 0, "heart_rate", -80.0, None)]),
    ):
        with pytest.raises(ValueError, match="no event found in any stay"):
            build(tmp_path / "s", stays(), one=table)
        assert not list(tmp_path.glob("s*/"))


def random_events(seed: int, count: int = 4000, of: int = 25) -> pl.LazyFrame:
    rng = np.random.default_rng(seed)
    concept = pl.Series(
        np.array(["heart_rate", "urine", "norepinephrine", "lactate"])[rng.integers(0, 4, count)], dtype=CONCEPT
    )
    columns = {
        "stay_id": 10 * rng.integers(1, of + 1, count),
        "minute": rng.integers(-90, 4000, count).astype(np.int32),
    }
    return pl.LazyFrame(
        {
            **columns,
            "concept": concept,
            "value": rng.uniform(0, 5, count).round(2),
            "unit": pl.Series([None] * count, dtype=pl.String),
        }
    )


def test_many_chunks_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path / "whole", stays(25), one=random_events(1), two=random_events(2))
    monkeypatch.setattr(cohort, "CHUNK_ROWS", 700)
    counted = cohort._chunks(np.diff(whole.offsets))
    assert len(counted) > 8
    pieces = build(tmp_path / "pieces", stays(25), one=random_events(1), two=random_events(2))
    assert content(whole.folder) == content(pieces.folder)
    coverage = whole.coverage()
    assert len(whole.minute) == coverage["events"].sum()
    charted = coverage.filter(pl.col("concept").is_in(["heart_rate", "urine", "norepinephrine", "lactate"]))
    assert charted["rows"].sum() == 8000
    assert charted["events"].sum() == 8000 - charted["duplicate"].sum() - charted["out_of_range"].sum()


def test_export_equals_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(tmp_path / "s", stays(25), one=random_events(1))
    monkeypatch.setattr(cohort, "CHUNK_ROWS", 700)
    (tmp_path / "out").mkdir()
    store.export(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["events.parquet"]
    frame = pl.read_parquet(tmp_path / "out" / "events.parquet")
    assert frame.schema == {"stay_id": pl.Int64, "minute": pl.Int32, "concept": CONCEPT, "value": pl.Float32}
    assert frame.with_columns(pl.col("value").round(4)).rows() == [
        (*r[:3], pytest.approx(r[3], abs=1e-3)) for r in rows(store)
    ]


def test_first_after_is_a_binary_search_per_stay(tmp_path: Path) -> None:
    store = build(tmp_path / "s", stays(25), one=random_events(3, count=600))
    stay, minute = (
        a.ravel() for a in np.meshgrid(np.arange(25), np.array([-9999, -90, 0, 17, 2000, 3999, 9999]), indexing="ij")
    )
    expected = [
        store.offsets[s] + np.searchsorted(store.minute[store.offsets[s] : store.offsets[s + 1]], m)
        for s, m in zip(stay, minute, strict=True)
    ]
    assert store.first_after(stay, minute).tolist() == expected


def test_the_fingerprint_follows_the_raw_files_and_the_settings(tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path in files:
        path.write_text("1")
    key = cohort.fingerprint(files, tmp_path, {"sets": "a"})
    assert key == cohort.fingerprint(files[::-1], tmp_path, {"sets": "a"})
    keys = {
        key,
        cohort.fingerprint(files, tmp_path, {"sets": "b"}),
        cohort.fingerprint(files[:1], tmp_path, {"sets": "a"}),
    }
    files[0].write_text("12")
    keys.add(cohort.fingerprint(files, tmp_path, {"sets": "a"}))
    os.utime(files[0], ns=(0, 0))
    keys.add(cohort.fingerprint(files, tmp_path, {"sets": "a"}))
    files[0].rename(tmp_path / "c.csv")
    keys.add(cohort.fingerprint([tmp_path / "c.csv", files[1]], tmp_path, {"sets": "a"}))
    assert len(keys) == 6


# ---- builds that are broken off: each in a process of its own ------------------------------------------------------------

SCRIPT = """
import os, resource, shutil, signal, sys, time
from pathlib import Path
import polars as pl
from datamodules import cohort, tables

cohort.CHUNK_ROWS = 20_000
raw, folder, moment, log = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
columns = {"stay_id": "int", "minute": "int", "concept": "str", "value": "float", "unit": "str"}
calls = {"n": 0}

def die(name, real, when, after=False):
    def wrapped(*args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        if after:
            real(*args, **kwargs)
        if calls[name] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return None if after else real(*args, **kwargs)
    return wrapped

def events(stays):
    with log.open("a") as file:
        file.write("extracted\\n")
    typed = pl.col("concept").cast(cohort.CONCEPT), pl.col("minute").cast(pl.Int32)
    return {t: tables.scan(raw, t, columns).with_columns(typed) for t in "abc"}

def half(path):
    sorted(path.iterdir())[0].unlink()
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "first table": Path.replace = die("replace", Path.replace, 1)
if moment == "third table": Path.replace = die("replace", Path.replace, 3, after=True)
if moment == "sorting": cohort._once = die("once", cohort._once, 3)
if moment == "clearing": cohort.shutil.rmtree = half
if moment == "last rename": Path.replace = die("replace", Path.replace, 5)
if moment == "nobody": os.setuid(65534)
if moment.startswith("at most"): resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment[7:]),) * 2)
stays = pl.DataFrame({"stay_id": range(1, 201), "patient_id": [str(i) for i in range(1, 201)], "weight": [70.0] * 200})
print("started", flush=True)
try:
    cohort.build(folder, lambda: stays, events, raw)
except OSError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for seed, table in enumerate("abc"):
        random_events(seed, 40_000, of=200).with_columns(pl.col("stay_id") // 10).collect().write_csv(
            folder / f"{table}.csv"
        )
    return folder


def start(raw: Path, folder: Path, moment: str = "") -> subprocess.Popen:
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        SCRIPT,
        str(raw),
        str(folder),
        moment,
        str(raw / f"{folder.parent.name}.log"),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out + error


@pytest.fixture(scope="module")
def unbroken(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken") / "store"
    code, said = finish(start(raw, folder))
    assert code == 0, said
    assert sorted(p.name for p in folder.parent.iterdir()) == ["store", "store.lock"]
    return content(folder)


@pytest.mark.parametrize("moment", ["first table", "third table", "sorting", "clearing", "last rename"])
def test_a_killed_build_is_taken_up(raw: Path, tmp_path: Path, unbroken: dict[str, bytes], moment: str) -> None:
    folder = tmp_path / "store"
    code, said = finish(start(raw, folder, moment))
    assert code == -signal.SIGKILL, said
    assert not folder.exists()
    assert (tmp_path / "store.partial").is_dir()
    code, said = finish(start(raw, folder))
    assert code == 0, said
    assert content(folder) == unbroken
    assert not (tmp_path / "store.partial").exists()


def test_a_build_killed_at_any_time_is_taken_up(raw: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    for wait in (0.02, 0.06, 0.12):
        process = start(raw, folder)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(wait)
        process.kill()
        process.communicate()
        assert not folder.exists() or content(folder) == unbroken
    code, said = finish(start(raw, folder))
    assert code == 0, said
    assert content(folder) == unbroken


def test_two_processes_build_one_store(raw: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    both = [start(raw, folder), start(raw, folder)]
    for process in both:
        code, said = finish(process)
        assert code == 0, said
    assert (raw / f"{tmp_path.name}.log").read_text() == "extracted\n"  # by one of them, while the other waited
    assert content(folder) == unbroken


@pytest.mark.parametrize(
    ("limit", "cause"), [(20_000, "os error"), (350_000, "requested and")], ids=["reading", "sorting"]
)
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    raw: Path, tmp_path: Path, unbroken: dict[str, bytes], limit: int, cause: str
) -> None:
    folder = tmp_path / "store"
    code, said = finish(start(raw, folder, f"at most{limit}"))
    assert code == 3, said
    for word in (f"the store {folder} could not be written", cause, "is the disk full", "--data.cache", "run again"):
        assert word in said
    assert not folder.exists()
    code, said = finish(start(raw, folder))
    assert code == 0, said
    assert content(folder) == unbroken


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without permission")
def test_a_cache_that_is_not_yours_is_told(raw: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        Path(cache).chmod(0o755)
        code, said = finish(start(raw, Path(cache) / "mine" / "store", "nobody"))
    assert code == 3, said
    for word in ("could not be written", "Permission denied", "the folder not yours", "--data.cache"):
        assert word in said


def test_leftovers_of_other_stores_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "S-old.partial"
    (other / "parts").mkdir(parents=True)
    (other / "parts" / "one.parquet").write_bytes(b"not mine")
    store = build(tmp_path / "S-new", stays(), one=events([(10, 0, "heart_rate", 80.0, None)]))
    assert rows(store) == [(10, 0, "heart_rate", 80.0)]
    assert (other / "parts" / "one.parquet").read_bytes() == b"not mine"


def test_a_finished_part_is_not_read_twice(tmp_path: Path) -> None:
    """What a killed run has finished is used as it is: the key of the folder stands for the raw files."""
    table: Callable[[float], pl.LazyFrame] = lambda value: events([(10, 0, "heart_rate", value, None)])  # noqa: E731
    (tmp_path / "s.partial").mkdir()
    cohort._extract(tmp_path / "s.partial", schema.check_stays(stays()), {"one": table(80.0)}, tmp_path)
    assert rows(build(tmp_path / "s", stays(), one=table(90.0))) == [(10, 0, "heart_rate", 80.0)]
    assert rows(build(tmp_path / "t", stays(), one=table(90.0))) == [(10, 0, "heart_rate", 90.0)]
