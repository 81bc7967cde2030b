"""The store: what is counted and converted, that it is the same however it was built, and that no half of one is ever seen."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from toy import Toy, events

from datamodules import build as building
from datamodules import dictionary, schema, store
from datamodules.cohort import Cohort
from datamodules.dictionary import CONCEPT, NAMES, RATES
from datamodules.hospitals import EICU, MIMICIV
from datamodules.store import Store
from experiments.prepare import _export

ROOT = Path(__file__).parents[2]
COUNTS = [
    "rows",
    "events",
    "stays",
    "duplicate",
    "unmapped_unit",
    "not_a_number",
    "out_of_range",
    "withdrawn",
    "clipped",
]


def stays(count: int = 3, **columns: list) -> pl.DataFrame:
    return pl.DataFrame(
        {"stay_id": [10 * (i + 1) for i in range(count)], "patient_id": [f"p{i}" for i in range(count)], **columns}
    )


def build(folder: Path, table: pl.DataFrame, **parts: pl.LazyFrame) -> Store:
    return building.build(Toy(folder.parent, table, dict(parts)), folder)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a store."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(opened: Store) -> list[tuple]:
    return [row[:2] + row[3:] for row in known_rows(opened)]


def known_rows(opened: Store) -> list[tuple]:
    """``stay_id, minute, known_minute, concept, value`` of every event."""
    index = np.repeat(opened.stays["stay_id"].to_numpy(), np.diff(opened.offsets))
    names = [NAMES[c] for c in opened.concept]
    columns = (index.tolist(), opened.minute.tolist(), opened.known.tolist(), names, opened.value.round(4).tolist())
    return list(zip(*columns, strict=True))


def counted(opened: Store) -> dict[str, tuple]:
    """Per concept, ``COUNTS``."""
    return {row["concept"]: tuple(row[c] for c in COUNTS) for row in opened.coverage().iter_rows(named=True)}


def test_counts_conversions_and_order(tmp_path: Path) -> None:
    one = events(
        [
            (30, 5, "heart_rate", 80.0),
            (30, 5, "heart_rate", 80.0),  # the same once more
            (30, 5, "heart_rate", 81.0, "bpm"),  # another value at that minute is another event
            (30, -7, "heart_rate", 60.0, " /MIN"),
            (10, 1, "temperature", 98.6, "°F"),
            (10, 1, "temperature", 37.5, "° C"),
            (10, 1, "temperature", 310.0, "kelvin"),  # unmapped
            (10, 2, "temperature", None),
            (10, 2, "temperature", float("nan")),
            (10, 2, "temperature", float("inf")),
            (10, 2, "temperature", 9.9),  # out of range
            (10, 2, "temperature", 50.0),  # the limit, which is not in the range
            (10, 2, "temperature", 49.5, ""),
            (99, 2, "temperature", 37.0),  # no such stay
        ]
    )
    two = events(
        [
            (10, 0, "fio2", 0.4),
            (10, 1, "fio2", 0.4, "fraction"),
            (10, 2, "fio2", 40.0, "%"),
            (10, 0, "lactate", 18.016, "mg/dL"),
            (10, 3, "lactate", 2.0, None, None, "withdrawn"),  # for a reason that the hospital knows
            (10, 3, "lactate", None, None, None, "duplicate"),
        ]
    )
    opened = build(tmp_path / "s", stays(3, height=[250.0, None, 400.0], weight=[None, None, 70.0]), one=one, two=two)
    found = [
        (10, 0, "lactate", 2.0),
        (10, 0, "height", 250.0),  # the limit, which is in the range
        (10, 0, "fio2", 40.0),
        (10, 1, "temperature", 37.0),
        (10, 1, "temperature", 37.5),
        (10, 1, "fio2", 40.0),
        (10, 2, "temperature", 49.5),
        (10, 2, "fio2", 40.0),
        (30, -7, "heart_rate", 60.0),
        (30, 0, "weight", 70.0),
        (30, 5, "heart_rate", 80.0),
        (30, 5, "heart_rate", 81.0),
    ]
    assert rows(opened) == sorted(found, key=lambda row: (*row[:2], NAMES.index(row[2]), row[3]))
    assert opened.known.tolist() == opened.minute.tolist()
    assert opened.offsets.tolist() == [0, 8, 8, 12]
    assert counted(opened) == {
        "heart_rate": (4, 3, 1, 1, 0, 0, 0, 0, 0),
        "temperature": (9, 3, 1, 0, 1, 3, 2, 0, 0),
        "lactate": (3, 1, 1, 1, 0, 0, 0, 1, 0),
        "height": (2, 1, 1, 0, 0, 0, 1, 0, 0),
        "weight": (1, 1, 1, 0, 0, 0, 0, 0, 0),
        "fio2": (3, 3, 1, 0, 0, 0, 0, 0, 0),
    }
    assert set(opened.coverage()["stays_percent"]) == {33.3}
    units = {(row["concept"], row["unit"]): row["factor"] for row in opened.units().iter_rows(named=True)}
    assert units["temperature", "kelvin"] is None
    assert units["temperature", "°F"] == pytest.approx(5 / 9)
    assert units["heart_rate", " /MIN"] == 1


def test_an_event_is_known_when_it_was_and_never_before_it_happened(tmp_path: Path) -> None:
    charted = [
        (10, 5, "heart_rate", 80.0, None, 3),  # entered, by a clock that was wrong, before it was measured
        (10, 6, "heart_rate", 80.0, None, 60),
        (10, 7, "heart_rate", 80.0, None, 90),
        (10, 7, "heart_rate", 80.0, None, 70),  # the same, known earlier
        (10, 7, "heart_rate", 81.0, None, 50),
        (10, 8, "norepinephrine", 0.5, None, 30),  # a rate counts from when it is known
    ]
    found = known_rows(build(tmp_path / "s", stays(1), one=events(charted)))
    assert [row[1:] for row in found if row[3] in ("heart_rate", "norepinephrine")] == [
        (5, 5, "heart_rate", 80.0),
        (6, 60, "heart_rate", 80.0),
        (7, 70, "heart_rate", 80.0),
        (7, 50, "heart_rate", 81.0),
        (30, 30, "norepinephrine", 0.5),
    ]


def test_volumes_that_were_entered_at_different_times_are_two(tmp_path: Path) -> None:
    charted = [
        (10, 60, "urine", 50.0, None, 60),
        (10, 60, "urine", 50.0, None, 60),  # once more
        (10, 60, "urine", 50.0, None, 90),  # another bag
        (10, 60, "heart_rate", 50.0, None, 60),
        (10, 60, "heart_rate", 50.0, None, 90),  # what is no volume is the same
    ]
    opened = build(tmp_path / "s", stays(1), one=events(charted))
    assert [row[1:] for row in known_rows(opened)] == [
        (60, 60, "heart_rate", 50.0), (60, 60, "urine", 50.0), (60, 90, "urine", 50.0)
    ]  # fmt: skip
    assert counted(opened)["urine"][:4] == (3, 2, 1, 1)
    assert counted(opened)["heart_rate"][:4] == (2, 1, 1, 1)


def test_a_rate_out_of_range_is_moved_to_the_limit(tmp_path: Path) -> None:
    """Dropping the step would leave the one before it in force."""
    high = dictionary.BY_NAME["norepinephrine"].high
    charted = [(10, 0, "norepinephrine", 2 * high), (10, 60, "norepinephrine", -1.0), (10, 90, "norepinephrine", None)]
    opened = build(tmp_path / "s", stays(1), one=events([*charted, (10, 0, "heart_rate", 900.0)]))
    assert [row for row in rows(opened) if row[2] == "norepinephrine"] == [
        (10, 0, "norepinephrine", high), (10, 60, "norepinephrine", 0.0)
    ]  # fmt: skip
    assert counted(opened)["norepinephrine"] == (3, 2, 1, 0, 0, 1, 0, 0, 2)
    assert counted(opened)["heart_rate"] == (1, 0, 0, 0, 0, 0, 1, 0, 0)


def test_what_is_derived_does_not_count_a_duplicate_twice(tmp_path: Path) -> None:
    charted = [
        (10, 0, "urine", 100.0),
        (10, 120, "urine", 280.0),
        (10, 120, "urine", 280.0, "mL"),  # the same once more
        (10, 5, "norepinephrine", 0.1),
        (10, 5, "vasopressin", 2.4),
        (10, 240, "norepinephrine", 0.05),
        (10, 240, "norepinephrine", 0.05),
    ]
    opened = build(tmp_path / "s", stays(1, weight=[70.0]), one=events(charted))
    found = {(minute, concept): value for _, minute, concept, value in rows(opened)}
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
        build(tmp_path / "s", table, one=events([(10, 0, "heart_rate", 80.0)]))
    assert not list(tmp_path.glob("s*/"))


def test_no_event_at_all_is_refused(tmp_path: Path) -> None:
    for table in (
        events([]),
        events([(99, 0, "heart_rate", 80.0)]),
        events([(10, 0, "heart_rate", -80.0)]),
        events([(10, 0, "heart_rate", 80.0, None, None, "withdrawn")]),
    ):
        with pytest.raises(ValueError, match="no event found in any stay"):
            build(tmp_path / "s", stays(), one=table)
        assert not list(tmp_path.glob("s*/"))


def random_events(seed: int, count: int = 4000, of: int = 25) -> pl.LazyFrame:
    """Some of them known later than they happened, and some only after the record has ended."""
    rng = np.random.default_rng(seed)
    names = np.array(["heart_rate", "urine", "norepinephrine", "lactate", "vasopressin"])
    minute = rng.integers(-90, 4000, count).astype(np.int32)
    late = np.where(rng.random(count) < 0.3, rng.integers(0, 600, count), 0).astype(np.int32)
    return pl.LazyFrame(
        {
            "stay_id": 10 * rng.integers(1, of + 1, count),
            "minute": minute,
            "known_minute": minute + late,
            "concept": pl.Series(names[rng.integers(0, len(names), count)], dtype=CONCEPT),
            "value": rng.uniform(0, 5, count).round(2),
            "unit": pl.Series([None] * count, dtype=pl.String),
        }
    )


def test_many_buckets_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path / "whole", stays(25), one=random_events(1), two=random_events(2))
    monkeypatch.setattr(building, "BUCKET", 3)
    pieces = build(tmp_path / "pieces", stays(25), one=random_events(1), two=random_events(2))
    assert whole.buckets() == [(0, 25)]
    assert pieces.buckets() == [(i, min(i + 3, 25)) for i in range(0, 25, 3)]
    same, other = ({n: c for n, c in content(s.folder).items() if "/" not in n} for s in (whole, pieces))
    assert same.pop("buckets.parquet") != other.pop("buckets.parquet")
    assert same == other
    coverage = whole.coverage()
    assert len(whole.minute) == coverage["events"].sum()
    charted = coverage.filter(
        pl.col("concept").is_in(["heart_rate", "urine", "norepinephrine", "lactate", "vasopressin"])
    )
    assert charted["rows"].sum() == 8000
    assert charted["events"].sum() == 8000 - charted["duplicate"].sum() - charted["out_of_range"].sum()


def test_the_rows_of_a_bucket_stand_as_in_the_raw_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BUCKET", 4)
    table = random_events(1)
    built = [build(tmp_path / name, stays(25), one=table) for name in ("a", "b")]
    assert content(built[0].folder) == content(built[1].folder)
    for number, (start, stop) in enumerate(built[0].buckets()):
        ids = built[0].stays["stay_id"][start:stop].implode()
        kept = building.bucket_tables(built[0].folder, number)["one"].collect()
        assert kept.equals(table.filter(pl.col("stay_id").is_in(ids)).collect())


def test_buckets_hold_the_rows_of_their_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BUCKET", 4)
    table = random_events(1, of=30)
    opened = build(tmp_path / "s", stays(25), one=table, two=events([(10, 0, "heart_rate", 80.0)]))
    found = []
    for number, (start, stop) in enumerate(opened.buckets()):
        kept = building.bucket_tables(opened.folder, number)
        assert set(kept) == {"one", "two"}
        ids = set(opened.stays["stay_id"][start:stop])
        part = kept["one"].collect()
        assert set(part["stay_id"]) <= ids
        found.append(part)
        assert len(kept["two"].collect()) == (10 in ids)
    members = table.filter(pl.col("stay_id") <= 250).collect()
    order = ["stay_id", "minute", "known_minute", "concept", "value"]
    assert pl.concat(found).select(members.columns).sort(order).equals(members.sort(order))


def test_a_patients_stays_share_a_bucket_where_rows_belong_to_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BUCKET", 2)
    table = schema.check_stays(stays(7).with_columns(patient_id=pl.Series(["a", "b", "b", "b", "b", "c", "d"])))
    assert building._bucketed(table, "patient_id")["bucket"].to_list() == [0, 0, 0, 0, 0, 1, 2]
    assert building._bucketed(table, "stay_id")["bucket"].to_list() == [0, 0, 1, 1, 2, 2, 3]
    assert building._bucketed(table, "patient_id")["stay"].to_list() == list(range(7))


def test_hospitals_say_which_tables_they_fill(tmp_path: Path) -> None:
    one, two = events([(10, 0, "heart_rate", 80.0)]), events([(10, 0, "lactate", 2.0), (20, 0, "lactate", 2.0)])
    opened = build(tmp_path / "s", stays(3, hospital_id=["x", "x", "y"]), one=one, two=two)
    assert opened.hospitals().select("hospital_id", "stays", "one", "two").rows() == [
        ("x", 2, True, True),
        ("y", 1, False, False),
    ]


def test_export_equals_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = build(tmp_path / "s", stays(25), one=random_events(1))
    monkeypatch.setattr(store, "EXPORT_ROWS", 700)
    assert len(list(opened.pieces())) > 4
    (tmp_path / "out").mkdir()
    _export(opened, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["events.parquet"]
    frame = pl.read_parquet(tmp_path / "out" / "events.parquet")
    kinds = {"minute": pl.Int32, "known_minute": pl.Int32, "concept": CONCEPT, "value": pl.Float32}
    assert frame.schema == {"stay_id": pl.Int64, **kinds}
    assert frame.with_columns(pl.col("value").round(4)).rows() == [
        (*r[:4], pytest.approx(r[4], abs=1e-3)) for r in known_rows(opened)
    ]


MINUTES = np.array([-9999, -90, 0, 17, 60, 600, 2000, 3999, 4500, 9999])


def pairs(of: int = 25) -> tuple[np.ndarray, np.ndarray]:
    stay, minute = (a.ravel() for a in np.meshgrid(np.arange(of), MINUTES, indexing="ij"))
    return stay, minute


def test_at_or_after_is_a_binary_search_per_stay(tmp_path: Path) -> None:
    opened = build(tmp_path / "s", stays(25), one=random_events(3, count=600))
    stay, minute = pairs()
    expected = [
        opened.offsets[s] + np.searchsorted(opened.minute[opened.offsets[s] : opened.offsets[s + 1]], m)
        for s, m in zip(stay, minute, strict=True)
    ]
    assert opened.at_or_after(stay, minute).tolist() == expected


def test_any_known_is_what_a_loop_finds(tmp_path: Path) -> None:
    opened = build(tmp_path / "s", stays(25), one=random_events(3, count=300))
    every, rng = known_rows(opened), np.random.default_rng(4)
    total = 0
    for _ in range(20):
        end = rng.integers(-200, 4000, 25)
        start = end - 300
        expected = [
            any(row[0] == 10 * (s + 1) and start[s] <= row[1] < end[s] and row[2] < end[s] for row in every)
            for s in range(25)
        ]
        assert opened.any_known(start, end).tolist() == expected
        total += sum(expected)
    assert 20 < total < 480


def test_what_runs_is_the_last_step_before_a_minute(tmp_path: Path) -> None:
    opened = build(tmp_path / "s", stays(25), one=random_events(3, count=900))
    every, (stay, minute) = known_rows(opened), pairs()
    expected = []
    for s, m in zip(stay, minute, strict=True):
        steps = {row[3]: row[4] for row in every if row[0] == 10 * (s + 1) and row[1] < m}  # the last one holds
        expected.append([steps.get(name, 0.0) for name in RATES])
    np.testing.assert_allclose(opened.running(stay, minute), expected, atol=1e-3)
    assert (np.array(expected) > 0).mean() > 0.1


def test_a_store_without_rates_has_none_running(tmp_path: Path) -> None:
    opened = build(tmp_path / "s", stays(2), one=events([(10, 0, "heart_rate", 80.0)]))
    assert opened.running(np.array([0, 1]), np.array([60, 60])).tolist() == [[0.0] * len(RATES)] * 2
    assert opened.last_minutes().to_list() == [0, None]


# ---- builds that are broken off: each in a process of its own ------------------------------------------------------------

SCRIPT = """
import os, resource, shutil, signal, sys, time
from pathlib import Path
import polars as pl
from datamodules import build, raw
from datamodules.dictionary import CONCEPT
from datamodules.hospitals.base import Hospital
from datamodules.schema import as_events

