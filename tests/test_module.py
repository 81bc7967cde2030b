"""Batches, splits, scaler and samples, against implementations that go through the rows one by one in plain Python."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from datamodules.batch import Grid, Spec, Triplets
from datamodules.batches import Batches
from datamodules.concepts import BY_NAME, CONCEPT, NAMES

from datamodules import schema
from datamodules.hospitals import EICU, MIMICIV
from datamodules.module import ICUDataModule
from datamodules.tasks import Task, check_statics
from datamodules.views import CARRY

HOURS = 6
VARIABLES = ["heart_rate", "temperature", "lactate", "urine", "norepinephrine", "vasopressin"]
Event = tuple[int, str, float]  # minute, concept, value


class Toy(ICUDataModule):
    """A hospital system given as two tables in memory."""

    name = "Toy"

    def __init__(self, root: Path, stays: pl.DataFrame, events: dict[int, list[Event]], **kwargs: Any):
        root.mkdir(exist_ok=True)
        super().__init__(str(root), cache=str(root), **kwargs)
        self.given, self.charted = schema.conform(stays, schema.STAYS, "toy"), events

    def raw_files(self) -> list[Path]:
        return []

    def stays(self) -> pl.DataFrame:
        return self.given

    def events(self, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
        rows = [
            (stay, minute, concept, value, None)
            for stay, found in self.charted.items()
            for minute, concept, value in found
        ]
        return {"events": pl.LazyFrame(rows, schema=schema.RAW_EVENTS, orient="row")}


def people(count: int, **columns: Any) -> pl.DataFrame:
    rng = np.random.default_rng(count)
    given = {
        "stay_id": np.arange(count) + 1,
        "patient_id": [f"p{i}" for i in range(count)],
        "hospital_id": [f"h{i % 12}" for i in range(count)],
        "stay_number": 1,
        "age": rng.uniform(20, 90, count).round(),
        "sex": [float(i % 2) for i in range(count)],
        "unit": ["medical" if i % 3 else "neuro" for i in range(count)],
        "admit_minute": -rng.integers(0, 3000, count),
        "icu_minutes": 60 * 60,
        "death_minute": [2000 + 10 * i if i % 4 == 0 else None for i in range(count)],
        "hospital_death": [i % 4 == 0 for i in range(count)],
    }
    return pl.DataFrame({**given, **columns})


def charted(count: int, seed: int = 0, per_stay: int = 160) -> dict[int, list[Event]]:
    """Random events, many of them at whole hours: on the edges of windows and of hours."""
    rng = np.random.default_rng(seed)
    found: dict[int, list[Event]] = {}
    for stay in range(1, count + 1):
        minute = rng.integers(-30 * 60, 20 * 60, per_stay)
        minute = np.where(rng.random(per_stay) < 0.3, minute // 60 * 60, minute)
        concept = rng.choice([*VARIABLES, "sodium"], per_stay)
        low = np.array([BY_NAME[c].low for c in concept])
        high = np.minimum([BY_NAME[c].high for c in concept], 200)
        value = np.float32(low + rng.random(per_stay) * (high - low)).astype(float)
        value = np.where((rng.random(per_stay) < 0.3) & (low == 0), 0, value)
        found[stay] = list(zip(minute.tolist(), concept.tolist(), value.tolist(), strict=True))
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


def module(root: Path, events: dict[int, list[Event]], adopted: Spec | None = None, **kwargs: Any) -> Toy:
    columns = kwargs.pop("stays", None)
    toy = Toy(root, people(len(events)) if columns is None else columns, events, **kwargs)
    if adopted is not None:
        toy.adopt(adopted)
    toy.setup()
    return toy


# ---- the plain implementations ---------------------------------------------------------------------------------------------


def plain_grid(events: list[Event], end: int, told: Spec) -> tuple[list, list, list]:
    """(T, F) value, mask and since, as documented in ``batch.Grid``, one cell after the other."""
    hours, start = told.hours, end - 60 * (told.hours + CARRY)
    values, masks, sinces = [], [], []
    for hour in range(hours):
        rows: tuple[list, list, list] = ([], [], [])
        for variable, center, scale in zip(told.variables, told.center, told.scale, strict=True):
            by_hour = defaultdict(list)
            for minute, concept, value in sorted(events):
                if concept == variable and start <= minute < end:
                    by_hour[math.floor((minute - start) / 60) - CARRY].append((minute, value))
            seen = [h for h in by_hour if h <= hour]
            if BY_NAME[variable].hourly == "rate":  # minute by minute: the last value that was set
                each = []
                for at in range(start + 60 * (CARRY + hour), start + 60 * (CARRY + hour + 1)):
                    before = [
                        value
                        for minute, concept, value in sorted(events)
                        if concept == variable and start <= minute <= at
                    ]
                    each.append(before[-1] if before else 0)
                value = sum(each) / 60
            elif seen:
                found = [v for _, v in by_hour[max(seen)]]
                value = sum(found) / (1 if BY_NAME[variable].hourly == "sum" else len(found))
            else:
                value = center
            rows[0].append(min(max((value - center) / scale, -5), 5))
            rows[1].append(float(hour in by_hour))
            rows[2].append(min((hour - max(seen)) / hours, 1) if seen else 1.0)
        for table, row in zip((values, masks, sinces), rows, strict=True):
            table.append(row)
    return values, masks, sinces


def plain_triplets(events: list[Event], end: int, told: Spec) -> list[tuple[float, int, float]]:
    start = end - 60 * told.hours
    order = sorted((m, NAMES.index(c), v, c) for m, c, v in set(events) if start <= m < end and c in told.variables)
    return [
        (
            2 * (minute - start) / (end - start) - 1,
            told.variables.index(concept) + 1,
            min(
                max(
                    (value - told.center[told.variables.index(concept)]) / told.scale[told.variables.index(concept)], -5
                ),
                5,
            ),
        )
        for minute, _, value, concept in order
    ]


def as_stored(events: list[Event]) -> list[Event]:
    return sorted({(m, c, v) for m, c, v in events})


@pytest.mark.parametrize("rolling", [False, True], ids=["once", "every hour"])
def test_grid_equals_the_plain_one(tmp_path: Path, rolling: bool) -> None:
    events = charted(8)
    task = {"name": "mortality_24h", "rolling": True} if rolling else {}
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
        value, mask, since = plain_grid(as_stored(events[stay]), minute, told)
        torch.testing.assert_close(batch.mask[i], torch.tensor(mask))
        torch.testing.assert_close(batch.since[i], torch.tensor(since))
        torch.testing.assert_close(batch.value[i], torch.tensor(value), atol=2e-5, rtol=1e-5)
    assert 0 < batch.mask.mean() < 1
    assert (batch.since == 1).any()


def test_triplets_equal_the_plain_ones(tmp_path: Path) -> None:
    events = charted(8)
    events[3] = [(-600, "lactate", 2.0), (0, "sodium", 140.0)]  # nothing that the model knows inside the window
    events[4] = [(60 * HOURS - 1, "lactate", 2.0)]
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
    events: dict[int, list[Event]] = {
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
    assert grid.value[2, :, at["lactate"]].tolist() == pytest.approx(
        [-0.4] * 6
    )  # CARRY hours before the window: the last to be carried
    assert grid.value[2, :, at["heart_rate"]].tolist() == [0] * 6  # a minute earlier: as if never charted
    rate = grid.value[:, :, at["norepinephrine"]] * 20
    assert rate[2].tolist() == pytest.approx([1] * 6, abs=1e-5)
    assert rate[3].tolist() == pytest.approx([1, 0.75, 0.25, 0, 0, 0], abs=1e-5)  # begun before the window
    assert (rate[0] == 0).all()
    toy.view = "triplets"
    triplets = toy.batch(toy.rows("all"))
    assert isinstance(triplets, Triplets)
    assert triplets.length.tolist() == [2, 2, 1, 2]
    assert triplets.time[0].tolist() == pytest.approx([-1, 1 - 2 / end])


@pytest.mark.parametrize("view", ["grid", "triplets"])
@pytest.mark.parametrize("rolling", [False, True])
def test_nothing_at_or_after_the_prediction_reaches_a_batch(tmp_path: Path, view: str, rolling: bool) -> None:
    events = charted(6)
    told = spec(**({"name": "mortality_24h", "rolling": True} if rolling else {}))
    toy = module(tmp_path / "a", events, told)
    end = 60 * (HOURS + 4 if rolling else HOURS)
    rng = np.random.default_rng(5)
    future = [
        (int(m), str(c), 1.5)
        for m, c in zip([end, *rng.integers(end, 3000, 60)], rng.choice(VARIABLES, 61), strict=True)
    ]
    other = module(tmp_path / "b", {s: [e for e in found if e[0] < end] + future for s, found in events.items()}, told)
    chosen = np.flatnonzero(toy.samples["minute"].to_numpy() <= end)
    assert len(chosen) == 6 * (5 if rolling else 1)
    toy.view = other.view = view  # type: ignore[assignment]
    same(toy.batch(chosen), other.batch(chosen))
    later = {s: [e for e in found if e[0] < end - 1] + [(end - 1, "heart_rate", 17.0)] for s, found in events.items()}
    changed = module(tmp_path / "c", later, told)
    changed.view = toy.view
    assert not torch.equal(toy.batch(chosen).value[-1], changed.batch(chosen).value[-1])  # type: ignore[arg-type]


def same(one: Grid | Triplets, other: Grid | Triplets) -> None:
    for name, a, b in zip(one._fields, one, other, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True, msg=name)


# ---- samples ---------------------------------------------------------------------------------------------------------------


def targets(name: str, hours: int, rolling: bool = False, labelled: bool = True, **columns: Any) -> list[tuple]:
    stays = schema.conform(people(1, **{k: [v] for k, v in columns.items()}), schema.STAYS, "toy")
    samples = Task(name, hours, hours, rolling).samples(stays.with_row_index("stay"), labelled)  # type: ignore[arg-type]
    return samples.select("minute", "target").rows()


def test_mortality_24h_is_death_after_t_and_up_to_t_plus_24_hours() -> None:
    died = {"hospital_death": True, "icu_minutes": 6000}
    end = 24 * 60
    assert targets("mortality_24h", 24, **died, death_minute=end + 1) == [(end, 1)]
    assert targets("mortality_24h", 24, **died, death_minute=2 * end) == [(end, 1)]
    assert targets("mortality_24h", 24, **died, death_minute=2 * end + 1) == [(end, 0)]
    assert targets("mortality_24h", 24, hospital_death=False, death_minute=None) == [(end, 0)]
    assert targets("mortality_24h", 24, hospital_death=None, death_minute=None) == [(end, None)]


def test_rolling_predictions_go_on_while_the_patient_lives_and_stays() -> None:
    lives = {"hospital_death": False, "death_minute": None}
    assert [m for m, _ in targets("mortality_24h", 3, True, **lives, icu_minutes=359)] == [180, 240, 300]
    assert [m for m, _ in targets("mortality_24h", 3, True, **lives, icu_minutes=360)] == [180, 240, 300, 360]
    assert targets("mortality_24h", 3, True, **lives, icu_minutes=None) == [(180, 0)]
    # the discharge is charted an hour after the death: no "survivor" is made of a dead patient
    assert targets("mortality_24h", 3, True, hospital_death=True, death_minute=300, icu_minutes=360) == [
        (180, 1),
        (240, 1),
    ]


def test_mortality_hospital_and_sepsis_targets() -> None:
    assert targets("mortality_hospital", 24, hospital_death=True) == [(1440, 1)]
    assert targets("mortality_hospital", 24, hospital_death=False) == [(1440, 0)]
    assert targets("mortality_hospital", 24, hospital_death=None) == [(1440, None)]
    alive = {"death_minute": None, "icu_minutes": 300}
    assert targets("sepsis_onset", 1, **alive, sepsis_minute=540) == [(60, 0), (120, 0), (180, 1), (240, 1), (300, 1)]
    assert targets("sepsis_onset", 1, **alive, sepsis_minute=541)[2] == (180, 0)
    assert targets("sepsis_onset", 4, **alive, sepsis_minute=None) == [(240, 0), (300, 0)]
    assert targets("sepsis_onset", 4, labelled=False, **alive, sepsis_minute=None) == [(240, None), (300, None)]
    assert targets("sepsis_onset", 1, **alive, sepsis_minute=None, first_minute=180) == [(240, 0), (300, 0)]


def test_impossible_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data\.hours must be at least 1, found 0"):
        Task("mortality_24h", 0, 24)
    with pytest.raises(ValueError, match=r"--data\.window must be at least 1 hour, found 0"):
        Task("mortality_24h", 24, 0)
    with pytest.raises(ValueError, match=r"--data\.batch_size must be at least 1, found 0"):
        Toy(tmp_path, people(4), {}, batch_size=0)
    untimed = people(8, death_minute=None)
    with pytest.raises(ValueError, match=r"mortality_24h needs times of death .*mortality_hospital"):
        module(tmp_path / "t", charted(8), stays=untimed, task="mortality_24h", hours=6)
    with pytest.raises(ValueError, match=r"sepsis_onset needs sepsis_minute .*ehr predict"):
        module(tmp_path / "t", charted(8), stays=untimed, task="sepsis_onset", hours=6)
    with pytest.raises(ValueError, match=r"no stay of .* is left after the rule 'age of at least 120 years'"):
        module(tmp_path / "t", charted(8), min_age=120, hours=6)


@pytest.mark.parametrize(
    "name", ["icu_minutes", "discharge_minute", "death_minute", "hospital_death", "icu_death", "sepsis_minute"]
)
def test_statics_that_look_ahead_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"--data\.statics {name} is only known after the prediction time; choose among age"
    ):
        Toy(tmp_path, people(4), {}, statics=["age", name])


def test_unknown_statics_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--data\.statics shoe_size is not known; choose among age, sex, unit, admit_minute"
    ):
        check_statics(["shoe_size"])
    check_statics(["age", "sex", "unit", "admit_minute"])


def test_attrition_counts_what_each_rule_leaves(tmp_path: Path) -> None:
    stays = people(
        9,
        patient_id=["a", "a", "b", "c", "d", "e", "f", "g", "h"],
        stay_number=[1, 2, 1, 1, 1, 1, 1, 1, 1],
        age=[50, 50, 17, 50, 50, 50, None, 50, 50],
        icu_minutes=[600, 600, 600, 300, 600, 0, 600, 600, 600],
        hospital_death=[True, False, False, False, True, False, False, None, False],
        death_minute=[2000, None, None, None, 360, None, None, None, None],
    )
    events: dict[int, list[Event]] = {s: [(10, "lactate", 2.0)] for s in range(1, 9)} | {
        9: [(360, "lactate", 2.0), (-1, "lactate", 2.0)]
    }
    toy = Toy(tmp_path / "t", stays, events, hours=6)
    toy.splits = lambda stays: pl.Series(["train"] * len(stays))  # type: ignore[method-assign]
    toy.setup()
    counts = toy.attrition.rows()
    assert [row[1:4] for row in counts] == [
        (9, 8, 2),
        (8, 7, 2),
        (6, 5, 2),
        (5, 5, 2),
        (4, 4, 2),
        (3, 3, 1),
        (2, 2, 1),
        (1, 1, 1),
    ]
    assert [row[0] for row in counts] == [
        "all ICU stays",
        "ICU discharge after admission",
        "age of at least 18 years",
        "first ICU stay of the patient",
        "at least 6 h in the ICU",
        "alive 6 h after admission",
        "hospital outcome known",
        "any value before the prediction",
    ]
    assert toy.samples["stay_id"].to_list() == [1]


def test_an_hourly_task_keeps_a_stay_whose_first_hours_are_empty(tmp_path: Path) -> None:
    stays = people(2, icu_minutes=[600, 600])
    events: dict[int, list[Event]] = {1: [(500, "lactate", 2.0)], 2: [(700, "lactate", 2.0)]}
    toy = module(tmp_path / "t", events, spec(name="mortality_24h", rolling=True), stays=stays)
    assert toy.samples["stay_id"].unique().to_list() == [1]
    assert toy.samples["minute"].to_list() == [360, 420, 480, 540, 600]


# ---- splits and scaler -----------------------------------------------------------------------------------------------------


def split_of(toy: Toy) -> dict[str, str]:
    return dict(toy.samples.select("patient_id", "split").iter_rows())


def test_splits_are_by_patient_and_depend_on_the_patient_alone(tmp_path: Path) -> None:
    count = 400
    stays = people(count, patient_id=[f"p{i // 2}" for i in range(count)])
    events: dict[int, list[Event]] = {s: [(10, "lactate", 1 + s / 100)] for s in range(1, count + 1)}
    toy = module(tmp_path / "t", events, stays=stays, hours=6)
    pairs = toy.samples.select("patient_id", "split").unique()
    assert pairs["patient_id"].is_unique().all()  # both stays of a patient are in one split
    every = np.concatenate([toy.rows(s) for s in ("train", "val", "test")])  # type: ignore[arg-type]
    assert sorted(every.tolist()) == toy.rows("all").tolist() == list(range(count))
    share = {s: len(toy.rows(s)) / count for s in ("train", "val", "test")}  # type: ignore[arg-type]
    assert 0.62 < share["train"] < 0.78
    assert 0.09 < share["val"] < 0.21
    assert 0.09 < share["test"] < 0.21
    fewer = module(tmp_path / "u", events, stays=stays[::3].reverse(), hours=6)
    assert split_of(fewer).items() <= split_of(toy).items()
    again = module(tmp_path / "t", events, stays=stays, hours=6)
    assert again.split_hash() == toy.split_hash()
    assert fewer.split_hash() != toy.split_hash()
    other = module(tmp_path / "t", events, stays=stays, hours=6, seed=1)
    assert split_of(other) != split_of(toy)
    assert other.split_hash() != toy.split_hash()
    with pytest.raises(ValueError, match=r"--data\.split dev is not known; choose train, val, test or all"):
        toy.rows("dev")  # type: ignore[arg-type]


def test_splits_by_hospital_keep_hospitals_apart(tmp_path: Path) -> None:
    events = charted(120, per_stay=5)
    toy = module(tmp_path / "t", events, spec(), split_by="hospital")
    assert toy.store is not None
    where = (
        toy.samples.join(toy.store.stays.select("stay_id", "hospital_id"), on="stay_id")
        .select("hospital_id", "split")
        .unique()
    )
    assert where["hospital_id"].is_unique().all()
    assert where["split"].n_unique() > 1
    few = people(120).with_columns(hospital_id=pl.lit("one"))
    with pytest.raises(ValueError, match=r"--data\.split_by hospital needs at least 10 hospitals, found 1"):
        module(tmp_path / "u", events, spec(), stays=few, split_by="hospital")


def test_the_scaler_is_fitted_on_train_only(tmp_path: Path) -> None:
    events, stays = charted(60, per_stay=40), people(60)
    toy = module(tmp_path / "t", events, stays=stays, hours=6)
    test = set(toy.samples.filter(pl.col("split") == "test")["stay_id"])
    assert 0 < len(test) < 30
    altered = {
        s: [(m, c, v / 3 + 1) for m, c, v in found] + [(5, "crp", 9.0)] if s in test else found
        for s, found in events.items()
    }
    older = stays.with_columns(age=pl.when(pl.col("stay_id").is_in(test)).then(99.0).otherwise("age"))
    assert module(tmp_path / "u", altered, stays=older, hours=6).spec == toy.spec
    train = {s: altered[s] if s in test else [(m, c, v / 3 + 1) for m, c, v in found] for s, found in events.items()}
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
        value, mask, _ = plain_grid(as_stored(events[stay]), minute, raw)
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
    events: dict[int, list[Event]] = {
        s: [(60 * k, "platelets", 9000 + (s + k) % 2 / 2) for k in range(6)] for s in range(1, 200)
    }
    told = module(tmp_path / "t", events, hours=6).spec
    assert told is not None
    assert told.center == [pytest.approx(9000.25, abs=1e-6)]
    assert told.scale == [pytest.approx(0.25, rel=1e-4)]


def test_adopted_scaler_task_and_names_are_kept(tmp_path: Path) -> None:
    given = spec(name="mortality_24h", window=4)
    toy = module(tmp_path / "t", charted(8), given, hours=20, task="mortality_hospital")
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
