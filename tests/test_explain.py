"""``ehr explain``: what is left of a record without a variable, the parts of a prediction, and their test, of any model."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_cli import refused
from torch import Tensor, nn

from datamodules import MIMICIV, SyntheticMIMICIV
from datamodules.contract import STATISTICS, Batch, Grid, Spec
from datamodules.module import ICUDataModule
from ehrmodels import ICUModule, load
from experiments import attribution
from experiments.cli import main


@pytest.fixture(scope="module")
def hourly(mimic: Path) -> ICUDataModule:
    """A task of every hour, whose static features say what has elapsed."""
    data: ICUDataModule = SyntheticMIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=12)
    data.prepare_data()
    data.setup()
    return data


def viewed(data: ICUDataModule, view: Any, rows: np.ndarray, without: np.ndarray | None = None) -> Any:
    data.view, data.summary = view, True
    return data.batch(rows, without=without)


# ---- records without a variable -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["grid", "triplets", "summary"])
def test_a_variable_left_out_leaves_no_trace_and_the_others_stay(view: str, hourly: ICUDataModule) -> None:
    data, rng = hourly, np.random.default_rng(0)
    assert data.spec is not None
    variables = data.spec.variables
    rows = rng.choice(data.rows("train"), 40, replace=False)
    without = rng.random((40, len(variables))) < 0.5
    whole, less = viewed(data, view, rows), viewed(data, view, rows, without)
    out, mask = torch.tensor(without), ~torch.tensor(without)
    number = STATISTICS.index("number")
    assert (whole.summary[..., number][out] > 0).any()
    assert (less.summary[..., number][out] == 0).all()
    rest = [k for k in range(len(STATISTICS)) if k != number]
    assert torch.isnan(less.summary[out][:, rest]).all()
    torch.testing.assert_close(less.summary[mask], whole.summary[mask], rtol=0, atol=0, equal_nan=True)
    if view == "grid":
        rate = torch.tensor(data._views._is_rate)
        for name, empty in (("mask", 0.0), ("since", 1.0), ("value", 0.0)):
            column, before = getattr(less, name).swapaxes(1, 2), getattr(whole, name).swapaxes(1, 2)
            assert (column[out] == empty).all(), name  # a rate that is left out is off, which is 0, too
            torch.testing.assert_close(column[mask], before[mask], rtol=0, atol=0)
        assert (whole.value.swapaxes(1, 2)[out & rate] != 0).any()
    if view == "triplets":
        for i in range(40):
            n, kept = int(less.length[i]), whole.variable[i, : whole.length[i]]
            kept_ = mask[i, kept - 1]
            assert less.variable[i, :n].tolist() == kept[kept_].tolist()
            assert less.value[i, :n].tolist() == whole.value[i, : whole.length[i]][kept_].tolist()
    place = [data.spec.statics.index(f"number of {name}") for name in variables]
    none = (0 - torch.tensor(data.spec.static_center)) / torch.tensor(data.spec.static_scale)
    torch.testing.assert_close(less.static[:, place][out], none[place].expand(40, -1)[out].clamp(-5, 5))
    torch.testing.assert_close(less.static[:, place][mask], whole.static[:, place][mask], rtol=0, atol=0)
    assert whole.row.equal(less.row) and torch.equal(whole.target.nan_to_num(2), less.target.nan_to_num(2))


def test_what_is_not_charted_changes_nothing_when_it_is_left_out(hourly: ICUDataModule) -> None:
    rows = hourly.rows("train")[:200]
    charted = hourly.charted(rows)
    assert charted.any() and not charted.all()
    for view in ("grid", "triplets", "summary"):
        whole, less = viewed(hourly, view, rows), viewed(hourly, view, rows, ~charted)
        for name in whole._fields:
            torch.testing.assert_close(getattr(less, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True)


def test_batches_are_whole_again_afterwards(hourly: ICUDataModule) -> None:
    rows = hourly.rows("train")[:20]
    before = viewed(hourly, "grid", rows)
    viewed(hourly, "grid", rows, np.ones((20, before.value.shape[-1]), bool))
    for a, b in zip(before, viewed(hourly, "grid", rows), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- parts ----------------------------------------------------------------------------------------------------------------


class Linear(ICUModule):
    """Log odds that are a sum over variables: a model whose parts are known. Also one of a user's own."""

    view = "grid"

    def build(self, spec: Spec) -> None:
        self.weight = nn.Parameter(torch.linspace(-1, 1, len(spec.variables)))

    def forward(self, batch: Grid) -> Tensor:  # type: ignore[override]
        return (batch.value[:, -1] * self.weight).sum(-1) + batch.static[:, 0]


def test_parts_of_a_linear_model_are_its_terms(mimic: Path) -> None:
    data: ICUDataModule = MIMICIV(str(mimic), batch_size=7)
    model = Linear()
    data.serve(model)
    data.setup()
    assert data.spec is not None
    model.initialise(data.spec)
    groups = attribution.drawn(data, 20)
    assert sum(map(len, groups)) == 20 and max(map(len, groups)) <= 8
    with torch.inference_mode():
        found = attribution.explained(model.eval(), data, groups, ["importance"])
        whole: Any = data.batch(np.concatenate(groups))
        terms = (whole.value[:, -1] * model.weight).numpy()
        np.testing.assert_allclose(found.parts["importance"], terms, atol=1e-4)
        assert (found.parts["importance"][~found.charted] == 0).all()
        assert found.hourly is None
        table = attribution.per_variable(found, data.spec)
    assert table["importance"].is_sorted(descending=True)
    heart = table.filter(pl.col("variable") == "heart_rate")
    k = data.spec.variables.index("heart_rate")
    assert heart["raises"][0] == pytest.approx(np.maximum(terms[:, k], 0).mean(), abs=1e-4)
    assert heart["lowers"][0] == pytest.approx(np.maximum(-terms[:, k], 0).mean(), abs=1e-4)
    assert heart["importance"][0] == pytest.approx(np.abs(terms[:, k]).mean(), abs=1e-4)