build.BUCKET = 50
root, folder, moment, log = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
columns = {"stay_id": "int", "minute": "int", "known_minute": "int", "concept": "str", "value": "float", "unit": "str"}
calls = {}

def die(name, real, when, after=False):
    def wrapped(*args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        if after:
            real(*args, **kwargs)
        if calls[name] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return None if after else real(*args, **kwargs)
    return wrapped

class Raw(Hospital):
    name = "Raw"
    raw_tables = ("a", "b", "c")

    def stays(self):
        with log.open("a") as file:
            file.write("extracted\\n")
        return pl.DataFrame({"stay_id": range(1, 201), "patient_id": [str(i) for i in range(1, 201)], "weight": [70.0] * 200})

    def tables(self, stays):
        return {t: raw.scan(self.root, t, columns) for t in "abc"}

    def events(self, tables, stays):
        return [as_events(t.with_columns(pl.col("concept").cast(CONCEPT))) for t in tables.values()]

if moment == "first table": Path.replace = die("replace", Path.replace, 1)
if moment == "third table": Path.replace = die("replace", Path.replace, 3, after=True)
if moment == "sorting": build.distinct = die("distinct", build.distinct, 3)
if moment == "counting": build._Counts.table = die("table", build._Counts.table, 1)
if moment == "last rename": Path.replace = die("replace", Path.replace, 4)
if moment == "nobody": os.setuid(65534)
if moment.startswith("at most"): resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment[7:]),) * 2)
hospital = Raw(str(root))
print("started", flush=True)
try:
    build.build(hospital, folder)
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


