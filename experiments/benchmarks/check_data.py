"""`make check-data ROOT=folder`: what the definitions of sepsis and the rules for infusions give on the open demos, recorded as tables."""

import argparse
from pathlib import Path

import polars as pl

from datamodules.build import bucket_tables
from datamodules.cohort import Cohort
from datamodules.hospitals import EICU, MIMICIV
from datamodules.hospitals.eicu.infusions import infusion_rows
from experiments.prepare import progress

RESULTS = Path(__file__).parents[1] / "results"
DEMOS = (("MIMIC-IV demo", MIMICIV, "mimic-iv-demo"), ("eICU demo", EICU, "eicu-demo"))
HEADINGS = {
    "definition": "definition",
    "suspected_stays": "suspected stays",
    "sepsis_stays": "septic stays",
    "sepsis_hospitals": "hospitals",
    "sepsis_percent": "septic %",
    "sepsis_mortality_percent": "mortality of septic %",
}
KINDS = ("mcg/kg/min", "mcg/min", "ml/hr")


def main() -> None:
    """Record both tables."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.check_data", description=__doc__)
    parser.add_argument("root", type=Path, help="folder with mimic-iv-demo and eicu-demo")
    root = parser.parse_args().root
    tables = []
    with progress() as step:
        for name, hospital, folder in DEMOS:
            cohort = Cohort(hospital(str(root / folder)), step)
            known = known_at(cohort, hospital, root / folder)
            compared = cohort.compare_definitions().select(pl.col(c).alias(to) for c, to in HEADINGS.items())
            label = pl.lit(f"{name} ({len(cohort.store.stays):,} stays)").alias("database")
            tables.append(compared.with_columns(label).join(known, on="definition", how="left", maintain_order="left"))
            if hospital is EICU:
                norepinephrine(cohort).write_csv(RESULTS / "eicu_norepinephrine.csv")
    table = pl.concat(tables)
    table.select("database", pl.exclude("database")).write_csv(RESULTS / "sepsis_definitions.csv")


def known_at(cohort: Cohort, hospital: type[MIMICIV] | type[EICU], root: Path) -> pl.DataFrame:
    """Per definition how many stays are known to be septic before hours 8 and 24."""
    rows = []
    for name, definition in cohort.hospital.definitions.items():
        if definition.partial:
            continue
        counts = [len(Cohort(hospital(str(root), definition=name, hours=hours)).known_septic()) for hours in (8, 24)]
        rows.append((name, *counts))
    schema = {"definition": pl.String, "known before hour 8": pl.Int64, "known before hour 24": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def norepinephrine(cohort: Cohort) -> pl.DataFrame:
    """Charted rows of norepinephrine by unit: how many end with a usable rate, and what rates they are."""
    store, hospital = cohort.store, cohort.hospital
    parts = [
        infusion_rows(bucket_tables(store.folder, number), store.stays[start:stop]).collect()
        for number, (start, stop) in enumerate(store.buckets())
    ]
    assert isinstance(hospital, EICU)
    rows = pl.concat(parts).filter(pl.col("drug") == "norepinephrine")
    unit = pl.when(pl.col("source_unit").is_in(KINDS)).then("source_unit").otherwise(pl.lit("none or unreadable"))
    running = pl.col("rate").filter(pl.col("rate") > 0)
    table = rows.group_by(unit.alias("charted unit")).agg(
        pl.len().alias("rows"),
        pl.col("stay_id").n_unique().alias("stays"),
        pl.col("rate").count().alias("usable rows"),
        pl.col("rate").median().round(3).alias("median"),
        running.median().round(3).alias("median of rates above 0"),
        pl.col("rate").quantile(0.95).round(3).alias("95th percentile"),
    )
    return table.sort("rows", descending=True)


if __name__ == "__main__":
    main()
