"""eICU: each clinical rule on a small table before and after, then the counts on the open demo."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from datamodules.cohort import Cohort
from datamodules.hospitals import EICU
from datamodules.hospitals.eicu import infusions
from datamodules.schema import EVENTS, INFUSIONS, STAYS, conform
from datamodules.store import Store

PATIENT = (
    "patientunitstayid,patienthealthsystemstayid,gender,age,hospitalid,admissionheight,hospitaladmitoffset,hospitaldischargeyear,"
    "hospitaldischargeoffset,hospitaldischargestatus,unittype,unitvisitnumber,admissionweight,unitdischargeoffset,unitdischargestatus,"
    "uniquepid,apacheadmissiondx"
)
INFUSION = "infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,volumeoffluid,patientweight"
LAB = (
    "labid,patientunitstayid,labresultoffset,labname,labresult,labmeasurenamesystem,labmeasurenameinterface,"
    "labresultrevisedoffset,labresulttext"
)
FLUIDS = "intakeoutputid,patientunitstayid,intakeoutputoffset,cellpath,cellvaluenumeric,intakeoutputentryoffset"
CHARTING = "respchartid,patientunitstayid,respchartoffset,respcharttypecat,respchartvaluelabel,respchartvalue,respchartentryoffset"
NURSE = (
    "nursingchartid,patientunitstayid,nursingchartoffset,nursingchartcelltypevallabel,nursingchartcelltypevalname,"
    "nursingchartvalue,nursingchartentryoffset"
)
PERIODIC = "heartrate,respiration,sao2,temperature,systemicsystolic,systemicdiastolic,systemicmean,etco2"
APERIODIC = "noninvasivesystolic,noninvasivediastolic,noninvasivemean"
HEADERS = {
    "vitalPeriodic": f"vitalperiodicid,patientunitstayid,observationoffset,{PERIODIC}",
    "vitalAperiodic": f"vitalaperiodicid,patientunitstayid,observationoffset,{APERIODIC}",
    "apacheApsVar": "apacheapsvarid,patientunitstayid,intubated,eyes,motor,verbal",
    "lab": LAB,
    "respiratoryCharting": CHARTING,
    "respiratoryCare": "respcareid,patientunitstayid,respcarestatusoffset,ventstartoffset,ventendoffset,priorventstartoffset,priorventendoffset",
    "intakeOutput": FLUIDS,
    "infusionDrug": INFUSION,
}
CARE = HEADERS["respiratoryCare"]


def write(folder: Path, table: str, header: str, *rows: str) -> None:
    width = header.count(",")
    full = [
        row + "," * (width - row.count(",")) if '"' not in row else row for row in rows
    ]  # columns at the end may be left out
    (folder / f"{table}.csv").write_text("\n".join([header, *full]) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An eICU folder with headers only, to be filled table by table."""
    for table, header in HEADERS.items():
        write(tmp_path, table, header)
    return tmp_path


def events(folder: Path, stays: pl.DataFrame | None = None) -> pl.DataFrame:
    """What the hospital gives of stay 1 (80 kg), or of others; rejected rows with the reason."""
    hospital, stays = EICU(str(folder)), some_stays(a=80.0) if stays is None else stays
    frame = pl.concat(hospital.events(hospital.tables(stays), stays)).collect(engine="streaming")
    assert frame.schema == pl.Schema(EVENTS)
    return frame.with_columns(pl.col("concept").cast(pl.String), pl.coalesce("known_minute", "minute"))


def read(folder: Path, *columns: str, stays: pl.DataFrame | None = None) -> list[tuple]:
    """Minute, concept, value and unit (or other columns) of the rows with a value."""
    kept = events(folder, stays).filter(pl.col("dropped").is_null(), pl.col("value").is_not_null())
    return sorted(kept.select(columns or ("minute", "concept", "value", "unit")).rows(), key=str)


def store(root: Path) -> Store:
    return Cohort(EICU(str(root))).store


def counted(root: Path, concept: str, *columns: str) -> list[int]:
    """Cells of the coverage table."""
    return list(store(root).coverage().filter(pl.col("concept") == concept).select(columns).row(0))


def infusion_rows(folder: Path, stays: pl.DataFrame) -> pl.DataFrame:
    flowsheet = {"cellpath": pl.String, "cellvaluenumeric": pl.Float64, "intakeoutputentryoffset": pl.Int64}
    tables = {"infusionDrug": infusions.kept(folder)}
    if (folder / "infusionDrug.csv").exists() and not (folder / "intakeOutput.csv").exists():
        tables["intakeOutput"] = pl.LazyFrame(schema={"stay_id": pl.Int64, "minute": pl.Int32, **flowsheet})
    else:
        tables = EICU(str(folder)).tables(stays)
    return infusions.infusion_rows(tables, stays).collect()


def some_stays(**weight: float | None) -> pl.DataFrame:
    """Stays 1, 2, ... with the weights given (kg)."""
    ids = list(range(1, len(weight) + 1))
    return conform(
        pl.DataFrame({"stay_id": ids, "patient_id": [str(i) for i in ids], "weight": list(weight.values())}),
        STAYS,
        "stays",
    )


