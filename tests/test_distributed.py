"""Several processes do what one does: the same batches, gradients, scores; and when one of them is killed, the others end and resume."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from test_models import batch, spec
from test_resume import same

from datamodules.sampler import BATCH_EVENTS, Batches
from ehrmodels import base
from ehrmodels.base import ICUModule
from ehrmodels.checkpoint import read
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE, HyMaTEForecast
from experiments import distributed, files, resume
from experiments.cli import main

ROOT = Path(__file__).parents[1]
EHR = [sys.executable, "-W", "ignore", "-m", "experiments.cli"]
TORCHRUN = [
    sys.executable,
    "-W",
    "ignore",
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "-m",
    "experiments.cli",
]

# ---- batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5, 61, 64, 65, 257])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_divide_the_batches_of_one(world: int, by_length: bool, seed: int | None, count: int) -> None:
    rows = np.random.default_rng(0).permutation(1000)[:count]
    lengths = np.random.default_rng(1).integers(1, 900, count) if by_length else None
    parts = [list(Batches(rows, 8, seed, 2, lengths=lengths, rank=r, world=world)) for r in range(world)]
    assert len({len(p) for p in parts}) == 1
    assert [len(Batches(rows, 8, seed, 2, lengths=lengths, rank=r, world=world)) for r in range(world)] == [
        len(p) for p in parts
    ]
    whole = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
    assert sorted(np.concatenate(whole).tolist()) == sorted(rows.tolist())  # none dropped, none twice
    assert all(1 <= len(p) <= 9 for part in parts for p in part)
    for pieces in zip(*parts, strict=True):
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    one = [set(b.tolist()) for b in Batches(rows, 8 * world, seed, 2, lengths=lengths)]
    mine = [set(b.tolist()) for b in whole]
    if count % (8 * world) >= world or count % (8 * world) == 0 or count < 8 * world:
        assert mine == one
    else:  # a last batch of fewer samples than processes has distributed_run the one before it
        assert len(mine) == len(one) - 1


@pytest.mark.parametrize("lengths", [None, np.arange(61)])
@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_scoring_takes_the_batches_of_one_process_in_turns(world: int, lengths: np.ndarray | None) -> None:
    one = [b.tolist() for b in Batches(np.arange(61), 8, None, lengths=lengths)]
    parts = [Batches(np.arange(61), 8, None, lengths=lengths, rank=r, world=world, whole=True) for r in range(world)]
    assert [[b.tolist() for b in part] for part in parts] == [one[r::world] for r in range(world)]
    assert [len(part) for part in parts] == [len(one[r::world]) for r in range(world)]


def test_lengths_are_alike_in_all_processes_and_batches_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(5000, 90000, 200)
    parts = [list(Batches(np.arange(200), 8, 0, lengths=lengths, rank=r, world=2)) for r in range(2)]
    assert sorted(np.concatenate([*parts[0], *parts[1]]).tolist()) == list(range(200))
    for mine, yours in zip(*parts, strict=True):
        assert len(mine) == len(yours)
        assert abs(lengths[mine].max() / lengths[yours].max() - 1) < 0.25
    spent = [len(b) * lengths[b].max() for part in parts for b in part]
    assert max(spent) <= BATCH_EVENTS * math.exp(0.16)  # lengths are shuffled by a few percent
    assert max(len(b) for b in parts[0]) > 1


@pytest.mark.parametrize("lengths", [None, np.arange(100) + 1])
def test_an_epoch_goes_on_at_any_batch_and_the_next_one_begins_at_its_first(lengths: np.ndarray | None) -> None:
    for start in (0, 1, 7, 12):
        batches = Batches(np.arange(100), 8, 5, 3, start, lengths=lengths)
        assert len(batches) == 13
        whole = [b.tolist() for b in Batches(np.arange(100), 8, 5, 3, lengths=lengths)]
        batches.set_epoch(3)
        assert [b.tolist() for b in batches] == [b.tolist() for b in batches] == whole[start:]
        batches.set_epoch(4)
        assert [b.tolist() for b in batches] == [b.tolist() for b in Batches(np.arange(100), 8, 5, 4, lengths=lengths)]


# ---- losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Fusion, HyMaTE, HyMaTEForecast])
def test_gradients_of_uneven_parts_average_to_that_of_the_whole(
    kind: type[ICUModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = kind(width=16, heads=2, dropout=0.0)  # type: ignore[call-arg]
    model.initialise(spec(12, 24, 3), 3.0)
    model.double()
    samples = batch(model, 13)
    samples = type(samples)(*(t.double() if t.is_floating_point() else t for t in samples))
    place = torch.linspace(0, 0.99, 13).double()
    monkeypatch.setattr(torch, "rand", lambda *size, **_: drawn)
    pieces = [torch.arange(13), torch.arange(9), torch.arange(9, 13)]

    def step(piece: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        nonlocal drawn
        drawn = place[piece]
        model.zero_grad()
        model.losses["train"] = base.Mean()
        part = type(samples)(*(t[piece] for t in samples))
        model.training_step(part, 0).backward()
        return float(model.losses["train"].value()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    drawn = place
    expected, gradient = step(pieces[0])
    told: list[torch.Tensor] = []
    monkeypatch.setattr(base, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(base, "all_reduce", lambda values: told.append(values.clone()) or values)
    for piece in pieces[1:]:
        step(piece)  # to learn what each process says
    total = told[0] + told[1]
    monkeypatch.setattr(base, "all_reduce", lambda values: total.clone())
    (mean, one), (same_mean, other) = step(pieces[1]), step(pieces[2])
    assert mean == same_mean == pytest.approx(expected, rel=1e-6)
    for a, b, c in zip(one, other, gradient, strict=True):
        torch.testing.assert_close((a + b) / 2, c, rtol=1e-5, atol=1e-7)  # the logits are float32


def test_weight_decay_and_clipping_do_not_need_the_shape_of_a_parameter() -> None:
    """A strategy that shards the parameters flattens them, and alone knows their norm."""
    model = Fusion(width=16, heads=2)
    model.initialise(spec(12, 8, 3), 3.0)

    class Whole:
        clipped = 0.0

        def clip_grad_norm_(self, value: float) -> None:
            self.clipped = value

    class Trainer:
        estimated_stepping_batches = 10
        strategy = type("Strategy", (), {"model": Whole()})()

    model._trainer = Trainer()  # type: ignore[assignment]
    before = [[id(p) for p in group["params"]] for group in model.configure_optimizers()["optimizer"].param_groups]
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()
    after = [[id(p) for p in group["params"]] for group in model.configure_optimizers()["optimizer"].param_groups]
    assert before == after
    assert all(before)
    model.configure_gradient_clipping(torch.optim.SGD(model.parameters(), 0.1), 0.7, None)
    assert Trainer.strategy.model.clipped == 0.7


# ---- which process this is -------------------------------------------------------------------------------------------------


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of SLURM's."""

    def become(rank: int, tasks: int) -> None:
        facts = {
            "NTASKS": tasks,
            "NTASKS_PER_NODE": tasks,
            "PROCID": rank,
            "LOCALID": rank,
            "NODEID": 0,
            "JOB_NAME": "train",
            "STEP_ID": 0,
        }
        for name, value in facts.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return become


