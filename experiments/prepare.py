"""``ehr prepare``: raw tables to a cohort, who is left after each rule, and what was charted. Starts without torch."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from datamodules.build import writing
from datamodules.cohort import Cohort
from datamodules.hospitals.base import Hospital
from datamodules.store import Store
from experiments import files, meds, quality, report
from experiments.files import console


def prepare(
    data: Hospital,
    out: str | None = None,
    compare_definitions: bool = False,
    beside: str | None = None,
    export: Literal["meds"] | None = None,
) -> None:
    """Extract raw tables into the cache, print who is left after each rule and how much of each variable was found.

    With ``--out``, also write there: ``stays.parquet`` (one row per ICU stay, ``excluded_by`` names the rule that leaves it out),
    ``events.parquet`` (``stay_id, minute`` since ICU admission, ``known_minute, concept, value``), ``attrition.csv``, ``coverage.csv``,
    ``units.csv``, ``concepts.csv`` and ``quality.html`` (rows, units, what was dropped and why, spread of values, hospitals); for MIMIC-IV and eICU also ``sofa.parquet`` (hourly, ``end_minute`` and 24-hour worst scores),
    ``suspicion.parquet``, ``sepsis3.parquet`` (one row a septic stay) and ``vasopressors.parquet`` (infusion intervals), which are
    retrospective: they may look ahead; and where there are several hospitals ``hospitals.parquet`` (which raw tables each fills).
    `--data Tables --data.root FOLDER` reads such a folder again. Where the data can tell, ``unread.csv`` lists what is in them and is not read.

    Args:
        data: Hospital system: MIMICIV, EICU, PhysioNet2012, PhysioNet2019, MEDS, Tables, SyntheticMIMICIV or SyntheticEICU.
        out: Folder for the tables.
        compare_definitions: Also show stays, hospitals, prevalence and mortality under every definition of Sepsis-3.
        beside: Folder that --out wrote of another database: quality.html says how far its values and coverage lie from those here.
        export: meds: also write stays and events to the folder meds below --out, as a dataset of the Medical Event Data
            Standard that `--data MEDS` reads; its dates are made up.
    """
    if beside is not None:
        if out is None:
            raise ValueError("--beside is told in quality.html: give a folder with --out")
        quality.check_folder(Path(beside))
    if export is not None and out is None:
        raise ValueError("--export meds writes below --out: give --out FOLDER")
    with progress() as step:
        cohort = Cohort(data, step)
        store = cohort.store
        derived = _derived(cohort) if out is not None and data.definitions else {}
        excluded_by, attrition = cohort.excluded()
        compared = cohort.compare_definitions() if compare_definitions else None
        split = cohort.splits(store.stays) if export == "meds" else None
    coverage = store.coverage()
    report.print_table(attrition, f"{data.name}: stays, patients and deaths after each rule", console)
    events = f"{len(store.minute):,} events of {len(store.stays):,} stays"
    report.print_table(coverage, f"{data.name}: what was charted ({events})", console)
    unmapped = store.units().filter(pl.col("factor").is_null())
    if len(unmapped):
        listed = ", ".join(
            f"{c} in {u or 'no unit'} ({n} rows)" for c, u, n in unmapped.select("concept", "unit", "rows").iter_rows()
        )
        console.print(f"[yellow]dropped, unit not known: {listed}; see datamodules/dictionary/units.csv[/]")
    unread = store.unread()
    if unread is not None and len(unread):
        for (why,), codes in unread.group_by("why", maintain_order=True):
            listed = ", ".join(f"{code} ({n:,} rows)" for code, n in codes.select("code", "rows").head(10).iter_rows())
            more = f" and {len(codes) - 10:,} more" if len(codes) > 10 else ""
            console.print(f"[yellow]{why}: {codes['rows'].sum():,} rows of {listed}{more}[/]")
    if compared is not None:
        report.print_table(compared, f"{data.name}: Sepsis-3 by definition", console)
    if out is None:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stays = store.stays
    if "sepsis3" in derived:
        stays = (
            stays.drop("sepsis_minute")
            .join(cohort.onset(), on="stay_id", how="left", maintain_order="left")
            .select(stays.columns)
        )
    files.write_parquet(stays.with_columns(excluded_by), folder / "stays.parquet")
    _export(store, folder)
    for name, path in derived.items():
        _copy(path, folder / f"{name}.parquet")
    if store.stays["hospital_id"].n_unique() > 1:
        files.write_parquet(store.hospitals(), folder / "hospitals.parquet")
    if compared is not None:
        files.write_text(folder / "definitions.csv", compared.write_csv())
    for name, table in (
        ("attrition", attrition),
        ("coverage", coverage),
        ("units", store.units()),
        ("concepts", report.concepts()),
    ):
        files.write_text(folder / f"{name}.csv", table.write_csv())
    if unread is not None:
        files.write_text(folder / "unread.csv", unread.write_csv())
    if split is not None:
        meds.write(folder, data.name, stays, split, store)
    quality.write(folder, data.name, store, attrition, None if beside is None else Path(beside))
    console.print(f"wrote to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}", soft_wrap=True)


def _derived(cohort: Cohort) -> dict[str, Path]:
    """The tables that go with MIMIC-IV and eICU; sepsis is left out, and said, where its tables are not there and nobody asked for it."""
    tables = {"vasopressors": cohort.infusions()}
    try:
        return tables | cohort.sepsis_tables()
    except (FileNotFoundError, ValueError) as error:
        if cohort.hospital.task.sepsis or cohort.hospital.task.name == "sepsis_onset":
            raise
        console.print(f"[yellow]no sofa, suspicion and sepsis3: {error}[/]", soft_wrap=True)
        return tables


def _export(store: Store, folder: Path) -> None:
    """Write ``events.parquet``, a piece at a time."""
    pieces = folder / ".events.partial"
    shutil.rmtree(pieces, ignore_errors=True)  # of a run that was killed
    try:
        with writing(folder):
            pieces.mkdir()
            for number, (start, stop) in enumerate(store.pieces()):
                store.frame(start, stop).write_parquet(pieces / f"{number:06d}.parquet")
            pl.scan_parquet(pieces / "*.parquet").sink_parquet(pieces / "events.tmp")
            (pieces / "events.tmp").replace(folder / "events.parquet")
    finally:
        shutil.rmtree(pieces, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f"{target.name}.tmp")
    try:
        with writing(target):
            shutil.copyfile(source, unfinished)
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line per step on the terminal with how far it is and the time it took; gives the function that is told of progress."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(20),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        lines: dict[str, object] = {}

        def step(text: str, done: int, total: int) -> None:
            if text not in lines:
                lines[text] = bar.add_task(text, total=total)
            bar.update(lines[text], completed=done, total=total)  # type: ignore[arg-type]

        yield step