@pytest.mark.parametrize("moment", ["first table", "third table", "sorting", "counting", "last rename"])
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
    (other / "rows").mkdir(parents=True)
    (other / "rows" / "one.parquet").write_bytes(b"not mine")
    opened = build(tmp_path / "S-new", stays(), one=events([(10, 0, "heart_rate", 80.0)]))
    assert rows(opened) == [(10, 0, "heart_rate", 80.0)]
    assert (other / "rows" / "one.parquet").read_bytes() == b"not mine"


def test_a_finished_part_is_not_read_twice(tmp_path: Path) -> None:
    """What a killed run has finished is used as it is: the key of the folder stands for the raw files."""
    table: Callable[[float], pl.LazyFrame] = lambda value: events([(10, 0, "heart_rate", value)])  # noqa: E731
    (tmp_path / "s.partial").mkdir()
    killed = Toy(tmp_path, stays(), {"one": table(80.0)})
    divided = building._bucketed(schema.check_stays(stays()), "stay_id")
    building._extract(killed, divided, tmp_path / "s.partial", lambda *_: None)
    assert rows(build(tmp_path / "s", stays(), one=table(90.0))) == [(10, 0, "heart_rate", 80.0)]
    assert rows(build(tmp_path / "t", stays(), one=table(90.0))) == [(10, 0, "heart_rate", 90.0)]


