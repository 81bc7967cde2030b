"""Scores: against torchmetrics, against numbers worked out by hand, and intervals against a loop that really draws patients."""

from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from experiments import metrics


def table(target: Any, probability: Any, patient: Any = None, stay: Any = None) -> pl.DataFrame:
    count = len(target)
    patient = np.arange(count) if patient is None else np.asarray(patient)
    return pl.DataFrame(
        {
            "stay_id": np.asarray(patient if stay is None else stay),
            "patient_id": patient.astype(str),
            "minute": np.full(count, 1440),
            "target": np.asarray(target, float),
            "probability": np.asarray(probability, float),
        }
    )


def simulated(
    rng: np.random.Generator, patients: int, rows: int = 1, ties: int = 0, spread: float = 1.0
) -> pl.DataFrame:
    """``rows`` rows a patient, correlated within the patient; ``ties`` > 0 rounds probabilities to that many levels."""
    risk = np.repeat(rng.normal(size=patients), rows)
    target = (rng.normal(size=len(risk)) * 0.7 + risk > 1).astype(float)
    p = 1 / (1 + np.exp(1 - spread * risk - 0.5 * rng.normal(size=len(risk))))
    return table(target, np.round(p * ties) / ties if ties else p, np.repeat(np.arange(patients), rows))


@pytest.mark.parametrize("ties", [0, 40, 4, 1])
@pytest.mark.parametrize("seed", range(5))
def test_ranking_metrics_equal_torchmetrics(ties: int, seed: int) -> None:
    rows = simulated(np.random.default_rng(seed), 400, ties=ties)
    p, y = torch.tensor(rows["probability"].to_numpy()), torch.tensor(rows["target"].to_numpy()).long()
    result = metrics.score(rows, 0.5, replicates=0)
    assert result["auroc"]["value"] == pytest.approx(float(binary_auroc(p, y)), abs=1e-6)
    assert result["auprc"]["value"] == pytest.approx(float(binary_average_precision(p, y)), abs=1e-6)


def test_order_of_rows_does_not_matter() -> None:
    rows = simulated(np.random.default_rng(0), 150, rows=3, ties=20)
    forth, back = metrics.score(rows, 0.3, 50), metrics.score(rows.reverse(), 0.3, 50)
    for name in metrics.METRICS:
        assert forth[name]["value"] == pytest.approx(back[name]["value"], abs=1e-12)
        assert forth[name]["low"] == pytest.approx(back[name]["low"], abs=1e-12)


def test_metrics_of_a_small_table_by_hand() -> None:
    # sorted: 0.9 + | 0.8 - | 0.7 + 0.7 - | 0.4 - | 0.2 + | 0.1 - 0.1 -      threshold 0.7: 2 true, 2 false alerts
    rows = table(
        [0, 1, 0, 1, 0, 1, 0, 0],
        [0.8, 0.9, 0.4, 0.7, 0.7, 0.2, 0.1, 0.1],
        patient=[1, 1, 2, 2, 3, 3, 4, 4],
        stay=[10, 10, 20, 20, 30, 30, 41, 42],
    )
    result = metrics.score(rows, 0.7, replicates=0)
    assert {k: v for k, v in result.items() if k not in metrics.METRICS} == {
        "n": 8,
        "n_positive": 3,
        "n_patients": 4,
        "n_stays": 5,
        "threshold": 0.7,
    }
    value = {name: result[name]["value"] for name in metrics.METRICS}
    assert value["sensitivity"] == pytest.approx(2 / 3)
    assert value["specificity"] == pytest.approx(3 / 5)
    assert value["ppv"] == pytest.approx(2 / 4)
    assert value["npv"] == pytest.approx(3 / 4)
    assert value["brier"] == pytest.approx((0.64 + 0.01 + 0.16 + 0.09 + 0.49 + 0.64 + 0.01 + 0.01) / 8)
    assert value["alerts_per_100_stays"] == pytest.approx(100 * 4 / 5)
    # positives above each negative, a tie half: 0.9 beats 5; 0.7 beats 3 and ties 1; 0.2 beats 2
    assert value["auroc"] == pytest.approx((5 + 3.5 + 2) / 15)
    assert value["auprc"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 4 + 1 / 3 * 3 / 6)
    # threshold: recall, precision: 0.9: 1/3, 1; 0.8: 1/3, 1/2; 0.7: 2/3, 1/2; 0.4: 2/3, 2/5; 0.2: 1, 1/2
    assert value["min_re_pr"] == pytest.approx(1 / 2)


