"""Suspicion of infection and Sepsis-3: every rule on a small table, with its source, and the counts of the open demos.

[1] is Singer 2016 (doi:10.1001/jama.2016.0287), [2] mimic-code ``sepsis/*.sql`` and ``medication/antibiotic.sql``, [3] Bennett 2023
(doi:10.1093/gigascience/giad041), [4] YAIB (https://openreview.net/forum?id=ox2ATRM90I), [5] Moor 2023
(doi:10.1016/j.eclinm.2023.102124).
"""

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from datamodules import eicu, eicu_sepsis, eicu_sofa, mimiciv, mimiciv_sepsis, sepsis
from datamodules import sofa as score

DEMO = Path(__file__).parents[2] / "shared/data"
GIVEN = datetime(2150, 1, 5, 12)  # when the antibiotic of the small tables starts


def matched(*cultures: tuple[float | None, str, str | None, bool], given: datetime | None = GIVEN) -> dict:
    """The antibiotic's row for cultures of (hours from ``GIVEN`` or None for a date only, day of January, name, positive)."""
    rows = [
        (1, n, None if hours is None else GIVEN + timedelta(hours=hours), datetime(2150, 1, int(day)), name, grown)
        for n, (hours, day, name, grown) in enumerate(cultures)
    ]
    time, names = pl.Datetime("us"), ["patient_id", "specimen_id", "time", "date", "specimen", "positive"]
    schema = dict(zip(names, [pl.Int64(), pl.Int64(), time, time, pl.String(), pl.Boolean()], strict=True))
    antibiotic = pl.LazyFrame({"patient_id": [1], "time": pl.Series([given], dtype=time)})
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


def test_cultures_stay_with_their_antibiotic() -> None:
    """A lazy antibiotic table whose rows come in a new order at each reading still keeps every row's own culture."""
    patients = pl.DataFrame({"patient_id": range(50)})
    antibiotics = (
        patients.lazy()
        .map_batches(lambda frame: frame.sample(fraction=1, shuffle=True))
        .with_columns(time=pl.lit(GIVEN))
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
        culture_minute=pl.lit(None, pl.Int32)
    )


def sofa_hours(first: int, *scores: int) -> pl.DataFrame:
    ends = [first + 60 * n for n in range(len(scores))]
    return pl.DataFrame({"stay_id": [1] * len(ends), "end_minute": ends, "sofa_24h": pl.Series(scores, dtype=pl.Int8)})


@pytest.mark.parametrize(("end", "septic"), [(-2881, False), (-2880, True), (0, True), (1440, True), (1441, False)])
def test_sofa_window(end: int, septic: bool) -> None:
    """[1, 2] sepsis3.sql: end of the SOFA hour from 48 h before to 24 h after the suspicion, both included."""
    found = sepsis.sepsis3(suspected(5000), sofa_hours(5000 + end, 2))
    assert found["onset_minute"].to_list() == ([5000 + end] if septic else [])
    assert found.schema == pl.Schema(sepsis.SEPSIS3)


def test_baseline_zero_against_running_minimum() -> None:
    """[2] takes a SOFA of 2; [3] a rise by 2 above the lowest value since the window opened: a high level alone is none."""
    level, rise = sofa_hours(60, 4, 4, 4, 4), sofa_hours(60, 4, 3, 4, 5)
    assert sepsis.sepsis3(suspected(100), level)["onset_minute"].to_list() == [60]
    assert sepsis.sepsis3(suspected(100), level, "running_min").is_empty()
    assert sepsis.sepsis3(suspected(100), rise, "running_min").select("onset_minute", "sofa_score").rows() == [(240, 5)]
    before = sofa_hours(60, 0, *[3] * 60)  # the 0 of hour 0 is 49 hours older than the suspicion
    assert sepsis.sepsis3(suspected(60 + 49 * 60), before, "running_min").is_empty()


def test_first_or_any_suspicion() -> None:
    """[3] looks around the first suspicion of a stay, [2] and [5] around each; rows outside the ICU and without a time are none."""
    hours = sofa_hours(6000, 0, 3)
    many = suspected(100, 6000)
    assert sepsis.sepsis3(many, hours, "running_min", "first").is_empty()
    assert sepsis.sepsis3(many, hours, "running_min", "any")["suspected_minute"].to_list() == [6000]
    assert sepsis.sepsis3(many, hours)["suspected_minute"].to_list() == [6000]
    assert sepsis.sepsis3(suspected(6000, stay=None), hours).is_empty()
    assert sepsis.sepsis3(suspected(None), hours).is_empty()


