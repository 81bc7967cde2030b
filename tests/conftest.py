"""Shared fixtures: simulated hospitals, a cache of their own, and the real data where they lie beside the project."""

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():  # Triton looks when torch imports it: its kernels then run on a CPU
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from datamodules import simulate
from experiments import page
from experiments.cli import main

CHILDREN = Path(__file__).parent / "children"
DRAWN = page.write
REAL = Path(__file__).parents[2] / "shared" / "data"


SLOWEST = ("resume", "distributed", "sweep", "benchmark", "export", "transfer", "future", "cli", "explain", "page")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that processes that share the tests end together."""
    place = {f"test_{name}.py": k for k, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the whole run: no test reads or leaves a store in the project."""
    before, folder = os.environ.get("EHR_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["EHR_CACHE"] = str(folder)
    yield folder
    del os.environ["EHR_CACHE"]
    if before is not None:
        os.environ["EHR_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of small models wait for each other more than they work, by a factor of ten where the machine is shared."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of child processes


@pytest.fixture(scope="session", autouse=True)
def no_pages() -> Iterator[None]:
    """Drawing takes more than half of a small run: it is left to tests that ask for ``pages_drawn``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", runpy.run_path(str(CHILDREN / "sitecustomize.py"))["write"])
        patch.setenv("PYTHONPATH", str(CHILDREN), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def pages_drawn(no_pages: None) -> Iterator[None]:
    """The pages of runs are those that a user gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", DRAWN)
        yield


@pytest.fixture(scope="session")
def mimic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated MIMIC-IV of 300 stays."""
    folder = tmp_path_factory.mktemp("raw") / "mimic"
    simulate.write("MIMICIV", folder, 300, seed=1)
    return folder


@pytest.fixture(scope="session")
def eicu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated eICU of 300 stays."""
    folder = tmp_path_factory.mktemp("raw") / "eicu"
    simulate.write("EICU", folder, 300, seed=1)
    return folder


@pytest.fixture(scope="session")
def trained(mimic: Path, eicu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a small model, trained on the simulated MIMIC-IV and transferred to the simulated eICU."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = f"train --model Fusion --model.width 16 --data SyntheticMIMICIV --data.root {mimic} --trainer.max_epochs 2 --name trained"
    main(
        [
            *arguments.split(),
            *f"--runs {folder} --finetune SyntheticEICU --finetune.root {eicu} --finetune_epochs 2".split(),
        ]
    )
    return folder / "trained"


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """Gives the folder of a real data set such as "mimic-iv-demo", or skips the test."""

    def find(name: str) -> Path:
        if not (REAL / name).is_dir():
            pytest.skip(f"the data set {name} is not beside the project (shared/data/{name})")
        return REAL / name

    return find


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What a command says that must be refused: status 2, one message, no traceback."""

    def run(line: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(line.split())
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run
