"""PhysioNet 2012 and 2019: hand-written records with every oddity of the real ones, and the sizes that published work reports."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from datamodules import PhysioNet2012, PhysioNet2019
from datamodules.cohort import Cohort, rows_of
from datamodules.hospitals.base import Hospital

DESCRIPTORS = "00:00,RecordID,{0}\n00:00,Age,54\n00:00,Gender,0\n00:00,Height,-1\n00:00,ICUType,4\n00:00,Weight,-1\n"
RECORDS_2012 = {
    # -1 = not recorded, a row without parameter, a duplicate, minute 48:00, MechVent, an unknown parameter, no last newline
    "132539": DESCRIPTORS.format(132539) + "00:07,HR,73\n00:07,HR,73\n00:07,,5\n10:30,FiO2,0.4\n10:30,MechVent,1\n11:00,Temp,-1\n"
    "12:00,Weight,80.5\n20:00,Alien,3\n48:00,Urine,60",
    # five rows besides the id: the descriptors alone
    "132540": DESCRIPTORS.format(132540),
    # one row more
    "132541": DESCRIPTORS.format(132541).replace("Gender,0", "Gender,1").replace("Height,-1", "Height,180") + "01:00,HR,100\n",
}  # fmt: skip
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5,-1,0\n132540,16,8,8,-1,0\n132541,21,11,-1,4,1\n"


def write_2012(root: Path, letter: str, packed: bool = False, records: dict[str, str] = RECORDS_2012) -> None:
    files = {f"set-{letter}/{name}.txt": ("Time,Parameter,Value\n" + text).encode() for name, text in records.items()}
    if packed:
        with tarfile.open(root / f"set-{letter}.tar.gz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(content)
    (root / f"Outcomes-{letter}.txt").write_text(OUTCOMES)


def read(hospital: Hospital) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Its stays, and the events of these, those that it rejects left out."""
    stays = hospital.stays()
    events = pl.concat(hospital.events(hospital.tables(stays), stays)).filter(pl.col("dropped").is_null())
    events = events.join(stays.lazy().select("stay_id"), on="stay_id", how="semi").drop("known_minute", "dropped")
    return stays, events.sort("stay_id", "minute", "concept").collect()


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_2012_records(tmp_path: Path, packed: bool) -> None:
    write_2012(tmp_path, "b", packed)
    stays, events = read(PhysioNet2012(str(tmp_path)))
    told = [
        "stay_id",
        "hospital_id",
        "age",
        "sex",
        "height",
        "unit",
        "icu_minutes",
        "discharge_minute",
        "hospital_death",
    ]
    assert stays.select(told).rows() == [
        (132539, "b", 54.0, 0.0, None, "surgical", 2880, 7200, False),
        (132541, "b", 54.0, 1.0, 180.0, "surgical", 2880, None, True),  # 132540 has nothing but its descriptors
    ]
    assert events.rows() == [
        (132539, 7, "heart_rate", 73.0, None),
        (132539, 7, "heart_rate", 73.0, None),
        (132539, 630, "fio2", 0.4, "fraction"),
        (132539, 630, "ventilation", 2.0, None),
        (132539, 720, "weight", 80.5, None),
        (132539, 2879, "urine", 60.0, None),  # 48:00 counts to the last hour
        (132541, 60, "heart_rate", 100.0, None),
    ]


def test_2012_store_and_sample(tmp_path: Path) -> None:
    write_2012(tmp_path, "a")
    module = PhysioNet2012(str(tmp_path), sets="a")
    store = module.store
    coverage = {row["concept"]: row for row in store.coverage().iter_rows(named=True)}
    told = ["rows", "events", "duplicate", "not_a_number"]
    assert [coverage["heart_rate"][c] for c in told] == [3, 2, 1, 0]
    assert [coverage["temperature"][c] for c in told] == [1, 0, 0, 1]  # -1: not recorded
    assert store.value[store.offsets[0] : store.offsets[1]].tolist() == [73.0, 40.0, 2.0, 80.5, 60.0]
    with pytest.raises(ValueError, match="no stay in the training split"):
        module.setup()
    assert module.samples["split"].to_list() == ["test", "test"]
    assert module.samples["target"].to_list() == [0.0, 1.0]


