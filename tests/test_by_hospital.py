"""Scores of each hospital and what they are together, worked by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments.cli import main
from experiments.hospitals import by_hospital, pooled, pools


def test_five_hospitals_are_pooled_as_by_hand() -> None:
    """Weights of 100: a mean of 1, Q = 100 (0.04 + 0 + 0.04 + 0.01 + 0.01) = 10, so a variance between hospitals of
    (10 - 4) / (500 - 100) = 0.015; then weights of 40, a variance of 40 * 0.1 / 4 = 1 times 1 / 200 of the mean, and quantiles of t
    of 2.776445 (4 degrees of freedom) and 3.182446 (3)."""
    pool = pooled(np.array([0.8, 1.0, 1.2, 0.9, 1.1]), np.full(5, 0.1))
    assert pool.value == pytest.approx(1)
    assert pool.between == pytest.approx(np.sqrt(0.015))
    assert pool.high - pool.value == pytest.approx(2.776445 * np.sqrt(1 / 200), abs=1e-6)
    assert pool.next_high - pool.value == pytest.approx(3.182446 * np.sqrt(0.015 + 1 / 200), abs=1e-6)
    assert pool.share == pytest.approx(0.6)
    assert (pool.low + pool.high, pool.next_low + pool.next_high) == pytest.approx((2, 2))


def test_hospitals_with_less_chance_weigh_more_and_equal_ones_have_nothing_between() -> None:
    """Weights of 100, 25 and 25 without a variance between hospitals: (100 + 25 * 1.1 + 25 * 0.9) / 150 = 1."""
    pool = pooled(np.array([1.0, 1.1, 0.9]), np.array([0.1, 0.2, 0.2]))
    assert (pool.value, pool.between, pool.share) == pytest.approx((1, 0, 0))
    assert pool.high - pool.value == pytest.approx(
        4.302653 * np.sqrt(1 / 150), abs=1e-6
    )  # not less for agreeing too well


def predictions() -> tuple[pl.DataFrame, pl.DataFrame]:
    rng = np.random.default_rng(0)
    hospital = np.repeat(["a", "b", "c", "d"], [400, 300, 200, 12])
    z = rng.normal(-1, 1, len(hospital))
    y = rng.random(len(z)) < 1 / (1 + np.exp(-z - (hospital == "b")))
    name = [str(k) for k in range(len(z))]
    table = pl.DataFrame({
        "stay_id": name, "patient_id": name, "minute": 1440, "target": y.astype(float), "probability": 1 / (1 + np.exp(-z))
    })  # fmt: skip
    return table, pl.DataFrame({"stay_id": name, "hospital_id": hospital})


def test_each_hospital_has_its_own_scores_and_those_with_few_events_are_counted() -> None:
    from sklearn.metrics import roc_auc_score

    table, hospital = predictions()
    scores = by_hospital(table, hospital, 20)
    assert scores["stays"].sum() == len(table)
    assert scores.filter(~pl.col("scored"))["hospital"].to_list() == ["d"]
    own = table.join(hospital, on="stay_id").filter(hospital_id="b")
    row = scores.row(by_predicate=pl.col("hospital") == "b", named=True)
    assert row["auroc"] == pytest.approx(roc_auc_score(own["target"], own["probability"]))
    assert row["events"] == own["target"].sum()
    assert row["intercept"] > 0.5 > abs(scores.filter(hospital="a")["intercept"][0])
    pool = pools(scores.filter("scored"))
    assert 0.6 < pool["auroc"].low < pool["auroc"].value < pool["auroc"].high < 0.9
    assert pool["intercept"].share > 0.5 > pool["slope"].share


def test_evaluate_tells_hospitals_apart(
    mimic: Path, eicu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[str], str]
) -> None:
    main(
        f"train --model LightGBM --model.rounds 20 --data SyntheticMIMICIV --data.root {mimic} --name s --runs {tmp_path}".split()
    )
    line = f"evaluate --ckpt {tmp_path / 's' / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --data.split all --out {tmp_path / 'e'}"
    main(f"{line} --by_hospital 2".split())
    table = pl.read_csv(tmp_path / "e" / "hospitals.csv")
    assert table["stays"].sum() == len(pl.read_parquet(tmp_path / "e" / "predictions.parquet"))
    assert (tmp_path / "e" / "hospitals.png").stat().st_size > 10_000
    assert "hospitals, random effects" in capsys.readouterr().out
    assert "and 3 are needed; lower it" in refused(f"{line} --by_hospital 500")
    assert "--by_hospital must be at least 2" in refused(f"{line} --by_hospital 1")
