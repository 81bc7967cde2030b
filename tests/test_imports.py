"""Imports point backwards only: datamodules <- ehrmodels <- experiments, and the models know of the data nothing but the contract."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "ehrmodels", "experiments")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module of this project that a file imports, wherever in the file the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the arrows"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in (*PACKAGES, "tests")}


def test_there_is_something_to_check() -> None:
    assert all(any(path.is_relative_to(ROOT / package) for path in FILES) for package in PACKAGES)
    assert "datamodules.tables.scan" in imported(ROOT / "datamodules" / "mimiciv.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_backwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {
        "datamodules": ("datamodules",),
        "ehrmodels": ("ehrmodels", "datamodules.batch"),
        "experiments": ("experiments", "ehrmodels", "datamodules"),
    }[package]
    for name in imported(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_first_line_says_what_a_file_is(path: Path) -> None:
    text = path.read_text()
    assert not text or (ast.get_docstring(ast.parse(text)) or "").strip(), f"{path.relative_to(ROOT)} has no docstring"
