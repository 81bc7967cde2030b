"""Weights & Biases: one run a run directory, with one row an epoch and the final scores; nothing of a patient."""

import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl

from experiments.files import console, write_text
from experiments.fit import MONITORS, Trial

Mode = Literal["offline", "online"]


def check(mode: Mode | None) -> None:
    """Say before anything is begun what would keep a run from being tracked.

    Raises:
        ValueError: the package is missing, or there is no valid key.
    """
    if _switched_off(mode):
        return
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--wandb needs the package wandb: install it with pip install 'ehr[wandb]', or leave --wandb out"
        ) from error
    if mode == "online":
        try:
            wandb.login()  # asks for the key where there is a terminal
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--wandb online is not possible ({reason}): run `wandb login` or set WANDB_API_KEY, or take --wandb offline"
            ) from error


def _switched_off(mode: Mode | None) -> bool:
    return (
        mode is None or os.environ.get("WANDB_MODE") == "disabled" or console.quiet
    )  # quiet: not the first of several


def logger(
    mode: Mode | None,
    folder: Path,
    config: dict[str, Any],
    monitor: str | None,
    tags: list[str],
    trial: Trial | None = None,
) -> Any:
    """Weights & Biases' run of a run directory, as a logger for lightning.Trainer; None where nothing is to be tracked.

    Call ``check`` before.

    The run's id is kept in the directory. Rows are numbered by epoch, and a training that is resumed begins with those of
    metrics.csv: of what a killed process had logged, 15 seconds may never have been written, and the server drops what it
    has already. Offline, where every process writes a folder of its own, the last one so holds all of the run and the others
    are removed; one that was sent already stays, and what follows is sent after it.

    Raises:
        ValueError: Weights & Biases refuses the run; the directory is then as it was.
    """
    if mode is None or _switched_off(mode):
        return None
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    class EpochLogger(WandbLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            self.experiment.log(dict(metrics), step=int(metrics["epoch"]))

    wandb.finish()
    identity, records = folder / "wandb_id", folder / "wandb"
    resumed = identity.exists()
    if not resumed:
        write_text(identity, uuid.uuid4().hex[:16])  # before the run, so that no process is killed in between
    values = dict(config)
    about: dict[str, Any] = {"name": folder.name, "job_type": "train", "tags": tags}
    if trial is not None:
        study = trial.study
        about = {"name": f"{study}/{folder.name}", "job_type": "trial", "tags": [*tags, study], "group": study}
        searched = {name.replace(".", "_"): value for name, value in trial.params.items()}  # for parallel coordinates
        values |= {"trial": trial.number, **searched}
    try:
        opened = wandb.init(
            project="ehr",
            id=identity.read_text(),
            resume="allow",
            mode=mode,
            dir=folder,
            config=values,
            settings=wandb.Settings(console="off", save_code=False, silent=True),
            **about,
        )
    except wandb.errors.Error as error:
        if not resumed:
            identity.unlink()
            shutil.rmtree(records, ignore_errors=True)
        raise ValueError(f"--wandb {mode} is not possible: {error}; mend that, or take --wandb offline") from error
    opened.define_metric("epoch")
    opened.define_metric("*", step_metric="epoch", step_sync=True)
    if monitor is not None:
        opened.define_metric(monitor, step_metric="epoch", step_sync=True, summary=MONITORS[monitor])
    former = [f for f in records.glob(f"offline-run-*-{opened.id}") if f != Path(opened.settings.sync_dir)]
    if not any(list(f.glob("*.synced")) for f in former):
        for row in _epochs(folder / "metrics.csv"):
            opened.log(row, step=int(row["epoch"]))
        for record in former:
            shutil.rmtree(record, ignore_errors=True)
    return EpochLogger(experiment=opened)


def _epochs(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = pl.read_csv(path).drop("learning_rate", strict=False).iter_rows(named=True)
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def end(summary: dict[str, Any], failed: bool = False) -> None:
    """Close the open run, where there is one, with these entries in its summary; says how one that is offline is sent."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    wandb.run.summary.update(summary)
    folder = Path(wandb.run.settings.sync_dir) if wandb.run.offline else None
    wandb.finish(exit_code=int(failed))
    if folder is not None:
        console.print(
            f"Weights & Biases, offline: {folder}; to send it: {sync_command(folder.parents[1])}", soft_wrap=True
        )


def sync_command(folder: Path) -> str:
    """What sends the offline runs below a run directory, for the shell; the parts of one run are sent in their order."""
    return f"wandb sync {folder}/wandb/offline-run-*"


def scores(name: str, metrics: dict[str, Any]) -> dict[str, float]:
    """Scores without their intervals, under names such as test/auroc."""
    return {f"{name}/{m}": v["value"] for m, v in metrics.items() if isinstance(v, dict) and v["value"] is not None}