def test_one_row_a_stay_the_earliest() -> None:
    """[2] sepsis3.sql: first by suspected time, then antibiotic, culture and SOFA hour."""
    rows = pl.DataFrame(
        {
            "stay_id": [1, 1, 1],
            "suspected_minute": [50, 10, 10],
            "antibiotic_minute": [60, 90, 30],
            "culture_minute": [50, 10, 10],
        }
    )
    assert sepsis.sepsis3(rows, sofa_hours(60, 1, 2, 3)).rows() == [(1, 120, 10, 30, 10, 2)]


def test_antibiotics_kept_up() -> None:
    """[4]: three days, or until death, without a gap of more than 24 h after the latest stop.

    Given at 0, 24 and 48 h for an hour: treatment until 49 h, a day more is 73 h. From 24 h on 96 h would be needed.
    """
    hours = [(0, 1), (24, 25), (48, 49)]
    table = pl.LazyFrame(
        [(1, 60 * a, 60 * b, None) for a, b in hours],
        schema=["stay_id", "antibiotic_minute", "stop_minute", "death_minute"],
        orient="row",
    ).cast({"death_minute": pl.Int64})
    assert sepsis.kept_up(table).collect()["antibiotic_minute"].to_list() == [0]
    died = table.with_columns(death_minute=pl.lit(60 * 70))
    assert sepsis.kept_up(died).collect()["antibiotic_minute"].to_list() == [0, 1440, 2880]
    gap = table.with_columns(pl.col("antibiotic_minute").replace(2880, 2942), pl.col("stop_minute").replace(2940, 2999))
    assert sepsis.kept_up(gap).collect().is_empty()  # 25 h to 49 h 2 min is too long
    long = table.with_columns(pl.col("stop_minute").replace(60, 60 * 100))
    assert sepsis.kept_up(long).collect().height == 3  # the latest stop counts, not the last


def test_definitions_are_checked() -> None:
    with pytest.raises(
        ValueError, match="'apache': MIMIC-IV lacks what it needs; choose one of mimic_code, ricu, yaib, moor"
    ):
        mimiciv_sepsis.derive(Path("nowhere"), pl.DataFrame(), "apache")
    with pytest.raises(ValueError, match="'sepsis2': there is no such definition; choose one of eicu, apache"):
        eicu_sepsis.derive(Path("nowhere"), pl.DataFrame(), "sepsis2")
    assert set(mimiciv_sepsis.DEFINITIONS) | set(eicu_sepsis.DEFINITIONS) == set(sepsis.DEFINITIONS)


# --- MIMIC-IV -----------------------------------------------------------------------------------------------------------------

MIMIC = {
    "icu/icustays": "subject_id,hadm_id,stay_id,intime,outtime",
    "icu/d_items": "itemid,label,category,linksto",
    "icu/inputevents": "subject_id,hadm_id,itemid,starttime,endtime",
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
        path.write_text("\n".join([header, *rows.get(path.stem, [])]) + "\n")
    return root


def order(time: str, drug: str = "Vancomycin", route: str = "IV", kind: str = "MAIN") -> str:
    return f"10,100,2150-01-{time},,{kind},{drug},{route}"


def mimic(root: Path, definition: str = "mimic_code", **rows: list[str]) -> pl.DataFrame:
    return mimiciv_sepsis.suspicion(write(root, MIMIC, {"icustays": ICU, **rows}), STAYS, definition)


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
        "inputevents": [f"10,100,225798,2150-01-0{day} 10:00:00,2150-01-0{day} 11:00:00" for day in (5, 6, 7)]
        + ["10,100,225158,2150-01-03 10:00:00,2150-01-03 11:00:00"],
        "microbiologyevents": ["10,1,2150-01-05 00:00:00,2150-01-05 08:00:00,BLOOD,,"],
    }
    ricu = mimic(tmp_path, "ricu", **tables)
    assert ricu.select("stay_id", "antibiotic_minute").rows() == [(1, -1441), (2, -1440), (2, 0), (2, 1440)]
    yaib = mimic(tmp_path, "yaib", **tables)
    assert yaib.select("stay_id", "antibiotic_minute", "suspected_minute").rows() == [(2, -1440, -1560)]


