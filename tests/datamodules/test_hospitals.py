"""One's own tables, read as they were written, and simulated hospitals, which write their files once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from datamodules.cohort import Cohort
from datamodules.dictionary import CONCEPT
from datamodules.hospitals import EICU, MIMICIV, SyntheticEICU, Tables
from datamodules.hospitals.base import Hospital
from experiments.cli import main

ROOT = Path(__file__).parents[2]
SYSTEMS: dict[str, type[Hospital]] = {"mimic": MIMICIV, "eicu": EICU}


# ---- one's own tables --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SYSTEMS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type[Hospital], str, str]:
    """A hospital system, its folder, and the folder of the tables that `ehr prepare` writes of it."""
    root, kind = request.getfixturevalue(request.param), SYSTEMS[request.param]
    out = tmp_path_factory.mktemp("tables")
    main(f"prepare --data {kind.__name__} --data.root {root} --out {out}".split())
    return kind, str(root), str(out)


def test_what_prepare_writes_is_read_again(both: tuple[type[Hospital], str, str]) -> None:
    kind, root, out = both
    first, again = Cohort(kind(root)), Cohort(Tables(out))  # type: ignore[call-arg]
    count = len(first.store.stays)
    assert again.store.frame(0, count).equals(first.store.frame(0, count))
    assert again.store.stays.drop("sepsis_minute").equals(first.store.stays.drop("sepsis_minute"))
    np.testing.assert_array_equal(again.store.offsets, first.store.offsets)
    every, minute = np.arange(count), np.full(count, 600)
    np.testing.assert_array_equal(again.store.running(every, minute), first.store.running(every, minute))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "mortality_24h", "rolling": True, "hours": 6, "first_stay": False, "seed": 3},
        {"task": "sepsis_onset", "hours": 4},
    ],
    ids=["mortality", "every hour", "sepsis"],
)
def test_the_same_samples_splits_and_attrition_come_of_it(
    both: tuple[type[Hospital], str, str], options: dict[str, Any]
) -> None:
    kind, root, out = both
    first, again = (Cohort(made).samples() for made in (kind(root, **options), Tables(out, **options)))  # type: ignore[call-arg]
    assert again[0].equals(first[0])
    # the onset is a column of the tables, which the raw files do not have
    assert again[1].drop("labelled sepsis").equals(first[1].drop("labelled sepsis"))


def put(root: Path, stays: pl.DataFrame, events: pl.DataFrame) -> Tables:
    root.mkdir(exist_ok=True)
    stays.write_parquet(root / "stays.parquet")
    events.write_parquet(root / "events.parquet")
    return Tables(str(root), cache=str(root / "cache"))


STAYS = pl.DataFrame({"stay_id": [1, 2], "patient_id": ["a", "b"]})
EVENTS = pl.DataFrame(
    {"stay_id": [2, 1, 9], "minute": [5, -3, 0], "concept": ["heart_rate", "lactate", "lactate"], "value": [80, 2, 3]}
)


def test_the_least_that_tables_need(tmp_path: Path) -> None:
    store = Cohort(put(tmp_path, STAYS, EVENTS)).store
    assert store.frame(0, 2).rows() == [(1, -3, -3, "lactate", 2.0), (2, 5, 5, "heart_rate", 80.0)]
    told = store.stays.select("stay_number", "hospital_id", "unit", "age", "hospital_death", "icu_minutes")
    assert told.rows() == [(1, "own", "other", None, None, None)] * 2


def test_units_known_minutes_and_further_columns_of_tables(tmp_path: Path) -> None:
    events = EVENTS.with_columns(
        unit=pl.Series(["bpm", "mg/dL", None]), known_minute=pl.Series([60, None, 0]), note=pl.lit("x")
    )
    events = events.with_columns(pl.col("concept").cast(CONCEPT), pl.col("minute").cast(pl.Int16))
    store = Cohort(put(tmp_path, STAYS.with_columns(ward=pl.lit("x")), events)).store
    assert store.frame(0, 2).drop("value").rows() == [(1, -3, -3, "lactate"), (2, 5, 60, "heart_rate")]
    assert store.value.tolist() == pytest.approx([2 / 9.008, 80], rel=1e-3)


def test_what_is_derived_is_made_anew(tmp_path: Path) -> None:
    rows = [(1, 0, "norepinephrine", 0.1), (1, 0, "norepinephrine_equivalent", 5.0), (1, 9, "urine_rate", 7.0)]
    events = pl.DataFrame(rows, schema=["stay_id", "minute", "concept", "value"], orient="row")
    found = Cohort(put(tmp_path, STAYS, events)).store.frame(0, 2)
    assert found.filter(pl.col("concept") == "norepinephrine_equivalent")["value"].to_list() == [pytest.approx(0.1)]
    assert not len(found.filter(pl.col("concept") == "urine_rate"))


@pytest.mark.parametrize(
    ("stays", "events", "words"),
    [
        (STAYS.drop("patient_id"), EVENTS, "stays.parquet: column patient_id is missing; expected stay_id, patient_id, found"),
        (STAYS, EVENTS.drop("minute"), "events.parquet: column minute is missing; expected stay_id, minute, concept, value, found"),
        (STAYS, EVENTS.with_columns(concept=pl.lit("haert_rate")), "events.parquet: haert_rate is no concept of dictionary/concepts.csv"),
        (STAYS, EVENTS.with_columns(minute=pl.lit("soon")), "events.parquet: column minute is String; expected Int32"),
        (STAYS.with_columns(age=pl.lit("old")), EVENTS, "stays.parquet: column age is String; expected Float32"),
        (STAYS.with_columns(stay_id=1), EVENTS, "stay_id must be unique"),
        (STAYS, EVENTS.head(0), "no event found in any stay"),
    ],
    ids=["no patient", "no minute", "unknown concept", "text as a minute", "text as an age", "a stay twice", "no event"],
)  # fmt: skip
def test_wrong_tables_are_refused(tmp_path: Path, stays: pl.DataFrame, events: pl.DataFrame, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Cohort(put(tmp_path, stays, events)).samples()
    assert words in str(caught.value)


def test_missing_and_damaged_tables_are_told(tmp_path: Path) -> None:
    hospital = put(tmp_path, STAYS, EVENTS)
    (tmp_path / "events.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"events\.parquet: .*(cut off or damaged|download|write)"):
        Cohort(hospital).samples()
    (tmp_path / "events.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no events\.parquet in .*: expected what `ehr prepare --out` writes"):
        Cohort(hospital).samples()
    (tmp_path / "stays.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no Tables tables in .*--data\.root"):
        Cohort(hospital).samples()


# ---- simulated hospitals -----------------------------------------------------------------------------------------------------

WRITE = """
import sys, time
from pathlib import Path
from datamodules import simulate
from datamodules.hospitals import SyntheticEICU

