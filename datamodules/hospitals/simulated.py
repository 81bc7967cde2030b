"""Simulated hospital systems, whose raw files are written first where there are none: for demos and tests."""

from pathlib import Path
from typing import Any

from filelock import FileLock

from datamodules import simulate
from datamodules.hospitals.eicu import EICU
from datamodules.hospitals.mimiciv import MIMICIV


class SyntheticMIMICIV(MIMICIV):
    """A simulated hospital system that charts like MIMIC-IV.

    Args:
        root: Folder with the raw files; they are written first where it does not exist.
        stays: Number of ICU stays to write.
        simulation_seed: Seed of the simulation.
    """

    name = "SyntheticMIMICIV"

    def __init__(
        self, root: str = "data/synthetic-mimiciv", stays: int = 6000, simulation_seed: int = 0, **kwargs: Any
    ):
        super().__init__(root, **kwargs)
        self.simulated = ("MIMICIV", stays, simulation_seed)

    def files(self) -> list[Path]:
        """The files of the folder, written first where there is none."""
        _written(self.root, *self.simulated)
        return super().files()


class SyntheticEICU(EICU):
    """A simulated hospital system that charts like eICU.

    Args:
        root: Folder with the raw files; they are written first where it does not exist.
        stays: Number of ICU stays to write.
        simulation_seed: Seed of the simulation.
    """

    name = "SyntheticEICU"

    def __init__(self, root: str = "data/synthetic-eicu", stays: int = 6000, simulation_seed: int = 0, **kwargs: Any):
        super().__init__(root, **kwargs)
        self.simulated = ("EICU", stays, simulation_seed)

    def files(self) -> list[Path]:
        """The files of the folder, written first where there is none."""
        _written(self.root, *self.simulated)
        return super().files()


def _written(root: Path, system: str, stays: int, seed: int) -> None:
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{root}.lock"):  # another process may be writing it
        if not root.exists():
            simulate.write(system, root, stays, seed)
