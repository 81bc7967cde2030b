"""`make bench`: time and peak memory of ``ehr prepare`` on 20 million chartevents rows, beside a bare polars scan of that file."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROWS = 20_000_000
REPEATS = 3
FOLDER = Path(os.environ.get("EHR_CACHE", ".cache")) / "bench"
SCAN = """
import polars as pl
from datamodules.dictionary import mapping
items = mapping("mimiciv").filter(pl.col("table") == "chartevents")["itemid"].to_list()
types = {{"stay_id": pl.Int64, "itemid": pl.Int64, "valuenum": pl.Float64}}
rows = pl.scan_csv("{file}", schema_overrides=types, infer_schema=False).filter(pl.col("itemid").is_in(items))
rows = rows.select("stay_id", "itemid", pl.col("charttime").str.to_datetime("%Y-%m-%d %H:%M:%S"), "value", "valuenum", "valueuom")
rows.sink_parquet("{out}")
"""


def main() -> None:
    """Synthesize the files once, then alternate the two commands, each in a process of its own."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    raw = FOLDER / f"mimiciv-{ROWS}"
    if not raw.exists():
        call(
            [
                sys.executable,
                "-m",
                "experiments.cli",
                "synthesize",
                "--out",
                str(raw),
                "--stays",
                "5000",
                "--extra_rows",
                str(ROWS),
            ]
        )
    scan = [sys.executable, "-c", SCAN.format(file=raw / "icu" / "chartevents.csv.gz", out=FOLDER / "scan.parquet")]
    cache = FOLDER / "cache"
    prepare = [
        sys.executable,
        "-m",
        "experiments.cli",
        "prepare",
        "--data",
        "MIMICIV",
        "--data.root",
        str(raw),
        "--data.cache",
        str(cache),
    ]
    start = [sys.executable, "-c", "import experiments.prepare"]
    commands = {
        "bare scan of chartevents": scan,
        "ehr prepare, all tables": prepare,
        "of which: start-up": start,
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(REPEATS):
        shutil.rmtree(cache, ignore_errors=True)
        for name, command in commands.items():
            figures[name].append(call(command))
    table = Table(
        title=f"{ROWS:,} chartevents rows as csv.gz, median of {REPEATS} alternating runs, {os.cpu_count()} cores"
    )
    for heading in ("", "seconds", "range", "peak GB", "ratio"):
        table.add_column(heading)
    base = statistics.median(s for s, _ in figures["bare scan of chartevents"])
    for name, runs in figures.items():
        seconds = [s for s, _ in runs]
        middle = statistics.median(seconds)
        table.add_row(
            name,
            f"{middle:.1f}",
            f"{min(seconds):.1f}-{max(seconds):.1f}",
            f"{max(m for _, m in runs):.2f}",
            f"{middle / base:.2f}",
        )
    console.print(table)


def call(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in GB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main()
