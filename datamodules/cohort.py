"""Who is in a cohort, when predictions are made, with which label, and in which split: everything between a store and
batches."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.build import ahead, bucket_tables, build, fingerprint, once
from datamodules.derive.sepsis import check_definition, known_septic, sepsis3, summarise
from datamodules.derive.sofa import sofa
from datamodules.dictionary import RATES, digest, limits
from datamodules.hospitals.base import Hospital, Split, Tables, part_of
from datamodules.schema import INFUSIONS
from datamodules.store import Store

Step = Callable[[str, int, int], None]
Bucket = Callable[[Tables, pl.DataFrame, pl.LazyFrame], dict[str, pl.DataFrame]]  # kept rows, stays, events -> tables
FEWEST_HOSPITALS = 10  # fewest hospitals that can be divided in three


class Cohort:
    """The cohort of a hospital under its options.

    Args:
        hospital: whose stays they are.
        step: told of progress: what is done, how much of it, of how much.
    """

    def __init__(self, hospital: Hospital, step: Step = lambda *_: None):
        self.hospital, self.step = hospital, step
        self.labelled = True  # False: prediction on new patients, whose outcome is unknown
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The store, extracted first where the cache does not hold it."""
        if self._store is None:
            cache = Path(self.hospital.cache or os.environ.get("EHR_CACHE", ".cache"))
            key = f"{self.hospital.name}-{fingerprint(self.hospital)}"
            self._store = build(self.hospital, cache / key, self.step)
        return self._store

    # ---- tables derived from the store -----------------------------------------------------------------------------

    def infusions(self) -> Path:
        """Vasoactive infusions of the whole record, schema ``INFUSIONS``, rates clipped to their range as in the
        events."""

        def bucket(tables: Tables, stays: pl.DataFrame, events: pl.LazyFrame) -> dict[str, pl.DataFrame]:
            return {"vasopressors": _within_range(self.hospital.infusions(tables, stays)).collect()}

        return self._derived("infusions", {}, bucket, "infusions") / "vasopressors.parquet"

    def sepsis_tables(self) -> dict[str, Path]:
        """ "sofa", "suspicion" and "sepsis3" of the whole record: retrospective tables, for labels and for people.

        They may look ahead, as mimic-code's SQL does; nothing that a model sees or a cohort is chosen by reads them.

        Raises:
            ValueError: the hospital carries no antibiotics and cultures, or has no such definition.
            FileNotFoundError: a table that they are made of is not there.
        """
        hospital, definition = self.hospital, self._definition()

        def bucket(tables: Tables, stays: pl.DataFrame, events: pl.LazyFrame) -> dict[str, pl.DataFrame]:
            suspected = hospital.suspicion(tables, stays, definition)
            scores = sofa(hospital.sofa_inputs(tables, events, stays), hospital.sofa)
            return {"sofa": scores, "suspicion": suspected, "sepsis3": sepsis3(suspected, scores, definition)}

        options = {"definition": hospital.definition, **asdict(hospital.sofa), **hospital.sepsis_options()}
        folder = self._derived(f"sepsis-{hospital.definition}", options, bucket, "scoring SOFA and sepsis")
        return {name: folder / f"{name}.parquet" for name in ("sofa", "suspicion", "sepsis3")}

    def known_septic(self) -> pl.DataFrame:
        """Stays that were known to be septic strictly before the (first) prediction, schema ``SEPSIS3``."""
        hospital, definition, before = self.hospital, self._definition(), self.hospital.task.hours * 60

        def bucket(tables: Tables, stays: pl.DataFrame, events: pl.LazyFrame) -> dict[str, pl.DataFrame]:
            suspected = hospital.suspicion(tables, stays, definition)
            scores = sofa(hospital.sofa_inputs(tables, events, stays, before), hospital.sofa)
            return {"sepsis3": known_septic(suspected, scores, definition, before)}

        options = {
            "definition": hospital.definition,
            **asdict(hospital.sofa),
            **hospital.sepsis_options(),
            "before": before,
        }
        folder = self._derived(f"known-{hospital.definition}", options, bucket, "finding who is known to be septic")
        return pl.read_parquet(folder / "sepsis3.parquet")

    def onset(self) -> pl.DataFrame:
        """``stay_id, sepsis_minute`` of septic stays under the definition, over the whole record: a label, never a
        feature."""
        return pl.read_parquet(self.sepsis_tables()["sepsis3"]).select("stay_id", sepsis_minute="onset_minute")

    def compare_definitions(self) -> pl.DataFrame:
        """Stays, hospitals, prevalence and mortality under every definition of Sepsis-3, over the whole record: one row
        each."""
        self._definition()
        scores = pl.read_parquet(self.sepsis_tables()["sofa"])
        store, rows = self.store, []
        for name, definition in self.hospital.definitions.items():
            parts = []
            for number, (start, stop) in enumerate(store.buckets()):
                self.step(f"definition {name}", number, len(store.buckets()))
                tables = bucket_tables(store.folder, number)
                parts.append(self.hospital.suspicion(tables, store.stays[start:stop], definition))
            self.step(f"definition {name}", 1, 1)
            suspected = pl.concat(parts)
            rows.append(summarise(name, suspected, sepsis3(suspected, scores, definition), store.stays))
        return pl.concat(rows)

    def _definition(self) -> Any:
        if not self.hospital.definitions:
            self.hospital.suspicion({}, self.store.stays, None)  # type: ignore[arg-type]  # says that it carries none
        return check_definition(self.hospital.definition, self.hospital.definitions, self.hospital.name)

    def _derived(self, kind: str, options: dict[str, Any], bucket: Bucket, text: str) -> Path:
        """Tables made bucket by bucket and kept beside the store: computed once for each set of options."""
        hospital, store = self.hospital, self.store
        content = json.dumps([options, digest(Path(__file__).parent, "cohort.py")], sort_keys=True)
        key = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        folder = store.folder / "derived" / f"{kind}-{key}"

        def one(numbered: tuple[int, tuple[int, int]]) -> dict[str, pl.DataFrame]:
            number, (start, stop) = numbered
            events = store.frame(start, stop).lazy()
            return bucket(bucket_tables(store.folder, number), store.stays[start:stop], events)

        def make(partial: Path) -> None:
            buckets = store.buckets()
            with ThreadPoolExecutor(2) as pool:
                for number, made in enumerate(ahead(pool, one, list(enumerate(buckets)))):
                    self.step(text, number, len(buckets))
                    for name, table in made.items():
                        table.write_parquet(partial / f"{name}-{number:05d}.part")
            for name in made:
                parts = sorted(partial.glob(f"{name}-*.part"))
                rows = pl.scan_parquet(parts)
                if name == "sepsis3":
                    rows = hospital.septic_stays(rows.collect(), store.stays).lazy()
                rows.sink_parquet(partial / f"{name}.parquet")
                for part in parts:
                    part.unlink()
            self.step(text, len(buckets), len(buckets))

        once(folder, make)
        return folder

    # ---- who, when, what -------------------------------------------------------------------------------------------

    def stays(self) -> pl.DataFrame:
        """The stays with ``stay`` (row in the store) and ``last_minute`` (of their events); ``sepsis_minute`` is that
        of the definition where the publisher has no label and the task needs one."""
        stays = self.store.stays.with_row_index("stay").cast({"stay": pl.Int64})
        stays = stays.with_columns(last_minute=self.store.last_minutes())
        if self.hospital.task.name == "sepsis_onset" and self.labelled and self.hospital.definitions:
            stays = stays.drop("sepsis_minute").join(self.onset(), on="stay_id", how="left", maintain_order="left")
        return stays

    def excluded(self) -> tuple[pl.Series, pl.DataFrame]:
        """The rules of inclusion applied in order.

        Returns:
            Per stay the first rule that leaves it out (null: it is in the cohort), and the attrition table: stays,
            patients and deaths that are left after each rule.
        """
        hospital, task, stays = self.hospital, self.hospital.task, self.stays()
        named = hospital.rules() + task.rules(
            hospital.min_age, hospital.first_stay, hospital.min_icu_hours, self.labelled
        )
        rules = [(sentence, stays.select(rule.fill_null(False)).to_series()) for sentence, rule in named]
        if hospital.split_by == "hospital":
            first = pl.col("hospital_id").sort_by("stay_number").first().over("patient_id")
            at_first = stays.select(pl.col("hospital_id") == first).to_series()
            rules.append(("in the patient's first hospital, since hospitals are kept apart", at_first))
        if task.sepsis:
            septic = stays.select(pl.col("stay_id").is_in(self.known_septic()["stay_id"].implode())).to_series()
            rules.append((f"Sepsis-3 ({hospital.definition}) known before hour {task.hours}", septic))
        opened = np.full(len(stays), (task.hours - task.window_hours) * 60)
        until = 60 * stays.with_columns(last_hour=task.last_hour())["last_hour"].to_numpy()
        seen = pl.Series(self.store.any_known(opened, until))
        rules.append((f"any value before the {'last ' if task.hourly else ''}prediction", seen))
        excluded_by, kept = np.full(len(stays), None, object), np.ones(len(stays), bool)
        attrition = [_count("all ICU stays", stays)]
        for sentence, holds in rules:
            excluded_by[kept & ~holds.to_numpy()] = sentence
            kept &= holds.to_numpy()
            attrition.append(_count(sentence, stays.filter(kept)))
        return pl.Series("excluded_by", excluded_by.tolist(), dtype=pl.String), pl.DataFrame(attrition)

    def samples(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The samples of the cohort and the attrition table.

        Returns:
            ``stay, minute, target, stay_id, patient_id, split`` (null: cannot be told), and as ``excluded``.

        Raises:
            ValueError: nobody is left, or the data do not carry the outcome.
        """
        hospital, task = self.hospital, self.hospital.task
        excluded_by, attrition = self.excluded()
        stays = self.stays()
        if self.labelled:
            task.check_labels(stays)
        included = stays.filter(excluded_by.is_null())
        if included.is_empty():
            last = attrition.filter(attrition["stays"] == 0).row(0, named=True)
            raise ValueError(
                f"no stay of {self.hospital.root} is left after the rule {last['rule']!r}; "
                f"`ehr prepare` shows each rule, --data.hours, --data.min_age and --data.first_stay change them"
            )
        samples = task.samples(included, self.labelled)
        of_stay = included.select("stay", "stay_id", "patient_id", split=self.splits(included))
        if hospital.fold is not None:
            if not (of_stay["split"] == "train").any():
                raise ValueError(
                    f"--data.fold {hospital.fold} divides the training split, and no stay of {hospital.root} is in it: "
                    f"leave it out"
                )
            of_stay = _folded(of_stay, *part_of(hospital.fold))
            rule = f"in the training split, of which fold {hospital.fold} is val"
            left = included.join(of_stay, on="stay", how="semi", maintain_order="left")
            attrition = attrition.vstack(pl.DataFrame([_count(rule, left)], attrition.schema))
        samples = samples.join(of_stay, on="stay", maintain_order="left")
        return (samples.filter(pl.col("target").is_not_null()) if self.labelled else samples), attrition

    def splits(self, stays: pl.DataFrame) -> pl.Series:
        """ "train", "val" or "test" per row of ``stays``: 70, 15 and 15 of 100, by a hash of seed and patient (or
        hospital)."""
        hospital = self.hospital
        published = hospital.published_split(stays, self.store.stays)
        if published is not None:
            return published
        group = "patient_id" if hospital.split_by == "patient" else "hospital_id"
        if hospital.split_by == "hospital" and stays["hospital_id"].n_unique() < FEWEST_HOSPITALS:
            raise ValueError(
                f"--data.split_by hospital needs at least {FEWEST_HOSPITALS} hospitals, found "
                f"{stays['hospital_id'].n_unique()} "
                f"in {hospital.root}; use patient"
            )
        ids = stays[group].unique()
        split = [_split_of(f"{hospital.seed}:{i}") for i in ids]
        return stays.select(pl.col(group).replace_strict(ids, pl.Series(split, dtype=pl.String)))[group]


def _within_range(infusions: pl.LazyFrame) -> pl.LazyFrame:
    """Rates clipped to the range of their concept, as in the events."""
    ranges = limits(*RATES).with_columns(drug=pl.col("concept").cast(pl.String)).drop("concept")
    joined = infusions.join(ranges, on="drug", how="left", maintain_order="left")
    return joined.with_columns(rate=pl.col("rate").clip(pl.col("low"), pl.col("high"))).select(*INFUSIONS)


def rows_of(samples: pl.DataFrame, split: Split, hospital: Hospital) -> np.ndarray:
    """Row numbers of ``samples`` in a split.

    Raises:
        ValueError: there is no such split, or these data cannot tell which samples are in it.
    """
    if split not in ("train", "val", "test", "all"):
        raise ValueError(f"--data.split {split} is not known; choose train, val, test or all")
    if split == "all":
        return np.arange(len(samples))
    rows = np.flatnonzero((samples["split"] == split).fill_null(False).to_numpy())
    if split != "test" and not len(rows) and samples["split"].null_count():
        raise ValueError(f"split {split!r} of {hospital.root} cannot be told: {hospital.split_advice()}")
    return rows


def _count(rule: str, left: pl.DataFrame) -> dict[str, Any]:
    return {
        "rule": rule,
        "stays": len(left),
        "patients": left["patient_id"].n_unique(),
        "hospital deaths": left["hospital_death"].sum(),
        "labelled sepsis": left["sepsis_minute"].is_not_null().sum(),
    }


def _folded(stays: pl.DataFrame, part: int, parts: int) -> pl.DataFrame:
    """Patients of the training split, divided into ``parts`` by a hash of the patient; ``part`` is val."""
    stays = stays.filter(pl.col("split") == "train")
    patients = stays["patient_id"].unique()
    val = [p for p in patients if hashed(f"fold:{p}") % parts == part - 1]
    return stays.with_columns(split=pl.when(pl.col("patient_id").is_in(val)).then(pl.lit("val")).otherwise("split"))


def hashed(key: str) -> int:
    """A number of 64 bits that is the same everywhere: what patients are divided by."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _split_of(key: str) -> str:
    part = hashed(key) / 2**64
    return "train" if part < 0.70 else "val" if part < 0.85 else "test"