def patient(stay: int, pid: str = "p", hospital_stay: int = 1, visit: int = 1, **other: object) -> str:
    row: dict[str, object] = dict.fromkeys(PATIENT.split(","), "") | {
        "patientunitstayid": stay,
        "patienthealthsystemstayid": hospital_stay,
        "hospitalid": 7,
        "unitvisitnumber": visit,
        "uniquepid": pid,
        "hospitaladmitoffset": -60,
        "hospitaldischargeoffset": 5000,
        "unitdischargeoffset": 3000,
    }
    return ",".join(str(v) for v in (row | other).values())


@pytest.mark.parametrize(
    ("height", "weight", "cm", "kg"),
    [
        ("80", "110", 203.2, 110),  # inches: 48 to 84 with 35 to 250 kg
        ("71", "100", 180.34, 100),  # which [E] takes for swapped: 100 cm and 71 kg
        ("48", "35", 121.92, 35),
        ("84", "250", 213.36, 250),
        ("84.5", "110", 110, 84.5),  # swapped
        ("47", "110", 110, 47),
        ("66", "30", 66, 30),  # too light for inches
        ("1.7", "70", 170, 70),
        ("17", "70", 170, 70),
        ("0.3", "70", None, 70),
        ("600", "70", None, 70),
        ("170", "0.5", 170, None),
        ("170", "515", 170, None),
        ("90", "105", None, 105),  # alike: nothing says that they are swapped, and nobody is 90 cm at 105 kg
        ("95", "80", None, 80),
        ("59", "30", None, 30),  # outside the range of concepts.csv
        ("170", "301", 170, None),
        ("", "", None, None),
    ],
)
def test_body_size_is_repaired(tmp_path, height, weight, cm, kg):
    """[E: eicu-code pivoted-weight.sql] swapped and equal fields, metres, decimetres, inches, and values that cannot be."""
    write(tmp_path, "patient", PATIENT, patient(1, admissionheight=height, admissionweight=weight))
    after = EICU(str(tmp_path)).stays().select("height", "weight").row(0)
    assert after == (cm if cm is None else pytest.approx(cm, abs=1e-3), kg)


def test_age_sex_and_unit(tmp_path):
    """[eICU documentation, patient table] ages over 89 are written "> 89"; every unit type has a place."""
    before = [("> 89", "Male", "MICU"), ("54", "Female", "CTICU"), ("", "Unknown", "Step-down")]
    write(
        tmp_path,
        "patient",
        PATIENT,
        *(patient(i, str(i), age=a, gender=s, unittype=u) for i, (a, s, u) in enumerate(before)),
    )
    after = EICU(str(tmp_path)).stays()
    assert after.schema == pl.Schema(STAYS)
    assert after.select("age", "sex", "unit").rows() == [
        (90, 1, "medical"),
        (54, 0, "cardiac_surgery"),
        (None, None, "other"),
    ]


def test_outcome(tmp_path):
    """[eICU documentation, patient table] the hospital status decides, except that a death in the unit is one in hospital; an empty one is unknown."""
    before = [
        ("Alive", "Alive"),
        ("Expired", "Alive"),
        ("Expired", "Expired"),
        ("", "Alive"),
        ("", "Expired"),
        ("Alive", "Expired"),
        ("", ""),
    ]
    rows = (patient(i, str(i), hospitaldischargestatus=h, unitdischargestatus=u) for i, (h, u) in enumerate(before))
    write(tmp_path, "patient", PATIENT, *rows)
    after = EICU(str(tmp_path)).stays().select("hospital_death", "icu_death", "death_minute").rows()
    assert after == [
        (False, False, None),
        (True, False, 5000),
        (True, True, 3000),
        (None, False, None),
        (True, True, 3000),
        (True, True, 3000),
        (None, None, None),
    ]


def test_stays_without_outcome_columns(tmp_path):
    """A patient who is still in the unit has no outcome columns yet, and must still be readable."""
    hidden = {
        "hospitaldischargeyear",
        "hospitaldischargeoffset",
        "hospitaldischargestatus",
        "unitdischargeoffset",
        "unitdischargestatus",
    }
    names = PATIENT.split(",")
    row = patient(1, age="60").split(",")
    kept = [i for i, name in enumerate(names) if name not in hidden]
    write(tmp_path, "patient", ",".join(names[i] for i in kept), ",".join(row[i] for i in kept))
    after = EICU(str(tmp_path)).stays()
    assert after.schema == pl.Schema(STAYS)
    unknown = ["icu_minutes", "discharge_minute", "death_minute", "hospital_death", "icu_death"]
    assert after.select(unknown).row(0) == (None,) * 5
    assert after["age"].to_list() == [60]