def test_no_alert_has_no_positive_predictive_value() -> None:
    result = metrics.score(table([1, 0, 0], [0.3, 0.2, 0.1]), 0.9, replicates=0)
    assert result["ppv"]["value"] is None
    assert result["sensitivity"]["value"] == 0
    assert result["specificity"]["value"] == 1
    assert result["npv"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("target", "null", "known"),
    [
        (0.0, ("auroc", "auprc", "min_re_pr", "sensitivity"), {"specificity": 0.5, "npv": 1.0, "ppv": 0.0}),
        (1.0, ("auroc", "specificity"), {"sensitivity": 0.5, "npv": 0.0, "ppv": 1.0, "auprc": 1.0}),
    ],
)
def test_one_class_only(target: float, null: tuple[str, ...], known: dict[str, float]) -> None:
    result = metrics.score(table([target] * 4, [0.9, 0.8, 0.2, 0.1]), 0.5, replicates=20)
    for name in null:
        assert result[name] == {"value": None, "low": None, "high": None}
    for name, value in known.items():
        assert result[name]["value"] == value
    assert result["n_positive"] == 4 * target


def test_rows_without_a_target_are_left_out() -> None:
    rows = simulated(np.random.default_rng(3), 60)
    unknown = table([float("nan")] * 30, np.linspace(0, 1, 30), patient=np.arange(500, 530))
    missing = unknown.with_columns(target=pl.lit(None, pl.Float64))
    assert metrics.score(pl.concat([unknown, rows, missing]), 0.4, 20) == metrics.score(rows, 0.4, 20)
    assert metrics.choose_threshold(pl.concat([unknown, rows])) == metrics.choose_threshold(rows)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no row with a known outcome.*ehr predict"):
        metrics.score(table([float("nan")], [0.5]), 0.5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
def test_a_probability_that_is_no_number_is_an_error(wrong: float | None) -> None:
    rows = table([1, 0, 0, 1], [0.9, 0.5, 0.2, 0.1]).with_columns(
        probability=pl.when(pl.col("stay_id") < 2).then(wrong).otherwise("probability")
    )
    with pytest.raises(ValueError, match="2 of 4 predicted probabilities are not finite"):
        metrics.score(rows, 0.5)
    with pytest.raises(ValueError, match="2 of 4 predicted probabilities are not finite"):
        metrics.difference(rows, rows)


def test_without_a_threshold_there_are_no_alerts() -> None:
    rows = simulated(np.random.default_rng(2), 100)
    without, at_half = metrics.score(rows, None, 30), metrics.score(rows, 0.5, 30)
    assert without["threshold"] is None
    of_alerts = {"sensitivity", "specificity", "ppv", "npv", "alerts_per_100_stays"}
    for name in metrics.METRICS:
        expected = {"value": None, "low": None, "high": None} if name in of_alerts else at_half[name]
        assert without[name] == expected, name


def test_a_metric_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.METRICS, "prevalence", metrics.Metric(lambda c: c.positives / c.stays, "prevalence", 2))
    result = metrics.score(table([1, 0, 0, 0], [0.9, 0.5, 0.2, 0.1]), None, 20)
    assert result["prevalence"]["value"] == 0.25
    assert metrics.text("prevalence", result).startswith("0.25 (0.")


def test_text_of_a_metric() -> None:
    result = {
        "auroc": {"value": 0.8594, "low": 0.8349, "high": 0.8821},
        "auprc": {"value": None, "low": None, "high": None},
    }
    assert metrics.text("auroc", result) == "0.859 (0.835-0.882)"
    assert metrics.text("auprc", result) == "-"
    assert metrics.text("brier", {"brier": {"value": 0.1, "low": None, "high": None}}) == "0.100"


