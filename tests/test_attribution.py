"""What variables account for: integrated gradients, SHAP, attention, permutation, and the checks that tell which of them are true."""

from itertools import combinations
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_causality import MODELS, fitted
from torch import Tensor, nn

import ehrmodels
from datamodules.contract import Batch, Grid, Spec, Triplets
from datamodules.module import MIMICIV
from ehrmodels import HyMaTE, ICUModule, attribution
from ehrmodels.trees import FittedAtOnce, LightGBM, features_of
from experiments import attribution as methods

NETWORKS = [kind for kind in MODELS if not issubclass(kind, FittedAtOnce)]
FITTED = [kind for kind in MODELS if issubclass(kind, FittedAtOnce)]


@pytest.fixture(scope="module")
def data(mimic: Path) -> MIMICIV:
    """Predictions of every hour, whose static features tell of variables, too."""
    data = MIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=6)
    data.prepare_data()
    data.setup()
    return data


def pair(data: MIMICIV, rows: np.ndarray) -> tuple[Batch, Batch]:
    """Samples, and the same without any observation."""
    assert data.spec is not None
    return data.batch(rows), data.batch(rows, without=np.ones((len(rows), len(data.spec.variables)), bool))


def some(data: MIMICIV, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).permutation(data.rows("train"))[:count]


# ---- integrated gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_parts_add_up_to_what_the_record_changes(kind: type[ICUModule], data: MIMICIV) -> None:
    model = fitted(kind, data)
    rows = some(data, 3)
    batch, empty = pair(data, rows)
    parts = attribution.integrated_gradients(model, batch, empty)
    nothing = type(empty)(*(t[:1] for t in empty))
    with torch.no_grad():
        before = model(empty)
        if isinstance(batch, Triplets):  # whose observations are there, but nothing is known of them
            with attribution._gated(model, nothing) as gated:
                gates = {"events": torch.zeros_like(batch.time)}
                if model.summary:
                    gates["summary"] = torch.zeros(len(rows), len(model.spec.variables))
                before = gated(batch._replace(static=empty.static), gates)
        change = model(batch) - before
    total = parts.variable.sum(1) + parts.rest
    torch.testing.assert_close(total, change, rtol=0.1, atol=0.1 * float(change.abs().max()) + 1e-4)
    charted = torch.from_numpy(data.charted(rows))
    assert parts.variable[charted].abs().max() > 0
    assert parts.variable[~charted].abs().max() < 1e-6  # what is not there accounts for nothing
    if parts.hourly is not None:
        assert parts.hourly.shape == (3, model.spec.window, len(model.spec.variables))


class Linear(ICUModule):
    """Log odds that are a sum of the last values."""

    view = "grid"

    def build(self, spec: Spec) -> None:
        self.weight = nn.Parameter(torch.linspace(-1, 1, len(spec.variables)))

    def forward(self, batch: Grid) -> Tensor:  # type: ignore[override]
        return (batch.value[:, -1] * self.weight).sum(-1)


def test_gradients_of_a_linear_model_are_its_terms_in_their_hour(data: MIMICIV) -> None:
    model = Linear()
    assert data.spec is not None
    model.initialise(data.spec)
    data.serve(model)
    batch, empty = pair(data, some(data))
    parts = attribution.integrated_gradients(model.eval(), batch, empty)
    terms = ((batch.value[:, -1] - empty.value[:, -1]) * model.weight).detach()  # type: ignore[union-attr]
    torch.testing.assert_close(parts.variable, terms, atol=1e-5, rtol=1e-4)
    assert parts.hourly is not None
    torch.testing.assert_close(parts.hourly[:, -1], terms, atol=1e-5, rtol=1e-4)
    assert parts.hourly[:, :-1].abs().max() == 0


def test_events_are_summed_in_the_hour_in_which_they_lie(data: MIMICIV) -> None:
    assert data.spec is not None
    spec = data.spec
    time = torch.tensor([[-1.0, -1 + 2 / spec.window, 0.999, 0.0]])
    batch = Triplets(*[torch.zeros(1, 0)] * 2, time, torch.tensor([[1, 1, 3, 0]]), time, torch.tensor([3]), *[torch.zeros(1)] * 2)  # fmt: skip
    hours = attribution._by_hour(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), batch, spec)
    assert [hours[0, t, v].item() for t, v in ((0, 0), (1, 0), (spec.window - 1, 2))] == [1, 2, 4]
    assert hours.sum() == 7


def test_static_features_count_for_the_variable_that_they_tell_of() -> None:
    spec = Spec(
        ["urine", "ph"], ["mL", ""], ["age", "number of ph", "shock index", "unit=mixed"], *[[]] * 4, {"name": "x"}
    )  # type: ignore[list-item]
    variable, rest = attribution._of_statics(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), spec)
    assert variable.tolist() == [[0, 2]] and rest.tolist() == [13]


