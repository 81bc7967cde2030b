"""The LightningDataModules: one for each hospital system, all of them the same loaders over its cohort."""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol

import lightning
import numpy as np
import polars as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules import agreement, hospitals, scaler
from datamodules.agreement import Trained
from datamodules.cohort import Cohort, hashed, rows_of
from datamodules.contract import Batch, Spec, View, joined
from datamodules.hospitals.base import Hospital, Split
from datamodules.resident import Resident, megabytes
from datamodules.sampler import Batches
from datamodules.store import Store
from datamodules.tasks import Task
from datamodules.views import Thinning, Views

FEWEST = 20  # patients with each outcome that a validation split needs
PARTS = 3  # of few patients, one of which at a time is left out
WORKERS = 8  # most processes that build batches, where nobody says how many
OF_MACHINE = ("cache", "num_workers", "resident")  # options that a checkpoint does not carry to other machines
log = logging.getLogger(__name__)


class Teacher(Protocol):
    """Whoever says, beside the outcome, how likely it was: ``experiments.teacher``."""

    def mixed(self, target: np.ndarray, rows: np.ndarray, static: np.ndarray, summary: np.ndarray) -> np.ndarray:
        """(B,) what training aims at, from outcomes (B,), row numbers (B,), and what the teacher judges by."""


