"""Prediction tasks: when a prediction is made and what it is scored against, one entry of ``TASKS`` each.

Every task is a set of samples (stay, prediction time, target). A model sees what was known strictly before the
prediction time and static features known at admission; nothing else reaches a batch, and ``check_statics`` refuses what
would look ahead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import polars as pl

OUTCOMES = ("icu_minutes", "discharge_minute", "death_minute", "hospital_death", "icu_death", "sepsis_minute")
STATICS = ("age", "sex", "unit", "admit_minute")
DAY = 24 * 60


class Label(NamedTuple):
    """What a task predicts.

    Attributes:
        text: one sentence for people.
        column: column of the stays table that says whether the outcome is recorded at all.
        target: from the task, the target of a row of stays and prediction ``minute``: 1, 0 or null (unknown).
        rules: further rules of inclusion of labelled stays: a sentence and what must hold.
        hourly: whether it is predicted at the end of every hour in any case.
        at_risk: from the task, whether a row of stays and ``minute`` is still in the risk set.
    """

    text: str
    column: str
    target: Callable[["Task"], pl.Expr]
    rules: tuple[tuple[str, pl.Expr], ...] = ()
    hourly: bool = False
    at_risk: Callable[["Task"], pl.Expr] = lambda task: pl.lit(True)


_DEATH, _OUTCOME, _MINUTE = pl.col("death_minute"), pl.col("hospital_death"), pl.col("minute")
_DIES_SOON = (_DEATH > _MINUTE) & (_DEATH <= _MINUTE + DAY)
_ONSET = pl.col("sepsis_minute")

TASKS: dict[str, Label] = {
    "mortality_hospital": Label(
        "death before hospital discharge",
        "hospital_death",
        lambda task: _OUTCOME,
        (("hospital outcome known", _OUTCOME.is_not_null()),),
    ),
    "mortality_24h": Label(
        "death within the next 24 hours",
        "hospital_death",
        lambda task: pl.when(_OUTCOME.is_not_null()).then(_DIES_SOON.fill_null(False)),
        (("hospital outcome and time of death known", _OUTCOME.is_not_null() & (_DEATH.is_not_null() | ~_OUTCOME)),),
    ),
    "sepsis_onset": Label(
        "sepsis begins within the lead time, or has begun",
        "sepsis_minute",
        lambda task: (_ONSET - 60 * task.lead <= _MINUTE).fill_null(False),
        hourly=True,
        at_risk=lambda task: pl.lit(True) if task.after_onset else (_MINUTE < _ONSET).fill_null(True),
    ),
}

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]  # what ``--data.task`` may be


@dataclass(frozen=True)
class Task:
    """What is predicted, and when.

    - ``mortality_hospital``: after the first ``hours`` of the ICU stay, death before hospital discharge.
    - ``mortality_24h``: at hour t of the stay, death within (t, t + 24 h]; t = ``hours``, or with ``rolling`` every
    hour
      from ``hours`` to the end of the stay.
    - ``sepsis_onset``: at the end of every hour from ``hours`` on, sepsis begins within ``lead`` hours; hours after the
    onset leave the
      risk set, or with ``after_onset`` stay in it with label 1 (as PhysioNet 2019 has them).

    Attributes:
        name: an entry of ``TASKS``.
        hours: hours from ICU admission to the (first) prediction.
        window: hours of history that the model sees; None: ``hours``, or 24 for predictions every hour.
        rolling: predict every hour from ``hours`` on.
        sepsis: only stays whose Sepsis-3 is known before the (first) prediction.
        lead: hours before the onset of sepsis from which on the label is 1.
        after_onset: whether hours after the onset stay in the risk set.
    """

    name: TaskName
    hours: int
    window: int | None = None
    rolling: bool = False
    sepsis: bool = False
    lead: int = 6
    after_onset: bool = False

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"--data.task {self.name} is not known; choose among {', '.join(TASKS)}")
        if self.hours < 1:
            raise ValueError(
                f"--data.hours must be at least 1, found {self.hours}: a prediction needs some hours of history"
            )
        if self.window is None:
            object.__setattr__(self, "window", 24 if self.hourly else self.hours)
        if self.window_hours < 1:
            raise ValueError(f"--data.window must be at least 1 hour, found {self.window}")
        if self.lead < 1:
            raise ValueError(f"--data.lead must be at least 1 hour, found {self.lead}")
        if self.rolling and self.name == "mortality_hospital":
            raise ValueError(
                "--data.rolling applies to mortality_24h: choose --data.task mortality_24h, or leave it out"
            )

    @property
    def label(self) -> Label:
        """What it predicts."""
        return TASKS[self.name]

    @property
    def hourly(self) -> bool:
        """Whether there is a prediction every hour."""
        return self.rolling or self.label.hourly

    @property
    def window_hours(self) -> int:
        """``window``, once it is set."""
        assert self.window is not None
        return self.window

    def rules(
        self, min_age: float, first_stay: bool, min_icu_hours: float, labelled: bool
    ) -> list[tuple[str, pl.Expr]]:
        """Inclusion rules in order: a sentence and what must hold of a row of the stays table with ``last_minute`` (of
        its events).

        Args:
            min_age: youngest age in years.
            first_stay: keep only a patient's first ICU stay.
            min_icu_hours: shortest ICU stay in hours; a stay must reach the prediction in any case.
            labelled: require a known outcome; without it (prediction on new patients) every admitted stay is kept.
        """
        end = pl.col("icu_minutes")
        rules = [("ICU discharge after admission", end.is_null() | (end > 0))]
        if min_age > 0:
            rules.append((f"age of at least {min_age:g} years", pl.col("age") >= min_age))
        if first_stay:
            rules.append(("first ICU stay of the patient", pl.col("stay_number") == 1))
        least = max(min_icu_hours, self.hours)
        rules.append((f"at least {least:g} h in the ICU", reached() >= least * 60))
        rules.append((f"alive {self.hours} h after admission", _DEATH.is_null() | (self.hours * 60 < _DEATH)))
        return rules + (list(self.label.rules) if labelled else [])

    def last_hour(self) -> pl.Expr:
        """Hour of a stay's last prediction."""
        end = reached() // 60 if self.hourly else pl.lit(self.hours)
        return pl.max_horizontal(end, self.hours).cast(pl.Int32)

    def samples(self, stays: pl.DataFrame, labelled: bool = True) -> pl.DataFrame:
        """Prediction times, the patient being alive and at risk, and targets.

        Args:
            stays: the included rows of the stays table with ``stay`` (row number in the store) and ``last_minute``.
            labelled: as in ``rules``; without it, an outcome that no stay has is unknown.

        Returns:
            ``stay, minute, target``: prediction time in minutes from ICU admission; target 1.0, 0.0 or null (unknown).
        """
        times = stays.with_columns(hour=pl.int_ranges(self.hours, self.last_hour() + 1)).explode(
            "hour", empty_as_null=False
        )
        times = times.with_columns(minute=(pl.col("hour") * 60).cast(pl.Int32))
        # a stay may end, on paper, after the patient's death, and a record may begin after the stay
        alive = _DEATH.is_null() | (_DEATH > _MINUTE)
        times = times.filter(alive, pl.col("first_minute").fill_null(0) < _MINUTE)
        unknown = not labelled and stays[self.label.column].null_count() == len(stays)
        if labelled:
            times = times.filter(self.label.at_risk(self))
        target = pl.lit(None) if unknown else self.label.target(self)
        return times.select("stay", "minute", target=target.cast(pl.Float32))

    def check_labels(self, stays: pl.DataFrame) -> None:
        """Refuse a task whose outcome these data do not record, rather than train on a constant."""
        if (
            self.name == "mortality_24h"
            and stays["hospital_death"].sum()
            and stays["death_minute"].null_count() == len(stays)
        ):
            raise ValueError(
                "mortality_24h needs times of death and these data have none; use --data.task mortality_hospital"
            )
        if stays[self.label.column].null_count() == len(stays):
            raise ValueError(
                f"{self.name} needs {self.label.column} and no stay of these data has it; "
                f"choose another --data.task, or `ehr predict` to score without outcomes"
            )


def reached() -> pl.Expr:
    """Minute up to which a stay goes; one without an end goes to the end of the hour of its last event."""
    so_far = (pl.col("last_minute") // 60 + 1) * 60
    return pl.coalesce("icu_minutes", so_far).fill_null(0)


def check_statics(statics: list[str]) -> None:
    """Refuse static features that are only known after the prediction time, and unknown ones.

    Raises:
        ValueError: names the feature and what may be used.
    """
    ahead = [s for s in statics if s in OUTCOMES]
    if ahead:
        raise ValueError(
            f"--data.statics {', '.join(ahead)} is only known after the prediction time; "
            f"choose among {', '.join(STATICS)}"
        )
    unknown = [s for s in statics if s not in STATICS]
    if unknown:
        raise ValueError(f"--data.statics {', '.join(unknown)} is not known; choose among {', '.join(STATICS)}")