def test_2012_without_outcomes_can_be_predicted(tmp_path: Path) -> None:
    write_2012(tmp_path, "b")
    (tmp_path / "Outcomes-b.txt").unlink()
    module = PhysioNet2012(str(tmp_path))
    with pytest.raises(ValueError, match="needs hospital_death and no stay of these data has it"):
        module.setup()
    module.labelled = False
    with pytest.raises(ValueError, match=r"split 'train' of .* cannot be told"):  # no scaler without a model's
        module.setup()
    given = PhysioNet2012(str(tmp_path), hours=48)
    write_2012(tmp_path, "c", records={"7": RECORDS_2012["132541"].replace("132541", "7")})
    trained = PhysioNet2012(str(tmp_path), hours=48)
    trained.labelled = False
    trained.setup()
    assert trained.spec is not None
    (tmp_path / "set-c" / "7.txt").unlink()
    (tmp_path / "set-c").rmdir()
    module = given
    module.labelled = False
    module.adopt(trained.spec)
    module.setup()
    assert module.samples["target"].to_list() == [None, None]
    assert module.batch(module.rows("all")).target.isnan().all()


def test_2012_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data of a in .*set-a\.tar\.gz.*--data\.root"):
        PhysioNet2012(str(tmp_path)).prepare_data()
    with pytest.raises(ValueError, match=r"--data\.sets d: expected letters among a,b,c"):
        PhysioNet2012(str(tmp_path), sets="d").prepare_data()
    write_2012(tmp_path, "b", records={"1": DESCRIPTORS.format(1) + "00:07,HR,high\n"})
    with pytest.raises(ValueError, match=r"set-b: expected a number as value, found 'high' for HR"):
        PhysioNet2012(str(tmp_path), sets="b").stays()
    write_2012(tmp_path, "b", records={"1": DESCRIPTORS.format(1) + "noon,HR,80\n"})
    with pytest.raises(ValueError, match=r"set-b: expected a time as hh:mm, found 'noon' for HR"):
        PhysioNet2012(str(tmp_path), sets="b").stays()
    (tmp_path / "Outcomes-b.txt").write_text("RecordID,Survival\n")
    write = RECORDS_2012["132541"]
    (tmp_path / "set-b" / "1.txt").write_text(write)
    with pytest.raises(ValueError, match=r"Outcomes-b\.txt: column Length_of_stay, In-hospital_death is missing"):
        PhysioNet2012(str(tmp_path), sets="b").stays()
    with pytest.raises(FileNotFoundError, match="no data of c"):
        PhysioNet2012(str(tmp_path), sets="b,c").stays()


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    write_2012(
        tmp_path,
        "b",
        packed=True,
        records={str(i): DESCRIPTORS.format(i) + f"00:07,HR,{i % 97}\n" * 40 for i in range(300)},
    )
    path = tmp_path / "set-b.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"set-b\.tar\.gz: the archive is cut off or damaged"):
        PhysioNet2012(str(tmp_path)).stays()
    write_2019(tmp_path, packed=True)
    path = tmp_path / "training_setA.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"training_setA\.zip: the archive is cut off or damaged"):
        PhysioNet2019(str(tmp_path)).stays()