def test_tasks_of_one_device_are_independent(task: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    task(3, 4)
    monkeypatch.setattr(distributed, "ALIKE_SECONDS", 0)
    assert distributed._place({"devices": 4, "accelerator": "cpu"}) == (3, 4)
    with pytest.raises(
        ValueError, match=r"SLURM started 4 processes, but --trainer\.devices 2 on --trainer\.num_nodes 1 make 2"
    ):
        distributed._place({"devices": 2, "accelerator": "cpu"})
    assert rank_zero_only.rank == 3
    with distributed.distributed_run({"devices": "1"}):
        assert not files.console.quiet
        assert rank_zero_only.rank == 0


def test_srun_that_was_forgotten_is_told(task: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    task(0, 2)
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(ValueError, match="srun did not start this process: put srun before the command"):
        distributed._place({"devices": 2, "accelerator": "cpu"})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--trainer.strategy fsdp --trainer.accelerator cpu",
            "--trainer.strategy fsdp needs GPUs, .*: use --trainer.strategy ddp",
        ),
        ("--trainer.strategy ddp_spawn", "--trainer.strategy ddp_spawn is not supported; choose among auto, ddp"),
        ("--trainer.devices two --trainer.accelerator cpu", "--trainer.devices two with --trainer.accelerator cpu"),
        ("--checkpoint_minutes -1", "--checkpoint_minutes must be at least 0, found -1"),
    ],
)
def test_what_cannot_be_is_told(
    flags: str, said: str, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    with pytest.raises(SystemExit):
        main(
            f"train --model Fusion --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --name x {flags}".split()
        )
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_quiet_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.console, "quiet", True)
    files.write_text(tmp_path / "a", "b")
    assert not list(tmp_path.iterdir())


# ---- whole runs -----------------------------------------------------------------------------------------------------------

TRAIN = (
    "train --model Fusion --model.width 16 --model.summary false --model.members 2 --data SyntheticMIMICIV --data.root {} --name run "
    "--trainer.max_epochs 2"
)
PLAIN = f"{TRAIN} --model.dropout 0 --finetune SyntheticEICU --finetune.root {{}} --finetune_epochs 1"
BROKEN = f"{TRAIN} --data.batch_size 8 --trainer.devices 2 --trainer.accumulate_grad_batches 2 --checkpoint_minutes 0"


