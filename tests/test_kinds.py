"""Kinds of task: loss, prediction and metrics on made-up batches, and operating points beside a plain loop."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from test_models import batch, spec
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional import mean_absolute_error
from torchmetrics.functional.classification import binary_auroc, multilabel_auroc

from datamodules.contract import Spec
from ehrmodels import Fusion, HyMaTE, ICUModule
from ehrmodels.kinds import KINDS, threshold

LABELS = ["renal", "cardiac", "liver"]


def of_kind(kind: str) -> Spec:
    facts = spec(6, 8, 3)
    more: dict[str, Any] = {"kind": kind} | ({"labels": LABELS} if kind == "multilabel" else {})
    return facts._replace(task={**facts.task, **more})


def targets(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "regression":
        return torch.rand(count, generator=generator) * 10
    shape = (count, len(LABELS)) if kind == "multilabel" else (count,)
    return (torch.rand(shape, generator=generator) < 0.4).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [lambda: Fusion(width=8), lambda: HyMaTE(width=8, layers=1, state=4, heads=2)], ids=["fusion", "hymate"]
)
@pytest.mark.filterwarnings("ignore")
def test_loss_prediction_and_metrics_of_a_kind(kind: str, make: Any) -> None:
    model: ICUModule = make()
    model.initialise(of_kind(kind), 2.5 if KINDS[kind].classes else 1.0)
    model.eval()
    samples = batch(model, 20)._replace(target=targets(kind, 20))
    output, target = model(samples).detach(), samples.target
    assert output.shape == target.shape
    loss, _, _ = model._loss(samples)
    p = torch.sigmoid(output)
    weight = 2.5 if KINDS[kind].classes else 1.0
    expected = (
        ((output - target) ** 2).mean()
        if kind == "regression"
        else -(weight * target * p.log() + (1 - target) * (1 - p).log()).mean()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    row, predicted = model.predict_step(samples, 0)
    assert predicted.shape == target.shape and row.tolist() == list(range(20))
    wanted = output.double() if kind == "regression" else torch.sigmoid(output.double() - math.log(weight))
    torch.testing.assert_close(predicted, wanted)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    (logged,) = trainer.validate(model, DataLoader([samples], batch_size=None), verbose=False)
    assert set(logged) >= {f"val_{name}" for name in KINDS[kind].metrics} | {"val_loss"}
    if kind == "regression":
        assert logged["val_mae"] == pytest.approx(mean_absolute_error(output, target).item(), rel=1e-5)
    elif kind == "multilabel":
        assert logged["val_auroc"] == pytest.approx(
            multilabel_auroc(output, target.long(), len(LABELS)).item(), rel=1e-5
        )
    else:
        assert logged["val_auroc"] == pytest.approx(binary_auroc(output, target.long()).item(), rel=1e-5)
        assert model.threshold is not None


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="a task of kind 'ranking' is not known"):
        Fusion(width=8).initialise(of_kind("ranking"))


def plain(probability: list[float], target: list[int], name: str, wanted: float) -> float | None:
    """Tries every probability as the threshold, the largest first."""
    best, chosen = -math.inf, None
    for value in sorted(set(probability), reverse=True):
        alert = [p >= value for p in probability]
        hit = sum(a and t for a, t in zip(alert, target, strict=True))
        spared = sum(not a and not t for a, t in zip(alert, target, strict=True))
        silent = sum(not a for a in alert)
        sensitivity, specificity = hit / sum(target), spared / (len(target) - sum(target))
        if name == "youden":
            if sensitivity + specificity > best + 1e-12:
                best, chosen = sensitivity + specificity, value
        elif (sensitivity if name == "sensitivity" else spared / silent if silent else math.nan) >= wanted:
            return value
    return chosen


@pytest.mark.parametrize(
    ("name", "wanted"), [("youden", 0), ("sensitivity", 0.9), ("sensitivity", 0.5), ("npv", 0.7), ("npv", 0.95)]
)
@pytest.mark.parametrize("seed", range(6))
def test_operating_points_beside_every_threshold(name: str, wanted: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = (torch.rand(40, generator=generator, dtype=torch.float64) * 12).round() / 12  # with ties
    target = (torch.rand(40, generator=generator, dtype=torch.float64) < 0.2 + 0.5 * probability).double()
    text = name if name == "youden" else f"{name}={wanted}"
    assert threshold(probability, target, text) == plain(probability.tolist(), target.int().tolist(), name, wanted)


def test_where_there_is_no_threshold() -> None:
    probability = torch.tensor([0.2, 0.4])
    assert threshold(probability, torch.zeros(2)) is None
    assert threshold(torch.tensor([0.1, 0.9]), torch.tensor([1.0, 0.0]), "npv=0.9") is None
    with pytest.raises(ValueError, match="1 of 2 probabilities are no number"):
        threshold(torch.tensor([0.2, math.nan]), torch.tensor([0.0, 1.0]))
    for text in ("foo", "npv", "npv=2", "sensitivity=x", "youden=1", "utility=", "utility=1"):
        with pytest.raises(ValueError, match=f"--operating_point {text} is not known"):
            threshold(probability, torch.tensor([0.0, 1.0]), text)


def test_the_operating_point_of_train_is_kept(mimic: Path, tmp_path: Path) -> None:
    from ehrmodels.checkpoint import read
    from experiments.cli import main

    main(
        f"train --model Fusion --model.width 8 --data SyntheticMIMICIV --data.root {mimic} --trainer.max_epochs 1 --runs {tmp_path} "
        "--name a --operating_point sensitivity=0.9".split()
    )
    import json

    result = json.loads((tmp_path / "a" / "metrics.json").read_text())["val"]
    assert result["sensitivity"]["value"] >= 0.9
    for name in ("best.ckpt", "last.ckpt"):
        assert read(tmp_path / "a" / name)["ehr"]["operating_point"] == "sensitivity=0.9"
