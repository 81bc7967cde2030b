"""SOFA: every rule on a table small enough to check by hand, with its source, and the counts of the open demos.

[1] is Vincent 1996 (doi:10.1007/BF01709751), [2] mimic-code (the SQL file is named), [3] Bennett 2023 (doi:10.1093/gigascience/giad041).
"""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from datamodules.cohort import Cohort
from datamodules.derive import sofa as s
from datamodules.hospitals import EICU, MIMICIV

SPAN = pl.LazyFrame({"stay_id": [1], "first_minute": [5], "first_end": [60], "last_hour": [30]})


def records(*rows: tuple[int, float]) -> pl.LazyFrame:
    return pl.LazyFrame(
        [(1, minute, value) for minute, value in rows],
        schema={"stay_id": int, "minute": int, "value": float},
        orient="row",
    )


def pressors(*rows: tuple[int, int, str, float | None]) -> pl.LazyFrame:
    schema = {
        "stay_id": pl.Int64,
        "start_minute": pl.Int64,
        "end_minute": pl.Int64,
        "drug": pl.String,
        "rate": pl.Float64,
    }
    return pl.LazyFrame([(1, *row) for row in rows], schema=schema, orient="row")


def inputs(spans: pl.LazyFrame = SPAN, **frames: pl.LazyFrame) -> s.Inputs:
    gases = pl.LazyFrame(schema={"stay_id": pl.Int64, "minute": pl.Int64, "pao2": pl.Float64, "fio2": pl.Float64})
    ventilation = pl.LazyFrame(schema={"stay_id": pl.Int64, "start_minute": pl.Int64, "end_minute": pl.Int64})
    parts = dict.fromkeys(("eyes", "verbal", "motor"), pl.Float64) | {"stay_id": pl.Int64, "minute": pl.Int64}
    single = ("fio2", "platelets", "bilirubin", "mean_bp", "gcs_totals", "creatinine", "urine")
    empty = {name: records() for name in single} | {
        "gases": gases,
        "ventilation": ventilation,
        "pressors": pressors(),
        "spans": spans,
        "gcs": pl.LazyFrame(schema=parts),
    }
    return empty | frames  # type: ignore[return-value]


def scored(frames: s.Inputs, **switches: Any) -> pl.DataFrame:
    return s.sofa(frames, s.Switches(**switches))


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(s).failed == 0


def test_grid_has_the_day_before() -> None:
    """[2] icustay_hourly.sql: hours -24 to the last; hour 0 ends at the first whole hour."""
    grid = s.hour_grid(SPAN).collect()
    assert grid["hour"].to_list() == list(range(-24, 31))
    assert grid.filter(pl.col("hour").is_in([-24, 0, 30]))["end_minute"].to_list() == [60 - 24 * 60, 60, 60 + 30 * 60]


def test_record_on_the_stroke_belongs_to_the_hour_that_ends() -> None:
    """[2] sofa.sql: an hour is (end - 1 h, end]."""
    found = s.worst(records((0, 1.0), (1, 2.0), (60, 3.0), (61, 4.0)), SPAN, low=pl.col("value").min(), n=pl.len())
    assert found.sort("hour").collect().rows() == [(1, -1, 1.0, 1), (1, 0, 2.0, 2), (1, 1, 4.0, 1)]


THRESHOLDS: dict[str, tuple[str, list[tuple[float, int]]]] = {  # [1], with the inequalities of [2] sofa.sql
    "platelets": ("coagulation", [(150, 0), (149.9, 1), (100, 1), (99, 2), (50, 2), (49, 3), (20, 3), (19, 4)]),
    "bilirubin": ("liver", [(1.1, 0), (1.2, 1), (1.9, 1), (2.0, 2), (5.9, 2), (6.0, 3), (11.9, 3), (12.0, 4)]),
    "creatinine": ("renal", [(1.1, 0), (1.2, 1), (1.9, 1), (2.0, 2), (3.4, 2), (3.5, 3), (4.9, 3), (5.0, 4)]),
    "urine": ("renal", [(500, 0), (499, 3), (200, 3), (199, 4)]),
    "gcs": ("cns", [(15, 0), (14, 1), (13, 1), (12, 2), (10, 2), (9, 3), (6, 3), (5, 4), (3, 4)]),
    "ratio_ventilated": (
        "respiration",
        [(400, 0), (399, 1), (300, 1), (299, 2), (200, 2), (199, 3), (100, 3), (99, 4)],
    ),
    "ratio_spontaneous": ("respiration", [(400, 0), (399, 1), (300, 1), (299, 2), (99, 2)]),
    "mean_bp": ("cardiovascular", [(70, 0), (69.9, 1), (30, 1)]),
    "dobutamine": ("cardiovascular", [(0, 0), (0.1, 2), (40, 2)]),
    "dopamine": ("cardiovascular", [(0, 0), (0.1, 2), (5, 2), (5.1, 3), (15, 3), (15.1, 4)]),
    "epinephrine": ("cardiovascular", [(0, 0), (0.01, 3), (0.1, 3), (0.11, 4)]),
    "norepinephrine": ("cardiovascular", [(0, 0), (0.01, 3), (0.1, 3), (0.11, 4)]),
}


