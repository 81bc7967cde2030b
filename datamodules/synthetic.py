"""Writes MIMIC-IV- and eICU-shaped raw files of any size from a simulated patient: for demos, tests and benchmarks, never for medicine.

The very code that reads the real databases reads these files. The patient is in ``synthetic_patient.py`` (what drives what), the
tables in ``synthetic_mimiciv.py`` and ``synthetic_eicu.py``. The stays are simulated and written chunk by chunk, so that memory does
not grow with their number, and the same seed gives the same bytes.
"""

import gzip
import shutil
import tempfile
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy as np
import polars as pl

from datamodules import synthetic_eicu, synthetic_mimiciv
from datamodules.synthetic_patient import simulate
from datamodules.synthetic_tables import EICU, MIMICIV

CHUNK = 2000  # stays simulated at a time
TABLES = {"MIMICIV": MIMICIV, "EICU": EICU}


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
        system: "MIMICIV" or "EICU".
        folder: where the tables go; must be new or empty. It appears only when everything is written.
        stays: number of ICU stays.
        seed: the same seed gives the same files.
        extra_rows: further rows in the largest table (chartevents, nurseCharting), most of them of items that nobody extracts.
        compress: write .csv.gz instead of .csv.
        progress: called with (stays written, stays in all) after each chunk.

    Raises:
        ValueError: the system is unknown, there is nothing to write, or the folder is not empty.
    """
    if system not in TABLES:
        raise ValueError(f"no simulated system {system!r}: expected {' or '.join(TABLES)}")
    if stays < 1 or extra_rows < 0:
        raise ValueError(f"expected at least 1 stay and 0 or more extra rows, found {stays} and {extra_rows}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a new folder, or delete it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        with _Files(temporary, TABLES[system], compress) as files:
            _write_all(system, stays, seed, extra_rows, files.add, progress)
        temporary.replace(folder)  # an empty folder of that name is replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_all(
    system: str, stays: int, seed: int, extra: int, add: Callable[[str, pl.DataFrame], None], progress: Callable[[int, int], None] | None
) -> None:
    number = list(TABLES).index(system)
    hospitals = synthetic_eicu.Hospitals(np.random.default_rng([seed, number, 0]))
    if system == "EICU":
        hospitals.write(add)
    else:
        synthetic_mimiciv.write_constant(add)
    for base in range(0, stays, CHUNK):
        count = min(CHUNK, stays - base)
        patients = simulate(system, count, np.random.default_rng([seed, number, 1, base]))
        more = extra * (base + count) // stays - extra * base // stays
        rng = np.random.default_rng([seed, number, 2, base])
        if system == "EICU":
            synthetic_eicu.write_chunk(patients, hospitals, base, more, rng, add)
        else:
            synthetic_mimiciv.write_chunk(patients, base, more, rng, add)
        if progress is not None:
            progress(base + count, stays)


class _Files:
    """The open tables of one folder; each starts with its header, whether rows follow or not."""

    def __init__(self, folder: Path, headers: dict[str, str], compress: bool) -> None:
        self.columns = {table: header.split(",") for table, header in headers.items()}
        self.raw: list[BufferedWriter] = []
        self.files: dict[str, IO[bytes]] = {}
        for table, header in headers.items():
            path = folder / f"{table}.csv{'.gz' if compress else ''}"
            path.parent.mkdir(exist_ok=True)
            raw = path.open("wb")
            self.raw.append(raw)
            # level 1: four times faster than the default, one fifth larger; no name and time inside, so that bytes repeat
            packed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) if compress else raw
            self.files[table] = cast(IO[bytes], packed)
            self.files[table].write(f"{header}\n".encode())

    def add(self, table: str, rows: pl.DataFrame) -> None:
        """Append rows to a table; columns that they lack are left empty, columns that the table lacks are left out."""
        columns = [pl.col(c) if c in rows.columns else pl.lit(None, pl.String).alias(c) for c in self.columns[table]]
        self.files[table].write(rows.select(columns).write_csv(include_header=False).encode())

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in [*self.files.values(), *self.raw]:
            file.close()
