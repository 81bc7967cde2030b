"""HyMaTE: what its output may not depend on, long stays, attribution, forecasting and training from it."""

import csv
import gzip
import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_cli import refused
from test_models import spec
from torch import Tensor

import ehrmodels.hymate as hymate
from datamodules import MIMICIV, PhysioNet2012
from datamodules.contract import Spec, Triplets
from datamodules.dictionary import NAMES
from datamodules.sampler import Batches
from ehrmodels.checkpoint import load, read
from ehrmodels.hymate import HyMaTE, HyMaTEForecast, chosen, forecast_task
from experiments.cli import main
from experiments.files import save

ATTENTION = ("token", "variable", "channel")
SMALL = {"width": 16, "layers": 2, "state": 4, "heads": 2}


def make(attention: str = "token", kind: type[HyMaTE] = HyMaTE, facts: Spec | None = None, **arguments: Any) -> HyMaTE:
    torch.manual_seed(0)
    model = kind(**{**SMALL, "attention": attention, **arguments})
    model.initialise(facts or spec(6, 48, 3), 2.0)
    return model.eval()


def triplets(lengths: list[int], variables: int = 6, statics: int = 3, seed: int = 0) -> Triplets:
    rng = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(*lengths, 1))
    length = torch.tensor(lengths)
    real = torch.arange(shape[1]) < length[:, None]
    time = (torch.rand(shape, generator=rng) * 2 - 1).sort(1).values * real
    variable = torch.randint(1, variables + 1, shape, generator=rng) * real
    value, static = torch.randn(shape, generator=rng) * real, torch.randn(len(lengths), statics, generator=rng)
    summary = torch.randn(len(lengths), variables, 16, generator=rng)
    return Triplets(
        static, summary, time, variable, value, length, torch.zeros(len(lengths)), torch.arange(len(lengths))
    )


def padded(batch: Triplets, more: int, garbage: bool = False) -> Triplets:
    """The batch with further places on the right; ``garbage`` fills everything beyond a sample's length."""

    def wider(t: Tensor, fill: float) -> Tensor:
        t = torch.nn.functional.pad(t, (0, more))
        beyond = torch.arange(t.shape[1]) >= batch.length[:, None]
        return t.masked_fill(beyond, fill) if garbage else t

    return batch._replace(
        time=wider(batch.time, 0.7), variable=wider(batch.variable, 2), value=wider(batch.value, -4.0)
    )


