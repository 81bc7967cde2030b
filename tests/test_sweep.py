"""``ehr sweep``: what it refuses, how a trial ends, and a sweep whose workers are killed."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import polars as pl
import pytest
import torch
import yaml
from optuna.trial import TrialState
from test_cli import refused
from test_study import SETTINGS, claimed, eventually

from ehrmodels import load
from experiments import cli, distributed, fit, processes, resume, train
from experiments.benchmarks.check_sweep import ranks as ranks_of
from experiments.benchmarks.check_sweep import workers
from experiments.cli import main
from experiments.sweep import command, ranks, worker
from experiments.sweep import report as sweep_report
from experiments.sweep.space import check_names
from experiments.sweep.study import Study

LINE = "sweep --model Fusion --model.width 8 --model.summary false --model.members 2 --data SyntheticMIMICIV --data.root {} --runs {} --trainer.max_epochs 3 --name s --trials 4"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{model.lerning_rate: [0.1]}", "unknown option --model.lerning_rate; did you mean --model.learning_rate?"),
        ("{model.width: [8, wide]}", "--model.width: expected int, found wide"),
        (
            "{model.learning_rate: {low: -1.0, high: 1.0}}",
            "--model.learning_rate must be a finite number of at least 0, found -1.0",
        ),
        ("{model.dropout: {low: 0.5, high: 0.1}}", "--space model.dropout: `low <= high` must hold"),
        ("{model.dropout: {low: a, high: b}}", "--space model.dropout: low and high must be numbers"),
        (
            "{model.dropout: 0.1}",
            "--space model.dropout: expected a list of choices, or low and high, with log or step, found 0.1",
        ),
        ("{model.dropout: [[1]]}", "--space model.dropout: choices must be numbers, words, true, false or null"),
        ("{}", "--space is empty"),
        ("{monitor: [val_loss]}", "--space monitor cannot be searched: trials are compared by one metric"),
    ],
)
def test_bad_space(space: str, message: str, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([*LINE.format(mimic, tmp_path / "runs").split(), "--space", space], capsys)
    assert message in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--storage sqlite:///a.db", "expected a journal file, or postgresql://user@host/database"),
        ("--storage postgresql://u:secret@127.0.0.1:1/db", "postgresql://u:***@127.0.0.1:1/db cannot be reached"),
        (
            "--trainer.devices auto",
            "--trainer.devices must be the number of devices of each trial in a sweep, found auto",
        ),
        ("--trainer.devices 2 --trainer.num_nodes 2", "the devices of a trial are those of one machine"),
        ("--workers 0", "--trials and --workers must be at least 1"),
        ("--data.root nowhere", "no folder nowhere"),
        ("--finetune EICU", "unknown option --finetune"),
    ],
)
def test_bad_sweep(more: str, message: str, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "nowhere" in more:
        more += " --data MIMICIV"
    said = refused(
        [*LINE.format(mimic, tmp_path / "runs").split(), "--space", "{model.width: [8]}", *more.split()], capsys
    )
    assert message in said and "secret" not in said


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("monitor", "one metric"),
        ("name runs config resume", "where each trial lies"),
        ("wandb", "the same for all trials"),
        ("seed", "a lucky seed is no setting"),
        ("finetune finetune_epochs finetune-learning-rate finetune.hours", "fine-tune what the sweep has found"),
        ("data data.class_path data.task data.init_args.task", "one sweep for each"),
        (
            "data.split data.split_by data.seed data.fold data.init_args.seed data.sets data.root data.cache",
            "the same patients",
        ),
        (
            "data.hours data.window data.rolling data.lead data.after_onset data.sepsis data.definition",
            "which patients",
        ),
        (
            "data.sofa data.sofa.gcs_intubated data.min_age data.first_stay data.min_icu_hours data.labs",
            "which patients",
        ),
        ("trainer.devices trainer.num_nodes trainer.strategy", "on how many devices a trial runs is no setting"),
        ("trainer.logger trainer.callbacks", "the training sets it itself"),
        ("trainer.limit_val_batches trainer.overfit_batches", "the same patients"),
    ],
)
def test_what_must_not_be_searched(names: str, reason: str) -> None:
    for name in names.split():
        with pytest.raises(ValueError, match=f"--space {name} cannot be searched: .*{reason}"):
            check_names({name: [1]})


def test_what_may_be_searched() -> None:
    names = ["model", "model.width", "data.batch_size", "data.treatment", "trainer.max_epochs", "patience"]
    check_names(dict.fromkeys(names))


# ---- the processes -----------------------------------------------------------------------------------------------------------


def test_a_command_reads_the_last_error_of_its_own_workers(tmp_path: Path) -> None:
    (tmp_path / "worker-elsewhere-1-0.log").write_text("ehr: what another command's worker said\n")
    workers = processes.Workers("experiments.sweep.worker", {"folder": str(tmp_path)}, 1)
    workers.log(0).write_text("a line\nehr: no such folder\n")
    workers.processes[0] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    workers.processes[0].wait()
    with pytest.raises(ValueError, match=r"^no such folder$"):
        workers._replace_lost()


def test_cores_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert processes._cores() == os.cpu_count()


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "workers", "found"),
    [
        (8, "auto", 2, 4, (2, 4)),
        (8, "auto", 3, None, (3, 2)),
        (8, "auto", 1, 16, (1, 16)),  # GPUs may be shared by trials of one
        (2, "cpu", 2, 3, (2, 3)),
        (0, "auto", 2, None, (2, 1)),
        (8, "auto", 2, 5, "5 workers with 2 devices a trial need 10 GPUs, and 8 are here: lower --workers or"),
        (1, "auto", "2", None, "1 worker with 2 devices a trial need 2 GPUs, and 1 is here"),
    ],
)
def test_trials_share_the_gpus_of_a_machine(
    gpus: int, accelerator: str, devices: Any, workers: int | None, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    trainer = {"devices": devices, "accelerator": accelerator}
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            command.shares(trainer, workers)
    else:
        assert command.shares(trainer, workers) == found


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="give the command without torchrun"):
        command.shares({"devices": 2}, None)


def test_every_worker_has_devices_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Process:
        stdin = io.BytesIO()

        def __init__(self, *_: Any, env: dict[str, str], **__: Any):
            started.append(env["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(Process.stdin, "close", lambda: None, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3,5,6,7")
    for each, expected in ((2, ["1,2", "3,5", "6,7"]), (1, ["1", "2", "3"])):
        group = processes.Workers("experiments.sweep.worker", {"folder": str(tmp_path)}, 3, each)
        for index in range(3):
            group.start(index)
        assert started == expected
        started.clear()


# ---- a trial on several devices ----------------------------------------------------------------------------------------------


def test_a_trial_of_two_ranks_that_loses_one_goes_on_and_is_pruned(mimic: Path, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    line = LINE.format(mimic, tmp_path).removeprefix("sweep ").removesuffix(" --name s --trials 4")
    more = "--name trial-0000 --data.split val --trainer.devices 2 --trainer.accelerator cpu --wandb offline"
    told: list[int] = []

    def report(epoch: int, row: dict[str, float]) -> None:
        told.append(epoch)
        running = sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)
        if told == [0, 1]:
            assert len(running) == 2 and row["val_loss"] > 0
            running[1].kill()
        if epoch == 2:
            raise optuna.TrialPruned

    for reason in (ranks.RankLostError, optuna.TrialPruned):
        with pytest.raises(reason):
            ranks.train_on(2, f"{line} {more} --trainer.max_epochs 9".split(), fit.Trial("s", 0, {}, report))
        assert not multiprocessing.active_children()
    assert told == [0, 1, 1, 2]
    run = tmp_path / "trial-0000"
    assert pl.read_csv(run / "metrics.csv")["epoch"].to_list() == [0, 1, 2]
    (record,) = run.rglob("*.wandb")  # of the first process, which began with what was logged before
    assert json.loads(_reader("--summary", "--json", str(record)))["summary"]["state"] == "pruned"
    assert (run / "run.log").read_text().count("epoch   2") == 1


@pytest.mark.parametrize(
    ("words", "raised"),  # what ranks say, and which
    [
        ([(1, None), (0, (0, {})), (0, None)], None),
        ([(0, (0, {})), (0, (1, {})), (0, optuna.TrialPruned())], optuna.TrialPruned),
        ([(1, ValueError("out of memory")), (0, "gone")], ValueError),  # the first notices that the second is gone
        ([(0, "gone"), (1, OSError(28, "No space left on device"))], OSError),
        ([(1, "gone")], ranks.RankLostError),
    ],
)
def test_the_first_word_ends_a_trial(words: list[tuple[int, Any]], raised: type[Exception] | None) -> None:
    pairs = [multiprocessing.Pipe() for _ in range(2)]
    for rank, word in words:
        pairs[rank][1].close() if word == "gone" else pairs[rank][1].send(word)
    told: list[int] = []

    def report(epoch: int, row: dict[str, float]) -> None:
        told.append(epoch)
        if epoch:
            raise optuna.TrialPruned

    lines = [mine for mine, _ in pairs]
    with pytest.raises(raised) if raised is ranks.RankLostError else contextlib.nullcontext():
        word, speaker = ranks._listen(lines, fit.Trial("s", 0, {}, report))
        by = next((rank for rank, word in words if isinstance(word, Exception)), 0)
        assert type(word) is (raised or type(None)) and speaker is lines[by]
    epochs = [word[0] for _, word in words if isinstance(word, tuple)]
    assert told == epochs
    assert [pairs[0][1].recv() for _ in epochs] == [epoch == 0 for epoch in epochs]


def test_what_a_report_raises_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def all_gather(value: Any) -> list[Any]:
        said.append(value)
        return [said[0], None]  # what the first process said

    def report(epoch: int, row: dict[str, float]) -> None:
        raise optuna.TrialPruned(f"pruned after epoch {epoch}")

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    epochs = resume.Epochs(Path("metrics.csv"), 0, Path("last.ckpt"), 10, report)
    for first in (True, False):
        with pytest.raises(optuna.TrialPruned, match="pruned after epoch 3"):
            epochs._tell(report, SimpleNamespace(current_epoch=3, is_global_zero=first), {})  # type: ignore[arg-type]
    assert said[1] is None


def test_a_trial_that_was_begun_on_other_devices_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    run = tmp_path / "trial-0000"
    run.mkdir()

    @functools.wraps(train.train)
    def look(**_: Any) -> None:
        seen.append({path.name for path in run.iterdir()} - {"run.lock"})
        raise optuna.TrialPruned

    monkeypatch.setattr(train, "train", look)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"model": "Fusion", "data": "SyntheticMIMICIV", "trainer": {}}))
    for begun in (2, 1):
        (run / "config.yaml").write_text(f"trainer: {{devices: {begun}}}")
        for name in ("last.ckpt", "metrics.csv", "wandb_id"):
            (run / name).write_text("")
        one = Study("s", str(tmp_path / f"{begun}.journal"), SETTINGS)
        order = {"name": "s", "folder": str(tmp_path), "parent": os.getppid(), "devices": 1, "batch_size": 16}
        worker.attempt(one, claimed(one, 1), {**order, "terms": {**SETTINGS, "monitor": "val_auroc"}})
    assert seen == [{"wandb_id"}, {"config.yaml", "last.ckpt", "metrics.csv", "wandb_id"}]


# ---- one trial ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "state", "reason", "leaves"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            TrialState.FAIL,
            cli.NO_MEMORY,
            SystemExit,
        ),
        (MemoryError(), TrialState.FAIL, cli.NO_MEMORY, SystemExit),
        (ValueError("the loss is not a number any more"), TrialState.FAIL, "the loss is not a number any more", None),
        (
            RuntimeError("CUDA error: device-side assert"),
            TrialState.FAIL,
            "RuntimeError: CUDA error: device-side assert",
            SystemExit,
        ),
        (optuna.TrialPruned(), TrialState.PRUNED, None, None),
        (KeyboardInterrupt(), TrialState.RUNNING, None, KeyboardInterrupt),
        (OSError(28, "No space left on device"), TrialState.RUNNING, None, OSError),
        (ranks.RankLostError("a process of the trial was killed"), TrialState.RUNNING, None, None),
    ],
)
def test_how_a_trial_ends(
    raised: BaseException,
    state: TrialState,
    reason: str | None,
    leaves: type[BaseException] | None,
    mimic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @functools.wraps(train.train)
    def fails(**_: Any) -> None:
        raise raised

    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({"model": "Fusion", "data": "SyntheticMIMICIV", "trainer": {"max_epochs": 1}})
    )
    monkeypatch.setattr(train, "train", fails)
    one = Study("s", str(tmp_path / "study.journal"), SETTINGS)
    trial = claimed(one, 1)
    order = {
        "name": "s",
        "folder": str(tmp_path),
        "parent": os.getppid(),
        "devices": 1,
        "batch_size": 16,
        "terms": {**SETTINGS, "monitor": "val_auroc"},
    }
    if leaves is None:
        worker.attempt(one, trial, order)
    else:
        with pytest.raises(leaves):
            worker.attempt(one, trial, order)
    if isinstance(raised, ranks.RankLostError):  # as if the process itself had been killed
        assert claimed(one, 1).number == 0 and one.trials()[0].user_attrs["lost"] == [0, 1]
    ended = one.trials()[0]
    assert ended.state == state and ended.user_attrs.get("reason") == reason
    config = yaml.safe_load(ended.user_attrs["config"])
    assert config["model"]["init_args"]["width"] == trial.params["model.width"]
    assert config["data"]["init_args"]["batch_size"] == 16


@pytest.mark.parametrize(
    ("table", "best"),
    [
        ("epoch,val_loss\n0,\n1,0.5\n2,\n3,0.4\n", 3),
        ("epoch,val_loss\n0,nan\n1,0.5\n2,-inf\n", 1),
        ("epoch,train_loss,val_loss\n0,1.0\n1,0.9,0.5\n", 1),
        ("epoch,val_loss\n0,\n1,\n", None),
        ("epoch,train_loss\n0,1.0\n", None),
    ],
)
def test_the_best_epoch_is_one_that_was_validated(table: str, best: int | None, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(table)
    if best is None:
        with pytest.raises(ValueError, match="no epoch has a value of val_loss"):
            worker._best_epoch(tmp_path / "metrics.csv", "val_loss")
    else:
        assert worker._best_epoch(tmp_path / "metrics.csv", "val_loss")["epoch"] == best


# ---- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(mimic: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Study folder of a sweep of which a worker was killed, logged offline to Weights & Biases; one choice makes the loss no number."""
    folder = tmp_path_factory.mktemp("sweep")
    space = "{model.learning_rate: [0.001, 0.01, 1.0e+30], model.dropout: {low: 0.0, high: 0.5}}"
    line = [
        *LINE.format(mimic, folder).split(),
        "--workers",
        "2",
        "--space",
        space,
        "--wandb",
        "offline",
        "--trials",
        "5",
    ]
    environment = {
        **os.environ,
        "WANDB_CONFIG_DIR": str(folder / "wandb-config"),
        "WANDB_CACHE_DIR": str(folder / "wandb-cache"),
    }
    here = folder / "experiments"  # a user's folder may be called so
    here.mkdir()
    (here / "sweep.py").write_text("raise SystemExit('not this one')")
    with (folder / "output").open("w") as output:
        code = [sys.executable, "-P", "-m", "experiments.cli"]
        process = subprocess.Popen([*code, *line], stdout=output, stderr=output, env=environment, cwd=folder)
        eventually(lambda: (folder / "s" / "trial-0000" / "metrics.csv").exists() or process.poll() is not None, 120)
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        assert process.wait(300) == 0, (folder / "output").read_text()
    return folder / "s"


