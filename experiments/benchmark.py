"""``ehr benchmark``: models x seeds x data sets, trained by many processes and compared."""

import re
import sys
import tempfile
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import yaml

from experiments import cli, metrics
from experiments.compare import Run, contrasts, draw, joined, show
from experiments.files import console, write
from experiments.strategies import STRATEGIES, Transfer
from experiments.trainings import Training, begun, check_all, check_one_device, complete

OURS = ("name", "runs", "seed", "resume", "config", "finetune", "finetune_learning_rate", "finetune_epochs", "transfer")
OF_TRAINING = ("batch_size", "thinning")  # options of the data that belong to how a model is trained


def benchmark(
    models: dict[str, str | dict],  # not Any, of which jsonargparse would make objects
    data: dict[str, dict],
    seeds: list[int] | None = None,
    folds: int = 0,
    transfer: str | None = None,
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
        transfer: Carry every trained model to each of the other data sets, too, so that there are all pairs in both directions:
            zero_shot, finetune and other strategies of ehr finetune, parted by commas.
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
    strategies = _strategies(transfer, data, folds)
    folder = Path(runs) / (name or "benchmark")
    if (folder / "last.ckpt").exists():
        raise ValueError(f"{folder} holds a training run; choose another --name")
    configurations = {
        (of, model): composed(model, entry, of, section)
        for (of, section), (model, entry) in product(data.items(), models.items())
    }
    made = {
        place: _tried(place[1], place[0], config) for place, config in configurations.items()
    }  # before anything is begun
    for options in made.values():
        for strategy in strategies:
            Transfer(strategy).runs(type(options["model"]))
    for of in data:  # once, and before any worker says that the files are not there
        made[of, next(iter(models))]["data"].prepare_data()
    # one seed of all models before the next
    parts: list[str | None] = [f"{k + 1}/{folds}" for k in range(folds)] if folds else [None]
    entries = [Entry(*what) for what in product(data, seeds, parts, models)]
    trainings = {entry: Training(str(folder), str(entry)) for entry in entries}
    queue = {trainings[entry]: entry.configuration(configurations[entry.data, entry.model]) for entry in entries}
    alone = begun(folder, queue, "give the model another name in the YAML file, choose another --name")
    complete(folder, list(queue), workers)
    carried: dict[Carried, Training] = {}
    for entry, training in trainings.items():
        for target, strategy in product(data, strategies):
            if target != entry.data and training.scored():
                there = Carried(entry, target, strategy)
                carried[there] = Training(str(folder), str(there), "finetune")
    queue = {
        training: there.configuration(configurations[there.target, there.entry.model], trainings[there.entry])
        for there, training in carried.items()
    }
    alone = begun(folder, queue, "choose another --name")
    complete(folder, list(queue), workers)
    with alone:
        return _summarised(folder, trainings, carried, reference)


class Entry(NamedTuple):
    """One model with one seed on one data set, whole or one fold of it."""

    data: str
    seed: int
    fold: str | None
    model: str

    def __str__(self) -> str:
        fold = f"-fold-{self.fold.replace('/', '-of-')}" if self.fold else ""
        return f"{self.data}/{self.model}-{self.seed}{fold}"

    def configuration(self, config: dict[str, Any]) -> dict[str, Any]:
        """That of its model on its data, with the seed and the fold."""
        config = deepcopy({**config, "seed": self.seed})
        if self.fold:
            config["data"]["init_args"] |= {"fold": self.fold, "split": "val"}
        return config


class Carried(NamedTuple):
    """A trained model on another data set."""

    entry: Entry
    target: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.pair}/{self.entry.model}-{self.entry.seed}-{self.strategy}"

    @property
    def pair(self) -> str:
        """Where from and where to."""
        return f"{self.entry.data}-to-{self.target}"

    def configuration(self, config: dict[str, Any], trained: Training) -> dict[str, Any]:
        """Of ``ehr finetune``, from that of the model on the target and what was trained on the source."""
        kind = config["model"]["class_path"]
        return deepcopy({
            "ckpt": str(trained.run / "best.ckpt"), "data": config["data"], "seed": self.entry.seed,
            "trainer": {k: v for k, v in (config.get("trainer") or {}).items() if k != "max_epochs"},
            "transfer": {"strategy": self.strategy},
            **({"model": kind} if "." in kind and not kind.startswith("ehrmodels.") else {}),
        })  # fmt: skip


