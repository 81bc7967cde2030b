"""``ehr sweep``: many processes, each with one trial at a time on its own devices, draw configurations of ``ehr train`` from one study."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from datamodules.module import ICUDataModule
from ehrmodels import ICUModule
from experiments import cli, run_directory, tracking
from experiments.files import console, write_text
from experiments.fit import MONITORS
from experiments.processes import Workers
from experiments.settings import TRAINER_DEFAULTS
from experiments.sweep.locks import server_lost
from experiments.sweep.report import summarise
from experiments.sweep.space import check_names, distributions, flag
from experiments.sweep.study import Study
from experiments.sweep.worker import standing
from experiments.train import Monitor


def sweep(
    model: ICUModule,
    data: ICUDataModule,
    space: dict[str, Any],
    trainer: dict[str, Any] | None = None,
    name: str | None = None,
    runs: str = "runs",
    trials: int = 40,
    workers: int | None = None,
    storage: str | None = None,
    sampler_seed: int = 0,
    monitor: Monitor | None = None,
    config: str | None = None,
) -> None:
    """Search the hyper-parameters of ``ehr train``; takes all its flags, which say what every trial starts from.

    Every worker runs one trial at a time on devices of its own, as many as --trainer.devices says. The same command again, on this
    machine or, with --storage postgresql://..., on another, joins the study or goes on with it. Each trial is a run directory,
    runs/NAME/trial-NUMBER; its value is the best --monitor of its epochs. Trials are scored on the validation split alone. At the
    end: best.yaml (for ehr train), trials.csv and sweep.png in runs/NAME.

    Args:
        model: The network, as for train.
        data: Hospital system.
        space: What is searched: flag of train without dashes: a list of choices, or {low, high} with log: true or step.
        trainer: Arguments of lightning.Trainer.
        name: Name of the study; default: that of the YAML file, or sweep.
        runs: Folder that holds run directories; the study's is runs/NAME.
        trials: Trials in all, those of other machines and of earlier commands included.
        workers: Trials at a time on this machine, each on its own --trainer.devices; default: as many as there are GPUs for, or 1.
        storage: A journal file for the processes of one machine, or postgresql://user@host/database for those of several;
            default: study.journal in the study's folder.
        sampler_seed: Seed of the sampler (TPE).
        monitor: Validation metric that is optimised and pruned by; default: val_auroc_auprc.
        config: What every trial starts from, as YAML; default: made of model, data and trainer.
    """
    trainer = {**TRAINER_DEFAULTS, **(trainer or {})}
    if trials < 1 or (workers is not None and workers < 1):
        raise ValueError(f"--trials and --workers must be at least 1, found {trials} and {workers}")
    devices, number = shares(trainer, workers)
    name, monitor = name or "sweep", monitor or ("val_auroc_auprc" if model.supervised else "val_loss")
    folder = Path(runs) / name
    if config is None:
        config = yaml.safe_dump(run_directory.configuration(model, {"data": data}, trainer, monitor=monitor))
    wandb = yaml.safe_load(config).get("wandb")
    terms = {
        "space": space,
        "config": config,
        "monitor": monitor,
        "direction": MONITORS[monitor],
        "sampler_seed": sampler_seed,
        "warmup": max(int(trainer.get("max_epochs") or 0) // 4, 1),
    }
    check(config, space)
    tracking.check(wandb)
    data.prepare_data()  # once, and before any worker says that the files are not there
    folder.mkdir(parents=True, exist_ok=True)
    order: dict[str, Any] = {
        "name": name,
        "storage": storage or str(folder / "study.journal"),
        "terms": terms,
        "folder": str(folder),
        "trials": trials,
        "devices": devices,
        "batch_size": data.batch_size,
    }
    try:
        with Study(name, order["storage"], terms) as study:
            if not study.trials() and (others := sorted(folder.glob("trial-*"))):
                raise ValueError(
                    f"{folder} holds trials of another study, such as {others[0].name}: choose another --name, or delete the folder"
                )
            with study.locked():
                write_text(folder / "train.yaml", config)
            if not study.finished(trials):
                started = Workers("experiments.sweep.worker", order, number, devices)
                started.run(lambda: standing(study, order), trials, "trials")
            with study.locked():
                summarise(study, folder, monitor, name)
        if wandb == "offline":
            console.print(
                f"to send the trials to Weights & Biases: {tracking.sync_command(folder / '*')}", soft_wrap=True
            )
    except Exception as error:
        if server_lost(error):
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(
                f"the server of --storage is gone ({reason}): when it is back, the same command goes on"
            ) from error
        raise


def shares(trainer: dict[str, Any], workers: int | None) -> tuple[int, int]:
    """Devices of each trial, and workers on this machine: as many as its GPUs are enough for where the user says nothing.

    Raises:
        ValueError: the GPUs are not enough, or a trial would reach over machines.
    """
    if TorchElasticEnvironment.detect():
        raise ValueError("ehr sweep starts all its processes itself: give the command without torchrun")
    if (trainer.get("num_nodes") or 1) != 1:
        raise ValueError(
            "the devices of a trial are those of one machine: leave --trainer.num_nodes at 1; with --storage postgresql://... "
            "the same command on several machines shares a study"
        )
    wanted = str(trainer.get("devices", 1))
    if not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"--trainer.devices must be the number of devices of each trial in a sweep, found {wanted}")
    devices = int(wanted)
    gpus = 0 if trainer.get("accelerator") == "cpu" else torch.cuda.device_count()
    number = workers or max(gpus // devices, 1)
    if devices > 1 and 0 < gpus < devices * number:
        raise ValueError(
            f"{number} worker{'s' * (number > 1)} with {devices} devices a trial need {devices * number} GPUs, and {gpus} "
            f"{'are' if gpus > 1 else 'is'} here: lower --workers or --trainer.devices"
        )
    return devices, number


def check(config: str, space: dict[str, Any]) -> None:
    """Try the ends of every range and every choice as flags of ``ehr train``.

    Raises:
        ValueError: the entries are no search space, a name must not be searched, or a value is not possible.
        SystemExit: a name is no flag, or a value is of another kind than it takes; the parser has said so.
    """
    distributions(space)
    check_names(space)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.yaml"
        path.write_text(config)
        for name, entry in space.items():
            for value in entry if isinstance(entry, list) else (entry["low"], entry["high"]):
                cli.configured("train", ["-c", str(path), flag(name, value)])