# ---- models that are fitted at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FITTED, ids=lambda kind: kind.__name__)
def test_parts_of_fitted_models_differ_by_what_outputs_differ(kind: type[ICUModule], data: MIMICIV) -> None:
    model = fitted(kind, data)
    batch, empty = pair(data, some(data))
    parts = attribution.shap(model, batch, empty)  # type: ignore[arg-type]
    total, output = parts.variable.sum(1) + parts.rest, model(batch)
    expected = output - output[0] if kind is not ehrmodels.LogisticRegression else output - model(empty)
    torch.testing.assert_close(
        total - total[0] * (kind is not ehrmodels.LogisticRegression), expected, atol=1e-4, rtol=1e-3
    )


def test_shap_values_are_shapleys_by_brute_force() -> None:
    """Of trees of three features: the mean over all orders of what knowing a feature changes, a split of an unknown one being
    passed on both sides in proportion to the training samples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] + x[:, 2] + rng.normal(size=400) > 0).astype(np.float32)
    model = LightGBM(rounds=4, leaves=6, min_samples=10, features=1.0, learning_rate=0.5)
    model.spec = Spec([], [], ["a", "b", "c"], [], [], [], [], {"name": "mortality_hospital", "kind": "binary"})
    model.fitted = model.fit_rows((x, y))
    trees = [t["tree_structure"] for t in model.booster.dump_model(num_iteration=-1)["tree_info"]]

    def value(node: dict[str, Any], row: np.ndarray, known: tuple[int, ...]) -> float:
        if "leaf_value" in node:
            return float(node["leaf_value"])
        sides = node["left_child"], node["right_child"]
        k = node["split_feature"]
        if k in known:
            return value(sides[int(row[k] > node["threshold"])], row, known)
        counts = [side.get("internal_count", side.get("leaf_count")) for side in sides]
        return sum(c * value(side, row, known) for c, side in zip(counts, sides, strict=True)) / sum(counts)

    for row in x[:5]:
        expected = np.zeros(3)
        for k in range(3):
            others = [j for j in range(3) if j != k]
            for size in range(3):
                for known in combinations(others, size):
                    share = factorial(size) * factorial(2 - size) / factorial(3)
                    expected[k] += share * sum(value(t, row, (*known, k)) - value(t, row, known) for t in trees)
        np.testing.assert_allclose(model.contributions(row[None], row[None])[0], expected, atol=1e-6)


def test_a_model_that_learned_nothing_is_another_of_the_same_shape(data: MIMICIV) -> None:
    for kind in (ehrmodels.Fusion, LightGBM):
        model = fitted(kind, data)
        batch = data.batch(data.rows("train")[::20])
        one, same, other = (attribution.untrained(model, [batch], seed) for seed in (1, 1, 2))
        assert torch.equal(one(batch), same(batch))
        assert not torch.allclose(one(batch), other(batch), atol=1e-4)
        assert not torch.allclose(one(batch), model(batch), atol=1e-4)
        assert [p.shape for p in one.parameters()] == [p.shape for p in model.parameters()]


# ---- attention, permutation ---------------------------------------------------------------------------------------------------------


def test_attention_of_a_variable_is_that_of_the_hours_in_which_it_was_charted(data: MIMICIV) -> None:
    model = fitted(ehrmodels.Fusion, data)
    batch = data.batch(some(data))
    weight = attribution.attention(model, batch)
    hours = model.hours(batch).squeeze(-1)  # type: ignore[operator]
    torch.testing.assert_close(hours.sum(1), torch.ones(6))
    assert weight is not None
    for i, k in ((0, 0), (3, 5)):
        charted = batch.mask[i, :, k] > 0  # type: ignore[union-attr]
        assert weight[i, k].item() == pytest.approx(hours[i][charted].sum().item(), abs=1e-6)
    assert attribution.attention(fitted(ehrmodels.LSTM, data), batch) is None


@pytest.mark.parametrize("view", ["grid", "triplets", "summary"])
def test_swapped_samples_have_some_variables_of_others_and_the_rest_of_their_own(view: Any, data: MIMICIV) -> None:
    data.view, data.summary = view, True
    assert data.spec is not None
    rows, width = some(data, 12), len(data.spec.variables)
    own, other = data.batch(rows[:6]), data.batch(rows[6:])
    for mine, expected in ((torch.zeros(width, dtype=torch.bool), own), (torch.ones(width, dtype=torch.bool), other)):
        result = attribution.swapped(own, other, mine, data.spec)
        for name in set(own._fields) - {"static", "target", "row"}:
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True, rtol=0, atol=0)
    mine = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    result = attribution.swapped(own, other, mine, data.spec)
    torch.testing.assert_close(result.summary[:, mine], other.summary[:, mine], equal_nan=True)
    torch.testing.assert_close(result.summary[:, ~mine], own.summary[:, ~mine], equal_nan=True)
    k = data.spec.variables.index("heart_rate")
    place = data.spec.statics.index("number of heart_rate")
    assert torch.equal(result.static[:, place], (other if mine[k] else own).static[:, place])
    assert torch.equal(result.static[:, 0], own.static[:, 0]) and torch.equal(result.target, own.target)
    if isinstance(result, Triplets):

        def events(b: Triplets, i: int) -> list[Any]:
            return list(zip(*(t[i, : b.length[i]].tolist() for t in (b.time, b.variable, b.value)), strict=True))

        for i in range(6):
            expected = [e for e in events(own, i) if not mine[e[1] - 1]] + [
                e for e in events(other, i) if mine[e[1] - 1]
            ]
            assert events(result, i) == sorted(expected, key=lambda e: e[:2])


def test_permuting_a_group_costs_what_the_model_reads_of_it(data: MIMICIV) -> None:
    """Log odds that read vital signs alone lose nothing by other groups."""
    model = Linear()
    assert data.spec is not None
    model.initialise(data.spec)
    groups = np.array([methods._group(name) for name in data.spec.variables])
    vital = torch.from_numpy(groups == "vital signs")
    model.weight.data = torch.where(vital, 0.5, 0.0)
    data.serve(model)
    with torch.inference_mode():
        cohort = methods.explained(model.eval(), data, [data.rows("train")[::60]], ["importance"])
        loss = methods.permutation(model, data, cohort, "permuting")
    assert set(loss["group"]) == set(groups)
    others = loss.filter(pl.col("group") != "vital signs")
    assert others["auroc_loss"].abs().max() == 0
    assert loss.filter(group="vital signs")["auroc_loss"].abs()[0] > 0.01


# ---- checks -------------------------------------------------------------------------------------------------------------------------


def test_an_attribution_that_says_nothing_fails(data: MIMICIV, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a linear network pass; weights that count observations, whatever was learned, do not."""

    class Random(Linear):
        def build(self, spec: Spec) -> None:
            self.weight = nn.Parameter(torch.randn(len(spec.variables)) ** 5)

    def counted(model: ICUModule, batch: Batch) -> Tensor:
        return batch.mask.sum(1)  # type: ignore[union-attr]

    monkeypatch.setattr(attribution, "attention", counted)
    names = ["importance", "gradients", "attention"]
    monkeypatch.setattr(methods, "methods", lambda model: names)
    model = Random()
    assert data.spec is not None
    model.initialise(data.spec)
    data.serve(model)
    with torch.inference_mode():
        cohort = methods.explained(model.eval(), data, [data.rows("train")[::100]], names)
        table, further = methods.deletion(model, data, cohort)
        checks = methods.checks(model, data, cohort, further, "untrained")
    assert checks["method"].to_list() == names
    assert checks["passed"].to_list() == [True, True, False]
    assert checks["alike"][2] == pytest.approx(1)
    order = table.filter(pl.col("order") == "gradients")
    assert order["share"].to_list() == [0, *methods.SHARES]
    change = {name: table.filter(order=name, share=0.1)["change"].mean() for name in ("gradients", "random")}
    assert change["gradients"] > change["random"]  # type: ignore[operator]
    weights = np.array([checks["deletion"][0], np.mean(further["importance"])])
    assert weights[0] == pytest.approx(weights[1])