# ---- traps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("garbage", [False, True])
def test_padding_changes_nothing(attention: str, garbage: bool) -> None:
    model, batch = make(attention), triplets([9, 40, 1, 23])
    torch.testing.assert_close(model(padded(batch, 50, garbage)), model(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_gradient_comes_from_padding(attention: str) -> None:
    model, batch = make(attention), padded(triplets([9, 20, 0]), 7)
    batch.value.requires_grad_()
    model(batch).sum().backward()
    assert batch.value.grad is not None
    beyond = torch.arange(batch.value.shape[1]) >= batch.length[:, None]
    assert (batch.value.grad[beyond] == 0).all()
    within = ~beyond & (batch.value.abs() < 2)  # beyond the outermost quantiles a value says no more
    assert (batch.value.grad[within] != 0).all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_observations_left_out_leave_no_trace(attention: str) -> None:
    """Their values reach the output neither through the state nor through the pooling: it is as if they had never been charted."""
    model, batch = make(attention), triplets([30, 12])
    keep = torch.rand(batch.time.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    other = batch._replace(value=torch.where(keep, batch.value, 5.0), time=torch.where(keep, batch.time, 0.1))
    torch.testing.assert_close(model(chosen(batch, keep)), model(chosen(other, keep)), rtol=0, atol=0)
    for i in range(2):
        mine = keep[i] & (torch.arange(30) < batch.length[i])
        alone = Triplets(
            batch.static[i : i + 1],
            batch.summary[i : i + 1],
            *(t[i : i + 1, mine] for t in (batch.time, batch.variable, batch.value)),
            mine.sum()[None],
            *batch[6:],
        )
        torch.testing.assert_close(model(alone)[0], model(chosen(batch, keep))[i], rtol=1e-5, atol=1e-5)


def test_chosen_table() -> None:
    batch = Triplets(
        torch.zeros(3, 1),
        torch.zeros(3, 0, 16),
        torch.tensor([[-1.0, -0.5, 0.0, 0.5], [-0.9, -0.2, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]]),
        torch.tensor([[3, 1, 2, 3], [2, 5, 0, 0], [4, 0, 0, 0]]),
        torch.tensor([[10.0, 11.0, 12.0, 13.0], [20.0, 21.0, 0.0, 0.0], [30.0, 0.0, 0.0, 0.0]]),
        torch.tensor([4, 2, 1]),
        torch.zeros(3),
        torch.arange(3),
    )
    left = chosen(
        batch, torch.tensor([[True, False, True, True], [False, True, True, True], [False, True, False, False]])
    )
    assert left.length.tolist() == [3, 1, 0]
    assert left.value.tolist() == [[10, 12, 13], [21, 0, 0], [0, 0, 0]]
    assert left.variable.tolist() == [[3, 2, 3], [5, 0, 0], [0, 0, 0]]
    assert left.time.tolist() == [[-1, 0, 0.5], [pytest.approx(-0.2), 0, 0], [0, 0, 0]]
    nothing = chosen(batch, torch.zeros(3, 4, dtype=torch.bool))
    assert nothing.length.tolist() == [0, 0, 0]
    assert nothing.time.shape == (3, 1)


def test_order_of_rows_in_the_raw_tables_does_not_matter(mimic: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "shuffled"
    for path in mimic.rglob("*.csv.gz"):
        with gzip.open(path, "rt", newline="") as file:
            header, *rows = list(csv.reader(file))
        random.Random(0).shuffle(rows)
        (shuffled / path.relative_to(mimic)).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(shuffled / path.relative_to(mimic), "wt", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    batches = []
    for root in (mimic, shuffled):
        data = MIMICIV(str(root))
        data.view = "triplets"
        data.setup()
        assert data.spec is not None
        order = data.samples.with_row_index().sort("stay_id")["index"].to_numpy().astype(np.int64)
        batches.append((data.spec, data.batch(order)))
    (told, one), (told_again, other) = batches
    assert told == told_again
    for name in ("static", "time", "variable", "value", "length", "target"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    first = one.variable[:, 1:].clone()  # type: ignore[union-attr]
    same_time = (one.time[:, 1:] == one.time[:, :-1]) & (first > 0)  # type: ignore[union-attr]
    assert same_time.any()
    assert (first >= one.variable[:, :-1])[same_time].all()  # type: ignore[union-attr]


def test_widths_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--model\.width must be a multiple of --model\.heads \(4\), found 18"):
        HyMaTE(width=18)


# ---- batches by length ----------------------------------------------------------------------------------------------------


def test_padding_is_small_and_every_sample_comes_once_an_epoch() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.9, 0.6, 6392), 1476).astype(int)  # as PhysioNet 2012: mean about 420
    rows = np.arange(1000, 1000 + len(lengths))
    counts = []
    for seed, epoch in ((0, 0), (0, 1), (None, 0)):
        batches = list(Batches(rows, 32, seed, epoch, lengths=lengths))
        assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
        assert max(map(len, batches)) == 32
        padding = 1 - lengths.sum() / sum(len(b) * lengths[b - 1000].max() for b in batches)
        assert padding < 0.15
        counts.append(len(batches))
    assert len(set(counts)) == 1
    assert counts[0] == len(Batches(rows, 32, 0, 0, lengths=lengths))
    plain = list(Batches(rows, 32, 0))
    assert 1 - lengths.sum() / sum(len(b) * lengths[b - 1000].max() for b in plain) > 0.4  # without lengths


def test_epochs_differ_in_what_shares_a_batch_and_repeat_by_seed() -> None:
    lengths = np.random.default_rng(0).integers(50, 1000, 500)
    rows = np.arange(500)

    def epoch(seed: int, number: int) -> list[list[int]]:
        return [sorted(b.tolist()) for b in Batches(rows, 16, seed, number, lengths=lengths)]

    assert epoch(0, 3) == epoch(0, 3)
    assert epoch(0, 3) != epoch(0, 4)
    assert sum(b in epoch(0, 4) for b in epoch(0, 3)) < 3
    assert [max(lengths[b]) for b in epoch(0, 3)] != sorted((max(lengths[b]) for b in epoch(0, 3)), reverse=True)


def test_batches_of_long_stays_are_smaller() -> None:
    lengths = np.array([20_000] * 12 + [100] * 100 + [0])
    batches = list(Batches(np.arange(113), 64, 0, 0, lengths=lengths))
    sizes = {len(b) for b in batches if lengths[b].max() == 20_000}
    assert max(sizes) * 20_000 <= 2**17
    assert sorted(np.concatenate(batches).tolist()) == list(range(113))


def test_padding_of_the_real_stays(real: Any) -> None:
    data = PhysioNet2012(str(real("physionet2012")), batch_size=32)
    data.view = "triplets"
    data.setup()
    slots = events = 0
    for batch in data.train_dataloader():
        slots, events = slots + batch.value.numel(), events + int(batch.length.sum())
    assert 400 < events / 6392 < 500
    assert 1 - events / slots < 0.15


# ---- long stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_stay_of_20000_observations_trains(
    attention: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hymate._warn_long, "said", False, raising=False)
    model = make(attention, layers=1).train()
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), caplog.at_level(logging.WARNING):
        loss = model._loss(triplets([20_000]))[0]
        model._loss(triplets([20_000]))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert largest < 20_000 * 200  # nothing of the size 20,000 x 20,000 is kept
    said = [r.message for r in caplog.records if "observations" in r.message]
    assert len(said) == (attention == "token")
    if said:
        assert "more than 2048 observations (padded 20000)" in said[0]
        assert "--model.attention variable or channel has no windows" in said[0]


def test_windows_attend_within_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hymate, "WINDOW", 8)
    model = make("token")
    x, real = torch.randn(2, 20, 16), torch.arange(20) < torch.tensor([[20], [11]])
    whole = model._attend(x, real)
    assert whole.shape == x.shape
    for low in (0, 8, 16):
        alone = model._attend(x[:, low : low + 8], real[:, low : low + 8])
        mine = real[:, low : low + 8]
        torch.testing.assert_close(whole[:, low : low + 8][mine], alone[mine], rtol=1e-5, atol=1e-6)


def test_attention_equals_a_plain_one() -> None:
    model = make("token")
    x, real = torch.randn(1, 7, 16), torch.arange(7)[None] < 5
    q, k, v = (t.view(7, 2, 8) for t in model.query_key_value(x[0]).chunk(3, -1))
    expected = torch.zeros(7, 2, 8)
    for head in range(2):
        score = (q[:, head] @ k[:, head].T / math.sqrt(8))[:, :5]
        expected[:, head] = score.softmax(-1) @ v[:5, head]
    torch.testing.assert_close(model._attend(x, real)[0], expected.flatten(1), rtol=1e-5, atol=1e-6)


def test_pooling_by_variable_table() -> None:
    model = make("variable")
    x, variable = torch.randn(1, 6, 16), torch.tensor([[2, 5, 2, 5, 5, 0]])
    seen: list[Tensor] = []
    model.of_variable.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pooled, present = model._by_variable(x, variable, variable > 0)
    assert present.tolist() == [[False, True, False, False, True, False]]
    assert (pooled[0, [0, 2, 3, 5]] == 0).all()
    for name, mine in ((2, [0, 2]), (5, [1, 3, 4])):
        own = x[0, mine]
        expected = torch.cat([own.mean(0), own.max(0).values, own[-1], torch.tensor([math.log1p(len(mine))])])
        torch.testing.assert_close(seen[0][0, name - 1], expected)


# ---- attribution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
def test_attribution_adds_up_and_names_what_was_observed(attention: str) -> None:
    model, batch = make(attention), triplets([12, 3, 0, 5])
    weight, part = model.attribute(batch)
    assert weight.shape == part.shape == (4, 6)
    torch.testing.assert_close(weight.sum(1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    observed = torch.tensor([[v + 1 in batch.variable[i, : batch.length[i]] for v in range(6)] for i in range(4)])
    assert not observed.all()
    assert (weight > 0).equal(observed)
    x, of_item = model._items(batch)
    pooled = (of_item[:, None] @ x).squeeze(1).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.head(model._joined(pooled, batch)).sum(), pooled)
    torch.testing.assert_close(part.sum(1), (pooled * slope).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_names_of_the_attribution_are_those_of_the_raw_tables(attention: str, mimic: Path) -> None:
    data = MIMICIV(str(mimic))
    data.view, data.summary = "triplets", True
    data.setup()
    assert data.spec is not None
    assert data.store is not None
    model = make(attention, facts=data.spec)
    rows = data.rows("val")[:20]
    weight, _ = model.attribute(data.batch(rows))  # type: ignore[arg-type]
    for i, row in enumerate(rows):
        said = {name for name, w in zip(data.spec.variables, weight[i], strict=True) if w > 0}
        stay, end = int(data._stay[row]), int(data._minute[row])
        low, high = data.store.at_or_after(np.array([stay, stay]), np.array([end - 60 * data.task.window, end]))
        charted = {NAMES[code] for code in data.store.concept[low:high].tolist()}
        assert said == charted & set(data.spec.variables)


# ---- forecasting ----------------------------------------------------------------------------------------------------------


def test_forecast_table() -> None:
    """hours 48: the cut is between hour 12 (place 0) and hour 46; what happens in the 2 hours from it on is forecast."""
    hour = torch.tensor([[1.0, 11.5, 12.0, 13.0, 13.5, 14.0, 30.0], [2.0, 3.0, 40.0, 0.0, 0.0, 0.0, 0.0]])
    batch = Triplets(
        torch.zeros(2, 1),
        torch.zeros(2, 0, 16),
        torch.where(hour > 0, hour / 24 - 1, 0.0),
        torch.tensor([[1, 2, 1, 2, 1, 3, 1], [1, 3, 2, 0, 0, 0, 0]]),
        torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0], [20.0, 21.0, 22.0, 0.0, 0.0, 0.0, 0.0]]),
        torch.tensor([7, 3]),
        torch.zeros(2),
        torch.arange(2),
    )
    past, value, known = forecast_task(batch, torch.tensor([0.0, 0.0]), 48, 3)
    assert past.length.tolist() == [2, 2]
    assert past.value.tolist() == [[10, 11], [20, 21]]
    assert value.tolist() == [
        [12, 13, 0],
        [0, 0, 0],
    ]  # the first of variable 1, not the second; variable 3 comes at the end of the 2 hours
    assert known.tolist() == [[1, 1, 0], [0, 0, 0]]
    past, value, known = forecast_task(batch, torch.tensor([0.5, 0.83]), 48, 3)  # cuts at hours 29 and 40.22
    assert past.length.tolist() == [6, 3]
    assert value.tolist() == [[16, 0, 0], [0, 0, 0]]
    past, *_ = forecast_task(batch, torch.tensor([1.0, 0.0]), 24, 3)  # of 24 hours: the same places are hours 22 and 8
    assert past.length.tolist() == [7, 2]


