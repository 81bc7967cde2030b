"""Treatment response: what is derived from infusions, fluids and urine, each with a table before and after."""

import doctest
from pathlib import Path

import polars as pl
import pytest
from datamodules.concepts import BY_NAME, CONCEPT, CONCEPTS
from datamodules.treatment import NOREPINEPHRINE_EQUIVALENT, derived, estimated_events, volume_events

from datamodules import mimiciv, treatment


def events(*rows: tuple[int, int, str, float]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, {"stay": pl.Int32, "minute": pl.Int32, "concept": CONCEPT, "value": pl.Float32}, orient="row"
    )


def after(table: pl.DataFrame, concept: str, stay: int = 0) -> list[tuple[int, float]]:
    found = table.filter(pl.col("concept") == concept, pl.col("stay") == stay).sort("minute")
    return [(minute, round(value, 4)) for minute, value in found.select("minute", "value").iter_rows()]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(treatment).failed == 0


def test_norepinephrine_equivalent_adds_the_drugs() -> None:
    """[mimic-code norepinephrine_equivalent_dose.sql] NE + Epi + Phe/10 + Dopa/100 + Vaso (units/h) x 2.5/60."""
    before = events(
        (0, 0, "norepinephrine", 0.2),
        (0, 60, "vasopressin", 2.4),
        (0, 90, "phenylephrine", 1.0),
        (0, 120, "norepinephrine", 0.0),
        (1, 0, "dopamine", 5.0),
        (1, 30, "dobutamine", 5.0),  # an inotrope: no part of the sum
    )
    assert after(derived(before), "norepinephrine_equivalent") == [(0, 0.2), (60, 0.3), (90, 0.4), (120, 0.2)]
    assert after(derived(before), "norepinephrine_equivalent", 1) == [(0, 0.05)]


def test_change_says_started_rising_falling_and_steady() -> None:
    """Against 3 hours before: equal to the load = started, positive = rising, negative = falling, back to 0 = steady."""
    before = events((0, 0, "norepinephrine", 0.1), (0, 60, "norepinephrine", 0.3), (0, 300, "norepinephrine", 0.05))
    change = after(derived(before), "norepinephrine_equivalent_change")
    #      started      rising       0.3-0.1      0.3-0.3    0.05-0.3      steady
    assert change == [(0, 0.1), (60, 0.3), (180, 0.2), (240, 0.0), (300, -0.25), (480, 0.0)]


def test_urine_rate_per_kg_and_hour() -> None:
    """[mimic-code urine_output_rate.sql] volume over the time since the last charting and the last known weight."""
    before = events(
        (0, 0, "weight", 80),
        (0, 60, "urine", 100),  # the first: since when is not known
        (0, 180, "urine", 160),  # 160 / 80 kg / 2 h
        (0, 190, "urine", 40),  # 10 minutes later: taken for an hour
        (0, 200, "weight", 100),
        (0, 310, "urine", 100),
        (0, 310, "urine", 20),  # two catheters
        (0, 5000, "urine", 900),  # more than a day later: no rate
        (1, 60, "urine", 100),
        (1, 120, "urine", 100),  # no weight
    )
    assert after(derived(before), "urine_rate") == [(180, 1.0), (190, 0.5), (310, 0.6)]
    assert after(derived(before), "urine_rate", 1) == []


def test_nothing_derived_looks_ahead() -> None:
    """Cutting the record at any minute leaves every value before it as it was."""
    rows = [
        (0, 0, "weight", 80.0),
        (0, 10, "norepinephrine", 0.1),
        (0, 60, "urine", 90.0),
        (0, 200, "norepinephrine", 0.2),
        (0, 240, "urine", 50.0),
    ]
    whole = derived(events(*rows))
    for cut in range(0, 300, 20):
        part = derived(events(*(r for r in rows if r[1] < cut))).filter(pl.col("minute") < cut)
        for concept in whole["concept"].unique():
            assert after(part, concept) == [(m, v) for m, v in after(whole, concept) if m < cut]


def test_nothing_is_derived_from_nothing() -> None:
    assert derived(events((0, 0, "heart_rate", 80.0))).is_empty()


def test_estimated_is_on_while_any_assumed_rate_runs() -> None:
    """One pump with a native rate, two with an assumed concentration that overlap."""
    columns = ["stay_id", "start_minute", "end_minute", "drug", "rate", "unit", "estimated"]
    rows = [
        (1, 0, 500, "dopamine", 5.0, "", False),
        (1, 60, 120, "norepinephrine", 0.1, "", True),
        (1, 90, 180, "vasopressin", 1.0, "", True),
    ]
    found = estimated_events(pl.DataFrame(rows, columns, orient="row")).sort("minute").collect()
    assert list(zip(found["minute"], found["value"], strict=True)) == [(60, 1.0), (90, 1.0), (120, 1.0), (180, 0.0)]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ((0, 60, 500.0), [(59, 500.0)]),
        ((30, 90, 100.0), [(59, 50.0), (89, 50.0)]),
        ((-30, 60, 90.0), [(-1, 30.0), (59, 60.0)]),
        ((10, 10, 250.0), [(10, 250.0)]),  # a bolus charted with one time
    ],
)
def test_volumes_are_spread_over_their_hours(before: tuple[int, int, float], expected: list[tuple[int, float]]) -> None:
    table = pl.LazyFrame([(1, *before)], ["stay_id", "start_minute", "end_minute", "volume"], orient="row")
    found = volume_events(table, "fluids").sort("minute").collect()
    assert [(m, round(v, 6)) for m, v in zip(found["minute"], found["value"], strict=True)] == expected


def test_mimic_fluids_are_what_runs_into_a_vein(tmp_path: Path) -> None:
    """This project's rule: orders in mL or L, but not by mouth or tube and not from before the ICU."""
    (tmp_path / "icu").mkdir()
    (tmp_path / "icu" / "icustays.csv").write_text(
        "subject_id,stay_id,intime,outtime\n1,11,2150-01-01 00:00:00,2150-01-03 00:00:00\n"
    )
    header = "stay_id,starttime,endtime,amount,amountuom,ordercategoryname"
    rows = [
        "11,2150-01-01 00:00:00,2150-01-01 02:00:00,1,L,02-Fluids (Crystalloids)",
        "11,2150-01-01 00:30:00,2150-01-01 01:00:00,50,ml,01-Drips",
        "11,2150-01-01 00:00:00,2150-01-01 01:00:00,400,ml,13-Enteral Nutrition",
        "11,2150-01-01 00:00:00,2150-01-01 01:00:00,400,ml,14-Oral/Gastric Intake",
        "11,2150-01-01 00:00:00,2150-01-01 00:01:00,3000,ml,16-Pre Admission/Non-ICU",
        "11,2150-01-01 00:00:00,2150-01-01 01:00:00,8,mg,01-Drips",
    ]
    (tmp_path / "icu" / "inputevents.csv").write_text("\n".join([header, *rows]) + "\n")
    found = mimiciv._fluids(tmp_path, mimiciv._times(tmp_path)).sort("minute").collect()
    assert list(zip(found["minute"], found["value"], strict=True)) == [(59, 550.0), (119, 500.0)]


def test_the_treatment_group_holds_what_is_given_and_its_response() -> None:
    group = {c.name for c in CONCEPTS if c.treatment}
    assert group >= {
        "urine",
        "urine_rate",
        "fluids",
        "fio2",
        "peep",
        "ventilation",
        "norepinephrine_equivalent",
        *NOREPINEPHRINE_EQUIVALENT,
    }
    assert not BY_NAME["mean_bp"].treatment