@pytest.mark.parametrize("measure", THRESHOLDS)
def test_thresholds(measure: str) -> None:
    """Each side of every limit; all other organs score 0 where nothing was measured."""
    component, cases = THRESHOLDS[measure]
    hours = pl.LazyFrame(
        {name: [None] * len(cases) for name in THRESHOLDS}, schema=dict.fromkeys(THRESHOLDS, pl.Float64)
    )
    found = s.score(hours.with_columns(pl.Series(measure, [float(value) for value, _ in cases]))).collect()
    assert found[component].to_list() == [points for _, points in cases]
    assert found.drop(component).sum_horizontal().to_list() == [0] * len(cases)


def test_the_worst_source_counts() -> None:
    """[2] sofa.sql: pressure and drugs, creatinine and urine, ventilated and spontaneous gases."""
    values = {
        "mean_bp": 60,
        "dobutamine": 3,
        "norepinephrine": 0.05,
        "creatinine": 2.5,
        "urine": 150,
        "ratio_ventilated": 350,
        "ratio_spontaneous": 250,
    }
    hours = pl.LazyFrame({name: pl.Series([values.get(name)], dtype=pl.Float64) for name in THRESHOLDS})
    assert s.score(hours).select("respiration", "cardiovascular", "renal").collect().row(0) == (2, 3, 4)


def gas(minute: int, pao2: float = 80, fio2: float | None = None) -> pl.LazyFrame:
    return pl.LazyFrame(
        {"stay_id": [1], "minute": [minute], "pao2": [pao2], "fio2": pl.Series([fio2], dtype=pl.Float64)}
    )


def test_fio2_is_the_specimens_or_charted_within_4_hours() -> None:
    """[2] bg.sql: the specimen's own FiO2, else the last charted one, at most 4 hours old and not from the future."""
    charted = records((0, 50.0), (100, 40.0), (400, 80.0))
    nothing = inputs()["ventilation"]

    def ratio(minute: int, fio2: float | None = None, missing: float | None = None) -> list[float]:
        return s.oxygenation(gas(minute, 80, fio2), charted, nothing, missing).collect()["ratio"].to_list()

    assert ratio(100, 20) == [400]
    assert ratio(99) == [160]
    assert ratio(340) == [200]  # 4 hours after the record at 100
    assert ratio(341) == []
    assert ratio(341, missing=21) == [pytest.approx(100 * 80 / 21)]  # [3]: room air where none is charted


def test_ventilated_at_both_ends_of_an_episode() -> None:
    """[2] sofa.sql: gas time between start and end of an episode, both included."""
    episode = pl.LazyFrame({"stay_id": [1, 1], "start_minute": [100, 300], "end_minute": [200, 300]})
    times = (99, 100, 200, 201, 300, 301)
    gases = pl.concat([gas(minute, 80, 40) for minute in times])
    found = s.oxygenation(gases, records(), episode).sort("minute").collect()
    assert found["ventilated"].to_list() == [False, True, True, False, True, False]


def test_unventilated_gas_scores_2_at_most() -> None:
    """[2] sofa.sql: 60 mmHg on 80 % is 75: 4 points on a ventilator, 2 without."""
    episode = pl.LazyFrame({"stay_id": [1], "start_minute": [0], "end_minute": [120]})
    assert scored(inputs(gases=gas(30, 60, 80)))["respiration"][0] == 2
    assert scored(inputs(gases=gas(30, 60, 80), ventilation=episode))["respiration"][0] == 4


GCS_CASES = [  # eyes, verbal, motor now; the same of the record before; minutes between; score
    ((4, 5, 6), None, 0, 15),
    ((1, 1, 1), None, 0, 3),
    ((None, 2, None), None, 0, 12),  # missing without a record before: normal
    ((None, 2, None), (1, 1, 3), 359, 6),  # missing: from the record before ...
    ((None, 2, None), (1, 1, 3), 360, 12),  # ... if less than 6 hours old
    ((1, 0, 1), None, 0, 15),  # tube: the whole score counts as normal
    ((1, None, 1), (1, 0, 1), 60, 15),  # verbal not charted after a tube
    ((None, 3, 5), (1, 0, 1), 60, 12),  # a record with a tube hands nothing on: eyes are normal
    ((1, None, 1), (1, 0, 1), 400, 7),  # the tube is too long ago
]


@pytest.mark.parametrize(("now", "before", "minutes", "score"), GCS_CASES)
def test_gcs_total(now: tuple, before: tuple | None, minutes: int, score: int) -> None:
    """[2] gcs.sql."""
    rows = [(1, 1000 - minutes, *before)] if before else []
    schema = {"stay_id": pl.Int64, "minute": pl.Int64, "eyes": pl.Float64, "verbal": pl.Float64, "motor": pl.Float64}
    frame = pl.LazyFrame([*rows, (1, 1000, *now)], schema=schema, orient="row")
    assert s.gcs_total(frame).collect()["value"][-1] == score


