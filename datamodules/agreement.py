"""Whether a trained model fits the data and options that it is given: one answer for every verb and for Python.

What belongs to the model (task, hours, window, statics, treatment, the split of patients that it was trained on) is
taken over where the user says nothing and refused where the user says something else. Rules of the cohort (Sepsis-3,
its definition, ages, first stay, length of stay) are the user's, and obeyed.
"""

from dataclasses import asdict
from typing import Any

import polars as pl

from datamodules.contract import Spec
from datamodules.dictionary import BY_NAME
from datamodules.hospitals.base import Hospital
from datamodules.scores import SCORES
from datamodules.tasks import STATICS

OF_TASK = ("task", "hours", "window", "rolling", "lead", "after_onset")
OF_SPLIT = ("seed", "split_by", "fold")
HOURS = "hours in the ICU"  # the first of the features that say what has elapsed
Trained = list[dict[str, Any]]  # whose patients a model was trained on: ``population``, and the options of their split


def options_of(spec: Spec) -> dict[str, Any]:
    """The options of a hospital that a model was trained with, as ``Hospital.defaults`` names them."""
    task = spec.task
    options: dict[str, Any] = {"task": task["name"]} | {n: task[n] for n in (*OF_TASK[1:], "sepsis") if n in task}
    treated = any(name in BY_NAME and BY_NAME[name].treatment for name in spec.variables)
    options["treatment"] = task.get("treatment", treated)
    options["statics"] = [s for s in STATICS if any(n == s or n.startswith(f"{s}=") for n in spec.statics)]
    options["elapsed"], options["scores"] = HOURS in spec.statics, SCORES[0] in spec.statics
    return options


def foresee(hospital: Hospital, options: dict[str, Any]) -> None:
    """Take over a model's options where the user says nothing, before anything is read, so that what is recorded of
    ``hospital`` is what will be done; ``agree`` looks at the rest.

    Args:
        hospital: whose data the model will be given.
        options: of the model, as ``options_of`` gives them, or of the hospital that it will be trained on.
    """
    known = {
        name: options[name]
        for name in (*OF_TASK, "sepsis", "treatment", "statics", "elapsed", "scores")
        if name in options
    }
    hospital.take({**hospital.options(), **known, **hospital.stated})


def agree(hospital: Hospital, spec: Spec, trained: Trained, population: str, own_task: bool = False) -> None:
    """Take over a model's options into ``hospital``.

    Args:
        hospital: whose data the model is given.
        spec: of the model.
        trained: whose patients it was trained on.
        population: whose patients these are.
        own_task: the hospital keeps what it predicts, when, and for whom, as where training starts from other weights;
            only what a sample looks like must be the same.

    Raises:
        ValueError: the user has stated another value of an option, or the data lack a variable in the model's unit.
    """
    for name, unit in zip(spec.variables, spec.units, strict=True):
        if name not in BY_NAME or BY_NAME[name].unit != unit:
            raise ValueError(
                f"the model reads {name} in {unit!r} and these data do not have it so; "
                f"use the version that it was trained with"
            )
    options = options_of(spec)
    asked = dict(hospital.stated)
    if own_task:
        if hospital.task.window_hours != options["window"]:
            raise ValueError(
                f"these data have windows of {hospital.task.window_hours} hours, but the model was trained with "
                f"{options['window']}: add --data.window {options['window']}"
            )
        options = {name: options[name] for name in ("treatment", "statics", "elapsed", "scores")}
    for name, value in options.items():
        if name in asked and name != "sepsis" and _comparable(asked[name]) != _comparable(value):
            raise ValueError(
                f"--data.{name} {_text(asked[name])}, but the model was trained with {_text(value)}: leave "
                f"--data.{name} out, or give it {_text(value)}"
            )
    for other in trained:
        if other["population"] != population:
            continue
        for name in OF_SPLIT:
            of_model = other.get(name)  # earlier checkpoints know no folds
            if name in asked and asked[name] != of_model:
                raise ValueError(
                    f"--data.{name} {asked[name]}, but the model was trained on patients of these data with "
                    f"{'none' if of_model is None else of_model}: patients that it has seen would be scored as held "
                    f"out; leave --data.{name} out" + ("" if of_model is None else f", or give it {of_model}")
                )
            options[name] = of_model
    hospital.take({**hospital.options(), **options, **{n: v for n, v in asked.items() if n == "sepsis"}})


def remarks(
    name: str, spec: Spec, trained: Trained, population: str, scored: pl.DataFrame, absent: list[str]
) -> list[str]:
    """What a user must know before looking at scores.

    Args:
        name: of the hospital system whose data the model is given.
        spec: of the model.
        trained: whose patients it was trained on.
        population: whose patients these are.
        scored: ``patient_id, split`` of the samples that are scored.
        absent: variables of the model that are never charted in these data.
    """
    lines = []
    if absent:
        lines.append(
            f"{name} never charts {len(absent)} of the model's {len(spec.variables)} variables: "
            f"{', '.join(absent)}; they count as not measured"
        )
    if any(other["population"] == population for other in trained):
        seen = scored.filter(pl.col("split") == "train")["patient_id"].n_unique()
        if seen:
            lines.append(
                f"{seen:,} of the {scored['patient_id'].n_unique():,} patients that are scored were trained on: "
                f"these scores say nothing about new patients"
            )
    return lines


def task_of(hospital: Hospital) -> dict[str, Any]:
    """What ``Spec.task`` holds of a hospital's task."""
    return {**asdict(hospital.task), "kind": hospital.task.kind, "treatment": hospital.treatment}


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