def test_stay_number_orders_what_can_be_ordered(tmp_path):
    """[eICU documentation] unitvisitnumber orders units in a hospital stay; year and age order hospital stays, ids do not."""
    rows = [
        patient(10, hospital_stay=5, visit=2, hospitaldischargeyear=2015, age="61"),
        patient(11, hospital_stay=5, visit=1, hospitaldischargeyear=2015, age="61"),
        patient(12, hospital_stay=9, visit=1, hospitaldischargeyear=2014, age="60"),
        patient(13, hospital_stay=1, visit=1, hospitaldischargeyear=2015, age="62"),
    ]
    write(tmp_path, "patient", PATIENT, *rows)
    assert EICU(str(tmp_path)).stays().select("stay_id", "stay_number").rows() == [(10, 3), (11, 2), (12, 1), (13, 4)]


@pytest.mark.parametrize(
    ("name", "charted", "own", "weight", "kind", "rate"),
    [
        ("Norepinephrine (mcg/kg/min)", "0.1", "", 80, "native", 0.1),
        ("Norepinephrine (mcg/min)", "8", "", 80, "weight", 0.1),
        (
            "Norepinephrine (mcg/min)",
            "8",
            "100",
            80,
            "weight",
            0.08,
        ),  # the weight charted with the infusion comes first
        ("Norepinephrine (mcg/min)", "8", "5", 80, "weight", 0.1),  # ... unless it is not a weight
        ("Norepinephrine (mcg/min)", "8", "", None, "weight", None),
        ("Norepinephrine (mg/hr)", "0.48", "", 80, "weight", 0.1),
        ("Norepinephrine (mcg/kg/hr)", "6", "", None, "scaled", 0.1),
        ("Norepinephrine (ml/hr)", "15", "", 80, "concentration", 0.1),  # 15 mL/h x 32 mcg/mL / 60 / 80 kg
        ("Norepinephrine ()", "8", "", 80, "unresolved", None),
        ("Norepinephrine (units/min)", "8", "", 80, "unresolved", None),
        ("Norepinephrine", "", "", 80, "unresolved", None),
        ("Norepinephrine ()", "0", "", None, "zero", 0),  # nothing is nothing in every unit
        ("Norepinephrine (mcg/min)", "OFF", "", None, "zero", 0),
        ("Norepinephrine (mcg/min)", "ERROR", "", 80, "unresolved", None),
        (
            "Norepinephrine (mcg/kg/min)",
            "8",
            "",
            80,
            "native",
            8,
        ),  # above the accepted 3 mcg/kg/min: the store clips it
        ("Norepinephrine (mcg/hr)", "4,800", "", 80, "weight", 1),
        ("Norepinephrine (mcg/hr)", "4,80", "", 80, "unresolved", None),
        ("Norepinephrine (mcg/min)", "8 %", "", 80, "unresolved", None),
        ("levophed  (mcg/min)", "8", "", 80, "weight", 0.1),
        ("Norepinephrine STD 4 mg Dextrose 5% 250 ml (mcg/min)", "8", "", 80, "weight", 0.1),
        ("Phenylephrine (mcg/min) (mcg/min)", "80", "", 80, "weight", 1),
        ("Vasopressin (units/min)", "0.04", "", None, "scaled", 2.4),
        ("Vasopressin (units/hr)", "2.4", "", None, "native", 2.4),
        ("Vasopressin (ml/hr)", "12", "", None, "concentration", 2.4),
        ("Dopamine (nanograms/kg/min)", "5000", "", None, "scaled", 5),
    ],
)
def test_infusion_rate(tmp_path, name, charted, own, weight, kind, rate):
    """[Bennett 2023, doi:10.1093/gigascience/giad041] the last parenthesis is the unit; weight, time, mass and volume are converted."""
    write(tmp_path, "infusionDrug", INFUSION, f'1,1,10,"{name}","{charted}","","","","{own}"')
    after = infusion_rows(tmp_path, some_stays(a=weight)).row(0, named=True)
    assert after["kind"] == kind
    assert after["rate"] == (rate if rate is None else pytest.approx(rate))


def test_a_rate_goes_by_the_last_charted_weight_where_admission_has_none(folder):
    """60 kg were charted at 20 and entered at 50; 110 lb at 100: a rate goes by what was known at its minute."""
    kg, lb = (f"flowsheet|Flowsheet Cell Labels|I&O|Weight|Bodyweight ({unit})" for unit in ("kg", "lb"))
    write(folder, "intakeOutput", FLUIDS, f"1,1,20,{kg},60,50", f"2,1,100,{lb},110,100")
    write(folder, "infusionDrug", INFUSION, *(f"1,1,{m},Norepinephrine (mcg/min),6" for m in (30, 60, 120)))
    rates = infusion_rows(folder, some_stays(a=None)).sort("minute").select("rate", "weight_source").rows()
    assert rates == [
        (None, None),
        (pytest.approx(0.1), "flowsheet"),
        (pytest.approx(6 / 49.895, abs=1e-4), "flowsheet"),
    ]
    assert infusion_rows(folder, some_stays(a=80.0))["weight_source"].to_list() == ["admission"] * 3