def test_gcs_carried_through_a_tube() -> None:
    """cohorts.md 9.4: the last score from before the tube instead of 15; 15 where there is none."""
    rows = [(1, 0, 2, 2, 4), (1, 60, 1, 0, 1), (1, 120, 1, None, 1), (1, 180, 4, 4, 6), (2, 0, 1, 0, 1)]
    schema = {"stay_id": pl.Int64, "minute": pl.Int64, "eyes": pl.Float64, "verbal": pl.Float64, "motor": pl.Float64}
    frame = pl.LazyFrame(rows, schema=schema, orient="row")
    assert s.gcs_total(frame, "normal").collect()["value"].to_list() == [8, 15, 15, 14, 15]
    assert s.gcs_total(frame, "carried").collect()["value"].to_list() == [8, 8, 8, 14, 15]
    with pytest.raises(ValueError, match="'normal' or 'carried'"):
        s.gcs_total(frame, "guessed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gcs_intubated is 'guessed'; expected normal or carried"):
        s.Switches(gcs_intubated="guessed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fio2_missing is 0\.21; expected a percentage such as 21"):
        s.Switches(fio2_missing=0.21)


def test_a_total_without_its_parts_is_scored_too() -> None:
    """A hospital that charts the total only; the worst of an hour counts, whichever it comes from."""
    assert scored(inputs(gcs_totals=records((30, 9.0))))["cns"][0] == 3
    parts = pl.LazyFrame({"stay_id": [1], "minute": [40], "eyes": [4.0], "verbal": [4.0], "motor": [6.0]})
    assert scored(inputs(gcs_totals=records((30, 9.0)), gcs=parts))["cns"][0] == 3
    assert scored(inputs(gcs=parts))["cns"][0] == 1


def test_urine_is_scaled_to_a_day_when_enough_is_charted() -> None:
    """[2] urine_output_rate.sql: volumes of the last 23 hours, the time they cover, 22 to 30 hours, scaled to 24.

    With the first heart rate at minute 5: 100 mL at minute 605 cover 10 h, 200 mL at 1205 another 10 h (20 h: too few),
    100 mL at 1385 another 3 h (23 h, 400 mL -> 417.4), 50 mL at 2200 another 13.58 h; the volume of minute 605 is then more
    than 23 h old: 350 mL over 26.58 h -> 316.0.
    """
    urine = records((605, 60.0), (605, 40.0), (1205, 200.0), (1385, 100.0), (2200, 50.0))
    found = s.urine_24h(urine, SPAN).collect()
    assert found["minute"].to_list() == [1385, 2200]
    assert found["value"].to_list() == pytest.approx([400 / 23 * 24, 350 / 26.58 * 24])
    assert s.urine_24h(urine, SPAN, 12).collect()["minute"].to_list() == [1205, 1385, 2200]  # [3]: 12 hours are enough
    late = records((605, 100.0), (2500, 100.0))
    assert s.urine_24h(late, SPAN).collect().height == 0  # 31.6 hours in one volume say nothing about a day


def test_a_drug_counts_in_the_hours_whose_end_it_reaches() -> None:
    """[2] sofa.sql: start < end of the hour <= stop; 60 to 180 reaches the ends 120 and 180, not 60."""
    found = s.running(pressors((60, 180, "dopamine", 4.0), (130, 170, "dopamine", 9.0)), SPAN).sort("hour").collect()
    assert found.select("hour", "dopamine").rows() == [(1, 4.0), (2, 4.0)]


def test_overlapping_infusions_take_the_highest_rate() -> None:
    """[2] sofa.sql: the maximum over the rows of a drug, not their sum."""
    rows = pressors((0, 120, "norepinephrine", 0.06), (30, 90, "norepinephrine", 0.07), (0, 60, "epinephrine", 0.02))
    found = s.running(rows, SPAN).sort("hour").collect()
    assert found.select("norepinephrine", "epinephrine").rows() == [(0.07, 0.02), (0.06, None)]
    assert scored(inputs(pressors=rows))["cardiovascular"][:2].to_list() == [3, 3]


def test_unscored_drugs_and_unknown_rates() -> None:
    """[2] sofa.sql scores four drugs only; a rate whose unit or weight is unknown comes as null and scores nothing."""
    rows = pressors((0, 600, "vasopressin", 2.4), (0, 600, "phenylephrine", 3.0), (0, 600, "norepinephrine", None))
    assert scored(inputs(pressors=rows))["cardiovascular"].to_list() == [0] * 31


def test_short_episodes_can_be_left_out() -> None:
    """[3]: an episode is 60 minutes or more; rows up to 5 hours apart make one."""
    rows = pressors(
        (0, 30, "dopamine", 4.0),
        (400, 420, "epinephrine", 0.1),
        (700, 725, "epinephrine", 0.1),
        (1200, 1250, "epinephrine", 0.1),
    )
    kept = s.long_episodes(rows, 60).collect()
    assert kept.sort("start_minute").select("start_minute", "drug").rows() == [
        (400, "epinephrine"),
        (700, "epinephrine"),
    ]
    assert s.long_episodes(rows, 0).collect().height == 4
    overlapping = pressors((0, 50, "dopamine", 4.0), (10, 20, "dopamine", 4.0), (40, 70, "dopamine", 4.0))
    assert s.long_episodes(overlapping, 60).collect().height == 3


def test_24_hour_window_looks_before_admission() -> None:
    """[2] sofa.sql: maximum of an hour and the 23 before; hours before 0 are looked at and not put out."""
    found = scored(inputs(platelets=records((-600, 10.0), (30, 90.0))))
    # -600 lies in hour -11, the 24-hour window of hour 12 is the last that holds it; minute 30 in hour 0 lasts to hour 23
    assert found["coagulation"].to_list() == [4] * 13 + [2] * 11 + [0] * 7
    assert found["sofa_24h"].to_list() == found["coagulation"].to_list()


