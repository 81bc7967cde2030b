"""Suspicion of infection and Sepsis-3: every rule on a small table, with its source, and the counts of the open demos.

[1] is Singer 2016 (doi:10.1001/jama.2016.0287), [2] mimic-code ``sepsis/*.sql`` and ``medication/antibiotic.sql``, [3] Bennett 2023
(doi:10.1093/gigascience/giad041), [4] YAIB (https://openreview.net/forum?id=ox2ATRM90I), [5] Moor 2023
(doi:10.1016/j.eclinm.2023.102124).
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from datamodules.cohort import Cohort
from datamodules.derive import sepsis
from datamodules.derive.sepsis import Definition
from datamodules.hospitals import EICU, MIMICIV

GIVEN = datetime(2150, 1, 5, 12)  # when the antibiotic of the small tables starts


def matched(*cultures: tuple[float | None, str, str | None, bool], given: datetime | None = GIVEN) -> dict:
    """The antibiotic's row for cultures of (hours from ``GIVEN`` or None for a date only, day of January, name, positive)."""
    rows = [
        (1, n, None if hours is None else GIVEN + timedelta(hours=hours), datetime(2150, 1, int(day)), name, grown)
        for n, (hours, day, name, grown) in enumerate(cultures)
    ]
    time, names = pl.Datetime("us"), ["patient_id", "specimen_id", "time", "date", "specimen", "positive"]
    schema = dict(zip(names, [pl.Int64(), pl.Int64(), time, time, pl.String(), pl.Boolean()], strict=True))
    antibiotic = pl.LazyFrame({"patient_id": [1], "time": pl.Series([given], dtype=time)}).with_columns(known="time")
    return (
        sepsis.match_cultures(antibiotic, pl.LazyFrame(rows, schema=schema, orient="row")).collect().row(0, named=True)
    )


TIMED = [  # hours of the culture from the antibiotic -> hours of the suspicion, None = not suspected
    (-72, -72),
    (-72.02, None),
    (-1, -1),
    (0, None),  # at the same time: neither comes first
    (0.02, 0),
    (24, 0),
    (24.02, None),
]


@pytest.mark.parametrize(("culture", "suspected"), TIMED)
def test_timed_culture(culture: float, suspected: float | None) -> None:
    """[2] suspicion_of_infection.sql: culture up to 72 h before, or up to 24 h after; the earlier of the two is the time."""
    row = matched((culture, "1", "BLOOD", False))
    assert row["suspected_infection"] == (suspected is not None)
    assert row["suspected_time"] == (None if suspected is None else GIVEN + timedelta(hours=suspected))


@pytest.mark.parametrize(("day", "suspected"), [("1", None), ("2", 2), ("4", 4), ("5", 5), ("6", 5.5), ("7", None)])
def test_culture_with_a_date_only(day: str, suspected: float | None) -> None:
    """[2]: 3 days before the antibiotic's day (the 5th) to that day count as before it, at midnight; the next day as after."""
    row = matched((None, day, "BLOOD", True))
    assert row["suspected_time"] == (
        None if suspected is None else datetime(2150, 1, 1) + timedelta(days=suspected - 1)
    )
    assert row["culture_time"] == (None if suspected is None else datetime(2150, 1, int(day)))


def test_earliest_culture_wins_and_culture_first() -> None:
    """[2]: of several the earliest; one before goes before one after; of several at one time a positive one; timed before dated."""
    assert matched((-5, "5", "B", False), (-30, "4", "A", False), (2, "5", "C", True))["specimen"] == "A"
    assert matched((-5, "5", "SWAB", False), (-5, "5", "BLOOD", True))["specimen"] == "BLOOD"
    assert matched((-5, "5", "first", False), (-5, "5", "second", False))["specimen"] == "first"
    assert matched((-5, "5", "timed", False), (None, "5", "dated", True))["specimen"] == "timed"
    assert matched((-5, "5", "timed", False), (None, "4", "dated", True))["specimen"] == "dated"


def test_unnamed_specimen_and_undated_antibiotic() -> None:
    """[2]: a specimen without a name is no culture; an antibiotic without a time is kept and is no suspicion."""
    row = matched((-5, "5", None, True))
    assert (row["suspected_infection"], row["suspected_time"], row["culture_time"]) == (
        False,
        None,
        GIVEN - timedelta(hours=5),
    )
    row = matched((-5, "5", "BLOOD", True), given=None)
    assert (row["suspected_infection"], row["culture_time"]) == (False, None)


