"""Prediction tasks: who is in the cohort, when a prediction is made, what it is scored against.

Every task is a set of samples (stay, prediction time, target). A model sees events strictly before the prediction time and
static features known at admission; nothing else reaches a batch, and ``check_statics`` refuses what would look ahead.
"""

from dataclasses import dataclass
from typing import Literal

import polars as pl

TaskName = Literal["mortality_hospital", "mortality_24h", "sepsis_onset"]
OUTCOMES = ("icu_minutes", "discharge_minute", "death_minute", "hospital_death", "icu_death", "sepsis_minute")
STATICS = ("age", "sex", "unit", "admit_minute")
LABEL_LEAD = 6 * 60  # sepsis_onset, as PhysioNet 2019: the label turns 1 six hours before the onset and stays 1


@dataclass(frozen=True)
class Task:
    """What is predicted, and when.

    - ``mortality_hospital``: after the first ``hours`` of the ICU stay, death before hospital discharge.
    - ``mortality_24h``: at hour t of the stay, death within (t, t + 24 h]; t = ``hours``, or with ``rolling`` every hour
      from ``hours`` to the end of the stay.
    - ``sepsis_onset``: at the end of every hour from ``hours`` on, sepsis begins within 6 hours or has begun
      (the label of PhysioNet 2019).

    Attributes:
        name: one of the three.
        hours: hours from ICU admission to the (first) prediction.
        window: hours of history that the model sees.
        rolling: predict every hour from ``hours`` on.
        sepsis: only stays whose Sepsis-3 is known by the (first) prediction.
    """

    name: TaskName
    hours: int
    window: int
    rolling: bool = False
    sepsis: bool = False

    def __post_init__(self) -> None:
        if self.hours < 1:
            raise ValueError(f"--data.hours must be at least 1, found {self.hours}: a prediction needs some hours of history")
        if self.window < 1:
            raise ValueError(f"--data.window must be at least 1 hour, found {self.window}")

    @property
    def hourly(self) -> bool:
        return self.rolling or self.name == "sepsis_onset"

    def rules(self, min_age: float, first_stay: bool, min_icu_hours: float, labelled: bool) -> list[tuple[str, pl.Expr]]:
        """Inclusion rules in order: a sentence and what must hold of a row of the stays table.

        Args:
            min_age: youngest age in years.
            first_stay: keep only a patient's first ICU stay.
            min_icu_hours: shortest ICU stay in hours; a stay must reach the prediction in any case.
            labelled: require a known outcome; without it (prediction on new patients) every admitted stay is kept.
        """
        after = self.hours * 60
        end, death = pl.col("icu_minutes"), pl.col("death_minute")
        rules = [("ICU discharge after admission", end.is_null() | (end > 0))]
        if min_age > 0:
            rules.append((f"age of at least {min_age:g} years", pl.col("age") >= min_age))
        if first_stay:
            rules.append(("first ICU stay of the patient", pl.col("stay_number") == 1))
        least = max(min_icu_hours, self.hours)
        rules.append((f"at least {least:g} h in the ICU", end.is_null() | (end >= least * 60)))
        rules.append((f"alive {self.hours} h after admission", death.is_null() | (death > after)))
        if labelled and self.name == "mortality_hospital":
            rules.append(("hospital outcome known", pl.col("hospital_death").is_not_null()))
        if labelled and self.name == "mortality_24h":
            rules.append(
                (
                    "hospital outcome and time of death known",
                    pl.col("hospital_death").is_not_null() & (death.is_not_null() | ~pl.col("hospital_death")),
                )
            )
        return rules

    def last_hour(self) -> pl.Expr:
        """Hour of a stay's last prediction."""
        end = pl.col("icu_minutes").fill_null(0) // 60 if self.hourly else pl.lit(self.hours)
        return pl.max_horizontal(end, self.hours).cast(pl.Int32)

    def samples(self, stays: pl.DataFrame, labelled: bool = True) -> pl.DataFrame:
        """Prediction times, the patient being alive, and targets.

        Args:
            stays: the included rows of the stays table with a column ``stay`` (row number in the store).
            labelled: as in ``rules``; without it, "no onset of sepsis in any stay" means "unknown".

        Returns:
            ``stay, minute, target``: prediction time in minutes from ICU admission; target 1.0, 0.0 or null (unknown).

        Raises:
            ValueError: the data do not carry what the task needs.
        """
        times = stays.with_columns(hour=pl.int_ranges(self.hours, self.last_hour() + 1)).explode("hour", empty_as_null=False)
        times = times.with_columns(minute=(pl.col("hour") * 60).cast(pl.Int32))
        # a stay may end, on paper, after the patient's death, and a record may begin after the stay
        alive = pl.col("death_minute").is_null() | (pl.col("death_minute") > pl.col("minute"))
        times = times.filter(alive, pl.col("minute") > pl.col("first_minute").fill_null(0))
        unknown = not labelled and self.name == "sepsis_onset" and stays["sepsis_minute"].null_count() == len(stays)
        target = pl.lit(None) if unknown else self._target()
        return times.select("stay", "minute", target=target.cast(pl.Float32))

    def check_labels(self, stays: pl.DataFrame) -> None:
        """Refuse a task whose outcome these data do not record, rather than train on a constant."""
        if self.name == "mortality_24h" and stays["hospital_death"].sum() and stays["death_minute"].null_count() == len(stays):
            raise ValueError("mortality_24h needs times of death and these data have none; use --data.task mortality_hospital")
        column = "sepsis_minute" if self.name == "sepsis_onset" else "hospital_death"
        if stays[column].null_count() == len(stays):
            raise ValueError(
                f"{self.name} needs {column} and no stay of these data has it; "
                f"choose another --data.task, or `ehr predict` to score without outcomes"
            )

    def _target(self) -> pl.Expr:
        if self.name == "mortality_hospital":
            return pl.col("hospital_death")
        if self.name == "mortality_24h":
            soon = (pl.col("death_minute") > pl.col("minute")) & (pl.col("death_minute") <= pl.col("minute") + 24 * 60)
            return pl.when(pl.col("hospital_death").is_not_null()).then(soon.fill_null(False))
        return (pl.col("minute") >= pl.col("sepsis_minute") - LABEL_LEAD).fill_null(False)


def check_statics(statics: list[str]) -> None:
    """Refuse static features that are only known after the prediction time, and unknown ones.

    Raises:
        ValueError: names the feature and what may be used.
    """
    ahead = [s for s in statics if s in OUTCOMES]
    if ahead:
        raise ValueError(f"--data.statics {', '.join(ahead)} is only known after the prediction time; choose among {', '.join(STATICS)}")
    unknown = [s for s in statics if s not in STATICS]
    if unknown:
        raise ValueError(f"--data.statics {', '.join(unknown)} is not known; choose among {', '.join(STATICS)}")
