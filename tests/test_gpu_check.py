"""`make gpu-check` without a GPU: it says so, it would see a wrong scan, and a build that fails stops nothing."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import gpu_build, gpu_check

SHAPE = (2, 8, 13, 3)
CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.csv")
    monkeypatch.setenv("EHR_CACHE", str(tmp_path / "cache"))
    assert gpu_check.main() == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("triton", [False, True])
def test_the_right_scan_passes(triton: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if triton and (find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1"):
        pytest.skip("Triton is not there, or does not run on a CPU")
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.csv")
    kernels, shapes = set(), [SHAPE, (1, 8, 1, 3)]
    if triton:
        kernels, shapes = {("scan", "triton")}, [(1, 8, 3, 2)]
        monkeypatch.setattr("ehrmodels.scan_triton.CHUNK", 2)
    rows = gpu_check.compare(CPU, kernels, shapes, repeats=1)
    assert {r.outcome for r in rows} == {"ok", ""}
    scans = [r for r in rows if r.what.startswith("scan") and r.measure.startswith("error")]
    assert all((r.triton is not None) == (r.between is not None) == triton for r in scans)
    assert gpu_check.conclude(rows, "a device") == 0
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == len(rows) + 1


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_scan_fails(wrong: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def scan(u: torch.Tensor, *rest: Any, **named: Any) -> Any:
        result = gpu_check.selective_scan_reference(u, *rest, **named)
        return (result[0] * wrong, result[1]) if isinstance(result, tuple) else result * wrong

    monkeypatch.setattr(gpu_check, "selective_scan", scan)
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.csv")
    rows = gpu_check.compare(CPU, set(), [SHAPE], repeats=1)
    failed = {r.what.split()[0] for r in rows if r.outcome == "FAILS"}
    assert failed == {"scan"}
    assert gpu_check.conclude(rows, "a device") == 1


def test_a_scan_that_breaks_off_fails_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(**_: Any) -> Any:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(gpu_check, "selective_scan", scan)
    rows = gpu_check.compare(CPU, set(), [SHAPE], repeats=1)
    assert any("invalid argument" in r.outcome for r in rows) and any(r.outcome == "ok" for r in rows)


def test_no_kernel_is_usable_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu_check.usable(CPU) == set()
    assert "the tensors are on cpu" in capsys.readouterr().out


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
