"""Models that are fitted at once: beside scikit-learn and their own libraries, through the verbs, and as a teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import lightning
import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression as SklearnRegression

from datamodules.module import MIMICIV, ICUDataModule
from ehrmodels import Fusion, LightGBM, LogisticRegression, RandomForest, XGBoost, load
from ehrmodels.base import ICUModule
from ehrmodels.trees import FittedAtOnce
from experiments import teacher as teaching
from experiments.cli import main
from experiments.resume import Files
from experiments.teacher import CrossFitted, teacher

SMALL = {
    LightGBM: {"rounds": 20, "features": 0.5, "learning_rate": 0.3, "min_samples": 5},
    XGBoost: {"rounds": 20, "features": 0.5, "learning_rate": 0.3, "min_weight": 1.0},
    RandomForest: {"depth": 5, "features": 0.3},
    LogisticRegression: {},
}
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*number of training batches"
)


@pytest.fixture(scope="module")
def data(mimic: Path) -> ICUDataModule:
    data = MIMICIV(str(mimic))
    data.view = "summary"
    data.prepare_data()
    data.setup()
    return data


def rows_of(data: ICUDataModule, split: str) -> tuple[np.ndarray, np.ndarray]:
    batch = data.batch(data.rows(split))  # type: ignore[arg-type]
    return torch.cat([batch.static, batch.summary.flatten(1)], 1).numpy(), batch.target.numpy()


@pytest.fixture(params=SMALL, ids=lambda kind: kind.__name__)
def fitted(request: pytest.FixtureRequest, data: ICUDataModule) -> FittedAtOnce:
    model = request.param(**SMALL[request.param])
    model.initialise(data.spec)
    model.fitted = model.fit_rows(rows_of(data, "train"))
    return model.eval()


def test_log_odds_are_those_of_the_library(data: ICUDataModule) -> None:
    features, target = rows_of(data, "train")
    model = LightGBM(**SMALL[LightGBM])
    model.initialise(data.spec)  # type: ignore[arg-type]
    model.fitted = model.fit_rows((features, target))
    booster = lightgbm.Booster(model_str=model.fitted)
    probability = model.predict_step(data.batch(data.rows("val")), 0)[1]  # type: ignore[arg-type]
    np.testing.assert_allclose(probability, booster.predict(rows_of(data, "val")[0]), rtol=1e-5)
    assert booster.num_feature() == len(data.spec.statics) + 16 * len(data.spec.variables)  # type: ignore[union-attr]


def test_an_interrupted_epoch_begins_anew(mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was gathered is in no checkpoint, and a fit to the rest of the training split would pass for one to all of it."""
    saved: list[dict[str, Any]] = []
    save = Files.save_checkpoint

    def record(self: Files, checkpoint: dict[str, Any], *rest: Any, **more: Any) -> None:
        saved.append(checkpoint["callbacks"]["_Epochs"])
        save(self, checkpoint, *rest, **more)

    monkeypatch.setattr(Files, "save_checkpoint", record)
    monkeypatch.chdir(tmp_path)
    line = f"train --model LightGBM --model.rounds 5 --data MIMICIV --data.root {mimic} --data.batch_size 8 --checkpoint_minutes 0"
    main(line.split())
    assert saved
    assert all(state["within"] is None and len(state["rows"]) == 1 for state in saved)


def test_regression_is_that_of_scikit_learn(data: ICUDataModule) -> None:
    features, target = rows_of(data, "train")
    model = LogisticRegression(l2=0.01)
    model.initialise(data.spec)  # type: ignore[arg-type]
    model.fit_rows((features, target))
    inputs = model._inputs(torch.from_numpy(features)).numpy()
    other = SklearnRegression(C=1 / (0.01 * len(target)), tol=1e-8, max_iter=5000).fit(inputs, target)
    np.testing.assert_allclose(model.output(features), other.decision_function(inputs), atol=0.02)


def test_separates_what_it_was_fitted_to_and_survives_its_file(
    fitted: FittedAtOnce, data: ICUDataModule, tmp_path: Path
) -> None:
    batch = data.batch(data.rows("train"))  # type: ignore[arg-type]
    logit = fitted(batch)
    assert logit[batch.target == 1].mean() > logit[batch.target == 0].mean() + 0.2
    other = type(fitted)(**SMALL[type(fitted)])
    other.initialise(fitted.spec)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(batch), logit)