@pytest.mark.skipif(
    not (DEMO / "mimic-iv-demo").exists(), reason="the MIMIC-IV demo is not at ../shared/data/mimic-iv-demo"
)
def test_mimic_demo() -> None:
    """The counts of mimic-code's own SQL (DuckDB) on the demo; row by row both tables were found equal."""
    root = DEMO / "mimic-iv-demo"
    stays = mimiciv.stays(root)
    found = mimiciv_sepsis.derive(root, stays)
    rows = found["suspicion"]
    assert (rows.height, rows["stay_id"].drop_nulls().n_unique()) == (903, 89)
    assert rows.filter(pl.col("suspected_infection"), pl.col("stay_id").is_not_null())["stay_id"].n_unique() == 82
    septic = found["sepsis3"]
    assert (septic.height, stays.join(septic, on="stay_id")["hospital_death"].sum()) == (62, 14)
    assert set(found) == {"sofa", "suspicion", "sepsis3"}
    half = stays.head(70)
    part = mimiciv_sepsis.derive(root, half)["sepsis3"]
    assert part.equals(septic.join(half, on="stay_id", how="semi"))  # a stay's result does not hang on the others
    table = mimiciv_sepsis.compare_definitions(root, stays)
    assert table["definition"].to_list() == list(mimiciv_sepsis.DEFINITIONS)
    assert table.row(0) == ("mimic_code", 82, 58.57, 1, 17.1, 62, 44.29, 1, 22.6)


# --- eICU ---------------------------------------------------------------------------------------------------------------------

EICU = {
    "patient": "patientunitstayid,hospitalid,apacheadmissiondx",
    "medication": "patientunitstayid,drugstartoffset,drugname,drughiclseqno,routeadmin,drugordercancelled,drugstopoffset",
    "infusionDrug": "patientunitstayid,infusionoffset,drugname,drugrate,patientweight",
    "treatment": "patientunitstayid,treatmentoffset,treatmentstring",
    "microLab": "patientunitstayid,culturetakenoffset,culturesite,organism",
    "diagnosis": "patientunitstayid,diagnosisoffset,diagnosisstring",
}
BEDS = pl.DataFrame(
    {"stay_id": [1, 2, 3], "patient_id": ["a", "b", "c"], "hospital_id": ["x", "y", "z"], "weight": [80.0, 50.0, None]}
)
BEDS = BEDS.with_columns(death_minute=pl.lit(None, pl.Int32))
PATIENTS = ['1,x,"Sepsis, pulmonary"', '2,y,"Pneumonia, bacterial"', "3,z,CABG alone"]


def eicu_rows(root: Path, **rows: list[str]) -> Path:
    return write(root, EICU, {"patient": PATIENTS, **rows})