# ---- the key ----------------------------------------------------------------------------------------------------------------


def test_the_key_follows_the_raw_files_and_the_options(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return building.fingerprint(Toy(tmp_path, stays(), {}, **options))

    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    for path in (first, second):
        path.write_text("1")
    keys = [key(), key(labs="stored")]
    assert key() == keys[0] == key(hours=5, seed=3, min_age=70)  # what does not change the store
    second.rename(tmp_path / "c.csv")
    keys.append(key())
    (tmp_path / "c.csv").unlink()
    keys.append(key())
    first.write_text("12")
    keys.append(key())
    times = first.stat()
    os.utime(first, ns=(0, 0))
    keys.append(key())
    first.write_text("34")  # of the same size, and given the date that it had: only the time of the change tells
    os.utime(first, ns=(0, 0))
    assert first.stat().st_mtime_ns == 0 and first.stat().st_size == times.st_size
    keys.append(key())
    copied = shutil.copy2(first, tmp_path / "copy")
    Path(copied).replace(first)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_key_follows_the_dictionary_and_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = Toy(tmp_path / "raw", stays(), {})
    package = tmp_path / "datamodules"
    shutil.copytree(ROOT / "datamodules", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(building, "__file__", str(package / "build.py"))
    before = building.fingerprint(hospital)

    def changes(name: str) -> bool:
        path = package / name
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        after = building.fingerprint(hospital)
        path.write_bytes(content)
        assert building.fingerprint(hospital) == before
        return after != before

    every = {
        str(p.relative_to(package)) for p in package.rglob("*") if p.suffix in (".py", ".csv") and p.stat().st_size
    }
    after = (
        "__init__.py",
        "agreement.py",
        "cohort.py",
        "contract.py",
        "live.py",
        "module.py",
        "resident.py",
        "sampler.py",
        "scaler.py",
        "scores.py",
        "summary.py",
        "tasks.py",
        "views.py",
    )
    extracting = {name for name in every if name not in after and not name.startswith("simulate/")}
    assert {name for name in every if changes(name)} == extracting
    assert {"build.py", "raw.py", "dictionary/units.csv", "hospitals/eicu/sofa.py", "derive/sofa.py"} <= extracting


# ---- a cache that may only be read --------------------------------------------------------------------------------------------


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Nothing below ``folder`` may be written."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("system", ["mimic", "eicu"])
def test_a_finished_store_and_its_derived_tables_open_in_a_cache_that_may_only_be_read(
    system: str, request: pytest.FixtureRequest
) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    folder.chmod(0o755)
    try:
        shutil.copytree(request.getfixturevalue(system), folder / "raw")
        kind = MIMICIV if system == "mimic" else EICU
        options = {"cache": str(folder / "cache"), "sepsis": True}
        asked: list[str] = []

        def cohort() -> Cohort:
            return Cohort(kind(str(folder / "raw"), **options), lambda text, *_: asked.append(text))

        def derived(made: Cohort) -> dict[str, Path]:
            return {**made.sepsis_tables(), "vasopressors": made.infusions()}

        before, tables = cohort().samples()[0], {n: p.read_bytes() for n, p in derived(cohort()).items()}
        assert set(tables) == {"sofa", "suspicion", "sepsis3", "vasopressors"}
        assert all(p.parents[2].name.startswith(kind.name) for p in derived(cohort()).values())
        asked.clear()
        with as_nobody(folder / "cache"):
            again = cohort()
            assert again.samples()[0].equals(before)
            assert {n: p.read_bytes() for n, p in derived(again).items()} == tables
            other = Cohort(kind(str(folder / "raw"), **{**options, "hours": 7}))
            with pytest.raises(OSError, match=r"could not be written.*--data\.cache"):
                other.samples()
        assert not asked
    finally:
        shutil.rmtree(folder)