@pytest.mark.parametrize(
    ("hours", "day", "known"),
    [
        (-5, "5", GIVEN),  # when the antibiotic is ordered
        (20, "6", GIVEN + timedelta(hours=20)),  # when the culture is taken
        (None, "5", datetime(2150, 1, 6)),  # a date only: when that day is over
        (None, "4", GIVEN),
        (None, "6", datetime(2150, 1, 7)),
        (30, "6", GIVEN),  # no culture: the row itself
    ],
)
def test_a_suspicion_is_known_when_both_are(hours: float | None, day: str, known: datetime) -> None:
    assert matched((hours, day, "BLOOD", False))["known"] == known


def test_cultures_stay_with_their_antibiotic() -> None:
    """A lazy antibiotic table whose rows come in a new order at each reading still keeps every row's own culture."""
    patients = pl.DataFrame({"patient_id": range(50)})
    antibiotics = (
        patients.lazy()
        .map_batches(lambda frame: frame.sample(fraction=1, shuffle=True))
        .with_columns(time=pl.lit(GIVEN), known=pl.lit(GIVEN))
    )
    taken = patients.lazy().select(
        "patient_id", specimen_id="patient_id", specimen=pl.col("patient_id").cast(pl.String), positive=pl.lit(False)
    )
    taken = taken.with_columns(time=pl.lit(GIVEN - timedelta(hours=1)), date=pl.lit(datetime(2150, 1, 5)))
    found = sepsis.match_cultures(antibiotics, taken).collect()
    assert found["specimen"].to_list() == found["patient_id"].cast(pl.String).to_list()


def suspected(*minutes: int | None, stay: int | None = 1) -> pl.DataFrame:
    rows = {"stay_id": [stay] * len(minutes), "suspected_minute": minutes, "antibiotic_minute": minutes}
    return pl.DataFrame(rows, schema_overrides={"stay_id": pl.Int64}).with_columns(
        culture_minute=pl.lit(None, pl.Int32), known_minute="suspected_minute"
    )


ZERO = Definition("")
RISE, RISE_OF_FIRST = Definition("", baseline="running_min"), Definition("", baseline="running_min", suspicions="first")


def sepsis3(suspicion: pl.DataFrame, sofa: pl.DataFrame, definition: Definition = ZERO) -> pl.DataFrame:
    return sepsis.sepsis3(suspicion, sofa, definition)


def sofa_hours(first: int, *scores: int) -> pl.DataFrame:
    ends = [first + 60 * n for n in range(len(scores))]
    return pl.DataFrame({"stay_id": [1] * len(ends), "end_minute": ends, "sofa_24h": pl.Series(scores, dtype=pl.Int8)})


@pytest.mark.parametrize(("end", "septic"), [(-2881, False), (-2880, True), (0, True), (1440, True), (1441, False)])
def test_sofa_window(end: int, septic: bool) -> None:
    """[1, 2] sepsis3.sql: end of the SOFA hour from 48 h before to 24 h after the suspicion, both included."""
    found = sepsis3(suspected(5000), sofa_hours(5000 + end, 2))
    assert found["onset_minute"].to_list() == ([5000 + end] if septic else [])
    assert found.schema == pl.Schema(sepsis.SEPSIS3)


def test_baseline_zero_against_running_minimum() -> None:
    """[2] takes a SOFA of 2; [3] a rise by 2 above the lowest value since the window opened: a high level alone is none."""
    level, rise = sofa_hours(60, 4, 4, 4, 4), sofa_hours(60, 4, 3, 4, 5)
    assert sepsis3(suspected(100), level)["onset_minute"].to_list() == [60]
    assert sepsis3(suspected(100), level, RISE).is_empty()
    assert sepsis3(suspected(100), rise, RISE).select("onset_minute", "sofa_score").rows() == [(240, 5)]
    before = sofa_hours(60, 0, *[3] * 60)  # the 0 of hour 0 is 49 hours older than the suspicion
    assert sepsis3(suspected(60 + 49 * 60), before, RISE).is_empty()


def test_first_or_any_suspicion() -> None:
    """[3] looks around the first suspicion of a stay, [2] and [5] around each; rows outside the ICU and without a time are none."""
    hours = sofa_hours(6000, 0, 3)
    many = suspected(100, 6000)
    assert sepsis3(many, hours, RISE_OF_FIRST).is_empty()
    assert sepsis3(many, hours, RISE)["suspected_minute"].to_list() == [6000]
    assert sepsis3(many, hours)["suspected_minute"].to_list() == [6000]
    assert sepsis3(suspected(6000, stay=None), hours).is_empty()
    assert sepsis3(suspected(None), hours).is_empty()


