"""The README says what is: its tables come from the recorded results, its file tree and commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.cli import _ordered, make_parser
from experiments.help import VERBS
from experiments.results.tables import PAGES, README, fill

ROOT = Path(__file__).parents[1]
TEXT = README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_are_those_of_the_recorded_results(page: Path) -> None:
    assert fill(page.read_text()) == page.read_text(), "run: python -m experiments.results.tables"


def test_every_file_is_in_the_tree_and_every_file_of_the_tree_exists() -> None:
    tree = TEXT.split("## What is where")[1].split("```")[1]
    for folder in ("datamodules", "ehrmodels", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "__init__.py" or path.name in tree, f"{path.name} is not in the README's tree"
    for name in re.findall(r"[\w/]+\.(?:py|yaml|toml)", tree):
        places = [ROOT, *(ROOT / folder for folder in ("datamodules", "ehrmodels", "experiments"))]
        there = any((ROOT / name).exists() or list(p.rglob(name) if p != ROOT else p.glob(name)) for p in places)
        assert there, f"the README's tree names {name}, which is not there"


@pytest.mark.parametrize("line", re.findall(r"^ehr .*$", TEXT, flags=re.M))
def test_every_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, *arguments = shlex.split(line, comments=True)[1:]
    assert verb in VERBS
    if any(a.startswith("--data.") for a in arguments) and "--data" not in arguments and "-c" not in arguments:
        arguments = ["--data", "MIMICIV", *arguments]  # what the command itself takes from the checkpoint
    arguments = [
        "experiments/configs/demo.yaml" if re.fullmatch(r"runs/.*\.yaml", a) else a for a in arguments
    ]  # what a sweep will write
    make_parser(verb).parse_args(_ordered(arguments))