@quiet
def test_a_plain_trainer_fits_and_its_checkpoint_reloads(fitted: FittedAtOnce, mimic: Path, tmp_path: Path) -> None:
    model = type(fitted)(**SMALL[type(fitted)])
    data = MIMICIV(str(mimic))
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    trainer.fit(model, data)
    assert trainer.current_epoch == 1  # one pass is all
    (scores,) = trainer.validate(model, data, verbose=False)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    again = load(path)
    batch = data.batch(data.rows("val"))
    assert torch.equal(again(batch), model.eval()(batch))
    assert 0 <= scores["val_auroc"] <= 1


def test_verbs(mimic: Path, eicu: Path, tmp_path: Path) -> None:
    line = f"train --model LightGBM --model.rounds 15 --model.folds 3 --monitor cv_auroc_auprc --data MIMICIV --data.root {mimic}"
    main([*line.split(), *f"--runs {tmp_path} --name run --finetune EICU --finetune.root {eicu}".split()])
    folder = tmp_path / "run"
    row = pl.read_csv(folder / "metrics.csv").row(0, named=True)
    assert row["cv_auroc_auprc"] == pytest.approx(row["cv_auroc"] + row["cv_auprc"])
    ckpt = folder / "best.ckpt"
    main(f"evaluate --ckpt {ckpt} --out {tmp_path / 'scores'}".split())
    before = json.loads((folder / "metrics.json").read_text())["test"]["auroc"]
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["auroc"] == before
    source, tuned = (load(p / "best.ckpt").fitted for p in (folder, folder / "finetune-EICU"))
    counts = [lightgbm.Booster(model_str=text).num_trees() for text in (source, tuned)]
    assert counts == [15, 30]  # fine-tuning goes on from the source's trees


def test_several_labels_and_processes_are_refused(
    data: ICUDataModule, refused: Callable[[str], str], mimic: Path
) -> None:
    spec = data.spec._replace(task={**data.spec.task, "kind": "multilabel", "labels": ["a", "b"]})  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="LightGBM predicts one label"):
        LightGBM().initialise(spec)
    assert "--model.folds must be 0 or at least 2" in refused(
        f"train --model LightGBM --model.folds 1 --data MIMICIV --data.root {mimic}"
    )


# ---- teacher ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(data: ICUDataModule) -> CrossFitted:
    return teacher("lightgbm", data)