def test_names_that_only_look_like_a_pressor(tmp_path):
    """[eicu-code pivoted-infusion.sql] levothyroxine and an epidural are not; a mixed bag has no rate of its own."""
    names = [
        "levothyroxine (mcg/kg/hr)",
        "Epidural (ml/hr)",
        "IVF without vasoactives (ml/hr)",
        "NSS w/ levo/vaso (ml/hr)",
    ]
    write(tmp_path, "infusionDrug", INFUSION, *(f'{i},1,10,{n},5,"","","",""' for i, n in enumerate(names)))
    assert infusion_rows(tmp_path, some_stays(a=80.0)).is_empty()


def test_vasopressor_intervals(folder):
    """[Bennett 2023] a record holds until the next, and for 5 h at most: whether one follows is not known before. Then it is 0."""
    rows = [
        (0, "mcg/min", 8),
        (60, "mcg/min", 16),
        (360, "ml/hr", 15),
        (661, "mcg/min", 0),
        (700, "", 7),
        (720, "mcg/kg/min", 0.2),
    ]
    rows += [(720, "ml/hr", 15)]  # the same pump in another unit: the direct one counts
    write(folder, "infusionDrug", INFUSION, *(f'1,1,{m},Norepinephrine ({u}),{r},"","","",""' for m, u, r in rows))
    hospital, stays = EICU(str(folder)), some_stays(a=80.0)
    after = hospital.infusions(hospital.tables(stays), stays).collect()
    assert after.schema == pl.Schema(INFUSIONS)
    assert after.select("start_minute", "end_minute", pl.col("rate").round(6), "unit", "estimated").rows() == [
        (0, 60, 0.1, "mcg/kg/min", False),
        (60, 360, 0.2, "mcg/kg/min", False),
        (360, 660, 0.1, "mcg/kg/min", True),
        (720, 1020, 0.2, "mcg/kg/min", False),
    ]
    assert after["known_minute"].to_list() == after["start_minute"].to_list()
    found = events(folder).filter(pl.col("dropped").is_null()).sort("minute")
    steps = found.filter(concept="norepinephrine").select("minute", pl.col("value").round(6)).rows()
    assert steps == [(0, 0.1), (60, 0.2), (360, 0.1), (660, 0), (661, 0), (700, 0), (720, 0.2), (1020, 0)]
    estimated = found.filter(concept="vasopressor_estimated").select("minute", "value").rows()
    assert estimated == [(360, 1), (660, 0)]


def test_what_cannot_be_read_is_counted(folder):
    """A rate that is no number or has no rule, a result that is a word: nothing is left out in silence."""
    rates = [(0, "mcg/min", "8"), (10, "mcg/min", "ERROR"), (20, "mcg/min", ""), (30, "", "8"), (40, "units/min", "8")]
    write(folder, "patient", PATIENT, patient(1, admissionweight=80))
    write(folder, "infusionDrug", INFUSION, *(f"1,1,{m},Norepinephrine ({u}),{r}" for m, u, r in rates))
    write(folder, "lab", LAB, "1,1,10,lactate,,mmol/L,,11,hemolyzed", "2,1,10,lactate,2,mmol/L,,11,2")
    write(folder, "respiratoryCharting", CHARTING, "1,1,10,respFlowSettings,PEEP,off", "2,1,20,respFlowSettings,PEEP,5")
    told = ("rows", "events", "not_a_number", "unmapped_unit")
    # 0.1 mcg/kg/min at minute 0, off at minute 10, when nobody can tell what runs
    assert counted(folder, "norepinephrine", *told) == [6, 2, 2, 2]
    assert counted(folder, "lactate", *told) == [2, 1, 1, 0]
    assert counted(folder, "peep", *told) == [2, 1, 1, 0]


def test_a_rate_out_of_range_is_clipped(folder):
    """Norepinephrine is accepted up to 3 mcg/kg/min. One charted as 8 runs at 3 while the record holds, rather than not at all; where another record of the minute is in range, that one counts."""
    rates = [(0, "mcg/kg/min", 0.1), (60, "mcg/kg/min", 8), (120, "mcg/kg/min", 10), (120, "ml/hr", 15)]
    rates += [(180, "mcg/kg/min", -1)]
    write(folder, "patient", PATIENT, patient(1, admissionweight=80))
    write(folder, "infusionDrug", INFUSION, *(f"1,1,{m},Norepinephrine ({u}),{r}" for m, u, r in rates))
    built = store(folder).frame(0, 1).filter(pl.col("concept") == "norepinephrine")
    assert built.select("minute", pl.col("value").round(4)).rows() == [
        (0, pytest.approx(0.1)), (60, 3), (120, pytest.approx(0.1)), (180, 0)
    ]  # fmt: skip
    assert counted(folder, "norepinephrine", "rows", "events", "clipped", "out_of_range") == [5, 4, 1, 1]
    hospital, stays = EICU(str(folder)), some_stays(a=80.0)
    intervals = hospital.infusions(hospital.tables(stays), stays).collect()
    assert intervals["rate"].to_list() == pytest.approx([0.1, 8, 0.1])  # the table says what was charted