def test_sweep_ends_with_every_trial(swept: Path, tmp_path: Path) -> None:
    table = pl.read_csv(swept / "trials.csv")
    assert table["trial"].to_list() == list(range(5))
    assert set(table["state"]) <= {"complete", "pruned", "fail"} and "complete" in table["state"].to_list()
    broken = table.filter(pl.col("model.learning_rate") == 1e30)
    assert len(broken) and all("the loss is not a number any more" in reason for reason in broken["reason"])
    output = (swept.parent / "output").read_text()
    assert "the loss is not a number any more" in output and f"next: ehr train -c {swept / 'best.yaml'}" in output
    for trial in table.filter(pl.col("state") == "complete").iter_rows(named=True):
        folder = Path(trial["run"])
        epochs = pl.read_csv(folder / "metrics.csv")
        assert epochs["epoch"].to_list() == list(range(len(epochs)))
        assert epochs["val_auroc_auprc"].max() == trial["val_auroc_auprc"]
        assert load(folder / "best.ckpt").learning_rate == trial["model.learning_rate"]
        assert json.loads((folder / "metrics.json").read_text()).keys() == {"val"}  # the test split is not looked at
    main(
        [
            "evaluate",
            "--ckpt",
            f"{Path(trial['run']) / 'best.ckpt'}",
            "--data.split",
            "test",
            "--out",
            str(tmp_path / "scores"),
        ]
    )
    assert (tmp_path / "sweep.png").exists() is False and (swept / "sweep.png").stat().st_size > 10_000