class ICUDataModule(lightning.LightningDataModule, ABC):
    """Batches of one hospital system for one task; ``of`` joins it with a hospital.

    Under a ``lightning.Trainer`` it asks the model which view it reads and, where it is trained, uses its variables and
    scaler; ``agreement`` says what is refused then.

    Args:
        split: The split that is scored after training: train, val, test or all.
        batch_size: Samples per batch; with several processes, of each of them.
        num_workers: Processes that build batches; 0 builds them in the training process. Default: up to 8 beside a GPU,
            where batches are not ``resident``, else 0.
        resident: Megabytes that the samples of train, and as many that those of val, may take where the model is,
            so that training makes each once and not every epoch. Not used where they do not fit, with num_workers,
            or by training with thinning, which makes other ones in every epoch. 0: never.
        thinning: Share of observations that training leaves out, others in every epoch, of variables that have at least
            6 in a window.
    """

    name: str
    root: Any
    task: Task
    seed: int
    treatment: bool
    statics: list[str]

    def __init__(
        self,
        split: Split = "test",
        batch_size: int = 64,
        num_workers: int | None = None,
        thinning: float = 0.0,
        resident: float = 2048.0,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        if batch_size < 1:
            raise ValueError(f"--data.batch_size must be at least 1, found {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"--data.num_workers must be at least 0, found {num_workers}")
        if not resident >= 0:
            raise ValueError(f"--data.resident must be at least 0, found {resident}")
        if not 0 <= thinning < 1:
            raise ValueError(f"--data.thinning must be at least 0 and below 1, found {thinning}")
        self.thinning = thinning
        self.split, self.batch_size, self.num_workers, self.resident = split, batch_size, num_workers, resident
        assert isinstance(self, Hospital)
        self.cohort = Cohort(self)
        self.order_epoch, self.order_start = 0, 0  # of training batches; a training run sets them
        self.order_seed: int | None = None
        self.rank, self.world = 0, 1  # this process and how many there are that share every batch
        self.view: View = "grid"  # what the model reads
        self.summary = False  # whether it reads the summary, too
        self.teacher: Teacher | None = None  # mixes its probabilities into the targets of training
        self.beside: ICUDataModule | None = None  # whose training samples join these in training
        self._limited: dict[str, np.ndarray] = {}  # rows that ``limit`` leaves of train and val
        self.spec: Spec | None = None
        self.trained: Trained = []  # whose patients a trained model has seen
        self._own_task = self._adopted = False
        self.samples: Any = None  # table of ``Cohort.samples``, once ``setup`` has run

    @abstractmethod
    def stays(self) -> pl.DataFrame:
        """Those of the hospital; without one this is no data module."""

    @property
    def labelled(self) -> bool:
        """False: prediction on new patients, whose outcome is unknown."""
        return self.cohort.labelled

    @labelled.setter
    def labelled(self, labelled: bool) -> None:
        if labelled != self.cohort.labelled:
            self.cohort.labelled, self.samples = labelled, None

    @property
    def store(self) -> Store:
        """The events, extracted first where the cache does not hold them."""
        return self.cohort.store

    def prepare_data(self) -> None:
        """Extract the raw tables and derive what the cohort needs, once, in one process."""
        self._agree()
        self.cohort.stays()
        if self.task.sepsis:
            self.cohort.known_septic()

    def setup(self, stage: str | None = None) -> None:
        """Choose the samples and, where no model's is used, fit the scaler on the training split.

        Raises:
            ValueError: nobody is left, or a trained model contradicts an option.
        """
        self._agree()
        if self.samples is not None:
            return
        self.samples, self.attrition = self.cohort.samples()
        self._stay, self._minute = self.samples["stay"].to_numpy(), self.samples["minute"].to_numpy().astype(np.int64)
        self._target = self.samples["target"].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        if self.spec is None:
            train = self.rows("train")
            self.spec = scaler.fit(self, self.store, self._stay[train], self._minute[train])  # type: ignore[arg-type]
        elif self._own_task:
            self.spec = self.spec._replace(task=agreement.task_of(self))  # type: ignore[arg-type]
        self._views = Views(self.store, self.spec.variables, self.spec.window)
        self._inputs = scaler.Inputs(self.store.stays, self.spec, self._views)
        if self._adopted:
            self._remark()

    def serve(self, model: Any) -> None:
        """Give the batches that a model reads."""
        self.view, self.summary = getattr(model, "view", "grid"), getattr(model, "summary", False)

    def adopt(self, spec: Spec, trained: Trained | None = None, own_task: bool = False) -> None:
        """Use a trained model's task, variables and scaler from the next ``setup`` on, so that nothing of these data is
        fitted.

        Args:
            spec: of the model.
            trained: whose patients it was trained on, as its checkpoint says.
            own_task: keep the task of these data, as where training starts from the weights of another.
        """
        self.spec, self.trained, self._own_task, self._adopted, self.samples = spec, trained or [], own_task, True, None

    def population(self) -> str:
        """Whose patients these are: equal for two extracts in which equal ids are the same patient."""
        assert isinstance(self, Hospital)
        if self.published_ids:
            return self.name
        ids = "\n".join(sorted(self.store.stays["patient_id"].unique()))
        return f"{self.name}-{hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()}"

    def facts(self) -> dict[str, Any]:
        """What the checkpoint of a model that is trained on these data says of them, in plain types."""
        assert isinstance(self, Hospital)
        arguments = {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in self.hparams.items()
            if name not in OF_MACHINE
        }
        trained = {"population": self.population(), **{name: getattr(self, name) for name in agreement.OF_SPLIT}}
        return {
            "data": {"class": type(self).__name__, "arguments": {**arguments, **self.options()}},
            "split_hash": self.split_hash(),
            "trained_on": [*(t for t in self.trained if t != trained), trained],
        }

    def _agree(self) -> None:
        """Take over what the model of a trainer says, and the options of one that is trained."""
        self._ask_model()
        if self._adopted and self.samples is None:
            agreement.agree(self, self.spec, self.trained, self.population(), self._own_task)  # type: ignore[arg-type]

    def _remark(self) -> None:
        """Say what goes with every score of a model that was adopted."""
        assert self.spec is not None
        scored = self.samples[self.rows(self.split)]
        charted = set(self.store.coverage().filter(pl.col("events") > 0)["concept"])
        absent = [v for v in self.spec.variables if v not in charted]
        for line in agreement.remarks(self.name, self.spec, self.trained, self.population(), scored, absent):
            log.warning(line)

    def _ask_model(self) -> None:
        if self.trainer is None:
            return
        model = self.trainer.lightning_module
        self.rank, self.world = self.trainer.global_rank, self.trainer.world_size
        self.serve(model)
        if not getattr(model, "supervised", True):
            self.labelled = False
        spec = getattr(model, "spec", None)
        if spec is not None and spec != self.spec:
            self.adopt(spec, model.facts.get("trained_on"))

    def targets(self, split: Split) -> np.ndarray:
        """(N,) targets of a split's samples; NaN where unknown."""
        return self._target[self.rows(split)]

    def rows(self, split: Split) -> np.ndarray:
        """Row numbers of ``samples`` in a split."""
        assert self.samples is not None and isinstance(self, Hospital)
        return self._limited[split] if split in self._limited else rows_of(self.samples, split, self)

    def limit(self, patients: int | None, draw: int = 0, together: bool = False) -> bool:
        """Leave so many patients to training and validation together, as if no more had been charted; test stays whole.

        They keep their split where validation has at least 20 of them with each outcome; else all of them are in both,
        and no choice should be made by what is validated, but with ``leave_out``.

        Args:
            patients: how many, of those in train and val; None: all.
            draw: another number draws others.
            together: all of them in both in any case.

        Returns:
            Whether validation is apart from training.

        Raises:
            ValueError: there are not so many.
        """
        assert self.samples is not None and isinstance(self, Hospital)
        of_split = {split: rows_of(self.samples, split, self) for split in ("train", "val")}  # type: ignore[arg-type]
        patient = self.samples["patient_id"].cast(pl.String).to_numpy()
        everyone = np.unique(patient[np.concatenate(list(of_split.values()))])
        if patients is not None and len(everyone) < patients:
            raise ValueError(
                f"{patients:,} patients were asked for, but {self.root} has {len(everyone):,} in train and val"
            )
        chosen = sorted(everyone, key=lambda p: hashed(f"{draw}:{p}"))
        few = set(chosen[:patients])
        limited = {split: rows[[p in few for p in patient[rows]]] for split, rows in of_split.items()}
        val = limited["val"]
        outcomes = [len(np.unique(patient[val[self._target[val] == outcome]])) for outcome in (0, 1)]
        apart = min(outcomes) >= FEWEST and not together
        if not apart:
            both = np.sort(np.concatenate(list(limited.values())))
            limited = {"train": both, "val": both}
        self._limited = limited
        return apart

    def leave_out(self, part: int | None) -> None:
        """Validate on a third of the patients that are in training and validation alike, and train on the others.

        Args:
            part: which, from 0 on; those with an event are divided as evenly as those without. None: all are in both.
        """
        both = np.union1d(*self._limited.values())
        patient = self.samples["patient_id"].cast(pl.String).to_numpy()[both]
        event = set(patient[self._target[both] == 1])
        order = sorted(set(patient), key=lambda p: (p in event, hashed(p)))
        left_out = set() if part is None else set(order[part::PARTS])
        out = np.array([p in left_out for p in patient])
        self._limited = {"train": both[~out], "val": both if part is None else both[out]}

    def refit(self) -> None:
        """Choose the variables and fit the scaler on the training samples of these data, and not on those of the model
        that they were set up for."""
        train = self.rows("train")
        self.spec = scaler.fit(self, self.store, self._stay[train], self._minute[train])  # type: ignore[arg-type]
        self._views = Views(self.store, self.spec.variables, self.spec.window)
        self._inputs = scaler.Inputs(self.store.stays, self.spec, self._views)

    def join(self, source: "ICUDataModule") -> None:
        """Let the training samples of another system join these in training; validation and test are these alone.

        In a batch they have row numbers from ``len(samples)`` on.

        Args:
            source: set up with the variables and scaler of these.

        Raises:
            ValueError: their variables or scalers differ.
        """
        assert self.samples is not None and source.samples is not None
        if source.spec is None or self.spec is None or source.spec[:7] != self.spec[:7]:
            raise ValueError(
                f"{source.name} and {self.name} cannot be trained on together: their variables or scalers differ"
            )
        self.beside = source

    def positive_weight(self) -> float:
        """N_neg / N_pos of the training split.

        Raises:
            ValueError: only one outcome occurs there.
        """
        target = self.targets("train")
        positive = float(target.sum())
        if not 0 < positive < len(target):
            raise ValueError(
                f"the training split has {int(positive)} positives among {len(target)} samples: both outcomes are "
                f"needed to train"
            )
        return (len(target) - positive) / positive

    def split_hash(self) -> str:
        """Changes when any patient changes split."""
        assert self.samples is not None
        pairs = self.samples.select("patient_id", "split").unique().sort("patient_id")
        lines = "\n".join(f"{p} {s}" for p, s in pairs.iter_rows())
        return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()

    def train_dataloader(self) -> DataLoader:
        """Batches of the training split, shuffled by (``order_seed``, epoch)."""
        return self._loader("train", shuffle=True, again=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split in order."""
        return self._loader("val", again=True)

    def test_dataloader(self) -> DataLoader:
        """Batches of ``split`` in order."""
        return self._loader(self.split)

    def predict_dataloader(self) -> DataLoader:
        """Batches of ``split``, each scored whole by one process."""
        return self._loader(self.split, whole=True)

    def _loader(self, split: Split, shuffle: bool = False, whole: bool = False, again: bool = False) -> DataLoader:
        rows = self.rows(split)
        if not len(rows):
            raise ValueError(
                f"no sample in split {split!r} of {self.root}; choose another --data.split (all takes every stay)"
            )
        if len(rows) < self.world and not whole:
            raise ValueError(
                f"split {split!r} of {self.root} has {len(rows)} samples for {self.world} processes: each needs one; "
                f"lower --trainer.devices"
            )
        if shuffle and self.beside is not None:
            rows = np.concatenate([rows, len(self.samples) + self.beside.rows("train")])
        lengths = self._lengths(rows) if self.view == "triplets" else None
        seed = self.seed if self.order_seed is None else self.order_seed
        order = (seed, self.order_epoch, self.order_start) if shuffle else (None,)
        batches = Batches(rows, self.batch_size, *order, lengths=lengths, rank=self.rank, world=self.world, whole=whole)
        batches.numbered = shuffle
        device = self._device()
        resident = self._resident(rows, lengths, shuffle, device) if again else None
        if resident is not None:
            return DataLoader(resident, sampler=batches, batch_size=None)
        workers = self.num_workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(WORKERS, max(cores // max(self.world, 1) - 1, 0)) if again and device.type == "cuda" else 0
        return DataLoader(
            Samples(self),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _device(self) -> torch.device:
        """Where the model of the trainer is."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _resident(
        self, rows: np.ndarray, lengths: np.ndarray | None, training: bool, device: torch.device
    ) -> Resident | None:
        """Samples that are kept from one epoch to the next; None where they do not fit, or are others every time."""
        if self.trainer is None or self.trainer.max_epochs == 1 or self.num_workers is not None:
            return None
        if training and (self.thinning or self.beside is not None):
            return None
        assert self.spec is not None
        events = 0 if lengths is None else int(lengths.sum())
        summary = self.summary or self.view == "summary"
        if megabytes(self.spec, self.view, summary, len(rows), events) > self.resident:
            return None
        return Resident(lambda some: self.batch(some, 0 if training else None), rows, lengths, device)

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        own = rows[rows < len(self.samples)]
        lengths = self._views.lengths(self._stay[own], self._minute[own])
        if len(own) == len(rows):
            return lengths
        assert self.beside is not None
        return np.concatenate([lengths, self.beside._lengths(rows[len(own) :] - len(self.samples))])

    def batch(
        self,
        rows: np.ndarray,
        epoch: int | None = None,
        without: np.ndarray | None = None,
        view: View | None = None,
    ) -> Batch:
        """The samples ``rows`` as one batch.

        Args:
            rows: row numbers of ``samples``.
            epoch: of training, in which observations are left out and a teacher is heard; None: neither.
            without: (B, F) variables of each sample that are left out of its record, whatever is made of it.
            view: what is made of it; None: what the model asks for.
        """
        assert self.spec is not None
        others = rows >= len(self.samples)
        if others.any():
            return self._joint(rows[~others], rows[others], epoch)
        teacher = self.teacher if epoch is not None else None
        thinning = None
        if epoch is not None and self.thinning:
            thinning = Thinning(self.thinning, self.seed if self.order_seed is None else self.order_seed, epoch)
        view = view or self.view
        read = self.summary or view == "summary"
        at = self._stay[rows], self._minute[rows]
        batch = self._inputs.batch(view, read or teacher is not None, *at, without, thinning)
        target = self._target[rows]
        if teacher:
            target = teacher.mixed(target, rows, batch.static.numpy(), batch.summary.numpy())
        if not read:
            batch = batch._replace(summary=batch.summary[:, :0])
        return batch._replace(target=torch.from_numpy(target), row=torch.from_numpy(rows))

    def _joint(self, own: np.ndarray, others: np.ndarray, epoch: int | None) -> Batch:
        """Samples of both systems that train together."""
        assert self.beside is not None
        source = self.beside
        source.view, source.summary, source.order_seed = self.view, self.summary, self.order_seed
        source.thinning = self.thinning
        batch = source.batch(others - len(self.samples), epoch)
        batch = batch._replace(row=batch.row + len(self.samples))
        return joined([self.batch(own, epoch), batch]) if len(own) else batch

    def charted(self, rows: np.ndarray) -> np.ndarray:
        """(B, F) Whether each variable was charted, or set, between the begin of the record and the prediction."""
        return self._views.elapsed(self._stay[rows], self._minute[rows])[:, 1 : 1 + len(self._views.variables)] > 0


class Samples(Dataset):
    """Indexed by an array of rows, or by (epoch, rows) in training, it gives the whole batch at once: nothing is done
    per row in Python."""

    def __init__(self, module: ICUDataModule):
        self.module = module

    def __getitem__(self, item: np.ndarray | tuple[int, np.ndarray]) -> Batch:
        return self.module.batch(item[1], item[0]) if isinstance(item, tuple) else self.module.batch(item)

    def __len__(self) -> int:
        assert self.module.samples is not None
        return len(self.module.samples)


def of(hospital: type[Hospital]) -> type[ICUDataModule]:
    """The LightningDataModule of a hospital: its options and those of ``ICUDataModule`` together."""
    members = {"__doc__": hospital.__doc__, "__module__": __name__}
    return type(hospital.__name__, (hospital, ICUDataModule), members)


globals().update({name: of(getattr(hospitals, name)) for name in hospitals.__all__})


def __getattr__(
    name: str,
) -> Any:  # never reached by a name of ``hospitals``; it tells type checkers that there are such
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; choose among {', '.join(hospitals.__all__)}")