def _strategies(transfer: str | None, data: dict[str, Any], folds: int) -> list[str]:
    """Those of ``--transfer``, zero_shot first."""
    if transfer is None:
        return []
    if folds or len(data) < 2:
        raise ValueError(
            f"--transfer {transfer} carries models from one data set to another: give at least two, and leave --folds out"
        )
    named = [strategy.strip() for strategy in transfer.split(",")]
    for strategy in named:
        Transfer(strategy)
    return list(dict.fromkeys(["zero_shot", *(STRATEGIES[1:] if "all" in named else named)]))


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
    check_one_device(config.get("trainer") or {}, place, "--workers")
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


def _summarised(
    folder: Path, trainings: dict[Entry, Training], carried: dict[Carried, Training], reference: str | None
) -> pl.DataFrame:
    """Print and write the tables; say what failed.

    Raises:
        ValueError: a training failed.
    """
    tables: dict[str, pl.DataFrame] = {}
    for of in dict.fromkeys(entry.data for entry in trainings):
        of_data = {entry: training for entry, training in trainings.items() if entry.data == of}
        scored = {entry: training for entry, training in of_data.items() if training.scored()}
        groups = _groups(of_data)
        if reference not in groups:
            console.print(
                f"{of}: no training of {reference}, the reference, has ended", soft_wrap=True, highlight=False
            )
            continue
        split = next(iter(scored.values())).result()[0]
        table = contrasts(groups, reference, split)
        minutes = pl.DataFrame(
            [(entry.model, training.state()["minutes"] or None) for entry, training in scored.items()],
            ["model", "minutes"],
            orient="row",
        )
        table = table.join(minutes.group_by("model").mean(), on="model", maintain_order="left")
        folds = len({entry.fold for entry in scored} - {None})
        title = f"{of}, {folds} folds of the train split" if folds else f"{of}, {split} split"
        show(table, reference, title)
        tables[title] = table.insert_column(0, pl.lit(of).alias("data")).insert_column(
            1, pl.lit(f"train, {folds} folds" if folds else split).alias("split")
        )
    for pair in dict.fromkeys(there.pair for there in carried):
        of_pair = {there: training for there, training in carried.items() if there.pair == pair and training.scored()}
        rows: dict[str, list[Run]] = {}
        for there, training in of_pair.items():
            rows.setdefault(f"{there.entry.model}, {there.strategy}", []).append(Run.read(str(training.run)))
        for entry, training in trainings.items():
            if training.scored() and any(entry.data == there.target for there in of_pair):
                rows.setdefault(f"{entry.model}, trained there", []).append(Run.read(str(training.run)))
        first = f"{reference}, zero_shot"
        if first in rows:
            split = next(iter(of_pair.values())).result()[0]
            title = f"{pair.replace('-to-', ' to ')}, {split} split"
            table = contrasts(dict(sorted(rows.items())), first, split)
            show(table, first, title)
            tables[title] = table.insert_column(0, pl.lit(pair).alias("data")).insert_column(
                1, pl.lit(split).alias("split")
            )
    if tables:
        whole = pl.concat(tables.values(), how="diagonal")
        write(folder / "benchmark.csv", whole.write_csv().encode())
        draw(tables, folder / "benchmark.png")
        console.print(f"wrote benchmark.csv and benchmark.png to {folder}", soft_wrap=True)
    check_all([*trainings.values(), *carried.values()], folder)
    return whole


def _groups(trainings: dict[Entry, Training]) -> dict[str, list[Run]]:
    """Models of one data set and their runs, one a seed: what all folds scored together where there are folds, and only of
    seeds of which all of it was scored."""
    groups: dict[str, list[Run]] = {}
    for model, seed in dict.fromkeys((entry.model, entry.seed) for entry in trainings):
        parts = [t for entry, t in trainings.items() if (entry.model, entry.seed) == (model, seed)]
        if all(t.scored() for t in parts):
            groups.setdefault(model, []).append(joined([Run.read(str(t.run)) for t in parts]))
    return groups
