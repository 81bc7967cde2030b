"""The hospital systems by the names that ``--data`` takes: one class each, thin over the file that reads its tables."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules import eicu, eicu_sepsis, eicu_sofa, mimiciv, mimiciv_sepsis, physionet
from datamodules.module import ICUDataModule
from datamodules.simulate import write
from datamodules.tasks import TaskName


class MIMICIV(ICUDataModule):
    """MIMIC-IV: folders ``hosp/`` and ``icu/`` as published."""

    name = "MIMICIV"
    raw_tables = mimiciv.TABLES
    default_definition = "mimic_code"

    def __init__(self, root: str = "data/mimiciv", **kwargs: Any):
        super().__init__(root, **kwargs)

    def stays(self) -> pl.DataFrame:
        return mimiciv.stays(self.root)

    def events(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        return mimiciv.events(self.root, stays)

    def infusions(self) -> pl.DataFrame:
        return mimiciv.vasopressors(self.root, self.open().stays)

    def derive_sepsis(self) -> dict[str, pl.DataFrame]:
        return mimiciv_sepsis.derive(self.root, self.open().stays, self.definition, **self.sofa)

    def compare_definitions(self) -> pl.DataFrame:
        return mimiciv_sepsis.compare_definitions(self.root, self.open().stays)


class EICU(ICUDataModule):
    """eICU Collaborative Research Database 2.0: the published tables in one folder, file names in any case.

    Args:
        root: Folder with the publisher's files.
        min_hospital_percent: With --data.sepsis, septic stays count only in hospitals where they are at least this share of
            the stays, in percent (Moor 2023 asks for 15).
    """

    name = "EICU"
    raw_tables = eicu.TABLES
    default_definition = "eicu"

    def __init__(self, root: str = "data/eicu", min_hospital_percent: float = 0, **kwargs: Any):
        super().__init__(root, **kwargs)
        self.min_hospital_percent = min_hospital_percent

    def sepsis_switches(self) -> dict[str, Any]:
        return {"min_hospital_percent": self.min_hospital_percent} if self.min_hospital_percent else {}

    def stays(self) -> pl.DataFrame:
        return eicu.stays(self.root)

    def events(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        return eicu.events(self.root, stays)

    def infusions(self) -> pl.DataFrame:
        return eicu.vasopressors(self.root, self.open().stays)

    def hospital_coverage(self) -> pl.DataFrame | None:
        return eicu_sofa.hospitals(self.root, self.open().stays)

    def derive_sepsis(self) -> dict[str, pl.DataFrame]:
        return eicu_sepsis.derive(self.root, self.open().stays, self.definition, **self.sofa, **self.sepsis_switches())

    def compare_definitions(self) -> pl.DataFrame:
        return eicu_sepsis.compare_definitions(self.root, self.open().stays)


class PhysioNet2012(ICUDataModule):
    """PhysioNet/CinC Challenge 2012: death in hospital from the first 48 hours in the ICU.

    Set a is the test split. Sets b and c are divided 80 to 20 into train and val with the permutation that published work
    shares (legacy numpy seed 123 over the sorted records: Tipirneni & Reddy 2022, doi:10.1145/3516367).

    Args:
        sets: Letters of the sets that are read, such as b,c; default: all that are in the folder.
    """

    name = "PhysioNet2012"

    def __init__(
        self,
        root: str = "data/physionet2012",
        sets: str | None = None,
        hours: int = physionet.HOURS_2012,
        min_age: float = 0,
        **kwargs: Any,
    ):
        super().__init__(root, hours=hours, min_age=min_age, **kwargs)
        self.sets = _letters(sets)

    def raw_files(self) -> list[Path]:
        files = [p for found in physionet.files_2012(self.root, self.sets).values() for p in found]
        return [f for path in files for f in ([path] if path.is_file() else sorted(path.rglob("*.txt")))]

    def extraction(self) -> dict[str, Any]:
        return {"sets": self.sets}

    def stays(self) -> pl.DataFrame:
        stays, self._events_table = physionet.stays_2012(self.root, self.sets)
        return stays.with_columns(hospital_id=pl.col("set")).drop("set")

    def events(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        return {"records": self._events_table.lazy()}

    def splits(self, stays: pl.DataFrame) -> pl.Series:
        store = self.open()
        ids = store.stays.filter(pl.col("hospital_id") != "a")["stay_id"].sort().to_numpy()
        order = np.random.RandomState(123).permutation(len(ids))
        train = ids[order[: int(0.8 * len(ids))]]
        chosen = (
            pl.when(pl.col("hospital_id") == "a")
            .then(pl.lit("test"))
            .when(pl.col("stay_id").is_in(train))
            .then(pl.lit("train"))
            .otherwise(pl.lit("val"))
        )
        return stays.select(chosen.alias("split")).to_series()


class PhysioNet2019(ICUDataModule):
    """PhysioNet/CinC Challenge 2019: onset of sepsis, predicted at the end of every hour in the ICU.

    Args:
        systems: Letters of the hospital systems that are read, such as A or A,B; default: all that are in the folder.
    """

    name = "PhysioNet2019"

    def __init__(
        self,
        root: str = "data/physionet2019",
        systems: str | None = None,
        task: TaskName = "sepsis_onset",
        hours: int = 1,
        min_age: float = 0,
        **kwargs: Any,
    ):
        super().__init__(root, task=task, hours=hours, min_age=min_age, **kwargs)
        self.systems = _letters(systems)

    def raw_files(self) -> list[Path]:
        files = [p for found in physionet.files_2019(self.root, self.systems).values() for p in found]
        return [f for path in files for f in ([path] if path.is_file() else sorted(path.rglob("*.psv")))]

    def extraction(self) -> dict[str, Any]:
        return {"systems": self.systems}

    def stays(self) -> pl.DataFrame:
        stays, self._events_table = physionet.stays_2019(self.root, self.systems)
        return stays

    def events(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        return {"records": self._events_table.lazy()}


def _letters(chosen: str | None) -> list[str] | None:
    return None if chosen is None else sorted({c.strip() for c in chosen.split(",") if c.strip()})


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