def test_the_future_does_not_reach_the_forecast() -> None:
    model = make(kind=HyMaTEForecast)
    batch, place = triplets([60, 40]), torch.tensor([0.3, 0.6])
    past, value, _ = forecast_task(batch, place, 48, 6)
    cut = 12 + place * 34
    later = (batch.time + 1) * 24 >= cut[:, None]
    assert later.any()
    changed, other, _ = forecast_task(batch._replace(value=torch.where(later, 5.0, batch.value)), place, 48, 6)
    torch.testing.assert_close(model.head(model.represent(past)), model.head(model.represent(changed)), rtol=0, atol=0)
    assert not torch.equal(value, other)


# ---- training from a checkpoint -------------------------------------------------------------------------------------------


def command(model: str, mimic: Path, runs: Path, name: str) -> str:
    return (
        f"train --model {model} --model.width 16 --model.layers 1 --model.state 4 --model.attention variable --data MIMICIV --data.root {mimic} "
        f"--data.hours 12 --trainer.max_epochs 2 --runs {runs} --name {name}"
    )


@pytest.fixture(scope="module")
def pretrained(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("pretrained")
    main(f"{command('HyMaTEForecast', mimic, runs, 'forecast')} --monitor val_loss".split())
    return runs / "forecast"


def test_forecasting_reads_no_outcome(pretrained: Path, mimic: Path, tmp_path: Path) -> None:
    """The same raw files with other outcomes give the same weights."""
    other = tmp_path / "other"
    for path in mimic.rglob("*.csv.gz"):
        (other / path.relative_to(mimic)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(mimic)).write_bytes(path.read_bytes())
    admissions = pl.read_csv(other / "hosp" / "admissions.csv.gz")
    blank = admissions.with_columns(hospital_expire_flag=1 - pl.col("hospital_expire_flag"))
    with gzip.open(other / "hosp" / "admissions.csv.gz", "wb") as file:
        blank.write_csv(file)
    main(f"{command('HyMaTEForecast', other, tmp_path, 'forecast')} --monitor val_loss".split())
    one, two = (read(folder / "best.ckpt")["state_dict"] for folder in (pretrained, tmp_path / "forecast"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)  # a GPU adds up in no fixed order


def test_training_goes_on_from_forecasting(pretrained: Path, mimic: Path, tmp_path: Path) -> None:
    assert json.loads((pretrained / "metrics.json").read_text())["val_loss"] > 0
    main(
        f"{command('HyMaTE', mimic, tmp_path, 'on')} --init-from {pretrained / 'best.ckpt'} --model.learning_rate 0 --trainer.max_epochs 1".split()
    )
    forecast, on = load(pretrained / "best.ckpt"), load(tmp_path / "on" / "best.ckpt")
    assert on.spec == forecast.spec
    assert on.head.weight.shape == (16, 256, 1)  # members, not the forecast's variables
    before, after = forecast.state_dict(), on.state_dict()
    for name in after:
        if not name.startswith(("head.", "summarised.")):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)  # at learning rate 0
    assert set(pl.read_parquet(tmp_path / "on" / "predictions.parquet")["split"]) == {"val", "test"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--model.width 32", "cannot start this model: variable.weight has the shape"),
        (
            "--model.attention token",
            "cannot start this model: of_variable.weight has the shape none here and (16, 49) there",
        ),
        ("--data.seed 1", "--data.seed 1, but the model was trained on patients of these data with 0"),
        ("--data.hours 24", "windows of 24 hours, but the model was trained with 12: add --data.window 12"),
        ("--data.statics age", "--data.statics age, but the model was trained with age,sex,unit,admit_minute"),
        ("--data.treatment false", "--data.treatment false, but the model was trained with true"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    more: str, said: str, pretrained: Path, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{command('HyMaTE', mimic, tmp_path, 'on')} --init_from {pretrained / 'best.ckpt'} {more}"
    assert said in refused(line, capsys)
    assert not (tmp_path / "on").exists()


def test_what_forecasting_cannot_do(
    pretrained: Path, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = f"{command('HyMaTEForecast', mimic, tmp_path, 'x')} --monitor val_auroc"
    assert "set --monitor val_loss" in refused(wrong, capsys)
    for verb in ("evaluate", "predict", "explain"):
        said = refused(f"{verb} --ckpt {pretrained / 'best.ckpt'} --out {tmp_path / 'out.csv'}", capsys)
        assert "predicts no outcome: train a HyMaTE from it" in said
    assert "no checkpoint" in refused(
        f"{command('HyMaTE', mimic, tmp_path, 'x')} --init_from {tmp_path / 'gone.ckpt'}", capsys
    )
    assert "predicts no outcome" in refused(
        f"{command('HyMaTEForecast', mimic, tmp_path, 'x')} --monitor val_loss --finetune EICU", capsys
    )


# ---- end to end -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transferred(mimic: Path, eicu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("transferred")
    main(f"{command('HyMaTE', mimic, runs, 'run')} --finetune EICU --finetune.root {eicu} --finetune_epochs 1".split())
    return runs / "run"


def test_one_flag_transfers(transferred: Path) -> None:
    for folder in (transferred, transferred / "finetune-EICU"):
        assert load(folder / "best.ckpt").spec == load(transferred / "best.ckpt").spec
        assert json.loads((folder / "metrics.json").read_text())["test"]["auroc"]["value"] is not None


def test_weights_of_forecasting_are_not_taken_half(tmp_path: Path) -> None:
    model, other = make("variable"), make("variable", kind=HyMaTEForecast)
    content: dict[str, Any] = {"state_dict": {**other.state_dict(), "strange.weight": torch.zeros(2)}}
    other.on_save_checkpoint(content)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    path = tmp_path / "x.ckpt"
    save(content, path)
    with pytest.raises(ValueError, match=r"strange\.weight has the shape none here and \(2,\) there"):
        model.begin_with(path)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("attention", ATTENTION)
def test_recomputed_blocks_give_the_same_gradients_with_less_kept(attention: str) -> None:
    """Dropout draws the same numbers; fewer bytes are kept for the backward pass."""
    samples = triplets([40, 7, 33, 1])
    found = []
    for recompute in (False, True):
        model = make(attention, recompute=recompute, dropout=0.3, layers=3, members=1).train()
        kept = [0]

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += tensor.nbytes
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.training_step(samples, 0)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], kept[0]))
    (loss, gradient, bytes_kept), (same_loss, same_gradient, fewer) = found
    assert torch.equal(loss, same_loss)
    assert len(gradient) == len(same_gradient) > 20
    assert all(torch.equal(a, b) for a, b in zip(gradient, same_gradient, strict=True))
    assert fewer < 0.75 * bytes_kept


def test_counts_beyond_256_survive_bfloat16() -> None:
    """bfloat16 has 8 bits of mantissa: summed in it, 1,200 observations came out as 259."""
    model = HyMaTE(width=16, layers=1, state=4, attention="variable", heads=2)
    model.initialise(spec(2, 48, 1))
    model.eval().bfloat16()
    counts: list[float] = []
    model.of_variable.register_forward_pre_hook(lambda _, x: counts.append(x[0][0, 0, -1].float().expm1().item()))
    n = 1200
    values = torch.randn(1, n, dtype=torch.bfloat16)
    times = torch.linspace(-1, 1, n, dtype=torch.bfloat16)[None]
    static = torch.zeros(1, 1, dtype=torch.bfloat16)
    ones = torch.ones(1, n, dtype=torch.int64)
    model(
        Triplets(
            static,
            torch.zeros(1, 2, 16, dtype=torch.bfloat16),
            times,
            ones,
            values,
            torch.tensor([n]),
            torch.ones(1),
            torch.arange(1),
        )
    )
    assert counts == [pytest.approx(n, rel=0.03)]
