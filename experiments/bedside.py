"""A model at the bedside: events of stays come as they are charted, and risks with their reasons go; ``ehr predict --follow``."""

import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from datamodules.live import Live
from ehrmodels import ICUModule, load
from experiments.files import console, write

SCHEMA = {
    "stay_id": pl.Int64, "minute": pl.Int64, "probability": pl.Float64, "alert": pl.Boolean, "reasons": pl.String, "file": pl.String,
}  # fmt: skip
SECONDS = 1.0  # between two looks at a folder


class Bedside:
    """A trained model and the stays that it watches, in memory.

    Args:
        ckpt: Checkpoint, such as runs/NAME/best.ckpt.
        model: Class of its model, where it is your own.
    """

    def __init__(self, ckpt: str | Path, model: type[ICUModule] | None = None):
        self.model = load(ckpt, model)
        if not self.model.supervised:
            raise ValueError(f"{ckpt} holds a {type(self.model).__name__}, which predicts no outcome")
        self.live = Live(self.model.spec, self.model.view, self.model.summary)
        self.admit, self.chart, self.discharge = self.live.admit, self.live.chart, self.live.discharge

    @torch.inference_mode()
    def risk(self, stay: int, minute: int) -> float:
        """The probability of the outcome from what was known of a stay before a minute since ICU admission: what ``ehr predict
        --data Tables`` says of the same records.

        Raises:
            ValueError: the stay was not admitted.
        """
        return float(self.model.predict_step(self.live.batch(stay, minute), 0)[1][0])

    @torch.inference_mode()
    def reasons(self, stay: int, minute: int, most: int = 3) -> list[tuple[str, float]]:
        """The variables without whose records the log odds would change most, and by how much they are higher with them."""
        variables = self.model.spec.variables
        whole = float(self.model(self.live.batch(stay, minute)).double().reshape(-1)[0])
        without = self.model(self.live.batch(stay, minute, np.eye(len(variables), dtype=bool))).double().reshape(-1)
        part = (whole - without).tolist()
        order = sorted(range(len(variables)), key=lambda k: -abs(part[k]))[:most]
        return [(variables[k], part[k]) for k in order if part[k]]


def follow(ckpt: str, folder: Path, out: Path, model: type[ICUModule] | None, once: bool) -> pl.DataFrame:
    """Watch a folder, and append the risk of every stay of which a file of events brings news.

    The folder holds ``stays*.parquet`` (or csv; a row a stay, new ones in new files) and ``events*.parquet``, taken in the order of
    their names; a file is written under another name first and renamed. The risk is that at the last minute of a file's events. What
    is told is appended to ``out``; after a restart the files are read again, and only of new ones something is told.

    Args:
        ckpt: checkpoint.
        folder: that is watched.
        out: CSV file.
        model: class of the model, where it is your own.
        once: stop when all files are read, instead of waiting for more.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected stays*.parquet and events*.parquet in it; set --follow")
    if out.suffix != ".csv":
        raise ValueError(f"--out {out}: with --follow expected a file that ends in .csv")
    bedside, read = Bedside(ckpt, model), set[str]()
    text = out.read_bytes() if out.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]  # the last line may have been written in part
    told = pl.read_csv(whole, schema=SCHEMA) if whole else pl.DataFrame(schema=SCHEMA)
    if len(told):
        told = told.filter(pl.col("file") != told["file"][-1])  # of which not all may have been written
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, told.write_csv().encode())
    done = set(told["file"])
    threshold = bedside.model.threshold
    while True:
        fresh = sorted(p for p in folder.iterdir() if p.suffix in (".parquet", ".csv") and p.name not in read)
        for path in (p for p in fresh if p.name.startswith("stays")):
            bedside.admit(_table(path))
            read.add(path.name)
        for path in (p for p in fresh if p.name.startswith("events")):
            events = _table(path)
            stays = bedside.chart(events)
            read.add(path.name)
            if path.name in done:
                continue
            known = pl.col("known_minute") if "known_minute" in events.columns else pl.col("minute")
            last = dict(
                events.group_by("stay_id").agg(pl.max_horizontal(known.max(), pl.col("minute").max())).iter_rows()
            )
            rows = []
            for stay in stays:
                minute = int(last[stay]) + 1
                risk = bedside.risk(stay, minute)
                why = "; ".join(f"{name} {part:+.2f}" for name, part in bedside.reasons(stay, minute))
                rows.append((stay, minute, risk, None if threshold is None else risk >= threshold, why, path.name))
            news = pl.DataFrame(rows, SCHEMA, orient="row")
            with out.open("ab") as file:
                news.write_csv(file, include_header=False)
            alerts = int(news["alert"].sum())
            console.print(f"{path.name}: {len(news):,} stays, {alerts:,} alerts", highlight=False, soft_wrap=True)
        if once:
            return pl.read_csv(out, schema=SCHEMA)
        time.sleep(SECONDS)


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"{path}: the file is cut off or damaged ({error}); write it under another name and rename it"
        ) from error
