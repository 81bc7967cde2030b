"""A checkpoint beside the data and options given: what contradicts is refused by every verb, what is the cohort's is obeyed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from datamodules import SyntheticEICU, SyntheticMIMICIV
from ehrmodels import load
from ehrmodels.checkpoint import read
from experiments.cli import main
from experiments.files import save

CONTRADICTIONS = {
    "--data.task mortality_24h": "--data.task mortality_24h, but the model was trained with mortality_hospital",
    "--data.hours 12": "--data.hours 12, but the model was trained with 24: leave --data.hours out, or give it 24",
    "--data.window 6": "--data.window 6, but the model was trained with 24",
    "--data.rolling true --data.task mortality_24h": "--data.task mortality_24h, but the model was trained with",
    "--data.lead 3": "--data.lead 3, but the model was trained with 6",
    "--data.after_onset true": "--data.after_onset true, but the model was trained with false",
    "--data.treatment false": "--data.treatment false, but the model was trained with true",
    "--data.statics age": "--data.statics age, but the model was trained with age,sex,unit,admit_minute",
}


def evaluated(trained: Path, data: str, out: Path) -> dict[str, Any]:
    main(f"evaluate --ckpt {trained / 'best.ckpt'} {data} --out {out}".split())
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def everyone(trained: Path, eicu: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scores of all stays of the second system."""
    out = tmp_path_factory.mktemp("everyone")
    return evaluated(trained, f"--data SyntheticEICU --data.root {eicu} --data.split all", out)


@pytest.mark.parametrize("option", CONTRADICTIONS)
def test_what_contradicts_a_model_is_refused(
    option: str, trained: Path, eicu: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    line = f"evaluate --ckpt {trained / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --out {tmp_path / 'o'} {option}"
    assert CONTRADICTIONS[option] in refused(line)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("verb", ["predict", "finetune"])
def test_every_verb_asks_the_same(
    verb: str, trained: Path, eicu: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    out = tmp_path / ("o.csv" if verb == "predict" else "o")
    line = f"{verb} --ckpt {trained / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --out {out} --data.hours 12"
    assert CONTRADICTIONS["--data.hours 12"] in refused(line)
    assert not out.exists()


def test_what_agrees_is_accepted(everyone: dict[str, Any], trained: Path, eicu: Path, tmp_path: Path) -> None:
    same = "--data.task mortality_hospital --data.hours 24 --data.treatment true --data.statics unit,age,sex,admit_minute --data.seed 3"
    told = evaluated(trained, f"--data SyntheticEICU --data.root {eicu} --data.split all {same}", tmp_path / "told")
    assert told["auroc"] == everyone["auroc"] and told["n"] == everyone["n"]


@pytest.mark.parametrize("rule", ["--data.sepsis true", "--data.min_age 70", "--data.min_icu_hours 60"])
def test_rules_of_the_cohort_are_obeyed(
    rule: str, everyone: dict[str, Any], trained: Path, eicu: Path, tmp_path: Path
) -> None:
    fewer = evaluated(trained, f"--data SyntheticEICU --data.root {eicu} --data.split all {rule}", tmp_path / "fewer")
    assert 0 < fewer["n"] < everyone["n"]


@pytest.mark.parametrize("option", ["--data.seed 1", "--data.split_by hospital", "--data.fold 1/5"])
@pytest.mark.parametrize("verb", ["evaluate", "finetune"])
def test_another_split_of_the_same_patients_is_refused(
    verb: str, option: str, trained: Path, mimic: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    line = f"{verb} --ckpt {trained / 'best.ckpt'} --data SyntheticMIMICIV --data.root {mimic} --out {tmp_path / 'o'} {option}"
    assert "patients that it has seen would be scored as held out" in refused(line)


def test_patients_that_were_trained_on_are_counted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(trained, "--data.split all", tmp_path / "all")
    table = pl.read_parquet(tmp_path / "all" / "predictions.parquet")
    seen = table.filter(split="train")["patient_id"].n_unique()
    assert seen > 0
    assert (
        f"{seen} of the {table['patient_id'].n_unique()} patients that are scored were trained on"
        in capsys.readouterr().out
    )
    evaluated(trained, "", tmp_path / "test")
    assert "were trained on" not in capsys.readouterr().out


def test_a_fine_tuned_model_remembers_the_patients_of_its_source(
    trained: Path, mimic: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    tuned = trained / "finetune-SyntheticEICU" / "best.ckpt"
    names = [entry["population"].partition("-")[0] for entry in read(tuned)["ehr"]["trained_on"]]
    assert names == ["SyntheticMIMICIV", "SyntheticEICU"]
    line = f"evaluate --ckpt {tuned} --data SyntheticMIMICIV --data.root {mimic} --data.seed 5 --out {tmp_path / 'o'}"
    assert "was trained on patients of these data with 0" in refused(line)


@pytest.mark.parametrize("verb", ["evaluate", "predict", "finetune"])
def test_variables_that_the_target_lacks_are_listed(
    verb: str, trained: Path, eicu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read(trained / "best.ckpt")
    names = checkpoint["ehr"]["spec"]["variables"]
    names[names.index("mean_bp")] = "mean_bp_cuff"  # in the same unit, and in no file of eICU
    save(checkpoint, tmp_path / "other.ckpt")
    out = tmp_path / ("o.csv" if verb == "predict" else "o")
    more = "--epochs 1 --trainer.limit_train_batches 1" if verb == "finetune" else ""
    main(f"{verb} --ckpt {tmp_path / 'other.ckpt'} --data SyntheticEICU --data.root {eicu} --out {out} {more}".split())
    assert (
        f"SyntheticEICU never charts 1 of the model's {len(names)} variables: mean_bp_cuff" in capsys.readouterr().out
    )


def test_python_refuses_the_same(trained: Path, mimic: Path, eicu: Path) -> None:
    model = load(trained / "best.ckpt")
    data = SyntheticEICU(str(eicu), hours=12)
    data.adopt(model.spec, model.facts["trained_on"])
    with pytest.raises(ValueError, match=r"--data\.hours 12, but the model was trained with 24"):
        data.setup()
    data = SyntheticMIMICIV(str(mimic), seed=1)
    data.adopt(model.spec, model.facts["trained_on"])
    with pytest.raises(ValueError, match="patients that it has seen"):
        data.setup()


@pytest.mark.parametrize("option", ["--data.stays 900", "--data.simulation_seed 9"])
def test_simulated_files_of_another_simulation_are_refused(
    option: str, mimic: Path, refused: Callable[[str], str]
) -> None:
    name = option.split()[0]
    said = refused(f"prepare --data SyntheticMIMICIV --data.root {mimic} {option}")
    assert f"{option}: the files in {mimic} were simulated with {'300' if 'stays' in name else '1'}" in said


def test_the_checkpoint_may_stand_in_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.yaml").write_text(f"ckpt: {trained / 'best.ckpt'}\nout: {tmp_path / 'scores'}\n")
    main(["evaluate", "-c", str(tmp_path / "scores.yaml")])
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["data"] == "SyntheticMIMICIV"
