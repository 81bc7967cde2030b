"""Simulated hospital systems, whose raw files are written first where there are none: for demos and tests."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from datamodules import simulate
from datamodules.hospitals.eicu import EICU
from datamodules.hospitals.mimiciv import MIMICIV

STAYS, SEED = 6000, 0  # of a simulation that the user says nothing of


class SyntheticMIMICIV(MIMICIV):
    """A simulated hospital system that charts like MIMIC-IV.

    Args:
        root: Folder with the raw files; they are written first where it does not exist.
        stays: Number of ICU stays to write; default: 6000, or those of the folder.
        simulation_seed: Seed of the simulation; default: 0, or that of the folder.
    """

    name = "SyntheticMIMICIV"
    published_ids = False

    def __init__(
        self,
        root: str = "data/synthetic-mimiciv",
        stays: int | None = None,
        simulation_seed: int | None = None,
        **kwargs: Any,
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
        stays: Number of ICU stays to write; default: 6000, or those of the folder.
        simulation_seed: Seed of the simulation; default: 0, or that of the folder.
    """

    name = "SyntheticEICU"
    published_ids = False

    def __init__(
        self,
        root: str = "data/synthetic-eicu",
        stays: int | None = None,
        simulation_seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(root, **kwargs)
        self.simulated = ("EICU", stays, simulation_seed)

    def files(self) -> list[Path]:
        """The files of the folder, written first where there is none."""
        _written(self.root, *self.simulated)
        return super().files()


def _written(root: Path, system: str, stays: int | None, seed: int | None) -> None:
    """Write the files where there are none.

    Raises:
        ValueError: the files that are there were written with another number of stays or another seed.
    """
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{root}.lock"):  # another process may be writing it
            if not root.exists():
                simulate.write(system, root, STAYS if stays is None else stays, SEED if seed is None else seed)
    record = root / simulate.RECORD
    if not record.exists():
        return
    written = json.loads(record.read_text())
    for option, asked, there in (("stays", stays, written["stays"]), ("simulation_seed", seed, written["seed"])):
        if asked is not None and asked != there:
            raise ValueError(
                f"--data.{option} {asked}: the files in {root} were simulated with {there}; leave the option out, give "
                f"another --data.root, or delete the folder"
            )
