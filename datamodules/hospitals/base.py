"""What a hospital system has to give: six methods. Everything after them is the same for every hospital."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl

from datamodules import raw
from datamodules.derive.sepsis import Definition
from datamodules.derive.sofa import Inputs, Switches
from datamodules.schema import INFUSIONS
from datamodules.tasks import STATICS, Task, TaskName, check_statics

Tables = dict[str, pl.LazyFrame]  # raw table -> the rows and columns of it that are kept
Split = Literal["train", "val", "test", "all"]


class Hospital(ABC):
    """Data of one hospital system, for one task: the publisher's tables and the options that say what is made of them.

    The raw files are extracted once into a store in ``cache`` and memory-mapped afterwards; splits are by patient and
    depend on nothing but ``seed`` and the patient's id.

    Options that are left out are those of ``defaults`` or, where a trained model reads the data, those that it was
    trained with; one that is given and contradicts the model is refused (``agreement``).

    Args:
        root: Folder with the publisher's files.
        task: What is predicted: death before hospital discharge (default), death within the next 24 hours, or onset of
            sepsis.
        hours: Hours from ICU admission to the (first) prediction; default: 24.
        window: Hours of history that a model sees; default: the same as ``hours`` (24 for predictions every hour).
        rolling: With mortality_24h, predict every hour from ``hours`` on instead of once.
        lead: With sepsis_onset, hours before the onset from which on the label is 1; default: 6.
        after_onset: With sepsis_onset, go on predicting (label 1) after the onset; else those hours leave the risk set.
        sepsis: Keep only stays whose Sepsis-3 is known before the (first) prediction.
        definition: Definition of Sepsis-3; default: mimic_code on MIMIC-IV, eicu on eICU. `ehr prepare
            --compare_definitions true` lists them.
        sofa: Switches of the SOFA score: gcs_intubated, fio2_missing, pressor_min_minutes, urine_min_hours.
        labs: A laboratory value counts from when its specimen was drawn, as is usual, or from when it was stored.
        min_age: Youngest age in years.
        first_stay: Keep only each patient's first ICU stay.
        min_icu_hours: Shortest ICU stay in hours, such as 30 (YAIB); a stay must reach the prediction in any case.
        treatment: Let models see treatment and its response (infusion rates, ventilation, FiO2, urine), as is the
            default; false removes these variables, to measure what they are worth.
        statics: Features known at admission: any of age, sex, unit, admit_minute (default: all), such as age,sex.
        elapsed: Let models see how many hours the patient has been in the ICU, and of each variable the number of
            observations so far and per hour; default: where there is a prediction every hour.
        scores: Let models see scores that are derived from the last value of several variables, such as the shock
            index and a partial SOFA (``scores.SCORES``); default: where there is a prediction every hour.
        split_by: Keep the patients ("patient", the default) or whole hospitals ("hospital") of train, val and test
            apart; with the latter a patient's stays outside the hospital of the first one are left out.
        seed: Seed of the split; default: 0.
        fold: Part of a cross-validation inside the training split, such as 1/5: that fifth of its patients is val, the
            others are train, and everyone else is left out; default: none.
        cache: Folder for extracted stores; default: $EHR_CACHE or .cache in the current folder.
    """

    name = ""
    raw_tables: tuple[str, ...] = ()  # without the first there are no data
    partition = "stay_id"  # the column by which ``tables`` belong together: stay_id or patient_id
    definitions: ClassVar[
        dict[str, Definition]
    ] = {}  # of Sepsis-3, the default first; empty where the data cannot tell
    defaults: ClassVar[dict[str, Any]] = {
        "task": "mortality_hospital", "hours": 24, "window": None, "rolling": False, "lead": 6, "after_onset": False,
        "sepsis": False, "treatment": True, "statics": list(STATICS), "elapsed": None, "scores": None,
        "split_by": "patient", "seed": 0, "fold": None,
    }  # fmt: skip  # of the options that a trained model has, too
    published_ids = True  # the same patient_id is the same patient in every copy of the data

    def __init__(
        self,
        root: str,
        task: TaskName | None = None,
        hours: int | None = None,
        window: int | None = None,
        rolling: bool | None = None,
        lead: int | None = None,
        after_onset: bool | None = None,
        sepsis: bool | None = None,
        definition: str | None = None,
        sofa: Switches | None = None,
        labs: Literal["drawn", "stored"] = "drawn",
        min_age: float = 18,
        first_stay: bool = True,
        min_icu_hours: float = 0,
        treatment: bool | None = None,
        statics: list[str] | str | None = None,
        elapsed: bool | None = None,
        scores: bool | None = None,
        split_by: Literal["patient", "hospital"] | None = None,
        seed: int | None = None,
        fold: str | None = None,
        cache: str | None = None,
        **others: Any,
    ):
        super().__init__(**others)
        self.root = Path(root)
        statics = statics.split(",") if isinstance(statics, str) else statics
        options = {
            "task": task, "hours": hours, "window": window, "rolling": rolling, "lead": lead,
            "after_onset": after_onset, "sepsis": sepsis, "treatment": treatment, "statics": statics,
            "elapsed": elapsed, "scores": scores, "split_by": split_by, "seed": seed, "fold": fold,
        }  # fmt: skip
        self.stated = {name: value for name, value in options.items() if value is not None}
        self.take({**Hospital.defaults, **self.defaults, **self.stated})
        self.definition = definition or next(iter(self.definitions), "")
        self.sofa = sofa or Switches()
        self.labs, self.min_age, self.first_stay, self.min_icu_hours = labs, min_age, first_stay, min_icu_hours
        self.cache = cache

    def take(self, options: dict[str, Any]) -> None:
        """Set the options of ``defaults``."""
        fields = ("hours", "window", "rolling", "sepsis", "lead", "after_onset")
        self.task = Task(options["task"], **{name: options[name] for name in fields})
        self.treatment, self.statics = options["treatment"], options["statics"]
        self.elapsed, self.scores = options["elapsed"], options["scores"]
        check_statics(self.statics)
        self.split_by, self.seed = options["split_by"], options["seed"]
        if self.seed < 0:
            raise ValueError(f"--data.seed must be at least 0, found {self.seed}")
        self.fold = options["fold"]
        if self.fold is not None:
            part_of(self.fold)

    def options(self) -> dict[str, Any]:
        """The options of ``defaults`` as they are now."""
        fields = ("hours", "window", "rolling", "sepsis", "lead", "after_onset")
        of_task = {"task": self.task.name, **{name: getattr(self.task, name) for name in fields}}
        others = {
            name: getattr(self, name)
            for name in ("treatment", "statics", "elapsed", "scores", "split_by", "seed", "fold")
        }
        return of_task | others

    # ---- the six methods -------------------------------------------------------------------------------------------

    @abstractmethod
    def stays(self) -> pl.DataFrame:
        """Every ICU stay, schema ``schema.STAYS``; stays of one patient stand together where ``partition`` is
        patient_id."""

    @abstractmethod
    def tables(self, stays: pl.DataFrame) -> Tables:
        """Raw table -> the rows and columns of it that the other methods need, lazily; each with the column
        ``partition``.

        Each table is streamed once into files of some thousand stays each, so that memory does not grow with the data.
        """

    @abstractmethod
    def events(self, tables: Tables, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        """What was charted for some stays, schema ``schema.EVENTS``: values in charted units, rejected rows with the
        reason.

        Args:
            tables: ``tables`` of these stays.
            stays: the stays.
        """

    def infusions(self, tables: Tables, stays: pl.DataFrame) -> pl.LazyFrame:
        """Intervals of vasoactive infusions of some stays, schema ``schema.INFUSIONS``, rates above 0."""
        return pl.LazyFrame(schema=INFUSIONS)

    def sofa_inputs(
        self, tables: Tables, events: pl.LazyFrame, stays: pl.DataFrame, before: int | None = None
    ) -> Inputs:
        """The measurements that ``derive.sofa`` scores.

        Args:
            tables: ``tables`` of some stays.
            events: ``stay_id, minute, known_minute, concept, value`` of these stays, as the store keeps them.
            stays: the stays.
            before: use only what was known strictly before this minute of each stay; None: the whole record.
        """
        raise ValueError(_NO_SEPSIS.format(self.name))

    def suspicion(self, tables: Tables, stays: pl.DataFrame, definition: Definition) -> pl.DataFrame:
        """Suspicions of infection of some stays under a definition, schema ``derive.sepsis.SUSPICION``."""
        raise ValueError(_NO_SEPSIS.format(self.name))

    # ---- what follows from them, overridden where a publisher's files need it
    # -----------------------------------------

    def files(self) -> list[Path]:
        """The files that are read; raises FileNotFoundError where there are none."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}: expected the files of {self.name}; set --data.root")
        present = [path for table in self.raw_tables if (path := raw.find(self.root, table))]
        if not present:
            raise FileNotFoundError(
                f"no {self.name} tables in {self.root}: expected {self.raw_tables[0]}.csv.gz (or .csv, .parquet); "
                f"set --data.root"
            )
        return [f for path in present for f in ([path] if path.is_file() else sorted(path.rglob("*.parquet")))]

    def extraction(self) -> dict[str, Any]:
        """Options that change what is extracted; they are part of the store's key."""
        return {"labs": self.labs}

    def unread(self) -> pl.DataFrame | None:
        """``code, description, rows, why`` of what is in the files and is not read, where the hospital can tell; called
        after ``stays``."""
        return None

    def septic_stays(self, septic: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
        """The rows of schema ``derive.sepsis.SEPSIS3`` that an option of this hospital leaves."""
        return septic

    def sepsis_options(self) -> dict[str, Any]:
        """Options that change ``septic_stays``; they are part of the key of derived tables."""
        return {}

    def rules(self) -> list[tuple[str, pl.Expr]]:
        """Rules of inclusion that an option of this hospital adds: a sentence and what must hold of a row of the stays
        table."""
        return []

    def published_split(self, stays: pl.DataFrame, everyone: pl.DataFrame) -> pl.Series | None:
        """ "train", "val", "test" (or null: cannot be told) per row of ``stays`` where published work shares a split;
        else None.

        Args:
            stays: the stays that are divided.
            everyone: all stays of the store.
        """
        return None

    def split_advice(self) -> str:
        """What to do where ``published_split`` cannot tell."""
        return "use --data.split all"


def part_of(fold: str) -> tuple[int, int]:
    """k and n of a fold k/n.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts or parts < 2:
        raise ValueError(f"--data.fold must be K/N with K from 1 to N and N at least 2, such as 1/5, found {fold}")
    return part, parts


_NO_SEPSIS = "{} carries no antibiotics and cultures: Sepsis-3 needs MIMICIV or EICU; leave out --data.sepsis"
