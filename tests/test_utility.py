"""The utility of the 2019 challenge from the publisher's files to the tables: training, scoring, transfer, comparison."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_metrics import utility_by_a_loop

from ehrmodels.checkpoint import read
from experiments.cli import main

HEADER = (  # of the publisher's files
    "HR|O2Sat|Temp|SBP|MAP|DBP|Resp|EtCO2|BaseExcess|HCO3|FiO2|pH|PaCO2|SaO2|AST|BUN|Alkalinephos|Calcium|Chloride|Creatinine|"
    "Bilirubin_direct|Glucose|Lactate|Magnesium|Phosphate|Potassium|Bilirubin_total|TroponinI|Hct|Hgb|PTT|WBC|Fibrinogen|Platelets|"
    "Age|Gender|Unit1|Unit2|HospAdmTime|ICULOS|SepsisLabel"
)


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems of 120 stays, half of them septic, whose heart rate rises before the label does."""
    root, rng = tmp_path_factory.mktemp("challenge"), np.random.default_rng(0)
    for system, first in (("A", 1), ("B", 100001)):
        (root / f"training_set{system}").mkdir()
        for k in range(120):
            hours, onset = int(rng.integers(12, 30)), int(rng.integers(6, 12)) if k % 2 == 0 else 99
            rows = [HEADER]
            for hour in range(1, hours + 1):
                known = {
                    "HR": round(80 + 20 * (hour > onset - 4) + rng.normal() * 3),
                    "Age": 60,
                    "Gender": k % 3 % 2,
                    "HospAdmTime": -2,
                }
                known |= {"ICULOS": hour, "SepsisLabel": int(hour >= onset)}
                rows.append("|".join(str(known.get(name, "NaN")) for name in HEADER.split("|")))
            (root / f"training_set{system}" / f"p{first + k:06d}.psv").write_text("\n".join(rows) + "\n")
    return root


def test_utility_from_training_to_transfer(challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train --model Fusion --model.width 16 --model.learning_rate 0.01 --data PhysioNet2019 --data.root {challenge} --data.systems A"
    more = f"--trainer.max_epochs 3 --operating_point utility --runs {tmp_path} --name u --finetune PhysioNet2019"
    main([*line.split(), *f"{more} --finetune.root {challenge} --finetune.systems B --finetune_epochs 1".split()])
    said = capsys.readouterr().out
    assert "utility of the source" in said
    (row,) = (line for line in said.splitlines() if line.startswith("utility "))
    run = tmp_path / "u"
    shown = [
        json.loads(path.read_text())
        for path in (run / "metrics.json", run / "finetune-PhysioNet2019" / "zero_shot.json")
    ]
    shown = [
        shown[0]["test"],
        shown[1],
        json.loads((run / "finetune-PhysioNet2019" / "metrics.json").read_text())["test"],
    ]
    for result in shown:
        assert f"{result['utility']['value']:.3f} (" in row
    assert shown[0]["threshold"] == shown[1]["threshold"] == read(run / "best.ckpt")["ehr"]["threshold"]
    table = pl.read_parquet(run / "predictions.parquet")
    for split, result in json.loads((run / "metrics.json").read_text()).items():
        expected = utility_by_a_loop(table.filter(split=split), result["threshold"])
        assert result["utility"]["value"] == pytest.approx(expected)
    assert result["utility"]["value"] > 0.2  # heart rates tell
    validation = table.filter(split="val")
    best = max(utility_by_a_loop(validation, t) for t in validation["probability"].unique())
    assert utility_by_a_loop(validation, shown[0]["threshold"]) == pytest.approx(best)
    main(["compare", str(run), str(_scored(run, tmp_path / "scored")), "--out", str(tmp_path / "out")])
    compared = pl.read_csv(tmp_path / "out" / "compare.csv")
    assert compared["utility"].to_list() == [shown[0]["utility"]["value"]] * 2
    assert set(compared["auroc_test"]) == {"bootstrap by patient"}


def _scored(run: Path, out: Path) -> Path:
    main(["evaluate", "--ckpt", str(run / "best.ckpt"), "--out", str(out)])
    return out


@pytest.mark.parametrize("options", ["--data.hours 4", "--data.after_onset false", "--data.lead 4"])
def test_other_tasks_have_no_utility(
    options: str, challenge: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    line = f"train --model Fusion --data PhysioNet2019 --data.root {challenge} --runs {tmp_path} {options}"
    said = refused(f"{line} --operating_point utility")
    assert "utility is defined for hourly sepsis as in the 2019 challenge alone" in said and options in said


def test_a_checkpoint_of_another_task_is_not_fine_tuned_for_utility(
    trained: Path, eicu: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    line = f"finetune --ckpt {trained / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --out {tmp_path / 'o'}"
    assert "found --data.task mortality_hospital --data.hours 24" in refused(f"{line} --operating_point utility")
    assert not (tmp_path / "o").exists()


def test_where_utility_is_not_defined_no_row_is_shown(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _scored(trained, tmp_path / "scored")
    assert not any(line.startswith("utility") for line in capsys.readouterr().out.splitlines())
