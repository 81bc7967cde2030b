"""``ehr benchmark``: what it composes and refuses, and that nothing is missing or trained twice whatever is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from filelock import FileLock
from test_cli import refused
from test_study import eventually

from datamodules import SyntheticMIMICIV
from experiments import benchmark as module
from experiments import trainings
from experiments.benchmark import benchmark, composed
from experiments.benchmarks.check_sweep import workers
from experiments.cli import main
from experiments.trainings import Training, work

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"


def file_of(folder: Path, mimic: Path, **more: Any) -> Path:
    """A benchmark of two tiny models and two seeds."""
    small = {"summary": False, "members": 2}
    tiny = {"class_path": "Fusion", "trainer": {"max_epochs": 3}}
    content = {
        "models": {
            "a": {**tiny, "init_args": {"width": 8, **small}},
            "b": {**tiny, "init_args": {"width": 16, **small}, "batch_size": 16},
        },
        "seeds": [0, 1],
        "data": {"simulated": {"class_path": "SyntheticMIMICIV", "init_args": {"root": str(mimic)}}},
        "runs": str(folder / "runs"),
        **more,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let commands work without processes of their own; gives what each found left to do."""
    began: list[list[str]] = []

    def run(self: Any, standing: Any, total: int, what: str) -> None:
        began.append([str(t) for t in self.order["trainings"] if not t.ended()])
        work({**self.order, "parent": os.getppid()})

    monkeypatch.setattr(trainings.Workers, "run", run)
    return began