def test_ranks_are_compared_within_samples() -> None:
    a = np.array([[1.0, 2, 3, 9], [1, 2, 3, 4], [5, 1, 1, 1]])
    b = np.array([[10.0, 20, 30, 0], [4, 3, 2, 1], [5, 1, 1, 1]])
    charted = np.array([[True, True, True, False], [True] * 4, [True, False, False, False]])
    assert methods._rank_correlation(a, b, charted)[:2].tolist() == pytest.approx([1, -1])
    assert np.isnan(methods._rank_correlation(a, b, charted)[2])


def test_features_are_those_that_trees_read(data: MIMICIV) -> None:
    """The order in which parts are summed is that of the features."""
    model = fitted(LightGBM, data)
    batch, empty = pair(data, some(data, 3))
    assert data.spec is not None
    names = [*data.spec.statics, *(f"{v} {k}" for v in data.spec.variables for k in range(16))]
    part = model.contributions(*(features_of(b.static, b.summary).numpy() for b in (batch, empty)))  # type: ignore[operator]
    v = data.spec.variables.index("heart_rate")
    mine = [k for k, n in enumerate(names) if n.split()[0] == "heart_rate" or n.endswith(" heart_rate")]
    got = attribution.shap(model, batch, empty).variable[:, v]  # type: ignore[arg-type]
    np.testing.assert_allclose(got.numpy(), part[:, mine].sum(1), atol=1e-5)


def test_fusion_weights_are_those_of_hymate(data: MIMICIV) -> None:
    model = fitted(HyMaTE, data)
    weight = attribution.attention(model, data.batch(some(data)))
    assert weight is not None
    torch.testing.assert_close(weight.sum(1), torch.ones(6), atol=1e-4, rtol=0)
