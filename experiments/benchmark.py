"""``ehr benchmark``: models x seeds x data sets, trained by many processes and compared; ``python -m experiments.benchmark`` is one of them.

A training is a file ``runs/NAME/queue/DATA/MODEL-SEED.yaml`` of ``ehr train`` and the run directory that comes of it. What is left to
do is told by the run directories alone, and who does it by a lock a training, which the kernel frees when its process ends, however it
ends: whoever finds a training neither ended nor locked goes on with it at its last checkpoint.
"""

import json
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
import yaml
from filelock import FileLock, Timeout

from experiments import cli, fit, metrics, settings, tracking
from experiments.compare import Run, contrasts, draw, joined, show
from experiments.files import console, write, write_json, write_text
from experiments.processes import RENEW, Standing, Workers, why_failed
from experiments.train import train

ATTEMPTS = 5  # times that a training may lose its process without one more epoch
OURS = ("name", "runs", "seed", "resume", "config", "finetune", "finetune_learning_rate", "finetune_epochs")
OF_TRAINING = ("batch_size", "thinning")  # options of the data that belong to how a model is trained
ON_ONE_DEVICE = (
    "devices",
    "num_nodes",
    "strategy",
)  # arguments of the trainer, which a training of a queue does not choose


def benchmark(
    models: dict[str, str | dict],  # not Any, of which jsonargparse would make objects
    data: dict[str, dict],
    seeds: list[int] | None = None,
    folds: int = 0,
    reference: str | None = None,
    name: str | None = None,
    runs: str = "runs",
    workers: int | None = None,
) -> pl.DataFrame:
    """Train every model with every seed on every data set, and compare them on each.

    Every worker is a process that trains one model at a time on its own device. The same command again goes on where it was, kill
    what you like; one with more models, seeds or data trains those alone. Each training is a run directory, runs/NAME/DATA/MODEL-SEED.
    At the end, for each data set, the table of ehr compare: means over seeds with standard deviation and interval, paired
    differences from the reference, minutes of a training; also benchmark.csv and benchmark.png in runs/NAME. The split is that
    of the data (test), or val where there is no such patient.

    Args:
        models: Names of models, and of each a YAML file of ehr train, shipped or your own, of whose data only batch_size and
            thinning are used; or class_path, init_args, trainer, batch_size, thinning and other options of ehr train.
        data: Names of data sets, and of each class_path and init_args, as the data of ehr train.
        seeds: Seeds that every model is trained with; default: [0, 1, 2].
        folds: Cross-validate inside the training split, as choices should be: every training is done once a fold, by patient, val
            and test stay unread, and a row of the table is what all folds scored together; 0: no.
        reference: Name of the model that the others are compared with; default: the first.
        name: Name of the benchmark; default: that of the YAML file, or benchmark.
        runs: Folder that holds run directories; the benchmark's are in runs/NAME.
        workers: Processes on this machine, one a GPU in turn; default: the number of GPUs, or 1.

    Returns:
        A row a data set and model, as in ``benchmark.csv``.
    """
    seeds = [0, 1, 2] if seeds is None else seeds
    reference = reference or next(iter(models), None)
    _check(models, data, seeds, folds, reference, workers)
    folder = Path(runs) / (name or "benchmark")
    if (folder / "last.ckpt").exists():
        raise ValueError(f"{folder} holds a training run; choose another --name")
    configurations = {
        (of, model): composed(model, entry, of, section)
        for (of, section), (model, entry) in product(data.items(), models.items())
    }
    made = {
        of: _tried(model, of, config)["data"] for (of, model), config in configurations.items()
    }  # before anything is begun
    for hospital in made.values():
        hospital.prepare_data()  # once, and before any worker says that the files are not there
    # one seed of all models before the next
    parts: list[str | None] = [f"{k + 1}/{folds}" for k in range(folds)] if folds else [None]
    trainings = [Training(str(folder), *what) for what in product(data, seeds, parts, models)]
    (folder / "queue").mkdir(parents=True, exist_ok=True)
    alone = FileLock(folder / "queue" / "benchmark.lock")  # the same command may be given twice
    with alone:
        for training in trainings:
            training.begin(configurations[training.data, training.model])
    order = {"name": folder.name, "folder": str(folder), "trainings": trainings}
    if not all(training.ended() for training in trainings):
        number = workers or max(torch.cuda.device_count(), 1)
        Workers("experiments.benchmark", order, number).run(
            lambda: _standing(folder.name, trainings), len(trainings), "trainings"
        )
    with alone:
        return _summarised(folder, trainings, reference)


