"""MEDS there and back, valid by the format's own package; and datasets of others, read by a mapping alone."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from meds import CodeMetadataSchema, DataSchema, DatasetMetadataSchema, SubjectSplitSchema
from polars.testing import assert_frame_equal
from toy import Toy, events

from datamodules import EICU, MEDS, MIMICIV
from datamodules.cohort import Cohort
from datamodules.schema import STAYS, conform
from experiments import meds
from experiments.cli import main

Row = tuple[Any, ...]


def valid(root: Path) -> pl.DataFrame:
    """The rows of a dataset that the format's package accepts and that are in the order that the standard demands."""
    shards = []
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        DataSchema.validate(table)
        frame = pl.DataFrame(pl.from_arrow(table))
        assert frame.select("subject_id", "time").equals(frame.select("subject_id", "time").sort("subject_id", "time"))
        shards.append(frame)
    subjects = pl.concat([frame.select("subject_id").unique() for frame in shards])
    assert subjects["subject_id"].is_unique().all()
    codes = pq.read_table(root / "metadata" / "codes.parquet")
    CodeMetadataSchema.validate(codes)
    rows = pl.concat(shards)
    assert set(rows["code"]) <= set(codes["code"].to_pylist())
    split = pq.read_table(root / "metadata" / "subject_splits.parquet")
    SubjectSplitSchema.validate(split)
    assert set(split["subject_id"].to_pylist()) <= set(rows["subject_id"])
    about = json.loads((root / "metadata" / "dataset.json").read_text())
    DatasetMetadataSchema.validate(about)
    assert {*about["raw_source_id_columns"], *about["other_extension_columns"]} == set(rows.columns) - {
        *("subject_id", "time", "code", "numeric_value", "text_value")
    }
    return rows


# ---- there and back ----------------------------------------------------------------------------------------------------------


def there_and_back(system: str, root: Path, folder: Path) -> tuple[Path, Path]:
    one, two = folder / "A", folder / "B"
    main(f"prepare --data {system} --data.root {root} --out {one} --export meds".split())
    main(f"prepare --data MEDS --data.root {one / 'meds'} --out {two}".split())
    return one, two