def test_one_row_a_stay_the_earliest() -> None:
    """[2] sepsis3.sql: first by suspected time, then antibiotic, culture and SOFA hour."""
    rows = pl.DataFrame(
        {
            "stay_id": [1, 1, 1],
            "suspected_minute": [50, 10, 10],
            "antibiotic_minute": [60, 90, 30],
            "culture_minute": [50, 10, 10],
            "known_minute": [60, 90, 30],
        }
    )
    assert sepsis3(rows, sofa_hours(60, 1, 2, 3)).rows() == [(1, 120, 10, 30, 10, 2, 120)]


def test_sepsis_is_known_when_the_suspicion_and_the_hour_are() -> None:
    """The later of the end of the SOFA hour and of what the suspicion rests on."""
    early, late = suspected(100), suspected(100).with_columns(known_minute=pl.lit(700))
    assert sepsis3(early, sofa_hours(60, 1, 2)).select("onset_minute", "known_minute").rows() == [(120, 120)]
    assert sepsis3(late, sofa_hours(60, 1, 2)).select("onset_minute", "known_minute").rows() == [(120, 700)]


@pytest.mark.parametrize(
    ("known", "end", "before", "septic"),
    [(100, 120, 121, True), (100, 120, 120, False), (119, 60, 120, True), (120, 60, 120, False), (700, 60, 720, True)],
)
def test_known_septic_is_strictly_before(known: int, end: int, before: int, septic: bool) -> None:
    """A suspicion that is known at the minute of the prediction, or an hour that ends with it, is not known before it."""
    rows = suspected(100).with_columns(known_minute=pl.lit(known))
    assert len(sepsis.known_septic(rows, sofa_hours(end, 2), ZERO, before)) == septic


def test_a_later_suspicion_does_not_hide_one_that_is_known() -> None:
    """The suspicion at 50 is complete at 5,000 only: before hour 24 the one at 100 counts."""
    rows = suspected(50, 100).with_columns(known_minute=pl.Series([5000, 110]))
    assert sepsis3(rows, sofa_hours(60, 2))["suspected_minute"].to_list() == [50]
    found = sepsis.known_septic(rows, sofa_hours(60, 2), ZERO, 1440)
    assert found.select("suspected_minute", "known_minute").rows() == [(100, 110)]


def at(hours: float) -> datetime:
    return datetime(2150, 1, 1) + timedelta(hours=hours)


def test_two_antibiotics_are_known_with_the_second() -> None:
    """[5]: another record within 24 h at another minute; the second may have been entered later than it was given."""
    rows = [(1, at(0), at(0)), (1, at(20), at(22)), (1, at(44.1), at(44.1)), (2, at(0), at(0)), (2, at(0), at(0))]
    schema = {"stay_id": pl.Int64, "time": pl.Datetime, "known": pl.Datetime}
    found = sepsis.two_in_a_day(pl.LazyFrame(rows, schema=schema, orient="row")).collect()
    assert found.rows() == [(1, at(0), at(22))]


def test_antibiotics_kept_up() -> None:
    """[4]: three days, or until death, without a gap of more than 24 h after the latest stop.

    Given at 0, 24 and 48 h for an hour: treatment until 49 h, a day more is 73 h. From 24 h on 96 h would be needed.
    """
    schema = {"stay_id": pl.Int64, "time": pl.Datetime, "stop": pl.Datetime, "death": pl.Datetime, "known": pl.Datetime}

    def kept(*hours: tuple[float, float], death: float | None = None) -> list[tuple[datetime, datetime]]:
        rows = [(1, at(a), at(b), None if death is None else at(death), at(a)) for a, b in hours]
        return sepsis.kept_up(pl.LazyFrame(rows, schema=schema, orient="row")).select("time", "known").collect().rows()

    assert kept((0, 1), (24, 25), (48, 49)) == [(at(0), at(72))]  # known when the three days are over
    died = kept((0, 1), (24, 25), (48, 49), death=70)
    assert died == [(at(0), at(70)), (at(24), at(70)), (at(48), at(70))]  # ... or with the death
    assert kept((0, 1), (24, 25), (49.04, 50)) == []  # 25 h to 49 h 2 min is too long
    assert len(kept((0, 100), (24, 25), (48, 49))) == 3  # the latest stop counts, not the last


def test_definitions_are_checked(mimic: Path, eicu: Path) -> None:
    with pytest.raises(
        ValueError, match="'apache': MIMICIV has none of that name; choose one of mimic_code, ricu, yaib, moor"
    ):
        Cohort(MIMICIV(str(mimic), definition="apache")).sepsis_tables()
    with pytest.raises(ValueError, match="'sepsis2': EICU has none of that name; choose one of eicu, apache"):
        Cohort(EICU(str(eicu), definition="sepsis2")).known_septic()
    assert (MIMICIV().definition, EICU().definition) == ("mimic_code", "eicu")
    described = [d for h in (MIMICIV, EICU) for d in h.definitions.values() if not d.partial]
    assert all(d.text for d in described)