def test_a_rate_per_kg_without_a_weight_is_counted(folder):
    write(folder, "patient", PATIENT, patient(1))
    write(
        folder, "infusionDrug", INFUSION, "1,1,0,Norepinephrine (mcg/min),8", "1,1,60,Norepinephrine (mcg/kg/min),0.2"
    )
    assert counted(folder, "norepinephrine", "rows", "events", "unmapped_unit") == [3, 2, 1]


def test_vital_signs(folder):
    """[eICU documentation] sao2 of vitalPeriodic is the oximeter; empty cells and other stays' rows are left out."""
    row = dict.fromkeys(PERIODIC.split(","), "") | {"sao2": 97, "systemicmean": 70, "heartrate": 88}
    cells = ",".join(str(v) for v in row.values())
    write(folder, "patient", PATIENT, patient(1), patient(2))
    write(folder, "vitalPeriodic", HEADERS["vitalPeriodic"], f"1,1,5,{cells}", f"2,9,5,{cells}", f"3,1,,{cells}")
    write(folder, "vitalAperiodic", HEADERS["vitalAperiodic"], "1,1,7,120,60,")
    after = store(folder)
    assert after.frame(0, 2).select("stay_id", "minute", "concept", "value").rows() == [
        (1, 5, "heart_rate", 88),
        (1, 5, "mean_bp", 70),
        (1, 5, "spo2", 97),
        (1, 7, "systolic_bp", 120),
        (1, 7, "diastolic_bp", 60),
    ]


def test_ranges_are_open_where_their_source_has_them_open(folder):
    """[mimic-code vitalsign.sql] 0 is no heart rate, no pressure, no saturation: a lead that is off."""
    zero = ",".join("0" for _ in PERIODIC.split(","))
    write(folder, "patient", PATIENT, patient(1))
    write(folder, "vitalPeriodic", HEADERS["vitalPeriodic"], f"1,1,5,{zero}", "2,1,6,,,100,,,,,")
    assert store(folder).frame(0, 1).select("minute", "concept", "value").rows() == [(6, "spo2", 100)]
    assert [counted(folder, c, "out_of_range") for c in ("heart_rate", "spo2", "mean_bp", "etco2")] == [[1]] * 4


def test_lab_revisions(folder):
    """[eicu-code pivoted-lab.sql] a revision that holds several different results is none. Each other counts from when it was made."""
    rows = ["1,1,10,creatinine,1.0,mg/dL,mg/dL,11", "2,1,10,creatinine,2.0,mg/dL,MG/DL,12"]  # revised
    rows += ["3,1,20,sodium,130,mmol/L,,21", "4,1,20,sodium,140,mmol/L,,21"]  # contradictory: no result
    rows += ["5,1,30,sodium,131,mmol/L,,31", "6,1,30,sodium,131,mmol/L,,31"]  # the same twice
    rows += [
        "7,1,40,potassium,4,mmol/L,,41",
        "8,1,40,potassium,5,mmol/L,,42",
        "9,1,40,potassium,6,mmol/L,,42",
    ]  # the earlier stands
    rows += ["10,1,50,lactate,,mmol/L,,51", "11,1,50,RBC,4,M/mcL,,51"]  # a text result; not a concept
    rows += [
        "12,1,60,chloride,101,mmol/L,,55",
        "13,1,70,chloride,102,mmol/L,,",
    ]  # revised before the draw; no time of it
    write(folder, "lab", LAB, *rows)
    assert read(folder) == [
        (11, "creatinine", 1, "mg/dL"),
        (12, "creatinine", 2, "MG/DL"),
        (31, "sodium", 131, "mmol/L"),
        (41, "potassium", 4, "mmol/L"),
        (60, "chloride", 101, "mmol/L"),
        (70, "chloride", 102, "mmol/L"),
    ]
    assert all(minute == known for minute, known in read(folder, "minute", "known_minute"))


def test_a_contradictory_revision_is_counted(folder):
    write(folder, "patient", PATIENT, patient(1))
    write(
        folder,
        "lab",
        LAB,
        "1,1,20,sodium,130,mmol/L,,21",
        "2,1,20,sodium,140,mmol/L,,21",
        "3,1,30,sodium,131,mmol/L,,31",
    )
    assert counted(folder, "sodium", "events", "contradictory") == [1, 2]


def test_a_revision_that_repeats_the_result_is_no_second_one(folder):
    write(folder, "lab", LAB, "1,1,10,creatinine,1.0,mg/dL,,11", "2,1,10,creatinine,1.0,mg/dL,,90")
    assert read(folder, "minute", "value") == [(11, 1)]


def test_a_result_that_is_a_limit_counts_as_the_limit(folder):
    rows = ["1,1,10,lactate,,mmol/L,,10,>16.00", "2,1,20,glucose,,mg/dL,,20,< 10", '3,1,30,ptt,,sec,,30,"> 1,000"']
    rows[2] = '3,1,30,WBC x 1000,,K/mcL,,30,"> 1,000"'
    write(folder, "lab", LAB, *rows)
    assert read(folder, "minute", "concept", "value") == [(10, "lactate", 16), (20, "glucose", 10), (30, "wbc", 1000)]