def test_best_is_reproduced_by_train(swept: Path, tmp_path: Path) -> None:
    table = pl.read_csv(swept / "trials.csv").filter(pl.col("state") == "complete")
    best = table.sort("val_auroc_auprc", descending=True).row(0, named=True)
    main(["train", "-c", str(swept / "best.yaml"), "--runs", str(tmp_path), "--name", "again"])
    again, before = (
        pl.read_csv(folder / "metrics.csv")["val_auroc_auprc"] for folder in (tmp_path / "again", Path(best["run"]))
    )
    np.testing.assert_allclose(again, before, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()).keys() == {"val", "test"}


def test_weights_and_biases_has_one_run_a_trial(swept: Path) -> None:
    """Read back with the library's own reader: also a trial that lost its process has one record of all its epochs."""
    pytest.importorskip("wandb")
    logs: dict[str, list[Path]] = {}
    for path in sorted(swept.rglob("*.wandb")):
        logs.setdefault(path.parents[2].name, []).append(path)
    assert set(logs) == {f"trial-{i:04d}" for i in range(5)}
    ids = set()
    for name, paths in logs.items():
        assert len(paths) == 1
        records = _inspected(paths[0])
        runs = [r["run"] for r in records if "run" in r]
        ids |= {run["run_id"] for run in runs}
        assert {(run["run_group"], run["job_type"]) for run in runs} == {("s", "trial")}
        assert all({"Fusion", "SyntheticMIMICIV", "s"} <= set(run["tags"]) for run in runs)
        summary = json.loads(_reader("--summary", "--json", str(paths[-1])))
        assert summary["config"]["trial"] == int(name[-4:]) and "model_learning_rate" in summary["config"]
        epochs = swept / name / "metrics.csv"
        if epochs.exists():
            history = [r["history"]["item"] for r in records if "history" in r]
            curve = {item["_step"]: item["val_auroc_auprc"] for item in history if "val_auroc_auprc" in item}
            assert len(history) == len(curve)
            assert curve == dict(pl.read_csv(epochs).select("epoch", "val_auroc_auprc").iter_rows())
    assert len(ids) == 5
    raw = b"".join(path.read_bytes() for paths in logs.values() for path in paths)
    assert b"stay_id" not in raw and b"patient_id" not in raw