# --- MIMIC-IV -----------------------------------------------------------------------------------------------------------------

MIMIC = {
    "icu/chartevents": "subject_id,stay_id,itemid,charttime,value,valuenum",
    "hosp/labevents": "subject_id,specimen_id,itemid,charttime,valuenum",
    "icu/outputevents": "stay_id,itemid,charttime,value",
    "icu/icustays": "subject_id,hadm_id,stay_id,intime,outtime",
    "icu/d_items": "itemid,label,category,linksto",
    "icu/inputevents": "subject_id,hadm_id,stay_id,itemid,starttime,endtime,rate,statusdescription",
    "hosp/prescriptions": "subject_id,hadm_id,starttime,stoptime,drug_type,drug,route",
    "hosp/microbiologyevents": "subject_id,micro_specimen_id,chartdate,charttime,spec_type_desc,org_itemid,org_name",
}
STAYS = pl.DataFrame(
    {"stay_id": [1, 2], "patient_id": ["10", "10"], "death_minute": pl.Series([None, None], dtype=pl.Int32)}
)
ICU = ["10,100,1,2150-01-02 10:00:30,2150-01-04 10:00:00", "10,100,2,2150-01-06 10:00:00,2150-01-08 10:00:00"]


def write(root: Path, headers: dict[str, str], rows: dict[str, list[str]]) -> Path:
    for table, header in headers.items():
        path = root / f"{table}.csv"
        path.parent.mkdir(exist_ok=True)
        full = [row + "," * (header.count(",") - row.count(",")) for row in rows.get(path.stem, []) if '"' not in row]
        quoted = [row for row in rows.get(path.stem, []) if '"' in row]
        path.write_text("\n".join([header, *full, *quoted]) + "\n")
    return root


def order(time: str, drug: str = "Vancomycin", route: str = "IV", kind: str = "MAIN") -> str:
    return f"10,100,2150-01-{time},,{kind},{drug},{route}"


def mimic(root: Path, definition: str = "mimic_code", **rows: list[str]) -> pl.DataFrame:
    hospital = MIMICIV(str(write(root, MIMIC, {"icustays": ICU, **rows})))
    return hospital.suspicion(hospital.tables(STAYS), STAYS, hospital.definitions[definition])


def test_mimic_antibiotic_belongs_to_the_stay_it_starts_in(tmp_path: Path) -> None:
    """[2] antibiotic.sql: intime <= start < outtime, else no stay and no minutes; antibiotics before admission are kept."""
    times = ["01 10:00:00", "02 10:00:00", "02 10:01:00", "04 09:59:00", "04 10:00:00", "06 10:00:00"]
    found = mimic(tmp_path, prescriptions=[order(time) for time in times])
    assert found.schema == pl.Schema(sepsis.SUSPICION)
    assert found["stay_id"].to_list() == [None, None, 1, 1, None, 2]
    assert found["antibiotic_minute"].to_list() == [
        None,
        None,
        0,
        2878,
        None,
        0,
    ]  # 10:01:00 is 30 s after intime: minute 0


def test_mimic_which_orders_are_antibiotics(tmp_path: Path) -> None:
    """[2] antibiotic.sql: by name, route and kind; a drug and route that were once a main order count as a base too."""
    rows = [
        order("03 10:00:00"),
        order("03 11:00:00", kind="BASE"),
        order("03 11:00:00", "Cefepime", kind="BASE"),
        order("03 11:00:00", "Furosemide"),
        order("03 11:00:00", "Erythromycin 0.5% Ophth Oint", "BOTH EYES"),
        order("03 11:00:00", "Tobramycin", "OU"),
        order("03 11:00:00", "MetRONIDAZOLE Gel"),
        order("03 11:00:00", "Zosyn", ""),
        order("03 12:00:00", "MetRONIDAZOLE (FLagyl)", "PO"),
    ]
    assert mimic(tmp_path, prescriptions=rows)["antibiotic"].to_list() == [
        "Vancomycin",
        "Vancomycin",
        "MetRONIDAZOLE (FLagyl)",
    ]


def test_mimic_cultures(tmp_path: Path) -> None:
    """[2]: one row a specimen; positive by a named organism that is not "negative" (90856) or cancelled (90760)."""
    cells = [
        "1,2150-01-03 00:00:00,2150-01-03 08:00:00,BLOOD,90856,NEGATIVE",
        "1,2150-01-03 00:00:00,2150-01-03 08:00:00,BLOOD,80002,ESCHERICHIA COLI",
    ]
    found = mimic(tmp_path, prescriptions=[order("03 10:00:00")], microbiologyevents=[f"10,{cell}" for cell in cells])
    assert found.select("positive_culture", "culture_minute", "suspected_minute", "antibiotic_minute").row(0) == (
        True,
        1319,
        1319,
        1439,
    )
    assert mimic(tmp_path, prescriptions=[order("03 10:00:00")], microbiologyevents=[f"10,{cells[0]}"])[
        "positive_culture"
    ].to_list() == [False]
    dated = mimic(
        tmp_path, prescriptions=[order("03 10:00:00")], microbiologyevents=["10,1,2150-01-02 00:00:00,,URINE,,"]
    )
    assert dated["suspected_minute"].to_list() == [-601]  # midnight before admission, rounded down


