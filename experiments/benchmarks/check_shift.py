"""Transfer to simulated hospital systems that differ in one known way each; ``python -m experiments.benchmarks.check_shift``.

The source is a simulated MIMIC-IV. Every target is another simulation of the same layout, changed as ``SHIFTS`` says: patients drawn
anew and nothing else, other patients, tables that are not filled, other units, sparser charting. Writes ``shifts.csv``: what each
strategy reaches on each target, with the difference from zero-shot on the same patients.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl

from datamodules.module import SyntheticMIMICIV
from datamodules.simulate.patient import CaseMix
from datamodules.simulate.write import SYSTEMS, write
from ehrmodels import Fusion, LightGBM
from experiments.curve import readable
from experiments.files import console, write_text
from experiments.finetune import finetune
from experiments.report import print_table
from experiments.strategies import Transfer
from experiments.train import train

STAYS, STRATEGIES = 4000, "finetune,pooled,target_only"
EMPTY = ("inputevents", "outputevents", "microbiologyevents")  # a system that does not fill these tables
GASES = ("50813", "50820", "50821", "50818", "50802")  # and draws no arterial gases
UNITS = {
    "50912": (88.42, "umol/L"),
    "50931": (1 / 18.016, "mmol/L"),
    "50885": (17.1, "umol/L"),
}  # creatinine, glucose, bilirubin


def changed(folder: Path, change: Callable[[str, pl.DataFrame], pl.DataFrame]) -> None:
    """Write every table anew as ``change`` makes it of its name and rows."""
    for path in sorted(folder.rglob("*.csv.gz")):
        table = pl.read_csv(path, infer_schema=False)
        after = change(path.name.removesuffix(".csv.gz"), table)
        if not after.equals(table):
            after.write_csv(path, compression="gzip")


def older_and_sicker(mix: CaseMix) -> CaseMix:
    """Other patients: eight years older, with a higher severity and hazard, fewer of them infected, pressure kept lower."""
    return mix._replace(severity=0.6, age=72, infected=0.25, hazard=-9.2, target=60)


def without_tables(name: str, table: pl.DataFrame) -> pl.DataFrame:
    """A system that fills fewer tables: no drips, no urine, no cultures, no arterial gases."""
    if name in EMPTY:
        return table.clear()
    return table.filter(~pl.col("itemid").is_in(GASES)) if name == "labevents" else table


def other_units(name: str, table: pl.DataFrame) -> pl.DataFrame:
    """The same values of three laboratory tests in units of the SI."""
    if name != "labevents":
        return table
    factor = pl.col("itemid").replace_strict(
        {k: f for k, (f, _) in UNITS.items()}, default=1.0, return_dtype=pl.Float64
    )
    unit = pl.col("itemid").replace_strict(
        {k: u for k, (_, u) in UNITS.items()}, default=pl.col("valueuom"), return_dtype=pl.String
    )
    value = (pl.col("valuenum").cast(pl.Float64) * factor).round(4)
    converted = pl.when(factor == 1.0).then(pl.col("valuenum")).otherwise(value.cast(pl.String))
    return table.with_columns(
        value=pl.when(factor == 1.0).then("value").otherwise(converted), valuenum=converted, valueuom=unit
    )


def sparser(name: str, table: pl.DataFrame) -> pl.DataFrame:
    """One of four charted values, one of two laboratory draws."""
    if name == "chartevents":
        return table.filter((pl.col("charttime") + pl.col("itemid") + pl.col("stay_id")).hash(0) % 4 == 0)
    if name == "labevents":
        return table.filter(pl.col("specimen_id").hash(0) % 2 == 0)
    return table


SHIFTS: dict[str, Callable[[str, pl.DataFrame], pl.DataFrame] | None] = {
    "none": None,
    "case mix": None,
    "missing tables": without_tables,
    "units": other_units,
    "habits": sparser,
}


def simulated(folder: Path, seed: int, shift: str = "none") -> SyntheticMIMICIV:
    """A simulated system with a shift."""
    if not folder.exists():
        console.print(f"simulating {folder.name}")
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        usual = SYSTEMS["MIMICIV"]
        if shift == "case mix":
            SYSTEMS["MIMICIV"] = usual._replace(mix=older_and_sicker(usual.mix))
        write("MIMICIV", unfinished, STAYS, seed)
        SYSTEMS["MIMICIV"] = usual
        if (change := SHIFTS[shift]) is not None:
            changed(unfinished, change)
        unfinished.rename(folder)
    return SyntheticMIMICIV(str(folder), task="mortality_hospital", hours=24)


def main(folder: Path) -> None:
    """Train the source, transfer it to every target, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {"fusion": (Fusion(width=32), 4), "trees": (LightGBM(rounds=100), 1)}
    tables = []
    for name, (model, epochs) in models.items():
        source = simulated(folder / "source", 1)
        if not (folder / name / "metrics.json").exists():
            train(model, source, {"max_epochs": epochs}, name, str(folder), resume=(folder / name).exists())
        for shift in SHIFTS:
            target = simulated(folder / shift.replace(" ", "-"), 2, shift)
            out = folder / f"{name}-{shift.replace(' ', '-')}"
            ckpt = str(folder / name / "best.ckpt")
            finetune(ckpt, target, out=str(out), epochs=3, transfer=Transfer(STRATEGIES))
            shown = readable(pl.read_csv(out / "transfer.csv"), ["auroc", "auprc"]).drop(
                "draws", "minutes", strict=False
            )
            tables.append(shown.select(pl.lit(name).alias("model"), pl.lit(shift).alias("shift"), pl.all()))
    table = pl.concat(tables, how="diagonal")
    write_text(folder / "shifts.csv", table.write_csv())
    print_table(table, "transfer over shifts of known size", console)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/shifts"), help="folder for data and runs")
    main(parser.parse_args().out)
