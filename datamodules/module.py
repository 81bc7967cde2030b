"""The LightningDataModules: one class a hospital system, one base that does everything else."""

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import polars as pl
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from datamodules import tables
from datamodules.batch import Batch, Grid, Spec, Triplets
from datamodules.batches import Batches
from datamodules.cohort import Store, build, fingerprint
from datamodules.concepts import BY_NAME, CONCEPTS
from datamodules.schema import VASOPRESSORS
from datamodules.sofa import Switches
from datamodules.tasks import OUTCOMES, STATICS, Task, TaskName, check_statics
from datamodules.views import CLIP, Views

Split = Literal["train", "val", "test", "all"]
View = Literal["grid", "triplets"]
CARE_UNITS = ("medical", "surgical", "cardiac", "cardiac_surgery", "neuro", "mixed", "other")
FIT_SAMPLES = 8192  # training samples from which the scaler is fitted


class ICUDataModule(lightning.LightningDataModule, ABC):
    """Batches of one hospital system for one task.

    The raw files are extracted once into a store in ``cache`` and memory-mapped afterwards; splits are by patient and
    depend on nothing but ``seed`` and the patient's id.

    Args:
        root: Folder with the publisher's files.
        task: What is predicted: death before hospital discharge, death within the next 24 hours, or onset of sepsis.
        hours: Hours from ICU admission to the (first) prediction.
        window: Hours of history that a model sees; default: the same as ``hours`` (24 for predictions every hour).
        rolling: With mortality_24h, predict every hour from ``hours`` on instead of once.
        sepsis: Keep only stays whose Sepsis-3 is known by the (first) prediction.
        definition: Definition of Sepsis-3; default: mimic_code on MIMIC-IV, eicu on eICU. `ehr prepare --compare_definitions true` lists them.
        sofa: Switches of the SOFA score: gcs_intubated, fio2_missing, pressor_min_minutes, urine_min_hours.
        min_age: Youngest age in years.
        first_stay: Keep only each patient's first ICU stay.
        min_icu_hours: Shortest ICU stay in hours, such as 30 (YAIB); a stay must reach the prediction in any case.
        treatment: Let models see treatment and its response (infusion rates, ventilation, FiO2, urine); false removes
            these variables, to measure what they are worth.
        statics: Features known at admission: any of age, sex, unit, admit_minute, such as age,sex.
        split: The split that is scored after training: train, val, test or all.
        split_by: Keep the patients ("patient") or whole hospitals ("hospital") of train, val and test apart.
        seed: Seed of the split.
        batch_size: Samples per batch; with several processes, of each of them.
        num_workers: Processes that build batches; 0 builds them in the training process.
        cache: Folder for extracted stores; default: $EHR_CACHE or .cache in the current folder.
    """

    name = ""
    raw_tables: tuple[str, ...] = ()
    default_definition = ""  # of Sepsis-3; empty where the data cannot tell

    def __init__(
        self,
        root: str,
        task: TaskName = "mortality_hospital",
        hours: int = 24,
        window: int | None = None,
        rolling: bool = False,
        sepsis: bool = False,
        definition: str | None = None,
        sofa: Switches | None = None,
        min_age: float = 18,
        first_stay: bool = True,
        min_icu_hours: float = 0,
        treatment: bool = True,
        statics: list[str] | str | None = None,
        split: Split = "test",
        split_by: Literal["patient", "hospital"] = "patient",
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        cache: str | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.root = Path(root)
        hourly = rolling or task == "sepsis_onset"
        self.task = Task(task, hours, (24 if hourly else hours) if window is None else window, rolling, sepsis)
        self.definition, self.sofa = definition or self.default_definition, Switches(**(sofa or {}))
        self.min_age, self.first_stay, self.min_icu_hours, self.treatment = min_age, first_stay, min_icu_hours, treatment
        self.statics = statics.split(",") if isinstance(statics, str) else list(STATICS if statics is None else statics)
        check_statics(self.statics)
        self.split, self.split_by, self.seed = split, split_by, seed
        self.order_seed, self.order_epoch, self.order_start = seed, 0, 0  # of training batches; a training run sets them
        self.rank, self.world = 0, 1  # this process and how many there are that share every batch
        if batch_size < 1:
            raise ValueError(f"--data.batch_size must be at least 1, found {batch_size}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.cache = Path(cache or os.environ.get("EHR_CACHE", ".cache"))
        self.view: View = "grid"
        self.labelled = True  # False: prediction on new patients, whose outcome is unknown
        self.spec: Spec | None = None
        self.store: Store | None = None

    # ---- what a hospital system defines -------------------------------------------------------------------------------

    def raw_files(self) -> list[Path]:
        """The files that the store is extracted from; raises FileNotFoundError where one that is needed is absent."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}: expected the files of {self.name}; set --data.root")
        found = [path for table in self.raw_tables if (path := tables.find(self.root, table))]
        if not found:
            raise FileNotFoundError(
                f"no {self.name} tables in {self.root}: expected {self.raw_tables[0]}.csv.gz (or .csv, .parquet); set --data.root"
            )
        return found

    @abstractmethod
    def stays(self) -> pl.DataFrame:
        """The table of schema ``schema.STAYS``."""

    @abstractmethod
    def events(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        """Raw table -> lazy frame of schema ``schema.RAW_EVENTS``."""

    def derive_sepsis(self) -> dict[str, pl.DataFrame]:
        """Tables "sofa", "suspicion" and "sepsis3" under ``definition``."""
        raise ValueError(f"{self.name} carries no antibiotics and cultures: Sepsis-3 needs MIMICIV or EICU; leave out --data.sepsis")

    def sepsis_switches(self) -> dict[str, Any]:
        """Further arguments that change ``derive_sepsis``."""
        return {}

    def compare_definitions(self) -> pl.DataFrame:
        """Stays, hospitals, prevalence and mortality under every definition of Sepsis-3."""
        return self.derive_sepsis()["sepsis3"]

    def infusions(self) -> pl.DataFrame:
        """The table of schema ``schema.VASOPRESSORS``."""
        return pl.DataFrame(schema=VASOPRESSORS)

    def hospital_coverage(self) -> pl.DataFrame | None:
        """One row a hospital: which tables it fills at all, where hospitals differ in that; else None."""
        return None

    def extraction(self) -> dict[str, Any]:
        """Arguments that change what is extracted; they are part of the store's key."""
        return {}

    def splits(self, stays: pl.DataFrame) -> pl.Series:
        """ "train", "val" or "test" per row of ``stays``: 70, 15 and 15 of 100, by a hash of seed and patient (or hospital)."""
        group = "patient_id" if self.split_by == "patient" else "hospital_id"
        if self.split_by == "hospital" and stays["hospital_id"].n_unique() < 10:
            raise ValueError(
                f"--data.split_by hospital needs at least 10 hospitals, found {stays['hospital_id'].n_unique()} in {self.root}; use patient"
            )
        ids = stays[group].unique()
        split = [_split_of(f"{self.seed}:{i}") for i in ids]
        return stays.select(pl.col(group).replace_strict(ids, pl.Series(split, dtype=pl.String)))[group]

    # ---- Lightning's hooks --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.open()
        if self.task.sepsis:
            self.sepsis_tables()

    def open(self) -> Store:
        """The store, extracted first where the cache does not hold it."""
        if self.store is None:
            key = fingerprint(self.raw_files(), self.root, {"name": self.name, **self.extraction()})
            self.store = build(self.cache / f"{self.name}-{key}", self.stays, self.events, self.root)
        return self.store

    def sepsis_tables(self) -> dict[str, pl.DataFrame]:
        """``derive_sepsis`` kept beside the store: computed once per definition and switches."""
        switches = [f"{k}={v}" for k, v in sorted({**self.sofa, **self.sepsis_switches()}.items())]
        folder = self.open().folder / "-".join(["sepsis3", self.definition, *switches])
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for name, table in self.derive_sepsis().items():
                    table.write_parquet(partial / f"{name}.parquet")
                partial.replace(folder)
        return {path.stem: pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}

    def setup(self, stage: str | None = None) -> None:
        if getattr(self, "samples", None) is not None:
            return
        store = self.open()
        if self.labelled:
            self.task.check_labels(store.stays)
        excluded_by, self.attrition = self.cohort()
        included = store.stays.with_row_index("stay").cast({"stay": pl.Int64}).filter(excluded_by.is_null())
        if included.is_empty():
            last = self.attrition.filter(self.attrition["stays"] == 0).row(0, named=True)
            raise ValueError(
                f"no stay of {self.root} is left after the rule {last['rule']!r}; "
                f"`ehr prepare` shows each rule, --data.hours, --data.min_age and --data.first_stay change them"
            )
        samples = self.task.samples(included, self.labelled)
        samples = samples.join(
            included.select("stay", "stay_id", "patient_id", split=self.splits(included)), on="stay", maintain_order="left"
        )
        self.samples = samples.filter(pl.col("target").is_not_null()) if self.labelled else samples
        self._stay, self._minute = self.samples["stay"].to_numpy(), self.samples["minute"].to_numpy().astype(np.int64)
        self._target = self.samples["target"].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        if self.spec is None:
            self.spec = self._fit()
        self._views = Views(store, self.spec.variables, self.spec.hours)
        self._static = self._statics(store.stays, self.spec)

    def cohort(self) -> tuple[pl.Series, pl.DataFrame]:
        """The rules of inclusion applied in order.

        Returns:
            Per stay the first rule that leaves it out (null: it is in the cohort), and the attrition table: stays,
            patients and deaths that are left after each rule.
        """
        store = self.open()
        stays = store.stays
        every, window = np.arange(len(stays)), self.task.window * 60
        until = 60 * stays.select(self.task.last_hour()).to_series().to_numpy()
        first = store.first_after(every, np.full(len(stays), self.task.hours * 60 - window))
        last = store.first_after(every, until)
        rules = [
            (sentence, stays.select(rule.fill_null(False)).to_series())
            for sentence, rule in self.task.rules(self.min_age, self.first_stay, self.min_icu_hours, self.labelled)
        ]
        if self.task.sepsis:
            found = self.sepsis_tables()["sepsis3"]
            known = found.select(
                "stay_id", known=pl.max_horizontal("onset_minute", "suspected_minute", "antibiotic_minute", "culture_minute")
            )
            known = stays.select("stay_id").join(known, on="stay_id", how="left", maintain_order="left")
            holds = (known["known"] <= self.task.hours * 60).fill_null(False)
            rules.append((f"Sepsis-3 ({self.definition}) known {self.task.hours} h after admission", holds))
        rules.append((f"any value before the {'last ' if self.task.hourly else ''}prediction", pl.Series(last > first)))
        excluded_by, kept = np.full(len(stays), None, object), np.ones(len(stays), bool)
        attrition = [_count("all ICU stays", stays)]
        for sentence, holds in rules:
            excluded_by[kept & ~holds.to_numpy()] = sentence
            kept &= holds.to_numpy()
            attrition.append(_count(sentence, stays.filter(kept)))
        return pl.Series("excluded_by", excluded_by.tolist(), dtype=pl.String), pl.DataFrame(attrition)

    def targets(self, split: Split) -> np.ndarray:
        """(N,) targets of a split's samples; NaN where unknown."""
        return self._target[self.rows(split)]

    def has(self, variable: str) -> bool:
        """Whether a variable is charted at all in these data."""
        assert self.store is not None
        return variable in self.store.coverage().filter(pl.col("events") > 0)["concept"]

    def adopt(self, spec: Spec) -> None:
        """Use a trained model's task, variables and scaler, so that nothing of these data is fitted."""
        for name, unit in zip(spec.variables, spec.units, strict=True):
            if name not in BY_NAME or BY_NAME[name].unit != unit:
                raise ValueError(
                    f"the model reads {name} in {unit!r} and these data do not have it so; use the version that it was trained with"
                )
        self.task = Task(**spec.task)
        self.spec = spec
        self.samples = None  # type: ignore[assignment]

    def split_hash(self) -> str:
        """Changes when any patient changes split."""
        pairs = self.samples.select("patient_id", "split").unique().sort("patient_id")
        said = "\n".join(f"{p} {s}" for p, s in pairs.iter_rows())
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def rows(self, split: Split) -> np.ndarray:
        """Row numbers of ``samples`` in a split."""
        if split not in ("train", "val", "test", "all"):
            raise ValueError(f"--data.split {split} is not known; choose train, val, test or all")
        return np.arange(len(self.samples)) if split == "all" else np.flatnonzero((self.samples["split"] == split).to_numpy())

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.split, whole=True)

    def _loader(self, split: Split, shuffle: bool = False, whole: bool = False) -> DataLoader:
        rows = self.rows(split)
        if not len(rows):
            raise ValueError(f"no sample in split {split!r} of {self.root}; choose another --data.split (all takes every stay)")
        if len(rows) < self.world and not whole:
            raise ValueError(
                f"split {split!r} of {self.root} has {len(rows)} samples for {self.world} processes: each needs one; lower --trainer.devices"
            )
        lengths = self._views.lengths(self._stay[rows], self._minute[rows]) if self.view == "triplets" else None
        order = (self.order_seed, self.order_epoch, self.order_start) if shuffle else (None,)
        batches = Batches(rows, self.batch_size, *order, lengths=lengths, rank=self.rank, world=self.world, whole=whole)
        return DataLoader(
            Samples(self),
            sampler=batches,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    # ---- batches ------------------------------------------------------------------------------------------------------

    def batch(self, rows: np.ndarray) -> Batch:
        """The samples ``rows`` as one batch of the view that the model asks for."""
        assert self.spec is not None
        stay, minute = self._stay[rows], self._minute[rows]
        static = torch.from_numpy(self._static[stay])
        target, index = torch.from_numpy(self._target[rows]), torch.from_numpy(rows)
        if self.view == "grid":
            return Grid(static, *self._views.grid(self.spec, stay, minute), target, index)
        return Triplets(static, *self._views.triplets(self.spec, stay, minute), target, index)

    # ---- scaler and statics -------------------------------------------------------------------------------------------

    def _fit(self) -> Spec:
        """Choose the variables and fit the scaler, both on samples of the training split only."""
        assert self.store is not None
        rows = self.rows("train")
        if not len(rows):
            raise ValueError(f"no stay in the training split of {self.root}: {len(self.samples)} samples in all; give more stays")
        rng = np.random.default_rng(self.seed)
        rows = np.sort(rng.choice(rows, FIT_SAMPLES, replace=False)) if len(rows) > FIT_SAMPLES else rows
        allowed = [c for c in CONCEPTS if self.treatment or not c.treatment]
        views = Views(self.store, [c.name for c in allowed], self.task.window)
        moments = np.zeros((3, len(allowed)))
        for piece in np.array_split(rows, max(len(rows) // 256, 1)):
            value, mask, _ = views.hourly(self._stay[piece], self._minute[piece])
            value = np.where(mask, value, 0).astype(np.float64)  # sums of squares need the digits
            moments += [mask.sum((0, 1)), value.sum((0, 1)), (value**2).sum((0, 1))]
        count, first, second = moments
        seen = count > 0
        if not seen.any():
            raise ValueError(f"no value of any known variable in the training windows of {self.root}")
        names = [c.name for c, s in zip(allowed, seen, strict=True) if s]
        center = first[seen] / count[seen]
        scale = np.sqrt(np.maximum(second[seen] / count[seen] - center**2, 0))
        rate = np.array([BY_NAME[n].hourly == "rate" for n in names])
        scale = np.where(rate, np.sqrt(second[seen] / count[seen]), scale)  # a rate keeps 0 at 0: off
        center, scale = np.where(rate, 0, center), np.where(scale > 1e-6, scale, 1)
        static_names, raw = self._static_columns(self.store.stays, self.statics)
        mine = raw[np.unique(self._stay[self.rows("train")])]
        static_center = np.nan_to_num(np.nanmean(np.where(np.isnan(mine).all(0), 0, mine), 0))
        static_scale = np.nanstd(np.where(np.isnan(mine).all(0), 0, mine), 0)
        onehot = np.array(["=" in n for n in static_names], bool)
        static_center = np.where(onehot, 0, static_center)
        static_scale = np.where(onehot | ~(static_scale > 1e-6), 1, static_scale)
        units = [BY_NAME[n].unit for n in names]
        return Spec(
            names, units, static_names, center.tolist(), scale.tolist(), static_center.tolist(), static_scale.tolist(), asdict(self.task)
        )

    def static_names(self) -> list[str]:
        """Names of the static features as a ``Spec`` lists them."""
        return self._static_columns(self.open().stays[:0], self.statics)[0]

    @staticmethod
    def _static_columns(stays: pl.DataFrame, statics: list[str]) -> tuple[list[str], np.ndarray]:
        """Names and raw values (stays, S); ``unit`` becomes one column per kind of unit."""
        assert not set(statics) & set(OUTCOMES)
        names = [n for s in statics for n in ([f"unit={u}" for u in CARE_UNITS] if s == "unit" else [s])]
        columns = [(pl.col("unit") == n[5:]).cast(pl.Float32) if n.startswith("unit=") else pl.col(n).cast(pl.Float32) for n in names]
        values = stays.select(c.alias(n) for c, n in zip(columns, names, strict=True)).fill_null(float("nan")).to_numpy()
        return names, values.reshape(len(stays), len(names))

    def _statics(self, stays: pl.DataFrame, spec: Spec) -> np.ndarray:
        wanted = [s for s in STATICS if s in spec.statics or any(n.startswith(f"{s}=") for n in spec.statics)]
        names, raw = self._static_columns(stays, wanted)
        raw = raw[:, [names.index(n) for n in spec.statics]]
        standard = (raw - np.array(spec.static_center, np.float32)) / np.array(spec.static_scale, np.float32)
        return np.nan_to_num(np.clip(standard, -CLIP, CLIP)).astype(np.float32)  # unknown = the mean


class Samples(Dataset):
    """Indexed by an array of rows, it gives the whole batch at once: nothing is done per row in Python."""

    def __init__(self, module: ICUDataModule):
        self.module = module

    def __getitem__(self, rows: np.ndarray) -> Batch:
        return self.module.batch(rows)

    def __len__(self) -> int:
        return len(self.module.samples)


def _count(rule: str, left: pl.DataFrame) -> dict[str, Any]:
    deaths, septic = left["hospital_death"].sum(), left["sepsis_minute"].is_not_null().sum()
    return {
        "rule": rule,
        "stays": len(left),
        "patients": left["patient_id"].n_unique(),
        "hospital deaths": deaths,
        "labelled sepsis": septic,
    }


def _split_of(key: str) -> str:
    part = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    return "train" if part < 0.70 else "val" if part < 0.85 else "test"