def _reader(*arguments: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _inspected(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _reader("--json", str(path)).splitlines()]


def test_same_command_shows_the_summary_again_and_more_trials_go_on(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((swept / "train.yaml").read_text())
    study = optuna.load_study(
        study_name="s",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(swept / "study.journal"))
        ),
    )
    path = swept.parent / "again.yaml"
    path.write_text(
        yaml.safe_dump({**config, "space": study.user_attrs["space"], "name": "s", "runs": str(swept.parent)})
    )
    before = (swept / "best.yaml").read_bytes()
    main(["sweep", "-c", str(path), "--trials", "5"])
    assert "5 trials" in capsys.readouterr().out and (swept / "best.yaml").read_bytes() == before
    began: list[int] = []
    monkeypatch.setattr(processes.Workers, "run", lambda self, *_: began.append(self.order["trials"]))
    main(["sweep", "-c", str(path), "--trials", "9"])
    assert began == [9]


def test_epochs_without_validation_and_repeated_configurations(
    mimic: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 4 --trials 3 --space {model.width:[8]}"
    main([*LINE.format(mimic, tmp_path).split(), *more.replace(":", ": ", 1).split(maxsplit=7)])
    assert "2 repeated another's configuration and were not trained again" in capsys.readouterr().out
    table = pl.read_csv(tmp_path / "s" / "trials.csv")
    assert table["repeats"].to_list() == [None, 0, 0] and table["state"].to_list() == ["complete"] * 3
    epochs = pl.read_csv(tmp_path / "s" / "trial-0000" / "metrics.csv")["val_auroc_auprc"]
    assert table["val_auroc_auprc"].unique().to_list() == [epochs.max()]
    assert table["epochs"].to_list() == [2, 0, 0] and table["run"].n_unique() == 1
    assert {p.name for p in (tmp_path / "s").glob("trial-*")} == {"trial-0000"}


def test_workers_end_with_the_command(mimic: Path, trained: Path, tmp_path: Path) -> None:
    line = [
        *LINE.format(mimic, tmp_path).split(),
        "--space",
        "{model.dropout: {low: 0.0, high: 0.5}}",
        "--trainer.max_epochs",
        "1000",
        "--patience",
        "1000",
        *("--trainer.devices", "2", "--trainer.accelerator", "cpu"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    eventually(lambda: (tmp_path / "s" / "trial-0000" / "metrics.csv").exists(), 120)
    mine = workers(process.pid)
    trained_by = ranks_of(mine[0])
    assert len(mine) == 1 and len(trained_by) == 2
    process.kill()
    process.wait()
    eventually(lambda: not any(Path(f"/proc/{one}").exists() for one in [*mine, *trained_by]), 30)
    one = json.loads((tmp_path / "s" / "study.journal").read_text().splitlines()[0])
    assert one["study_name"] == "s"


def test_importance_needs_trials(tmp_path: Path) -> None:
    one = Study("s", str(tmp_path / "s.journal"), SETTINGS)
    for i in range(10):
        assert not one.importance()
        trial = claimed(one, 10)
        trial.set_user_attr("run", str(i))
        trial.set_user_attr("config", "data: {init_args: {split: val}}")
        one.report(trial, 0, trial.params["model.learning_rate"])
        one.end(trial, TrialState.COMPLETE, trial.params["model.learning_rate"])
    shares = one.importance()
    assert max(shares, key=lambda name: shares[name]) == "model.learning_rate" and abs(sum(shares.values()) - 1) < 1e-9
    (tmp_path / "train.yaml").write_text("data: {init_args: {split: test}}")
    sweep_report.summarise(one, tmp_path, "val_auroc_auprc", "s")
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["data"]["init_args"]["split"] == "test"