NAMES_2019 = [
    "HR",
    "O2Sat",
    "Temp",
    "SBP",
    "MAP",
    "DBP",
    "Resp",
    "EtCO2",
    "BaseExcess",
    "HCO3",
    "FiO2",
    "pH",
    "PaCO2",
    "SaO2",
    "AST",
    "BUN",
    "Alkalinephos",
    "Calcium",
    "Chloride",
    "Creatinine",
    "Bilirubin_direct",
    "Glucose",
    "Lactate",
    "Magnesium",
    "Phosphate",
    "Potassium",
    "Bilirubin_total",
    "TroponinI",
    "Hct",
    "Hgb",
    "PTT",
    "WBC",
    "Fibrinogen",
    "Platelets",
    "Age",
    "Gender",
    "Unit1",
    "Unit2",
    "HospAdmTime",
    "ICULOS",
    "SepsisLabel",
]


def record_2019(rows: list[dict[str, float]], label: bool = True) -> str:
    names = NAMES_2019 if label else NAMES_2019[:-1]
    always = {"Age": 62.5, "Gender": 1, "Unit1": 0, "Unit2": 1, "HospAdmTime": -1.5, "SepsisLabel": 0}
    return "\n".join(
        ["|".join(names), *("|".join(str({**always, **row}.get(n, "NaN")) for n in names) for row in rows)]
    )


def write_2019(root: Path, packed: bool = False, label: bool = True) -> None:
    septic = [
        {"ICULOS": 1},
        {"ICULOS": 2, "HR": 90, "FiO2": 0.5},
        {"ICULOS": 3, "HR": 95, "SepsisLabel": 1},
        {"ICULOS": 4, "SepsisLabel": 1},
    ]
    late = [{"ICULOS": 5, "HR": 70, "Unit1": 1, "Unit2": 0}, {"ICULOS": 6, "Temp": 38.5, "Unit1": 1, "Unit2": 0}]
    files = {"p000001.psv": record_2019(septic, label), "p000007.psv": record_2019(late, label) + "\n"}
    if packed:
        with zipfile.ZipFile(root / "training_setA.zip", "w") as archive:
            for name, text in files.items():
                archive.writestr(f"training/{name}", text)
    else:
        (root / "training_setA").mkdir(exist_ok=True)
        for name, text in files.items():
            (root / "training_setA" / name).write_text(text)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_2019_records(tmp_path: Path, packed: bool) -> None:
    write_2019(tmp_path, packed)
    stays, events = read(PhysioNet2019(str(tmp_path)))
    told = [
        "stay_id",
        "hospital_id",
        "age",
        "sex",
        "unit",
        "admit_minute",
        "icu_minutes",
        "first_minute",
        "sepsis_minute",
    ]
    assert stays.select(told).rows() == [
        # the first labelled row, ICULOS 3, ends at minute 180 and announces an onset six hours later
        (1, "A", 62.5, 1.0, "surgical", -90, 240, 0, 540),
        (7, "A", 62.5, 1.0, "medical", -90, 360, 240, None),
    ]
    assert events.select("stay_id", "minute", "concept", "value").rows() == [
        (1, 60, "heart_rate", 90.0),
        (1, 60, "fio2", 0.5),
        (1, 120, "heart_rate", 95.0),
        (7, 240, "heart_rate", 70.0),
        (7, 300, "temperature", 38.5),
    ]


def test_2019_has_one_sample_a_row_with_the_rows_label(tmp_path: Path) -> None:
    write_2019(tmp_path)
    module = PhysioNet2019(str(tmp_path))
    module.cohort.splits = lambda stays: pl.Series(["train"] * len(stays))  # type: ignore[method-assign]
    module.setup()
    assert module.samples.select("stay_id", "minute", "target").rows() == [
        (1, 60, 0.0), (1, 120, 0.0), (1, 180, 1.0), (1, 240, 1.0), (7, 300, 0.0), (7, 360, 0.0)
    ]  # fmt: skip
    batch = module.batch(module.rows("all"))
    assert batch.mask.sum((1, 2)).tolist() == [0, 2, 3, 3, 1, 2]  # type: ignore[union-attr]


