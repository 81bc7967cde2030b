"""The command line: what every verb takes, writes and prints, and that its numbers agree with each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from datamodules import EICU, MIMICIV, ICUDataModule, PhysioNet2012, PhysioNet2019, SyntheticEICU, SyntheticMIMICIV
from ehrmodels.base import ICUModule
from ehrmodels.checkpoint import read
from ehrmodels.fusion import Fusion
from experiments.cli import main, make_parser
from experiments.help import VERBS
from experiments.metrics import METRICS
from experiments.sweep import command as sweep

CONFIGS = sorted((Path(__file__).parents[1] / "experiments" / "configs").glob("[!b]*.yaml"))  # but benchmarks
COLUMNS = ["stay_id", "patient_id", "minute", "target", "probability", "split"]
TINY = "--model Fusion --model.width 16 --model.summary false --model.members 2 --trainer.max_epochs 1"


def ehr(line: str | list[str]) -> None:
    """Run a command; a list is one whose arguments hold spaces."""
    main(line.split() if isinstance(line, str) else line)


def refused(line: str | list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that must fail, with its status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ehr(line)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that ends by itself, such as --help."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ehr(line)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def configuration(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return yaml.safe_load(printed(f"{line} --print_config", capsys))


# ---- help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["--help", "-h", "help", None])
def test_help_imports_nothing_heavy(argument: str | None) -> None:
    code = "import sys; from experiments.cli import main; main(sys.argv[1:]); print([m for m in ('torch', 'polars', 'lightning') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *([argument] if argument else [])], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")
    for verb, text in VERBS.items():
        assert verb in done.stdout
        assert text in " ".join(done.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_explained(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    ehr(f"{verb} --help-all")
    said = " ".join(capsys.readouterr().out.split())
    for action in make_parser(verb)._actions:
        assert action.help, action.option_strings
        assert " ".join(action.help.split()[:3]).lower() in said.lower(), action.option_strings
    assert "==SUPPRESS==" not in said


@pytest.mark.parametrize(
    "line",
    [
        *(f"train --model.help {m}" for m in ("Fusion", "HyMaTE")),
        *(f"prepare --data.help {c}" for c in ("EICU", "PhysioNet2019", "SyntheticMIMICIV")),
    ],
)
def test_every_argument_of_a_class_is_explained(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(line, capsys)
    _, _, body = said.partition("Help for ")
    blocks = [b for b in body.split("\n  --")[1:] if not b.split()[0].endswith(".help")]
    assert len(blocks) > 8
    for block in blocks:
        words = block.partition("(type:")[0].split()
        assert len(words) > 4, f"no help text: {block}"
    assert ("--model.width" if "model" in line else "--data.root") in said


# ---- configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_yaml_file_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = yaml.safe_load(path.read_text())
    verb = "sweep" if "space" in said else "train"
    parser = make_parser(verb)
    made = parser.instantiate(parser.parse_args(["-c", str(path)]))
    assert isinstance(made.model, ICUModule)
    assert isinstance(made.data, ICUDataModule)
    kept = configuration(f"{verb} -c {path}", capsys)
    if verb == "sweep":
        sweep.check(yaml.safe_dump({k: v for k, v in said.items() if k in ("data", "model", "trainer")}), said["space"])
    assert said.get("trainer", {}).items() <= kept["trainer"].items()
    for name, value in said["data"].get("init_args", {}).items():
        assert kept["data"]["init_args"][name] == value
    assert path.read_text().startswith("# "), "the first line says what the run is"


def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "seed: 4\nmodel: {class_path: Fusion, init_args: {width: 32}}\ntrainer: {max_epochs: 7}\n"
        "data: {class_path: EICU, init_args: {root: x, hours: 12, batch_size: 8}}\n"
    )
    flags = "--seed 5 --data.hours 9 --model.fusion concat --trainer.max_epochs 3"
    for line in (
        f"train -c {path} {flags}",
        f"train {flags} -c {path}",
        f"train {flags} --config={path}",
        f"train --seed 5 -c {path} {flags}",
    ):
        kept = configuration(line, capsys)
        assert kept["seed"] == 5
        assert kept["trainer"]["max_epochs"] == 3
        assert kept["data"]["class_path"].endswith(".EICU")
        assert {k: kept["data"]["init_args"][k] for k in ("root", "hours", "batch_size")} == {
            "root": "x",
            "hours": 9,
            "batch_size": 8,
        }
        assert {k: kept["model"]["init_args"][k] for k in ("width", "fusion")} == {"width": 32, "fusion": "concat"}
    kept = configuration(f"train -c {path} --data MIMICIV --data.root y", capsys)
    assert kept["data"]["class_path"].endswith(".MIMICIV")
    assert (kept["data"]["init_args"]["root"], kept["data"]["init_args"]["hours"]) == ("y", 12)


def test_arguments_of_a_class_may_stand_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    kept = configuration("train --data.hours 9 --model.width 32 --model Fusion --data PhysioNet2012", capsys)
    assert kept["data"]["init_args"]["hours"] == 9
    assert kept["model"]["init_args"]["width"] == 32


@pytest.mark.parametrize(
    ("said", "meant"),
    [("true", True), ("True", True), ("yes", True), ("false", False), ("False", False), ("no", False)],
)
def test_booleans(said: str, meant: bool, capsys: pytest.CaptureFixture[str]) -> None:
    kept = configuration(f"train --model Fusion --data EICU --data.rolling {said}", capsys)
    assert kept["data"]["init_args"]["rolling"] is meant


@pytest.mark.parametrize(
    ("said", "meant"), [("age", ["age"]), ("age,sex", ["age", "sex"]), ("[age,sex]", ["age", "sex"]), ("[]", [])]
)
def test_statics_by_name(said: str, meant: list[str]) -> None:
    parser = make_parser("prepare")
    made = parser.instantiate(parser.parse_args(["--data", "EICU", "--data.statics", said]))
    assert made.data.statics == meant


def test_the_written_configuration_is_a_configuration(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(part: Any) -> Any:
        return {k: told(v) for k, v in part.items() if v is not None} if isinstance(part, dict) else part

    text = (trained / "config.yaml").read_text()
    parsed, written = told(configuration(f"train -c {trained / 'config.yaml'}", capsys)), yaml.safe_load(text)
    assert parsed.pop("resume") is False
    trainer = written.pop("trainer")
    assert trainer.items() <= parsed.pop("trainer").items()  # it has Lightning's own defaults, too
    assert trainer["precision"] == "32-true" and trainer["devices"] == 1
    assert parsed == written
    for fact in ("code: ehr ", "device: ", "data: ", "samples: ", "variables: heart_rate"):
        assert f"\n# {fact}" in f"\n{text}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "unknown verb 'trian'; did you mean train?"),
        (
            "xyz",
            "unknown verb 'xyz'; choose among synthesize, prepare, train, sweep, benchmark, evaluate, finetune, compare",
        ),
        ("prepare --data EICU --data.hors 3", "unknown option --data.hors; did you mean --data.hours?"),
        ("prepare --data.hors=3 --data EICU", "unknown option --data.hors; did you mean --data.hours?"),
        ("prepare --data PhysioNet2019 --data.system A", "unknown option --data.system; did you mean --data.systems?"),
        ("train --data EICU --modle Fusion", "unknown option --modle; did you mean --model?"),
        (
            "train --data EICU --model Fusion --model.widht 3",
            "unknown option --model.widht; did you mean --model.width?",
        ),
        (
            "train --data EICU --model Fusion --trainer.max_epoch 3",
            "unknown option --trainer.max_epoch; did you mean --trainer.max_epochs?",
        ),
        (
            "train --data EICU --model Fusion --finetune MIMICIV --finetune.rot x",
            "unknown option --finetune.rot; did you mean --finetune.root?",
        ),
        ("evaluate --ckp x", "unknown option --ckp; did you mean --ckpt?"),
        ("prepare --qqqqqqqqqq 3 --data EICU", "unknown option --qqqqqqqqqq\n"),
        ("prepare --data eicu", "--data eicu is not known; did you mean EICU?"),
        ("prepare --data Foo", "--data Foo is not known; choose among "),
        ("train --data EICU --model Fusoin", "--model Fusoin is not known; did you mean Fusion?"),
        ("prepare --data Hospital", "--data names no concrete class; choose among "),
        ("prepare --data ICUDataModule", "--data ICUDataModule is not known; choose among "),
        ("train --model Fusion --data ICUDataModule", "--data names no concrete class; choose among "),
        ("prepare --data.root x", "--data.root is given without --data; choose among "),
        ("prepare EICU", "'EICU' is not understood: expected only flags, such as --data NAME"),
        ("prepare", "missing --data\n"),
        ("train", "missing --model and --data\n"),
        ("evaluate --out x", "missing --ckpt\n"),
        ("prepare --data EICU --data.hours x", "--data.hours: expected int, found x"),
        ("prepare --data EICU --data.rolling maybe", "--data.rolling: expected bool, found maybe"),
        (
            "prepare --data EICU --data.task death",
            "--data.task: expected mortality_hospital, mortality_24h, sepsis_onset, found death",
        ),
        (
            "train --data EICU --model Fusion --trainer.max_epochs x",
            "--trainer.max_epochs: expected int, found x",
        ),
        (
            "train --data EICU --model Fusion --monitor auroc",
            "--monitor: expected cv_auroc_auprc, val_auroc_auprc, val_auroc, val_auprc, val_loss, found auroc",
        ),
        ("train -c nowhere.yaml", "--config: File does not exist"),
    ],
)
def test_slips_of_the_keyboard(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(line, capsys)
    assert said.startswith("ehr: ")
    assert words in said
    assert "Traceback" not in said
    if " " in line or line == "train":
        assert f"see: ehr {line.split()[0]} --help" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("patienc: 3\n", "unknown key 'patienc' in the YAML file; did you mean patience?"),
        ("trainer: {max_epoch: 3}\n", "unknown key 'max_epoch' in the YAML file; did you mean max_epochs?"),
        (
            "data: {class_path: EICU, init_args: {hors: 3}}\n",
            "unknown key 'hors' in the YAML file; did you mean hours?",
        ),
        ("model: {class_path: Fusion, init_args: {width: wide}}\n", "--width: expected int, found wide"),
        ("data: {class_path: EICU\n", "the YAML file cannot be read"),
    ],
)
def test_slips_in_a_file(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert words in refused(f"train -c {tmp_path / 'run.yaml'} --data EICU --model Fusion", capsys)


# ---- the verbs, end to end ------------------------------------------------------------------------------------------------


def test_synthesize_then_prepare_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ehr("synthesize --out raw/eicu --system EICU --stays 60 --seed 3")
    ehr("prepare --data EICU --data.root raw/eicu --out tables")
    said = capsys.readouterr().out
    assert "all ICU stays" in said
    assert "heart_rate" in said
    assert {p.name for p in Path("tables").iterdir()} >= {
        "stays.parquet", "events.parquet", "attrition.csv", "coverage.csv", "units.csv", "concepts.csv"
    }  # fmt: skip
    stays, events = pl.read_parquet("tables/stays.parquet"), pl.read_parquet("tables/events.parquet")
    assert len(stays) == stays["stay_id"].n_unique() == 60
    assert "excluded_by" in stays.columns
    attrition = pl.read_csv("tables/attrition.csv")
    assert attrition["stays"][0] == 60
    assert attrition["stays"][-1] == stays["excluded_by"].null_count()
    assert events.columns == ["stay_id", "minute", "known_minute", "concept", "value"]
    assert set(events["stay_id"]) <= set(stays["stay_id"])
    coverage = pl.read_csv("tables/coverage.csv")
    assert len(events) == coverage["events"].sum()
    assert events["value"].is_finite().all()
    concepts = pl.read_csv("tables/concepts.csv")
    assert set(events["concept"].cast(pl.String)) <= set(concepts["name"])


def scores(result: dict[str, Any]) -> None:
    for metric in METRICS:
        assert set(result[metric]) == {"value", "low", "high"}
        if result[metric]["value"] is not None and result[metric]["low"] is not None:
            assert result[metric]["low"] <= result[metric]["high"]
    assert 0 < result["n_positive"] < result["n"]


def test_train_writes_a_whole_run(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} == {
        "config.yaml", "environment.txt", "metrics.csv", "metrics.json", "best.ckpt", "last.ckpt", "predictions.parquet", "finetune-SyntheticEICU",
        "report.html", "card.md", "data_card.md", "run.log", "run.lock",
    }  # fmt: skip
    assert {p.name for p in (trained / "finetune-SyntheticEICU").iterdir()} >= {
        "metrics.csv", "metrics.json", "best.ckpt", "last.ckpt", "predictions.parquet", "zero_shot.parquet", "zero_shot.json", "report.html",
        "config.yaml", "environment.txt", "run.log",
    }  # fmt: skip
    for folder in (trained, trained / "finetune-SyntheticEICU"):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert set(metrics) == {"val", "test"}
        for result in metrics.values():
            scores(result)
        predictions = pl.read_parquet(folder / "predictions.parquet")
        assert predictions.columns == COLUMNS
        assert set(predictions["split"]) == {"val", "test"}
        assert predictions.select("stay_id", "minute").is_duplicated().sum() == 0
        assert predictions["probability"].is_between(0, 1).all()
        assert len(predictions) == metrics["val"]["n"] + metrics["test"]["n"]
        log = pl.read_csv(folder / "metrics.csv")
        assert log["epoch"].to_list() == [0, 1]
        assert set(log.columns) == {
            "epoch",
            "learning_rate",
            "train_loss",
            "val_loss",
            "val_auroc",
            "val_auprc",
            "val_auroc_auprc",
        }
        facts = read(folder / "best.ckpt")["ehr"]
        assert facts["threshold"] == metrics["val"]["threshold"] == metrics["test"]["threshold"]
        assert facts["seed"] == 0
    assert "torch==" in (trained / "environment.txt").read_text()


def test_split_hash_and_probabilities_of_train_and_val_do_not_overlap(trained: Path, mimic: Path) -> None:
    data = SyntheticMIMICIV(str(mimic))
    data.setup()
    assert read(trained / "best.ckpt")["ehr"]["split_hash"] == data.split_hash()
    held = pl.read_parquet(trained / "predictions.parquet").join(
        data.samples.select("stay_id", true="split"), on="stay_id"
    )
    assert held["split"].equals(held["true"], check_names=False)


def test_evaluate_repeats_the_numbers_of_train(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ehr(f"evaluate --ckpt {trained / 'best.ckpt'} --out test")
    ehr(f"evaluate --ckpt {trained / 'best.ckpt'} --out val --data.split val")
    whole = json.loads((trained / "metrics.json").read_text())
    written = pl.read_parquet(trained / "predictions.parquet")
    for split in ("test", "val"):
        assert {p.name for p in Path(split).iterdir()} == {
            "metrics.json",
            "predictions.parquet",
            "report.html",
            "card.md",
            "data_card.md",
        }
        again = json.loads(Path(split, "metrics.json").read_text())
        assert whole[split].pop("stopped").startswith("trained 2 epochs, as many as were asked for; kept: epoch")
        assert {k: again[k] for k in whole[split]} == whole[split]
        assert (again["data"], again["split"]) == ("SyntheticMIMICIV", split)
        scores(again)
        table = pl.read_parquet(Path(split, "predictions.parquet"))
        assert table.columns == COLUMNS
        assert table.equals(written.filter(pl.col("split") == split).sort("stay_id", "minute"))


def test_evaluate_on_all_stays_and_another_root(trained: Path, mimic: Path, tmp_path: Path) -> None:
    other = tmp_path / "moved hospital"
    shutil.copytree(mimic, other)
    main(
        [
            "evaluate",
            "--ckpt",
            str(trained / "best.ckpt"),
            "--data.root",
            str(other),
            "--data.split",
            "all",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    table = pl.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert set(table["split"]) == {"train", "val", "test"}
    data = SyntheticMIMICIV(str(mimic))
    data.setup()
    assert table["stay_id"].to_list() == data.samples["stay_id"].sort().to_list()
    written = pl.read_parquet(trained / "predictions.parquet")
    both = table.join(written, on="stay_id", suffix="_written")
    assert both.height == written.height
    assert both["probability"].to_list() == pytest.approx(both["probability_written"].to_list(), abs=1e-6)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == len(table)


def test_evaluate_never_overwrites_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "metrics.json").read_bytes()
    assert "holds a training run" in refused(f"evaluate --ckpt {trained / 'best.ckpt'} --out {trained}", capsys)
    assert (trained / "metrics.json").read_bytes() == before


def rewrite(path: Path, change: Any) -> None:
    import gzip

    table = change(pl.read_csv(path, infer_schema=False))
    path.write_bytes(gzip.compress(table.write_csv().encode()))


def test_finetune_takes_eicu_when_only_its_root_is_given(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ehr(f"finetune --ckpt {trained / 'best.ckpt'} --data.root {tmp_path / 'nowhere'} --out {tmp_path / 'tuned'}")
    assert "expected the files of EICU" in capsys.readouterr().err


def test_predict_scores_every_stay_unless_told_otherwise(trained: Path, tmp_path: Path) -> None:
    """New patients belong to no split: with the data of the checkpoint, with named data and with another root, all are scored."""
    source = read(trained / "best.ckpt")["ehr"]["data"]["arguments"]["root"]
    table = tmp_path / "risk.parquet"
    sizes = []
    for data in ("", f"--data.root {source}", f"--data MIMICIV --data.root {source}", "--data.split test"):
        ehr(f"predict --ckpt {trained / 'best.ckpt'} {data} --out {table}")
        sizes.append(pl.read_parquet(table)["stay_id"].n_unique())
    assert sizes[0] == sizes[1] == sizes[2] > 2 * sizes[3] > 0


def test_predict_needs_no_outcomes(trained: Path, mimic: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    shutil.copytree(mimic, new)
    rewrite(new / "hosp/admissions.csv.gz", lambda t: t.drop("deathtime", "hospital_expire_flag", "dischtime"))
    rewrite(new / "hosp/patients.csv.gz", lambda t: t.drop("dod"))
    ehr(f"predict --ckpt {trained / 'best.ckpt'} --data.root {new} --data.split all --out {tmp_path / 'new.parquet'}")
    ehr(f"evaluate --ckpt {trained / 'best.ckpt'} --data.split all --out {tmp_path / 'known'}")
    new_table, known = (
        pl.read_parquet(tmp_path / "new.parquet"),
        pl.read_parquet(tmp_path / "known" / "predictions.parquet"),
    )
    assert new_table.columns == ["stay_id", "patient_id", "minute", "probability", "alert"]
    both = known.join(new_table, on=["stay_id", "minute"], suffix="_new")
    assert both.height == known.height
    assert both["probability"].equals(both["probability_new"], check_names=False)
    threshold = read(trained / "best.ckpt")["ehr"]["threshold"]
    assert new_table["alert"].equals(new_table["probability"] >= threshold, check_names=False)


def test_zero_shot_and_fine_tuned_are_scored_on_the_same_patients(trained: Path, eicu: Path) -> None:
    folder = trained / "finetune-SyntheticEICU"
    zero = pl.read_parquet(folder / "zero_shot.parquet")
    tuned = pl.read_parquet(folder / "predictions.parquet").filter(pl.col("split") == "test").sort("stay_id")
    same = ["stay_id", "patient_id", "minute", "target", "split"]
    assert zero.select(same).equals(tuned.select(same))
    assert set(zero["split"]) == {"test"}
    assert not zero["probability"].equals(tuned["probability"])
    source, target = (read(f / "best.ckpt")["ehr"] for f in (trained, folder))
    assert source["spec"] == target["spec"]  # scaler, variables, task
    assert source["pos_weight"] == target["pos_weight"]
    assert target["data"]["class"] == "SyntheticEICU"
    zero_scores = json.loads((folder / "zero_shot.json").read_text())
    assert zero_scores["threshold"] == source["threshold"]
    assert zero_scores["n"] == len(zero)


def test_nothing_of_the_target_is_fitted(trained: Path, eicu: Path, tmp_path: Path) -> None:
    """Zero-shot probabilities stay the same when every other stay of the target is taken away."""
    zero = pl.read_parquet(trained / "finetune-SyntheticEICU" / "zero_shot.parquet")
    few = tmp_path / "few"
    shutil.copytree(eicu, few)
    rewrite(
        few / "patient.csv.gz",
        lambda t: t.filter(pl.col("patientunitstayid").cast(pl.Int64).is_in(zero["stay_id"].to_list())),
    )
    ehr(
        f"evaluate --ckpt {trained / 'best.ckpt'} --data SyntheticEICU --data.root {few} --data.split all --out {tmp_path / 'out'}"
    )
    assert pl.read_parquet(tmp_path / "out" / "predictions.parquet").equals(zero)


def test_finetune_from_a_checkpoint(
    trained: Path, eicu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"finetune --ckpt {trained / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --epochs 2 --out {tmp_path / 'ft'}"
    ehr(line)
    said = capsys.readouterr().out
    assert "zero-shot" in said
    assert "fine-tuned" in said
    folder = trained / "finetune-SyntheticEICU"  # `train --finetune` is the same thing
    for name in ("zero_shot.parquet", "predictions.parquet"):
        assert pl.read_parquet(tmp_path / "ft" / name).equals(pl.read_parquet(folder / name))
    one, two = read(tmp_path / "ft" / "last.ckpt"), read(folder / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(one["state_dict"].values(), two["state_dict"].values(), strict=True))
    again = configuration(f"finetune -c {tmp_path / 'ft' / 'config.yaml'}", capsys)  # it is a configuration itself
    assert (again["epochs"], again["data"]["class_path"]) == (2, "datamodules.SyntheticEICU")
    said = refused(f"finetune --ckpt {trained / 'best.ckpt'} --data SyntheticEICU --data.root {eicu}", capsys)
    assert "holds a run with another configuration" in said and "--epochs: 2 there, 10 here" in said


def test_fine_tuning_uses_dropout(trained: Path) -> None:
    """Without dropout, which a loaded model has turned off, the training loss of each epoch would repeat exactly at rate 0."""
    source = read(trained / "best.ckpt")
    assert source["ehr"]["arguments"]["dropout"] > 0
    from ehrmodels import load
    from experiments import fit

    seen = []

    class Stop(Exception):
        pass

    class Spy:
        global_rank, world_size, strategy = 0, 1, SimpleNamespace(launcher=None)

        def fit(self, model: ICUModule, *_: Any, **__: Any) -> None:
            seen.append(all(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout)))
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.Trainer", lambda **_: Spy())
        with pytest.raises(Stop):
            fit.fit(
                trained / "nowhere",
                load(trained / "best.ckpt"),
                SyntheticEICU(),
                fit.Recipe({}, 0, "val_loss", 1, 10.0),
                None,
            )
    assert seen == [True]


def test_a_finished_run_is_reported_again_without_training(
    trained: Path, mimic: Path, eicu: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "runs" / "trained"
    shutil.copytree(trained, copy)
    text = (copy / "config.yaml").read_text().replace(str(trained.parent), str(tmp_path / "runs"))
    (copy / "config.yaml").write_text(text)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.suffix in (".json", ".csv", ".parquet")}
    stamp = (copy / "last.ckpt").stat().st_mtime_ns
    ehr(f"train -c {copy / 'config.yaml'}")
    assert {p: p.read_bytes() for p in before} == before
    assert (copy / "last.ckpt").stat().st_mtime_ns == stamp
    assert not list(copy.rglob("*.tmp"))


def test_hourly_task_end_to_end(mimic: Path, tmp_path: Path) -> None:
    line = f"train {TINY} --data MIMICIV --data.root {mimic} --data.task mortality_24h --data.hours 12 --data.rolling true --data.statics age,sex"
    ehr(f"{line} --data.batch_size 256 --data.window 6 --runs {tmp_path} --name hourly")
    table = pl.read_parquet(tmp_path / "hourly" / "predictions.parquet")
    assert (table["minute"] % 60 == 0).all()
    assert table["minute"].min() == 12 * 60
    assert table["stay_id"].n_unique() < len(table) / 5
    assert read(tmp_path / "hourly" / "best.ckpt")["ehr"]["spec"]["statics"][:3] == ["age", "sex", "hours in the ICU"]
    assert (tmp_path / "hourly" / "report.html").exists()


def test_checkpoint_of_changed_score_switches_loads(trained: Path) -> None:
    """Every argument of the data becomes plain types in a checkpoint."""
    from datamodules.derive.sofa import Switches
    from experiments.run_directory import configuration

    for data in (
        EICU(sofa=Switches()),
        MIMICIV(statics=["age"]),
        PhysioNet2012(),
        PhysioNet2019(systems="A"),
        SyntheticEICU(),
    ):
        arguments = configuration(None, {"data": data}, {})["data"]["init_args"]
        assert json.loads(json.dumps(arguments)) == arguments


def test_wandb_missing(
    mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = refused(
        f"train {TINY} --data MIMICIV --data.root {mimic} --runs {tmp_path} --name w --wandb offline", capsys
    )
    assert "--wandb needs the package wandb: install it with pip install 'ehr[wandb]'" in said
    assert not (tmp_path / "w").exists()


def test_wandb_offline(mimic: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    line = f"train {TINY} --data MIMICIV --data.root {mimic} --runs {tmp_path} --name w --wandb offline"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *line.split()],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1],
        env={**os.environ, "WANDB_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path / "wandb-config"), "WANDB_CACHE_DIR": str(tmp_path / "wandb-cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "w").rglob("*.wandb")
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)]
    said = json.loads(subprocess.run(reader, check=True, capture_output=True, text=True).stdout)
    assert said["run_id"] == (tmp_path / "w" / "wandb_id").read_text() and said["state"] == "finished"
    assert said["config"]["model"]["init_args"]["width"] == 16 and said["console"] == []
    epochs, scores = (
        pl.read_csv(tmp_path / "w" / "metrics.csv"),
        json.loads((tmp_path / "w" / "metrics.json").read_text()),
    )
    assert said["summary"]["val_auroc_auprc"]["max"] == epochs["val_auroc_auprc"].max()
    assert said["summary"]["test/auroc"] == scores["test"]["auroc"]["value"]


def test_wandb_disabled_needs_no_package(mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    ehr(f"train {TINY} --data MIMICIV --data.root {mimic} --runs {tmp_path} --name w --wandb online")
    assert (tmp_path / "w" / "metrics.json").exists() and not (tmp_path / "w" / "wandb").exists()


def test_classes_offered_are_those_of_the_package() -> None:
    from experiments.mistakes import classes
    from experiments.train import train

    offered = classes(train)
    assert set(offered["model"]) >= {Fusion.__name__}
    for kind in (EICU, MIMICIV, PhysioNet2012, PhysioNet2019, SyntheticEICU, SyntheticMIMICIV):
        assert "hours" in offered["data"][kind.__name__]
        assert "root" in offered["finetune"][kind.__name__]
