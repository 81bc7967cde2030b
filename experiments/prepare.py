"""The verbs that make data, ``ehr synthesize`` and ``ehr prepare``: apart from the others, so that they start without any model."""

from pathlib import Path
from typing import Literal

import polars as pl

from datamodules.cohort import progress
from datamodules.hospitals import EICU, MIMICIV, PhysioNet2012, PhysioNet2019, SyntheticEICU, SyntheticMIMICIV
from datamodules.module import ICUDataModule
from experiments import files, report
from experiments.files import console

__all__ = ["EICU", "MIMICIV", "PhysioNet2012", "PhysioNet2019", "SyntheticEICU", "SyntheticMIMICIV", "prepare", "synthesize"]


def synthesize(out: str, system: Literal["MIMICIV", "EICU"] = "MIMICIV", stays: int = 2000, seed: int = 0, extra_rows: int = 0) -> None:
    """Write raw files of a simulated hospital system, shaped as MIMIC-IV or eICU publish theirs.

    Args:
        out: New folder for the files.
        system: Whose layout, units and habits of charting.
        stays: Number of ICU stays.
        seed: The same seed writes the same files.
        extra_rows: Further rows in the largest table, to try out speed and memory.
    """
    from datamodules.simulate import write

    with progress() as bar:
        task = bar.add_task(f"{stays} simulated stays", total=stays)
        write(system, Path(out), stays, seed, extra_rows, progress=lambda done, _: bar.update(task, completed=done))
    data = f"--data Synthetic{system} --data.root {out}"
    console.print(f"wrote {out}\nnext: ehr prepare {data}", soft_wrap=True)


def prepare(data: ICUDataModule, out: str | None = None, compare_definitions: bool = False) -> None:
    """Extract raw tables into the cache, print who is left after each rule and how much of each variable was found.

    With ``--out``, also write there: ``stays.parquet`` (one row per ICU stay, ``excluded_by`` names the rule that leaves it out),
    ``events.parquet`` (``stay_id, minute`` since ICU admission, ``concept, value``), ``attrition.csv``, ``coverage.csv``,
    ``units.csv`` and ``concepts.csv``; for MIMIC-IV and eICU also ``sofa.parquet`` (hourly, ``end_minute`` and 24-hour worst scores),
    ``suspicion.parquet``, ``sepsis3.parquet`` (one row a septic stay) and ``vasopressors.parquet`` (infusion intervals); for eICU also
    ``hospitals.parquet`` (which tables each hospital fills).

    Args:
        data: Hospital system: MIMICIV, EICU, PhysioNet2012, PhysioNet2019, SyntheticMIMICIV or SyntheticEICU.
        out: Folder for the tables.
        compare_definitions: Also show stays, hospitals, prevalence and mortality under every definition of Sepsis-3.
    """
    store = data.open()
    excluded_by, attrition = data.cohort()
    coverage = store.coverage()
    report.print_table(attrition, f"{data.name}: stays, patients and deaths after each rule", console)
    report.print_table(coverage, f"{data.name}: what was charted ({len(store.minute):,} events of {len(store.stays):,} stays)", console)
    unmapped = store.units().filter(pl.col("factor").is_null())
    if len(unmapped):
        said = ", ".join(f"{c} in {u or 'no unit'} ({n} rows)" for c, u, n in unmapped.select("concept", "unit", "rows").iter_rows())
        console.print(f"[yellow]dropped, unit not known: {said}; see CONVERSIONS in datamodules/concepts.py[/]")
    compared = data.compare_definitions() if compare_definitions else None
    if compared is not None:
        report.print_table(compared, f"{data.name}: Sepsis-3 by definition", console)
    if out is None:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_parquet(store.stays.with_columns(excluded_by), folder / "stays.parquet")
    store.export(folder)
    if data.default_definition:
        for name, table in {**data.sepsis_tables(), "vasopressors": data.infusions()}.items():
            files.write_parquet(table, folder / f"{name}.parquet")
    coverage_of_hospitals = data.hospital_coverage()
    if coverage_of_hospitals is not None:
        files.write_parquet(coverage_of_hospitals, folder / "hospitals.parquet")
    if compared is not None:
        files.write_text(folder / "definitions.csv", compared.write_csv())
    for name, table in (("attrition", attrition), ("coverage", coverage), ("units", store.units()), ("concepts", report.concepts())):
        files.write_text(folder / f"{name}.csv", table.write_csv())
    console.print(f"wrote to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}", soft_wrap=True)
