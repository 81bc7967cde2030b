"""`make gpu-check` without a GPU: it says so; on the CPU its parts measure, judge, and go on where one of them fails."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from datamodules import SyntheticMIMICIV
from ehrmodels import TCN
from experiments.benchmarks import gpu_build, gpu_check, gpu_runs, gpu_scan, gpu_train
from experiments.benchmarks.gpu_measure import NO_TIME, Deadline, Row, idle
from experiments.results import tables

SHAPE = (2, 8, 13, 3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where results go instead of into the repository."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(gpu_check, "RESULT", folder / "gpu.csv")
    return folder


def all_of(steps: Iterable[list[Row]]) -> list[Row]:
    return list(chain.from_iterable(steps))


def compared(kernels: set[tuple[str, str]], *shapes: tuple[int, ...], seconds: float = 60) -> list[Row]:
    return all_of(gpu_scan.compare(CPU, kernels, Deadline(seconds), shapes, repeats=1))


def test_without_a_gpu_it_says_so_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("EHR_CACHE", str(tmp_path / "cache"))
    assert gpu_check.main(["--minutes", "2", "--root", str(tmp_path)]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert not list(results.iterdir()) and list(tmp_path.iterdir()) == [results]
    with pytest.raises(SystemExit):
        gpu_check.main(["--kernels", str(tmp_path / "nowhere")])
    assert "nowhere is no folder" in capsys.readouterr().err


# ---- scan and convolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("triton", [False, True])
def test_the_right_scan_passes(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton and (find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1"):
        pytest.skip("Triton is not there, or does not run on a CPU")
    kernels, shapes = set[tuple[str, str]](), [SHAPE, (1, 8, 1, 3)]
    if triton:
        kernels, shapes = {("scan", "triton")}, [(1, 8, 3, 2)]
        monkeypatch.setattr("ehrmodels.scan_triton.CHUNK", 2)
    rows = compared(kernels, *shapes)
    assert {r.outcome for r in rows} == {"ok", ""}
    scans = [r for r in rows if r.what.startswith("scan") and r.measure.startswith("error")]
    assert all((r.triton is not None) == (r.between is not None) == triton for r in scans)
    assert {"ms forward", "ms forward and backward", "peak MB"} < {r.measure for r in rows}
    assert gpu_check.conclude(rows) == 0


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_scan_fails(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(u: torch.Tensor, *rest: Any, **named: Any) -> Any:
        result = gpu_scan.selective_scan_reference(u, *rest, **named)
        return (result[0] * wrong, result[1]) if isinstance(result, tuple) else result * wrong

    monkeypatch.setattr(gpu_scan, "selective_scan", scan)
    rows = compared(set(), SHAPE)
    failed = {r.what.split()[0] for r in rows if r.outcome == "FAILS"}
    assert failed == {"scan"}
    assert gpu_check.conclude(rows) == 1


def test_a_scan_that_breaks_off_fails_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(**_: Any) -> Any:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(gpu_scan, "selective_scan", scan)
    rows = compared(set(), SHAPE)
    assert any("invalid argument" in r.outcome for r in rows) and any(r.outcome == "ok" for r in rows)


def test_triton_is_told_beside_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = gpu_scan.operations(SHAPE, torch.float32, CPU)[0]
    monkeypatch.setenv("EHR_SCAN", "torch")
    monkeypatch.setattr(gpu_scan, "scanning", lambda column: pytest.MonkeyPatch.context())
    rows = {r.measure: r for r in gpu_scan.costs("scan", scan, ["kernel", "triton"], CPU, 3)}
    ratio = rows["ms forward, over the kernel's"]
    forward = rows["ms forward"]
    assert forward.kernel and forward.triton and ratio.triton == pytest.approx(forward.triton / forward.kernel)
    assert (ratio.target, ratio.outcome) == ("at most 1.5", "")


def test_no_kernel_is_usable_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu_scan.usable(CPU) == set()
    assert "the tensors are on cpu" in capsys.readouterr().out


# ---- time and tables -----------------------------------------------------------------------------------------------------------


def test_what_there_is_no_time_for_is_left_out_and_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    rows = compared(set(), SHAPE, seconds=0)
    waiting = gpu_train.settings(["Fusion"], (256, 64))
    count, data = len(waiting), SyntheticMIMICIV("not read")
    assert not list(gpu_train.train_all(data, CPU, waiting, ["pytorch"], Deadline(0), final=False))
    assert len(waiting) == count == 10  # they wait for the rest of the time
    rows += all_of(gpu_train.train_all(data, CPU, waiting, ["pytorch"], Deadline(0)))
    commands = gpu_runs.Commands(Path(), Path(), Path(), Deadline(0), "pytorch", runner=pytest.fail)
    rows += all_of([*commands.rows(), *commands.end_to_end(Path())])
    assert {r.measure for r in rows} == {NO_TIME} and len(rows) == 8 + count + 6 + 3
    assert gpu_check.conclude(rows) == 0
    assert f"{len(rows)} were left out for want of time" in capsys.readouterr().out
    whole = Deadline(10)
    assert 4 < whole.part(0.5).left() <= 5 < whole.left() <= 10


def test_tables_are_written_after_every_step(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [Row("scan", "ms forward", 0.5, 0.6, 7.0), Row("scan", "error of output", 1e-7, limit=1e-4, outcome="ok")]
    speed = Row("Fusion, eager", gpu_train.SPEED, pytorch=20123.4, target="at least 20,000")
    second = [speed, Row("Fusion, eager", gpu_train.LOSS, pytorch=1.2, limit=1.0, outcome="FAILS")]

    def part() -> Iterator[list[Row]]:
        yield first
        assert len(pl.read_csv(results / "gpu.csv")) == 2
        yield second

    rows = gpu_check.recorded([("a part", part()), ("another", [[Row("HyMaTE", NO_TIME)]])], {"device": "a GPU"})
    table = pl.read_csv(results / "gpu.csv", infer_schema=False)
    assert len(rows) == len(table) == 5 and set(table["device"]) == {"a GPU"}
    assert table.filter(measure=gpu_train.SPEED)["pytorch"].item() == "20123"
    summary = pl.read_csv(results / "gpu_summary.csv").fill_null("").rows()
    assert summary == [
        ("scan", "0.5 ms forward", "0.6 ms forward", "7 ms forward", "1 of 1 errors within their limits"),
        ("Fusion, eager", "", "", "20,123 stays/s", "target: at least 20,000; the loss does not fall"),
        (NO_TIME, "", "", "", "1 measurements"),
        ("measured on", "", "", "", "device: a GPU"),
    ]
    assert "a part" in capsys.readouterr().out


def test_pages_say_what_was_not_measured(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    monkeypatch.setattr(tables, "HERE", results)
    page = "<!-- table: gpu_summary -->\nold\n<!-- end -->"
    assert tables.fill(page).splitlines()[1] == "not measured yet: `make gpu-check` writes it"
    gpu_check.write([Row("scan", "ms forward", 0.5)], {})
    assert "| scan | 0.5 ms forward |" in tables.fill(page)
    with pytest.raises(FileNotFoundError):
        tables.fill(page.replace("gpu_summary", "scan"))


# ---- training ------------------------------------------------------------------------------------------------------------------


def test_a_time_in_which_nothing_ran() -> None:
    assert idle([(0, 2), (1, 3), (1, 2), (6, 7)], 10) == pytest.approx(0.6)
    assert idle([(0, 20)], 10) == 0
    assert idle([], 10) is None


def test_training_is_measured_and_what_fails_stops_nothing(mimic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(gpu_train, "MODELS", {"Fusion": partial(TCN, width=8, dropout=0.0)})  # is traced faster
    monkeypatch.setattr(gpu_train, "WARMUP", 2)
    data = SyntheticMIMICIV(str(mimic))
    data.prepare_data()
    data.setup()
    ways: list[tuple[str, str | None]] = [
        ("resident", "default"),
        ("resident", "reduce-overhead"),
        ("0 processes", None),
    ]
    waiting = [gpu_train.Setting("Fusion", 64, *way) for way in ways]
    rows = all_of(gpu_train.train_all(data, CPU, waiting, ["pytorch"], Deadline(60), steps=30))
    assert not waiting
    values = {(r.what, r.measure): r for r in rows}
    compiled, processes = "Fusion, batches of 64, resident, default", "Fusion, batches of 64, 0 processes, eager"
    for what in (compiled, processes):
        assert values[what, gpu_train.SPEED].pytorch > 0 and 0 <= values[what, gpu_train.WAITING].pytorch <= 100  # type: ignore[operator]
        assert values[what, gpu_train.WAITING].target == "at most 5"
        assert values[what, gpu_train.LOSS].outcome == "ok"
        assert (values[what, "graphs compiled"].pytorch > 0) == (what == compiled)  # type: ignore[operator]
        assert values[what, "graphs compiled after warming up"].pytorch == 0
    broken = [r for r in rows if r.measure == "broke off"]
    assert len(broken) == 1 and "it needs one GPU" in broken[0].outcome


# ---- commands ------------------------------------------------------------------------------------------------------------------


class Canned:
    """Runs no command: leaves the run directory that one would, with the weight and AUROC that ``weights`` and ``scores`` say
    for its name, 0.5 where they say nothing."""

    def __init__(self, weights: dict[str, float], scores: dict[str, float], ending: bool = False):
        self.weights, self.scores, self.ending, self.seen = weights, scores, ending, list[list[str]]()

    def __call__(self, arguments: list[str], until: Any = None, limit: float = 0) -> gpu_runs.Finished:
        self.seen.append(arguments)
        if "prepare" in arguments:
            return gpu_runs.Finished(0, "", 3.0)
        run = Path(arguments[arguments.index("--runs") + 1]) / arguments[arguments.index("--name") + 1]
        run.mkdir(exist_ok=True)
        name = run.name
        if name == "fsdp":
            return gpu_runs.Finished(1, "Traceback ... RuntimeError: NCCL error", 1.0)
        (run / "metrics.json").write_text(json.dumps({"test": {"auroc": {"value": self.scores.get(name, 0.5)}}}))
        said = "out of memory: training goes on from its last checkpoint\n" * (name == "parts")
        (run / "run.log").write_text(
            f"{said}on cuda; memory: at most 2,000 of 80,000 MiB of the GPU and 900 MiB of the machine"
        )
        for file in ("environment.txt", "report.html"):
            (run / file).touch()
        (run / "best.ckpt").write_text(str(self.weights.get(name, 0.5)))
        if until is not None and not self.ending:
            (run / "last.ckpt").touch()
            assert until()
            return gpu_runs.Finished(-signal.SIGKILL, "", 1.0)
        return gpu_runs.Finished(0, "", 1.0)


@pytest.fixture
def _readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints as ``Canned`` leaves them."""

    def read(path: Path) -> dict[str, Any]:
        weight = torch.tensor([float(path.read_text() or 0)])
        return {"state_dict": {"w": weight}, "epoch": 1, "callbacks": {"_Epochs": {"within": {"batch": 3}}}}

    monkeypatch.setattr(gpu_runs, "read", read)


