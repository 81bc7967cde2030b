"""What a user can do wrong: each mistake ends with one message that says what was expected, found and to do next, and leaves nothing behind."""

import gzip
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from ehrmodels.checkpoint import read
from experiments.cli import main
from experiments.files import save

TRAIN = "train --model Fusion --model.width 16 --model.summary false --model.members 2 --trainer.max_epochs 2 --data MIMICIV --data.root {root} --runs {out} --name run"
PREPARE = "prepare --data MIMICIV --data.root {root} --data.cache {out}/cache --out {out}/tables"


def change(path: Path, edit: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    table = edit(pl.read_csv(path, infer_schema=False))
    path.write_bytes(gzip.compress(table.write_csv().encode()))


def value(path: str, column: str, text: str, row: int = 0) -> Callable[[Path], None]:
    """Puts ``text`` in one cell of a table."""
    here = pl.int_range(pl.len()) == row
    return lambda root: change(
        root / path, lambda t: t.with_columns(pl.when(here).then(pl.lit(text)).otherwise(column).alias(column))
    )


def columns(path: str, **expressions: Any) -> Callable[[Path], None]:
    return lambda root: change(root / path, lambda t: t.with_columns(**expressions))


@pytest.fixture
def root(mimic: Path, tmp_path: Path) -> Path:
    """A copy of the simulated MIMIC-IV that a test may damage."""
    return Path(shutil.copytree(mimic, tmp_path / "raw"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def said_by(line: str, capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The message of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    said = capsys.readouterr().err
    assert stopped.value.code == status, said
    lines = [part for part in said.splitlines() if "✓" not in part and "0:00:0" not in part]
    assert len([part for part in lines if part.startswith("ehr: ")]) == 1, said
    assert "Traceback" not in said
    assert len(" ".join(lines)) < 1200
    return "\n".join(lines)


def left(out: Path) -> list[str]:
    """Files in the folder of results, but for whole tables of an extraction, which the next run takes up."""
    kept = [
        p
        for p in out.rglob("*")
        if p.is_file()
        and p.suffix != ".lock"
        and not ("rows" in p.parts and ".partial" in str(p) and p.suffix == ".parquet")
    ]
    return [str(p.relative_to(out)) for p in kept]


# ---- raw tables -----------------------------------------------------------------------------------------------------------

TABLES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "root folder missing": (shutil.rmtree, ["no folder", "expected the files of MIMICIV; set --data.root"]),
    "empty folder": (lambda root: (shutil.rmtree(root), root.mkdir()), ["no MIMICIV tables in", "expected icu/chartevents.csv.gz", "set --data.root"]),
    "folder is a file": (lambda root: (shutil.rmtree(root), root.write_text("")), ["no folder", "set --data.root"]),
    "table missing": (
        lambda root: (root / "icu/chartevents.csv.gz").unlink(),
        ["no table icu/chartevents in", "expected", "chartevents.csv.gz (or .csv, .parquet)", "set --data.root to the folder that holds it"],
    ),
    "column missing": (
        lambda root: change(root / "icu/icustays.csv.gz", lambda t: t.drop("intime")),
        ["icustays.csv.gz: column intime is missing; expected", "found subject_id"],
    ),
    "empty file": (lambda root: (root / "hosp/labevents.csv.gz").write_bytes(b""), ["labevents.csv.gz: the file is empty", "download it again"]),
    "truncated gzip": (
        lambda root: (p := root / "icu/chartevents.csv.gz").write_bytes(p.read_bytes()[:20_000]),
        ["chartevents.csv.gz: the file is cut off or damaged", "download it again"],
    ),
    "not gzip": (lambda root: (root / "icu/chartevents.csv.gz").write_text("<html>Log in</html>"), ["chartevents.csv.gz: the file is cut off or damaged"]),
    "text where a number belongs": (value("icu/icustays.csv.gz", "stay_id", "abc"), ["icustays.csv.gz: column stay_id: expected a whole number, found 'abc'", "repair the row"]),
    "text in a large table": (value("icu/chartevents.csv.gz", "itemid", "abc"), ["chartevents.csv.gz: column itemid: expected a whole number, found 'abc'", "repair the row"]),
    "time in another format": (value("icu/icustays.csv.gz", "intime", "28/09/2127 14:53"), ["icustays.csv.gz: column intime: expected a time as YYYY-MM-DD hh:mm:ss, found '28/09/2127 14:53'"]),
    "same stay twice": (
        lambda root: change(root / "icu/icustays.csv.gz", lambda t: pl.concat([t, t.head(1)])),
        ["stay_id must be unique, found 1 ids more than once, such as", "remove the duplicate rows"],
    ),
    "stay without id": (value("icu/icustays.csv.gz", "stay_id", ""), ["1 rows have no stay_id; every stay needs one"]),
    "no stay": (lambda root: change(root / "icu/icustays.csv.gz", lambda t: t.head(0)), ["no ICU stay found"]),
    "no event of any stay": (
        lambda root: [change(p, lambda t: t.head(0)) for t in ("chartevents", "inputevents", "outputevents") for p in [root / f"icu/{t}.csv.gz"]]
        + [change(root / "hosp/labevents.csv.gz", lambda t: t.head(0))],
        ["no event found in any stay"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TABLES)
@pytest.mark.parametrize("line", [PREPARE, TRAIN + " --data.cache {out}/cache"], ids=["prepare", "train"])
def test_bad_tables(mistake: str, line: str, root: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = TABLES[mistake]
    damage(root)
    said = said_by(line.format(root=root, out=out), capsys)
    for word in words:
        assert word in said, said
    assert not left(out)


def prepared(root: Path, out: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    main(PREPARE.format(root=root, out=out).split())
    return (
        pl.read_parquet(out / "tables/stays.parquet"),
        pl.read_parquet(out / "tables/events.parquet"),
        pl.read_csv(out / "tables/coverage.csv"),
    )


def test_values_that_cannot_be_are_dropped_and_counted(
    root: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN, values out of range, exact repeats and unknown units harm nothing, and the tables say how many there were."""
    before = prepared(root, out)[2].filter(pl.col("concept") == "heart_rate").row(0, named=True)
    path = root / "icu/chartevents.csv.gz"
    table = pl.read_csv(path, infer_schema=False).with_row_index("row")
    rates = table.filter(pl.col("itemid") == "220045", pl.col("valuenum").is_not_null())["row"].to_list()
    here = {
        name: pl.col("row").is_in(rates[i : i + 3])
        for i, name in zip(range(0, 12, 3), ("nan", "far", "unit", "twice"), strict=True)
    }
    number = pl.when(here["nan"]).then(pl.lit("nan")).when(here["far"]).then(pl.lit("99999")).otherwise("valuenum")
    unit = pl.when(here["unit"]).then(pl.lit("furlong")).otherwise("valueuom")
    changed = pl.concat([table, table.filter(here["twice"])]).with_columns(valuenum=number, valueuom=unit).drop("row")
    path.write_bytes(gzip.compress(changed.write_csv().encode()))
    shutil.rmtree(out / "tables")
    capsys.readouterr()
    _, events, coverage = prepared(root, out)
    said = capsys.readouterr().out
    assert "dropped, unit not known: heart_rate in furlong (3 rows)" in " ".join(said.split())
    after = coverage.filter(pl.col("concept") == "heart_rate").row(0, named=True)
    assert after["rows"] == before["rows"] + 3
    assert after["not_a_number"] == before["not_a_number"] + 3
    assert after["out_of_range"] == before["out_of_range"] + 3
    assert after["unmapped_unit"] == before["unmapped_unit"] + 3
    assert after["events"] <= before["events"] - 9
    assert events["value"].is_finite().all()


def test_times_that_cannot_be_leave_the_stay_out(root: Path, out: Path) -> None:
    """Discharge before admission, and a record from before the stay, are rules with a count, not crashes."""
    value("icu/icustays.csv.gz", "outtime", "1999-01-01 00:00:00", row=4)(root)
    value("icu/chartevents.csv.gz", "charttime", "1999-01-01 00:00:00", row=7)(root)
    stays, events, _ = prepared(root, out)
    ids = pl.read_csv(root / "icu/icustays.csv.gz")["stay_id"]
    wrong = stays.filter(pl.col("stay_id") == ids[4])
    assert wrong["icu_minutes"][0] < 0
    assert wrong["excluded_by"][0] == "ICU discharge after admission"
    assert events["minute"].min() >= -24 * 60


# ---- data and task --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, list[str]]] = {
    "no stay left": (
        TRAIN + " --data.min_age 150",
        ["no stay of", "is left after the rule 'age of at least 150 years'", "--data.min_age"],
    ),
    "prediction after every stay": (
        TRAIN + " --data.hours 5000",
        ["is left after the rule 'at least 5000 h in the ICU'"],
    ),
    "no hour": (TRAIN + " --data.hours 0", ["--data.hours must be at least 1, found 0"]),
    "no window": (TRAIN + " --data.window 0", ["--data.window must be at least 1 hour, found 0"]),
    "no batch": (TRAIN + " --data.batch_size 0", ["--data.batch_size must be at least 1, found 0"]),
    "outcome as a feature": (
        TRAIN + " --data.statics icu_minutes",
        ["--data.statics icu_minutes is only known after the prediction time", "age, sex"],
    ),
    "unknown feature": (
        TRAIN + " --data.statics age,height_of_hospital",
        ["height_of_hospital is not known; choose among age, sex"],
    ),
    "unknown set": (
        "prepare --data PhysioNet2012 --data.root {root} --data.sets x",
        ["--data.sets x: expected letters among a,b,c"],
    ),
    "set missing": (
        "prepare --data PhysioNet2012 --data.root {root} --data.sets b",
        ["no data of b in", "expected set-b.tar.gz", "set --data.root"],
    ),
    "system missing": (
        "prepare --data PhysioNet2019 --data.root {root}",
        ["no data of A in", "training_setA.zip", "set --data.root"],
    ),
    "another publisher's files": (
        "prepare --data EICU --data.root {root}",
        ["no EICU tables in", "expected", "set --data.root"],
    ),
    "nobody who falls ill later than on the first day": (
        TRAIN + " --data.task sepsis_onset",
        ["the training split has 0 positives among", "both outcomes are needed"],
    ),
    "every hour of a task of one": (
        TRAIN + " --data.rolling true",
        ["--data.rolling applies to mortality_24h: choose --data.task mortality_24h"],
    ),
    "another split of a published one": (
        "prepare --data PhysioNet2012 --data.root {root} --data.seed 1",
        ["PhysioNet2012 has the split of published work: leave out --data.seed"],
    ),
    "too few hospitals": (
        TRAIN + " --data.split_by hospital",
        ["--data.split_by hospital needs at least 10 hospitals", "use patient"],
    ),
    "width and heads": (
        TRAIN + " --model.heads 5",
        ["--model.width must be a multiple of twice --model.heads (10), found 16"],
    ),
    "negative rate": (
        TRAIN + " --model.learning_rate -1",
        ["--model.learning_rate must be a finite number of at least 0, found -1"],
    ),
    "loss is no number": (
        TRAIN + " --model.learning_rate 1e9",
        ["the loss is not a number any more in epoch 0", "lower the learning rate"],
    ),
    "second system missing": (
        TRAIN + " --finetune EICU --finetune.root {out}/no",
        ["no folder", "expected the files of EICU"],
    ),
    "no such device": (TRAIN + " --trainer.accelerator gpu", ["No supported gpu backend found"]),
    "folder of runs is a file": (
        TRAIN.replace("--runs {out}", "--runs {root}/icu/icustays.csv.gz"),
        ["icustays.csv.gz", "expected a folder"],
    ),
    "tables into a file": (
        PREPARE.replace("{out}/tables", "{root}/icu/icustays.csv.gz"),
        ["File exists; expected a folder; choose another path"],
    ),
    "synthesize over files": (
        "synthesize --out {root} --stays 5",
        ["is not empty: choose a new folder, or delete it first"],
    ),
    "synthesize nothing": ("synthesize --out {out}/new --stays 0", ["expected at least 1 stay", "found 0"]),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_bad_options(mistake: str, mimic: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, words = OPTIONS[mistake]
    if "accelerator gpu" in line and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = said_by(line.format(root=mimic, out=out), capsys)
    for word in words:
        assert word in said, said
    if line.startswith("train"):
        assert not left(out)


def one_class(split: str, died: int, trained: Path) -> Callable[[Path], None]:
    """Gives every stay of a split the same outcome."""

    def edit(root: Path) -> None:
        from datamodules import MIMICIV

        data = MIMICIV(str(root))
        data.setup()
        chosen = data.samples.filter(pl.col("split") == split)["stay_id"].to_list()
        stays = (
            pl.read_csv(root / "icu/icustays.csv.gz")
            .filter(pl.col("stay_id").is_in(chosen))["hadm_id"]
            .cast(pl.String)
            .to_list()
        )
        here = pl.col("hadm_id").is_in(stays)
        columns(
            "hosp/admissions.csv.gz",
            hospital_expire_flag=pl.when(here).then(pl.lit(str(died))).otherwise("hospital_expire_flag"),
        )(root)

    return edit


@pytest.mark.parametrize(
    ("split", "said"), [("train", "the training split has 0 positives among"), ("val", "has 0 positives among")]
)
def test_split_with_one_outcome(
    split: str, said: str, root: Path, out: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_class(split, 0, trained)(root)
    message = said_by(TRAIN.format(root=root, out=out), capsys)
    assert said in message
    assert "both outcomes are needed" in message
    assert not left(out)


def test_test_split_with_one_outcome_is_scored_as_far_as_possible(root: Path, out: Path, trained: Path) -> None:
    one_class("test", 0, trained)(root)
    main(TRAIN.format(root=root, out=out).split())
    assert pl.read_parquet(out / "run/predictions.parquet").filter(pl.col("split") == "test")["target"].sum() == 0


# ---- checkpoints and runs -------------------------------------------------------------------------------------------------


def variables(path: Path) -> None:
    content = read(path)
    for name in ("variables", "units", "center", "scale"):
        content["ehr"]["spec"][name] = content["ehr"]["spec"][name][:-1]
    save(content, path)


def renamed(path: Path) -> None:
    content = read(path)
    content["ehr"]["spec"]["variables"][0] = "haert_rate"
    save(content, path)


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: p.unlink(), "no checkpoint {p}: expected a file such as runs/NAME/best.ckpt; set --ckpt"),
    "a folder": (
        lambda p: (p.unlink(), p.mkdir()),
        "no checkpoint {p}: expected a file such as runs/NAME/best.ckpt; set --ckpt",
    ),
    "empty": (lambda p: p.write_bytes(b""), "{p}: the checkpoint is damaged or not a checkpoint"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:9000]), "{p}: the checkpoint is damaged or not a checkpoint"),
    "text": (lambda p: p.write_text("hello"), "{p}: the checkpoint is damaged or not a checkpoint"),
    "of another program": (lambda p: torch.save({"state_dict": {}}, p), "{p}: not a checkpoint of this framework"),
    "with code inside": (lambda p: torch.save(Path(), p), "{p}: the checkpoint is damaged or not a checkpoint"),
    "of another list of variables": (variables, "{p}: the weights do not fit the"),
    "of a variable nobody knows": (renamed, "the model reads haert_rate in"),
}


@pytest.mark.parametrize("mistake", CHECKPOINTS)
@pytest.mark.parametrize("verb", ["evaluate", "predict", "finetune"])
def test_bad_checkpoints(
    verb: str, mistake: str, trained: Path, eicu: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = CHECKPOINTS[mistake]
    path = Path(shutil.copy(trained / "best.ckpt", tmp_path / "model.ckpt"))
    damage(path)
    data = f" --data SyntheticEICU --data.root {eicu}" if verb == "finetune" else ""
    assert words.format(p=path) in said_by(
        f"{verb} --ckpt {path} --out {out / ('new.csv' if verb == 'predict' else 'new')}{data}", capsys
    )
    assert not left(out)


def test_runs_in_the_way(mimic: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = TRAIN.format(root=mimic, out=out)
    main(line.split())
    whole = {p: p.read_bytes() for p in (out / "run").iterdir()}
    assert "holds a run with another configuration" in said_by(f"{line} --seed 7", capsys)
    assert "choose another --name" in said_by(f"{line} --model.width 32 --resume", capsys)
    assert {p: p.read_bytes() for p in (out / "run").iterdir()} == whole
    (out / "run" / "metrics.json").unlink()
    assert "holds an unfinished run of this configuration; add --resume to continue it" in said_by(line, capsys)
    last = out / "run" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    assert f"{last}: the checkpoint is damaged" in said_by(f"{line} --resume", capsys)
    (out / "run" / "config.yaml").unlink()
    assert "holds a run without config.yaml" in said_by(line, capsys)


# ---- the disk -------------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1_000, 100_000, 400_000])
def test_no_room_for_an_extraction(size: int, mimic: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(size):
        said = said_by(PREPARE.format(root=mimic, out=out), capsys)
    assert "Free some space" in said
    assert not [name for name in left(out) if ".partial/" not in name]
    main(PREPARE.format(root=mimic, out=out).split())
    assert not [name for name in left(out) if "partial" in name or name.endswith(".tmp")]


@pytest.mark.parametrize("size", [100, 2_000, 50_000])
def test_no_room_for_a_run(
    size: int, trained: Path, mimic: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = TRAIN.format(root=mimic, out=out)
    with largest_file(size):
        said = said_by(line, capsys)
    assert "the disk said: " in said
    assert "make room" in said
    assert not left(out)
    main(line.split())


def test_no_room_for_results(trained: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("evaluate", "predict"):
        name = "risk.parquet" if verb == "predict" else "scores"
        with largest_file(1_000):
            said = said_by(f"{verb} --ckpt {trained / 'best.ckpt'} --out {out / name}", capsys)
        assert "make room" in said
        assert not left(out)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 300 kB; needs the right to mount one."""
    folder = Path(tempfile.mkdtemp())
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_full_disk(small_disk: Path, trained: Path, mimic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(PREPARE.format(root=mimic, out=small_disk), capsys)
    assert "No space left" in said or "is the disk full" in said
    shutil.rmtree(small_disk / "cache")
    said = said_by(TRAIN.replace("--model.width 16", "--model.width 32").format(root=mimic, out=small_disk), capsys)
    assert "No space left on device" in said
    assert "make room" in said
    assert not [name for name in left(small_disk) if name.endswith(".tmp")]


def test_no_permission(trained: Path, mimic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As another user, since root may write everywhere."""
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root; without it the rights of the folder itself would do")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        (folder / "model.ckpt").write_bytes((trained / "best.ckpt").read_bytes())
        (folder / "model.ckpt").chmod(0o600)
        shutil.copytree(mimic, folder / "raw")
        lines = (
            TRAIN.format(root=folder / "raw", out=folder),
            PREPARE.format(root=folder / "raw", out=folder),
            f"evaluate --ckpt {folder / 'model.ckpt'} --out {folder / 'new'}",
        )
        for line in lines:
            os.seteuid(65534)
            try:
                said = said_by(line, capsys)
            finally:
                os.seteuid(0)
            assert "no permission for" in said or "not yours" in said
        assert {p.name for p in folder.iterdir()} == {"model.ckpt", "raw"}
    finally:
        shutil.rmtree(folder)