class Training(NamedTuple):
    """One model with one seed on one data set, in the folder of the benchmark."""

    folder: str
    data: str
    seed: int
    fold: str | None
    model: str

    def __str__(self) -> str:
        fold = f"-fold-{self.fold.replace('/', '-of-')}" if self.fold else ""
        return f"{self.data}/{self.model}-{self.seed}{fold}"

    @property
    def run(self) -> Path:
        """Its run directory."""
        return Path(self.folder) / str(self)

    def queued(self, kind: str) -> Path:
        """Its file in the queue: yaml, what is trained; lock; json, what happened."""
        return Path(self.folder) / "queue" / f"{self}.{kind}"

    def state(self) -> dict[str, Any]:
        """``minutes`` of its epochs so far; ``lost``: after how many epochs it last lost its process, and how often;
        ``failed``: why."""
        with suppress(FileNotFoundError):
            return json.loads(self.queued("json").read_text())
        return {"minutes": 0.0, "lost": [0, 0], "failed": None}

    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.scored() or self.state()["failed"] is not None

    def scored(self) -> bool:
        """Whether it was trained and scored."""
        return (self.run / "metrics.json").exists()

    def epochs(self) -> int:
        """How many there are so far."""
        with suppress(FileNotFoundError):
            return max(len((self.run / "metrics.csv").read_text().splitlines()) - 1, 0)
        return 0

    def begin(self, config: dict[str, Any]) -> None:
        """Put it into the queue, or see that it is what is there; one that failed is tried again.

        Raises:
            ValueError: another configuration is there.
        """
        config = deepcopy({**config, "seed": self.seed, "name": self.run.name, "runs": str(self.run.parent)})
        if self.fold:
            config["data"]["init_args"] |= {"fold": self.fold, "split": "val"}
        path = self.queued("yaml")
        if path.exists():
            unequal = settings.differences(yaml.safe_load(path.read_text()), config, train)
            if unequal:
                raise ValueError(
                    f"{self.run} was begun with another configuration:\n{settings.as_flags(unequal)}\n"
                    f"give the model another name in the YAML file, choose another --name, or delete {self.run} and {path}"
                )
        elif self.run.exists():
            raise ValueError(f"{self.run} holds a run of another command; choose another --name, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(config, sort_keys=False))
        with suppress(Timeout), FileLock(self.queued("lock"), timeout=0):  # else it is being trained
            if not self.scored():
                write_json({**self.state(), "lost": [0, 0], "failed": None}, self.queued("json"))


def composed(model: str, entry: Any, of: str, section: dict[str, Any]) -> dict[str, Any]:
    """The configuration of ``ehr train`` for a model on a data set.

    Args:
        model: its name.
        entry: what the benchmark says of it.
        of: name of the data set.
        section: what it says of that.

    Raises:
        ValueError: names the entry and what is wrong with it.
    """
    place = f"models.{model}"
    if isinstance(entry, str):
        path = Path(cli.config_file(entry))
        if not path.is_file():
            raise ValueError(
                f"{place}: no file {entry}, and none of that name is shipped; expected a YAML file of ehr train"
            )
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict) or "model" not in config or "space" in config:
            raise ValueError(f"{place}: {entry} is no file of ehr train: expected a model section, and no space")
        config = {key: value for key, value in config.items() if key not in OURS}
        of_data = (config.pop("data", None) or {}).get("init_args") or {}
    elif isinstance(entry, dict) and isinstance(entry.get("class_path"), str):
        wrong = sorted({*OURS, "data", "model"} & set(entry))
        if wrong:
            raise ValueError(
                f"{place}: {', '.join(wrong)} is not for a model to say: the benchmark trains all alike; leave it out"
            )
        rest = {k: v for k, v in entry.items() if k not in ("class_path", "init_args", *OF_TRAINING)}
        arguments = entry.get("init_args") or {}
        config, of_data = {"model": {"class_path": entry["class_path"], "init_args": arguments}, **rest}, entry
    else:
        raise ValueError(
            f"{place}: expected the name of a YAML file of ehr train, or class_path and init_args, found {entry}"
        )
    trainer = config.get("trainer") or {}
    if any(trainer.get(key) not in (None, 1, "1", "auto") for key in ON_ONE_DEVICE):
        raise ValueError(
            f"{place}: one training runs on one device: leave trainer.devices, num_nodes and strategy out, and use --workers"
        )
    if not isinstance(section, dict) or not isinstance(section.get("class_path"), str):
        raise ValueError(f"data.{of}: expected class_path and init_args, as the data of ehr train, found {section}")
    config = deepcopy(
        {**config, "data": {"class_path": section["class_path"], "init_args": section.get("init_args") or {}}}
    )
    config["data"]["init_args"].update({name: of_data[name] for name in OF_TRAINING if name in of_data})
    return config


