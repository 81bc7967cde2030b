"""Kill -9 at any moment, then the same command again: what is left is bit for bit what an unbroken run leaves."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch

from ehrmodels.checkpoint import load, read
from experiments.cli import main

# One process imports everything once; each command runs in a fork of it, which can be killed. Nothing has started a thread yet.
# A file that is about to be renamed lies there unfinished for longer than usual, so that it can be seen.
SERVER = """
import json, os, pathlib, sys, time
from experiments import train
from experiments.cli import main
rename = pathlib.Path.replace
pathlib.Path.replace = lambda path, target: (time.sleep(0.02), rename(path, target))[1]
for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        code = 1
        try:
            main(arguments)
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[[Path, str, Callable[[], bool]], int]


@pytest.fixture(scope="module")
def killed() -> Iterator[Run]:
    """Runs a command in a folder and kills it as soon as a condition holds; gives its exit status (-9: it was killed)."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None

    def run(folder: Path, line: str, condition: Callable[[], bool]) -> int:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([str(folder), line.split()]) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        limit = time.monotonic() + 60
        while not condition() and time.monotonic() < limit and _alive(child):
            time.sleep(0.0005)
        if _alive(child):
            os.kill(child, signal.SIGKILL)
        while (said := server.stdout.readline()) and not said.strip().lstrip("-").isdigit():
            pass  # what the command itself printed
        return int(said)

    yield run
    server.stdin.close()
    server.wait(20)
    server.stdout.close()


def _alive(child: int) -> bool:
    try:
        return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock" and p.name != "run.log"
    }


def unfinished(folder: Path) -> list[Path]:
    return [
        p for p in folder.rglob("*") if p.name.startswith(".") or p.suffix in (".tmp", ".partial") or "-v1" in p.name
    ]


# ---- prepare --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store and tables of an unbroken `ehr prepare`."""
    folder = tmp_path_factory.mktemp("prepared")
    main(f"prepare --data MIMICIV --data.root {mimic} --data.cache {folder / 'cache'} --out {folder / 'out'}".split())
    return folder


