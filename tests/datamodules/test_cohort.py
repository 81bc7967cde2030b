"""Who is in a cohort, when predictions are made, with which label, and in which split."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
from toy import Row, Toy, of_stays, people

from datamodules import schema
from datamodules.cohort import Cohort, rows_of
from datamodules.derive.sepsis import SUSPICION, Definition
from datamodules.derive.sofa import Inputs
from datamodules.hospitals import EICU, MIMICIV
from datamodules.hospitals.base import Hospital
from datamodules.hospitals.base import Tables as Kept
from datamodules.hospitals.eicu.sofa import sofa_inputs
from datamodules.tasks import Task, check_statics

LACTATE: list[Row] = [(10, "lactate", 2.0)]


def cohort(root: Path, stays: pl.DataFrame, charted: dict[int, list[Row]] | None = None, **options: Any) -> Cohort:
    found = charted or dict.fromkeys(stays["stay_id"], LACTATE)
    return Cohort(Toy(root, stays, of_stays(found), **{"hours": 6, **options}))


def stay_ids(made: Cohort) -> list[int]:
    return made.samples()[0]["stay_id"].unique().sort().to_list()


# ---- samples of one stay -----------------------------------------------------------------------------------------------------


def targets(
    name: str, hours: int, rolling: bool = False, labelled: bool = True, last: int = 0, **options: Any
) -> list[tuple[int, float | None]]:
    """Prediction minutes and targets of one stay, whose last event is at minute ``last``."""
    of_task = {k: options.pop(k) for k in ("lead", "after_onset", "window") if k in options}
    stays = people(1, **{k: [v] for k, v in options.items()}).with_row_index("stay").with_columns(last_minute=last)
    task = Task(name, hours, rolling=rolling, **of_task)  # type: ignore[arg-type]
    return task.samples(stays, labelled).select("minute", "target").rows()


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
    # the discharge is charted an hour after the death: no "survivor" is made of a dead patient
    assert targets("mortality_24h", 3, True, hospital_death=True, death_minute=300, icu_minutes=360) == [
        (180, 1),
        (240, 1),
    ]


@pytest.mark.parametrize(("name", "rolling"), [("mortality_24h", True), ("sepsis_onset", False)])
@pytest.mark.parametrize(
    ("last", "until"), [(-1, 180), (100, 180), (239, 240), (240, 300), (299, 300), (300, 360), (361, 420)]
)
def test_a_stay_without_an_end_goes_to_the_end_of_the_hour_of_its_last_event(
    name: str, rolling: bool, last: int, until: int
) -> None:
    lives = {"hospital_death": False, "death_minute": None, "icu_minutes": None}
    assert [m for m, _ in targets(name, 3, rolling, last=last, **lives)] == list(range(180, until + 1, 60))


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


def test_hours_at_and_after_the_onset_leave_the_risk_set_unless_they_are_asked_for() -> None:
    alive = {"death_minute": None, "icu_minutes": 300, "lead": 1}
    assert targets("sepsis_onset", 1, **alive, sepsis_minute=240) == [(60, 0), (120, 0), (180, 1)]
    assert targets("sepsis_onset", 1, **alive, sepsis_minute=241) == [(60, 0), (120, 0), (180, 0), (240, 1)]
    assert targets("sepsis_onset", 1, **alive, sepsis_minute=60) == []
    every = {**alive, "after_onset": True}
    assert targets("sepsis_onset", 1, **every, sepsis_minute=240) == [(60, 0), (120, 0), (180, 1), (240, 1), (300, 1)]
    assert targets("sepsis_onset", 1, **{**alive, "lead": 3}, sepsis_minute=241) == [
        (60, 0),
        (120, 1),
        (180, 1),
        (240, 1),
    ]
    # without outcomes nobody knows who is at risk: every hour is scored
    assert [m for m, _ in targets("sepsis_onset", 1, labelled=False, **alive, sepsis_minute=240)] == [
        60,
        120,
        180,
        240,
        300,
    ]


def test_impossible_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data\.task readmission is not known; choose among mortality_hospital"):
        Task("readmission", 24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--data\.hours must be at least 1, found 0"):
        Task("mortality_24h", 0, 24)
    with pytest.raises(ValueError, match=r"--data\.window must be at least 1 hour, found 0"):
        Task("mortality_24h", 24, 0)
    with pytest.raises(ValueError, match=r"--data\.lead must be at least 1 hour, found 0"):
        Task("sepsis_onset", 24, lead=0)
    with pytest.raises(
        ValueError, match=r"--data\.rolling applies to mortality_24h: choose --data\.task mortality_24h"
    ):
        Task("mortality_hospital", 24, rolling=True)
    untimed = people(8, death_minute=None)
    with pytest.raises(ValueError, match=r"mortality_24h needs times of death .*mortality_hospital"):
        cohort(tmp_path / "t", untimed, task="mortality_24h").samples()
    with pytest.raises(ValueError, match=r"sepsis_onset needs sepsis_minute .*ehr predict"):
        cohort(tmp_path / "t", untimed, task="sepsis_onset").samples()
    with pytest.raises(ValueError, match=r"no stay of .* is left after the rule 'age of at least 120 years'"):
        cohort(tmp_path / "t", untimed, min_age=120).samples()


def test_the_window_is_the_hours_before_the_prediction_or_a_day_of_an_hourly_task() -> None:
    assert Task("mortality_hospital", 30).window == 30
    assert Task("mortality_24h", 30).window == 30
    assert Task("mortality_24h", 3, rolling=True).window == Task("sepsis_onset", 1).window == 24
    assert Task("sepsis_onset", 1, window=8).window == 8


@pytest.mark.parametrize(
    "name", ["icu_minutes", "discharge_minute", "death_minute", "hospital_death", "icu_death", "sepsis_minute"]
)
def test_statics_that_look_ahead_are_refused(tmp_path: Path, name: str) -> None:
    said = rf"--data\.statics {name} is only known after the prediction time; choose among age"
    for statics in (["age", name], f"age,{name}"):
        with pytest.raises(ValueError, match=said):
            Toy(tmp_path, people(4), {}, statics=statics)


def test_unknown_statics_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--data\.statics shoe_size is not known; choose among age, sex, unit, admit_minute"
    ):
        check_statics(["shoe_size"])
    check_statics(["age", "sex", "unit", "admit_minute"])


# ---- who is in the cohort ----------------------------------------------------------------------------------------------------


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
    charted: dict[int, list[Row]] = dict.fromkeys(range(1, 9), LACTATE) | {
        9: [(360, "lactate", 2.0), (-1, "lactate", 2.0)]
    }
    made = cohort(tmp_path / "t", stays, charted)
    samples, attrition = made.samples()
    assert [row[1:4] for row in attrition.rows()] == [
        (9, 8, 2),
        (8, 7, 2),
        (6, 5, 2),
        (5, 5, 2),
        (4, 4, 2),
        (3, 3, 1),
        (2, 2, 1),
        (1, 1, 1),
    ]
    assert attrition["rule"].to_list() == [
        "all ICU stays",
        "ICU discharge after admission",
        "age of at least 18 years",
        "first ICU stay of the patient",
        "at least 6 h in the ICU",
        "alive 6 h after admission",
        "hospital outcome known",
        "any value before the prediction",
    ]
    assert samples["stay_id"].to_list() == [1]
    excluded_by = made.excluded()[0].to_list()
    assert excluded_by[0] is None
    assert excluded_by[3] == "at least 6 h in the ICU"
    assert excluded_by[8] == "any value before the prediction"
    assert len(excluded_by) == 9 and excluded_by.count(None) == 1


def test_a_stay_must_reach_the_prediction_and_one_without_an_end_reaches_the_hour_of_its_last_event(
    tmp_path: Path,
) -> None:
    stays = people(5, icu_minutes=[360, 359, None, None, None], hospital_death=[True] + [False] * 4, death_minute=None)
    charted: dict[int, list[Row]] = dict.fromkeys((1, 2), LACTATE)
    charted |= {3: [*LACTATE, (299, "lactate", 2.0)], 4: [*LACTATE, (300, "lactate", 2.0)], 5: [(5000, "lactate", 2.0)]}
    assert stay_ids(cohort(tmp_path / "t", stays, charted)) == [1, 4]
    assert stay_ids(cohort(tmp_path / "t", stays, charted, hours=5)) == [1, 2, 3, 4]


def test_only_a_value_that_was_known_before_the_prediction_keeps_a_stay(tmp_path: Path) -> None:
    charted: dict[int, list[Row]] = {
        1: [(359, "lactate", 2.0, 359)],
        2: [(359, "lactate", 2.0, 360)],  # known at the very minute of the prediction
        3: [(360, "lactate", 2.0)],
        4: [(0, "lactate", 2.0, 900), (1, "lactate", 2.0, 4)],
        5: [(-1, "lactate", 2.0)],  # before the window
        6: [(0, "lactate", 2.0, 900), (1, "lactate", 2.0, 901)],
    }
    assert stay_ids(cohort(tmp_path / "t", people(6), charted)) == [1, 4]


def test_an_hourly_task_keeps_a_stay_whose_first_hours_are_empty(tmp_path: Path) -> None:
    stays = people(2, icu_minutes=[600, 600])
    charted: dict[int, list[Row]] = {1: [(500, "lactate", 2.0)], 2: [(700, "lactate", 2.0)]}
    made, _ = cohort(tmp_path / "t", stays, charted, task="mortality_24h", rolling=True).samples()
    assert made["stay_id"].unique().to_list() == [1]
    assert made["minute"].to_list() == [360, 420, 480, 540, 600]


# ---- splits ------------------------------------------------------------------------------------------------------------------


def split_of(made: Cohort, group: str = "patient_id") -> dict[str, str]:
    samples = made.samples()[0].join(made.store.stays.select("stay_id", "hospital_id"), on="stay_id")
    pairs = samples.select(group, "split").unique()
    assert pairs[group].is_unique().all()  # all stays of a patient, or hospital, are in one split
    return dict(pairs.iter_rows())


def test_splits_are_by_patient_and_depend_on_the_patient_alone(tmp_path: Path) -> None:
    count = 400
    stays = people(count, patient_id=[f"p{i // 2}" for i in range(count)])
    made = cohort(tmp_path / "t", stays)
    samples = made.samples()[0]
    every = [rows_of(samples, s, made.hospital) for s in ("train", "val", "test")]  # type: ignore[arg-type]
    assert (
        sorted(np.concatenate(every).tolist()) == rows_of(samples, "all", made.hospital).tolist() == list(range(count))
    )
    shares = [len(rows) / count for rows in every]
    assert 0.62 < shares[0] < 0.78
    assert 0.09 < shares[1] < 0.21
    assert 0.09 < shares[2] < 0.21
    fewer = cohort(tmp_path / "u", stays[::3].reverse())
    assert split_of(fewer).items() <= split_of(made).items()
    assert split_of(cohort(tmp_path / "t", stays)) == split_of(made)
    assert split_of(cohort(tmp_path / "t", stays, seed=1)) != split_of(made)
    with pytest.raises(ValueError, match=r"--data\.split dev is not known; choose train, val, test or all"):
        rows_of(samples, "dev", made.hospital)  # type: ignore[arg-type]


def test_folds_divide_the_patients_of_the_training_split(tmp_path: Path) -> None:
    stays = people(400, patient_id=[f"p{i // 2}" for i in range(400)])
    options = {"first_stay": False}
    train = {
        stay
        for stay, split in split_of(cohort(tmp_path / "t", stays, **options), "stay_id").items()
        if split == "train"
    }
    scored: list[int] = []
    for k in range(1, 6):
        made = cohort(tmp_path / "t", stays, fold=f"{k}/5", **options)
        samples, attrition = made.samples()
        assert set(samples["stay_id"]) == train
        assert attrition["rule"][-1] == f"in the training split, of which fold {k}/5 is val"
        assert attrition["stays"][-1] == len(train)
        assert set(split_of(made).values()) == {"train", "val"}  # by patient
        scored += samples.filter(split="val")["stay_id"].to_list()
    assert sorted(scored) == sorted(train)  # each once
    for wrong in ("0/5", "6/5", "1/1", "1", "a/b"):
        with pytest.raises(ValueError, match=r"--data\.fold must be K/N"):
            cohort(tmp_path / "t", stays, fold=wrong)


def test_splits_by_hospital_keep_hospitals_and_patients_apart(tmp_path: Path) -> None:
    """A patient's stays outside the first hospital are left out, and counted."""
    count = 240
    stays = people(
        count, patient_id=[f"p{i % 100}" for i in range(count)], stay_number=[i // 100 + 1 for i in range(count)]
    )
    options = {"split_by": "hospital", "first_stay": False}
    made = cohort(tmp_path / "t", stays, **options)
    hospitals = split_of(made, "hospital_id")
    assert set(hospitals.values()) == {"train", "val", "test"}
    split_of(made)
    first = {row["patient_id"]: row["hospital_id"] for row in stays.reverse().iter_rows(named=True)}
    kept = [row["stay_id"] for row in stays.iter_rows(named=True) if row["hospital_id"] == first[row["patient_id"]]]
    assert 100 <= len(kept) < count
    assert stay_ids(made) == kept
    attrition = made.excluded()[1]
    rule = attrition.row(by_predicate=pl.col("rule").str.starts_with("in the patient's first hospital"), named=True)
    assert (rule["stays"], rule["patients"]) == (len(kept), 100)
    assert stay_ids(cohort(tmp_path / "t", stays, first_stay=False)) == list(range(1, count + 1))
    few = people(120, hospital_id="one")
    with pytest.raises(ValueError, match=r"--data\.split_by hospital needs at least 10 hospitals, found 1"):
        cohort(tmp_path / "u", few, **options).samples()


# ---- sepsis ------------------------------------------------------------------------------------------------------------------


class Septic(Toy):
    """A toy whose suspicions are given; its SOFA is eICU's, from the events alone."""

    name = "Septic"
    definitions: ClassVar = {"given": Definition("as given", antibiotics=("any",)), "other": Definition("none")}

    def __init__(
        self, root: Path, stays: pl.DataFrame, charted: Kept, suspected: dict[int, tuple[int, int]], **options: Any
    ):
        super().__init__(root, stays, charted, **options)
        self.suspected = suspected  # stay_id -> suspected_minute, known_minute

    def sofa_inputs(self, tables: Kept, events: pl.LazyFrame, stays: pl.DataFrame, before: int | None = None) -> Inputs:
        apache = pl.LazyFrame(schema={"stay_id": pl.Int64(), "intubated": pl.Int64()})
        return sofa_inputs({"apacheApsVar": apache}, events, stays, before)

    def suspicion(self, tables: Kept, stays: pl.DataFrame, definition: Definition) -> pl.DataFrame:
        rows = [
            (s, *minutes) for s, minutes in self.suspected.items() if s in stays["stay_id"] and definition.antibiotics
        ]
        frame = pl.DataFrame(rows, schema=["stay_id", "suspected_minute", "known_minute"], orient="row")
        frame = frame.with_columns(suspected_infection=True, antibiotic_minute="suspected_minute")
        return schema.conform(frame, SUSPICION, "suspicion")


def failing(at: int, known: int | None = None) -> list[Row]:
    """Kidneys that fail: two points of SOFA."""
    return [*LACTATE, (at, "creatinine", 2.5, known)]


def test_a_septic_cohort_holds_only_who_was_known_to_be_septic_strictly_before_the_prediction(tmp_path: Path) -> None:
    charted: dict[int, list[Row]] = {s: failing(250) for s in range(1, 7)}
    charted |= {
        7: failing(250, 359),
        8: failing(250, 360),
        9: failing(300),
        10: failing(301),
        11: failing(360),
        12: LACTATE,
    }
    suspected = dict.fromkeys(range(1, 13), (30, 40)) | {
        2: (30, 359),
        3: (30, 360),
        4: (359, 359),
        5: (360, 360),
        6: (400, 30),
    }
    hospital = Septic(tmp_path, people(12), of_stays(charted), suspected, hours=6, sepsis=True)
    made = Cohort(hospital)
    # known a minute before the prediction: yes; at the very minute: no; an hour of SOFA that ends then is not over
    assert stay_ids(made) == [1, 2, 4, 6, 7, 9]
    rule = made.excluded()[1].row(by_predicate=pl.col("rule").str.starts_with("Sepsis-3"), named=True)
    assert (rule["rule"], rule["stays"]) == ("Sepsis-3 (given) known before hour 6", 6)
    # the retrospective table looks at the whole record
    assert pl.read_parquet(made.sepsis_tables()["sepsis3"])["stay_id"].to_list() == list(range(1, 12))
    later = Septic(tmp_path, people(12), of_stays(charted), suspected, hours=7, sepsis=True)
    assert stay_ids(Cohort(later)) == list(range(1, 12))
    with pytest.raises(
        ValueError, match=r"no stay of .* is left after the rule 'Sepsis-3 \(other\) known before hour 6'"
    ):
        Cohort(
            Septic(tmp_path, people(12), of_stays(charted), suspected, hours=6, sepsis=True, definition="other")
        ).samples()


def test_what_comes_after_the_prediction_moves_nobody_into_or_out_of_a_septic_cohort(tmp_path: Path) -> None:
    charted: dict[int, list[Row]] = {s: failing(60 * s) for s in range(1, 9)}
    suspected = dict.fromkeys(range(1, 9), (30, 40))
    before = stay_ids(Cohort(Septic(tmp_path / "a", people(8), of_stays(charted), suspected, hours=6, sepsis=True)))
    more = {s: [*rows, (360, "creatinine", 9.0), (30, "creatinine", 0.5, 360)] for s, rows in charted.items()}
    after = Cohort(Septic(tmp_path / "b", people(8), of_stays(more), suspected, hours=6, sepsis=True))
    assert stay_ids(after) == before == [1, 2, 3, 4, 5]


def test_a_hospital_without_antibiotics_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Toy carries no antibiotics and cultures: .* leave out --data\.sepsis"):
        cohort(tmp_path / "t", people(4), sepsis=True).samples()
    with pytest.raises(ValueError, match="no antibiotics and cultures"):
        cohort(tmp_path / "t", people(4)).sepsis_tables()


def test_a_definition_that_a_hospital_does_not_have_is_refused(tmp_path: Path) -> None:
    made = Cohort(
        Septic(tmp_path, people(2), of_stays({1: LACTATE}), {}, hours=6, sepsis=True, definition="mimic_code")
    )
    with pytest.raises(ValueError, match="Septic has none of that name; choose one of given, other"):
        made.samples()


SYSTEMS: dict[str, type[Hospital]] = {"mimic": MIMICIV, "eicu": EICU}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("after_onset", [False, True])
def test_onset_of_sepsis_in_both_systems(system: str, after_onset: bool, request: pytest.FixtureRequest) -> None:
    """Every hour of every stay, against a loop over the retrospective table."""
    hospital = SYSTEMS[system](
        str(request.getfixturevalue(system)),
        task="sepsis_onset",
        hours=4,
        lead=5,
        after_onset=after_onset,  # type: ignore[arg-type]
    )
    made = Cohort(hospital)
    samples, _ = made.samples()
    onset = dict(made.onset().iter_rows())
    assert 10 < len(onset) < 290
    found = {(s, m): t for s, m, t in samples.select("stay_id", "minute", "target").iter_rows()}
    assert samples["minute"].min() == 240
    for (stay, minute), target in found.items():
        begins = onset.get(stay)
        assert target == float(begins is not None and minute >= begins - 300)
        assert after_onset or begins is None or minute < begins
    last = dict(samples.group_by("stay_id").agg(pl.col("minute").max()).iter_rows())
    included = made.store.stays.with_columns(event=made.store.last_minutes()).filter(made.excluded()[0].is_null())
    for row in included.iter_rows(named=True):
        stay, end, death = row["stay_id"], row["icu_minutes"], row["death_minute"]
        until = row["event"] // 60 * 60 + 60 if end is None else end // 60 * 60
        until = until if death is None else min(until, (death - 1) // 60 * 60)
        if stay in onset and not after_onset:
            until = min(until, (onset[stay] - 1) // 60 * 60)
        assert last.get(stay, 0) == until or (until < 240 and stay not in last)
    assert 0 < samples["target"].mean() < 0.5
    assert made.store.stays["sepsis_minute"].null_count() == len(made.store.stays)  # a label, never in the store


@pytest.mark.parametrize("system", SYSTEMS)
def test_septic_cohorts_of_both_systems(system: str, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(system))
    made = Cohort(SYSTEMS[system](root, sepsis=True, hours=12))
    known = made.known_septic()
    assert known["known_minute"].max() < 720
    assert known["onset_minute"].max() < 720
    everyone = stay_ids(Cohort(SYSTEMS[system](root, hours=12)))
    assert stay_ids(made) == sorted(set(everyone) & set(known["stay_id"]))
    assert 0 < len(stay_ids(made)) < len(everyone)