def test_intervals_equal_a_loop_that_draws_patients() -> None:
    rows = simulated(np.random.default_rng(7), 120, rows=4)
    result = metrics.score(rows, 0.3, replicates=2000)
    rng = np.random.default_rng(99)
    by_patient = [part for _, part in rows.group_by("patient_id", maintain_order=True)]
    numbers = [(p["target"].to_numpy(), p["probability"].to_numpy()) for p in by_patient]
    drawn: dict[str, list[float]] = {"auroc": [], "brier": [], "sensitivity": [], "ppv": []}
    for _ in range(2000):
        chosen = [numbers[i] for i in rng.integers(len(numbers), size=len(numbers))]
        y, p = (np.concatenate(c) for c in zip(*chosen, strict=True))
        rank = (
            np.argsort(np.argsort(p, kind="stable"), kind="stable") + 1
        )  # copies of a row tie: a hundredth of the pairs at most
        positives = y.sum()
        drawn["auroc"].append(
            (rank[y == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(y) - positives))
        )
        drawn["brier"].append(np.mean((p - y) ** 2))
        drawn["sensitivity"].append(np.mean(p[y == 1] >= 0.3))
        drawn["ppv"].append(np.mean(y[p >= 0.3]))
    for name, values in drawn.items():
        width = result[name]["high"] - result[name]["low"]
        low, high = np.percentile(values, [2.5, 97.5])
        assert result[name]["low"] == pytest.approx(low, abs=0.1 * width), name
        assert result[name]["high"] == pytest.approx(high, abs=0.1 * width), name


def test_intervals_respect_patients() -> None:
    """Copies of the same row add no information: the interval must not shrink as if they did."""
    single = simulated(np.random.default_rng(1), 150)
    copied = pl.concat([single] * 9)
    one, nine = metrics.score(single, 0.3, 400)["auroc"], metrics.score(copied, 0.3, 400)["auroc"]
    assert nine["value"] == pytest.approx(one["value"])
    assert nine["high"] - nine["low"] == pytest.approx(one["high"] - one["low"], rel=0.15)


def test_intervals_cover_the_truth() -> None:
    """Over repeated data sets with rows correlated within patients, about 95 % of the intervals hold the true value."""
    truth = metrics.score(simulated(np.random.default_rng(123), 100_000), 0.3, 0)
    hits = {"auroc": 0, "brier": 0, "sensitivity": 0}
    trials = 250
    for seed in range(trials):
        rows = metrics.Rows(simulated(np.random.default_rng(1000 + seed), 150, rows=3), 0.3)
        result = metrics.with_intervals(hits, rows.drawn(hits, 200))  # as ``score`` does of all metrics
        for name in hits:
            hits[name] += result[name]["low"] <= truth[name]["value"] <= result[name]["high"]
    for name, count in hits.items():
        assert 0.90 <= count / trials <= 0.985, (name, count / trials)


@pytest.mark.parametrize("ties", [0, 12])
def test_threshold_is_that_of_the_largest_youden_index(ties: int) -> None:
    rows = simulated(np.random.default_rng(11), 300, ties=ties)
    p, y = rows["probability"].to_numpy(), rows["target"].to_numpy()
    false, true, thresholds = binary_roc(torch.tensor(p), torch.tensor(y).long())
    chosen = metrics.choose_threshold(rows)
    assert chosen == pytest.approx(float(thresholds[torch.argmax(true - false)]))
    result = metrics.score(rows, chosen, 0)
    assert result["sensitivity"]["value"] + result["specificity"]["value"] - 1 == pytest.approx(
        float((true - false).max()), abs=1e-6
    )
    assert metrics.choose_threshold(table([0, 0], [0.2, 0.3])) is None