def test_2019_without_labels_can_be_predicted(tmp_path: Path) -> None:
    write_2019(tmp_path, label=False)
    module = PhysioNet2019(str(tmp_path))
    with pytest.raises(ValueError, match="needs sepsis_minute"):
        module.setup()
    module.labelled = False
    module.cohort.splits = lambda stays: pl.Series(["train"] * len(stays))  # type: ignore[method-assign]
    module.setup()
    assert len(module.samples) == 6
    assert module.samples["target"].null_count() == 6


def test_2019_errors_name_the_file(tmp_path: Path) -> None:
    write_2019(tmp_path)
    folder = tmp_path / "training_setA"
    (folder / "p000009.psv").write_text(record_2019([{"ICULOS": 1}]).replace("Lactate", "Lactat"))
    with pytest.raises(ValueError, match=r"training_setA: p000009 has other columns than the files before it"):
        PhysioNet2019(str(tmp_path)).stays()
    (folder / "p000009.psv").write_text(record_2019([{"ICULOS": 1}]).replace("62.5", "old"))
    with pytest.raises(ValueError, match=r"training_setA: expected numbers, found something else .*old"):
        PhysioNet2019(str(tmp_path)).stays()
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("Lactate|", ""))
    with pytest.raises(ValueError, match=r"training_setA: column Lactate is missing"):
        PhysioNet2019(str(tmp_path)).stays()
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no \*\.psv file found inside"):
        PhysioNet2019(str(tmp_path)).stays()
    with pytest.raises(FileNotFoundError, match="no data of B"):
        PhysioNet2019(str(tmp_path), systems="B").stays()


# ---- splits and labels -------------------------------------------------------------------------------------------------------


