"""eICU: each clinical rule on a small table before and after, then the counts on the open demo."""

import doctest
from pathlib import Path

import polars as pl
import pytest

from datamodules import eicu, treatment
from datamodules.schema import RAW_EVENTS, STAYS, VASOPRESSORS, conform

DEMO = Path(__file__).parents[2] / "shared/data/eicu-demo"
demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the open eICU demo 2.0.1 is not in ../shared/data/eicu-demo")

PATIENT = (
    "patientunitstayid,patienthealthsystemstayid,gender,age,hospitalid,admissionheight,hospitaladmitoffset,hospitaldischargeyear,"
    "hospitaldischargeoffset,hospitaldischargestatus,unittype,unitvisitnumber,admissionweight,unitdischargeoffset,unitdischargestatus,uniquepid"
)
INFUSION = "infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,volumeoffluid,patientweight"
LAB = "labid,patientunitstayid,labresultoffset,labname,labresult,labmeasurenamesystem,labmeasurenameinterface,labresultrevisedoffset"
FLUIDS = "intakeoutputid,patientunitstayid,intakeoutputoffset,cellpath,cellvaluenumeric"
CHARTING = "respchartid,patientunitstayid,respchartoffset,respcharttypecat,respchartvaluelabel,respchartvalue"
CARE = "respcareid,patientunitstayid,respcarestatusoffset,ventstartoffset,ventendoffset,priorventstartoffset,priorventendoffset"


def write(folder: Path, table: str, header: str, *rows: str) -> None:
    (folder / f"{table}.csv").write_text("\n".join([header, *rows]) + "\n")


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


def test_body_size_is_repaired(tmp_path):
    """[eicu-code pivoted-weight.sql] swapped fields, metres, decimetres, and values that cannot be."""
    before = [
        ("80", "110"),
        ("1.7", "70"),
        ("17", "70"),
        ("0.3", "70"),
        ("600", "70"),
        ("170", "0.5"),
        ("170", "515"),
        ("90", "105"),
        ("", ""),
    ]
    write(
        tmp_path,
        "patient",
        PATIENT,
        *(patient(i, str(i), admissionheight=h, admissionweight=w) for i, (h, w) in enumerate(before)),
    )
    after = eicu.stays(tmp_path).select("height", "weight").rows()
    # 90 cm and 105 kg differ by less than 20, so nothing says that they are swapped
    assert after == [
        (110, 80),
        (170, 70),
        (170, 70),
        (None, 70),
        (None, 70),
        (170, None),
        (170, None),
        (90, 105),
        (None, None),
    ]


def test_age_sex_and_unit(tmp_path):
    """[eICU documentation, patient table] ages over 89 are written "> 89"; every unit type has a place."""
    before = [("> 89", "Male", "MICU"), ("54", "Female", "CTICU"), ("", "Unknown", "Step-down")]
    write(
        tmp_path,
        "patient",
        PATIENT,
        *(patient(i, str(i), age=a, gender=s, unittype=u) for i, (a, s, u) in enumerate(before)),
    )
    after = eicu.stays(tmp_path)
    assert after.schema == pl.Schema(STAYS)
    assert after.select("age", "sex", "unit").rows() == [
        (90, 1, "medical"),
        (54, 0, "cardiac_surgery"),
        (None, None, "other"),
    ]