def test_lab_units(folder):
    """[counted on the eICU demo] ionized calcium's unit follows the value; FiO2 up to 1 is a fraction; a deficit is a negative excess."""
    rows = ["1,1,10,ionized calcium,4.4,mg/dL,mmol/L,11", "2,1,20,ionized calcium,1.1,mg/dL,mmol/L,21"]
    rows += [
        "3,1,30,FiO2,0.5,%,,31",
        "4,1,40,FiO2,50,%,%,41",
        "5,1,50,FiO2,4,%,lpm,51",
        "6,1,60,Base Deficit,3,mEq/L,,61",
    ]
    rows += ["7,1,70,-bands,5,%,%,71", "8,1,80,-bands,0.4,%,K/uL,81"]  # a count keeps its unit, which nothing converts
    write(folder, "lab", LAB, *rows)
    assert read(folder) == [
        (11, "calcium_ionized", 4.4, "mg/dL"),
        (21, "calcium_ionized", 1.1, "mmol/L"),
        (31, "fio2", 0.5, "fraction"),
        (41, "fio2", 50, None),
        (51, "fio2", 4, "lpm"),
        (61, "base_excess", -3, "mEq/L"),
        (71, "bands", 5, "%"),
        (81, "bands", 0.4, "K/uL"),
    ]


def test_apache_gcs_is_known_at_the_end_of_the_day(folder):
    """[eICU documentation] apacheApsVar holds the worst of day 1: showing it before minute 1440 would be a leak. -1 is missing."""
    write(folder, "apacheApsVar", HEADERS["apacheApsVar"], "1,1,0,4,6,-1", "2,2,0,1,2,3")
    after = read(folder, "minute", "known_minute", "concept", "value", stays=some_stays(a=80.0, b=80.0))
    assert {row[:2] for row in after} == {(1440, 1440)}
    assert [row[2:] for row in after] == [
        ("gcs", 6),
        ("gcs_eyes", 1),
        ("gcs_eyes", 4),
        ("gcs_motor", 2),
        ("gcs_motor", 6),
        ("gcs_verbal", 3),
    ]


def test_respiratory_settings(folder):
    """[eicu-code pivoted-bg.sql] text may carry "%"; up to 1 is a fraction; litres charted as FiO2 stay as they are for the range filter."""
    rows = ["1,1,10,respFlowSettings,FiO2,60%", "2,1,20,respFlowSettings,FiO2,0.4", "3,1,30,respFlowSettings,PEEP,5"]
    rows += [
        "4,1,40,respFlowCareData,FIO2 (%),30",
        "5,1,50,respFlowSettings,LPM O2,2",
        "6,1,60,respFlowSettings,PEEP,off",
    ]
    write(folder, "respiratoryCharting", CHARTING, *rows)
    assert read(folder) == [
        (10, "fio2", 60, None),
        (20, "fio2", 0.4, "fraction"),
        (30, "peep", 5, None),
        (40, "fio2", 30, None),
    ]


def test_ventilation_signs(folder):
    """[Bennett 2023, narrowed] a device's name or a reading only a ventilator gives; a breathing rate alone is no sign."""
    rows = [
        "1,1,0,respFlowPtVentData,RR (patient),18",
        "2,1,100,respFlowPtVentData,Plateau Pressure,20",
        "3,1,150,respFlowSettings,Vent Rate,14",
    ]
    rows += [
        "4,1,200,respFlowCareData,O2 Device,Nasal cannula",
        "5,1,300,respFlowCareData,O2 Device,Bi-PAP",
        "6,1,400,respFlowCareData,RT Vent On/Off,Off",
    ]
    write(folder, "respiratoryCharting", CHARTING, *rows)
    assert steps(folder) == [(100, 2), (150, 2), (200, 0), (300, 1), (400, 0)]


def steps(folder: Path) -> list[tuple[int, float]]:
    return sorted(read(folder, "minute", "value"))


def test_an_episode_of_respiratory_care_counts_from_when_it_was_written(folder):
    """[eICU documentation] a row is written after the fact: at minute 900 it says that the patient is ventilated since 800, and what
    was before; a row that knows the end says that it is over; an end that is ahead counts when it comes."""
    write(folder, "respiratoryCare", CARE, "1,1,900,800,0,50,120", "2,1,950,0,0,50,120")
    assert steps(folder) == [(900, 2), (1260, 0)]  # six hours without a sign
    write(folder, "respiratoryCare", CARE, "1,1,900,800,850,0,0", "2,1,1000,960,1100,0,0")
    assert steps(folder) == [(900, 0), (1000, 2), (1100, 0)]


def test_a_high_flow_cannula_is_level_1(folder):
    rows = [
        "1,1,0,respFlowCareData,O2 Device,High flow nasal cannula",
        "2,1,60,respFlowCareData,O2 Device,High Flow Mask",
    ]
    write(folder, "respiratoryCharting", CHARTING, *rows)
    assert steps(folder) == [(0, 1), (60, 0)]