def test_eicu_antibiotics_by_name_and_learnt_code(tmp_path: Path) -> None:
    """cohorts.md 6: codes of unnamed rows are learnt from the named ones; cancelled orders, ointments and eye drops are none."""
    orders = [
        "1,0,vancomycin IV,4042,IV,No,600",
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
    root = eicu_rows(tmp_path, medication=orders, infusionDrug=["2,5,ZOSYN (ml/hr),20,"], treatment=notes)
    found = eicu_sepsis.antibiotics(root, BEDS).sort("stay_id", "minute").collect()
    assert found.select("stay_id", "minute", "source").rows() == [
        (1, 0, "name"),
        (1, 10, "code"),
        (2, 5, "infusion"),
        (3, 7, "treatment"),
    ]


def test_eicu_definitions_on_one_table(tmp_path: Path) -> None:
    """cohorts.md 5 and 9.3. Stay 1: APACHE sepsis, two antibiotics 24 h apart. Stay 2: one antibiotic and a late diagnosis.

    Stay 3: a culture that grows, and an antibiotic in ``treatment`` an hour later; hospital z fills no ``medication``.
    """
    root = eicu_rows(
        tmp_path,
        medication=[
            "1,100,cefepime,10132,IV,No,200",
            "1,1540,cefepime,10132,IV,No,1600",
            "2,100,cefepime,10132,IV,No,200",
        ],
        treatment=["3,60,pulmonary|medications|antibacterials"],
        microLab=["3,0,Blood,Escherichia coli", "2,9000,Urine,no growth"],
        diagnosis=[
            "2,1441,infectious diseases|systemic/other infections|sepsis",
            "3,1440,cardiovascular|shock / hypotension|septic shock",
        ],
    )

    def stays(definition: str) -> list[int]:
        return sorted(eicu_sepsis.suspicion(root, BEDS, definition).filter("suspected_infection")["stay_id"].unique())

    assert stays("apache") == [1]
    assert stays("diagnosis") == [3]  # what is written after 24 hours is not looked at
    assert stays("any_antibiotic_and_diagnosis") == [1, 3]
    assert stays("moor") == [1, 3]
    assert stays("eicu") == [1, 3]
    assert stays("literal") == [3]
    assert stays("yaib") == []
    rows = eicu_sepsis.suspicion(root, BEDS, "eicu")
    assert rows.schema == pl.Schema(sepsis.SUSPICION)
    assert rows.select("stay_id", "evidence", "suspected_minute").rows() == [
        (1, "apache", 0),
        (1, "antibiotic", 100),
        (3, "culture", 0),
        (3, "diagnosis", 1440),
    ]
    assert eicu_sofa.hospitals(root, BEDS).select("medication", "treatment", "microbiology").rows() == [
        (True, False, False),
        (True, False, True),
        (False, True, True),
    ]


def test_eicu_treatment_tiers_only_where_no_rates_are_charted(tmp_path: Path) -> None:
    """cohorts.md 9.4: the tier of dose in ``treatment`` stands in for a rate in hospitals without infusion rows.

    Stay 1 (hospital x, with infusions): norepinephrine 8 mcg/min at 80 kg is 0.1 mcg/kg/min, its treatment row is not used.
    Stay 3 has no weight, but its hospital z has no infusion rows, so its treatment row counts.
    """
    tier = "cardiovascular|shock|vasopressors|norepinephrine > 0.1 micrograms/kg/min"
    infusions = ["1,0,Norepinephrine (mcg/min),8,", "2,0,Norepinephrine (units),8,"]
    root = eicu_rows(
        tmp_path,
        infusionDrug=infusions,
        treatment=[f"1,90,{tier}", f"3,90,{tier}", "3,200,cardiovascular|shock|inotropic agent|dobutamine"],
    )
    found = eicu_sofa.pressors(root, BEDS).collect().sort("stay_id", "start_minute")
    assert found.select("stay_id", "drug").rows() == [(1, "norepinephrine"), (3, "norepinephrine"), (3, "dobutamine")]
    assert found["rate"][0] == pytest.approx(0.1)
    spans = BEDS.lazy().select("stay_id", first_minute=pl.lit(0), first_end=pl.lit(60), last_hour=pl.lit(5))
    hours = score.running(found.lazy(), spans).filter(pl.col("stay_id") == 3).sort("hour").collect()
    assert hours.select("hour", "norepinephrine", "dobutamine").rows() == [(1, 0.2, None), (3, None, 1.0)]


def test_eicu_stay_without_weight_has_no_rate(tmp_path: Path) -> None:
    """cohorts.md 8: mcg/min without any weight is no rate per kg, so it scores nothing; mcg/kg/min needs no weight."""
    root = eicu_rows(
        tmp_path, infusionDrug=["3,0,Norepinephrine (mcg/min),8,", "3,600,Norepinephrine (mcg/kg/min),0.2,"]
    )
    assert eicu_sofa.pressors(root, BEDS).collect().select("start_minute", "rate").rows() == [(600, 0.2)]


@pytest.mark.skipif(not (DEMO / "eicu-demo").exists(), reason="the eICU demo is not at ../shared/data/eicu-demo")
def test_eicu_demo() -> None:
    """The counts of cohorts.md 6 that do not hang on a list of drug names, and ours for those that do."""
    root = DEMO / "eicu-demo"
    stays = eicu.stays(root)
    table = eicu_sepsis.compare_definitions(root, stays)
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
    ours = {
        "named_antibiotic": 614,
        "named_or_coded_antibiotic": 985,
        "two_named_antibiotics": 333,
        "moor": 374,
        "yaib": 361,
        "eicu": 956,
    }
    assert {name: found[name][0] for name in ours} == ours
    assert (table["sepsis_stays"] <= table["suspected_stays"]).all()
    derived = eicu_sepsis.derive(root, stays, "moor", min_hospital_percent=15)
    share = (
        stays.with_columns(septic=pl.col("stay_id").is_in(derived["sepsis3"]["stay_id"].implode()))
        .group_by("hospital_id")
        .agg(pl.col("septic").mean())
    )
    assert share.filter(pl.col("septic") > 0)["septic"].min() >= 0.15  # type: ignore[operator]