def test_hours_and_stays_without_any_value() -> None:
    """Missing is normal; a stay without a span (no heart rate in MIMIC-IV) has no row."""
    spans = pl.LazyFrame({"stay_id": [1, 2], "first_minute": [0, 0], "first_end": [60, 17], "last_hour": [1, 0]})
    found = scored(inputs(spans, mean_bp=records((90, 50.0))))
    assert found.schema == pl.Schema(s.SOFA)
    assert found.select("stay_id", "end_minute", "sofa_24h").rows() == [(1, 60, 0), (1, 120, 1), (2, 17, 0)]


# --- MIMIC-IV: raw tables -> inputs -------------------------------------------------------------------------------------------

INTIME = "2150-01-01 10:00:30"
MIMIC = {
    "icu/icustays": "subject_id,hadm_id,stay_id,intime,outtime",
    "icu/chartevents": "subject_id,stay_id,charttime,storetime,itemid,value,valuenum",
    "hosp/labevents": "subject_id,hadm_id,specimen_id,itemid,charttime,value,valuenum,storetime",
    "icu/inputevents": "subject_id,stay_id,itemid,starttime,endtime,rate,rateuom,patientweight",
    "icu/outputevents": "stay_id,itemid,charttime,storetime,value",
}


def mimic(root: Path, before: int | None = None, labs: str = "drawn", **rows: list[str]) -> s.Inputs:
    """Write the tables (keyword: last part of the name) and read them back; stay 1 is of patient 10, admission 100."""
    rows = {"icustays": [f"10,100,1,{INTIME},2150-01-03 10:00:00"], **rows}
    for table, header in MIMIC.items():
        path = root / f"{table}.csv"
        path.parent.mkdir(exist_ok=True)
        full = [row + "," * (header.count(",") - row.count(",")) for row in rows.get(path.stem, [])]
        path.write_text("\n".join([header, *full]) + "\n")
    hospital = MIMICIV(str(root), labs=labs)  # type: ignore[arg-type]
    stays = pl.DataFrame({"stay_id": [1]})
    return hospital.sofa_inputs(hospital.tables(stays), pl.LazyFrame(), stays, before)


def chart(time: str, item: int, value: str = "", number: float | str = "", stored: str = "") -> str:
    return f"10,1,2150-01-{time}:00,{stored},{item},{value},{number}"


def test_mimic_span(tmp_path: Path) -> None:
    """[2] icustay_hourly.sql: up to the whole clock hour, hours counted by the clock; minutes are rounded down.

    From 10:00:30, 10:17 is minute 16, 11:00 minute 59; from 10 to 13 o'clock are 3 hours.
    """
    spans = mimic(tmp_path, chartevents=[chart("01 10:17", 220045, "80", 80), chart("01 13:01", 220045, "80", 80)])[
        "spans"
    ].collect()
    assert spans.rows() == [(1, 16, 59, 3)]
    spans = mimic(tmp_path, chartevents=[chart("01 11:00", 220045, "80", 80)])["spans"].collect()
    assert spans.rows() == [(1, 59, 59, 0)]


def test_mimic_no_heart_rate_no_score(tmp_path: Path) -> None:
    """[2] icustay_times.sql: the grid hangs on item 220045."""
    assert scored(mimic(tmp_path, chartevents=[chart("01 11:00", 220052, "50", 50)])).is_empty()


def test_mimic_pressor_units(tmp_path: Path) -> None:
    """[2] norepinephrine.sql: mg/kg/min x 1000 unless the weight is 1 kg. A rate per kg needs no weight;
    mcg/min is divided by it; an unknown unit is no rate, vasopressin is not scored."""
    cells = [
        ("221906", "0.2", "mcg/kg/min", ""),
        ("221906", "0.0002", "mg/kg/min", ""),
        ("221906", "0.2", "mg/kg/min", "1"),
        ("221662", "20", "mcg/min", "80"),
        ("221289", "5", "", "80"),
        ("222315", "2.4", "units/hour", "80"),
    ]
    rows = [
        f"10,1,{item},2150-01-01 11:00:00,2150-01-01 12:00:00,{rate},{unit},{weight}"
        for item, rate, unit, weight in cells
    ]
    found = mimic(tmp_path, inputevents=rows)["pressors"].collect().sort("drug")
    assert found["drug"].to_list() == ["dopamine", *["norepinephrine"] * 3]
    assert found["rate"].to_list() == pytest.approx([0.25, 0.2, 0.2, 0.2])
    assert found.select("start_minute", "end_minute").row(0) == (59, 119)


def test_mimic_gcs_text(tmp_path: Path) -> None:
    """[2] gcs.sql: "No Response-ETT" has the number 1 beside it and means a tube."""
    rows = [
        chart("01 11:00", 223900, "No Response-ETT", 1),
        chart("01 11:00", 220739, "None", 1),
        chart("01 12:00", 223900, "No Response", 1),
    ]
    assert s.gcs_total(mimic(tmp_path, chartevents=rows)["gcs"]).collect()["value"].to_list() == [15, 11]