def test_mimic_other_definitions(tmp_path: Path) -> None:
    """[3]: orders and administrations of the admission count for the stay that is on or next; [4]: administrations kept up."""
    tables = {
        "prescriptions": [order("01 10:00:00")],
        "d_items": ["225798,Vancomycin,Antibiotics,inputevents", "225158,NaCl 0.9%,Fluids/Intake,inputevents"],
        "inputevents": [f"10,100,2,225798,2150-01-0{day} 10:00:00,2150-01-0{day} 11:00:00" for day in (5, 6, 7)]
        + ["10,100,1,225158,2150-01-03 10:00:00,2150-01-03 11:00:00"]
        + ["10,100,1,225798,2150-01-03 10:00:00,2150-01-03 11:00:00,,Rewritten"],  # never given
        "microbiologyevents": ["10,1,2150-01-05 00:00:00,2150-01-05 08:00:00,BLOOD,,"],
    }
    ricu = mimic(tmp_path, "ricu", **tables)
    assert ricu.select("stay_id", "antibiotic_minute").rows() == [(1, -1441), (2, -1440), (2, 0), (2, 1440)]
    yaib = mimic(tmp_path, "yaib", **tables)
    assert yaib.select("stay_id", "antibiotic_minute", "suspected_minute").rows() == [(2, -1440, -1560)]


def test_mimic_when_a_suspicion_is_known(tmp_path: Path) -> None:
    """An order is known at its start, a suspicion with the later of order and culture; a course that is kept up after 72 hours."""
    cultures = ["10,1,2150-01-03 00:00:00,2150-01-03 22:00:00,BLOOD,,"]
    found = mimic(tmp_path, prescriptions=[order("03 10:00:00")], microbiologyevents=cultures)
    assert found.select("antibiotic_minute", "suspected_minute", "known_minute").row(0) == (1439, 1439, 2159)
    dated = ["10,1,2150-01-03 00:00:00,,BLOOD,,"]  # midnight is minute 839, the end of that day minute 2279
    found = mimic(tmp_path, prescriptions=[order("03 10:00:00")], microbiologyevents=dated)
    assert found.select("suspected_minute", "known_minute").row(0) == (-601 + 1440, 2279)
    times = ("2 10:01", "3 10:00", "4 09:59")  # all within the stay
    given = [f"10,100,1,225798,2150-01-0{time}:00,2150-01-0{time[0]} 11:00:00" for time in times]
    tables = {"d_items": ["225798,Vancomycin,Antibiotics,inputevents"], "inputevents": given}
    found = mimic(
        tmp_path, "yaib", **tables, microbiologyevents=["10,1,2150-01-02 00:00:00,2150-01-02 09:00:00,BLOOD,,"]
    )
    assert found.select("antibiotic_minute", "known_minute").row(0) == (0, 4320)


def test_mimic_stay_without_an_end_is_still_in_progress(tmp_path: Path) -> None:
    open_stay = [ICU[0], "10,100,2,2150-01-06 10:00:00,"]
    found = mimic(tmp_path, icustays=open_stay, prescriptions=[order("09 10:00:00")])
    assert found.select("stay_id", "antibiotic_minute").rows() == [(2, 4320)]


