"""Fine-tuning on few patients: for how many epochs, by cross-validation among them."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch

from datamodules.module import PARTS, ICUDataModule
from ehrmodels.base import ICUModule
from experiments import distributed
from experiments.evaluate import predict_split
from experiments.files import write_text
from experiments.fit import Recipe, fit
from experiments.resume import Report


def best_epochs(
    folder: Path, made: Callable[[], ICUModule], data: ICUDataModule, recipe: Recipe, report: Report | None
) -> int:
    """The number of epochs after which the loss of patients that are left out is least; 0 where none lessens it clearly.

    A third of the patients is left out at a time, and the model trained on the others for all epochs. Clearly means by more than the
    standard error over the thirds (Breiman's rule): the mean alone is too easily lessened by chance. Afterwards all are in training and validation alike again. Writes ``epochs.csv``; what was trained for it goes.

    Args:
        folder: run directory.
        made: gives the model, ready to be trained on the data as they are.
        data: limited to patients that are in training and validation alike.
        recipe: with the number of epochs.
        report: called after every epoch.
    """
    table = folder / "epochs.csv"
    if distributed.broadcast(table.exists()):
        losses = pl.read_csv(table)
    else:
        columns = {}
        for part in range(PARTS):
            data.leave_out(part)
            model, place = made(), folder / f"left-out-{part}"
            place.mkdir(exist_ok=True)
            before = _loss(model, data)
            every = recipe._replace(monitor="val_loss", patience=recipe.trainer["max_epochs"] + 1)
            fit(place, model, data, every, None, report)
            data.trainer = None  # else it would have the data as this model reads them
            after = pl.read_csv(place / "metrics.csv")["val_loss"].to_list()
            columns[f"left_out_{part}"] = [before, *after]
        least = min(map(len, columns.values()))
        losses = pl.DataFrame({name: column[:least] for name, column in columns.items()}).with_row_index("epochs")
        write_text(table, losses.write_csv())
    data.leave_out(None)
    for part in range(PARTS):
        shutil.rmtree(folder / f"left-out-{part}", ignore_errors=True)
    loss = losses.drop("epochs").to_numpy()
    gain = loss[0] - loss  # (1 + epochs, thirds)
    clear = gain.mean(1) > gain.std(1, ddof=1) / math.sqrt(PARTS)
    return min((int(epochs) for epochs in np.flatnonzero(clear)), key=lambda epochs: loss[epochs].mean(), default=0)


def _loss(model: ICUModule, data: ICUDataModule) -> float:
    """What validation would say before any training."""
    rows = predict_split(model, data, "val").filter(pl.col("target").is_not_nan())
    output, target = (rows[name].to_torch().double() for name in ("probability", "target"))
    weight = model.pos_weight or 1.0
    if model.kind.classes:
        output = torch.logit(output, 1e-12) + math.log(weight)
    return float(model.kind.loss(output, target, weight).mean())