def test_mimic_mean_pressure(tmp_path: Path) -> None:
    """[2] vitalsign.sql: catheter and cuff of one time are averaged; 0 and 300 are no pressures."""
    rows = [
        chart("01 11:00", 220052, "60", 60),
        chart("01 11:00", 220181, "80", 80),
        chart("01 11:00", 225312, "300", 300),
        chart("01 12:00", 220052, "0", 0),
    ]
    assert mimic(tmp_path, chartevents=rows)["mean_bp"].collect()["value"].to_list() == [70]


def test_mimic_blood_gas(tmp_path: Path) -> None:
    """[2] bg.sql: arterial specimens; a fraction is percent, 1 to 20 is neither; 20 exactly is kept as charted, not as lab."""

    def specimen(number: int, kind: str, fio2: float) -> list[str]:
        cells = [(52033, kind, ""), (50821, "80", 80), (50816, str(fio2), fio2)]
        return [f"10,100,{number},{item},2150-01-01 11:00:00,{text},{value}" for item, text, value in cells]

    labs = (
        specimen(1, "ART.", 0.4)
        + specimen(2, "VEN.", 0.4)
        + specimen(3, "ART.", 5)
        + specimen(4, "ART.", 20)
        + specimen(5, "ART.", 55)
    )
    beats = [chart("01 10:30", 220045, "80", 80), chart("01 20:00", 220045, "80", 80)]
    charted = [
        chart("01 10:40", 223835, "20", 20),
        chart("01 10:50", 223835, "0.5", 0.5),
        chart("01 10:55", 223835, "15", 15),
    ]
    found = mimic(tmp_path, labevents=labs, chartevents=beats + charted)
    assert sorted(found["gases"].collect()["fio2"].to_list(), key=str) == [40, 55, None, None]
    assert found["fio2"].collect().sort("minute")["value"].to_list() == [20, 50]


def test_mimic_labs_belong_to_the_admission(tmp_path: Path) -> None:
    """[2] sofa.sql joins laboratory values on the admission: none before it has begun, nor of another; 0 is no value."""
    cells = [
        ("100", "2149-12-31 12:00:00", 3.0),
        ("", "2150-01-01 11:00:00", 9.0),
        ("101", "2150-01-01 11:00:00", 9.0),
        ("100", "2150-01-01 12:00:00", 0),
    ]
    labs = [f"10,{hadm},{number},50912,{time},,{value}" for number, (hadm, time, value) in enumerate(cells)]
    beats = [chart("01 10:30", 220045, "80", 80), chart("01 20:00", 220045, "80", 80)]
    assert mimic(tmp_path, labevents=labs, chartevents=beats)["creatinine"].collect()["value"].to_list() == [3.0]


def ventilation(root: Path, *rows: str) -> list[tuple[int, int]]:
    return (
        mimic(root, chartevents=list(rows))["ventilation"]
        .sort("start_minute")
        .select("start_minute", "end_minute")
        .collect()
        .rows()
    )


def test_mimic_ventilation_episode(tmp_path: Path) -> None:
    """[2] ventilation.sql: an episode runs to the first record of another status; a single record without a next one is none.

    Tube from 11:00 (with an oxygen flow), mode CMV/ASSIST at 12:00, nasal cannula from 14:00: minutes 59 to 239.
    """
    rows = [
        chart("01 11:00", 226732, "Endotracheal tube"),
        chart("01 11:00", 223834, "2", 2),
        chart("01 12:00", 223849, "CMV/ASSIST"),
        chart("01 14:00", 226732, "Nasal cannula"),
        chart("01 14:00", 223834, "2", 2),
    ]
    assert ventilation(tmp_path, *rows) == [(59, 239)]
    assert (
        ventilation(tmp_path, rows[0], *rows[2:]) == []
    )  # [2] oxygen_delivery.sql: no flow charted, no device; one mode record is left
    assert ventilation(
        tmp_path, *rows[:3], chart("01 14:00", 226732, "Tracheostomy tube"), chart("01 14:00", 223834, "2", 2)
    ) == [(59, 239)]
    later = [
        chart("01 13:00", 223849, "Standby"),
        chart("02 02:00", 223849, "PSV/SBT"),
        chart("02 03:00", 223849, "PSV/SBT"),
    ]
    assert ventilation(tmp_path, *rows[:3], *later) == [(59, 119), (959, 1019)]  # 14 clock hours without a known status


def test_mimic_urine(tmp_path: Path) -> None:
    """[2] urine_output.sql: irrigant that went in (227488) is taken off; 227510 is stomach content."""
    rows = [
        f"1,{item},2150-01-01 11:00:00,,{value}"
        for item, value in ((226559, 100), (226559, 100), (227488, 30), (227489, 50), (227510, 400))
    ]  # one row stands twice
    assert mimic(tmp_path, outputevents=rows)["urine"].collect()["value"].sum() == 120