def test_mimic_demo(real: Callable[[str], Path]) -> None:
    """The counts of mimic-code's own SQL (DuckDB) on the demo; row by row both tables were found equal."""
    cohort = Cohort(MIMICIV(str(real("mimic-iv-demo"))))
    hospital, stays = cohort.hospital, cohort.store.stays
    found = {name: pl.read_parquet(path) for name, path in cohort.sepsis_tables().items()}
    assert set(found) == {"sofa", "suspicion", "sepsis3"}
    rows = found["suspicion"]
    assert rows.schema == pl.Schema(sepsis.SUSPICION)
    assert (rows.height, rows["stay_id"].drop_nulls().n_unique()) == (903, 89)
    assert rows.filter(pl.col("suspected_infection"), pl.col("stay_id").is_not_null())["stay_id"].n_unique() == 82
    septic = found["sepsis3"]
    assert (septic.height, stays.join(septic, on="stay_id")["hospital_death"].sum()) == (62, 14)
    assert pl.read_parquet(cohort.infusions()).height == 1750
    half = stays.filter(pl.col("patient_id").is_in(stays["patient_id"].unique(maintain_order=True)[:50].implode()))
    patients = half.select(pl.col("patient_id").cast(pl.Int64)).unique().lazy()
    tables = {name: rows.join(patients, on="patient_id", how="semi") for name, rows in hospital.tables(half).items()}
    definition = hospital.definitions["mimic_code"]
    part = sepsis.sepsis3(hospital.suspicion(tables, half, definition), found["sofa"], definition)
    assert part.equals(septic.join(half, on="stay_id", how="semi"))  # a stay's result does not hang on the others
    table = cohort.compare_definitions()
    assert table["definition"].to_list() == list(hospital.definitions)
    assert table.row(0) == ("mimic_code", 82, 58.57, 1, 17.1, 62, 44.29, 1, 22.6)


# --- eICU ---------------------------------------------------------------------------------------------------------------------

EICU_TABLES = {
    "patient": "patientunitstayid,apacheadmissiondx",
    "admissionDx": "patientunitstayid,admitdxenteredoffset,admitdxname",
    "medication": "patientunitstayid,drugstartoffset,drugname,drughiclseqno,routeadmin,drugordercancelled,drugstopoffset,drugorderoffset",
    "infusionDrug": "patientunitstayid,infusionoffset,drugname,drugrate,patientweight",
    "treatment": "patientunitstayid,treatmentoffset,treatmentstring",
    "microLab": "patientunitstayid,culturetakenoffset,culturesite,organism",
    "diagnosis": "patientunitstayid,diagnosisoffset,diagnosisstring",
    "vitalPeriodic": "patientunitstayid,observationoffset,heartrate,respiration,sao2,temperature,"
    "systemicsystolic,systemicdiastolic,systemicmean,etco2",
    "vitalAperiodic": "patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,noninvasivemean",
    "lab": "patientunitstayid,labresultoffset,labname,labresult,labmeasurenamesystem,labmeasurenameinterface",
    "apacheApsVar": "patientunitstayid,intubated,eyes,motor,verbal",
    "respiratoryCharting": "patientunitstayid,respchartoffset,respcharttypecat,respchartvaluelabel,respchartvalue",
    "respiratoryCare": "patientunitstayid,respcarestatusoffset,ventstartoffset,ventendoffset,priorventstartoffset,priorventendoffset",
    "intakeOutput": "patientunitstayid,intakeoutputoffset,cellpath,cellvaluenumeric",
}
BEDS = pl.DataFrame(
    {"stay_id": [1, 2, 3], "patient_id": ["a", "b", "c"], "hospital_id": ["x", "y", "z"], "weight": [80.0, 50.0, None]}
)
BEDS = BEDS.with_columns(death_minute=pl.lit(None, pl.Int32))
PATIENTS = ['1,"Sepsis, pulmonary"', '2,"Pneumonia, bacterial"', "3,CABG alone"]


def eicu_suspicion(root: Path, definition: str, stays: pl.DataFrame = BEDS, **rows: list[str]) -> pl.DataFrame:
    hospital = EICU(str(write(root, EICU_TABLES, {"patient": PATIENTS, **rows})))
    return hospital.suspicion(hospital.tables(stays), stays, hospital.definitions[definition])


def test_eicu_antibiotics_by_name_and_code(tmp_path: Path) -> None:
    """cohorts.md 6: rows without a name count by their code (eicu_antibiotic_codes.csv), whatever the named rows are; cancelled orders, ointments and eye drops are none."""
    orders = [
        "2,0,vancomycin IV,4042,IV,No,600",
        "1,10,,4042,IV,No,0",  # unnamed, known code
        "1,20,,9999,IV,No,0",  # unnamed, unknown code
        "1,30,mupirocin 2 % oint,3385,TOP,No,0",
        "1,40,,3385,TOP,No,0",
        "1,50,ceftriaxone,3996,IV,Yes,0",
        "1,60,tobramycin,77,Ophthalmic,No,0",
        "1,70,furosemide,3660,IV,No,0",
    ]
    notes = [
        "3,7,infectious diseases|medications|therapeutic antibacterials",
        "3,9,surgery|infection|prophylactic antibacterials",
    ]
    tables = {"medication": orders, "infusionDrug": ["2,5,ZOSYN (ml/hr),20,"], "treatment": notes}
    found = eicu_suspicion(tmp_path, "any_antibiotic", **tables).sort("stay_id", "antibiotic_minute")
    assert found.select("stay_id", "antibiotic_minute", "antibiotic").rows() == [
        (1, 10, "vancomycin"),
        (2, 0, "vancomycin IV"),
        (2, 5, "ZOSYN (ml/hr)"),
        (3, 7, "infectious diseases|medications|therapeutic antibacterials"),
    ]
    named = eicu_suspicion(tmp_path, "named_antibiotic", **tables)
    assert sorted(named.select("stay_id", "antibiotic_minute").rows()) == [(2, 0), (2, 5)]
    alone = eicu_suspicion(tmp_path, "any_antibiotic", medication=orders[1:2])  # nothing is learnt from other rows
    assert alone.select("stay_id", "antibiotic").rows() == [(1, "vancomycin")]


