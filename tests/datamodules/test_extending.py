"""The walks of docs/extending.md, performed word for word on a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
WALK = re.compile(r"<!-- (add to|write|insert in) (\S+?)(?: after (.*?))? -->\n```\w+\n(.*?)```", re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of datamodules in which every walk has been taken."""
    shutil.copytree(ROOT / "datamodules", tmp_path / "datamodules", ignore=shutil.ignore_patterns("__pycache__"))
    walks = WALK.findall((ROOT / "docs" / "extending.md").read_text())
    assert len(walks) == 8
    for kind, name, after, content in walks:
        path = tmp_path / name
        if kind == "write":
            path.parent.mkdir()
            path.write_text(content)
        elif kind == "insert in":
            text = path.read_text()
            assert text.count(after) == 1, (name, after)
            path.write_text(text.replace(after, f"{after}\n{content.rstrip()}"))
        elif name.endswith(".csv"):
            path.write_text(path.read_text() + content)
        else:  # an import stands before what is made of the imports
            head, mark, tail = path.read_text().partition("\n__all__")
            path.write_text(head + content + mark + tail)
    return tmp_path


def python(package: Path, code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "EHR_CACHE": str(package / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_variable(package: Path, mimic: Path, eicu: Path) -> None:
    for folder, table, row in (
        (mimic, "hosp/labevents", "50976"),
        (eicu, "lab", "total protein"),
    ):
        root = package / "raw" / folder.name
        shutil.copytree(folder, root)
        labs = pl.read_csv(root / f"{table}.csv.gz", infer_schema=False)
        label, unit = ("itemid", "valueuom") if folder == mimic else ("labname", "labmeasurenameinterface")
        value = "valuenum" if folder == mimic else "labresult"
        first = labs.head(3).with_columns(pl.lit(row).alias(label), pl.Series(value, ["6.5", "70", "99"]))
        first = first.with_columns(pl.Series(unit, ["g/dL", "g/L", "g/dL"]))
        if folder == eicu:
            first = first.with_columns(
                pl.Series(c, ["10", "20", "30"]) for c in ("labresultoffset", "labresultrevisedoffset")
            )
        (root / f"{table}.csv.gz").unlink()
        pl.concat([labs, first]).write_csv(root / f"{table}.csv")
        code = (
            "import sys; from datamodules import hospitals; from datamodules.cohort import Cohort\n"
            "cohort = Cohort(getattr(hospitals, sys.argv[1])(sys.argv[2]))\n"
            "print(cohort.store.coverage().filter(concept='total_protein').select('rows', 'events', 'out_of_range').row(0))"
        )
        assert python(package, code, "MIMICIV" if folder == mimic else "EICU", str(root)).strip() == "(3, 2, 1)"


def test_a_hospital(package: Path) -> None:
    root = package / "seaside"
    root.mkdir()
    stays = "".join(f"{i},{40 + i % 50},2,{int(i % 4 == 0)}\n" for i in range(1, 41))
    (root / "patients.csv").write_text("id,age,days,died\n" + stays)
    values = "".join(
        f"{i},{60 * h},{60 * h + 5},pulse,{70 + i + h},\n{i},{60 * h},{60 * h},temp,98.6,F\n"
        for i in range(1, 41)
        for h in range(24)
    )
    (root / "values.csv").write_text("id,minute,entered,name,value,unit\n" + values)
    code = (
        "import sys; from datamodules import Seaside\n"
        "data = Seaside(sys.argv[1], hours=12, batch_size=8); data.prepare_data(); data.setup()\n"
        "batch = next(iter(data.train_dataloader())); print(data.spec.variables, tuple(batch.value.shape))"
    )
    assert python(package, code, str(root)).strip() == "['heart_rate', 'temperature'] (8, 12, 2)"


def test_a_task(package: Path, mimic: Path) -> None:
    code = (
        "import sys; from datamodules.hospitals import MIMICIV; from datamodules.cohort import Cohort\n"
        "samples, attrition = Cohort(MIMICIV(sys.argv[1], task='mortality_icu_48h')).samples()\n"
        "stays = Cohort(MIMICIV(sys.argv[1])).store.stays\n"
        "dead = stays.filter(stays['icu_death'] & (stays['death_minute'] <= 72 * 60) & (stays['death_minute'] > 24 * 60))\n"
        "print(samples['target'].sum() == len(set(dead['stay_id']) & set(samples['stay_id'])) > 0, attrition['rule'][-2])"
    )
    assert python(package, code, str(mimic)).strip() == "True ICU outcome known"


def test_a_definition(package: Path, mimic: Path) -> None:
    code = (
        "import sys; from datamodules.hospitals import MIMICIV; from datamodules.cohort import Cohort\n"
        "cohort = Cohort(MIMICIV(sys.argv[1], definition='given_and_kept_up', hours=96))\n"
        "print(len(cohort.known_septic()) > 0, 'given_and_kept_up' in cohort.compare_definitions()['definition'])"
    )
    assert python(package, code, str(mimic)).strip() == "True True"