def test_mimic_before_a_minute_only_what_was_known(tmp_path: Path) -> None:
    """Before minute 239 (14:00 o'clock): neither what was charted later, nor what was stored later, however old it is.

    An infusion that goes on is known up to then; a laboratory value is known when drawn, or by option when stored.
    """
    beats = [chart("01 10:30", 220045, "80", 80), chart("01 20:00", 220045, "80", 80)]
    pressure = [
        chart("01 11:00", 220052, "60", 60, "2150-01-01 11:30:00"),
        chart("01 12:00", 220052, "61", 61, "2150-01-01 15:00:00"),
        chart("01 14:00", 220052, "62", 62),
    ]
    labs = [
        f"10,100,{n},50912,2150-01-01 {at}:00,,{value},2150-01-01 15:00:00"
        for n, at, value in ((1, "11:00", 3), (2, "14:00", 4))
    ]
    output = [
        f"1,226559,2150-01-01 {at}:00,{stored},100" for at, stored in (("11:00", ""), ("12:00", "2150-01-01 16:00:00"))
    ]
    infused = [f"10,1,221906,2150-01-01 {start}:00,2150-01-01 20:00:00,0.2,mcg/kg/min," for start in ("11:00", "14:00")]
    tables = {"chartevents": beats + pressure, "labevents": labs, "outputevents": output, "inputevents": infused}
    early = mimic(tmp_path, 239, **tables)
    assert early["spans"].collect()["last_hour"].to_list() == [0]  # the last heart rate so far is that of 10:30
    assert early["mean_bp"].collect()["value"].to_list() == [60]
    assert early["urine"].collect()["minute"].to_list() == [59]
    assert early["pressors"].select("start_minute", "end_minute").collect().rows() == [(59, 239)]
    later = [chart("01 13:59", 220045, "80", 80)]
    in_time = mimic(tmp_path, 239, **tables | {"chartevents": beats + later})
    assert in_time["creatinine"].collect()["value"].to_list() == [3]
    assert mimic(tmp_path, 239, "stored", **tables | {"chartevents": beats + later})["creatinine"].collect().is_empty()
    whole = mimic(tmp_path, **tables)
    assert [whole[name].collect().height for name in ("mean_bp", "creatinine", "urine", "pressors")] == [3, 2, 2, 2]  # type: ignore[literal-required]


def test_mimic_demo(real: Callable[[str], Path]) -> None:
    """The counts of mimic-code's own SQL (DuckDB) on the demo; hour by hour all components were found equal."""
    root = str(real("mimic-iv-demo"))
    found = pl.read_parquet(Cohort(MIMICIV(root)).sepsis_tables()["sofa"])
    assert (found.height, found["stay_id"].n_unique(), (found["sofa_24h"] >= 2).sum()) == (12_254, 140, 10_215)
    assert found["sofa_24h"].mean() == pytest.approx(5.863636, abs=1e-6)
    switches = s.Switches(gcs_intubated="carried", fio2_missing=21, pressor_min_minutes=60, urine_min_hours=12)
    changed = pl.read_parquet(Cohort(MIMICIV(root, sofa=switches)).sepsis_tables()["sofa"])
    worse = [name for name in s.COMPONENTS if (changed[name] > found[name]).any()]
    better = [name for name in s.COMPONENTS if (changed[name] < found[name]).any()]
    assert worse == ["respiration", "cns", "renal"]
    assert set(better) <= {"cardiovascular", "respiration", "renal", "cns"}


# --- eICU ---------------------------------------------------------------------------------------------------------------------


EICU_TABLES = {
    "patient": "patientunitstayid,patienthealthsystemstayid,uniquepid,hospitalid,gender,age,admissionheight,admissionweight,"
    "unittype,unitvisitnumber,hospitaladmitoffset,unitdischargeoffset,apacheadmissiondx",
    "vitalPeriodic": "patientunitstayid,observationoffset,heartrate,respiration,sao2,temperature,"
    "systemicsystolic,systemicdiastolic,systemicmean,etco2",
    "vitalAperiodic": "patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,noninvasivemean",
    "lab": "patientunitstayid,labresultoffset,labname,labresult,labmeasurenamesystem,labmeasurenameinterface,labresultrevisedoffset",
    "apacheApsVar": "patientunitstayid,intubated,eyes,motor,verbal",
    "nurseCharting": "patientunitstayid,nursingchartoffset,nursingchartcelltypevallabel,nursingchartcelltypevalname,nursingchartvalue",
    "respiratoryCharting": "patientunitstayid,respchartoffset,respcharttypecat,respchartvaluelabel,respchartvalue",
    "respiratoryCare": "patientunitstayid,respcarestatusoffset,ventstartoffset,ventendoffset,priorventstartoffset,priorventendoffset",
    "intakeOutput": "patientunitstayid,intakeoutputoffset,cellpath,cellvaluenumeric",
    "infusionDrug": "patientunitstayid,infusionoffset,drugname,drugrate,patientweight",
    "treatment": "patientunitstayid,treatmentoffset,treatmentstring",
}


def bed(stay: int = 1, weight: float | str = 80, discharge: int | str = 1441) -> str:
    return f"{stay},{stay},p{stay},x,Male,60,,{weight},MICU,1,0,{discharge},"


def eicu_inputs(root: Path, before: int | None = None, **rows: list[str]) -> s.Inputs:
    """Write the tables (keyword: name of the table) and read them back; stay 1 of 1,441 minutes in hospital x."""
    rows = {"patient": [bed()], **rows}
    for table, header in EICU_TABLES.items():
        (root / f"{table}.csv").write_text("\n".join([header, *rows.get(table, [])]) + "\n")
    hospital = EICU(str(root))
    store = Cohort(hospital).store
    events = store.frame(0, len(store.stays)).lazy()
    return hospital.sofa_inputs(hospital.tables(store.stays), events, store.stays, before)