def test_nobody_is_labelled_by_trees_that_saw_them(
    taught: CrossFitted, data: ICUDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each model was fitted to, and what it labels, have no patient in common; rows of other splits are refused."""
    fits: list[np.ndarray] = []
    features, _ = rows_of(data, "train")
    rows = data.rows("train")

    def seen(self: LightGBM, given: tuple[np.ndarray, np.ndarray]) -> str:
        same = (features[:, None, :20] == given[0][None, :, :20]) | np.isnan(features[:, None, :20])
        fits.append(np.flatnonzero(same.all(-1).any(1)))
        return ""

    monkeypatch.setattr(LightGBM, "fit_rows", seen)
    monkeypatch.setattr(teaching, "FOLDS", 4)  # not in the cache
    again = teacher("lightgbm", data)
    patients = data.samples["patient_id"].gather(rows)
    assert len(fits) == 4
    for k, fit in enumerate(fits):
        labelled = np.flatnonzero(again.part[rows] == k)
        assert len(labelled) > 10
        assert not set(patients.gather(fit)) & set(patients.gather(labelled))
        assert len(fit) + len(labelled) == len(rows)
    batch = data.batch(data.rows("val"))
    with pytest.raises(AssertionError, match="training split only"):
        taught.mixed(batch.target.numpy(), batch.row.numpy(), batch.static.numpy(), batch.summary.numpy())


def test_targets_are_mixed_in_training_only(taught: CrossFitted, data: ICUDataModule) -> None:
    rows = data.rows("train")[:40]
    plain = data.batch(rows)
    data.teacher = taught
    try:
        untouched, mixed = data.batch(rows), data.batch(rows, 0)
        data.view = "grid"
        of_grid = data.batch(rows, 0)
    finally:
        data.view, data.teacher = "summary", None
    assert untouched.target.equal(plain.target)
    assert of_grid.target.equal(mixed.target)
    assert of_grid.summary.shape[1] == 0  # the teacher reads it, the model does not
    soft = (mixed.target - (1 - teaching.SHARE) * plain.target) / teaching.SHARE
    assert ((soft > 0) & (soft < 1)).all()
    part = taught.part[rows]
    for k, trees in enumerate(taught.trees):
        features = torch.cat([plain.static, plain.summary.flatten(1)], 1).numpy()[part == k]
        np.testing.assert_allclose(soft[part == k], 1 / (1 + np.exp(-trees.output(features))), atol=1e-5)
    assert not any(t.fitted == taught.trees[0].fitted for t in taught.trees[1:])


def test_a_teacher_is_kept_and_read_again(
    taught: CrossFitted, data: ICUDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LightGBM, "fit_rows", lambda *_: pytest.fail("fitted again"))
    again = teacher("lightgbm", data)
    assert [t.fitted for t in again.trees] == [t.fitted for t in taught.trees]


def test_train_with_a_teacher(mimic: Path, tmp_path: Path, refused: Callable[[str], str]) -> None:
    small = f"--data MIMICIV --data.root {mimic} --runs {tmp_path} --trainer.max_epochs 1"
    main(f"train --model LightGBM --model.rounds 5 {small} --name trees".split())
    network = f"train --model TabM --model.width 16 --model.members 2 {small} --data.thinning 0.2"
    main(f"{network} --teacher {tmp_path / 'trees'} --name taught".split())
    assert "teacher: " in (tmp_path / "taught" / "config.yaml").read_text()
    assert json.loads((tmp_path / "taught" / "metrics.json").read_text())["val"]["n"] > 0
    assert "expected lightgbm, or a run of LightGBM" in refused(
        f"{network} --teacher {tmp_path / 'taught'} --name other"
    )
    assert "--teacher is for networks" in refused(f"train --model LightGBM {small} --teacher lightgbm --name third")
    assert not (tmp_path / "other").exists()


# ---- moving average, members --------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("average", [0.0, 0.5])
def test_the_average_of_weights_is_what_is_kept(average: float, mimic: Path, tmp_path: Path) -> None:
    """By a running average beside the optimiser: decay min(average, (1 + n) / (10 + n)) after n updates, the first a copy."""
    torch.manual_seed(0)
    model: ICUModule = Fusion(width=16, members=2, average=average)
    steps: list[dict[str, torch.Tensor]] = []

    class Watch(lightning.Callback):
        def on_before_zero_grad(self, *_: object) -> None:
            steps.append({n: p.detach().clone() for n, p in model.named_parameters()})

    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, MIMICIV(str(mimic)))
    steps = [*steps[1:], {n: p.detach().clone() for n, p in model.named_parameters()}]  # each after its step
    if not average:
        return
    mean = dict(steps[0])
    for n, weights in enumerate(steps[1:-1], start=1):
        decay = min(average, (1 + n) / (10 + n))
        mean = {name: m + (1 - decay) * (weights[name] - m) for name, m in mean.items()}
    name = "head.weight"
    assert not torch.equal(mean[name], steps[-2][name])
    assert torch.isfinite(load_of(trainer, tmp_path)(next(iter(trainer.datamodule.val_dataloader())))).all()


def load_of(trainer: lightning.Trainer, folder: Path) -> ICUModule:
    trainer.save_checkpoint(folder / "model.ckpt")
    return load(folder / "model.ckpt")


def test_members_average_probabilities(data: ICUDataModule) -> None:
    from ehrmodels import TabM

    torch.manual_seed(0)
    model = TabM(width=16, members=5)
    model.initialise(data.spec)  # type: ignore[arg-type]
    batch = data.batch(data.rows("val"))
    model.eval()
    one = model(batch).sigmoid()
    model.head.training = True
    many = model(batch).sigmoid()
    assert many.shape == (*one.shape, 5)
    torch.testing.assert_close(one, many.mean(-1))