@pytest.mark.usefixtures("_readable")
def test_commands_are_judged_where_they_must_repeat_and_else_told(tmp_path: Path) -> None:
    runner = Canned({"fusion-as-it-is-2": 0.75, "hymate-variable-deterministic-2": 0.625}, {"ddp": 0.53})
    rows = all_of(gpu_runs.Commands(tmp_path, tmp_path, tmp_path, Deadline(60), "triton", runner).rows())
    found = {r.what: (r.between, r.outcome) for r in rows}
    assert found.pop("Fusion, --trainer.strategy fsdp")[1].startswith(
        "FAILS: RuntimeError: fsdp: exit status 1: Traceback"
    )
    assert found.pop("Fusion, --trainer.strategy ddp") == (pytest.approx(0.03), "FAILS")
    assert found == {
        "Fusion, deterministic: twice with one seed": (0.0, "ok"),
        "Fusion, deterministic: killed and resumed": (0.0, "ok"),
        "Fusion, as it is: twice with one seed": (0.25, ""),
        "HyMaTE variable, deterministic: twice with one seed": (0.125, "FAILS"),
        "HyMaTE variable, deterministic: killed and resumed": (0.0, "ok"),
        "HyMaTE variable, as it is: twice with one seed": (0.0, ""),
        "HyMaTE variable, out of memory": (None, "ok"),
    }
    short = next(arguments for arguments in runner.seen if arguments[0] == "-c")
    assert "set_per_process_memory_fraction" in short[1] and short[2:4] == [str(0.5 * 2000 / 80000), "train"]
    compile(short[1], "SHORT", "exec")
    assert sum("--resume" in arguments for arguments in runner.seen) == 2