@pytest.mark.parametrize(
    "moment",
    [
        "cache/*.partial",
        "cache/*.partial/rows/.*/*",
        "cache/*.partial/rows/icu.chartevents",
        "cache/*.partial/value.f4",
        "cache/*/derived/*.partial/*.part",
        "out/.events*/*",
    ],
)
def test_killed_extraction(
    moment: str, killed: Run, prepared: Path, mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"prepare --data MIMICIV --data.root {mimic} --data.cache cache --out out"
    assert killed(tmp_path, line, lambda: any(tmp_path.glob(moment))) == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    main(line.split())
    assert files(tmp_path) == files(prepared)
    assert not unfinished(tmp_path)


# ---- train ----------------------------------------------------------------------------------------------------------------

LINE = (
    "train --model Fusion --model.width 16 --model.summary false --model.members 2 --data SyntheticMIMICIV --data.root {} --trainer.max_epochs 4 "
    "--name run --data.batch_size 32"
)
TRANSFER = " --finetune SyntheticEICU --finetune.root {} --finetune_epochs 3"


@pytest.fixture(scope="module")
def whole(mimic: Path, eicu: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``runs`` of an unbroken run; ``trained`` has extracted both systems."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main((LINE + TRANSFER).format(mimic, eicu).split())
    return folder / "runs"


def same(one: Path, other: Path) -> None:
    """Weights, logs, scores and predictions agree bit for bit, and nothing is half-written."""
    first, second = files(one), files(other)
    assert set(first) == set(second)
    for name in first:
        if name.endswith(".ckpt"):
            mine, yours = (read(folder / name) for folder in (one, other))
            assert mine["ehr"] == yours["ehr"]
            assert mine["epoch"] == yours["epoch"] and mine["global_step"] == yours["global_step"]
            assert list(mine["state_dict"]) == list(yours["state_dict"])
            assert all(
                torch.equal(a, b)
                for a, b in zip(mine["state_dict"].values(), yours["state_dict"].values(), strict=True)
            ), name
            load(other / name)
        elif not name.endswith("environment.txt"):
            assert first[name] == second[name], name
    assert not unfinished(other)


def rows(path: Path) -> int:
    try:
        return len(path.read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first epoch ends": lambda run: (run / "config.yaml").exists(),
    "while a checkpoint is written": lambda run: (run / "best.ckpt.tmp").exists() or (run / "last.ckpt.tmp").exists(),
    "after the first checkpoint": lambda run: (run / "last.ckpt").exists(),
    "in the third epoch": lambda run: rows(run / "metrics.csv") >= 2,
    "while it is scored": lambda run: (run / "predictions.parquet").exists(),
    "zero-shot": lambda run: (run / "finetune-SyntheticEICU" / "zero_shot.parquet").exists(),
    "in the second epoch of fine-tuning": lambda run: rows(run / "finetune-SyntheticEICU" / "metrics.csv") >= 1,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_training(
    moment: str,
    killed: Run,
    whole: Path,
    mimic: Path,
    eicu: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = (LINE + TRANSFER).format(mimic, eicu)
    folder = tmp_path / "runs" / "run"
    assert killed(tmp_path, line, lambda: MOMENTS[moment](folder)) == -signal.SIGKILL
    for path in folder.rglob("best.ckpt"):
        load(path)
    monkeypatch.chdir(tmp_path)
    if not (folder / "metrics.json").exists():
        before = files(tmp_path)
        with pytest.raises(SystemExit):
            main(line.split())
        assert "holds an unfinished run of this configuration; add --resume to continue it" in capsys.readouterr().err
        assert files(tmp_path) == before
    main([*line.split(), "--resume"])
    same(whole, tmp_path / "runs")


def test_killed_twice(
    killed: Run, whole: Path, mimic: Path, eicu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (LINE + TRANSFER).format(mimic, eicu)
    folder = tmp_path / "runs" / "run"
    assert killed(tmp_path, line, lambda: (folder / "last.ckpt").exists()) == -signal.SIGKILL
    assert killed(tmp_path, f"{line} --resume", lambda: rows(folder / "metrics.csv") >= 3) == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    main([*line.split(), "--resume"])
    same(whole, tmp_path / "runs")


def unbroken(line: str, parent: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A folder in which the command has run to its end, and an empty one for the same command to be killed in."""
    folders = [parent / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    main(line.split())
    return folders


FORMS = {
    "Fusion, batches built by another process": (
        "--model Fusion --model.width 16 --model.summary false --data.num_workers 1",
        (4,),
    ),
    "Fusion, gradients of three batches": (
        "--model Fusion --model.width 16 --trainer.accumulate_grad_batches 3 --trainer.check_val_every_n_epoch 2",
        (2, 7),
    ),
    "HyMaTE, of batches gathered by length some observations left out at random": (
        "--model HyMaTE --model.width 16 --model.layers 1 --model.state 4 --data.hours 12 --data.thinning 0.3",
        (4, 20),
    ),
    "HyMaTEForecast": (
        "--model HyMaTEForecast --model.width 16 --model.layers 1 --model.state 4 --data.hours 12 --monitor val_loss",
        (4, 20),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_killed_within_an_epoch(
    form: str, killed: Run, trained: Path, mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on at the very batch, in the first epoch and, killed again, in the second. At first there is nothing to resume."""
    model, times = FORMS[form]
    data = f"--data SyntheticMIMICIV --data.root {mimic} --data.batch_size 8"  # 18 batches
    line = f"train {model} {data} --trainer.max_epochs 2 --name run --checkpoint_minutes 0"
    folders = unbroken(line, tmp_path, monkeypatch)
    last = folders[1] / "runs" / "run" / "last.ckpt"
    seen: set[int] = set()

    def written(number: int) -> bool:
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        return len(seen) >= number

    for epoch, number in enumerate(times):
        seen.clear()
        assert killed(folders[1], f"{line} --resume", partial(written, number)) == -signal.SIGKILL
        checkpoint = read(last)
        assert checkpoint["epoch"] == epoch
        assert checkpoint["callbacks"]["_Epochs"]["within"]["batch"] > 1
    monkeypatch.chdir(folders[1])
    main([*line.split(), "--resume"])
    same(folders[0] / "runs", folders[1] / "runs")


def test_a_damaged_checkpoint_of_an_unfinished_run(
    whole: Path,
    mimic: Path,
    eicu: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The message says what to do, and either of the two ends where an unbroken run does."""
    line = (LINE + TRANSFER).format(mimic, eicu)
    folder = tmp_path / "runs" / "run"
    shutil.copytree(whole, tmp_path / "runs")
    shutil.rmtree(folder / "finetune-SyntheticEICU")
    (folder / "metrics.json").unlink()
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:-100])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*line.split(), "--resume"])
    said = capsys.readouterr().err
    assert "last.ckpt: the checkpoint is damaged" in said
    assert (
        "copy best.ckpt over it to continue from the best epoch, or delete it to train anew, and run the same command with --resume"
        in said
    )
    assert len(said.splitlines()) == 1
    shutil.copytree(tmp_path / "runs", tmp_path / "again" / "runs")
    shutil.copy(folder / "best.ckpt", folder / "last.ckpt")
    main([*line.split(), "--resume"])
    same(whole, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "again")
    Path("runs/run/last.ckpt").unlink()
    main([*line.split(), "--resume"])
    same(whole, Path("runs"))


def test_a_full_disk_keeps_the_last_good_checkpoint(
    mimic: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{LINE.format(mimic)} --trainer.max_epochs 2 --checkpoint_minutes 0"
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    main(line.split())
    (tmp_path / "broken").mkdir()
    monkeypatch.chdir(tmp_path / "broken")
    written, write = [], Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "last.ckpt.tmp":
            written.append(path)
            if len(written) > 7:
                write(path, content[:1000])
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SystemExit):
            main(line.split())
    assert "the disk said: [Errno 28] No space left on device; make room" in capsys.readouterr().err
    assert read(Path("runs/run/last.ckpt"))["callbacks"]["_Epochs"]["within"]["batch"] > 0
    main([*line.split(), "--resume"])
    same(tmp_path / "whole" / "runs", Path("runs"))


def test_a_run_that_had_stopped_early_is_not_trained_further_and_its_page_is_the_same(
    pages_drawn: None, mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last checkpoint: continuing it must not train one epoch more. Without learning, patience ends soon."""
    monkeypatch.chdir(tmp_path)
    line = f"{LINE.format(mimic)} --model.learning_rate 0 --patience 2"
    main(line.split())
    assert pl.read_csv("runs/run/metrics.csv")["epoch"].to_list() == [0, 1, 2]
    shutil.copytree("runs", "whole")
    for name in ("metrics.json", "predictions.parquet", "report.html"):
        Path("runs/run", name).unlink()
    main([*line.split(), "--resume"])
    same(Path("whole"), Path("runs"))
    assert read(Path("runs/run/last.ckpt"))["epoch"] == 2