def test_outcome(tmp_path):
    """[eICU documentation, patient table] the hospital status decides; an empty one is unknown unless the patient died in the unit."""
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
    after = eicu.stays(tmp_path).select("hospital_death", "icu_death", "death_minute").rows()
    assert after == [
        (False, False, None),
        (True, False, 5000),
        (True, True, 3000),
        (None, False, None),
        (True, True, 3000),
        (False, True, 3000),
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
    after = eicu.stays(tmp_path)
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
    assert eicu.stays(tmp_path).select("stay_id", "stay_number").rows() == [(10, 3), (11, 2), (12, 1), (13, 4)]


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
        ("Norepinephrine (mcg/kg/min)", "8", "", 80, "native", None),  # above the accepted 3 mcg/kg/min
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
    after = eicu.infusion_rows(tmp_path, some_stays(a=weight)).row(0, named=True)
    assert after["kind"] == kind
    assert after["rate"] == (rate if rate is None else pytest.approx(rate))


def test_names_that_only_look_like_a_pressor(tmp_path):
    """[eicu-code pivoted-infusion.sql] levothyroxine and an epidural are not; a mixed bag has no rate of its own."""
    names = [
        "levothyroxine (mcg/kg/hr)",
        "Epidural (ml/hr)",
        "IVF without vasoactives (ml/hr)",
        "NSS w/ levo/vaso (ml/hr)",
    ]
    write(tmp_path, "infusionDrug", INFUSION, *(f'{i},1,10,{n},5,"","","",""' for i, n in enumerate(names)))
    assert eicu.infusion_rows(tmp_path, some_stays(a=80.0)).is_empty()


def test_vasopressor_intervals(tmp_path):
    """[Bennett 2023] a record holds until the next; after a gap over 5 h, or as the last one, for 60 min."""
    rows = [
        (0, "mcg/min", 8),
        (60, "mcg/min", 16),
        (360, "ml/hr", 15),
        (661, "mcg/min", 0),
        (700, "", 7),
        (720, "mcg/kg/min", 0.2),
    ]
    rows += [(720, "ml/hr", 15)]  # the same pump in another unit: the direct one counts
    write(tmp_path, "infusionDrug", INFUSION, *(f'1,1,{m},Norepinephrine ({u}),{r},"","","",""' for m, u, r in rows))
    after = eicu.vasopressors(tmp_path, some_stays(a=80.0))
    assert after.schema == pl.Schema(VASOPRESSORS)
    assert after.select("start_minute", "end_minute", pl.col("rate").round(6), "unit", "estimated").rows() == [
        (0, 60, 0.1, "mcg/kg/min", False),
        (60, 360, 0.2, "mcg/kg/min", False),
        (360, 420, 0.1, "mcg/kg/min", True),
        (720, 780, 0.2, "mcg/kg/min", False),
    ]


def test_rate_events_add_overlaps_and_end_at_zero():
    """Two pumps of one drug add; another stay and another drug do not; no float dust is left after the end."""
    columns = ["stay_id", "start_minute", "end_minute", "drug", "rate"]
    before = [
        (1, 0, 60, "dopamine", 0.1),
        (1, 30, 90, "dopamine", 0.2),
        (1, 30, 40, "milrinone", 0.3),
        (2, 30, 40, "dopamine", 5.0),
    ]
    after = treatment.rate_events(pl.DataFrame(before, columns, orient="row")).collect()
    assert after.schema == pl.Schema(RAW_EVENTS)
    assert after.filter(stay_id=1, concept="dopamine").select("minute", "value").rows() == [
        (0, 0.1),
        (30, 0.3),
        (60, 0.2),
        (90, 0.0),
    ]
    assert after.filter(stay_id=1, concept="milrinone").select("minute", "value").rows() == [(30, 0.3), (40, 0.0)]
    assert after.filter(stay_id=2).select("minute", "value").rows() == [(30, 5.0), (40, 0.0)]
    assert doctest.testmod(treatment).failed == 0


def test_ventilation_spells():
    """[Bennett 2023] on until off or six silent hours; spells under half an hour are dropped; the highest sign of a minute holds."""
    before = [
        (1, 0, 2),
        (1, 0, 0),
        (1, 300, 2),
        (1, 900, 2),
        (1, 960, 0),
        (2, 0, 2),
        (2, 20, 0),
        (3, 10, 1),
        (3, 50, 2),
    ]
    after = treatment.ventilation_events(pl.DataFrame(before, ["stay_id", "minute", "level"], orient="row")).collect()
    assert after.select("stay_id", "minute", "value").rows() == [
        (1, 0, 2),
        (1, 300, 2),
        (1, 660, 0),  # 300 + six hours without a sign
        (1, 900, 2),
        (1, 960, 0),
        (2, 20, 0),  # 20 minutes of ventilation are taken for an error, the "off" stays
        (3, 10, 1),
        (3, 50, 2),
        (3, 410, 0),
    ]


@pytest.fixture
def folder(tmp_path):
    """An eICU folder with headers only, to be filled table by table."""
    vitals = ",".join(["vitalperiodicid", "patientunitstayid", "observationoffset", *eicu.PERIODIC])
    write(tmp_path, "vitalPeriodic", vitals)
    write(
        tmp_path,
        "vitalAperiodic",
        ",".join(["vitalaperiodicid", "patientunitstayid", "observationoffset", *eicu.APERIODIC]),
    )
    write(tmp_path, "apacheApsVar", "apacheapsvarid,patientunitstayid,eyes,motor,verbal")
    for table, header in {
        "lab": LAB,
        "respiratoryCharting": CHARTING,
        "respiratoryCare": CARE,
        "intakeOutput": FLUIDS,
        "infusionDrug": INFUSION,
    }.items():
        write(tmp_path, table, header)
    return tmp_path


def read(folder: Path, table: str, stays: pl.DataFrame | None = None) -> list[tuple]:
    frame = eicu.events(folder, some_stays(a=80.0) if stays is None else stays)[table].collect(engine="streaming")
    assert frame.schema == pl.Schema(RAW_EVENTS)
    return sorted(
        frame.with_columns(pl.col("concept").cast(pl.String)).select("minute", "concept", "value", "unit").rows(),
        key=str,
    )


def test_vital_signs(folder):
    """[eICU documentation] sao2 of vitalPeriodic is the oximeter; empty cells and other stays' rows are left out."""
    row = dict.fromkeys(eicu.PERIODIC, "") | {"sao2": 97, "systemicmean": 70, "heartrate": 88}
    cells = ",".join(str(v) for v in row.values())
    write(
        folder,
        "vitalPeriodic",
        ",".join(["vitalperiodicid", "patientunitstayid", "observationoffset", *row]),
        f"1,1,5,{cells}",
        f"2,9,5,{cells}",
    )
    write(
        folder,
        "vitalAperiodic",
        ",".join(["vitalaperiodicid", "patientunitstayid", "observationoffset", *eicu.APERIODIC]),
        "1,1,7,120,60,",
    )
    assert read(folder, "vitalPeriodic") == [
        (5, "heart_rate", 88, None),
        (5, "mean_bp", 70, None),
        (5, "spo2", 97, None),
    ]
    assert read(folder, "vitalAperiodic") == [(7, "diastolic_bp", 60, None), (7, "systolic_bp", 120, None)]


def test_lab_revisions(folder):
    """[eicu-code pivoted-lab.sql] the latest revision counts, except one that holds several different results."""
    rows = ["1,1,10,creatinine,1.0,mg/dL,mg/dL,11", "2,1,10,creatinine,2.0,mg/dL,MG/DL,12"]  # revised
    rows += ["3,1,20,sodium,130,mmol/L,,21", "4,1,20,sodium,140,mmol/L,,21"]  # contradictory: no result
    rows += ["5,1,30,sodium,131,mmol/L,,31", "6,1,30,sodium,131,mmol/L,,31"]  # the same twice
    rows += [
        "7,1,40,potassium,4,mmol/L,,41",
        "8,1,40,potassium,5,mmol/L,,42",
        "9,1,40,potassium,6,mmol/L,,42",
    ]  # the earlier stands
    rows += ["10,1,50,lactate,,mmol/L,,51", "11,1,50,RBC,4,M/mcL,,51"]  # a text result; not a concept
    write(folder, "lab", LAB, *rows)
    assert read(folder, "lab") == [
        (10, "creatinine", 2, "MG/DL"),
        (30, "sodium", 131, "mmol/L"),
        (40, "potassium", 4, "mmol/L"),
    ]


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
    assert read(folder, "lab") == [
        (10, "calcium_ionized", 4.4, "mg/dL"),
        (20, "calcium_ionized", 1.1, "mmol/L"),
        (30, "fio2", 0.5, "fraction"),
        (40, "fio2", 50, None),
        (50, "fio2", 4, "lpm"),
        (60, "base_excess", -3, "mEq/L"),
        (70, "bands", 5, "%"),
        (80, "bands", 0.4, "K/uL"),
    ]


def test_apache_gcs_is_known_at_the_end_of_the_day(folder):
    """[eICU documentation] apacheApsVar holds the worst of day 1: showing it before minute 1440 would be a leak. -1 is missing."""
    write(folder, "apacheApsVar", "apacheapsvarid,patientunitstayid,eyes,motor,verbal", "1,1,4,6,-1", "2,2,1,2,3")
    after = read(folder, "apacheApsVar", some_stays(a=80.0, b=80.0))
    assert {minute for minute, *_ in after} == {1440}
    assert [(c, v) for _, c, v, _ in after] == [
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
    assert read(folder, "respiratoryCharting") == [
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
    found = [(minute, value) for minute, _, value, _ in read(folder, "respiratoryCare")]
    assert found == [(100, 2), (150, 2), (200, 0), (300, 1), (400, 0)]
    write(folder, "respiratoryCharting", CHARTING)
    write(folder, "respiratoryCare", CARE, "1,1,900,800,0,50,120", "2,1,950,0,0,50,120")
    found = [(minute, value) for minute, _, value, _ in read(folder, "respiratoryCare")]
    assert sorted(found) == [(50, 2), (120, 0), (800, 2), (900, 2), (1260, 0)]


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
    after = sorted((minute, concept, value) for minute, concept, value, _ in read(folder, "intakeOutput"))
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
    assert read(folder, "intakeOutput") == [(60, "fluids", 400, None)]


def test_nurse_charting_is_optional(folder):
    """[eicu-code pivoted-vital.sql, pivoted-gcs.sql] vital signs and the coma scale by label and name; the table may be absent."""
    assert "nurseCharting" not in eicu.events(folder, some_stays(a=80.0))
    header = "nursingchartid,patientunitstayid,nursingchartoffset,nursingchartcelltypevallabel,nursingchartcelltypevalname,nursingchartvalue"
    rows = [
        "1,1,5,Heart Rate,Heart Rate,88",
        "2,1,6,Glasgow coma score,GCS Total,15",
        "3,1,7,Score (Glasgow Coma Scale),Value,14",
    ]
    rows += ["4,1,8,Temperature,Temperature (F),98.6", "5,1,9,Glasgow coma score,Eyes,unable"]
    write(folder, "nurseCharting", header, *rows)
    assert read(folder, "nurseCharting") == [(5, "heart_rate", 88, None), (6, "gcs", 15, None), (7, "gcs", 14, None)]


def test_missing_table_is_named(folder):
    (folder / "lab.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lab\.csv"):
        eicu.events(folder, some_stays(a=80.0))


@demo
def test_demo_stays():
    """[eICU demo 2.0.1] 2,520 unit stays of 1,841 patients, 212 deaths in hospital, 28 of unknown outcome."""
    after = eicu.stays(DEMO)
    assert after.schema == pl.Schema(STAYS)
    assert (after.height, after["patient_id"].n_unique(), after["hospital_id"].n_unique()) == (2520, 1841, 186)
    assert (after["hospital_death"].sum(), after["hospital_death"].null_count()) == (212, 28)
    assert after["stay_id"].is_sorted() and after["stay_id"].is_unique().all()
    assert after.filter(pl.col("stay_number") == 1).height == 1841


@demo
def test_demo_events():
    """[counted on the eICU demo 2.0.1] a broad urine rule reached 1,928 stays."""
    stays = eicu.stays(DEMO)
    tables = {name: frame.collect(engine="streaming") for name, frame in eicu.events(DEMO, stays).items()}
    assert all(frame.schema == pl.Schema(RAW_EVENTS) and frame.height for frame in tables.values())
    urine = tables["intakeOutput"].filter(pl.col("concept") == "urine")
    assert urine["stay_id"].n_unique() >= 1928
    assert urine["value"].max() <= 2 * 2000  # two entries of one minute add
    assert tables["apacheApsVar"]["minute"].unique().to_list() == [1440]
    assert set(tables["respiratoryCare"]["value"].unique()) == {0, 1, 2}
    everything = pl.concat(tables.values())
    assert not everything.select(
        pl.any_horizontal(pl.col("stay_id", "minute", "concept", "value").is_null()).any()
    ).item()


@demo
def test_demo_norepinephrine():
    """[counted on the eICU demo 2.0.1] 3.7 % of the rows are in mcg/kg/min, 85.1 % become usable; the units agree in the median."""
    rows = eicu.infusion_rows(DEMO, eicu.stays(DEMO)).filter(drug="norepinephrine")
    assert (rows.height, rows["stay_id"].n_unique()) == (5076, 192)
    assert rows["rate"].is_not_null().mean() >= 0.85
    assert (rows["source_unit"] == "mcg/kg/min").mean() == pytest.approx(0.037, abs=0.001)
    median = dict(rows.group_by("source_unit").agg(pl.col("rate").median()).iter_rows())
    assert median["mcg/kg/min"] == pytest.approx(0.1, abs=0.005)
    assert median["mcg/min"] == pytest.approx(0.06, abs=0.005)
    assert median["ml/hr"] == pytest.approx(0.098, abs=0.005)
