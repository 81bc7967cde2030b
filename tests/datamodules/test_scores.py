"""Derived scores by hand, and that they are told of the last values that were known."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from datamodules.module import MIMICIV
from datamodules.scores import SCORES, scores

NAN = float("nan")
VARIABLES = [
    "heart_rate", "systolic_bp", "diastolic_bp", "mean_bp", "temperature", "respiratory_rate", "paco2", "wbc", "spo2", "fio2",
    "pao2", "bun", "creatinine", "platelets", "bilirubin_total", "gcs",
]  # fmt: skip
# last values -> shock index, pulse pressure, BUN over creatinine, SpO2 over FiO2, PaO2 over FiO2, SIRS criteria, partial SOFA
BY_HAND = [
    # well: nothing met, no points at the very limits
    ((60, 120, 80, 70, 36.0, 20, 32, 12.0, 98, 21, 95, 10, 1.1, 150, 1.1, 15), (0.5, 40, 10 / 1.1, 98 / 0.21, 95 / 0.21, 0, 0)),
    # shock: all four of SIRS; MAP 1, platelets 2, bilirubin 3, GCS 3, creatinine 4
    ((130, 65, 40, 48, 39.1, 30, 28, 18.0, 90, 60, 60, 80, 5.0, 80, 7.0, 7), (2.0, 25, 16, 150, 100, 4, 13)),
    # cold and leucopenic; only the first step of each
    ((90, 100, 50, 69, 35.9, 12, 31, 3.9, 96, 40, 80, 12, 1.2, 149, 1.2, 14), (0.9, 50, 10, 240, 200, 3, 5)),
    # the most of each: platelets 4, bilirubin 4, GCS 4, creatinine 4, MAP 1
    ((91, 90, 60, 20, 37.0, 15, 40, 8.0, 99, 100, 300, 20, 6.0, 19, 12.0, 3), (91 / 90, 30, 20 / 6, 99, 300, 1, 17)),
    # what is not known leaves a score out, or does not count
    ((NAN, 90, NAN, NAN, 38.1, NAN, NAN, NAN, 99, NAN, NAN, 20, NAN, 90, NAN, NAN), (NAN, NAN, NAN, NAN, NAN, 1, 2)),
    ((NAN,) * 16, (NAN,) * 7),
]  # fmt: skip


@pytest.mark.parametrize(("last", "expected"), BY_HAND)
def test_by_hand(last: tuple[float, ...], expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(scores(np.array([last], np.float32), VARIABLES)[0], expected, rtol=1e-6)


def test_a_variable_that_the_data_lack_is_unknown() -> None:
    (found,) = scores(np.array([[80.0, 100.0]]), ["heart_rate", "systolic_bp"])
    np.testing.assert_allclose(found, (0.8, NAN, NAN, NAN, NAN, 0, NAN))


def test_a_model_sees_those_of_the_last_known_values(mimic: Path) -> None:
    data = MIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=6, elapsed=False)
    data.prepare_data()
    data.setup()
    assert data.spec is not None
    assert data.spec.statics[-len(SCORES) :] == list(SCORES)
    rows = np.random.default_rng(0).permutation(len(data.samples))[:100]
    static = data.batch(rows).static.numpy()[:, -len(SCORES) :]
    center, scale = (np.array(part)[-len(SCORES) :] for part in (data.spec.static_center, data.spec.static_scale))
    last = []
    for row in rows:
        stay, minute = int(data._stay[row]), int(data._minute[row])
        events = data.store.frame(stay, stay + 1).filter(
            pl.col("minute") < minute, pl.col("known_minute") < minute, pl.col("minute") >= minute - 48 * 60
        )
        values = dict(
            events.sort("minute", maintain_order=True).select(pl.col("concept").cast(pl.String), "value").rows()
        )
        last.append([values.get(name, NAN) for name in data.spec.variables])
    expected = (scores(np.array(last), data.spec.variables) - center) / scale
    np.testing.assert_allclose(static, np.nan_to_num(np.clip(expected, -5, 5)), atol=1e-4)
    assert (static[:, 0] != 0).mean() > 0.5