def test_eicu_definitions_on_one_table(tmp_path: Path) -> None:
    """cohorts.md 5 and 9.3. Stay 1: APACHE sepsis, two antibiotics 24 h apart. Stay 2: one antibiotic and a late diagnosis.

    Stay 3: a culture that grows, and an antibiotic in ``treatment`` an hour later; hospital z fills no ``medication``.
    """
    tables = {
        "medication": [
            "1,100,cefepime,10132,IV,No,200",
            "1,1540,cefepime,10132,IV,No,1600",
            "2,100,cefepime,10132,IV,No,200",
        ],
        "treatment": ["3,60,pulmonary|medications|antibacterials"],
        "microLab": ["3,0,Blood,Escherichia coli", "2,9000,Urine,no growth"],
        "diagnosis": [
            "2,1441,infectious diseases|systemic/other infections|sepsis",
            "3,1440,cardiovascular|shock / hypotension|septic shock",
        ],
    }

    def stays(definition: str) -> list[int]:
        return sorted(eicu_suspicion(tmp_path, definition, **tables).filter("suspected_infection")["stay_id"].unique())

    assert stays("apache") == [1]
    assert stays("diagnosis") == [3]  # what is written after 24 hours is not looked at
    assert stays("any_antibiotic_and_diagnosis") == [1, 3]
    assert stays("moor") == [1, 3]
    assert stays("eicu") == [1, 3]
    assert stays("literal") == [3]
    assert stays("yaib") == []
    rows = eicu_suspicion(tmp_path, "eicu", **tables)
    assert rows.schema == pl.Schema(sepsis.SUSPICION)
    assert rows.select("stay_id", "evidence", "suspected_minute").rows() == [
        (1, "apache", 0),
        (1, "antibiotic", 100),
        (3, "culture", 0),
        (3, "diagnosis", 1440),
    ]


def known(found: pl.DataFrame) -> list[tuple]:
    return found.select("stay_id", "evidence", "suspected_minute", "known_minute").rows()


def test_eicu_when_a_suspicion_is_known(tmp_path: Path) -> None:
    """Two antibiotics with the second, an order when it was entered, a culture that grows two days after it was taken, a diagnosis when
    it was written, that of admission when admissionDx says so, else when APACHE's first day is over."""
    orders = [
        "1,100,cefepime,10132,IV,No,200,90",
        "1,900,cefepime,10132,IV,No,1000,1000",
        "2,100,cefepime,10132,IV,No,200,50",
    ]
    tables = {
        "medication": orders,
        "microLab": ["3,60,Blood,Escherichia coli", "3,60,Urine,no growth"],
        "diagnosis": ["2,700,infectious diseases|systemic/other infections|sepsis"],
    }
    whole = [
        (1, "apache", 0, 1440),
        (1, "antibiotic", 100, 1000),
        (2, "diagnosis", 700, 700),
        (3, "culture", 60, 60 + 2880),
    ]
    assert known(eicu_suspicion(tmp_path, "eicu", **tables)) == whole
    entered = [
        '1,45,"Sepsis, pulmonary"',
        '1,400,"Sepsis, pulmonary"',
        '2,50,"Sepsis, pulmonary"',
        '1,20,"Sepsis, renal"',
    ]
    found = known(eicu_suspicion(tmp_path, "eicu", **tables, admissionDx=entered))
    assert found == [(1, "apache", 0, 45), *whole[1:]]
    before = eicu_suspicion(tmp_path, "apache", admissionDx=['1,-30,"Sepsis, pulmonary"'])
    assert known(before) == [(1, "apache", 0, 0)]  # it counts at admission, so it is not known before
    both = known(eicu_suspicion(tmp_path, "any_antibiotic_and_diagnosis", **tables))
    assert both == [(1, "antibiotic", 100, 1440), (1, "antibiotic", 900, 1440), (2, "antibiotic", 100, 700)]
    culture = known(eicu_suspicion(tmp_path, "literal", **tables | {"microLab": ["1,1000,Blood,no growth"]}))
    assert culture[:2] == [
        (1, "antibiotic", 100, 1000),
        (1, "antibiotic", 900, 1000),
    ]  # known with the culture, whatever grows


