"""Strategies of transfer: which weights each one trains, on whose patients, and that zero-shot fits nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from test_benchmark import in_this_process

from datamodules import scaler
from datamodules.contract import joined
from datamodules.module import EICU, MIMICIV, ICUDataModule
from ehrmodels import Fusion, LightGBM, load
from ehrmodels.alignment import Alignment, coral, mmd
from ehrmodels.checkpoint import read
from experiments.cli import main
from experiments.curve import advice, tabulated
from experiments.strategies import STRATEGIES, Transfer

SMALL = "--model Fusion --model.width 16 --model.summary false --model.members 2"


def made(data: ICUDataModule, view: Any = "grid", **options: Any) -> ICUDataModule:
    data.view, data.summary = view, True
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def pair(mimic: Path, eicu: Path) -> tuple[ICUDataModule, ICUDataModule]:
    """Target and source with one scaler, that of the source."""
    source = made(MIMICIV(str(mimic)))
    target = EICU(str(eicu))
    target.adopt(source.spec)  # type: ignore[arg-type]
    return made(target), source


# ---- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["grid", "triplets", "summary"])
def test_joined_batches_hold_what_each_held(view: Any, pair: tuple[ICUDataModule, ICUDataModule]) -> None:
    target, source = pair
    target.view = view
    target.join(source)
    rows, others = target.rows("train")[:5], source.rows("train")[:7]
    both = target.batch(np.concatenate([rows, others + len(target.samples)]), 0)
    assert both.row.tolist() == [*rows, *(others + len(target.samples))]
    parts = [target.batch(rows, 0), source.batch(others, 0)]
    for name, whole, one, other in zip(both._fields, both, *parts, strict=True):
        if name == "row":
            continue
        for part, place in ((one, slice(0, 5)), (other, slice(5, 12))):
            cut = whole[place][:, : part.shape[1]] if part.ndim > 1 else whole[place]
            np.testing.assert_array_equal(cut, part, name)
    assert joined([parts[0]]).target.equal(parts[0].target)


@pytest.mark.parametrize("view", ["grid", "triplets"])
def test_an_epoch_takes_all_of_both(view: Any, pair: tuple[ICUDataModule, ICUDataModule]) -> None:
    target, source = pair
    target.view = view
    target.join(source)
    rows = np.concatenate([batch.row.numpy() for batch in target.train_dataloader()])
    own, count = np.unique(rows[rows < len(target.samples)], return_counts=True)
    assert own.tolist() == target.rows("train").tolist()
    assert set(count) == {1}
    assert sorted(rows[rows >= len(target.samples)] - len(target.samples)) == source.rows("train").tolist()
    for loader, split in ((target.val_dataloader(), "val"), (target.test_dataloader(), "test")):
        assert sorted(np.concatenate([b.row.numpy() for b in loader])) == target.rows(split).tolist()  # type: ignore[arg-type]


def test_systems_with_scalers_of_their_own_are_not_joined(mimic: Path, eicu: Path) -> None:
    with pytest.raises(ValueError, match="their variables or scalers differ"):
        made(EICU(str(eicu))).join(made(MIMICIV(str(mimic))))


def test_a_limit_leaves_some_patients_of_training_and_all_of_test(eicu: Path) -> None:
    data = made(EICU(str(eicu)))
    whole = {split: data.rows(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    patient = data.samples["patient_id"].to_numpy()
    assert not data.limit(120)  # of 300 simulated stays too few die
    few = {split: data.rows(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert few["test"].tolist() == whole["test"].tolist()
    assert len(set(patient[np.union1d(few["train"], few["val"])])) == 120
    assert few["train"].tolist() == few["val"].tolist()
    data.limit(60)
    assert set(data.rows("train")) < set(few["train"])  # fewer are some of more, so that a curve has one draw
    data.limit(60, draw=1)
    assert not set(data.rows("train")) <= set(few["train"])
    with pytest.raises(ValueError, match="9,999 patients were asked for, but"):
        data.limit(9999)


# ---- distances ------------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(9, 4)), rng.normal(1.0, 2.0, size=(7, 4))
    expected = np.square(np.cov(one.T) - np.cov(other.T)).sum() / (4 * 16)
    a, b = torch.from_numpy(one), torch.from_numpy(other)
    assert float(coral(a, b)) == pytest.approx(expected)
    both = np.concatenate([one, other])
    distance = [[float(((x - y) ** 2).sum()) for y in both] for x in both]
    median = np.sort([distance[i][j] for i in range(16) for j in range(16) if i != j])[(16 * 15 - 1) // 2]
    sign = [1 / 9] * 9 + [-1 / 7] * 7
    expected = np.mean([
        sum(sign[i] * sign[j] * np.exp(-distance[i][j] / (w * median)) for i in range(16) for j in range(16))
        for w in (0.25, 0.5, 1.0, 2.0, 4.0)
    ])  # fmt: skip
    assert float(mmd(a, b)) == pytest.approx(expected)
    for measure in (coral, mmd):
        assert float(measure(a, a)) == pytest.approx(0, abs=1e-12)
        assert float(measure(a, b)) > 0.01


def test_an_alignment_draws_what_the_head_reads_together(pair: tuple[ICUDataModule, ICUDataModule]) -> None:
    target, source = pair
    target.join(source)
    model = Fusion(width=16, members=2, dropout=0.0)
    model.initialise(target.spec, 1.0)  # type: ignore[arg-type]
    model.penalty = Alignment(model, mmd, 10.0, len(target.samples))
    rows = np.concatenate([target.rows("train")[:40], source.rows("train")[:40] + len(target.samples)])
    batch = target.batch(rows)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    distances = []
    for _ in range(15):
        model(batch)
        penalty = model.penalty(batch)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        distances.append(float(penalty.detach()))
    assert distances[-1] < 0.7 * distances[0]
    assert float(model.penalty(batch._replace(row=batch.row * 0)).detach()) == 0  # one system alone


# ---- strategies -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("source")
    main(
        f"train {SMALL} --data SyntheticMIMICIV --data.root {mimic} --trainer.max_epochs 2 --name s --runs {runs}".split()
    )
    return runs / "s" / "best.ckpt"


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "zero_shot"])
def test_each_strategy_trains_its_weights(strategy: Any, source: Path, eicu: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(
        f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu} --epochs 1 --out {out} "
        f"--transfer.strategy {strategy}".split()
    )
    before, after = (read(path)["state_dict"] for path in (source, out / "best.ckpt"))
    changed = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    model = load(out / "best.ckpt")
    weights = {name for name, _ in model.named_parameters()}
    if strategy == "head":
        assert {name.partition(".")[0] for name in changed} == {"head"}
    elif strategy == "adapter":
        assert changed & weights
        assert all(name.startswith("head.") or name in model.exempt for name in changed)
    else:
        assert {"head", "lstm", "transformer"} <= {name.partition(".")[0] for name in changed}
    spec = load(source).spec
    assert (model.spec.center == spec.center) == (strategy != "target_only")
    table = pl.read_parquet(out / "zero_shot.parquet")
    assert set(table["split"]) == {"test"}


def test_zero_shot_and_fine_tuning_fit_no_statistic_of_the_target(
    source: Path, eicu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaler, "fit", lambda *_: pytest.fail("a scaler was fitted"))
    line = f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu} --epochs 1"
    main(f"{line} --transfer.strategy zero_shot --out {tmp_path / 'zero'}".split())
    assert not list((tmp_path / "zero").glob("*.ckpt"))
    main(f"{line} --out {tmp_path / 'tuned'}".split())


def test_all_are_the_strategies_that_the_model_can_do() -> None:
    runs = Transfer("all", "100,all", weight=2.0).runs(Fusion)
    assert [run.strategy for run in runs] == ["zero_shot", *2 * STRATEGIES[1:]]
    assert {run.strategy for run in runs if run.weight == 2.0} == {"coral", "mmd"}
    assert {run.strategy for run in Transfer("all").runs(LightGBM)} == {
        "zero_shot",
        "finetune",
        "pooled",
        "target_only",
    }


def test_what_a_model_cannot_do_is_refused(
    source: Path, mimic: Path, eicu: Path, tmp_path: Path, refused: Callable[[str], str]
) -> None:
    with pytest.raises(
        ValueError, match="head is for networks, and LightGBM is fitted at once: choose among zero_shot"
    ):
        Transfer("head").runs(LightGBM)
    line = f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu} --out {tmp_path / 'out'}"
    assert "--transfer.sizes must be numbers of at least 2, or all, found 1" in refused(f"{line} --transfer.sizes 1")
    assert "--transfer.strategy magic is not known" in refused(f"{line} --transfer.strategy magic")
    assert "score the others, --data.split test, not val" in refused(f"{line} --transfer.sizes 100 --data.split val")
    assert "zero_shot trains on nobody" in refused(f"{line} --transfer.strategy zero_shot --transfer.sizes 100")
    assert "--transfer.weight is of coral and mmd" in refused(f"{line} --transfer.weight 2")
    assert "--transfer.draw 1,1 names one twice" in refused(f"{line} --transfer.draw 1,1")
    assert "9,999 patients were asked for" in refused(f"{line} --transfer.sizes 9999")
    assert "has 196 patients in train and val" in refused(f"{line} --transfer.sizes 100,9999")
    assert "leave --trainer.devices out" in refused(f"{line} --transfer.strategy all --trainer.devices 2")
    assert not (tmp_path / "out").exists()


# ---- several runs ---------------------------------------------------------------------------------------------------------


def test_several_are_a_queue_that_ends_in_one_table(
    source: Path, eicu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = (
        f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu} --epochs 1 --out {out} "
        "--transfer.strategy finetune,target_only --transfer.sizes all,60 --transfer.draw 0,1 --transfer.workers 1"
    )
    main(line.split())
    names = {"zero_shot", *(f"{s}-{n}" for s in ("finetune", "target_only") for n in ("60-0", "60-1", "all-1"))}
    names |= {"finetune", "target_only"}
    assert {path.parent.name for path in out.glob("*/metrics.json")} == names
    table = pl.read_csv(out / "transfer.csv")
    everyone = table["everyone"][0]
    assert table.select("strategy", "patients", "draws").rows() == [
        ("zero_shot", 0, 1), *((s, n, 2) for n in (60, everyone) for s in ("finetune", "target_only"))
    ]  # fmt: skip
    row = table.row(by_predicate=(pl.col("strategy") == "finetune") & (pl.col("patients") == 60), named=True)
    scores = [json.loads((out / f"finetune-60-{d}" / "metrics.json").read_text())["test"] for d in (0, 1)]
    assert row["auroc"] == pytest.approx(np.mean([s["auroc"]["value"] for s in scores]))
    assert row["auroc_less_zero_shot"] == pytest.approx(row["auroc"] - table["auroc"][0])
    threshold = load(source).threshold
    assert (
        scores[0]["threshold"] == threshold and scores[0]["operating_point"] == "youden of the source"
    )  # too few to choose
    assert pl.read_csv(out / "finetune-60-0" / "epochs.csv")["epochs"].to_list() == [0, 1]
    printed = capsys.readouterr().out
    assert "with 60 patients use " in printed and "target_only" in printed
    assert (out / "transfer.png").stat().st_size > 10_000
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/best.ckpt")}
    main(line.split())  # nothing is left to do
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/best.ckpt")}


def test_advice_says_where_curves_cross_and_does_not_call_better_what_is_not_clear() -> None:
    rng = np.random.default_rng(0)

    def drawn(auroc: float, spread: float = 0.001) -> np.ndarray:
        return np.array([[[auroc, 0.1], *([auroc + d, 0.1] for d in rng.normal(0, spread, 200))]])

    table = tabulated(
        {
            ("zero_shot", 0): drawn(0.80),
            ("finetune", 100): drawn(0.81, 0.05),
            ("target_only", 100): drawn(0.70),
            ("finetune", 1000): drawn(0.84),
            ("target_only", 1000): drawn(0.82),
        },
        ["auroc", "auprc"],
    )
    assert advice(table) == [
        "with 100 patients use finetune: AUROC 0.810, AUPRC 0.100; AUROC not clearly apart from zero_shot (+0.010), "
        "above target_only (+0.110)",
        "with 1,000 patients use finetune: AUROC 0.840, AUPRC 0.100; AUROC above zero_shot (+0.040), above target_only (+0.020)",
        "target_only passes zero_shot between 100 and 1,000 patients",
    ]


def test_few_patients_are_left_out_in_turn_and_training_ends_where_their_loss_is_least(
    source: Path, eicu: Path, tmp_path: Path
) -> None:
    data = EICU(str(eicu))
    data.adopt(load(source).spec)
    made(data)
    assert not data.limit(90)
    both, patient = data.rows("train"), data.samples["patient_id"].to_numpy()
    target = data.targets("train")
    parts = []
    for part in range(3):
        data.leave_out(part)
        train, val = data.rows("train"), data.rows("val")
        assert not set(patient[train]) & set(patient[val])
        assert sorted([*train, *val]) == both.tolist()
        parts.append(val)
        events = len(set(patient[both[target == 1]]))
        assert len(set(patient[val[data.targets("val") == 1]])) in (events // 3, -(-events // 3))
    assert sorted(np.concatenate(parts)) == both.tolist()
    data.leave_out(None)
    assert data.rows("train").tolist() == data.rows("val").tolist() == both.tolist()

    line = f"finetune --ckpt {source} --data SyntheticEICU --data.root {eicu} --epochs 3 --transfer.sizes 90"
    harm, help = tmp_path / "harm", tmp_path / "help"
    main(f"{line} --learning_rate 1 --out {harm}".split())  # with which training can only harm
    assert (harm / "epochs.csv").exists() and not (harm / "metrics.csv").exists()
    before, after = (read(path)["state_dict"] for path in (source, harm / "best.ckpt"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    table, zero = (pl.read_parquet(harm / f"{name}.parquet") for name in ("predictions", "zero_shot"))
    assert table.sort("stay_id", "minute")["probability"].to_list() == zero["probability"].to_list()
    main(f"{line} --learning_rate 0.001 --out {help}".split())
    curve = pl.read_csv(help / "epochs.csv")
    assert curve["epochs"].to_list() == [0, 1, 2, 3]
    assert not list(help.glob("left-out-*"))
    losses = curve.drop("epochs").to_numpy()
    gains = {e: losses[0] - losses[e] for e in (1, 2, 3)}
    better = [e for e, gain in gains.items() if gain.mean() > np.std(gain, ddof=1) / 3**0.5]
    best = min(better, key=lambda e: losses[e].mean(), default=0)
    trained = len(pl.read_csv(help / "metrics.csv")) if best else 0
    assert trained == best


def test_what_a_queue_is_begun_with_and_a_run_records_are_the_options_of_the_model(
    mimic: Path, eicu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    line = (
        f"train --model LightGBM --model.rounds 10 --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --name"
    )
    options = "--data.treatment false --data.statics age,sex --data.hours 12"
    main(f"{line} less {options} --finetune SyntheticEICU --finetune.root {eicu}".split())
    for place in ("config.yaml", "finetune-SyntheticEICU/config.yaml"):
        config = yaml.safe_load((tmp_path / "less" / place).read_text())
        for part in ("data", "finetune") if place == "config.yaml" else ("data",):
            arguments = config[part]["init_args"]
            assert (arguments["treatment"], arguments["statics"], arguments["hours"]) == (False, ["age", "sex"], 12)
    queue = f"finetune --ckpt {tmp_path / 'less' / 'best.ckpt'} --data SyntheticEICU --data.root {eicu} --out {tmp_path / 'queue'}"
    main(f"{queue} --transfer.strategy finetune,target_only --transfer.workers 1".split())
    assert len(pl.read_csv(tmp_path / "queue" / "transfer.csv")) == 3