@pytest.fixture(scope="module")
def exported(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tables of the simulated MIMIC-IV, and those of its MEDS dataset, which lies below the first."""
    return there_and_back("MIMICIV", mimic, tmp_path_factory.mktemp("meds"))


def test_the_simulated_cohort_comes_back_unchanged(exported: tuple[Path, Path]) -> None:
    one, two = exported
    for name in ("stays", "events"):
        assert_frame_equal(pl.read_parquet(two / f"{name}.parquet"), pl.read_parquet(one / f"{name}.parquet"))
    rows = valid(one / "meds")
    assert rows.filter(pl.col("code") == "MEDS_DEATH")["subject_id"].is_unique().all()
    assert pl.read_parquet(one / "stays.parquet")["sepsis_minute"].count() > 10
    assert pl.read_csv(two / "unread.csv").is_empty()
    assert not list(one.glob(".*"))


def test_the_demo_comes_back_unchanged(real: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = there_and_back("MIMICIV", real("mimic-iv-demo"), tmp_path)
    for name, count in (("stays", 140), ("events", 174_655)):
        made = pl.read_parquet(two / f"{name}.parquet")
        assert_frame_equal(made, pl.read_parquet(one / f"{name}.parquet"))
        assert len(made) == count
    valid(one / "meds")


def test_patients_without_a_number_and_in_any_order(eicu: Path, tmp_path: Path) -> None:
    """Ids of eICU are text, and a patient's stays stand apart: the same stays come back, those of a patient together."""
    first = Cohort(EICU(str(eicu))).store
    meds.write(tmp_path, "EICU", first.stays, pl.Series([None] * len(first.stays), dtype=pl.String), first)
    rows = valid(tmp_path / "meds")
    assert rows["subject_id"].max() == first.stays["patient_id"].n_unique()
    again = Cohort(MEDS(str(tmp_path / "meds"))).store
    assert_frame_equal(again.stays.sort("stay_id"), first.stays.sort("stay_id"))
    count, keys = len(first.stays), ["stay_id", "minute", "concept", "value"]
    assert_frame_equal(again.frame(0, count).sort(keys), first.frame(0, count).sort(keys))


def test_shards_hold_whole_subjects(exported: tuple[Path, Path], mimic: Path, tmp_path: Path, monkeypatch: Any) -> None:
    store = Cohort(MIMICIV(str(mimic))).store
    monkeypatch.setattr(meds, "SHARD", 20_000)
    meds.write(tmp_path, "x", store.stays, pl.Series(["train"] * len(store.stays)), store)
    assert len(list((tmp_path / "meds" / "data").iterdir())) > 3
    of_one = pl.read_parquet(exported[0] / "meds" / "data" / "*.parquet")
    # the onset of sepsis is the definition's, which the store does not have
    assert_frame_equal(valid(tmp_path / "meds"), of_one.filter(pl.col("code") != "STAY//sepsis_minute"))


def test_batches_are_the_same(exported: tuple[Path, Path], mimic: Path) -> None:
    options: dict[str, Any] = {"hours": 12, "batch_size": 16}
    modules = MIMICIV(str(mimic), **options), MEDS(str(exported[0] / "meds"), **options)
    batches = []
    for module in modules:
        module.setup()
        batches.append([next(iter(module.val_dataloader())), next(iter(module.test_dataloader()))])
    assert modules[0].split_hash() == modules[1].split_hash()
    for one, two in zip(*batches, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    """Nulls, three-valued outcomes, and stays of one patient that overlap: nothing is guessed from another column."""
    columns: dict[str, list[Any]] = {
        "stay_id": [2**40, 7, 8, 9],
        "patient_id": ["b", "b", "a", "00"],
        "hospital_id": ["x", "y", "x, y", "own"],
        "stay_number": [3, 5, 1, 1],
        "age": [90.0, 0.5, None, 40.0],
        "sex": [1.0, None, 0.0, 2.0],
        "height": [None, 170.25, None, None],
        "unit": ["burns", "other", "medical", "neuro"],
        "admit_minute": [-5000, 3, None, -1],
        "icu_minutes": [0, None, -4, 99],
        "first_minute": [None, 60, -60, None],
        "discharge_minute": [10_000, None, 0, 5],
        "death_minute": [600, 700, None, None],
        "hospital_death": [True, True, None, False],
        "icu_death": [False, None, None, False],
        "sepsis_minute": [None, -7, 20_000, None],
    }
    stays = conform(pl.DataFrame(columns), STAYS, "toy")
    charted = [(2**40, -300, "heart_rate", 80.0), (2**40, 5, "heart_rate", 81.0, None, 77), (9, 4, "temperature", 37.0)]
    store = Cohort(Toy(tmp_path / "toy", stays, {"charted": events(charted)})).store
    meds.write(tmp_path, "toy", stays, pl.Series(["train", "val", None, "test"]), store)
    dataset = MEDS(str(tmp_path / "meds"), cache=str(tmp_path))
    again = Cohort(dataset)
    assert_frame_equal(again.store.stays, stays)
    assert_frame_equal(again.store.frame(0, 4), store.frame(0, 4))
    assert again.splits(stays).to_list() == ["train", "train", None, "test"]  # a subject is in one part
    rows = valid(tmp_path / "meds")
    death = rows.filter(pl.col("code").is_in(["MEDS_DEATH", "STAY//death_minute"])).sort("time")
    assert death.select("code", "stay_id").rows() == [("STAY//death_minute", 2**40), ("MEDS_DEATH", 7)]
    told = rows.filter(pl.col("code") == "STAY//hospital_death").sort("subject_id", "time")["time"]
    assert told.to_list()[0] == meds.ORIGIN + timedelta(minutes=10_000)  # an outcome is no fact of admission


def test_an_old_export_is_replaced_and_a_failed_one_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    stays = conform(pl.DataFrame({"stay_id": [1], "patient_id": ["1"]}), STAYS, "toy")
    store = Cohort(Toy(tmp_path / "toy", stays, {"charted": events([(1, 5, "heart_rate", 80.0)])})).store
    split = pl.Series([None], dtype=pl.String)
    tmp_path = tmp_path / "out"
    (tmp_path / "meds").mkdir(parents=True)
    (tmp_path / "meds" / "old").write_text("")
    monkeypatch.setattr(meds, "_describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        meds.write(tmp_path, "toy", stays, split, store)
    assert [p.name for p in tmp_path.rglob("*")] == ["meds", "old"]
    monkeypatch.undo()
    meds.write(tmp_path, "toy", stays, split, store)
    assert not (tmp_path / "meds" / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["meds"]


def test_an_export_needs_a_folder(refused: Callable[[str], str]) -> None:
    assert "--export meds writes below --out: give --out FOLDER" in refused("prepare --data Tables --export meds")


# ---- datasets of others ------------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
MAPPING = DOCUMENT.read_text().split("<!-- mapping -->\n```csv\n")[1].split("```")[0]  # as a reader would copy it


def at(day: int, clock: str) -> datetime:
    hour, minute, *second = map(int, clock.split(":"))
    return datetime(2150, 3, day, hour, minute, *second)


# subject, time, code, number, text, unit
ONE: list[Row] = [
    (11, None, "GENDER//F"),
    (11, datetime(2090, 3, 2), "MEDS_BIRTH"),
    (11, at(1, "10:00"), "HOSPITAL_ADMISSION//EW EMER.//EMERGENCY ROOM"),
    (11, at(1, "11:00"), "LAB//RESULT//50912//mg/dL", 1.5, "1.5"),  # of the day before
    (11, at(1, "12:00:30"), "ICU_ADMISSION//Medical Intensive Care Unit (MICU)"),
    (11, at(1, "12:00:29"), "LAB//220045//bpm", 79.0),  # a second before: minute -1
    (11, at(1, "12:30"), "LAB//220045//bpm", 80.0),
    (11, at(1, "13:00"), "LAB//223761//°F", 98.6),
    (11, at(1, "14:00"), "LAB//223761//UNK", 37.5),
    (11, at(1, "14:01"), "LAB//223761//cups", 3.0),
    (11, at(1, "15:00"), "LAB//LACTATE", None, ">18.016"),
    (11, at(1, "16:00"), "LAB//LACTATE", None, "hemolysed"),
    (11, at(1, "16:00"), "INFUSION_START//221906", 0.1, None, "mcg/kg/min"),
    (11, at(1, "18:00"), "INFUSION_END//221906", 7.0, None, "mg"),
    (11, at(1, "19:00"), "DIAGNOSIS//ICD//10//A41.9"),
    (11, None, "LAB//220045//bpm", 71.0),  # without a time
    (11, at(3, "12:00:30"), "ICU_DISCHARGE//Medical Intensive Care Unit (MICU)"),
    (11, at(3, "12:00:31"), "LAB//220045//bpm", 90.0),  # after it
    (11, at(4, "09:00"), "HOSPITAL_DISCHARGE//HOME"),
    (11, at(8, "09:00"), "HOSPITAL_ADMISSION//URGENT//UNK"),
    (11, at(8, "09:30"), "ICU_ADMISSION//Neuro Stepdown"),
    (11, at(8, "10:30"), "LAB//220045//bpm", 60.0),
    (11, at(9, "10:00"), "ICU_DISCHARGE//Neuro Stepdown"),
    (11, at(9, "10:00"), "ICU_ADMISSION//Medical Intensive Care Unit (MICU)"),  # at once
    (11, at(9, "11:00"), "LAB//220045//bpm", 61.0),
    (11, at(10, "10:00"), "ICU_DISCHARGE//UNK"),
    (11, at(10, "10:00"), "HOSPITAL_DISCHARGE//DIED"),
    (11, at(10, "10:00"), "MEDS_DEATH"),
]
TWO: list[Row] = [
    (12, at(1, "10:00"), "LAB//220045//bpm", 99.0),  # never in the ICU
    (12, at(2, "10:00"), "HOSPITAL_DISCHARGE//HOME"),
    (13, None, "GENDER//M"),
    (13, at(1, "10:00"), "ICU_ADMISSION//Cardiac Vascular"),  # still there
    (13, at(5, "10:00"), "LAB//220045//bpm", 55.0),
]


def frame(rows: list[Row]) -> pl.DataFrame:
    columns = ("subject_id", "time", "code", "numeric_value", "text_value", "unit")
    kinds = (pl.Int64, pl.Datetime("us"), pl.String, pl.Float32, pl.String, pl.String)
    whole = [(*row, *[None] * (len(columns) - len(row))) for row in rows]
    table = pl.DataFrame(whole, schema=dict(zip(columns, kinds, strict=True)), orient="row")
    return table.sort("subject_id", "time", maintain_order=True)


def put(root: Path, *shards: pl.DataFrame, mapping: str = MAPPING) -> MEDS:
    (root / "data").mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        shard.write_parquet(root / "data" / f"{number}.parquet")
    (root / "mapping.csv").write_text(mapping)
    return MEDS(str(root), cache=str(root / "cache"))


def events_of(hospital: MEDS) -> list[Row]:
    store = Cohort(hospital).store
    rows = store.frame(0, len(store.stays)).filter(~pl.col("concept").cast(pl.String).str.contains("equivalent"))
    return [(*row[:4], pytest.approx(row[4], rel=1e-5)) for row in rows.rows()]


EVENTS = [
    (1, -61, -61, "creatinine", 1.5),
    (1, -1, -1, "heart_rate", 79.0),
    (1, 29, 29, "heart_rate", 80.0),
    (1, 59, 59, "temperature", 37.0),
    (1, 119, 119, "temperature", 37.5),
    (1, 179, 179, "lactate", 20.0),
    (1, 239, 239, "norepinephrine", 0.1),
    (1, 359, 359, "norepinephrine", 0.0),
    (2, 60, 60, "heart_rate", 60.0),
    (3, -1410, -1410, "heart_rate", 60.0),  # of the day before
    (3, 60, 60, "heart_rate", 61.0),
    (4, 5760, 5760, "heart_rate", 55.0),
]


@pytest.fixture
def foreign(tmp_path: Path) -> MEDS:
    return put(tmp_path, frame(ONE), frame(TWO))


def test_a_foreign_dataset_is_read_by_its_mapping(foreign: MEDS) -> None:
    for path in sorted((foreign.root / "data").iterdir()):
        DataSchema.validate(DataSchema.align(pq.read_table(path)))
    assert events_of(foreign) == EVENTS
    store = Cohort(foreign).store
    told = store.stays.drop("hospital_id", "height", "weight", "first_minute", "sepsis_minute")
    assert [tuple(row.values()) for row in told.iter_rows(named=True)] == [
        (1, "11", 1, 59.0, 0.0, "medical", -121, 2880, 4139, None, False, False),  # a day before the birthday
        (2, "11", 2, 60.0, 0.0, "other", -30, 1470, 2910, 2910, True, False),
        (3, "11", 3, 60.0, 0.0, "medical", -1500, 1440, 1440, 1440, True, True),
        (4, "13", 1, None, 1.0, "other", None, None, None, None, None, None),
    ]
    charted = {row["concept"]: row for row in store.coverage().iter_rows(named=True)}
    assert charted["temperature"]["unmapped_unit"] == 1 and charted["lactate"]["not_a_number"] == 1


def test_what_is_not_read_is_told(foreign: MEDS, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (foreign.root / "metadata").mkdir()
    named = pl.DataFrame({"code": ["DIAGNOSIS//ICD//10//A41.9"], "description": ["Sepsis, unspecified"]})
    named.write_parquet(foreign.root / "metadata" / "codes.parquet")
    main(f"prepare --data MEDS --data.root {foreign.root} --data.min_age 0 --out {tmp_path / 'out'}".split())
    said = capsys.readouterr().out
    assert "not in the mapping: 1 rows of DIAGNOSIS//ICD//10//A41.9 (1 rows)" in said
    assert "in no stay: 3 rows of LAB//220045//bpm (3 rows)" in said
    assert "dropped, unit not known: temperature in cups (1 rows)" in said
    assert pl.read_csv(tmp_path / "out" / "unread.csv").rows() == [
        ("LAB//220045//bpm", None, 3, "in no stay"),
        ("DIAGNOSIS//ICD//10//A41.9", "Sepsis, unspecified", 1, "not in the mapping"),
    ]


def ids(table: pl.DataFrame, kind: Any) -> pl.DataFrame:
    """``icustay_id`` as MIMIC_IV_MEDS writes it: of ICU admissions and bedside rows, not of the laboratory."""
    named = pl.col("code").str.contains("ICU_|220045")
    number = pl.when(pl.col("time") < at(9, "10:00")).then(502).otherwise(503)
    number = pl.when(pl.col("time").is_null() | (pl.col("time") < at(5, "10:00"))).then(501).otherwise(number)
    leaves = (pl.col("time") == at(9, "10:00")) & pl.col("code").str.starts_with("ICU_DIS")
    number = pl.when(pl.col("subject_id") == 13).then(504).when(leaves).then(502).otherwise(number)
    return table.with_columns(icustay_id=pl.when(named & (pl.col("subject_id") != 12)).then(number).cast(kind))


def test_rows_that_name_their_stay_belong_to_it(tmp_path: Path) -> None:
    expected = [(500 + row[0], *row[1:]) for row in EVENTS if row[1] != -1410]
    expected.insert(8, (501, 2880, 2880, "heart_rate", 90.0))  # named, though a second after discharge
    for kind in (pl.Int64, pl.Float64, pl.String):
        hospital = put(tmp_path / str(kind), ids(frame(ONE), kind), ids(frame(TWO), kind))
        assert events_of(hospital) == expected


SHAPES: dict[str, Callable[[pl.DataFrame, pl.DataFrame], list[pl.DataFrame]]] = {
    "a subject in two shards": lambda one, two: [one[:12], two, one[12:]],
    "rows in any order": lambda one, two: [two.reverse(), one.sample(fraction=1, shuffle=True, seed=1)],
    "times in other units": lambda one, two: [one.cast({"time": pl.Datetime("ns")}), two.cast({"time": pl.Datetime("ms")})],
    "times with a zone": lambda one, two: [
        t.with_columns(pl.col("time").dt.replace_time_zone("UTC")) for t in (one, two)
    ],
    "other types": lambda one, two: [
        one.cast({"code": pl.Categorical, "numeric_value": pl.Float64, "subject_id": pl.Int32}),
        two.cast({"unit": pl.Null, "text_value": pl.Null}, strict=False),
    ],
    "other columns": lambda one, two: [one.with_columns(hadm_id=1, race=pl.lit("x")).select(reversed([*one.columns, "race", "hadm_id"])),
                                       two.drop("text_value", "unit")],
    "no number": lambda one, two: [one, two[:2].drop("numeric_value"), two[2:]],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_however_the_shards_are_written(shape: str, tmp_path: Path) -> None:
    assert events_of(put(tmp_path, *SHAPES[shape](frame(ONE), frame(TWO)))) == EVENTS


def test_a_row_counts_from_when_it_was_known(tmp_path: Path) -> None:
    table = frame(ONE).with_columns(known_time=pl.when(pl.col("code") == "LAB//LACTATE").then(pl.lit(at(1, "17:00"))))
    found = {(row[1], row[3]): row[2] for row in events_of(put(tmp_path, table, frame(TWO)))}
    assert found[179, "lactate"] == 299 and found[29, "heart_rate"] == 29


def test_deaths_after_discharge_and_outcomes_nobody_tells(tmp_path: Path) -> None:
    rows = [row for row in ONE if row[2] not in ("MEDS_DEATH", "HOSPITAL_DISCHARGE//DIED")]
    stays = put(tmp_path / "open", frame(rows), frame([*TWO, (13, at(20, "10:00"), "MEDS_DEATH")])).stays()
    # the second discharge is missing: who left the ICU alive may have died in hospital
    assert stays["hospital_death"].to_list() == [False, None, None, True]
    assert stays["icu_death"].to_list() == [False, False, False, True]
    late = [(11, at(30, "10:00"), "MEDS_DEATH"), (11, at(10, "10:00"), "HOSPITAL_DISCHARGE//HOME")]
    assert put(tmp_path / "late", frame(rows + late), frame(TWO)).stays()["hospital_death"].to_list() == [False] * 3 + [
        None
    ]
    mapping = MAPPING.replace("MEDS_DEATH,death\n", "")
    unknown = put(tmp_path / "unknown", frame(rows + late), frame(TWO), mapping=mapping).stays()
    assert unknown["hospital_death"].null_count() == 4
    mapping += "HOSPITAL_DISCHARGE//DIED,hospital_discharge:dead\n"
    told = put(tmp_path / "told", frame([r for r in ONE if r[2] != "MEDS_DEATH"]), frame(TWO), mapping=mapping).stays()
    assert told["hospital_death"].to_list() == [False, True, True, None]
    assert told["death_minute"].to_list() == [None, 2910, 1440, None]


def test_the_split_of_the_dataset_is_used(foreign: MEDS, refused: Callable[[str], str]) -> None:
    (foreign.root / "metadata").mkdir()
    split = pl.DataFrame({"subject_id": [11, 12], "split": ["held_out", "train"]})
    split.write_parquet(foreign.root / "metadata" / "subject_splits.parquet")
    cohort = Cohort(foreign)
    assert cohort.splits(cohort.store.stays).to_list() == ["test", "test", "test", None]
    line = f"prepare --data MEDS --data.root {foreign.root} --data."
    assert "is the split: leave out --data.seed and --data.split_by" in refused(line + "seed 3")


LINES = {
    "no line of stays": ("code,concept\nMEDS_DEATH,death", "no code is mapped to icu_admission"),
    "unknown concept": ("X,haert_rate", "code X is mapped to haert_rate, which is neither a concept of"),
    "derived concept": ("X,urine_rate", "code X is mapped to urine_rate, which is made of others; remove the line"),
    "unknown unit": ("LAB//LACTATE//2,lactate,cups", "code LAB//LACTATE//2: lactate in cups is not known to dictionary/units.csv"),
    "unknown code": ("LAB//TYPO,lactate", "code LAB//TYPO is neither in the data of"),
    "unknown beginning": ("TYPO*,lactate", "code TYPO* is neither in the data of"),
    "unknown role": ("X,sex:other", "code X is mapped to sex:other; expected sex:male or sex:female"),
    "unknown care unit": ("X,icu_admission:micu", "code X is mapped to icu_admission:micu; expected icu_admission or icu_admission:medical"),
    "unknown column": ("X,stay:shoe_size", "code X is mapped to stay:shoe_size; expected stay:patient_id or"),
    "unit of a role": ("X,death,days", "code X is mapped to death, which has no unit and no factor"),
    "no factor": ("X,lactate,,ten", "code X has the factor 'ten'; expected a number"),
    "no value": ("X,ventilation:tube", "code X is mapped to ventilation:tube; expected ventilation, or ventilation:NUMBER"),
    "no rest": ("X,lactate,*", "code X has the unit *, what the * of a code stands for"),
    "twice": ("GENDER//F,sex:male", "code GENDER//F stands more than once; remove one line"),
    "no concept": ("X,", "a line has the code 'X' and the concept ''; give both"),
    "another column": ("code,concept,faktor\nX,lactate,2", "expected the columns code and concept, and of unit, factor and note what is needed; found code, concept, faktor"),
    "nothing": ("", None),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_a_mapping_that_cannot_be_meant_is_refused(case: str, foreign: MEDS, refused: Callable[[str], str]) -> None:
    text, words = LINES[case]
    if text and not text.startswith("code,"):
        text = f"{MAPPING}{text}\n"
    (foreign.root / "mapping.csv").write_text(text)
    said = refused(f"prepare --data MEDS --data.root {foreign.root}")
    assert (words or "mapping.csv: the mapping cannot be read") in said and "mapping.csv" in said
    assert len(said.strip().splitlines()) == 1


def test_data_that_cannot_be_read_are_refused(tmp_path: Path, refused: Callable[[str], str]) -> None:
    def said(*shards: pl.DataFrame) -> str:
        put(tmp_path, *shards)
        return refused(f"prepare --data MEDS --data.root {tmp_path}")

    one, two = frame(ONE), frame(TWO)
    assert "no folder" in refused(f"prepare --data MEDS --data.root {tmp_path / 'nowhere'}")
    put(tmp_path)
    line = f"prepare --data MEDS --data.root {tmp_path}"
    assert f"no MEDS dataset in {tmp_path}: expected data/*.parquet; set --data.root" in refused(line)
    assert "1.parquet: column code is missing; expected subject_id, time, code, found" in said(one, two.drop("code"))
    assert "0.parquet: column time is String; expected Datetime" in said(one.cast({"time": pl.String}), two)
    assert "0.parquet: column subject_id is String; expected Int64" in said(one.cast({"subject_id": pl.String}), two)
    admission = pl.col("code").str.starts_with("ICU_ADM")
    undated = [t.with_columns(time=pl.when(~admission).then("time")) for t in (one, two)]
    assert "no ICU admission in" in said(*undated)
    put(tmp_path, one, two)
    path = tmp_path / "data" / "1.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert "1.parquet: the file is cut off or damaged" in refused(line)
    path.unlink()
    (tmp_path / "mapping.csv").unlink()
    assert "mapping.csv: expected a CSV with the columns code, concept" in refused(line)


def test_a_code_that_only_the_list_of_codes_names_is_known(foreign: MEDS) -> None:
    (foreign.root / "metadata").mkdir()
    pl.DataFrame({"code": ["LAB//SODIUM"]}).write_parquet(foreign.root / "metadata" / "codes.parquet")
    (foreign.root / "mapping.csv").write_text(
        MAPPING + "LAB//SODIUM,sodium\nLAB//LACT*,lactate\n"
    )  # the exact line holds
    assert events_of(foreign) == EVENTS


def test_the_store_follows_the_mapping(foreign: MEDS) -> None:
    before = Cohort(foreign).store.folder
    other = foreign.root / "other.csv"
    other.write_text(MAPPING.replace("LAB//LACTATE,lactate,mg/dL,10", "LAB//LACTATE,lactate,mg/dL,1"))
    again = MEDS(str(foreign.root), mapping=str(other), cache=foreign.cache)
    assert Cohort(again).store.folder != before
    assert (1, 179, 179, "lactate", 2.0) in events_of(again)


def test_pyarrow_writes_are_read_too(tmp_path: Path) -> None:
    hospital = put(tmp_path, frame(ONE), frame(TWO))
    for path in (tmp_path / "data").iterdir():
        table = DataSchema.align(pq.read_table(path))
        assert table.schema.field("code").type == pa.string()
        pq.write_table(table, path, use_dictionary=["code"])
    assert events_of(hospital) == EVENTS