def test_all_samples_are_explained_where_they_are_few(mimic: Path) -> None:
    data: ICUDataModule = MIMICIV(str(mimic), batch_size=16, split="val")
    data.view = "triplets"
    data.setup()
    groups = attribution.drawn(data, attribution.MOST)
    assert sorted(np.concatenate(groups).tolist()) == sorted(data.rows("val").tolist())
    assert [len(g) for g in groups] == [len(b) for b in data.predict_dataloader().sampler]


def test_deletion_takes_the_most_important_of_what_is_there_first() -> None:
    by = np.array([[0.1, 0.9, 0.5, 0.7], [0.3, 0.2, 0.1, 0.0]])
    charted = np.array([[True, False, True, True], [True, True, False, False]])
    for share, first in (
        (0.0, [[], []]),
        (0.4, [[3], [0]]),
        (0.7, [[2, 3], [0]]),
        (1.0, [[0, 2, 3], [0, 1]]),
    ):
        assert [np.flatnonzero(row).tolist() for row in attribution.first(by, charted, share)] == first


# ---- the verb -------------------------------------------------------------------------------------------------------------

FORMS = {
    "Fusion": "--model Fusion --model.width 16",
    "HyMaTE": "--model HyMaTE --model.width 16 --model.layers 1 --model.state 4",
    "LightGBM": "--model LightGBM --model.rounds 20 --model.min_samples 5",
    "GRUD": "--model GRUD --model.width 8 --data.task mortality_24h --data.rolling true --trainer.limit_train_batches 4",
}


@pytest.mark.parametrize("name", FORMS)
def test_any_model_is_explained(
    name: str, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant, few in (("MOST", 24), ("CHECKED", 12), ("UNTRAINED", 1), ("REPEATS", 1), ("REPLICATES", 10)):
        monkeypatch.setattr(attribution, constant, few)
    if name == "LightGBM":
        pytest.importorskip("lightgbm", reason="lightgbm is not installed: pip install -e '.[trees]'")
    data = f"--data SyntheticMIMICIV --data.root {mimic}"
    main(f"train {FORMS[name]} {data} --data.hours 6 --trainer.max_epochs 1 --runs {tmp_path} --name run".split())
    line = f"explain --ckpt {tmp_path / 'run' / 'best.ckpt'} --data.split val --out {tmp_path / 'out'}"
    main(line.split())
    lines = capsys.readouterr().out  # no terminal: what takes long is said in plain words
    spec = load(tmp_path / "run" / "best.ckpt").spec
    assert f"explaining: {len(spec.variables)} variables of " in lines and "deletion test: " in lines
    variables = pl.read_csv(tmp_path / "out" / "attribution.csv")
    assert set(variables["variable"]) <= set(spec.variables)
    assert variables["importance"].is_sorted(descending=True) and variables["importance"][0] > 0
    own = {"HyMaTE": ["gradients", "fusion_weight"], "Fusion": ["gradients", "attention"], "LightGBM": ["shap"]}.get(
        name, ["gradients"]
    )
    assert variables.columns[8:] == own
    checks = pl.read_csv(tmp_path / "out" / "checks.csv")
    assert checks["method"].to_list() == ["importance", *own] and checks["deletion"][0] > 0
    assert "left out" in lines and ("FAILS" in lines) == (not checks["passed"].all())
    if name == "HyMaTE":
        assert variables["fusion_weight"].sum() == pytest.approx(1, abs=1e-3)
    deletion = pl.read_csv(tmp_path / "out" / "deletion.csv")
    whole = deletion.filter(pl.col("share") == 0)
    assert whole["auroc"].n_unique() == 1
    assert whole["change"].max() == 0
    assert deletion.filter(pl.col("share") > 0)["change"].min() > 0
    mean = deletion.filter(pl.col("share") == 0.1).group_by("order").agg(pl.col("change").mean())
    assert dict(mean.iter_rows())["importance"] > dict(mean.iter_rows())["random"]
    assert all((tmp_path / "out" / png).stat().st_size > 10_000 for png in ("cohort.png", "stay.png", "timeline.png"))
    if name == "LightGBM":
        stay = pl.read_parquet(tmp_path / "run" / "predictions.parquet").filter(pl.col("split") == "val")["stay_id"][0]
        main([*line.split(), "--stay", str(stay)])
        assert f"(stay {stay})" in " ".join(capsys.readouterr().out.split())
        assert "stay nobody is not in split 'val'" in refused(f"{line} --stay nobody", capsys)


def test_several_labels_and_values_are_explained(mimic: Path) -> None:
    """Of several labels the mean log odds are, of values the value."""

    class Many(Linear):
        def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
            return torch.stack([super().forward(batch), super().forward(batch) * 3], -1)

    data: ICUDataModule = MIMICIV(str(mimic))
    data.setup()
    assert data.spec is not None
    spec = data.spec._replace(task={**data.spec.task, "kind": "multilabel", "labels": ["a", "b"]})
    one, many = Linear(), Many()
    one.initialise(data.spec)
    many.initialise(spec)
    groups = [data.rows("val")[:5]]
    with torch.inference_mode():
        single, several = (attribution.explained(each.eval(), data, groups, ["importance"]) for each in (one, many))
    np.testing.assert_allclose(several.parts["importance"], 2 * single.parts["importance"], atol=1e-4)
    assert several.probability.shape == (5,)