write = simulate.write
def logged(*arguments, **others):
    with Path(sys.argv[2]).open("a") as file:
        file.write("written\\n")
    time.sleep(0.3)
    write(*arguments, **others)
simulate.write = logged
print(len(SyntheticEICU(sys.argv[1], stays=20).files()))
"""


def test_two_processes_write_a_simulated_hospital_once(tmp_path: Path) -> None:
    root, log = tmp_path / "new" / "eicu", tmp_path / "log"
    command = [sys.executable, "-c", WRITE, str(root), str(log)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(counts) == 1 and int(counts.pop()) > 8
    assert log.read_text() == "written\n"
    assert sorted(p.name for p in root.parent.iterdir()) == ["eicu", "eicu.lock"]
    before = {p: p.stat().st_mtime_ns for p in root.iterdir()}
    assert set(SyntheticEICU(str(root), stays=20).files()) <= set(before)
    assert {p: p.stat().st_mtime_ns for p in root.iterdir()} == before


VERBS = """
import sys
from experiments.cli import main
main(sys.argv[1].split())
main(sys.argv[2].split())
heavy = sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "lightning", "torchmetrics"))
assert not heavy, heavy[:5]
"""


def test_synthesize_and_prepare_start_without_torch(tmp_path: Path) -> None:
    synthesize = f"synthesize --out {tmp_path / 'raw'} --system MIMICIV --stays 30"
    prepare = f"prepare --data MIMICIV --data.root {tmp_path / 'raw'} --data.cache {tmp_path / 'cache'} --out {tmp_path / 'out'}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", VERBS, synthesize, prepare], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "events.parquet").exists()