def test_what_was_entered_later_is_known_later(folder):
    """[eICU documentation] ...entryoffset: when a cell was filled in; ventilation counts from then on."""
    write(folder, "nurseCharting", NURSE, "1,1,5,Heart Rate,Heart Rate,88,35", "2,1,9,Heart Rate,Heart Rate,89,2")
    write(folder, "respiratoryCharting", CHARTING, "1,1,10,respFlowSettings,PEEP,5,70", "2,1,20,a,Vent Rate,14,80")
    cell = "flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Urine"
    write(folder, "intakeOutput", FLUIDS, f"1,1,60,{cell},200,300", f"2,1,60,{cell},100,", f"3,1,60,{cell},50,300")
    found = sorted(read(folder, "concept", "minute", "known_minute", "value"))
    assert found == [
        ("heart_rate", 5, 35, 88),
        ("heart_rate", 9, 9, 89),
        ("peep", 10, 70, 5),
        ("urine", 60, 60, 100),
        ("urine", 60, 300, 250),  # what was entered at one time adds; the rest is known apart
        ("ventilation", 80, 80, 2),
        ("ventilation", 440, 440, 0),
    ]


def test_equal_rows_count_once(folder):
    cell = "flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|"
    rows = [f"1,1,60,{cell}Urine,200,70", f"2,1,60,{cell}Urine,200,70", f"3,1,60,{cell}Foley,200,70"]
    write(folder, "patient", PATIENT, patient(1))
    write(folder, "intakeOutput", FLUIDS, *rows)
    assert store(folder).frame(0, 1).select("minute", "known_minute", "value").rows() == [(60, 70, 400)]
    assert counted(folder, "urine", "events", "duplicate") == [1, 1]


def test_a_weight_in_pounds(folder):
    """[eicu-code pivoted-weight.sql] the cell names the unit; where both are charted the kg count."""
    kg, lb = (f"flowsheet|Flowsheet Cell Labels|I&O|Weight|Bodyweight ({unit})" for unit in ("kg", "lb"))
    write(folder, "patient", PATIENT, patient(1))
    write(folder, "intakeOutput", FLUIDS, f"1,1,90,{kg},81.5", f"2,1,90,{lb},179.7", f"3,1,100,{lb},180")
    found = store(folder).frame(0, 1).select("minute", "concept", pl.col("value").round(2)).rows()
    assert found == [(90, "weight", 81.5), (100, "weight", pytest.approx(81.65, abs=0.01))]


def test_admission_size_is_an_event_of_admission(folder):
    write(folder, "patient", PATIENT, patient(1, admissionheight=170, admissionweight=80))
    assert store(folder).frame(0, 1).select("minute", "known_minute", "concept", "value").rows() == [
        (0, 0, "height", 170), (0, 0, "weight", 80)
    ]  # fmt: skip


def test_the_total_coma_scale_is_derived_where_all_parts_are_charted(folder):
    """The nurse's parts of one minute, entered at two times; a total that is charted too goes before the sum."""
    parts = [("Eyes", 3, 12), ("Verbal", 4, 20), ("Motor", 6, 15)]
    rows = [f"1,1,10,Glasgow coma score,{name},{value},{entered}" for name, value, entered in parts]
    rows += [f"1,1,60,Glasgow coma score,{name},{value},60" for name, value, _ in parts]
    rows += ["1,1,60,Glasgow coma score,GCS Total,14,60", "1,1,90,Glasgow coma score,Eyes,3,90"]
    write(folder, "patient", PATIENT, patient(1))
    write(folder, "nurseCharting", NURSE, *rows)
    found = store(folder).frame(0, 1).filter(pl.col("concept") == "gcs")
    assert found.select("minute", "known_minute", "value").rows() == [(10, 20, 13), (60, 60, 14)]


def test_urine_and_weight(folder):
    """[eicu-code pivoted-uo.sql] listed cells only; a count of voids is no volume; one entry is at most 2,000 mL."""
    out = "flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|"
    cells = {
        "Urine": 200,
        "URINE CATHETER": 7746,
        "Urinary Catheter Output: Indwelling/Continuous Ure": 84,
        "Output (mL)-Urethral Catheter Non-latex 16 Fr.": 350,
        "Foley cath": 90,
        "Foley PACU": 91,
        "foley IR": 92,
        "Urine Count": 1,
        "incontinent urine": 1,
        "Urinary Catheter Output: count": 1,
        "Mixed Urine/Stool Volume": 400,
        "Stool": 300,
    }
    rows = [f"{i},1,{i},{out}{cell},{value}" for i, (cell, value) in enumerate(cells.items())]
    rows += [
        "90,1,90,flowsheet|Flowsheet Cell Labels|I&O|Weight|Bodyweight (kg),81.5",
        "91,1,90,flowsheet|Flowsheet Cell Labels|I&O|Weight|Bodyweight (lb),180",
    ]
    write(folder, "intakeOutput", FLUIDS, *rows)
    after = sorted(read(folder, "minute", "concept", "value"))
    assert after == [
        (0, "urine", 200),
        (1, "urine", 2000),
        (2, "urine", 84),
        (3, "urine", 350),
        (4, "urine", 90),
        (90, "weight", 81.5),
    ]