def coma(found: s.Inputs) -> list[tuple]:
    """Stay, minute and total of the coma scale, from its parts or charted."""
    totals = [s.gcs_total(found["gcs"]), found["gcs_totals"]]
    return pl.concat(totals, how="vertical_relaxed").sort("minute").collect().rows()


def test_eicu_hours_run_to_the_end_of_the_unit_stay(tmp_path: Path) -> None:
    """eICU counts minutes from admission, so hour 0 is minutes 1 to 60; minute 1441 opens hour 24. Without an end: to the last event."""
    beats = ["1,30,80,,,,,,,", "2,200,80,,,,,,,"]
    spans = eicu_inputs(tmp_path, patient=[bed(), bed(2, discharge="")], vitalPeriodic=beats)["spans"]
    assert spans.sort("stay_id").collect().rows() == [(1, 0, 60, 24), (2, 0, 60, 3)]


def test_eicu_pressure_is_the_median_of_an_hour(tmp_path: Path) -> None:
    """cohorts.md 8: one flush of the line (20 mmHg) in an hour of 80 is not hypotension."""
    periodic = [f"1,{minute},80,,,,,,{value}," for minute, value in ((5, 80), (10, 20), (15, 80), (65, 60))]
    found = (
        eicu_inputs(tmp_path, vitalPeriodic=periodic, vitalAperiodic=["1,60,,,78"])["mean_bp"].sort("minute").collect()
    )
    assert found.rows() == [(1, 60, 79.0), (1, 120, 60.0)]


def test_eicu_gcs(tmp_path: Path) -> None:
    """cohorts.md 8: APACHE's score counts at minute 1440; -1 is missing; verbal 1 with a tube is not tested.

    Eyes 2, motor 4, verbal 1: 7 points awake, 15 with a tube by mimic-code's rule.
    """
    assert coma(eicu_inputs(tmp_path, apacheApsVar=["1,0,2,4,1"])) == [(1, 1440, 7.0)]
    assert coma(eicu_inputs(tmp_path, apacheApsVar=["1,1,2,4,1"])) == [(1, 1440, 15.0)]
    assert coma(eicu_inputs(tmp_path, apacheApsVar=["1,1,-1,-1,-1"], vitalPeriodic=["1,30,80,,,,,,,"])) == []
    nurse = [
        "1,100,Glasgow coma score,GCS Total,9",
        "1,200,Glasgow coma score,Verbal,1",
        "1,200,Glasgow coma score,Motor,4",
        "1,200,Glasgow coma score,Eyes,2",
    ]
    charted = eicu_inputs(tmp_path, nurseCharting=nurse)
    assert coma(charted) == [(1, 100, 9.0), (1, 200, 7.0)]
    on_a_ventilator = eicu_inputs(
        tmp_path, nurseCharting=nurse, respiratoryCare=["1,150,150,0,0,0", "1,400,150,400,0,0"]
    )
    assert on_a_ventilator["ventilation"].select(
        pl.col("start_minute").min(), pl.col("end_minute").max()
    ).collect().row(0) == (150, 400)
    assert coma(on_a_ventilator) == [(1, 100, 9.0), (1, 200, 15.0)]


def test_eicu_gas_and_treatment_tier(tmp_path: Path) -> None:
    """cohorts.md 8: FiO2 from the laboratory at the same minute, fraction or %, else from respiratoryCharting; the tier counts from
    the very minute of its row, here the last of hour 0."""
    lab = [
        "1,30,paO2,80,mm Hg,,30",
        "1,30,FiO2,0.4,%,,30",
        "1,90,paO2,60,mm Hg,,90",
        "1,30,platelets x 1000,90,K/mcL,,30",
    ]
    tier = "cardiovascular|shock|vasopressors|dopamine >15 micrograms/kg/min"
    found = eicu_inputs(tmp_path, lab=lab, respiratoryCharting=["1,80,,FiO2,60%"], treatment=[f"1,60,{tier}"])
    ratios = s.oxygenation(found["gases"], found["fio2"], found["ventilation"]).sort("minute").collect()
    assert ratios["ratio"].to_list() == pytest.approx([200, 100])
    first = scored(found).row(0, named=True)
    assert (first["respiration"], first["coagulation"], first["cardiovascular"]) == (2, 2, 4)


def drugs(found: s.Inputs) -> list[tuple]:
    columns = ("stay_id", "start_minute", "end_minute", "drug", "rate")
    return (
        found["pressors"].sort("stay_id", "start_minute").select(*columns[:4], pl.col("rate").round(4)).collect().rows()
    )


