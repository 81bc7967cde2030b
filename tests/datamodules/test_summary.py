"""Statistics of the window: beside a computation by polars' group-by, by hand, under thinning, and blind to what follows."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from datamodules.dictionary import BY_NAME, RATES
from datamodules.module import EICU, MIMICIV, ICUDataModule, PhysioNet2012
from datamodules.scores import SCORES
from datamodules.summary import STATISTICS, summarise
from datamodules.views import CARRY, COMMON, Thinning

NAN = math.nan
AT = {name: k for k, name in enumerate(STATISTICS)}


def test_statistics_by_hand() -> None:
    """A window of 10 hours; the second variable was charted only 30 minutes before it opened, the third never.

    Before: minutes 60, 240, 420, 540 with 4, 1, 5, 2; the late ones are the last two.
    """
    minute = np.array([-30, 60, 240, 420, 540])
    variable = np.array([1, 0, 0, 0, 0])
    value = np.array([7.0, 4, 1, 5, 2], np.float32)
    table = summarise((np.zeros(5, int), minute, variable, value), minute < 0, (1, 3), 10)[0]
    mean, sd = 3.0, math.sqrt((1 + 4 + 4 + 1) / 4)
    after = [4, 4, 2, -2, 1, 5, mean, 3.0, sd, 12, 1, 9, 3.5, 2, 5, 7]
    np.testing.assert_allclose(table[0], after, rtol=1e-6)
    assert dict(zip(STATISTICS, table[1].tolist(), strict=True)) == pytest.approx(
        dict.fromkeys(STATISTICS, NAN) | {"number": 0, "last": 7, "hours_since": 10.5, "hour_of_last": -0.5},
        nan_ok=True,
    )
    assert table[2][AT["number"]] == 0
    assert np.isnan(np.delete(table[2], AT["number"])).all()


def independent(data: ICUDataModule, rows: np.ndarray) -> np.ndarray:
    """The same statistics of samples, by joins and group-bys of polars over the events of the store."""
    assert data.spec is not None
    window, names = 60 * data.spec.window, data.spec.variables
    samples = data.samples[rows].select("stay_id", end=pl.col("minute").cast(pl.Int64)).with_row_index("sample")
    events = pl.concat([data.store.frame(a, b) for a, b in data.store.pieces()])
    events = events.with_columns(pl.col("concept").cast(pl.String), pl.col("minute", "known_minute").cast(pl.Int64))
    seen = samples.join(events, on="stay_id").filter(
        pl.col("concept").is_in(names), pl.col("minute") < pl.col("end"), pl.col("known_minute") < pl.col("end")
    )
    start = pl.col("end") - window
    running = (
        seen.filter(pl.col("concept").is_in(RATES), pl.col("minute") < start)
        .sort("minute", maintain_order=True)
        .group_by("sample", "concept", maintain_order=True)
        .last()
        .filter(pl.col("value") != 0)
        .with_columns(minute=start)
    )
    anew = seen.filter(pl.col("minute") == start).select("sample", "concept")
    running = running.join(anew, on=["sample", "concept"], how="anti").select(seen.columns)
    seen = pl.concat([running, seen]).with_columns(hour=(pl.col("minute") - start) / 60)
    seen = seen.filter(pl.col("hour") >= -CARRY).sort("hour", maintain_order=True)
    value, inside, late = pl.col("value").cast(pl.Float64), pl.col("hour") >= 0, pl.col("hour") >= window / 120
    of, then = value.filter(inside), value.filter(late)
    table = seen.group_by("sample", "concept").agg(
        number=of.len(), first=of.first(), last=value.last(), change=of.last() - of.first(), minimum=of.min(),
        maximum=of.max(), mean=of.mean(), median=of.median(), sd=of.std(ddof=0), sum=of.sum(),
        hours_since=window / 60 - pl.col("hour").last(), hour_of_last=pl.col("hour").last(), late_mean=then.mean(),
        late_minimum=then.min(), late_maximum=then.max(), late_sum=then.sum(), inside=inside.sum(), late=late.sum(),
    )  # fmt: skip
    table = table.with_columns(
        sum=pl.when(pl.col("inside") > 0).then("sum"), late_sum=pl.when(pl.col("late") > 0).then("late_sum")
    )
    whole = samples.select("sample").join(pl.DataFrame({"concept": names}), how="cross")
    table = whole.join(table, on=["sample", "concept"], how="left", maintain_order="left")
    numbers = table.select(STATISTICS).with_columns(pl.col("number").fill_null(0)).cast(pl.Float64)
    return numbers.fill_null(NAN).to_numpy().reshape(len(rows), len(names), len(STATISTICS))


@pytest.mark.parametrize("which", ["simulated", "mimic-iv-demo", "eicu-demo", "physionet2012"])
def test_statistics_are_those_of_an_independent_computation(
    which: str, mimic: Path, real: Callable[[str], Path]
) -> None:
    data: ICUDataModule
    if which == "simulated":
        data = MIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=12)
    elif which == "physionet2012":
        data = PhysioNet2012(str(real(which)), sets="b")
    else:
        data = {"mimic-iv-demo": MIMICIV, "eicu-demo": EICU}[which](str(real(which)))
    data.prepare_data()
    data.setup()
    rows = np.random.default_rng(0).permutation(len(data.samples))[:400]
    summary = data._views.summary(data._stay[rows], data._minute[rows])
    expected = independent(data, rows)
    assert np.array_equal(np.isnan(summary), np.isnan(expected))
    np.testing.assert_allclose(summary, expected, rtol=1e-5, atol=1e-3)


@pytest.fixture(scope="module")
def data(mimic: Path) -> ICUDataModule:
    data = MIMICIV(str(mimic))
    data.prepare_data()
    data.setup()
    return data


def test_thinning_leaves_rare_variables_rates_and_counts(data: ICUDataModule) -> None:
    assert data.spec is not None
    rows = data.rows("train")[:200]
    stay, minute = data._stay[rows], data._minute[rows]
    whole, thin = (data._views.summary(stay, minute, t) for t in (None, Thinning(0.4, 0, 0)))
    number = whole[..., AT["number"]]
    rate = np.array([BY_NAME[v].hourly == "rate" for v in data.spec.variables])
    kept = (number < COMMON) | rate
    assert (number >= COMMON)[:, ~rate].any()
    np.testing.assert_array_equal(thin[kept], whole[kept])
    common = ~kept & (thin[..., AT["number"]] > 0)
    assert np.mean(np.abs(thin - whole)[common][:, AT["number"]] < 1e-3) > 0.9  # unless a half lost all of its own
    assert (thin[common][:, AT["minimum"]] >= whole[common][:, AT["minimum"]]).all()
    assert (thin[common][:, AT["mean"]] != whole[common][:, AT["mean"]]).mean() > 0.5
    total = thin[common][:, AT["mean"]].mean() / whole[common][:, AT["mean"]].mean()
    assert total == pytest.approx(1, abs=0.05)


def test_all_views_leave_out_the_same_observations_and_others_in_every_epoch(data: ICUDataModule) -> None:
    assert data.spec is not None
    rows = data.rows("train")[:50]
    stay, minute = data._stay[rows], data._minute[rows]
    count = {}
    for epoch in (0, 1):
        thinning = Thinning(0.4, 0, epoch)
        owner, _, variable, value = data._views.events(stay, minute, 0, thinning)
        *_, length = data._views.triplets(data.spec, stay, minute, thinning)
        running = data._views.triplets(data.spec, stay, minute)[3].numpy() - np.bincount(
            data._views.events(stay, minute)[0], minlength=len(rows)
        )
        assert (length.numpy() - np.bincount(owner, minlength=len(rows)) == running).all()
        largest = np.full((len(rows), len(data.spec.variables)), -np.inf)
        np.maximum.at(largest, (owner, variable), value)
        summary = data._views.summary(stay, minute, thinning)
        rate = np.array([BY_NAME[v].hourly == "rate" for v in data.spec.variables])
        charted = np.isfinite(largest) & ~rate
        np.testing.assert_allclose(summary[..., AT["maximum"]][charted], largest[charted], rtol=1e-6)
        count[epoch] = value
    assert len(count[0]) != len(count[1]) or (count[0] != count[1]).any()
    everything = len(data._views.events(stay, minute)[0])
    assert 0.6 * everything <= len(count[0]) < everything


def test_training_is_thinned_and_validation_is_not(mimic: Path) -> None:
    data = MIMICIV(str(mimic), thinning=0.4)
    data.view = "triplets"
    data.prepare_data()
    data.setup()
    rows = data.rows("train")[:20]
    whole, epochs = data.batch(rows), [data.batch(rows, epoch) for epoch in (0, 0, 1)]
    assert all(e.length.sum() < whole.length.sum() for e in epochs)  # type: ignore[union-attr]
    assert epochs[0].value.equal(epochs[1].value)  # type: ignore[union-attr]
    assert not epochs[0].value.equal(epochs[2].value)  # type: ignore[union-attr]
    first = {loader: next(iter(getattr(data, loader)())) for loader in ("train_dataloader", "val_dataloader")}
    for loader, batch in first.items():
        unthinned = data.batch(batch.row.numpy())
        assert (batch.length.sum() < unthinned.length.sum()) == (loader == "train_dataloader")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"--data\.thinning must be at least 0 and below 1, found 1"):
        MIMICIV(str(mimic), thinning=1)


def test_what_has_elapsed_is_counted_from_what_was_known(mimic: Path) -> None:
    data = MIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=6)
    data.prepare_data()
    data.setup()
    assert data.spec is not None
    names = data.spec.variables
    assert data.spec.statics[-2 * len(names) - 1 - len(SCORES) :] == [
        "hours in the ICU", *(f"number of {v}" for v in names), *(f"number per hour of {v}" for v in names), *SCORES
    ]  # fmt: skip
    rows = np.random.default_rng(0).permutation(len(data.samples))[:100]
    elapsed = data._views.elapsed(data._stay[rows], data._minute[rows])
    for row, found in zip(rows, elapsed, strict=True):
        stay, minute = int(data._stay[row]), int(data._minute[row])
        events = data.store.frame(stay, stay + 1).filter(pl.col("minute") < minute, pl.col("known_minute") < minute)
        number = [events.filter(pl.col("concept").cast(pl.String) == name).height for name in names]
        hours = minute / 60
        expected = [hours, *np.log1p(number), *np.log1p(np.array(number) / max(hours, 1))]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    fixed = MIMICIV(str(mimic))
    fixed.prepare_data()
    fixed.setup()
    assert fixed.spec is not None
    assert not {"hours in the ICU", "shock index"} & set(fixed.spec.statics)


def told(data: MIMICIV, stay: np.ndarray, minute: np.ndarray) -> tuple[np.ndarray, ...]:
    views = data._views
    return views.summary(stay, minute), views.elapsed(stay, minute), views.last(stay, minute)


def test_nothing_that_follows_changes_a_summary(mimic: Path) -> None:
    """The store with every later value replaced gives the same summary and the same counts."""
    data = MIMICIV(str(mimic), task="mortality_24h", rolling=True, hours=6)
    data.prepare_data()
    data.setup()
    rows = np.random.default_rng(0).permutation(len(data.samples))[:60]
    for row in rows:
        stay, minute = data._stay[[row]], data._minute[[row]]
        before = told(data, stay, minute)
        store = data.store
        later = (store.minute >= minute[0]) | (store.known >= minute[0])
        value, kept = store.value, np.where(later, np.float32(1e6), store.value)
        store.value = kept
        try:
            after = told(data, stay, minute)
        finally:
            store.value = value
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