@pytest.mark.usefixtures("_readable")
def test_a_run_that_ends_before_it_is_killed_fails(tmp_path: Path) -> None:
    commands = gpu_runs.Commands(tmp_path, tmp_path, tmp_path, Deadline(60), "triton", Canned({}, {}, ending=True))
    assert "ended before it could be killed" in commands.repeated("Fusion", True)[-1].outcome


@pytest.mark.usefixtures("_readable")
def test_whole_commands_are_timed(tmp_path: Path) -> None:
    commands = gpu_runs.Commands(tmp_path, tmp_path, tmp_path, Deadline(60), "triton", Canned({}, {}))
    rows = all_of(commands.end_to_end(tmp_path))
    assert [r.target for r in rows] == ["", "at most 20", "", "at most 60", ""]
    assert all(r.triton is not None and r.triton < 5 and not r.outcome for r in rows[1:])


def test_a_command_is_killed_when_asked_and_when_it_takes_too_long(tmp_path: Path) -> None:
    finished = gpu_runs.run(["-c", "print('said'); raise SystemExit(3)"])
    assert (finished.status, finished.said) == (3, "said\n")
    there = tmp_path / "there"
    sleeps = f"import pathlib, time; pathlib.Path({str(there)!r}).touch(); time.sleep(60)"
    assert gpu_runs.run(["-c", sleeps], until=there.exists).status == -signal.SIGKILL
    with pytest.raises(RuntimeError, match=r"had not ended after 0.2 s"):
        gpu_runs.run(["-c", sleeps], limit=0.2)


