"""The simulated hospital systems as datamodules: raw files are written where there are none yet, then read like the real ones."""

from pathlib import Path
from typing import Any

from datamodules.eicu import EICU
from datamodules.mimiciv import MIMICIV
from datamodules.module import ICUDataModule
from datamodules.synthetic import write


class SyntheticMIMICIV(MIMICIV):
    """A simulated hospital system that charts like MIMIC-IV.

    Args:
        root: Folder with the raw files; they are written first where it does not exist.
        stays: Number of ICU stays to write.
        simulation_seed: Seed of the simulation.
    """

    name = "SyntheticMIMICIV"

    def __init__(self, root: str = "data/synthetic-mimiciv", stays: int = 6000, simulation_seed: int = 0, **kwargs: Any):
        super().__init__(root, **kwargs)
        self.count, self.simulation_seed = stays, simulation_seed

    def raw_files(self) -> list[Path]:
        _write_missing(self, "MIMICIV", self.count, self.simulation_seed)
        return super().raw_files()


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
        self.count, self.simulation_seed = stays, simulation_seed

    def raw_files(self) -> list[Path]:
        _write_missing(self, "EICU", self.count, self.simulation_seed)
        return super().raw_files()


def _write_missing(module: ICUDataModule, system: str, stays: int, seed: int) -> None:
    if not module.root.exists():
        write(system, module.root, stays, seed)
