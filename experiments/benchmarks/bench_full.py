"""`make bench-full`: `ehr prepare` with Sepsis-3 on simulated files of the real databases' size, and of a quarter and a half of it.

MIMIC-IV: 94,000 stays and 400 million rows of chartevents. eICU: 200,000 stays with about the rows of its largest tables, which
the simulator charts more thinly, so that its rows are repeated some minutes apart, one copy of a table after the other: no
stay's rows stand together. Writing the files takes longer than reading them (an hour) and some 20 GB; they are kept.
"""

import argparse
import csv
import gzip
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl

from datamodules.simulate import write

FOLDER = Path(os.environ.get("EHR_CACHE", ".cache")) / "bench-full"
RESULTS = Path(__file__).parents[1] / "results" / "full_size.csv"
SIZES = (0.25, 0.5, 1.0)
STAYS = {"MIMICIV": 94_000, "EICU": 200_000}
CHART_ROWS = 400_000_000
CHARTED_PER_STAY = 445  # rows of chartevents that the simulator writes for a stay by itself
# table of eICU -> rows of the real one, its column of time
EICU_ROWS = {
    "vitalPeriodic": (146_000_000, "observationoffset"),
    "nurseCharting": (151_000_000, "nursingchartoffset"),
    "lab": (39_000_000, "labresultoffset"),
    "vitalAperiodic": (25_000_000, "observationoffset"),
}


def main() -> None:
    """Write what is missing, run ``ehr prepare`` on it in a process of its own, record time and memory."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.bench_full", description=__doc__)
    parser.add_argument("--system", choices=list(STAYS), help="only this one")
    parser.add_argument("--size", type=float, choices=SIZES, help="only this share of the real size")
    chosen = parser.parse_args()
    for system in [chosen.system] if chosen.system else STAYS:
        for size in [chosen.size] if chosen.size else SIZES:
            record(measured(system, size, raw_files(system, size)))


def raw_files(system: str, size: float) -> Path:
    """The folder of the simulated files, written first where it is not there."""
    folder, stays = FOLDER / f"{system}-{size}", round(STAYS[system] * size)
    if folder.exists():
        return folder
    extra = max(round(CHART_ROWS * size) - CHARTED_PER_STAY * stays, 0) if system == "MIMICIV" else 0
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(system, unfinished, stays, extra_rows=extra)
    if system == "EICU":
        for table, (rows, minute) in EICU_ROWS.items():
            repeat(unfinished / f"{table}.csv.gz", round(rows * size), minute)
    unfinished.replace(folder)
    return folder


def repeat(path: Path, target: int, minute: str) -> None:
    """Append copies of a table to it, each some minutes later, until it has about ``target`` rows."""
    original, copy = path.with_name("original.csv.gz"), path.with_name("copy.csv.gz")
    path.rename(original)
    table = pl.scan_csv(original, infer_schema=False)
    rows = table.select(pl.len()).collect(engine="streaming").item()
    with path.open("wb") as file:
        file.write(original.read_bytes())
        for number in range(1, max(round(target / rows), 1)):
            later = table.with_columns((pl.col(minute).cast(pl.Int64) + number).cast(pl.String))
            later.sink_csv(copy, compression="gzip", compression_level=1, include_header=False, maintain_order=False)
            with copy.open("rb") as part:
                shutil.copyfileobj(part, file)
            copy.unlink()
    original.unlink()


def measured(system: str, size: float, root: Path) -> dict[str, object]:
    """Seconds and peak memory of ``ehr prepare --out``, in a process of its own and with nothing cached."""
    cache, out = FOLDER / "cache", FOLDER / "out"
    for folder in (cache, out):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "experiments.cli", "prepare", "--data", system, "--data.root", str(root)]
    command += ["--data.cache", str(cache), "--data.sepsis", "true", "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    biggest = "icu/chartevents" if system == "MIMICIV" else "vitalPeriodic"
    with gzip.open(root / f"{biggest}.csv.gz") as file:
        rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b"")) - 1
    events = pl.scan_parquet(out / "events.parquet").select(pl.len()).collect().item()
    stays = pl.scan_parquet(out / "stays.parquet").select(pl.len()).collect().item()
    store = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    return {
        "system": f"simulated {system}",
        "size": size,
        "stays": stays,
        "rows of the largest table": rows,
        "events": events,
        "seconds": round(seconds),
        "peak GB": round(usage.ru_maxrss / 1e6, 2),
        "cache GB": round(store / 1e9, 1),
        "command": "ehr prepare --data.sepsis true --out FOLDER",
    }


def record(row: dict[str, object]) -> None:
    """Add a row to the results, in place of one of the same system and size."""
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = [r for r in rows if (r["system"], float(r["size"])) != (row["system"], row["size"])]
    rows = sorted([*rows, row], key=lambda r: (str(r["system"]), float(r["size"])))  # type: ignore[arg-type]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(row, flush=True)


if __name__ == "__main__":
    main()
