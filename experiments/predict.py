"""``ehr predict``: probabilities for patients whose outcome is unknown."""

from pathlib import Path

import polars as pl

from datamodules.module import ICUDataModule
from ehrmodels import ICUModule
from experiments import bedside
from experiments.evaluate import Device, opened, predict_split
from experiments.files import console, write_parquet, write_text


def predict(
    ckpt: str,
    out: str,
    data: ICUDataModule | None = None,
    model: type[ICUModule] | None = None,
    device: Device = "auto",
    follow: str | None = None,
    once: bool = False,
) -> pl.DataFrame:
    """Write a probability per stay (per hour for hourly tasks) to a Parquet or CSV file; needs no outcomes.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        out: File ending in .parquet or .csv: stay_id, patient_id, minute (prediction time since ICU admission), probability, alert
            (whether it reaches the checkpoint's threshold).
        data: Hospital system; default: the one that the checkpoint was trained on. All stays are scored, or those of --data.split.
        model: Class of the checkpoint's model, where it is your own.
        device: Where to compute; auto: on the GPU where there is one.
        follow: Folder that is watched for stays*.parquet and events*.parquet (or csv), as ehr prepare --out writes them, instead of data:
            whenever there is a new file of events, the risk of each of its stays with the three variables that move it most is appended to
            --out, a CSV file. The same command again goes on where it was.
        once: With --follow, end when all files are read.

    Returns:
        What the file holds.
    """
    path = Path(out)
    if follow is not None:
        return bedside.follow(ckpt, Path(follow), path, model, once)
    if once:
        raise ValueError("--once belongs to --follow: give it a folder, or leave it out")
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out {out}: expected a file that ends in .parquet or .csv")
    network, data = opened(ckpt, data, model, labelled=False)
    table = predict_split(network, data, data.split, device)
    alert = pl.lit(None, pl.Boolean) if network.threshold is None else pl.col("probability") >= network.threshold
    table = table.select("stay_id", "patient_id", "minute", "probability", alert=alert)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        write_text(path, table.write_csv())
    else:
        write_parquet(table, path)
    alerts = (
        "no alerts, since the checkpoint has no threshold"
        if network.threshold is None
        else f"{table['alert'].sum():,} alerts"
    )
    console.print(
        f"wrote {len(table):,} predictions of {table['stay_id'].n_unique():,} stays, {alerts}, to {path}",
        soft_wrap=True,
    )
    return table
