"""Batches, scaler and loaders, against implementations that go through the rows one by one in plain Python."""

import math
import pickle
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toy import Row, Toy, of_stays, people

import datamodules
from datamodules import EICU, MIMICIV, ICUDataModule
from datamodules.contract import Grid, Spec, Triplets
from datamodules.dictionary import BY_NAME, CONCEPT, NAMES
from datamodules.module import Samples, of
from datamodules.resident import Resident, megabytes
from datamodules.sampler import Batches
from datamodules.tasks import Task

HOURS = 6
CARRY = 24  # hours before the window from which values are carried, written here once more
VARIABLES = ["heart_rate", "temperature", "lactate", "urine", "norepinephrine", "vasopressin"]
Known = tuple[int, int, str, float]  # minute, when it was known, concept, value


class ToyData(Toy, ICUDataModule):
    """The toy as a data module."""


def charted(count: int, seed: int = 0, per_stay: int = 160) -> dict[int, list[Row]]:
    """Random events, many of them at whole hours, on the edges of windows and of hours; a third are known later, many at whole hours."""
    rng = np.random.default_rng(seed)
    found: dict[int, list[Row]] = {}
    for stay in range(1, count + 1):
        minute = rng.integers(-60 * 60, 20 * 60, per_stay)
        minute = np.where(rng.random(per_stay) < 0.3, minute // 60 * 60, minute)
        known = minute + np.where(rng.random(per_stay) < 0.3, rng.integers(0, 300, per_stay), 0)
        known = np.where(rng.random(per_stay) < 0.3, -(-known // 60) * 60, known)
        concept = rng.choice([*VARIABLES, "sodium"], per_stay)
        low = np.array([BY_NAME[c].low for c in concept])
        high = np.minimum([BY_NAME[c].high for c in concept], 200)
        value = np.float32(low + rng.random(per_stay) * (high - low)).astype(float)
        zero = np.array([BY_NAME[c].low == 0 and not BY_NAME[c].low_open for c in concept])
        value = np.where((rng.random(per_stay) < 0.3) & zero, 0, value)
        found[stay] = list(zip(minute.tolist(), concept.tolist(), value.tolist(), known.tolist(), strict=True))
    return found


def spec(hours: int = HOURS, **task: Any) -> Spec:
    """A scaler with round numbers, as if it came from another hospital; its variables are in an order of their own."""
    variables = VARIABLES[::-1]
    center = [0.0 if BY_NAME[v].hourly == "rate" else 10.0 for v in variables]
    units = [BY_NAME[v].unit for v in variables]
    facts = {"name": "mortality_hospital", "hours": hours, "window": hours, "rolling": False, **task}
    return Spec(
        variables, units, ["age", "sex", "unit=neuro"], center, [20.0] * 6, [50.0, 0.5, 0.0], [10.0, 0.5, 1.0], facts
    )


def module(root: Path, charted: dict[int, list[Row]], adopted: Spec | None = None, **kwargs: Any) -> ToyData:
    stays = kwargs.pop("stays", None)
    toy = ToyData(root, people(len(charted)) if stays is None else stays, of_stays(charted), **kwargs)
    if adopted is not None:
        toy.adopt(adopted)
    toy.setup()
    return toy


# ---- the plain implementations ---------------------------------------------------------------------------------------------


def as_stored(rows: list[Row]) -> list[Known]:
    """The rows of a stay as the store keeps them, in its order: each once, known as early as it was; a rate counts from then.

    Volumes that were known at different times are different ones.
    """
    once: dict[tuple, int] = {}
    for minute, concept, value, *later in rows:
        known, hourly = max([minute, *later]), BY_NAME[concept].hourly
        key = (known if hourly == "rate" else minute, concept, value, known if hourly == "sum" else None)
        once[key] = min(known, once.get(key, known))
    stored = [(minute, known, concept, value) for (minute, concept, value, _), known in once.items()]
    return sorted(stored, key=lambda row: (row[0], NAMES.index(row[2]), row[3], row[1]))


def seen(stored: list[Known], end: int) -> list[Known]:
    """What may be seen at minute ``end``: it was charted, and known, before."""
    return [row for row in stored if row[0] < end and row[1] < end]


def running(stored: list[Known], concept: str, at: int) -> float:
    """The rate that holds in the minute ``at``: the last that was set up to then, however long ago."""
    return ([0.0] + [value for minute, _, name, value in stored if name == concept and minute <= at])[-1]


def plain_grid(rows: list[Row], end: int, told: Spec) -> tuple[list, list, list]:
    """(T, F) value, mask and since, as documented in ``contract.Grid``, one cell after the other."""
    stored = seen(as_stored(rows), end)
    hours, start = told.window, end - 60 * (told.window + CARRY)
    values, masks, sinces = [], [], []
    for hour in range(hours):
        cells: tuple[list, list, list] = ([], [], [])
        for variable, center, scale in zip(told.variables, told.center, told.scale, strict=True):
            by_hour = defaultdict(list)
            for minute, _, concept, value in stored:
                if concept == variable and start <= minute:
                    by_hour[math.floor((minute - start) / 60) - CARRY].append(value)
            charted = [h for h in by_hour if h <= hour]
            if BY_NAME[variable].hourly == "rate":  # minute by minute
                first = start + 60 * (CARRY + hour)
                value = sum(running(stored, variable, at) for at in range(first, first + 60)) / 60
            elif charted:
                found = by_hour[max(charted)]
                value = sum(found) / (1 if BY_NAME[variable].hourly == "sum" else len(found))
            else:
                value = center
            cells[0].append(min(max((value - center) / scale, -5), 5))
            cells[1].append(float(hour in by_hour))
            cells[2].append(min((hour - max(charted)) / hours, 1) if charted else 1.0)
        for table, row in zip((values, masks, sinces), cells, strict=True):
            table.append(row)
    return values, masks, sinces


def plain_triplets(rows: list[Row], end: int, told: Spec) -> list[tuple[float, int, float]]:
    """Time, variable and value of each event of the window; a rate that runs when it opens is one of its first minute."""
    stored = seen(as_stored(rows), end)
    start = end - 60 * told.window
    inside = [row for row in stored if row[0] >= start and row[2] in told.variables]
    for name in told.variables:
        rate = running(stored, name, start - 1) if BY_NAME[name].hourly == "rate" else 0
        if rate and not any(minute == start and concept == name for minute, _, concept, _ in inside):
            inside.append((start, start, name, rate))
    inside.sort(key=lambda row: (row[0], NAMES.index(row[2])))
    table = {name: i for i, name in enumerate(told.variables)}
    return [
        (
            2 * (minute - start) / (end - start) - 1,
            table[concept] + 1,
            min(max((value - told.center[table[concept]]) / told.scale[table[concept]], -5), 5),
        )
        for minute, _, concept, value in inside
    ]


@pytest.mark.parametrize("rolling", [False, True], ids=["once", "every hour"])
def test_grid_equals_the_plain_one(tmp_path: Path, rolling: bool) -> None:
    events = charted(8)
    task: dict[str, Any] = {"name": "mortality_24h", "rolling": True} if rolling else {}
    stays = people(8, icu_minutes=[60 * (HOURS + i) for i in range(8)])
    toy = module(tmp_path / "t", events, spec(**task), stays=stays)
    told = toy.spec
    assert told is not None
    chosen = toy.rows("all")[:: 5 if rolling else 1]
    assert len(chosen) == 8
    batch = toy.batch(chosen)
    assert isinstance(batch, Grid)
    assert batch.value.dtype == batch.mask.dtype == batch.since.dtype == torch.float32
    assert batch.value.is_contiguous()
    for i, (stay, minute) in enumerate(toy.samples[chosen].select("stay_id", "minute").iter_rows()):
        value, mask, since = plain_grid(events[stay], minute, told)
        torch.testing.assert_close(batch.mask[i], torch.tensor(mask))
        torch.testing.assert_close(batch.since[i], torch.tensor(since))
        torch.testing.assert_close(batch.value[i], torch.tensor(value), atol=2e-5, rtol=1e-5)
    assert 0 < batch.mask.mean() < 1
    assert (batch.since == 1).any()


def test_triplets_equal_the_plain_ones(tmp_path: Path) -> None:
    events = charted(8)
    events[3] = [(-600, "lactate", 2.0), (0, "sodium", 140.0)]  # nothing that the model knows inside the window
    events[4] = [(60 * HOURS - 1, "lactate", 2.0)]
    events[5] = [(-9000, "vasopressin", 2.0), *events[5]]  # runs on until it is set anew
    toy = module(
        tmp_path / "t", events, spec()._replace(variables=VARIABLES, units=[BY_NAME[v].unit for v in VARIABLES])
    )
    told = toy.spec
    assert told is not None
    toy.view = "triplets"
    batch = toy.batch(toy.rows("all"))
    assert isinstance(batch, Triplets)
    assert batch.time.shape == (8, int(batch.length.max()))
    assert batch.length[2:4].tolist() == [0, 1]
    for i, (stay, minute) in enumerate(toy.samples.select("stay_id", "minute").iter_rows()):
        expected = plain_triplets(events[stay], minute, told)
        length = int(batch.length[i])
        assert length == len(expected)
        for column, tensor in zip(
            zip(*expected, strict=True) if expected else ((), (), ()),
            (batch.time, batch.variable, batch.value),
            strict=True,
        ):
            torch.testing.assert_close(
                tensor[i, :length], torch.tensor(column, dtype=tensor.dtype), atol=1e-6, rtol=1e-5
            )
        assert not batch.variable[i, length:].any()
        assert not batch.value[i, length:].any()
    only = toy.batch(toy.rows("all")[2:3])
    assert only.variable.shape == (1, 1)  # type: ignore[union-attr]
    assert only.length.tolist() == [0]  # type: ignore[union-attr]


def test_the_edges_of_the_window(tmp_path: Path) -> None:
    end = 60 * HOURS
    events: dict[int, list[Row]] = {
        1: [(0, "lactate", 2.0), (end - 1, "heart_rate", 80.0), (end, "temperature", 37.0)],
        2: [(-1, "lactate", 2.0), (end - 60, "heart_rate", 80.0), (1, "temperature", 37.0)],
        3: [(-60 * CARRY, "lactate", 2.0), (-60 * CARRY - 1, "heart_rate", 80.0), (0, "norepinephrine", 1.0)],
        4: [
            (-90, "norepinephrine", 1.0),
            (90, "norepinephrine", 0.5),
            (150, "norepinephrine", 0.0),
            (5, "sodium", 140.0),
        ],
    }
    toy = module(tmp_path / "t", events, spec())
    grid = toy.batch(toy.rows("all"))
    assert isinstance(grid, Grid)
    at = {v: spec().variables.index(v) for v in VARIABLES}
    assert grid.mask[0, :, at["lactate"]].tolist() == [1, 0, 0, 0, 0, 0]  # at the start of the window: seen
    assert grid.mask[0, :, at["heart_rate"]].tolist() == [0, 0, 0, 0, 0, 1]  # a minute before the prediction: seen
    assert grid.mask[0, :, at["temperature"]].tolist() == [0] * 6  # at the very minute of the prediction: not seen
    assert (grid.since[0, :, at["temperature"]] == 1).all()
    assert grid.mask[1, :, at["lactate"]].tolist() == [0] * 6  # a minute before the window: carried into it
    assert grid.value[1, :, at["lactate"]].tolist() == pytest.approx([-0.4] * 6)
    assert grid.since[1, :, at["lactate"]].tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    # CARRY hours before the window: the last to be carried; a minute earlier: as if never charted
    assert grid.value[2, :, at["lactate"]].tolist() == pytest.approx([-0.4] * 6)
    assert grid.value[2, :, at["heart_rate"]].tolist() == [0] * 6
    rate = grid.value[:, :, at["norepinephrine"]] * 20
    assert rate[2].tolist() == pytest.approx([1] * 6, abs=1e-5)
    assert rate[3].tolist() == pytest.approx([1, 0.75, 0.25, 0, 0, 0], abs=1e-5)  # begun before the window
    assert (rate[0] == 0).all()
    toy.view = "triplets"
    triplets = toy.batch(toy.rows("all"))
    assert isinstance(triplets, Triplets)
    assert triplets.length.tolist() == [2, 2, 1, 3]  # the rate that runs when the window opens is one more
    assert triplets.time[0].tolist() == pytest.approx([-1, 1 - 2 / end, 0])


def test_what_was_not_known_before_the_prediction_is_not_seen(tmp_path: Path) -> None:
    end = 60 * HOURS
    events: dict[int, list[Row]] = {
        1: [(10, "lactate", 2.0, end - 1)],
        2: [(10, "lactate", 2.0, end)],
        3: [(10, "lactate", 2.0, end), (10, "lactate", 2.0, 30), (1, "sodium", 140.0)],  # of two, the earlier one tells
        4: [(10, "norepinephrine", 1.0, end - 60), (10, "urine", 50.0, 20), (10, "urine", 50.0, end)],
    }
    toy = module(tmp_path / "t", events, spec(), stays=people(4, icu_minutes=6000))
    assert toy.samples["stay_id"].to_list() == [1, 3, 4]  # of the second nothing is known
    grid = toy.batch(toy.rows("all"))
    assert isinstance(grid, Grid)
    at = {v: spec().variables.index(v) for v in VARIABLES}
    assert grid.mask[:, :, at["lactate"]].sum(1).tolist() == [1, 1, 0]
    assert (
        grid.value[:2, :, at["lactate"]].tolist() == [pytest.approx([-0.4] * 6)] * 2
    )  # in the hour that it was measured in
    assert (grid.value[2, :, at["norepinephrine"]] * 20).tolist() == pytest.approx(
        [0, 0, 0, 0, 0, 1]
    )  # from when it is known
    assert (grid.value[2, :, at["urine"]] * 20 + 10).tolist() == pytest.approx([50] * 6)  # the volume that was known


def test_a_rate_runs_on_however_long_ago_it_was_set(tmp_path: Path) -> None:
    long_ago = -60 * (CARRY + 100)
    events: dict[int, list[Row]] = {
        1: [(long_ago, "norepinephrine", 0.4), (long_ago, "lactate", 3.0)],
        2: [(long_ago, "norepinephrine", 0.4), (-60 * CARRY - 5, "norepinephrine", 0.0)],  # and was stopped
        3: [(long_ago, "norepinephrine", 0.4), (0, "norepinephrine", 0.8)],  # set anew as the window opens
        4: [(long_ago, "norepinephrine", 0.4), (90, "norepinephrine", 0.2)],
    }
    stayed = {s: [*rows, (1, "sodium", 140.0)] for s, rows in events.items()}
    toy = module(tmp_path / "t", stayed, spec())
    at = spec().variables.index("norepinephrine")
    rate = toy.batch(toy.rows("all")).value[..., at] * 20  # type: ignore[union-attr]
    assert rate.tolist() == [
        pytest.approx([0.4] * 6, abs=1e-5),
        [0] * 6,
        pytest.approx([0.8] * 6, abs=1e-5),
        pytest.approx([0.4, 0.3, 0.2, 0.2, 0.2, 0.2], abs=1e-5),
    ]
    toy.view = "triplets"
    given = toy.batch(toy.rows("all"))
    assert isinstance(given, Triplets)
    assert given.length.tolist() == [1, 0, 1, 2]
    assert given.variable[:, 0].tolist() == [at + 1, 0, at + 1, at + 1]
    assert given.time[[0, 2, 3], 0].tolist() == [-1, -1, -1]
    assert (given.value[:, 0] * 20).tolist() == pytest.approx([0.4, 0, 0.8, 0.4])
    assert float(given.value[3, 1] * 20) == pytest.approx(0.2)


@pytest.mark.parametrize("view", ["grid", "triplets"])
@pytest.mark.parametrize("rolling", [False, True])
def test_nothing_at_or_after_the_prediction_reaches_a_batch(tmp_path: Path, view: str, rolling: bool) -> None:
    events = charted(6)
    told = spec(**({"name": "mortality_24h", "rolling": True} if rolling else {}))
    toy = module(tmp_path / "a", events, told)
    end = 60 * (HOURS + 4 if rolling else HOURS)
    rng = np.random.default_rng(5)
    named = zip([end, *rng.integers(end, 3000, 60)], rng.choice(VARIABLES, 61), strict=True)
    future: list[Row] = [(int(m), str(c), 1.5) for m, c in named]
    named = zip(
        rng.integers(-3000, end, 60), rng.choice(VARIABLES, 60), rng.choice([end, end + 1, 5000], 60), strict=True
    )
    future += [(int(m), str(c), 1.5, int(k)) for m, c, k in named]  # of before, but entered later
    past = {s: [e for e in found if max(e[0], e[3]) < end] for s, found in events.items()}
    assert all(len(past[s]) < len(found) for s, found in events.items())
    other = module(tmp_path / "b", {s: found + future for s, found in past.items()}, told)
    chosen = np.flatnonzero(toy.samples["minute"].to_numpy() <= end)
    assert len(chosen) == 6 * (5 if rolling else 1)
    toy.view = other.view = view
    same(toy.batch(chosen), other.batch(chosen))
    later = {s: [e for e in found if e[0] < end - 1] + [(end - 1, "heart_rate", 17.0)] for s, found in events.items()}
    changed = module(tmp_path / "c", later, told)
    changed.view = toy.view
    assert not torch.equal(toy.batch(chosen).value[-1], changed.batch(chosen).value[-1])  # type: ignore[arg-type]


def test_lengths_are_never_less_than_the_triplets(tmp_path: Path) -> None:
    toy = module(tmp_path / "t", charted(8), spec(name="mortality_24h", rolling=True))
    toy.view = "triplets"
    rows = toy.rows("all")
    given = toy.batch(rows)
    assert isinstance(given, Triplets)
    assert (toy._views.lengths(toy._stay[rows], toy._minute[rows]) >= given.length.numpy()).all()


def same(one: Grid | Triplets, other: Grid | Triplets) -> None:
    for name, a, b in zip(one._fields, one, other, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True, msg=name)


# ---- splits and scaler -----------------------------------------------------------------------------------------------------


def test_the_hash_of_the_split_changes_with_any_patient(tmp_path: Path) -> None:
    count = 60
    stays = people(count, patient_id=[f"p{i // 2}" for i in range(count)])
    charted: dict[int, list[Row]] = {s: [(10, "lactate", 1 + s / 100)] for s in range(1, count + 1)}
    toy = module(tmp_path / "t", charted, stays=stays, hours=6)
    every = [toy.rows(s) for s in ("train", "val", "test")]  # type: ignore[arg-type]
    assert sorted(np.concatenate(every).tolist()) == toy.rows("all").tolist() == list(range(count))
    assert module(tmp_path / "t", charted, stays=stays, hours=6).split_hash() == toy.split_hash()
    assert (
        module(tmp_path / "u", charted, stays=stays[1:], hours=6).split_hash() == toy.split_hash()
    )  # p0 has another stay
    assert module(tmp_path / "v", charted, stays=stays[2:], hours=6).split_hash() != toy.split_hash()
    assert module(tmp_path / "t", charted, stays=stays, hours=6, seed=1).split_hash() != toy.split_hash()
    with pytest.raises(ValueError, match=r"--data\.split dev is not known; choose train, val, test or all"):
        toy.rows("dev")  # type: ignore[arg-type]


def test_the_scaler_is_fitted_on_train_only(tmp_path: Path) -> None:
    events, stays = charted(60, per_stay=40), people(60)
    toy = module(tmp_path / "t", events, stays=stays, hours=6)
    test = set(toy.samples.filter(pl.col("split") == "test")["stay_id"])
    assert 0 < len(test) < 30
    altered = {
        s: [(m, c, v / 3 + 1, k) for m, c, v, k in found] + [(5, "crp", 9.0)] if s in test else found
        for s, found in events.items()
    }
    older = stays.with_columns(age=pl.when(pl.col("stay_id").is_in(test)).then(99.0).otherwise("age"))
    assert module(tmp_path / "u", altered, stays=older, hours=6).spec == toy.spec
    train = {
        s: altered[s] if s in test else [(m, c, v / 3 + 1, k) for m, c, v, k in found] for s, found in events.items()
    }
    assert module(tmp_path / "v", train, stays=stays, hours=6).spec != toy.spec


def test_the_scaler_holds_the_mean_and_deviation_of_the_hours_charted_in_train(tmp_path: Path) -> None:
    events, stays = charted(30), people(30)
    toy = module(tmp_path / "t", events, stays=stays, hours=6, statics=["age", "unit"])
    told = toy.spec
    assert told is not None
    raw = told._replace(
        center=[0.0] * len(told.variables), scale=[1e9 if BY_NAME[v].hourly == "sum" else 1e3 for v in told.variables]
    )
    found = defaultdict(list)
    train = toy.samples.filter(pl.col("split") == "train")
    for stay, minute in train.select("stay_id", "minute").iter_rows():
        value, mask, _ = plain_grid(events[stay], minute, raw)
        for row, charted_now in zip(value, mask, strict=True):
            for name, scale, v, m in zip(raw.variables, raw.scale, row, charted_now, strict=True):
                if m:
                    found[name].append(v * scale)
    derived = {
        "norepinephrine_equivalent",
        "norepinephrine_equivalent_change",
        "urine_rate",
    }  # not charted, so not known here
    assert [v for v in told.variables if v not in derived] == [n for n in NAMES if n in found]
    assert told.units == [BY_NAME[n].unit for n in told.variables]
    for name, center, scale in zip(told.variables, told.center, told.scale, strict=True):
        if name in derived:
            continue
        rate = BY_NAME[name].hourly == "rate"
        assert center == pytest.approx(0 if rate else np.mean(found[name]), rel=1e-4)
        assert scale == pytest.approx(
            np.sqrt(np.mean(np.square(found[name]))) if rate else np.std(found[name]), rel=1e-4
        )
    age = stays.filter(pl.col("stay_id").is_in(train["stay_id"].to_list()))["age"].to_numpy()
    assert told.statics[0] == "age"
    assert told.static_center[0] == pytest.approx(age.mean())
    assert told.static_scale[0] == pytest.approx(age.std())
    assert told.static_center[1:] == [0.0] * 7
    assert told.static_scale[1:] == [1.0] * 7


def test_a_scaler_of_large_values_with_small_spread_is_exact(tmp_path: Path) -> None:
    """Sums in float32 would lose the spread, and even the mean, of such values."""
    events: dict[int, list[Row]] = {
        s: [(60 * k, "platelets", 9000 + (s + k) % 2 / 2) for k in range(6)] for s in range(1, 200)
    }
    told = module(tmp_path / "t", events, hours=6).spec
    assert told is not None
    assert told.center == [pytest.approx(9000.25, abs=1e-6)]
    assert told.scale == [pytest.approx(0.25, rel=1e-4)]


def test_adopted_scaler_task_and_names_are_kept(tmp_path: Path) -> None:
    given = spec(name="mortality_24h", window=4)
    toy = module(tmp_path / "t", charted(8), given)
    assert toy.spec == given
    assert toy.task == Task("mortality_24h", HOURS, 4)
    assert set(toy.samples["minute"]) == {60 * HOURS}
    batch = toy.batch(toy.rows("all"))
    assert isinstance(batch, Grid)
    assert batch.value.shape == (8, 4, 6)
    assert toy.store is not None
    age = toy.store.stays["age"].to_numpy()
    np.testing.assert_allclose(batch.static[:, 0], np.clip((age - 50) / 10, -5, 5), rtol=1e-5)
    assert batch.static[:, 2].tolist() == [float(i % 3 == 0) for i in range(8)]
    permuted = given._replace(**{f: getattr(given, f)[::-1] for f in ("variables", "units", "center", "scale")})
    other = module(tmp_path / "t", charted(8), permuted).batch(toy.rows("all"))
    torch.testing.assert_close(other.value, batch.value.flip(2), atol=0, rtol=0)  # by name, whatever the order
    absent = given._replace(variables=["crp", *given.variables[1:]], units=["mg/L", *given.units[1:]])
    without = module(tmp_path / "t", charted(8), absent).batch(toy.rows("all"))
    assert isinstance(without, Grid)
    assert not without.value[..., 0].any()  # not charted here: the mean, never seen
    assert not without.mask[..., 0].any()
    assert (without.since[..., 0] == 1).all()


@pytest.mark.parametrize("change", [{"variables": ["crystal_ball", *VARIABLES[:5]]}, {"units": ["mmol/L"] * 6}])
def test_a_model_that_reads_other_variables_is_refused(tmp_path: Path, change: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"the model reads .* and these data do not have it so"):
        module(tmp_path / "t", charted(4), spec()._replace(**change))  # type: ignore[arg-type]


def test_without_treatment_the_model_sees_none_of_it(mimic: Path) -> None:
    full, less = MIMICIV(str(mimic)), MIMICIV(str(mimic), treatment=False)
    full.setup()
    less.setup()
    assert full.spec is not None
    assert less.spec is not None
    assert {"norepinephrine", "urine", "ventilation", "fio2", "peep"} <= set(full.spec.variables)
    assert less.spec.variables == [v for v in full.spec.variables if not BY_NAME[v].treatment]
    assert less.samples.equals(full.samples)


# ---- loaders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a machine with one core
@pytest.mark.parametrize("view", ["grid", "triplets"])
def test_an_epoch_has_every_sample_once_and_worker_processes_give_the_same(mimic: Path, view: str) -> None:
    alone = MIMICIV(str(mimic), batch_size=32)
    helped = MIMICIV(str(mimic), batch_size=32, num_workers=2)
    epochs = []
    for toy in (alone, helped):
        toy.view = view  # type: ignore[assignment]
        toy.setup()
        epochs.append(list(toy.train_dataloader()))
    rows = torch.cat([b.row for b in epochs[0]])
    assert sorted(rows.tolist()) == alone.rows("train").tolist()
    assert rows.tolist() != sorted(rows.tolist())
    assert len(epochs[0]) == len(epochs[1]) == -(-len(rows) // 32)
    for a, b in zip(*epochs, strict=True):
        assert torch.isfinite(a.value).all()
        same(a, b)
    for split in ("val", "test"):
        loader = alone.val_dataloader() if split == "val" else alone.test_dataloader()
        given = torch.cat([b.row for b in loader]).tolist()
        assert (given if view == "grid" else sorted(given)) == alone.rows(split).tolist()  # type: ignore[arg-type] # triplets: by length


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("view", ["grid", "triplets", "summary"])
def test_resident_samples_are_those_made_anew(view: Any, summary: bool, mimic: Path) -> None:
    data = MIMICIV(str(mimic))
    data.view, data.summary = view, summary
    data.setup()
    rows = data.rows("train")
    lengths = data._lengths(rows) if view == "triplets" else None
    kept = Resident(data.batch, rows, lengths, torch.device("cpu"))
    rng = np.random.default_rng(0)
    for some in (rows[:3], *(rng.choice(rows, 40, replace=False) for _ in range(12)), rows):
        for item in (some, (3, some)):
            same(kept[item], data.batch(some))
    assert kept.made.all()
    kept.make = None  # type: ignore[assignment]  # nothing is made twice
    same(kept[rows[::-1].copy()], data.batch(rows[::-1].copy()))
    assert data.spec is not None
    size = sum(t.numel() * t.element_size() for t in kept.kept.values()) / 2**20
    events = 0 if lengths is None else int(lengths.sum())
    planned = megabytes(data.spec, view, summary or view == "summary", len(rows), events)
    assert planned == pytest.approx(size, abs=8 * 2 * len(rows) / 2**20)  # row and length have 8 bytes


def test_samples_are_resident_where_they_fit_and_are_the_same_every_epoch(mimic: Path) -> None:
    class Fake:
        max_epochs, global_rank, world_size = 5, 0, 1
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        lightning_module = SimpleNamespace(view="grid", summary=False, spec=None)

    def kind(trainer: bool = True, **options: Any) -> tuple[type, type]:
        data = MIMICIV(str(mimic), **options)
        data.setup()
        data.trainer = Fake() if trainer else None  # type: ignore[assignment]
        return type(data.train_dataloader().dataset), type(data.val_dataloader().dataset)

    assert kind() == (Resident, Resident)
    assert kind(thinning=0.3) == (Samples, Resident)
    for options in ({"resident": 0.01}, {"resident": 0}, {"num_workers": 0}, {"trainer": False}):
        assert kind(**options) == (Samples, Samples)


def test_the_order_of_an_epoch_follows_from_seed_and_number() -> None:
    def order(seed: int | None, epoch: int) -> list[int]:
        batches = Batches(np.arange(100, 200), 32, seed)
        batches.set_epoch(epoch)
        assert len(batches) == len(list(batches)) == 4
        return np.concatenate(list(batches)).tolist()

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert sorted(order(0, 3)) == order(None, 3) == list(range(100, 200))


def test_a_batch_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    toy = module(tmp_path / "t", charted(8), spec())
    whole = toy.batch(toy.rows("all"))
    assert isinstance(whole, Grid)
    for i in toy.rows("all"):
        same(toy.batch(np.array([i])), Grid(*(t[i : i + 1] for t in whole)))


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    toy = module(tmp_path / "t", {1: [(10, "lactate", 2.0)]}, spec())
    empty = next(s for s in ("train", "val") if not len(toy.rows(s)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"no sample in split '{empty}'"):
        toy.train_dataloader() if empty == "train" else toy.val_dataloader()


def test_fewer_samples_than_processes_are_told(tmp_path: Path) -> None:
    toy = module(tmp_path / "t", charted(20), spec())
    count = len(toy.rows("train"))
    toy.world = count
    assert len(toy.train_dataloader()) == 1
    toy.world = count + 1
    with pytest.raises(
        ValueError,
        match=f"split 'train' of .* has {count} samples for {count + 1} processes: .* lower --trainer.devices",
    ):
        toy.train_dataloader()


@pytest.mark.parametrize("system", ["mimic", "eicu"])
def test_both_systems_give_batches_of_one_kind(system: str, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(system))
    toy = (MIMICIV if system == "mimic" else EICU)(root, task="mortality_24h", rolling=True, window=12, hours=12)
    toy.setup()
    assert toy.spec is not None
    batch = next(iter(toy.train_dataloader()))
    assert isinstance(batch, Grid)
    assert batch.value.shape == (64, 12, len(toy.spec.variables))
    assert torch.isfinite(batch.value).all()
    assert batch.value.abs().max() <= 5
    assert ((batch.since >= 0) & (batch.since <= 1)).all()
    assert torch.isin(batch.target, torch.tensor([0.0, 1.0])).all()
    assert abs(float(batch.value[batch.mask > 0].mean())) < 0.5


def test_concepts_are_stored_by_a_number_that_fits_a_byte() -> None:
    assert len(NAMES) < 256
    assert pl.Series(["heart_rate"], dtype=CONCEPT).to_physical().item() == NAMES.index("heart_rate")


# ---- the classes -------------------------------------------------------------------------------------------------------------


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data\.batch_size must be at least 1, found 0"):
        ToyData(tmp_path, people(4), {}, batch_size=0)
    with pytest.raises(AttributeError, match="has no attribute 'Hospice'"):
        datamodules.Hospice  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Hospice'; choose among EICU, MEDS, MIMICIV"):
        datamodules.module.Hospice  # noqa: B018


def test_of_joins_a_hospital_with_the_loaders(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="abstract"):
        ICUDataModule()  # type: ignore[abstract]
    made = of(Toy)
    assert made.__name__ == "Toy" and issubclass(made, Toy) and issubclass(made, ICUDataModule)
    assert made.__doc__ == Toy.__doc__
    toy = made(tmp_path / "t", people(8), of_stays(charted(8)), hours=6, batch_size=3, split="all")  # type: ignore[call-arg, arg-type]
    toy.adopt(spec())
    toy.setup()
    assert sum(len(b.row) for b in toy.predict_dataloader()) == 8
    assert len(toy.predict_dataloader()) == 3
    for name in datamodules.hospitals.__all__:
        kind = getattr(datamodules, name)
        assert issubclass(kind, getattr(datamodules.hospitals, name)) and issubclass(kind, ICUDataModule)


def test_setup_once_is_enough(tmp_path: Path) -> None:
    toy = module(tmp_path / "t", charted(8), spec())
    samples = toy.samples
    toy.setup("test")
    assert toy.samples is samples
    assert pickle.loads(pickle.dumps(toy.store)).value.tolist() == toy.store.value.tolist()