def _check(
    models: dict[str, Any],
    data: dict[str, Any],
    seeds: list[int],
    folds: int,
    reference: str | None,
    workers: int | None,
) -> None:
    for what, names in (("models", models), ("data", data)):
        if not names:
            raise ValueError(f"--{what} is empty: expected name: what it is")
        wrong = [name for name in names if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", str(name)) or name == "queue"]
        if wrong:
            raise ValueError(
                f"{what}.{wrong[0]}: expected a name that a folder can have, of letters, digits and _.+- and not queue"
            )
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds: expected different numbers of at least 0, found {seeds}")
    if folds < 0 or folds == 1:
        raise ValueError(f"--folds must be 0 or at least 2, found {folds}")
    if folds and any("fold" in ((section or {}).get("init_args") or {}) for section in data.values()):
        raise ValueError("--folds divides the training split: leave fold out of the data")
    if reference not in models:
        raise ValueError(f"--reference {reference} is none of the models: choose among {', '.join(models)}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, found {workers}")


def _tried(model: str, of: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as arguments of ``train``, none of which the parser refuses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.yaml"
        path.write_text(yaml.safe_dump(config))
        try:
            made = cli.configured("train", ["-c", str(path)])
        except SystemExit:
            print(f"ehr: that was models.{model} on data.{of}", file=sys.stderr)
            raise
        except ValueError as error:
            raise ValueError(f"models.{model} on data.{of}: {error}") from error
    if not made["model"].supervised:
        raise ValueError(f"models.{model} predicts no outcome: compare models that do")
    if made["data"].split not in ("test", "val"):
        raise ValueError(
            f"data.{of}: split {made['data'].split} would score patients that were trained on; give test or val"
        )
    metrics.check_operating_point(made["operating_point"], asdict(made["data"].task))
    return made


# ---- the processes -----------------------------------------------------------------------------------------------------------


def work(order: dict[str, Any]) -> None:
    """Train what nobody trains until nothing is left, or until the process that started this one is gone."""
    trainings = [Training(*place) for place in order["trainings"]]
    while os.getppid() == order["parent"]:
        left = [training for training in trainings if not training.ended()]
        if not left:
            return
        for training in left:
            lock = FileLock(training.queued("lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if not training.ended():
                    _attempt(training, trainings.index(training), order)
                    break
            finally:
                lock.release()
        else:
            time.sleep(1)  # another process may die, and its training is then ours


def _attempt(training: Training, number: int, order: dict[str, Any]) -> None:
    """Train one, or go on with it where a process before this one left it."""
    state, path, began = training.state(), training.queued("json"), time.monotonic()
    minutes, epochs = state["minutes"], training.epochs()
    after, losses = state["lost"]
    state["lost"] = [epochs, losses + 1 if after == epochs else 1]
    if state["lost"][1] > ATTEMPTS:
        state["failed"] = (
            f"its process was killed {ATTEMPTS} times in the same epoch: did the machine run out of memory?"
        )
    write_json(state, path)
    if state["failed"]:
        return

    def report(epoch: int, row: dict[str, float]) -> None:
        state["minutes"] = minutes + (time.monotonic() - began) / 60
        write_json(state, path)
        if os.getppid() != order["parent"]:
            raise KeyboardInterrupt

    def failed(reason: str) -> None:
        write_json({**state, "failed": reason}, path)
        tracking.end({"state": "failed"}, failed=True)

    try:
        values = cli.configured("train", ["-c", str(training.queued("yaml"))])
        train(**{**values, "resume": True}, trial=fit.Trial(order["name"], number, {}, report))
        if not state["minutes"]:  # a model that has no epochs
            state["minutes"] = (time.monotonic() - began) / 60
            write_json(state, path)
    except KeyboardInterrupt:
        write_json({**state, "lost": [0, 0]}, path)  # left to another by intention
        raise
    except OSError:
        raise  # the disk: no fault of the training
    except SystemExit:
        failed("its command line was refused: see the worker's log")
    except ValueError as error:
        print(f"{training}: {error}", flush=True)
        failed(str(error))
    except Exception as error:
        traceback.print_exc()
        failed(why_failed(error))
        raise SystemExit(RENEW) from error


def _standing(name: str, trainings: list[Training]) -> Standing:
    ended = {str(training): _outcome(training) for training in trainings if training.ended()}
    return Standing(ended, name, len(ended) + sum(training.epochs() for training in trainings))


def _outcome(training: Training) -> str:
    """What became of a training, in one line."""
    state = training.state()
    if not training.scored():
        return f"{training}  failed: {state['failed']}"
    split, result = list(json.loads((training.run / "metrics.json").read_text()).items())[-1]
    scores = "  ".join(
        f"{name.upper()} {result[name]['value']:.3f}"
        for name in ("auroc", "auprc")
        if result[name]["value"] is not None
    )
    return f"{training}  {split} {scores}  {state['minutes']:.1f} minutes"


# ---- what was found ------------------------------------------------------------------------------------------------------------


def _summarised(folder: Path, trainings: list[Training], reference: str | None) -> pl.DataFrame:
    """Print and write the tables; say what failed.

    Raises:
        ValueError: a training failed.
    """
    failed = [training for training in trainings if not training.scored()]
    tables: dict[str, pl.DataFrame] = {}
    for of in dict.fromkeys(training.data for training in trainings):
        scored = [t for t in trainings if t.data == of and t.scored()]
        groups = _groups([t for t in trainings if t.data == of])
        if reference not in groups:
            console.print(
                f"{of}: no training of {reference}, the reference, has ended", soft_wrap=True, highlight=False
            )
            continue
        split = list(json.loads((scored[0].run / "metrics.json").read_text()))[-1]
        table = contrasts(groups, reference, split)
        minutes = pl.DataFrame(
            [(t.model, t.state()["minutes"] or None) for t in scored], ["model", "minutes"], orient="row"
        )
        table = table.join(minutes.group_by("model").mean(), on="model", maintain_order="left")
        folds = len({t.fold for t in scored} - {None})
        title = f"{of}, {folds} folds of the train split" if folds else f"{of}, {split} split"
        show(table, reference, title)
        tables[title] = table.insert_column(0, pl.lit(of).alias("data")).insert_column(
            1, pl.lit(f"train, {folds} folds" if folds else split).alias("split")
        )
    if tables:
        whole = pl.concat(tables.values(), how="diagonal")
        write(folder / "benchmark.csv", whole.write_csv().encode())
        assert reference is not None
        draw(tables, reference, folder / "benchmark.png")
        console.print(f"wrote benchmark.csv and benchmark.png to {folder}", soft_wrap=True)
    if failed:
        reasons = "\n".join(f"  {_outcome(training)}" for training in failed)
        raise ValueError(
            f"{len(failed)} of {len(trainings)} trainings failed:\n{reasons}\nthe same command tries them again; {folder}/worker-*.log say more"
        )
    return whole


def _groups(trainings: list[Training]) -> dict[str, list[Run]]:
    """Models of one data set and their runs, one a seed: what all folds scored together where there are folds, and only of
    seeds of which all of it was scored."""
    groups: dict[str, list[Run]] = {}
    for model, seed in dict.fromkeys((t.model, t.seed) for t in trainings):
        parts = [t for t in trainings if (t.model, t.seed) == (model, seed)]
        if all(t.scored() for t in parts):
            groups.setdefault(model, []).append(joined([Run.read(str(t.run)) for t in parts]))
    return groups


if __name__ == "__main__":
    cli.guarded(lambda: work(json.load(sys.stdin)), "ehr benchmark --help")
