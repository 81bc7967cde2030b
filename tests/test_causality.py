"""No model sees the future: what it predicts at an hour is the same whatever is charted from then on."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ehrmodels
from datamodules.module import MIMICIV
from ehrmodels import ICUModule
from ehrmodels.trees import FittedAtOnce

MODELS = [
    kind
    for kind in map(ehrmodels.__dict__.get, ehrmodels.__all__)
    if isinstance(kind, type) and issubclass(kind, ICUModule) and kind is not ICUModule and kind.supervised
]


@pytest.fixture(scope="module")
def data(mimic: Path) -> MIMICIV:
    """Predictions of every hour, with all that is told of the time before: hours, counts, scores, summaries."""
    data = MIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=6)
    data.prepare_data()
    data.setup()
    return data


def fitted(kind: type[ICUModule], data: MIMICIV) -> ICUModule:
    """A model with random weights; trees that were grown on some of the samples."""
    torch.manual_seed(0)
    model = kind()
    assert data.spec is not None
    model.initialise(data.spec, 1.0)
    data.serve(model)
    if isinstance(model, FittedAtOnce):
        batch = data.batch(data.rows("train")[::20])
        features = torch.cat([batch.static, batch.summary.flatten(1)], 1).numpy()
        model.fitted = model.fit_rows((features, batch.target.numpy()))
    return model.eval()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_prediction_is_unchanged_by_anything_after_it(kind: type[ICUModule], data: MIMICIV) -> None:
    model, store = fitted(kind, data), data.store
    rows = np.random.default_rng(0).permutation(len(data.samples))[:12]
    value, changed = store.value, 0
    for row in rows:
        stay, minute = data._stay[row], data._minute[row]
        before = model.predict_step(data.batch(np.array([row])), 0)[1]
        own = np.zeros(len(value), bool)
        own[store.offsets[stay] : store.offsets[stay + 1]] = True
        later = own & ((store.minute >= minute) | (store.known >= minute))
        try:
            store.value = np.where(later, np.float32(1e6), value)
            after = model.predict_step(data.batch(np.array([row])), 0)[1]
            store.value = np.where(own & ~later, value + np.float32(30), value)
            other = model.predict_step(data.batch(np.array([row])), 0)[1]
        finally:
            store.value = value
        assert torch.equal(before, after)
        changed += int(not torch.equal(before, other))
    assert changed > 6  # as it is by what came before
