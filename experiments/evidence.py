"""What a clinician asks of predictions beside their scores: operating points, net benefit, lead time, subgroups, who the patients are.

References:

1. Vickers, Elkin, Decision curve analysis, 2006, doi:10.1177/0272989X06295361: net benefit.
2. Collins et al., TRIPOD+AI statement, 2024, doi:10.1136/bmj-2023-078378: subgroups, and a table of the patients by outcome.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from experiments import metrics
from experiments.metrics import METRICS, Rows, labelled

POINTS = ("sensitivity=0.8", "sensitivity=0.9", "sensitivity=0.95", "youden", "npv=0.95", "npv=0.98")
OF_ALERTS = ("sensitivity", "specificity", "ppv", "npv", "alerts_per_100_stays", "utility")
OF_GROUPS = ("auroc", "auprc", "slope", "intercept", "ece", "sensitivity", "ppv")
REPLICATES = 200
SMALL = 10  # stays, or of either outcome, below which nothing is told of a group
BEFORE = 48  # hours before an event in which an alert is taken to foretell it
AGES = ((0, 45, "age below 45"), (45, 65, "age 45 to 64"), (65, 80, "age 65 to 79"), (80, 999, "age 80 and above"))


def operating_points(
    chosen_on: pl.DataFrame, predictions: pl.DataFrame, own: tuple[str, float | None], task: dict[str, Any]
) -> pl.DataFrame:
    """What alerts are worth at several thresholds.

    Args:
        chosen_on: predictions that thresholds are chosen on.
        predictions: those that they are measured on.
        own: operating point and threshold of the model.
        task: what is predicted.

    Returns:
        A row an operating point: ``point, threshold``, and of each of ``OF_ALERTS`` the value with a 95 % interval as text; null
        where no threshold reaches it.
    """
    thresholds = {f"{own[0]} (the model's)": own[1]}
    thresholds |= {point: metrics.choose_threshold(chosen_on, point, task) for point in POINTS}
    utility = metrics.has_utility(task)
    names = [name for name in OF_ALERTS if name != "utility" or utility]
    records = []
    for point, threshold in thresholds.items():
        record: dict[str, Any] = {
            "operating point": point,
            "threshold": None if threshold is None else f"{threshold:.3g}",
        }
        told = {}
        if threshold is not None:
            told = metrics.with_intervals(names, Rows(predictions, threshold, utility).drawn(names, REPLICATES))
        records.append(record | {str(METRICS[n].label): metrics.text(n, told) if told else None for n in names})
    return pl.DataFrame(records, infer_schema_length=None)


def net_benefit(predictions: pl.DataFrame, thresholds: Sequence[float]) -> pl.DataFrame:
    """Decision curve [1]: benefit per sample of alerting where the risk is at least a threshold, where a false alert costs its odds.

    Args:
        predictions: as ``metrics.score`` takes them.
        thresholds: risks from which on one would act.

    Returns:
        ``threshold, model, everybody``: net benefit of alerts of the model, and of alerting for all; that of none is 0.
    """
    rows = labelled(predictions)
    risk, event = rows["probability"].to_numpy(), rows["target"].to_numpy() == 1
    order = np.sort(risk)
    positive = np.sort(risk[event])
    at, n = np.asarray(thresholds, np.float64), len(rows)
    true = len(positive) - np.searchsorted(positive, at)
    false = (n - np.searchsorted(order, at)) - true
    odds = at / (1 - at)
    return pl.DataFrame({
        "threshold": at, "model": (true - odds * false) / n, "everybody": (event.sum() - odds * (n - event.sum())) / n
    })  # fmt: skip


def lead_times(predictions: pl.DataFrame, event: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """How long before the event of a stay its first alert came, of hourly predictions.

    Args:
        predictions: as ``metrics.score`` takes them.
        event: ``stay_id, event_minute``; null: none.
        threshold: probability from which on there is an alert.

    Returns:
        A row a stay that has an event and is predicted before it: ``stay_id, event_minute, lead`` (hours from its first alert in the
        48 hours before to the event; null: there was none).
    """
    before = labelled(predictions).join(event.drop_nulls("event_minute"), on="stay_id")
    ahead = (pl.col("event_minute") - pl.col("minute")) / 60
    return (
        before.with_columns(ahead=ahead)
        .filter(pl.col("ahead") > 0)
        .group_by("stay_id", "event_minute")
        .agg(lead=pl.col("ahead").filter((pl.col("ahead") <= BEFORE) & (pl.col("probability") >= threshold)).max())
        .sort("stay_id")
    )


def alarm_burden(predictions: pl.DataFrame, threshold: float) -> dict[str, float]:
    """How often hourly predictions alert: ``alerts_per_day`` of a stay, the same where there is no event, ``alarmed``: the share of
    stays without an event that have any alert."""
    stays = (
        labelled(predictions)
        .group_by("stay_id")
        .agg(hours=pl.len(), alerts=(pl.col("probability") >= threshold).sum(), event=pl.col("target").max() == 1)
    )
    quiet = stays.filter(~pl.col("event"))

    def rate(of: pl.DataFrame) -> float:
        return 24 * float(of["alerts"].sum()) / max(float(of["hours"].sum()), 1.0)

    return {
        "alerts_per_day": rate(stays),
        "alerts_per_day_without_event": rate(quiet),
        "alarmed": float((quiet["alerts"] > 0).mean() or 0.0) if len(quiet) else float("nan"),  # type: ignore[arg-type]
    }


def groups(stays: pl.DataFrame) -> dict[str, pl.Series]:
    """Name of a subgroup -> which of ``stays`` are in it: age bands, sex, care units, and hospitals where there are several."""
    age, sex = stays["age"], stays["sex"]
    named = {name: (age >= low) & (age < high) for low, high, name in AGES}
    named |= {"women": sex == 0, "men": sex == 1}
    named |= {
        f"unit: {unit.replace('_', ' ')}": stays["unit"] == unit for unit in sorted(stays["unit"].drop_nulls().unique())
    }
    if stays["hospital_id"].n_unique() > 1:
        largest = (
            stays["hospital_id"]
            .drop_nulls()
            .value_counts(sort=True)
            .sort("count", "hospital_id", descending=[True, False])
        )
        named |= {f"hospital {name}": stays["hospital_id"] == name for name in largest["hospital_id"].head(10)}
    return {name: of.fill_null(False) for name, of in named.items()}


def subgroups(predictions: pl.DataFrame, stays: pl.DataFrame, threshold: float | None) -> pl.DataFrame:
    """Scores of subgroups.

    Args:
        predictions: as ``metrics.score`` takes them.
        stays: ``stay_id, age, sex, unit, hospital_id``.
        threshold: of alerts.

    Returns:
        A row a group: ``group, stays, events`` (stays with one) and of each of ``OF_GROUPS`` value, low and high; no scores of a group
        of which fewer than ten stays have, or do not have, the event, and no numbers of one of fewer than ten stays.
    """
    rows = labelled(predictions)
    stays = stays.filter(pl.col("stay_id").is_in(rows["stay_id"].unique().implode()))
    records: list[dict[str, Any]] = []
    for name, of in {"everybody": pl.repeat(True, len(stays), eager=True), **groups(stays)}.items():
        part = rows.filter(pl.col("stay_id").is_in(stays.filter(of)["stay_id"].implode()))
        event = part.group_by("stay_id").agg(pl.col("target").max())["target"]
        count, events = len(event), int(event.sum())
        record: dict[str, Any] = {"group": name, "stays": count, "events": events}
        told: dict[str, Any] = {}
        if min(events, count - events) >= SMALL:
            told = metrics.with_intervals(OF_GROUPS, Rows(part, threshold).drawn(OF_GROUPS, REPLICATES))
        elif count < SMALL:
            record |= {"stays": None, "events": None}
        elif min(events, count - events) < SMALL:
            record |= {"events": None}
        for metric in OF_GROUPS:
            triple = told.get(metric, {})
            record |= {metric: triple.get("value"), **{f"{metric}_{end}": triple.get(end) for end in ("low", "high")}}
        records.append(record)
    numbers = {n: pl.Float64 for n in records[0] if n.startswith(OF_GROUPS)}
    return pl.DataFrame(records, schema_overrides={**numbers, "stays": pl.Int64, "events": pl.Int64})


def patients(stays: pl.DataFrame, event: np.ndarray, values: dict[str, np.ndarray]) -> pl.DataFrame:
    """Who the patients are, by outcome: medians and quartiles, or numbers and shares; a count below ten is not told.

    Args:
        stays: one row a stay: ``age, sex, unit, icu_minutes, hospital_death``.
        event: (N,) whether a stay has the event.
        values: name of a measurement -> (N,) its values, NaN where there is none.

    Returns:
        ``what, everybody, without, with, missing``, as text.
    """
    masks = {"everybody": np.ones(len(event), bool), "without": ~event, "with": event}

    def numbers(name: str, column: np.ndarray) -> dict[str, str]:
        record = {"what": name}
        for of, mask in masks.items():
            known = column[mask & ~np.isnan(column)]
            quartiles = np.quantile(known, [0.25, 0.5, 0.75]) if len(known) else []
            record[of] = "{1:.3g} ({0:.3g} to {2:.3g})".format(*quartiles) if len(known) >= SMALL else "-"
        return record | {"missing": f"{100 * np.isnan(column).mean():.0f} %"}

    def share(name: str, holds: np.ndarray, known: np.ndarray) -> dict[str, str]:
        record = {"what": name}
        for of, mask in masks.items():
            count, all = int((holds & mask).sum()), int((known & mask).sum())
            record[of] = f"{count:,} ({100 * count / all:.1f} %)" if count >= SMALL else f"< {SMALL}"
        return record | {"missing": f"{100 * (1 - known.mean()):.0f} %"}

    def column(name: str) -> np.ndarray:
        return stays[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()

    records = [{"what": "stays", **{of: f"{int(mask.sum()):,}" for of, mask in masks.items()}, "missing": ""}]
    records.append(numbers("age, years", column("age")))
    sex, died = column("sex"), column("hospital_death")
    records.append(share("men", sex == 1, ~np.isnan(sex)))
    units = stays["unit"].fill_null("").to_numpy()
    records += [share(f"unit: {u.replace('_', ' ')}", units == u, units != "") for u in sorted(set(units) - {""})]
    records.append(numbers("ICU stay, days", column("icu_minutes") / 1440))
    records.append(share("died in hospital", died == 1, ~np.isnan(died)))
    records += [numbers(name, of) for name, of in values.items()]
    return pl.DataFrame(records)