def test_intravenous_fluids(folder):
    """This project's cell list: volumes into a vein count, by mouth or tube, sums and doses do not; bags of one minute add."""
    intake = "flowsheet|Flowsheet Cell Labels|I&O|Intake (ml)|"
    cells = ["Crystalloids (ml)|NS ", "Blood Products (ml)|pRBCs", "Nutrition (ml)|TPN", "NS IVF"]
    others = [
        "P.O.",
        "Nutrition (ml)|Oral",
        "Enteral Formula Volume/Bolus Amt (mL)",
        "Crystalloids (ml)|TOTAL IN",
        "% Meal Eaten",
        "Intake",
    ]
    write(folder, "intakeOutput", FLUIDS, *(f"{i},1,60,{intake}{cell},100" for i, cell in enumerate(cells + others)))
    assert read(folder) == [(60, "fluids", 400, None)]


def test_nurse_charting_is_optional(folder):
    """[eicu-code pivoted-vital.sql, pivoted-gcs.sql] vital signs and the coma scale by label and name; the table may be absent."""
    assert "nurseCharting" not in EICU(str(folder)).tables(some_stays(a=80.0))
    assert read(folder) == []
    rows = [
        "1,1,5,Heart Rate,Heart Rate,88",
        "2,1,6,Glasgow coma score,GCS Total,15",
        "3,1,7,Score (Glasgow Coma Scale),Value,14",
    ]
    rows += ["4,1,8,Temperature,Temperature (F),98.6", "5,1,9,Glasgow coma score,Eyes,unable"]
    write(folder, "nurseCharting", NURSE, *rows)
    assert read(folder) == [(5, "heart_rate", 88, None), (6, "gcs", 15, None), (7, "gcs", 14, None)]


def test_missing_table_is_named(folder):
    (folder / "lab.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lab\.csv"):
        EICU(str(folder)).tables(some_stays(a=80.0))


def test_demo_stays(real: Callable[[str], Path]) -> None:
    """[eICU demo 2.0.1] 2,520 unit stays of 1,841 patients, 217 deaths in hospital (5 more than the hospital's status says, for
    they died in the unit), 28 of unknown outcome."""
    after = EICU(str(real("eicu-demo"))).stays()
    assert after.schema == pl.Schema(STAYS)
    assert (after.height, after["patient_id"].n_unique(), after["hospital_id"].n_unique()) == (2520, 1841, 186)
    assert (after["hospital_death"].sum(), after["hospital_death"].null_count()) == (217, 28)
    assert after["stay_id"].is_sorted() and after["stay_id"].is_unique().all()
    assert after.filter(pl.col("stay_number") == 1).height == 1841


def test_demo_events(real: Callable[[str], Path]) -> None:
    """[counted on the eICU demo 2.0.1] a broad urine rule reached 1,928 stays."""
    hospital = EICU(str(real("eicu-demo")))
    everything = events(hospital.root, hospital.stays())
    urine = everything.filter(pl.col("concept") == "urine", pl.col("dropped").is_null())
    assert urine["stay_id"].n_unique() >= 1928
    assert urine["value"].max() <= 2 * 2000  # two entries of one minute add
    assert everything.filter(pl.col("concept").str.starts_with("gcs"))["minute"].unique().to_list() == [1440]
    assert set(everything.filter(pl.col("concept") == "ventilation")["value"].unique()) == {0, 1, 2}
    assert not everything.select(pl.any_horizontal(pl.col("stay_id", "minute", "concept").is_null()).any()).item()
    assert (everything["known_minute"] >= everything["minute"]).all()
    unread = everything.filter(pl.col("value").is_null(), pl.col("dropped").is_null())
    assert unread.height < 0.01 * everything.height  # words in place of a result or a setting: counted, not stored


def test_demo_norepinephrine(real: Callable[[str], Path]) -> None:
    """[counted on the eICU demo 2.0.1] 3.7 % of the rows are in mcg/kg/min, 85.1 % become usable; the units agree in the median."""
    root = real("eicu-demo")
    rows = infusion_rows(root, EICU(str(root)).stays()).filter(drug="norepinephrine")
    assert (rows.height, rows["stay_id"].n_unique()) == (5076, 192)
    assert rows["rate"].is_not_null().mean() >= 0.85
    assert (rows["source_unit"] == "mcg/kg/min").mean() == pytest.approx(0.037, abs=0.001)
    median = dict(rows.group_by("source_unit").agg(pl.col("rate").median()).iter_rows())
    assert median["mcg/kg/min"] == pytest.approx(0.1, abs=0.005)
    assert median["mcg/min"] == pytest.approx(0.06, abs=0.005)
    assert median["ml/hr"] == pytest.approx(0.098, abs=0.005)