def start(command: list[str], line: str, folder: Path, **environment: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, *line.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def test_two_processes_do_what_one_does(
    mimic: Path, eicu: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``trained`` has extracted both systems. Three runs: one process, two started by Lightning, two by torchrun."""
    line = PLAIN.format(mimic, eicu)
    two = "--data.batch_size 16 --trainer.devices 2 --finetune.batch_size 16"
    said = finished(start(EHR, f"{line} {two}", tmp_path / "lightning"))
    assert said.count("epoch   0") == 2  # of training and of fine-tuning, by one process
    finished(start(TORCHRUN, f"{line} {two}", tmp_path / "torchrun"))
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    main(f"{line} --data.batch_size 32 --finetune.batch_size 32".split())
    one = tmp_path / "one" / "runs" / "run"
    for how in ("lightning", "torchrun"):
        other = tmp_path / how / "runs" / "run"
        assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(other) for p in other.rglob("*")}
        for part in (".", "finetune-SyntheticEICU"):
            mine, yours = (pl.read_csv(r / part / "metrics.csv") for r in (one, other))
            assert mine.columns == yours.columns
            np.testing.assert_allclose(yours.to_numpy(), mine.to_numpy(), rtol=2e-4, atol=2e-4)
            mine, yours = (pl.read_parquet(r / part / "predictions.parquet") for r in (one, other))
            assert mine.drop("probability").equals(yours.drop("probability"))  # every sample once, in the same order
            np.testing.assert_allclose(yours["probability"], mine["probability"], atol=2e-3)
        assert read(other / "best.ckpt")["ehr"]["threshold"] > 0
    same(tmp_path / "lightning" / "runs", tmp_path / "torchrun" / "runs")


def members(folder: Path) -> dict[int, int]:
    """Local rank -> process id of the processes that run ``ehr`` in a folder."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            said = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
            if (
                b"experiments.cli" in said
                and b"torch.distributed.run" not in said
                and (path / "cwd").readlink() == folder
            ):
                ranked = [v for v in (path / "environ").read_text().split("\0") if v.startswith("LOCAL_RANK=")]
                found[int(ranked[0].split("=")[1]) if ranked else 0] = int(path.name)
        except OSError:
            continue
    return found


def until(condition: Callable[[], Any], process: subprocess.Popen) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def ended(process: subprocess.Popen, folder: Path, status: int) -> None:
    """One message, no traceback, and nobody left."""
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err.count(f"ehr: {distributed.ENDED}") == 1
    assert "Traceback" not in err.split("torch/distributed/elastic")[0]  # torchrun reports at length, of its own
    limit = time.monotonic() + 10
    while members(folder):
        assert time.monotonic() < limit, "a process was left"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unbroken(mimic: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    finished(start(EHR, BROKEN.format(mimic), folder))
    return folder / "runs"


@pytest.mark.parametrize(
    ("command", "rank", "status"),
    [(EHR, 1, 1), (EHR, 0, -signal.SIGKILL), (TORCHRUN, 0, 1)],
    ids=["1", "0", "torchrun"],
)
def test_a_killed_process_ends_the_others_and_training_goes_on_where_it_was(
    command: list[str],
    rank: int,
    status: int,
    request: pytest.FixtureRequest,
    mimic: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    line, last = BROKEN.format(mimic), tmp_path / "runs" / "run" / "last.ckpt"
    process, seen = start(command, line, tmp_path), set()

    def written() -> bool:
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        return len(seen) > 3

    until(written, process)
    os.kill(members(tmp_path)[rank], signal.SIGKILL)
    ended(process, tmp_path, status)
    assert read(last)["callbacks"]["_Epochs"]["within"] is not None
    with pytest.raises(ValueError, match="was written by a training on 2 processes, this is one on 1: continue"):
        resume.Epochs(tmp_path / "metrics.csv", 0, last, 0, None).position(1)
    if rank == 1:  # once is enough: what is left does not depend on who was killed
        finished(start(command, f"{line} --resume", tmp_path))
        same(request.getfixturevalue("unbroken"), tmp_path / "runs")


# ---- SLURM ----------------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=localhost SLURM_NODELIST=localhost
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    echo $! >> tasks
done
wait -n || exit 1
wait
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.log
xargs kill -9 < tasks
"""


def test_a_job_of_slurm_is_queued_again_and_goes_on(unbroken: Path, mimic: Path, tmp_path: Path) -> None:
    """``srun`` and ``scontrol`` are stand-ins; the script and what Lightning makes of SLURM's variables are real."""
    tools = tmp_path / "bin"
    tools.mkdir()
    entry = f'#!/bin/bash\nexec {sys.executable} -W ignore -m experiments.cli "$@"\n'
    for name, content in {"srun": SRUN, "scontrol": SCONTROL, "ehr": entry}.items():
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    job = str(os.getpid())  # of which Lightning makes the port, which no other run of the tests then has
    variables = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": "ehr-train",
    }
    environment = {**variables, "PATH": f"{tools}:{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1"}
    arguments = BROKEN.format(mimic).removeprefix("train ").replace("--trainer.devices 2 ", "")
    command = ["bash", str(ROOT / "experiments" / "slurm.sh")]
    process = start(command, arguments, tmp_path, **environment)
    until(lambda: (tmp_path / "runs" / "run" / "last.ckpt").exists(), process)
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"
    assert not (tmp_path / "runs" / "run" / "metrics.json").exists()
    (tmp_path / "tasks").unlink()
    out = finished(start(command, arguments, tmp_path, **environment))
    assert out.count("report:") == 1
    again = tmp_path / "runs" / "run"
    for name in ("metrics.csv", "metrics.json", "predictions.parquet"):
        assert (again / name).read_bytes() == (unbroken / "run" / name).read_bytes()