def test_eicu_a_course_is_known_when_it_was_kept_up(tmp_path: Path) -> None:
    """[4] after 72 hours, or with the death of a patient who was treated until then."""
    beds = BEDS.with_columns(death_minute=pl.Series([None, 2000, None], dtype=pl.Int32))
    orders = [
        "1,100,cefepime,10132,IV,No,4500,",
        "2,100,cefepime,10132,IV,No,1000,",
        "3,100,cefepime,10132,IV,No,1000,",
    ]
    found = eicu_suspicion(tmp_path, "yaib", beds, medication=orders)
    assert known(found) == [(1, "antibiotic", 100, 100 + 4320), (2, "antibiotic", 100, 2000)]


def test_eicu_counts_every_hospital_unless_a_share_is_asked_for(eicu: Path) -> None:
    """Definition "eicu" leaves out no hospital for what it does not chart; ``min_hospital_percent`` does, for its septic share."""
    cohort = Cohort(EICU(str(eicu)))
    septic = pl.read_parquet(cohort.sepsis_tables()["sepsis3"])
    filled = cohort.store.hospitals()
    members = cohort.store.stays.join(septic, on="stay_id", how="semi").join(filled, on="hospital_id")
    assert not members["microLab"].all() or not members["medication"].all() or not members["infusionDrug"].all()
    chosen = Cohort(EICU(str(eicu), min_hospital_percent=40)).known_septic()
    assert len(chosen) < len(cohort.known_septic())


def test_eicu_demo(real: Callable[[str], Path]) -> None:
    """The counts of cohorts.md 6 that do not hang on a list of drug names, and ours for those that do."""
    root = str(real("eicu-demo"))
    cohort = Cohort(EICU(root))
    stays, table = cohort.store.stays, cohort.compare_definitions()
    found = {
        row["definition"]: (row["suspected_stays"], row["suspected_hospitals"]) for row in table.iter_rows(named=True)
    }
    exact = {
        "apache": (288, 133),
        "apache_or_pneumonia": (392, 154),
        "diagnosis": (304, 130),
        "diagnosis_any_time": (329, 133),
        "positive_culture": (42, 11),
        "named_antibiotic_and_culture": (1, 1),
    }
    assert {name: found[name] for name in exact} == exact
    ours = {"named_antibiotic": 614, "named_or_coded_antibiotic": 985, "two_named_antibiotics": 333}
    assert {name: found[name][0] for name in ours} == ours
    both = dict(zip(table["definition"], table.select("suspected_stays", "sepsis_stays").rows(), strict=True))
    definitions = {
        "eicu": (956, 639),
        "apache": (288, 221),
        "diagnosis": (304, 239),
        "any_antibiotic_and_diagnosis": (323, 257),
        "yaib": (361, 160),
        "moor": (374, 188),
        "literal": (29, 23),
    }
    assert {name: both[name] for name in definitions} == definitions
    assert (table["sepsis_stays"] <= table["suspected_stays"]).all()
    most = Cohort(EICU(root, definition="moor", min_hospital_percent=15))
    septic = pl.read_parquet(most.sepsis_tables()["sepsis3"])
    share = (
        stays.with_columns(septic=pl.col("stay_id").is_in(septic["stay_id"].implode()))
        .group_by("hospital_id")
        .agg(pl.col("septic").mean())
    )
    assert share.filter(pl.col("septic") > 0)["septic"].min() >= 0.15  # type: ignore[operator]


@pytest.mark.parametrize(("name", "folder"), [("MIMICIV", "mimic-iv-demo"), ("EICU", "eicu-demo")])
def test_who_is_known_to_be_septic_is_septic_on_the_demos(name: str, folder: str, real: Callable[[str], Path]) -> None:
    """What was known before hour 24 is known before hour 24; with time it becomes more."""
    root = str(real(folder))
    kind = {"MIMICIV": MIMICIV, "EICU": EICU}[name]
    early, late = (Cohort(kind(root, hours=hours)).known_septic() for hours in (24, 72))
    for found, hours in ((early, 24), (late, 72)):
        assert found.schema == pl.Schema(sepsis.SEPSIS3)
        assert (found["known_minute"] < hours * 60).all()
        assert (found["known_minute"] >= found["onset_minute"]).all()
    assert set(early["stay_id"]) <= set(late["stay_id"])
    whole = pl.read_parquet(Cohort(kind(root)).sepsis_tables()["suspicion"])
    told = whole.filter(pl.col("suspected_minute").is_not_null(), pl.col("stay_id").is_not_null())
    assert told["known_minute"].null_count() == 0
    assert (told["known_minute"] >= told["suspected_minute"]).all()
