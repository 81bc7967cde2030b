"""What a sweep may search: the entries of ``--space`` as Optuna's distributions, and the flags that must not be searched."""

import json
import re
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

COHORT = "hours window rolling lead after_onset sepsis definition sofa labs min_age first_stay min_icu_hours"
FILES = "root cache sets systems stays simulation_seed min_hospital_percent"
REFUSED = {  # flags, as a pattern -> why they are not searched
    r"monitor": "trials are compared by one metric: give --monitor for all of them",
    r"name|runs|config|resume|trial": "the sweep itself says where each trial lies",
    r"wandb": "it is the same for all trials: give --wandb itself",
    r"seed": "a lucky seed is no setting: search without it, then train the best with several seeds of its own",
    r"finetune.*": "trials are scored on their own data alone: fine-tune what the sweep has found",
    r"data": "values of different data cannot be compared: one sweep for each",
    r"data\.(split|split_by|seed|fold)": "trials must be scored on the same patients; a lucky split is no setting",
    r"data\.task": "values of different tasks cannot be compared: one sweep for each",
    rf"data\.({COHORT.replace(' ', '|')})(\..*)?": "it changes which patients or labels are scored: one sweep for each value",
    rf"data\.({FILES.replace(' ', '|')})": "trials must be scored on the same patients: give it for all of them",
    r"trainer": "give single options, such as trainer.gradient_clip_val",
    r"trainer\.(devices|num_nodes|strategy)": "on how many devices a trial runs is no setting of it: give it for all of them",
    r"trainer\.(logger|callbacks)": "the training sets it itself",
    r"trainer\.(limit_val_batches|overfit_batches)": "trials must be scored on the same patients, all of them",
}


def check_names(space: dict[str, Any]) -> None:
    """Refuse what the sweep itself sets, and what would be chosen for its luck or for an easier question.

    Raises:
        ValueError: names the key and says why.
    """
    for name in space:
        flag = name.replace("-", "_").replace(".init_args.", ".").removesuffix(".class_path")
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, flag):
                raise ValueError(f"--space {name} cannot be searched: {reason}")


def distributions(space: dict[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a search space as it is written.

    Args:
        space: flag of ``ehr train`` without dashes -> a list of choices, or ``{low, high}`` with ``log: true`` or
            ``step`` if wanted; whole numbers where both bounds are whole.

    Raises:
        ValueError: an entry is neither.
    """
    if not space:
        raise ValueError(
            "--space is empty: expected flags of ehr train, such as {model.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}}"
        )
    by_name: dict[str, BaseDistribution] = {}
    for name, entry in space.items():
        try:
            by_name[name] = _distribution(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--space {name}: {str(error).rstrip('.')}, found {entry}") from error
    return by_name


def _distribution(entry: Any) -> BaseDistribution:
    if isinstance(entry, list):
        if not entry or not all(c is None or isinstance(c, bool | int | float | str) for c in entry):
            raise ValueError("choices must be numbers, words, true, false or null")
        return CategoricalDistribution(entry)
    if not isinstance(entry, dict) or not {"low", "high"} <= set(entry) <= {"low", "high", "log", "step"}:
        raise ValueError("expected a list of choices, or low and high, with log or step")
    low, high, log = entry["low"], entry["high"], bool(entry.get("log", False))
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in (low, high)):
        raise ValueError("low and high must be numbers")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=int(entry.get("step", 1)))
    return FloatDistribution(low, high, log=log, step=entry.get("step"))


def flag(name: str, value: Any) -> str:
    """A setting as an argument of the command line."""
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
