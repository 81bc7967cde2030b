"""Imports point backwards only: datamodules <- ehrmodels <- experiments, and the models know of the data nothing but the contract."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "ehrmodels", "experiments")
HEAVY = ("torch", "lightning", "torchmetrics")
BATCHES = (
    "live",
    "agreement",
    "module",
    "resident",
    "views",
    "scaler",
    "sampler",
    "contract",
)  # what makes batches, and so may know torch
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
OF_DATA = [path for path in FILES if path.is_relative_to(ROOT / "datamodules")]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the arrows"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_there_is_something_to_check() -> None:
    assert all(any(path.is_relative_to(ROOT / package) for path in FILES) for package in PACKAGES)
    assert "datamodules.raw" in imported(ROOT / "datamodules" / "hospitals" / "mimiciv" / "__init__.py")
    assert all((ROOT / "datamodules" / f"{name}.py") in OF_DATA for name in BATCHES)
    assert "torch" in imported(ROOT / "datamodules" / "views.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_backwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {
        "datamodules": ("datamodules",),
        "ehrmodels": ("ehrmodels", "datamodules.contract"),
        "experiments": ("experiments", "ehrmodels", "datamodules"),
    }[package]
    for name in imported(path):
        ours = name.split(".")[0] in (*PACKAGES, "tests")
        backwards = any(name == a or name.startswith(f"{a}.") for a in allowed)
        assert backwards or not ours, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", OF_DATA, ids=lambda p: str(p.relative_to(ROOT)))
def test_of_the_data_only_what_makes_batches_knows_torch(path: Path) -> None:
    name = str(path.relative_to(ROOT / "datamodules"))
    if name in {f"{n}.py" for n in BATCHES}:
        return
    heavy = {n for n in imported(path) if n.split(".")[0] in HEAVY}
    through = {n for n in imported(path) for b in BATCHES if f"{n}.".startswith(f"datamodules.{b}.")}
    assert not heavy, f"{name} imports {', '.join(sorted(heavy))}"
    # the package itself imports its data modules only when one is asked for
    assert not through or name == "__init__.py", f"{name} imports {', '.join(sorted(through))}"


ALONE = """
import importlib, os, signal, sys
from pathlib import Path

root, batches = Path(sys.argv[1]), sys.argv[2].split(",")
names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in (root / "datamodules").rglob("*.py")]
for name in [*sorted(n for n in names if n.rpartition(".")[2] not in batches), "experiments.prepare", "experiments.cli"]:
    importlib.import_module(name)
    heavy = {"torch", "lightning"} & set(sys.modules)
    assert not heavy, f"{name} imports {heavy}"
import datamodules.module
child = os.fork()  # polars hangs in the child of a process in which its threads had been started
if child == 0:
    import polars
    polars.read_csv(b"a,b\\n1,2\\n").lazy().group_by("a").len().collect()
    os._exit(0)
signal.alarm(20)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_importing_the_data_loads_no_torch_and_starts_no_thread() -> None:
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(ROOT), ",".join(BATCHES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_first_line_says_what_a_file_is(path: Path) -> None:
    text = path.read_text()
    assert not text or (ast.get_docstring(ast.parse(text)) or "").strip(), f"{path.relative_to(ROOT)} has no docstring"