def test_difference_is_paired() -> None:
    """Against itself: exactly 0; a better score on the same patients: above 0; other samples are refused."""
    rng = np.random.default_rng(0)
    target = (rng.random(600) < 0.3).astype(float)
    base = pl.DataFrame(
        {"patient_id": [str(i % 400) for i in range(600)], "stay_id": range(600), "minute": 1440, "target": target}
    )
    noise = rng.normal(size=600)
    weak = base.with_columns(probability=1 / (1 + np.exp(-(target + 2 * noise))))
    strong = base.with_columns(probability=1 / (1 + np.exp(-(2 * target + 2 * noise)))).sample(
        fraction=1, shuffle=True, seed=1
    )
    same = metrics.difference(weak, weak.reverse(), replicates=200)
    assert same["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    better = metrics.difference(weak, strong, replicates=200)
    assert 0 < better["auroc"]["low"] < better["auroc"]["value"] < better["auroc"]["high"]
    expected = metrics.score(strong, 0.5, 0)["auroc"]["value"] - metrics.score(weak, 0.5, 0)["auroc"]["value"]
    assert better["auroc"]["value"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="same samples"):
        metrics.difference(weak, strong.head(10))
    one_class = weak.with_columns(target=0.0)
    assert metrics.difference(one_class, one_class, 20)["auroc"] == {"value": None, "low": None, "high": None}


# ---- DeLong's test -----------------------------------------------------------------------------------------------------------


NORMAL = NormalDist()


def psi(rows: pl.DataFrame) -> np.ndarray:
    """(positives, negatives): 1 where the positive is above the negative, 1/2 where they tie."""
    p, y = rows["probability"].to_numpy(), rows["target"].to_numpy()
    above = p[y == 1][:, None] - p[y == 0][None, :]
    return (np.sign(above) + 1) / 2


def by_all_pairs(tables: list[pl.DataFrame], contrast: list[float]) -> tuple[float, float]:
    """Value and standard error of a contrast of AUROCs, from DeLong's matrices of covariances."""
    matrices = [psi(rows) for rows in tables]
    positives, negatives = matrices[0].shape
    s10 = np.atleast_2d(np.cov([m.mean(1) for m in matrices]))
    s01 = np.atleast_2d(np.cov([m.mean(0) for m in matrices]))
    weights = np.array(contrast)
    variance = weights @ (s10 / positives + s01 / negatives) @ weights
    return float(weights @ [m.mean() for m in matrices]), float(np.sqrt(variance))


def models(seed: int, patients: int, number: int, ties: int = 0) -> list[pl.DataFrame]:
    """Predictions of several models for the same patients, each a noisy look at the same risk."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=patients)
    target = (rng.normal(size=patients) + risk > 1).astype(float)
    made = []
    for k in range(number):
        p = 1 / (1 + np.exp(-risk - (0.5 + 0.3 * k) * rng.normal(size=patients)))
        made.append(table(target, np.round(p * ties) / ties if ties else p))
    return made


@pytest.mark.parametrize("ties", [0, 30, 3])
@pytest.mark.parametrize("seed", range(4))
def test_delong_equals_all_pairs(seed: int, ties: int) -> None:
    one, two = models(seed, 200, 2, ties)
    value, error = by_all_pairs([one, two], [-1, 1])
    result = metrics.delong([one], [two.sample(fraction=1, shuffle=True, seed=1)])
    assert result["value"] == pytest.approx(value, abs=1e-12)
    assert (result["high"] - result["low"]) / 2 == pytest.approx(NORMAL.inv_cdf(0.975) * error, rel=1e-9)
    assert result["p"] == pytest.approx(2 * NORMAL.cdf(-abs(value) / error), rel=1e-9)


def test_delong_of_seeds_is_a_contrast_of_all_their_curves() -> None:
    tables = models(5, 300, 5, ties=50)
    value, error = by_all_pairs(tables, [-1 / 2, -1 / 2, 1 / 3, 1 / 3, 1 / 3])
    result = metrics.delong(tables[:2], tables[2:])
    assert result["value"] == pytest.approx(value, abs=1e-12)
    assert result["high"] == pytest.approx(value + NORMAL.inv_cdf(0.975) * error, rel=1e-9)


def test_delong_of_a_small_table_by_hand() -> None:
    # events 1 2, others 3 4 5       first: 0.9 0.4 | 0.5 0.3 0.2       second: 0.9 0.8 | 0.8 0.3 0.2
    first, second = (table([1, 1, 0, 0, 0], p) for p in ([0.9, 0.4, 0.5, 0.3, 0.2], [0.9, 0.8, 0.8, 0.3, 0.2]))
    # share of others below each event: 1 2/3, then 1 5/6; share of events above each other: 1/2 1 1, then 3/4 1 1
    # differences: 0 1/6 of mean 1/12 and variance 1/72; 1/4 0 0 of mean 1/12 and variance 1/48
    error = np.sqrt(1 / 72 / 2 + 1 / 48 / 3)
    result = metrics.delong([first], [second])
    assert result["value"] == pytest.approx(1 / 12)
    assert result["low"] == pytest.approx(1 / 12 - 1.959964 * error)
    assert result["p"] == pytest.approx(2 * NORMAL.cdf(-1 / 12 / error))


def test_delong_agrees_with_the_bootstrap() -> None:
    one, two = models(8, 1500, 2)
    theirs, ours = metrics.difference(one, two, 1000)["auroc"], metrics.delong([one], [two])
    assert ours["value"] == pytest.approx(theirs["value"])
    assert ours["high"] - ours["low"] == pytest.approx(theirs["high"] - theirs["low"], rel=0.1)


def test_delong_where_there_is_nothing_to_tell() -> None:
    one, two = models(1, 100, 2)
    assert metrics.delong([one], [one]) == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    reverse = table([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9])
    right = reverse.with_columns(probability=1 - pl.col("probability"))
    assert metrics.delong([reverse], [right]) == {"value": 1.0, "low": None, "high": None, "p": None}
    nobody = [rows.with_columns(target=0.0) for rows in (one, two)]
    assert metrics.delong(nobody[:1], nobody[1:])["value"] is None
    once = table([1, 0, 0, 0], [0.5, 0.1, 0.6, 0.2])
    assert metrics.delong([once], [once])["p"] is None
    with pytest.raises(ValueError, match="some patients have several"):
        hourly = simulated(np.random.default_rng(0), 50, rows=3).with_columns(
            minute=pl.int_range(pl.len()).cast(pl.Int32)
        )
        metrics.delong([hourly], [hourly])
    with pytest.raises(ValueError, match="same samples"):
        metrics.delong([one], [two.head(90)])


# ---- utility of the 2019 challenge ---------------------------------------------------------------------------------------------

SEPSIS = {"name": "sepsis_onset", "hours": 1, "lead": 6, "after_onset": True, "kind": "hourly_binary"}


def hourly(stays: dict[str, tuple[int, list[int], list[float]]]) -> pl.DataFrame:
    """Patient -> hour of the first row, labels, probabilities."""
    rows = [
        {"stay_id": k, "patient_id": name, "minute": 60 * (first + i), "target": float(y), "probability": p}
        for k, (name, (first, labels, risk)) in enumerate(stays.items())
        for i, (y, p) in enumerate(zip(labels, risk, strict=True))
    ]
    return pl.DataFrame(rows)


def utility_by_a_loop(rows: pl.DataFrame, threshold: float) -> float:
    """Normalised utility, patient by patient and hour by hour, from the formulas of the paper's figure."""
    observed = best = none = 0.0
    for _, stay in rows.group_by("stay_id"):
        hours = (stay["minute"] / 60).to_list()
        labels = stay["target"].to_list()
        positive = [hour for hour, label in zip(hours, labels, strict=True) if label == 1]
        sepsis = min(positive) + 6 if positive else None
        for hour, p in zip(hours, stay["probability"].to_list(), strict=True):

            def worth(alert: bool, hour: float = hour, sepsis: float | None = sepsis) -> float:
                if sepsis is None:
                    return -0.05 if alert else 0.0
                t = hour - sepsis
                if t > 3:
                    return 0.0
                if alert:
                    return max(t / 6 + 2, -0.05) if t <= -6 else 1 / 3 - t / 9
                return 0.0 if t <= -6 else -2 / 9 * t - 4 / 3

            observed += worth(p >= threshold)
            none += worth(False)
            best += worth(sepsis is not None and sepsis - 12 <= hour <= sepsis + 3)
    return (observed - none) / (best - none)


def test_utility_of_a_small_table_by_hand() -> None:
    # the label turns 1 at hour 14, so sepsis begins at hour 20; a record of every third hour
    # hour     5      8    11    14    17    20    23    26
    # label    0      0     0     1     1     1     1     1
    # alert    yes    -     yes   -     yes   yes   yes   yes
    # of it   -0.05   0    0.5    1    2/3   1/3    0     0        of silence: 0 0 0 0 -2/3 -4/3 -2 0
    rows = hourly({
        "septic": (0, [0] * 14 + [1] * 13, [0.1] * 27),
        "healthy": (1, [0] * 4, [0.9, 0.1, 0.1, 0.9]),
    })  # fmt: skip
    third = rows.filter((pl.col("patient_id") == "healthy") | pl.col("minute").is_in([60 * h for h in range(5, 27, 3)]))
    alerts = [60 * h for h in (5, 11, 17, 20, 23, 26)]
    third = third.with_columns(
        probability=pl.when(pl.col("patient_id") == "septic")
        .then(pl.col("minute").is_in(alerts).cast(pl.Float64))
        .otherwise("probability")
    )
    none = -2 / 3 - 4 / 3 - 2
    observed = (-0.05 + 0.5 + 0 + 2 / 3 + 1 / 3 + 0) - 2 * 0.05
    best = 0 + 0.5 + 1 + 2 / 3 + 1 / 3 + 0
    expected = (observed - none) / (best - none)
    assert metrics.score(third, 0.5, 0, SEPSIS)["utility"]["value"] == pytest.approx(expected)
    assert utility_by_a_loop(third, 0.5) == pytest.approx(expected)
    assert metrics.score(third, 2.0, 0, SEPSIS)["utility"]["value"] == 0
    perfect = third.with_columns(
        probability=((pl.col("patient_id") == "septic") & pl.col("minute").is_between(480, 1380)).cast(pl.Float64)
    )
    assert metrics.score(perfect, 0.5, 0, SEPSIS)["utility"]["value"] == pytest.approx(1)


def challenge(seed: int, patients: int = 80) -> pl.DataFrame:
    """Stays of all kinds: without sepsis, labelled in the middle, at the first row and at the last, and begun late."""
    rng = np.random.default_rng(seed)
    stays = {}
    for k in range(patients):
        hours, first = int(rng.integers(1, 40)), int(rng.integers(1, 4))
        onset = [hours, 0, hours - 1, int(rng.integers(0, hours))][k % 4] if k % 3 else hours
        labels = [int(i >= onset) for i in range(hours)]
        risk = np.round(1 / (1 + np.exp(2 - np.array(labels) - rng.normal(size=hours))), 2)
        stays[f"p{k}"] = (first, labels, risk.tolist())
    return hourly(stays)


@pytest.mark.parametrize("seed", range(3))
def test_utility_equals_a_loop(seed: int) -> None:
    rows = challenge(seed)
    for threshold in (0.0, 0.15, 0.3, 0.6):
        value = metrics.score(rows.sample(fraction=1, shuffle=True, seed=3), threshold, 0, SEPSIS)["utility"]["value"]
        assert value == pytest.approx(utility_by_a_loop(rows, threshold))
    chosen = metrics.choose_threshold(rows, "utility", SEPSIS)
    assert chosen is not None
    best = max(utility_by_a_loop(rows, t) for t in rows["probability"].unique())
    assert utility_by_a_loop(rows, chosen) == pytest.approx(best)


def test_utility_has_an_interval_of_patients() -> None:
    rows = challenge(4, 60)
    result = metrics.score(rows, 0.3, 300, SEPSIS)["utility"]
    by_patient = [part for _, part in rows.group_by("patient_id", maintain_order=True)]
    rng, drawn = np.random.default_rng(5), []
    for _ in range(150):
        chosen = [by_patient[i].with_columns(stay_id=pl.lit(k)) for k, i in enumerate(rng.integers(60, size=60))]
        drawn.append(utility_by_a_loop(pl.concat(chosen), 0.3))
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = result["high"] - result["low"]
    assert result["low"] == pytest.approx(low, abs=0.2 * width)
    assert result["high"] == pytest.approx(high, abs=0.2 * width)


def test_utility_is_null_where_it_is_not_defined() -> None:
    rows = challenge(1)
    null = {"value": None, "low": None, "high": None}
    for task in (None, {**SEPSIS, "lead": 4}, {**SEPSIS, "after_onset": False}, {**SEPSIS, "name": "mortality_24h"}):
        assert metrics.score(rows, 0.3, 5, task)["utility"] == null
        with pytest.raises(ValueError, match=r"utility is defined for hourly sepsis.*found"):
            metrics.choose_threshold(rows, "utility", task)
    assert metrics.score(rows, None, 5, SEPSIS)["utility"] == null
    nobody = rows.with_columns(target=0.0)
    assert metrics.score(nobody, 0.3, 5, SEPSIS)["utility"] == null
    assert metrics.choose_threshold(nobody, "utility", SEPSIS) is None  # every alert is false
