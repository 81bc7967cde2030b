"""Maps of probabilities against independent implementations, and what recalibration on a second hospital system changes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from ehrmodels import load
from ehrmodels.calibration import METHODS, Calibration, fitted, logistic, logit
from ehrmodels.checkpoint import read
from experiments import metrics
from experiments.cli import main


def rows(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too extreme and too low, and outcomes."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-2, 1.5, n)
    return 1 / (1 + np.exp(-z)), (rng.random(n) < 1 / (1 + np.exp(-(0.6 * z + 0.5)))).astype(np.float64)


def table(probability: np.ndarray, outcome: np.ndarray, patients: int | None = None) -> pl.DataFrame:
    n = len(outcome)
    patient = [str(k % (patients or n)) for k in range(n)]
    return pl.DataFrame({
        "stay_id": patient, "patient_id": patient, "minute": range(n), "target": outcome, "probability": probability
    })  # fmt: skip


def mapped(calibration: Calibration, probability: np.ndarray) -> np.ndarray:
    return calibration(torch.from_numpy(probability)).numpy()


# ---- maps -----------------------------------------------------------------------------------------------------------------


def test_slope_and_intercept_are_those_of_scikit_learn() -> None:
    probability, outcome = rows()
    x = logit(probability)
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(x[:, None], outcome)
    assert logistic(x, outcome) == pytest.approx((theirs.coef_[0, 0], theirs.intercept_[0]), abs=1e-5)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, fit_intercept=False).fit(x[:, None], outcome)
    temperature = fitted("temperature", probability, outcome, 9)
    assert temperature.slope == pytest.approx(theirs.coef_[0, 0], abs=1e-5)
    assert temperature.intercept == 0


def test_platt_is_the_sigmoid_calibration_of_scikit_learn() -> None:
    from sklearn.calibration import _SigmoidCalibration

    probability, outcome = rows(150)
    theirs = _SigmoidCalibration().fit(logit(probability), outcome).predict(logit(probability))
    np.testing.assert_allclose(
        mapped(fitted("platt", probability, outcome, 9), probability), theirs, rtol=1e-3, atol=1e-4
    )


def test_isotonic_is_that_of_scikit_learn_between_its_knots_and_beyond() -> None:
    probability, outcome = rows(700)
    probability = probability.round(2)  # ties
    calibration = fitted("isotonic", probability, outcome, 9)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(probability, outcome)
    new = np.linspace(0, 1, 997)
    np.testing.assert_allclose(mapped(calibration, new), theirs.predict(new), atol=1e-9)
    assert (np.diff(mapped(calibration, new)) >= -1e-12).all()
    flat = fitted("isotonic", np.full(4, 0.3), np.array([0, 1, 0, 0]), 4)
    assert mapped(flat, np.array([0.1, 0.3, 0.9])).tolist() == [0.25] * 3


def test_prevalence_makes_the_mean_risk_the_observed_share_and_leaves_odds_ratios() -> None:
    probability, outcome = rows()
    after = mapped(fitted("prevalence", probability, outcome, 9), probability)
    assert after.mean() == pytest.approx(outcome.mean(), abs=1e-7)
    assert np.ptp(logit(after) - logit(probability)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_map_survives_a_checkpoint(method: str) -> None:
    calibration = fitted(method, *rows(300), 300)
    assert Calibration.of(json.loads(json.dumps(calibration.plain()))) == calibration
    for wrong in ({"method": method}, {**calibration.plain(), "method": "magic"}, 3):
        with pytest.raises(ValueError, match="the entry calibration of a checkpoint must be"):
            Calibration.of(wrong)


@pytest.mark.parametrize(
    ("probability", "outcome", "words"),
    [
        ([0.2, 0.4], [0, 0], "have 0 positives among 2 samples"),
        ([0.2, 0.4, 0.6, 0.8], [1, 0, 1, 0], "ranks them the wrong way round"),
        ([0.2, 0.4, 0.6, 0.8], [0, 0, 1, 1], "parts their outcomes without an error"),
    ],
)
def test_outcomes_that_say_nothing_of_a_map_are_refused(
    probability: list[float], outcome: list[int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fitted("temperature", np.array(probability), np.array(outcome), 4)


# ---- metrics --------------------------------------------------------------------------------------------------------------


def test_measures_of_calibration_are_those_of_scikit_learn() -> None:
    probability, outcome = rows()
    score = metrics.score(table(probability, outcome), None, replicates=0)
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(probability)[:, None], outcome)
    assert score["slope"]["value"] == pytest.approx(theirs.coef_[0, 0], abs=1e-5)
    observed, predicted = calibration_curve(outcome, probability, n_bins=10, strategy="quantile")
    assert score["ece"]["value"] == pytest.approx(np.abs(observed - predicted).mean(), abs=1e-9)
    shifted = 1 / (1 + np.exp(-logit(probability) - score["intercept"]["value"]))
    assert shifted.sum() == pytest.approx(outcome.sum())  # what an intercept with a slope of 1 is the solution of


def test_intervals_of_calibration_are_those_of_regressions_of_each_resample() -> None:
    probability, outcome = rows(1500)
    patient = np.arange(1500) % 500
    drawn = metrics.Rows(table(probability, outcome, 500), None).drawn(["slope", "intercept"], 200)
    again = []
    for times in metrics.resamples(500, 200):
        # the order in which ``Rows`` numbers patients is that of their names
        number = np.argsort(np.argsort([str(k) for k in range(500)]))
        taken = np.repeat(np.arange(1500), times[number[patient]].astype(int))
        x, y = logit(probability[taken]), outcome[taken]
        again.append((logistic(x, y)[0], logistic(x, y, slope=False)[1]))
    np.testing.assert_allclose(drawn[1:], again, atol=0.02)
    np.testing.assert_allclose(drawn[1:].std(0), np.std(again, 0), rtol=0.05)


def test_without_both_outcomes_there_is_no_slope_and_equal_risks_are_one_group() -> None:
    score = metrics.score(table(np.full(30, 0.2), np.zeros(30)), None, replicates=5)
    assert score["slope"]["value"] is None and score["intercept"]["value"] is None
    assert score["ece"]["value"] == pytest.approx(0.2)
    score = metrics.score(table(np.full(30, 0.2), (np.arange(30) % 3 == 0).astype(float)), None, replicates=5)
    assert score["ece"]["value"] == pytest.approx(1 / 3 - 0.2)
    assert score["slope"]["value"] is None
    assert score["intercept"]["value"] == pytest.approx(np.log(2))  # from odds of 1 to 4 to odds of 1 to 2


# ---- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("source")
    main(
        f"train --model LightGBM --model.rounds 20 --data SyntheticMIMICIV --data.root {mimic} --name s --runs {runs}".split()
    )
    return runs / "s" / "best.ckpt"


@pytest.mark.parametrize("method", METHODS)
def test_zero_shot_is_recalibrated_on_so_many_patients_alone(
    method: str, source: Path, eicu: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    main(
        f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu} --out {out} --transfer.strategy zero_shot "
        f"--transfer.recalibrate {method} --transfer.sizes 120".split()
    )
    before, after = pl.read_parquet(out / "zero_shot.parquet"), pl.read_parquet(out / "predictions.parquet")
    result = json.loads((out / "metrics.json").read_text())
    assert result["test"]["recalibrated"] == f"{method} on 120 patients"
    assert (
        after.filter(split="val")["patient_id"].n_unique() + after.filter(split="train")["patient_id"].n_unique() == 120
    )
    checkpoint, model = read(out / "best.ckpt"), load(out / "best.ckpt")
    assert model.calibration is not None and model.calibration.method == method
    assert checkpoint["ehr"]["data"]["class"] == "SyntheticEICU"
    fitting = after.filter(pl.col("split") != "test")
    assert result["val"]["n"] == len(fitting)
    test = after.filter(split="test")
    assert test.select(metrics.KEY).equals(before.select(metrics.KEY))
    probability = torch.from_numpy(before["probability"].to_numpy().copy())
    np.testing.assert_allclose(test["probability"], model.calibration(probability), rtol=1e-12)
    carried = json.loads((out / "carried.json").read_text())
    assert carried["threshold"] == load(source).threshold
    assert carried["auroc"] == result["test"]["auroc"]
    assert result["test"]["threshold"] == metrics.choose_threshold(fitting, "youden", model.spec.task)
    main(f"evaluate --ckpt {out / 'best.ckpt'} --data.root {eicu} --out {tmp_path / 'scores'}".split())
    again = pl.read_parquet(tmp_path / "scores" / "predictions.parquet")
    np.testing.assert_allclose(again["probability"], test["probability"], rtol=1e-12)


def test_a_trained_strategy_is_recalibrated_on_validation_patients_and_training_forgets_it(
    source: Path, eicu: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    line = f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu}"
    out = tmp_path / "out"
    main(f"{line} --transfer.recalibrate platt --out {out}".split())
    before, after = (json.loads((out / f"{name}.json").read_text()) for name in ("uncalibrated", "metrics"))
    assert before["auroc"] == after["test"]["auroc"] and before["brier"] != after["test"]["brier"]
    val = pl.read_parquet(out / "predictions.parquet").filter(split="val")
    model = load(out / "best.ckpt")
    assert model.calibration is not None and model.calibration.patients == val["patient_id"].n_unique()
    second = tmp_path / "second"
    main(f"finetune --ckpt {out / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --out {second}".split())
    assert load(second / "best.ckpt").calibration is None
    assert "are too few to train on some and recalibrate on others" in refused(
        f"{line} --transfer.recalibrate platt --transfer.sizes 60 --out {tmp_path / 'few'}"
    )
    assert "score the others, --data.split test, not all" in refused(
        f"{line} --transfer.recalibrate platt --data.split all --out {tmp_path / 'few'}"
    )
