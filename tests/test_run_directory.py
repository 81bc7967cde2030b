"""A run directory records what was resolved, belongs to one command at a time, and goes on with what cannot change a result."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from experiments import run_directory
from experiments.cli import main

TRAIN = "train --model Fusion --model.width 8 --model.summary false --model.members 2 --trainer.max_epochs 1"


@pytest.fixture
def line(mimic: Path, tmp_path: Path) -> str:
    data = f"--data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --name run"
    return f"{TRAIN} {data}"


@pytest.fixture(scope="module")
def trained_once(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    main(f"{TRAIN} --data SyntheticMIMICIV --data.root {mimic} --runs {runs} --name run".split())
    return runs / "run"


@pytest.fixture
def begun(line: str, trained_once: Path, tmp_path: Path) -> str:
    """The command ``line``, which has run."""
    shutil.copytree(trained_once, tmp_path / "run")
    return line


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_configuration_records_what_was_resolved_and_runs_again(begun: str, tmp_path: Path) -> None:
    text = (tmp_path / "run" / "config.yaml").read_text()
    stored = yaml.safe_load(text)
    assert stored["trainer"] == {
        "devices": 1, "max_epochs": 1, "gradient_clip_val": 1.0, "use_distributed_sampler": False, "precision": "32-true",
    }  # fmt: skip
    assert stored["seed"] == 0 and stored["monitor"] == "val_auroc_auprc"
    assert stored["data"]["init_args"]["hours"] == stored["data"]["init_args"]["window"] == 24
    assert "# code: ehr 0.1.0" in text and "# samples: " in text and "store SyntheticMIMICIV-" in text
    main(f"train -c {tmp_path / 'run' / 'config.yaml'} --runs {tmp_path} --name again".split())
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert again | {"name": "run", "runs": stored["runs"]} == stored
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "again" / "metrics.csv").read_bytes()


def test_the_log_holds_what_was_printed_and_the_error(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[str], str]
) -> None:
    main(line.split())
    printed, log = capsys.readouterr().out, (tmp_path / "run" / "run.log").read_text()
    assert "epoch   0" in log and all(text in printed for text in log.splitlines())
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "best.ckpt").write_bytes(b"damaged")
    said = refused(f"{line} --resume").removeprefix("ehr: ").splitlines()[0]
    assert f"ehr: {said}" in (tmp_path / "run" / "run.log").read_text()


def test_two_commands_do_not_share_a_directory(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[str], str]
) -> None:
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        before = files(tmp_path)
        assert f"another command is at work in {tmp_path / 'run'}" in refused(line)
        assert files(tmp_path) == before


def test_a_killed_command_leaves_no_lock(line: str, tmp_path: Path) -> None:
    code = f"import sys; from filelock import FileLock; FileLock({str(tmp_path / 'run.lock')!r}).acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        holder.kill()
    with FileLock(tmp_path / "run.lock", timeout=5):
        pass


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--model.width 16", "--model.width: 8 there, 16 here"),
        ("--data.hours 12", "--data.hours: 24 there, 12 here"),
        ("--trainer.precision bf16-mixed", "--trainer.precision: 32-true there, bf16-mixed here"),
        ("--seed 3 --patience 2", "--seed: 0 there, 3 here"),
    ],
)
def test_another_configuration_is_refused_by_option_and_changes_nothing(
    more: str, words: str, begun: str, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    before = files(tmp_path)
    said = refused(f"{begun} {more} --resume")
    assert words in said and "choose another --name" in said
    assert files(tmp_path) == before


def test_what_cannot_change_a_result_is_no_difference(begun: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["trainer"]["use_distributed_sampler"], stored["operating_point"], stored["data"]["init_args"]["labs"]
    stored["trainer"] |= {"accumulate_grad_batches": 1, "deterministic": None}  # defaults, as older versions wrote them
    path.write_text(yaml.safe_dump(stored))
    main(f"{begun} --checkpoint_minutes 3 --data.num_workers 1".split())


def test_a_run_that_trained_nothing_leaves_nothing(line: str, tmp_path: Path, refused: Callable[[str], str]) -> None:
    assert "batch_size" in refused(f"{line} --data.batch_size 0")
    assert "is left after the rule" in refused(f"{line} --data.min_age 130")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.heads 0", "--model.heads must be a finite number of at least 1, found 0"),
        ("--model.width 0", "--model.width must be"),
        ("--model.dropout 1.5", "--model.dropout must be from 0 to 1, found 1.5"),
        ("--model.warmup 3", "--model.warmup must be from 0 to 1, found 3.0"),
        ("--model.pos_weight 0", "--model.pos_weight must be a finite number above 0, found 0"),
        ("--model HyMaTE --model.layers -1", "--model.layers must be"),
        ("--model HyMaTE --model.state 0", "--model.state must be"),
        ("--patience -1", "--patience must be at least 0, found -1"),
        ("--seed -1", "--seed must be from 0 to"),
        ("--data.seed -1", "--data.seed must be at least 0"),
        ("--name ../../x", "--name ../../x must be the name of one folder"),
        ("--trainer.max_epochs 0", "--trainer.max_epochs must be at least 1, found 0"),
        ("--trainer.max_epochs -1", "--trainer.max_epochs -1 has no end"),
        ("--trainer.max_steps 0", "--trainer.max_steps must be at least 1, found 0"),
        ("--trainer.limit_val_batches 0", "--trainer.limit_val_batches 0 leaves nothing to choose the best epoch"),
        ("--trainer.limit_train_batches 0", "--trainer.limit_train_batches 0 leaves nothing to train on"),
        ("--trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches must be at least 1"),
        ("--checkpoint_minutes -1", "--checkpoint_minutes must be at least 0"),
        ("--operating_point npv=2", "--operating_point npv=2 is not known"),
        ("--trainer.max_steps 1 --data.batch_size 8", "val_auroc_auprc was never a number"),
    ],
)
def test_values_that_cannot_train_are_named(option: str, words: str, line: str, refused: Callable[[str], str]) -> None:
    assert words in refused(f"{line} {option}")


def test_no_patience_stops_at_the_first_epoch_that_is_not_better(line: str, tmp_path: Path) -> None:
    main(f"{line} --patience 0 --trainer.max_epochs 5 --model.learning_rate 0".split())
    assert (
        len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    )  # the header, the first and one that equals it
    assert "val_auroc_auprc had not become better for 1 epochs" in (tmp_path / "run" / "run.log").read_text()


def test_epochs_without_validation_have_no_metrics(line: str, tmp_path: Path) -> None:
    main(f"{line} --trainer.max_epochs 3 --trainer.check_val_every_n_epoch 2".split())
    rows = [row.split(",") for row in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert {len(row) for row in rows} == {7}
    assert [row[rows[0].index("val_auroc")] == "" for row in rows[1:]] == [True, False, True]


def test_null_switches_off_what_ehr_switches_on(line: str, tmp_path: Path) -> None:
    line += " --model.pos_weight 100"  # gradients are long
    main(f"{line} --trainer.gradient_clip_val null".split())
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]
    assert stored["gradient_clip_val"] is None
    main(f"{line} --name plain".split())
    assert (tmp_path / "run" / "metrics.csv").read_text() != (tmp_path / "plain" / "metrics.csv").read_text()
