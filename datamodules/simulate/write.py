"""Writes MIMIC-IV- and eICU-shaped raw files of any size from a simulated patient.

The very code that reads the real databases reads these files. The patient is in ``patient.py`` (what drives what),
what the systems share in ``habits.py``, the tables in ``mimiciv.py``, ``eicu.py`` and the ``*_treatment.py`` beside
them. The stays are simulated and written chunk by chunk, so that memory does not grow with their number, and the same
seed gives the same bytes.
"""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, cast

import numpy as np
import polars as pl

from datamodules.simulate import eicu, headers, mimiciv, patient
from datamodules.simulate.habits import EICU_FIRST_STAY, MIMICIV_FIRST_STAY, Add, Hospitals
from datamodules.simulate.patient import CaseMix, Patients

RECORD = "simulation.json"  # beside the tables: what they were written with


class Simulated(NamedTuple):
    """One simulated hospital system.

    Attributes:
        mix: who its patients are.
        first_stay: the id of its first stay; the others count on from there.
        headers: its tables, each with its columns.
        once: adds the tables that do not depend on the patients.
        chunk: adds the rows of some stays; takes the patients, their hospitals, the number of stays already written,
            the number of extra rows, the source of randomness and what takes the rows.
    """

    mix: CaseMix
    first_stay: int
    headers: dict[str, str]
    once: Callable[[Hospitals, Add], None]
    chunk: Callable[[Patients, Hospitals, int, int, np.random.Generator, Add], None]


SYSTEMS: dict[str, Simulated] = {
    "MIMICIV": Simulated(
        mimiciv.MIMICIV_MIX, MIMICIV_FIRST_STAY, headers.MIMICIV, mimiciv.write_items, mimiciv.write_mimiciv
    ),
    "EICU": Simulated(eicu.EICU_MIX, EICU_FIRST_STAY, headers.EICU, eicu.write_hospitals, eicu.write_eicu),
}


def simulate(system: str, count: int, rng: np.random.Generator) -> Patients:
    """Simulate ``count`` stays; see ``patient.simulate_stays``.

    Args:
        system: a name in ``SYSTEMS``.
        count: number of stays.
        rng: source of randomness.
    """
    return patient.simulate_stays(_system(system).mix, count, rng)


def write(
    system: str,
    folder: Path,
    stays: int,
    seed: int = 0,
    extra_rows: int = 0,
    compress: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the raw tables of a simulated hospital system.

    Args:
        system: a name in ``SYSTEMS``: "MIMICIV" or "EICU".
        folder: where the tables go; must be new or empty. It appears only when everything is written.
        stays: number of ICU stays.
        seed: the same seed gives the same files.
        extra_rows: further rows in the largest table (chartevents, nurseCharting), most of items that nobody extracts.
        compress: write .csv.gz instead of .csv.
        progress: called with (stays written, stays in all) after each chunk.

    Raises:
        ValueError: the system is unknown, there is nothing to write, or the folder is not empty.
    """
    simulated = _system(system)
    if stays < 1 or extra_rows < 0:
        raise ValueError(f"expected at least 1 stay and 0 or more extra rows, found {stays} and {extra_rows}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a new folder, or delete it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        with _Files(temporary, simulated.headers, compress) as files:
            hospitals = hospitals_of(system, seed)
            simulated.once(hospitals, files.add)
            for base, patients in chunks(system, stays, seed):
                after = base + len(patients.stays["age"])
                extra = extra_rows * after // stays - extra_rows * base // stays
                simulated.chunk(patients, hospitals, base, extra, _source(system, seed, 2, base), files.add)
                if progress is not None:
                    progress(after, stays)
        (temporary / RECORD).write_text(json.dumps({"system": system, "stays": stays, "seed": seed}) + "\n")
        temporary.replace(folder)  # an empty folder of that name is replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def hospitals_of(system: str, seed: int) -> Hospitals:
    """The hospitals that ``write`` draws with this seed.

    Args:
        system: a name in ``SYSTEMS``.
        seed: as for ``write``.
    """
    return Hospitals(_system(system).mix, _source(system, seed, 0))


def chunks(system: str, stays: int, seed: int) -> Iterator[tuple[int, Patients]]:
    """The patients that ``write`` draws: number of stays before them, and at most ``patient.CHUNK`` stays at a time.

    Args:
        system: a name in ``SYSTEMS``.
        stays: number of ICU stays.
        seed: as for ``write``.
    """
    for base in range(0, stays, patient.CHUNK):
        yield base, simulate(system, min(patient.CHUNK, stays - base), _source(system, seed, 1, base))


def _system(name: str) -> Simulated:
    if name not in SYSTEMS:
        raise ValueError(f"no simulated system {name!r}: expected {' or '.join(SYSTEMS)}")
    return SYSTEMS[name]


def _source(system: str, seed: int, *purpose: int) -> np.random.Generator:
    """Randomness of its own for each system, purpose and chunk, so that none depends on how much another one draws."""
    return np.random.default_rng([seed, list(SYSTEMS).index(system), *purpose])


class _Files:
    """The open tables of one folder; each starts with its header, whether rows follow or not."""

    def __init__(self, folder: Path, table_headers: dict[str, str], compress: bool) -> None:
        self.columns = {table: header.split(",") for table, header in table_headers.items()}
        self.raw: list[BufferedWriter] = []
        self.files: dict[str, IO[bytes]] = {}
        for table, header in table_headers.items():
            path = folder / f"{table}.csv{'.gz' if compress else ''}"
            path.parent.mkdir(exist_ok=True)
            raw = path.open("wb")
            self.raw.append(raw)
            # level 1: four times faster than the default, one fifth larger; no name and time, so that bytes repeat
            packed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) if compress else raw
            self.files[table] = cast(IO[bytes], packed)
            self.files[table].write(f"{header}\n".encode())

    def add(self, table: str, rows: pl.DataFrame) -> None:
        """Append rows to a table; columns that they lack are left empty, columns that the table lacks are left out.

        Args:
            table: its name.
            rows: its rows, columns in any order.
        """
        columns = [pl.col(c) if c in rows.columns else pl.lit(None, pl.String).alias(c) for c in self.columns[table]]
        self.files[table].write(rows.select(columns).write_csv(include_header=False).encode())

    def __enter__(self) -> "_Files":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in [*self.files.values(), *self.raw]:
            file.close()
