"""Weights & Biases: a killed and resumed run is one history, and what cannot be tracked is said before anything is begun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused

from experiments import tracking

wandb = pytest.importorskip("wandb")

TRAINING = """
import os, signal, sys
from pathlib import Path
from experiments.imports import imported
tracking = imported("experiments.tracking")
folder, first, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
logger = tracking.logger("offline", folder, {"seed": 0}, "val_auroc", ["Fusion"])
for epoch in range(first, epochs):
    logger.log_metrics({"epoch": epoch, "val_auroc": 0.5 + epoch / 10}, step=7 * epoch)
    logger.log_metrics({"epoch": epoch, "train_loss": 1 - epoch / 10}, step=7 * epoch)
    rows = [f"{e},0.1,{1 - e / 10},{0.5 + e / 10}" for e in range(epoch + 1)]
    (folder / "metrics.csv").write_text("\\n".join(["epoch,learning_rate,train_loss,val_auroc", *rows]) + "\\n")
if sys.argv[4] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
tracking.end({"test/auroc": 0.75})
"""


def train(folder: Path, first: int, epochs: int, ending: str) -> subprocess.CompletedProcess[str]:
    places = {f"WANDB_{name}_DIR": str(folder / name) for name in ("CONFIG", "CACHE")}
    command = [sys.executable, "-c", TRAINING, str(folder), str(first), str(epochs), ending]
    # WANDB_SERVICE is of the process that runs the tests: it would keep the run of one that was killed open
    inherited = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    return subprocess.run(command, env={**inherited, **places}, capture_output=True, text=True, timeout=120)


def inspected(*arguments: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_run_that_was_killed_and_resumed_is_one_history(tmp_path: Path) -> None:
    assert train(tmp_path, 0, 2, "dies").returncode == -signal.SIGKILL
    identity = (tmp_path / "wandb_id").read_text()
    done = train(tmp_path, 1, 4, "ends")  # the last checkpoint was that of the first epoch
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "wandb").glob("offline-run-*")  # nothing is left to be joined
    (log,) = record.glob("*.wandb")
    assert log.name == f"run-{identity}.wandb"
    records = [json.loads(line) for line in inspected("--json", str(log)).splitlines()]
    history: list[dict[str, Any]] = [r["history"]["item"] for r in records if "history" in r]
    assert [(row["_step"], row["epoch"]) for row in history] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [row["val_auroc"] for row in history] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert [row["train_loss"] for row in history] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert str(record) in done.stdout and f"to send it: wandb sync {tmp_path}/wandb/offline-run-*" in done.stdout
    command = f"{sys.executable} -m {tracking.sync_command(tmp_path)} --dry-run"
    listed = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stderr
    assert "Would sync 1 run(s)" in listed and record.name in listed

    log.with_name(f"{log.name}.synced").touch()  # what was sent already stays, and what follows is sent after it
    assert train(tmp_path, 4, 5, "ends").returncode == 0
    (newer,) = {*(tmp_path / "wandb").glob("offline-run-*/*.wandb")} - {log}
    records = [json.loads(line) for line in inspected("--json", str(newer)).splitlines()]
    assert log.exists() and [r["history"]["item"]["_step"] for r in records if "history" in r] == [4]


@pytest.mark.parametrize("verb", ["train", "sweep --space {model.dropout:[0.1]}"])
def test_online_without_a_key_is_refused_before_anything_is_begun(
    verb: str, mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    line = (
        f"{verb} --model Fusion --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --name w --wandb online"
    )
    message = refused([word.replace(":", ": ") for word in line.split()], capsys)
    assert "--wandb online is not possible (No API key configured" in message
    assert "run `wandb login` or set WANDB_API_KEY, or take --wandb offline" in message
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**arguments: Any) -> None:
        (arguments["dir"] / "wandb").mkdir()
        raise wandb.errors.CommError("no such entity")

    monkeypatch.setattr(wandb, "init", refuses)
    with pytest.raises(
        ValueError, match="--wandb online is not possible: no such entity; mend that, or take --wandb offline"
    ):
        tracking.logger("online", tmp_path, {"seed": 0}, "val_loss", [])
    assert not list(tmp_path.iterdir())
