"""``ehr`` says so at its start where one of its packages is another project's."""

import importlib.util
import re
from pathlib import Path

import pytest

from experiments import start

ROOT = Path(__file__).parents[1]


def copied(folder: Path) -> Path:
    """The files that are looked at, as they are installed."""
    for package, files in start.OURS.items():
        (folder / package).mkdir()
        for name in files:
            (folder / package / name).write_text((ROOT / package / name).read_text())
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = copied(tmp_path)
    finder = importlib.util.spec_from_file_location

    def find(name: str) -> object:
        path = folder / name / "__init__.py"
        return finder(name, path, submodule_search_locations=[str(folder / name)]) if path.parent.is_dir() else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr("experiments.cli.main", lambda: print("started"))
    return folder


def test_it_starts_where_everything_is_ours(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start.main()
    assert capsys.readouterr().out == "started\n"


@pytest.mark.parametrize(
    ("package", "name", "content", "words"),
    [
        ("experiments", "__init__.py", "print('I am the other project')\n", "has a package 'experiments', too"),
        ("experiments", "cli.py", "def main(): ...\n", "virtual environment of its own"),
        ("datamodules", "__init__.py", "", "has a package 'datamodules', too"),
        ("experiments", "cli.py", None, "cli.py is gone.*--force-reinstall"),
    ],
)
def test_it_names_a_package_of_another_project(
    installed: Path, package: str, name: str, content: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = installed / package / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        start.main()
    printed = capsys.readouterr()
    assert "started" not in printed.out
    assert re.search(words, printed.err)