# ---- kernels -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wheel", [False, True])
def test_kernels_built_elsewhere_are_found(wheel: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setattr(gpu_build, "EXTENSIONS", {"causal-conv1d>=1.6.2": "no_such_cuda", "mamba-ssm>=2.3": "nor_this"})
    brought, extension = tmp_path / "brought", f"no_such_cuda{EXTENSION_SUFFIXES[0]}"
    brought.mkdir()
    if wheel:
        with zipfile.ZipFile(brought / "causal_conv1d-1.7.0-cp312-cp312-linux_x86_64.whl", "w") as content:
            content.writestr(extension, "")
            content.writestr("causal_conv1d_fake/__init__.py", "")
    else:
        (brought / extension).touch()
    said = gpu_build.provide(tmp_path / "cache", None, "9.0", brought)
    place = tmp_path / "cache" / "unpacked" if wheel else brought
    assert said[0] == f"no_such_cuda: found in {place}"
    assert said[1].startswith(f"nor_this: not in {brought}") and EXTENSION_SUFFIXES[0] in said[1]
    assert sys.path[0] == str(place) and os.environ["PYTHONPATH"] == f"{place}{os.pathsep}/before"
    assert (find_spec("causal_conv1d_fake") is not None) == wheel


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that a build runs; none is run. Of pip's all fail but installations, which leave a module."""
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[list[str]] = []

    def run(command: list[str], stdout: Any = None, **_: Any) -> subprocess.CompletedProcess:
        assert isinstance(command, list)
        seen.append(command)
        if "pip" in command and "install" not in command:
            stdout.write(b"ERROR: Could not find a version\n")
            return subprocess.CompletedProcess(command, 1)
        if "--no-index" in command:
            (tmp_path / "no_such_extension.py").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_build.subprocess, "run", run)
    monkeypatch.setattr(gpu_build, "EXTENSIONS", {"causal-conv1d>=1.6.2": "no_such_extension"})
    return seen


def test_a_build_that_fails_is_reported(calls: list[list[str]], tmp_path: Path) -> None:
    assert "no nvcc" in gpu_build.provide(tmp_path, None, "9.0")[0]
    assert not calls
    said = gpu_build.provide(tmp_path, tmp_path / "bin" / "nvcc", "9.0")[0]
    assert "not there" in said and "Could not find a version" in said and str(tmp_path / "build.log") in said


def test_a_second_run_needs_neither_network_nor_compiler(calls: list[list[str]], tmp_path: Path) -> None:
    wheels = tmp_path / f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}-sm9.0"
    wheels.mkdir()
    (wheels / "causal_conv1d-1.7.0-cp311-cp311-linux_x86_64.whl").touch()
    assert "installed from" in gpu_build.provide(tmp_path, None, "9.0")[0]
    assert len(calls) == 1 and {"install", "--no-index", "--no-deps"} <= set(calls[0])


def test_only_this_device_s_architecture_is_built() -> None:
    setup = 'cc_flag.append("-gencode")\ncc_flag.append("arch=compute_80,code=sm_80")\nif new:\n    cc_flag.append("-gencode")\n'
    setup += 'flags = {"cxx": ["-O3", "-std=c++17"], "nvcc": ["-O3", "-std=c++17", "--use_fast_math"]}\n'
    names: dict[str, Any] = {"cc_flag": [], "new": True}
    exec(compile(gpu_build.own_flags(setup), "setup.py", "exec"), names)
    assert names["cc_flag"] == [] and names["flags"] == {"cxx": ["-O3"], "nvcc": ["-O3", "--use_fast_math"]}