def many(root: Path, letter: str, first: int, count: int) -> None:
    """Records of consecutive ids."""
    records = {}
    for i in range(first, first + count):
        records[str(i)] = RECORDS_2012["132541"].replace("132541", str(i))
    write_2012(root, letter, records=records)
    rows = "".join(f"{i},1,1,5,-1,{i % 2}\n" for i in range(first, first + count))
    (root / f"Outcomes-{letter}.txt").write_text(OUTCOMES.splitlines()[0] + "\n" + rows)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with all three sets; the ids of b and c mingle."""
    many(tmp_path, "a", 1, 20)
    many(tmp_path, "b", 100, 30)
    many(tmp_path, "c", 130, 20)
    return tmp_path


def split_2012(root: Path, sets: str | None) -> dict[int, str | None]:
    samples, _ = Cohort(PhysioNet2012(str(root), sets=sets, cache=str(root / "cache"))).samples()
    return dict(samples.select("stay_id", "split").iter_rows())


def test_2012_has_one_split_whichever_sets_are_chosen(three: Path) -> None:
    whole = split_2012(three, None)
    order = np.random.RandomState(123).permutation(50)
    train = {100 + i for i in order[:40].tolist()}
    assert whole == dict.fromkeys(range(1, 21), "test") | {i: "train" if i in train else "val" for i in range(100, 150)}
    for sets, ids in (("a", range(1, 21)), ("b", range(100, 130)), ("c", range(130, 150)), ("b,c", range(100, 150))):
        assert split_2012(three, sets) == {i: whole[i] for i in ids}
    assert split_2012(three, "a,c") == {i: whole[i] for i in (*range(1, 21), *range(130, 150))}
    _, attrition = Cohort(PhysioNet2012(str(three), sets="b")).samples()
    assert attrition.row(by_predicate=pl.col("rule") == "set b", named=True)["stays"] == 30
    with pytest.raises(ValueError, match=r"--data\.fold 1/5 divides the training split, and no stay of .* is in it"):
        Cohort(PhysioNet2012(str(three), sets="a", fold="1/5", cache=str(three / "cache"))).samples()


def test_2012_reads_both_b_and_c_where_one_is_chosen(three: Path) -> None:
    assert set(PhysioNet2012(str(three), sets="c").sources()) == {"b", "c"}
    assert set(PhysioNet2012(str(three), sets="a").sources()) == {"a"}
    assert len(PhysioNet2012(str(three), sets="b").files()) == 52
    same = [Cohort(PhysioNet2012(str(three), sets=sets)).store.folder for sets in ("b", "c", "b,c")]
    assert len(set(same)) == 1


@pytest.mark.parametrize("options", [{"seed": 1}, {"split_by": "hospital"}])
def test_2012_takes_no_other_split(options: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PhysioNet2012 has the split of published work: leave out --data\.seed"):
        PhysioNet2012(str(tmp_path), **options)


def test_2012_with_one_of_b_and_c_cannot_tell_train_from_val(tmp_path: Path) -> None:
    many(tmp_path, "a", 1, 5)
    many(tmp_path, "b", 100, 30)
    hospital = PhysioNet2012(str(tmp_path))
    samples, _ = Cohort(hospital).samples()
    assert samples["split"].to_list() == ["test"] * 5 + [None] * 30
    assert len(rows_of(samples, "all", hospital)) == 35
    assert len(rows_of(samples, "test", hospital)) == 5
    alone = PhysioNet2012(str(tmp_path), sets="b")
    samples, _ = Cohort(alone).samples()
    for split in ("train", "val"):
        with pytest.raises(
            ValueError,
            match=rf"split '{split}' of .* cannot be told: .*sets b and c in one folder.*--data\.split all",
        ):
            rows_of(samples, split, alone)  # type: ignore[arg-type]
    assert len(rows_of(samples, "all", alone)) == 30


def test_2012_with_a_and_one_of_b_and_c_says_the_same(tmp_path: Path) -> None:
    many(tmp_path, "a", 1, 5)
    many(tmp_path, "b", 100, 30)
    with pytest.raises(ValueError, match=r"split 'train' of .* cannot be told"):
        PhysioNet2012(str(tmp_path)).setup()


def test_2019_leaves_the_risk_set_with_the_onset_where_that_is_asked_for(tmp_path: Path) -> None:
    septic = [{"ICULOS": i, "HR": 80 + i, "SepsisLabel": int(i >= 3)} for i in range(1, 13)]
    (tmp_path / "training_setA").mkdir()
    (tmp_path / "training_setA" / "p000001.psv").write_text(record_2019(septic))
    every, _ = Cohort(PhysioNet2019(str(tmp_path))).samples()
    assert every.select("minute", "target").rows() == [(60 * i, float(i >= 3)) for i in range(1, 13)]
    fewer, _ = Cohort(PhysioNet2019(str(tmp_path), after_onset=False)).samples()
    assert (
        fewer.rows() == every.filter(pl.col("minute") < 540).rows()
    )  # the label begins 6 hours before the onset at 540
    sooner, _ = Cohort(PhysioNet2019(str(tmp_path), lead=2)).samples()
    assert sooner["target"].to_list() == [float(60 * i >= 420) for i in range(1, 13)]


# ---- the real data -----------------------------------------------------------------------------------------------------------


def test_real_2012_has_the_published_sizes(real: Callable[[str], Path]) -> None:
    module = PhysioNet2012(str(real("physionet2012")), sets="b,c")
    module.setup()
    assert len(module.store.stays) == 7991
    counts = module.samples.group_by("split").agg(pl.len(), pl.col("target").sum()).sort("split")
    assert counts.rows() == [("train", 6392, 903.0), ("val", 1599, 250.0)]


def test_real_2019_has_the_published_sizes(real: Callable[[str], Path]) -> None:
    module = PhysioNet2019(str(real("physionet2019")), systems="A")
    module.setup()
    assert len(module.store.stays) == 20336
    assert module.store.stays["sepsis_minute"].is_not_null().sum() == 1790
    assert len(module.samples) == 790_215  # one a row of the files
    assert module.samples["target"].sum() == 17_136  # rows with SepsisLabel 1