@pytest.fixture(scope="module")
def killed(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Folder of a benchmark whose worker and command were killed, and when each run that had ended before was scored."""
    home = tmp_path_factory.mktemp("benchmark")
    command = [
        sys.executable,
        "-P",
        "-m",
        "experiments.cli",
        "benchmark",
        "-c",
        str(file_of(home, mimic)),
        "--workers",
    ]
    folder = home / "runs" / "tiny"
    with (home / "output").open("w") as output:
        process = subprocess.Popen([*command, "1"], stdout=output, stderr=output)
        eventually(lambda: list(folder.glob("*/*/metrics.csv")) or process.poll() is not None, 120)
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        eventually(lambda: list(folder.glob("*/*/metrics.json")) or process.poll() is not None, 120)
        victims = [*workers(process.pid), process.pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.wait()
        scored = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/*/metrics.json")}
        with contextlib.redirect_stdout(output):
            main([*command[4:], "2"])
    return folder, scored


def test_nothing_is_missing_or_trained_twice(killed: tuple[Path, dict[str, int]]) -> None:
    folder, scored = killed
    assert 1 <= len(scored) < 4
    names = {f"{model}-{seed}" for model, seed in product("ab", (0, 1))}
    assert {path.name for path in (folder / "simulated").iterdir()} == names
    for name in names:
        run = folder / "simulated" / name
        assert pl.read_csv(run / "metrics.csv")["epoch"].to_list() == [0, 1, 2]
        state = json.loads((folder / "queue" / "simulated" / f"{name}.json").read_text())
        assert state["minutes"] > 0 and state["failed"] is None
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["seed"] == int(name[-1]) and config["model"]["init_args"]["width"] == {"a": 8, "b": 16}[name[0]]
        assert config["data"]["init_args"]["batch_size"] == {"a": 64, "b": 16}[name[0]]
    for name, when in scored.items():
        assert (folder / "simulated" / name / "metrics.json").stat().st_mtime_ns == when, f"{name} was done again"


def test_it_ends_in_the_table_of_compare(killed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    folder, _ = killed
    table = pl.read_csv(folder / "benchmark.csv")
    assert table.select("data", "split", "model", "seeds").rows() == [("simulated", "test", m, "0, 1") for m in "ab"]
    assert table["minutes"].min() > 0 and table["auroc_difference"][0] is None
    main(
        ["compare", *(str(folder / "simulated" / f"{m}-{s}") for m, s in product("ab", (0, 1))), "--out", str(tmp_path)]
    )
    again = pl.read_csv(tmp_path / "compare.csv")
    for column in ("n", "events", "auroc", "auroc_sd", "auroc_p", "auprc_low", "auprc_difference_high"):
        assert table[column].equals(again[column]), column
    assert (folder / "benchmark.png").stat().st_size > 10_000
    output = (folder.parents[1] / "output").read_text()
    assert "simulated/b-1  test AUROC" in output and "AUROC less a" in output


def test_the_same_command_trains_what_was_added_alone(
    killed: tuple[Path, dict[str, int]], mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = killed
    began = in_this_process(monkeypatch)
    arguments = yaml.safe_load(file_of(tmp_path, mimic, runs=str(folder.parent)).read_text())
    assert len(benchmark(**arguments, name="tiny")) == 2 and began == []
    arguments["models"]["c"] = {"class_path": "Fusion", "init_args": {"width": 24}, "trainer": {"max_epochs": 1}}
    table = benchmark(**{**arguments, "seeds": [0], "reference": "b"}, name="tiny")
    assert began == [["simulated/c-0"]]
    assert table["model"].to_list() == ["a", "b", "c"] and table["auroc_difference"][1] is None
    arguments["models"]["a"]["init_args"]["width"] = 16
    with pytest.raises(
        ValueError, match=r"(?s)a-0 was begun with another configuration.*--model.width: 8 there, 16 here"
    ):
        benchmark(**arguments, name="tiny")


def test_folds_score_every_patient_of_the_training_split_once(
    mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    models = {
        "lightgbm": {"class_path": "LightGBM", "init_args": {"rounds": 20}},
        "linear": {"class_path": "LogisticRegression"},
    }
    data = {"simulated": {"class_path": "SyntheticMIMICIV", "init_args": {"root": str(mimic)}}}
    table = benchmark(models, data, seeds=[0], folds=2, name="cv", runs=str(tmp_path))
    hospital = SyntheticMIMICIV(str(mimic))
    hospital.setup()
    train = hospital.rows("train")
    assert table.select("model", "split", "n", "events").rows() == [
        (model, "train, 2 folds", len(train), int(hospital.targets("train").sum())) for model in models
    ]
    folds = [tmp_path / "cv" / "simulated" / f"lightgbm-0-fold-{k}-of-2" / "predictions.parquet" for k in (1, 2)]
    stays = pl.concat(pl.read_parquet(path).filter(split="val") for path in folds)["stay_id"]
    assert sorted(stays) == sorted(hospital.samples["stay_id"].gather(train))


def test_one_that_fails_is_told_and_tried_again(mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = in_this_process(monkeypatch)
    arguments = yaml.safe_load(file_of(tmp_path, mimic, seeds=[0]).read_text())
    for model in arguments["models"].values():
        model["trainer"] = {"max_epochs": 1}
    arguments["models"]["b"]["init_args"]["learning_rate"] = 1e30
    message = (
        r"(?s)1 of 2 trainings failed:.*simulated/b-0  failed: the loss is not a number any more.*tries them again"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            benchmark(**arguments)
    assert began == [["simulated/a-0", "simulated/b-0"], ["simulated/b-0"]]
    folder = tmp_path / "runs" / "benchmark"
    assert pl.read_csv(folder / "benchmark.csv")["model"].to_list() == ["a"]


def test_a_process_leaves_what_another_has_and_gives_up_what_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (Training(str(tmp_path), f"d/{name}-0") for name in "ab")
    one.begin({"model": {"class_path": "Fusion"}, "data": {"class_path": "SyntheticMIMICIV"}}, "")
    two.begin({"model": {"class_path": "Fusion"}, "data": {"class_path": "SyntheticMIMICIV"}}, "")
    order = {"name": "n", "trainings": [one, two], "parent": os.getppid()}
    tried: list[str] = []

    class Killed(BaseException):
        """As good as kill -9: nothing is written after it."""

    def dies(_: str, arguments: list[str]) -> Any:
        tried.append(Path(arguments[1]).stem)
        raise Killed

    monkeypatch.setattr(trainings.cli, "configured", dies)
    held = FileLock(one.queued("lock"))
    with held:
        for _ in range(trainings.ATTEMPTS):
            with pytest.raises(Killed):
                work(order)
        monkeypatch.setattr(trainings.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # it would wait for the other process
            work(order)
    assert tried == ["b-0"] * trainings.ATTEMPTS
    assert "was killed 5 times in the same epoch" in two.state()["failed"] and not one.ended()
    two.begin(yaml.safe_load(two.queued("yaml").read_text()), "")
    assert two.state()["failed"] is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("benchmark_*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_benchmark_is_made_of_trainings(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    for (of, section), (model, entry) in product(said["data"].items(), said["models"].items()):
        made = module._tried(model, of, composed(model, entry, of, section))
        assert made["data"].name == section["class_path"]
    assert said["reference"] in said["models"]


def test_of_a_file_all_but_its_data_is_used() -> None:
    config = composed("h", "hymate_physionet2012", "d", {"class_path": "PhysioNet2012", "init_args": {"sets": "b"}})
    file = yaml.safe_load((CONFIGS / "hymate_physionet2012.yaml").read_text())
    assert {k: config[k] for k in ("model", "trainer")} == {k: file[k] for k in ("model", "trainer")}
    assert config["data"] == {
        "class_path": "PhysioNet2012",
        "init_args": {"sets": "b", "batch_size": 64, "thinning": 0.3},
    }


@pytest.mark.parametrize(
    ("models", "more", "words"),
    [
        ("{}", {}, "--models is empty"),
        ("{a: nix}", {}, "models.a: no file nix, and none of that name is shipped"),
        ("{a: sweep_demo}", {}, "is no file of ehr train"),
        ("{a/b: demo}", {}, "expected a name that a folder can have"),
        ("{a: {class_path: Fusio}}", {}, "--model Fusio is not known; did you mean Fusion?"),
        ("{a: {class_path: Fusio}}", {}, "that was models.a on data.d"),
        ("{a: {class_path: Fusion, init_args: {width: 3}}}", {}, "models.a on data.d: --model.width must be"),
        ("{a: {class_path: Fusion, seed: 1}}", {}, "seed is not for a model to say"),
        ("{a: {class_path: Fusion, trainer: {devices: 2}}}", {}, "one training runs on one device"),
        ("{a: {class_path: Fusion, operating_point: utility}}", {}, "utility is defined for hourly sepsis"),
        ("{a: {class_path: HyMaTEForecast}}", {}, "models.a predicts no outcome"),
        ("{a: demo}", {"--folds": "1"}, "--folds must be 0 or at least 2, found 1"),
        ("{a: demo}", {"--seeds": "[0, 0]"}, "--seeds: expected different numbers of at least 0, found [0, 0]"),
        ("{a: demo}", {"--workers": "0"}, "--workers must be at least 1"),
        ("{a: demo}", {"--reference": "b"}, "--reference b is none of the models: choose among a"),
        ("{a: demo}", {"--data": "{d: {root: x}}"}, "data.d: expected class_path and init_args"),
    ],
)
def test_what_is_refused(
    models: str, more: dict[str, str], words: str, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"{{d: {{class_path: SyntheticMIMICIV, init_args: {{root: {mimic}}}}}}}"
    options = {"--models": models, "--data": data, "--runs": str(tmp_path / "runs"), **more}
    assert words in refused(["benchmark", *(word for pair in options.items() for word in pair)], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_command_in_the_background_can_be_ended(tmp_path: Path, mimic: Path) -> None:
    """A shell starts it with Ctrl-C ignored, and so are its workers."""
    training = Training(str(tmp_path), "d/a-0")
    training.begin({"model": {"class_path": "Fusion"}, "data": {"class_path": "SyntheticMIMICIV"}}, "")
    code = (
        "from pathlib import Path; from experiments.trainings import Training, complete; "
        f"complete(Path({str(tmp_path)!r}), [Training({str(tmp_path)!r}, 'd/a-0')], 1)"
    )
    with FileLock(training.queued("lock")):  # the worker waits for it
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.DEVNULL,
        )
        (worker,) = eventually(lambda: workers(process.pid), 60)
        eventually(lambda: _handles(worker, signal.SIGINT), 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) != 0
        eventually(lambda: not Path(f"/proc/{worker}").exists(), 5)


def _handles(process: int, number: int) -> bool:
    caught = next(
        line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt")
    )
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_transfer_carries_every_model_to_every_other_data_set(
    mimic: Path, eicu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    data = {
        "mimic": {"class_path": "SyntheticMIMICIV", "init_args": {"root": str(mimic)}},
        "eicu": {"class_path": "SyntheticEICU", "init_args": {"root": str(eicu)}},
    }
    models = {"trees": {"class_path": "LightGBM", "init_args": {"rounds": 10}}}
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump({"models": models, "data": data, "seeds": [0]}))
    line = f"benchmark -c {path} --runs {tmp_path} --workers 1"
    main(f"{line} --transfer finetune".split())
    table = pl.read_csv(tmp_path / "both" / "benchmark.csv")
    for source, target in (("mimic", "eicu"), ("eicu", "mimic")):
        rows = table.filter(data=f"{source}-to-{target}")
        assert rows["model"].to_list() == ["trees, finetune", "trees, trained there", "trees, zero_shot"]
        own = table.filter(data=target)
        assert rows["auroc"][1] == pytest.approx(own["auroc"][0])  # the same patients and model
        zero = tmp_path / "both" / f"{source}-to-{target}" / "trees-0-zero_shot"
        assert json.loads((zero / "metrics.json").read_text())["test"]["auroc"]["value"] == pytest.approx(
            rows["auroc"][2]
        )
    assert "mimic to eicu, test split" in capsys.readouterr().out
    assert "head is for networks" in refused(f"{line} --transfer head", capsys)
    assert "give at least two, and leave --folds out" in refused(f"{line} --transfer finetune --folds 2", capsys)