def test_eicu_treatment_tiers_only_until_a_rate_is_charted(tmp_path: Path) -> None:
    """cohorts.md 9.4: the tier of dose in ``treatment`` stands in for a rate while the stay has no infusion record so far.

    Stay 1: norepinephrine 8 mcg/min at 80 kg is 0.1 mcg/kg/min from minute 0 on, its treatment row is not used. Stay 2 charts rates from
    minute 300 on: the row of 90 counts, that of 350 does not. Stay 3 has none. A treatment row counts for one hour from its own minute on.
    """
    tier = "cardiovascular|shock|vasopressors|norepinephrine > 0.1 micrograms/kg/min"
    found = eicu_inputs(
        tmp_path,
        patient=[bed(1), bed(2), bed(3)],
        infusionDrug=["1,0,Norepinephrine (mcg/min),8,", "2,300,Norepinephrine (mcg/min),8,"],
        treatment=[
            f"1,90,{tier}",
            f"2,90,{tier}",
            f"2,350,{tier}",
            f"3,90,{tier}",
            "3,200,cardiovascular|shock|inotropic agent|dobutamine",
        ],
    )
    assert drugs(found) == [
        (1, 0, 300, "norepinephrine", 0.1),
        (2, 89, 149, "norepinephrine", 0.2),
        (2, 300, 600, "norepinephrine", 0.1),
        (3, 89, 149, "norepinephrine", 0.2),
        (3, 199, 259, "dobutamine", 1.0),
    ]
    hours = s.running(found["pressors"], found["spans"]).filter(pl.col("stay_id") == 3).sort("hour").collect()
    assert hours.select("hour", "norepinephrine", "dobutamine").rows() == [(1, 0.2, None), (3, None, 1.0)]


def test_eicu_stay_without_weight_has_no_rate(tmp_path: Path) -> None:
    """cohorts.md 8: mcg/min without any weight is no rate per kg, so it scores nothing; mcg/kg/min needs no weight."""
    infused = ["1,0,Norepinephrine (mcg/min),8,", "1,600,Norepinephrine (mcg/kg/min),0.2,"]
    assert drugs(eicu_inputs(tmp_path, patient=[bed(weight="")], infusionDrug=infused)) == [
        (1, 600, 900, "norepinephrine", 0.2)
    ]


def test_eicu_scores_what_the_store_holds(tmp_path: Path) -> None:
    """One reading of the tables for features and for SOFA: a creatinine of 60 mg/dL is out of range for both, umol/L are converted."""
    lab = ["1,30,creatinine,60,mg/dL,,30", "1,90,creatinine,450,mg/dL,umol/L,90", "1,150,platelets x 1000,0,K/mcL,,150"]
    found = eicu_inputs(tmp_path, lab=lab)
    assert found["creatinine"].collect().rows() == [(1, 90, pytest.approx(5.09, abs=0.01))]
    assert found["platelets"].collect().is_empty()
    assert scored(found)["renal"][:2].to_list() == [0, 4]


def test_eicu_before_a_minute_only_what_was_known(tmp_path: Path) -> None:
    """Before minute 240: no result that was revised at 300, no pressure that was entered then, no step that had not begun."""
    tables = {
        "lab": ["1,30,creatinine,3,mg/dL,,30", "1,30,creatinine,5,mg/dL,,300"],
        "vitalAperiodic": ["1,100,,,65", "1,240,,,60"],
        "infusionDrug": ["1,200,Norepinephrine (mcg/min),8,", "1,250,Norepinephrine (mcg/min),16,"],
        "treatment": ["1,240,cardiovascular|shock|vasopressors|norepinephrine > 0.1 micrograms/kg/min"],
        "respiratoryCare": ["1,150,150,0,0,0", "1,300,150,290,0,0"],
    }
    early, whole = eicu_inputs(tmp_path, 240, **tables), eicu_inputs(tmp_path, **tables)
    assert early["creatinine"].collect()["value"].to_list() == [3]
    assert whole["creatinine"].sort("minute").collect()["value"].to_list() == [3, 5]
    assert early["mean_bp"].collect().rows() == [(1, 120, 65)]
    assert drugs(early) == [(1, 200, 240, "norepinephrine", 0.1)]
    assert drugs(whole) == [(1, 200, 250, "norepinephrine", 0.1), (1, 250, 550, "norepinephrine", 0.2)]
    assert early["ventilation"].collect().rows() == [(1, 150, 240)]
    assert whole["ventilation"].collect().rows() == [(1, 150, 300)]  # the end was written at 300


def test_eicu_demo(real: Callable[[str], Path]) -> None:
    """One row per hour up to discharge from the unit; APACHE's score of the first day counts at its end only."""
    cohort = Cohort(EICU(str(real("eicu-demo"))))
    stays = cohort.store.stays
    found = pl.read_parquet(cohort.sepsis_tables()["sofa"])
    assert found.schema == pl.Schema(s.SOFA)
    hours = stays.select("stay_id", hours=((pl.col("icu_minutes") - 1) // 60).clip(0) + 1)
    assert (
        found.group_by("stay_id")
        .len("hours")
        .join(hours, on="stay_id")
        .filter(pl.col("hours") != pl.col("hours_right"))
        .is_empty()
    )
    assert found.filter(pl.col("end_minute") < 1440)["cns"].max() == 0
    assert found.filter(pl.col("end_minute") == 1440)["cns"].max() == 4
    told = cohort.store.hospitals()
    assert [(~told[name]).sum() for name in ("infusionDrug", "medication")] == [63, 42]  # cohorts.md 6
    assert [told.filter(~pl.col(name))["stays"].sum() for name in ("infusionDrug", "medication")] == [828, 521]
