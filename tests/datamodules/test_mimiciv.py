"""MIMIC-IV: each rule on hand-written tables, before and after; the demo's counts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from datamodules import MIMICIV as Module
from datamodules.cohort import Cohort
from datamodules.hospitals import MIMICIV
from datamodules.schema import INFUSIONS
from datamodules.store import Store

# two stays of patient 1 (the second begins 30 h after the first), one of patient 2, one of patient 3 who dies
TABLES = {
    "hosp/patients": """subject_id,gender,anchor_age,anchor_year
1,M,60,2110
2,F,17,2120
3,,91,2130
""",
    "hosp/admissions": """subject_id,hadm_id,admittime,dischtime,deathtime,hospital_expire_flag
1,11,2112-03-01 00:00:00,2112-03-20 00:00:00,,0
2,12,2121-01-01 06:30:00,2121-01-05 00:00:00,,0
3,13,2130-05-01 00:00:00,2130-05-04 12:00:00,2130-05-04 11:00:00,1
""",
    "icu/icustays": """subject_id,hadm_id,stay_id,first_careunit,intime,outtime
1,11,102,Coronary Care Unit (CCU),2112-03-03 06:00:00,2112-03-05 06:00:00
1,11,101,Cardiac Vascular Intensive Care Unit (CVICU),2112-03-02 00:00:30,2112-03-02 12:00:00
2,12,201,Medical/Surgical Intensive Care Unit (MICU/SICU),2121-01-01 08:00:00,2121-01-03 08:00:00
3,13,301,Neuro Stepdown,2130-05-02 00:00:00,2130-05-04 12:00:00
""",
    "icu/chartevents": """subject_id,stay_id,itemid,charttime,storetime,value,valuenum,valueuom
""",
    "hosp/labevents": """subject_id,specimen_id,itemid,charttime,storetime,value,valuenum,valueuom
""",
    "icu/outputevents": """stay_id,itemid,charttime,storetime,value,valueuom
""",
    "icu/inputevents": """subject_id,stay_id,itemid,starttime,endtime,rate,rateuom,patientweight,amount,amountuom,ordercategoryname,orderid,statusdescription
""",
}


PATIENT = {"101": "1", "102": "1", "201": "2", "301": "3"}


def write(root: Path, **rows: str) -> Path:
    """The tables above; ``rows`` are added to the table of that name, one a line.

    Rows of the ICU are written without the patient; those that are charted, measured or put out may leave out when they were stored
    (``@`` and a time at the end of the row says when).
    """
    for table, text in TABLES.items():
        path = root / f"{table}.csv"
        path.parent.mkdir(exist_ok=True, parents=True)
        name, header = table.split("/")[1], text.strip().split("\n")[0].split(",")
        more = ""
        for line in rows.pop(name, "").strip().splitlines():
            line, _, stored = line.strip().partition("@")
            cells = line.split(",")
            if name in ("chartevents", "inputevents"):
                cells.insert(0, PATIENT.get(cells[0], "9"))
            if "storetime" in header:
                cells.insert(header.index("storetime"), stored)
            more += ",".join(cells) + "," * (len(header) - len(cells)) + "\n"
        path.write_text(text + more)
    assert not rows
    return root


def store(root: Path, **options: str) -> Store:
    return Cohort(MIMICIV(str(root), **options)).store  # type: ignore[arg-type]


def before(root: Path) -> list[tuple]:
    """What the hospital gives: stay, minute, concept, value and charted unit."""
    hospital = MIMICIV(str(root))
    stays = hospital.stays()
    frame = pl.concat(hospital.events(hospital.tables(stays), stays)).collect()
    return (
        frame.sort("stay_id", "minute", "concept", "value")
        .select("stay_id", "minute", "concept", "value", "unit")
        .rows()
    )


def intervals(root: Path) -> pl.DataFrame:
    hospital = MIMICIV(str(root))
    stays = hospital.stays()
    return hospital.infusions(hospital.tables(stays), stays).collect()


def after(root: Path, *columns: str) -> list[tuple]:
    """The events of the store: stay, minute, (further columns,) concept and value in the concept's unit."""
    built = store(root)
    frame = built.frame(0, len(built.stays)).with_columns(pl.col("value").cast(pl.Float64).round(3))
    return frame.select("stay_id", "minute", *columns, "concept", "value").rows()


def counted(root: Path, concept: str, *columns: str) -> list[int]:
    """Cells of the coverage table."""
    return list(store(root).coverage().filter(pl.col("concept") == concept).select(columns).row(0))


def test_stays(tmp_path: Path) -> None:
    stays = MIMICIV(str(write(tmp_path))).stays()
    told = ["stay_id", "patient_id", "stay_number", "age", "sex", "unit", "admit_minute", "icu_minutes"]
    assert stays.select(told).rows() == [
        # anchored in 2110 at 60, admitted in 2112; the first stay is the earlier one, wherever it stands in the file
        (101, "1", 1, 62.0, 1.0, "cardiac_surgery", -1441, 719),
        (102, "1", 2, 62.0, 1.0, "cardiac", -3240, 2880),
        (201, "2", 1, 18.0, 0.0, "mixed", -90, 2880),
        (301, "3", 1, 91.0, None, "neuro", -1440, 3600),
    ]
    outcomes = ["discharge_minute", "death_minute", "hospital_death", "icu_death"]
    assert stays.select(outcomes).rows() == [
        (25919, None, False, False),
        (24120, None, False, False),
        (5280, None, False, False),
        (3600, 3540, True, True),
    ]


def test_a_death_after_the_icu_is_no_icu_death_and_its_time_may_be_the_discharge(tmp_path: Path) -> None:
    root = write(tmp_path)
    path = root / "hosp" / "admissions.csv"
    path.write_text(path.read_text().replace("2130-05-04 12:00:00,2130-05-04 11:00:00,1", "2130-05-06 00:00:00,,1"))
    died = MIMICIV(str(root)).stays().filter(pl.col("stay_id") == 301)
    assert died.select("death_minute", "hospital_death", "icu_death").rows() == [(5760, True, False)]


def test_charted_values_and_their_units(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        chartevents="""201,220045,2121-01-01 09:00:00,88,88,bpm
                       201,223761,2121-01-01 09:00:00,98.6,98.6,°F
                       201,223761,2121-01-01 10:00:00,100.4,100.4,
                       201,223762,2121-01-01 11:00:00,38,38,°C
                       201,226707,2121-01-01 09:00:00,70,70,Inch
                       201,226730,2121-01-01 12:00:00,178,178,cm
                       201,223835,2121-01-01 09:00:00,0.5,0.5,
                       201,220277,2121-01-01 09:00:59,,,%
                       201,220045,2121-01-01 13:00:00,900,900,bpm
                       201,220045,2121-01-01 14:00:00,80,80,furlongs
                       999,220045,2121-01-01 09:00:00,88,88,bpm
                       201,999999,2121-01-01 09:00:00,1,1,""",
    )
    assert before(root)[:5] == [
        (201, 60, "heart_rate", 88.0, "bpm"),
        (201, 60, "temperature", 98.6, "°F"),
        (201, 60, "spo2", None, "%"),
        (201, 60, "height", 70.0, "Inch"),
        (201, 60, "fio2", 0.5, None),
    ]
    assert after(root) == [
        (201, 60, "heart_rate", 88.0),
        (201, 60, "temperature", 37.0),
        (201, 60, "height", 177.8),
        (201, 60, "fio2", 50.0),
        (201, 120, "temperature", 38.0),
        (201, 180, "temperature", 38.0),
        (201, 240, "height", 178.0),
    ]
    told = ("rows", "events", "unmapped_unit", "not_a_number", "out_of_range")
    assert counted(root, "heart_rate", *told) == [3, 1, 1, 0, 1]
    assert counted(root, "spo2", *told) == [1, 0, 0, 1, 0]


def test_ventilation_is_read_from_text(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        chartevents="""201,226732,2121-01-01 09:00:00,Nasal cannula,,
                       201,226732,2121-01-01 10:00:00, Endotracheal tube ,,
                       201,223849,2121-01-01 11:00:00,CMV/ASSIST,,
                       201,226732,2121-01-01 12:00:00,Bipap mask ,,
                       201,226732,2121-01-01 13:00:00,Something new,,
                       201,226732,2121-01-01 14:00:00,Tracheostomy tube,,
                       201,226732,2121-01-01 15:00:00,None,,""",
    )
    assert [(minute, value) for _, minute, concept, value in after(root) if concept == "ventilation"] == [
        (60, 0.0), (120, 2.0), (180, 2.0), (240, 1.0), (360, 2.0), (420, 0.0)
    ]  # fmt: skip


def test_labs_go_to_every_stay_that_is_near_in_time(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        labevents="""1,1,50912,2112-03-01 00:00:29,,1.1,mg/dL
                     1,2,50912,2112-03-01 00:00:30,,1.2,mg/dL
                     1,3,50912,2112-03-02 10:00:00,,1.3,mg/dL
                     1,4,50912,2112-03-02 12:00:01,,1.4,mg/dL
                     2,5,50912,2121-01-01 08:00:00,,1.5,mg/dL
                     9,6,50912,2121-01-01 08:00:00,,1.6,mg/dL""",
    )
    assert after(root) == [
        (101, -1440, "creatinine", 1.2),  # 24 h before admission, and not a second more
        (101, 599, "creatinine", 1.3),
        (102, -1200, "creatinine", 1.3),  # the same value, 20 h before the second stay
        (102, -1080, "creatinine", 1.4),  # after the end of the first stay
        (201, 0, "creatinine", 1.5),
    ]


def test_venous_gases_are_left_out(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        labevents="""2,1,52033,2121-01-01 09:00:00,ART.,,
                     2,1,50821,2121-01-01 09:00:00,,95,mm Hg
                     2,2,52033,2121-01-01 10:00:00,VEN.,,
                     2,2,50821,2121-01-01 10:00:00,,40,mm Hg
                     2,2,50820,2121-01-01 10:00:00,,7.3,units
                     2,2,50818,2121-01-01 10:00:00,,50,mm Hg
                     2,2,50817,2121-01-01 10:00:00,,70,%
                     2,2,50802,2121-01-01 10:00:00,,-3,mEq/L
                     2,2,50813,2121-01-01 10:00:00,,2.5,mmol/L
                     2,3,50821,2121-01-01 11:00:00,,90,mm Hg
                     2,,50821,2121-01-01 12:00:00,,85,mm Hg
                     2,4,52033,2121-01-01 13:00:00,art,,
                     2,4,50820,2121-01-01 13:00:00,,7.4,units""",
    )
    assert after(root) == [
        (201, 60, "pao2", 95.0),
        (201, 120, "lactate", 2.5),  # lactate of a venous specimen counts
        (201, 180, "pao2", 90.0),  # the specimen is not named
        (201, 240, "pao2", 85.0),
        (201, 300, "ph", 7.4),
    ]


def test_urine(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        outputevents="""201,226559,2121-01-01 09:00:00,100,ml
                        201,226560,2121-01-01 09:00:00,50,ml
                        201,227488,2121-01-01 10:00:00,300,ml
                        201,227489,2121-01-01 10:00:00,450,ml
                        201,227510,2121-01-01 11:00:00,80,ml
                        201,226559,2121-01-01 12:00:00,,ml""",
    )
    assert after(root) == [
        (201, 60, "urine", 150.0),
        (201, 120, "urine", 150.0),
    ]  # 450 out less 300 put in; no gastric residual (227510)


def test_infusions(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        inputevents="""101,221906,2112-03-02 01:00:30,2112-03-02 02:00:30,0.1,mcg/kg/min,80,,,
                       101,221906,2112-03-02 01:30:30,2112-03-02 03:00:30,0.05,mcg/kg/min,80,,,
                       102,221906,2112-03-03 07:00:00,2112-03-03 08:00:00,0.0002,mg/kg/min,80,,,
                       102,221906,2112-03-03 09:00:00,2112-03-03 10:00:00,0.2,mg/kg/min,1,,,
                       102,221749,2112-03-03 07:00:00,2112-03-03 08:00:00,160,mcg/min,80,,,
                       102,221749,2112-03-03 09:00:00,2112-03-03 10:00:00,160,mcg/min,,,,
                       201,222315,2121-01-01 09:00:00,2121-01-01 10:00:00,2.4,units/hour,80,,,
                       201,222315,2121-01-01 11:00:00,2121-01-01 12:00:00,0.04,units/min,80,,,
                       201,221662,2121-01-01 09:00:00,2121-01-01 10:00:00,300,mcg/kg/hour,80,,,
                       201,221653,2121-01-01 09:00:00,2121-01-01 10:00:00,5,drops,80,,,
                       201,221289,2121-01-01 09:00:00,2121-01-01 09:00:00,0.1,mcg/kg/min,80,,,
                       201,221986,2121-01-01 09:00:00,2121-01-01 10:00:00,,mcg/kg/min,80,,,
                       301,221986,2130-05-02 01:00:00,2130-05-02 02:00:00,0,mcg/kg/min,80,,,""",
    )
    found = intervals(root)
    assert found.schema == pl.Schema(INFUSIONS)
    assert found.select("stay_id", "start_minute", "end_minute", "drug", pl.col("rate").round(4), "unit").rows() == [
        (101, 60, 120, "norepinephrine", 0.1, "mcg/kg/min"),
        (101, 90, 180, "norepinephrine", 0.05, "mcg/kg/min"),
        (102, 60, 120, "norepinephrine", 0.2, "mcg/kg/min"),  # mg/kg/min x 1000
        (102, 180, 240, "norepinephrine", 0.2, "mcg/kg/min"),  # mg/kg/min with a weight of 1 kg: mcg/kg/min after all
        (102, 60, 120, "phenylephrine", 2.0, "mcg/kg/min"),
        (201, 60, 120, "dopamine", 5.0, "mcg/kg/min"),
        (201, 60, 120, "vasopressin", 2.4, "units/h"),
        (201, 180, 240, "vasopressin", 2.4, "units/h"),
    ]
    assert [row for row in after(root) if row[0] == 101 and "equivalent" not in row[2]] == [
        (101, 60, "norepinephrine", 0.1),
        (101, 90, "norepinephrine", 0.15),  # two pumps
        (101, 120, "norepinephrine", 0.05),
        (101, 180, "norepinephrine", 0.0),
    ]
    drugs = ("norepinephrine", "phenylephrine", "vasopressin", "dopamine", "dobutamine")
    assert [counted(root, drug, "unmapped_unit") for drug in drugs] == [[0], [1], [0], [0], [1]]


def test_fluids_are_spread_over_the_time_in_which_they_ran(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        inputevents="""201,225158,2121-01-01 08:30:00,2121-01-01 10:00:00,,,,900,ml,01-Drips
                       201,225158,2121-01-01 13:00:00,2121-01-01 13:01:00,,,,0.5,L,01-Drips
                       201,221906,2121-01-01 08:30:00,2121-01-01 10:00:00,,,,4,mg,01-Drips""",
    )
    assert after(root) == [(201, 59, "fluids", 300.0), (201, 119, "fluids", 600.0), (201, 300, "fluids", 500.0)]


def test_ranges_are_open_where_their_source_has_them_open(tmp_path: Path) -> None:
    """[mimic-code vitalsign.sql] "> 0 and < 300": the limit itself is no heart rate; a saturation of 100 % is one."""
    rows = [
        ("220045", 0),
        ("220045", 0.5),
        ("220045", 300),
        ("220052", 0),
        ("220052", 299),
        ("220210", 0),
        ("220210", 69),
    ]
    rows += [("220210", 70), ("220179", 0), ("220277", 0), ("220277", 100)]
    charted = "\n".join(f"201,{item},2121-01-01 09:{n:02}:00,{v},{v}," for n, (item, v) in enumerate(rows))
    labs = "2,1,51265,2121-01-01 10:00:00,,0,K/uL\n2,1,50882,2121-01-01 10:00:00,,0,mEq/L"
    root = write(tmp_path, chartevents=charted, labevents=labs)
    assert [(concept, value) for _, _, concept, value in after(root)] == [
        ("heart_rate", 0.5), ("mean_bp", 299), ("respiratory_rate", 69), ("spo2", 100), ("bicarbonate", 0)
    ]  # fmt: skip
    concepts = ("heart_rate", "mean_bp", "respiratory_rate", "systolic_bp", "spo2", "platelets", "bicarbonate")
    assert [counted(root, concept, "out_of_range") for concept in concepts] == [[2], [1], [2], [1], [1], [1], [0]]


def test_a_rate_out_of_range_is_clipped(tmp_path: Path) -> None:
    """Norepinephrine is accepted up to 3 mcg/kg/min: 5 becomes 3, since without the step the 0.1 before would still hold."""
    root = write(
        tmp_path,
        inputevents="""201,221906,2121-01-01 09:00:00,2121-01-01 10:00:00,0.1,mcg/kg/min,80,,,
                       201,221906,2121-01-01 10:00:00,2121-01-01 11:00:00,5,mcg/kg/min,80,,,
                       201,221906,2121-01-01 11:00:00,2121-01-01 12:00:00,2,mcg/kg/min,80,,,
                       201,221906,2121-01-01 11:30:00,2121-01-01 12:00:00,2,mcg/kg/min,80,,,""",
    )
    assert [(minute, value) for _, minute, concept, value in after(root) if concept == "norepinephrine"] == [
        (60, 0.1), (120, 3.0), (180, 2.0), (210, 3.0), (240, 0.0)  # two pumps of 2 are 4
    ]  # fmt: skip
    assert counted(root, "norepinephrine", "rows", "events", "clipped", "out_of_range") == [5, 5, 2, 0]
    assert intervals(root)["rate"].to_list() == [0.1, 5.0, 2.0, 2.0]  # the table says what was charted


def test_when_a_record_was_known(tmp_path: Path) -> None:
    """Charting and output are known when stored, if that came later; laboratory values when drawn, or by option when stored."""
    root = write(
        tmp_path,
        chartevents="""201,220045,2121-01-01 09:00:00,88,88,bpm@2121-01-01 09:30:00
                       201,220045,2121-01-01 10:00:00,89,89,bpm@2121-01-01 09:30:00
                       201,220045,2121-01-01 11:00:00,90,90,bpm@
                       201,226732,2121-01-01 12:00:00,Endotracheal tube,,@2121-01-01 15:00:00""",
        labevents="""2,1,50912,2121-01-01 09:00:00,,1.5,mg/dL@2121-01-01 09:45:00
                     2,2,50912,2121-01-01 10:00:00,,1.6,mg/dL@""",
        outputevents="""201,226559,2121-01-01 09:00:00,100,ml@2121-01-01 13:00:00
                        201,226560,2121-01-01 09:00:00,50,ml@2121-01-01 14:00:00""",
        inputevents="201,221906,2121-01-01 09:10:00,2121-01-01 10:00:00,0.1,mcg/kg/min,80,,,",
    )
    found = [row[1:] for row in after(root, "known_minute") if "equivalent" not in row[3]]
    assert found == [
        (60, 90, "heart_rate", 88.0),
        (60, 60, "creatinine", 1.5),
        (60, 360, "urine", 50.0),
        (60, 300, "urine", 100.0),  # known without the other
        (70, 70, "norepinephrine", 0.1),
        (120, 120, "heart_rate", 89.0),
        (120, 120, "creatinine", 1.6),
        (120, 120, "norepinephrine", 0.0),
        (180, 180, "heart_rate", 90.0),
        (240, 420, "ventilation", 2.0),
    ]
    stored = store(root, labs="stored")
    labs = stored.frame(0, len(stored.stays)).filter(pl.col("concept") == "creatinine")
    assert labs.select("minute", "known_minute").rows() == [(60, 105), (120, 120)]


def test_irrigant_is_netted_over_time(tmp_path: Path) -> None:
    """[mimic-code urine_output.sql takes it off in the same minute] what comes out less what was put in before, once that is passed."""
    rows = [
        ("226559", "08:30", 100),  # before any irrigant
        ("227488", "09:00", 300),  # put in
        ("227489", "10:00", 200),  # 100 are still inside
        ("227489", "11:00", 250),  # 450 out, 300 in
        ("227488", "12:00", -100),  # put in as well, whatever the sign
        ("227489", "12:00", 50),
        ("226559", "13:00", 200),
    ]
    output = "\n".join(f"201,{item},2121-01-01 {at}:00,{value},ml" for item, at, value in rows)
    assert [(minute, value) for _, minute, _, value in after(write(tmp_path / "a", outputevents=output))] == [
        (30, 100), (120, 0), (180, 150), (240, 0), (300, 150)
    ]  # fmt: skip
    late = output.replace("300,ml", "300,ml@2121-01-01 20:00:00")  # what was known before is not netted
    found = after(write(tmp_path / "b", outputevents=late), "known_minute")
    told = [(minute, known, value) for _, minute, known, _, value in found]
    assert told == [(30, 30, 100), (120, 120, 200), (180, 180, 250), (240, 240, 0), (300, 300, 150)]


def test_equal_rows_count_once_and_rewritten_ones_never(tmp_path: Path) -> None:
    """[MIMIC-IV documentation] "Rewritten" is an order that was never given; another order that looks the same is another pump."""
    root = write(
        tmp_path,
        inputevents="""201,221906,2121-01-01 09:00:00,2121-01-01 10:00:00,0.1,mcg/kg/min,80,,,,1,FinishedRunning
                       201,221906,2121-01-01 09:00:00,2121-01-01 10:00:00,0.1,mcg/kg/min,80,,,,1,FinishedRunning
                       201,221906,2121-01-01 09:00:00,2121-01-01 10:00:00,0.1,mcg/kg/min,80,,,,2,FinishedRunning
                       201,221906,2121-01-01 11:00:00,2121-01-01 12:00:00,0.5,mcg/kg/min,80,,,,3,Rewritten
                       201,225158,2121-01-01 09:00:00,2121-01-01 10:00:00,,,,500,ml,01-Drips,4,FinishedRunning
                       201,225158,2121-01-01 09:00:00,2121-01-01 10:00:00,,,,500,ml,01-Drips,4,FinishedRunning
                       201,225158,2121-01-01 11:00:00,2121-01-01 12:00:00,,,,900,ml,01-Drips,5,Rewritten""",
        outputevents="""201,226559,2121-01-01 09:00:00,100,ml
                        201,226559,2121-01-01 09:00:00,100,ml
                        201,226560,2121-01-01 09:00:00,100,ml""",
    )
    assert [row[1:] for row in after(root) if "equivalent" not in row[2]] == [
        (60, "urine", 200.0), (60, "norepinephrine", 0.2), (119, "fluids", 500.0), (120, "norepinephrine", 0.0)
    ]  # fmt: skip
    assert intervals(root)["rate"].to_list() == [0.1, 0.1]
    told = ("duplicate", "withdrawn")
    assert [counted(root, c, *told) for c in ("norepinephrine", "fluids", "urine")] == [[1, 1], [1, 1], [1, 0]]


def test_a_result_that_is_a_limit_counts_as_the_limit(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        labevents="""2,1,50813,2121-01-01 09:00:00,>16.00,,mmol/L
                     2,2,50885,2121-01-01 09:00:00,LESS THAN 0.2,,mg/dL
                     2,3,50885,2121-01-01 10:00:00,<0.2,,mg/dL
                     2,4,50813,2121-01-01 10:00:00,HEMOLYZED,,mmol/L
                     2,5,51265,2121-01-01 10:00:00,1000,,K/uL""",
    )
    assert [row[1:] for row in after(root)] == [
        (60, "lactate", 16.0), (60, "bilirubin_total", 0.2), (120, "bilirubin_total", 0.2), (120, "platelets", 1000.0)
    ]  # fmt: skip
    assert counted(root, "lactate", "rows", "events", "not_a_number") == [2, 1, 1]


def test_the_total_coma_scale_is_derived_where_all_parts_are_charted(tmp_path: Path) -> None:
    """Its parts of one minute, known with the last of them; two parts are no total."""
    root = write(
        tmp_path,
        chartevents="""201,220739,2121-01-01 09:00:00,,3,@2121-01-01 09:10:00
                       201,223900,2121-01-01 09:00:00,,4,@2121-01-01 09:20:00
                       201,223901,2121-01-01 09:00:00,,6,@2121-01-01 09:05:00
                       201,220739,2121-01-01 10:00:00,,4,
                       201,223901,2121-01-01 10:00:00,,6,""",
    )
    assert [row[1:] for row in after(root, "known_minute") if row[3] == "gcs"] == [(60, 80, "gcs", 13.0)]


def test_items_of_version_3_and_of_whole_blood(tmp_path: Path) -> None:
    """[d_labitems of MIMIC-IV 3.1] the new assays of albumin, alkaline phosphatase and bilirubin; ions beside a blood gas."""
    items = {
        "53085": ("albumin", 3.1, "g/dL"), "53086": ("alkaline_phosphatase", 90, "IU/L"), "53089": ("bilirubin_total", 2.5, "mg/dL"),
        "50824": ("sodium", 141, "mEq/L"), "50822": ("potassium", 4.1, "mEq/L"), "50806": ("chloride", 101, "mEq/L"),
        "52024": ("creatinine", 1.7, "mg/dL"),
    }  # fmt: skip
    rows = "\n".join(
        f"2,{n},{item},2121-01-01 09:00:00,,{value},{unit}" for n, (item, (_, value, unit)) in enumerate(items.items())
    )
    found = {concept: value for _, _, concept, value in after(write(tmp_path, labevents=rows))}
    assert found == {concept: value for concept, value, _ in items.values()}


def test_a_stay_without_an_end_keeps_its_laboratory_values(tmp_path: Path) -> None:
    """A patient who is still in the unit: what is drawn goes to the stay that is open, from 24 h before it on."""
    root = write(
        tmp_path, labevents="2,1,50912,2121-01-01 09:00:00,,1.5,mg/dL\n2,2,50912,2121-01-20 08:00:00,,1.6,mg/dL"
    )
    path = root / "icu" / "icustays.csv"
    path.write_text(path.read_text().replace("2121-01-01 08:00:00,2121-01-03 08:00:00", "2121-01-01 08:00:00,"))
    assert after(root) == [(201, 60, "creatinine", 1.5), (201, 27360, "creatinine", 1.6)]
    assert store(root).stays.filter(pl.col("stay_id") == 201)["icu_minutes"].to_list() == [None]


def test_a_high_flow_cannula_is_level_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        chartevents="""201,226732,2121-01-01 09:00:00,High flow nasal cannula,,
                       201,226732,2121-01-01 10:00:00,High flow neb,,""",
    )
    assert [row[1:] for row in after(root)] == [(60, "ventilation", 1.0), (120, "ventilation", 0.0)]


def test_mimic_fluids_are_what_runs_into_a_vein(tmp_path: Path) -> None:
    """This project's rule: orders in mL or L, but not by mouth or tube and not from before the ICU."""
    rows = [
        "08:00:00,2121-01-01 10:00:00,,,,1,L,02-Fluids (Crystalloids)",
        "08:30:00,2121-01-01 09:00:00,,,,50,ml,01-Drips",
        "08:00:00,2121-01-01 09:00:00,,,,400,ml,13-Enteral Nutrition",
        "08:00:00,2121-01-01 09:00:00,,,,400,ml,14-Oral/Gastric Intake",
        "08:00:00,2121-01-01 08:01:00,,,,3000,ml,16-Pre Admission/Non-ICU",
        "08:00:00,2121-01-01 09:00:00,,,,8,mg,01-Drips",
    ]
    root = write(tmp_path, inputevents="\n".join(f"201,225158,2121-01-01 {row}" for row in rows))
    assert [row[1:] for row in after(root)] == [(59, "fluids", 550.0), (119, "fluids", 500.0)]


def test_new_patients_without_outcome_columns_can_be_predicted(tmp_path: Path) -> None:
    root = write(
        tmp_path, chartevents="201,220045,2121-01-01 09:00:00,88,88,bpm\n301,220045,2130-05-02 09:00:00,88,88,bpm"
    )
    (root / "hosp" / "admissions.csv").write_text("hadm_id,admittime\n12,2121-01-01 06:30:00\n13,2130-05-01 00:00:00\n")
    stays = MIMICIV(str(root)).stays()
    outcomes = ["discharge_minute", "death_minute", "hospital_death", "icu_death"]
    assert all(stays[c].null_count() == 4 for c in outcomes)
    with pytest.raises(ValueError, match="mortality_hospital needs hospital_death and no stay of these data has it"):
        Module(str(root)).setup()
    module = Module(str(root))
    module.labelled = False
    module.cohort.splits = lambda stays: pl.Series(["train"] * len(stays))  # type: ignore[method-assign]
    module.setup()
    assert module.samples["stay_id"].to_list() == [201, 301]
    assert module.batch(module.rows("all")).target.isnan().all()


@pytest.mark.parametrize(
    ("table", "old", "new", "found"),
    [
        ("hosp/patients", "M,60", "M,sixty", "sixty"),
        ("hosp/admissions", "2112-03-01 00:00:00", "1 March 2112", "1 March 2112"),
        ("icu/icustays", "1,11,102", "1,11,x102", "x102"),
    ],
)
def test_a_damaged_table_of_stays_is_named(tmp_path: Path, table: str, old: str, new: str, found: str) -> None:
    path = write(tmp_path) / f"{table}.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError) as caught:
        store(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("table", "item"),
    [("icu/chartevents", 220045), ("hosp/labevents", 50912), ("icu/outputevents", 226559), ("icu/inputevents", 221906)],
)
def test_a_damaged_table_of_events_is_named(tmp_path: Path, table: str, item: int) -> None:
    path = write(tmp_path) / f"{table}.csv"
    columns = path.read_text().strip().split(",")
    path.write_text(
        path.read_text()
        + ",".join("soon" if c in ("charttime", "starttime", "endtime") else str(item) for c in columns)
        + "\n"
    )
    with pytest.raises(ValueError) as caught:
        store(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "soon" in str(caught.value)


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere: expected the files of MIMICIV; set --data\.root"
    ):
        store(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no MIMICIV tables in .*: expected icu/chartevents\.csv\.gz"):
        store(tmp_path)
    write(tmp_path)
    (tmp_path / "hosp" / "labevents.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no table hosp/labevents in .*--data\.root"):
        store(tmp_path)
    write(tmp_path)
    (tmp_path / "hosp" / "patients.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no table hosp/patients in .*--data\.root"):
        store(tmp_path)


def test_parquet_gives_the_same_store_as_csv(mimic: Path, tmp_path: Path) -> None:
    typed = {"charttime", "starttime", "endtime", "intime", "outtime", "admittime", "dischtime", "deathtime"}
    for path in sorted(mimic.rglob("*.csv.gz")):
        table = pl.read_csv(path, infer_schema_length=None, schema_overrides={"value": pl.String})
        times = [c for c in table.columns if c in typed and table[c].dtype == pl.String]
        target = tmp_path / path.relative_to(mimic).with_suffix("").with_suffix(".parquet")
        target.parent.mkdir(exist_ok=True)
        table.with_columns(pl.col(times).str.to_datetime("%Y-%m-%d %H:%M:%S")).write_parquet(target)
    one, other = store(mimic), store(tmp_path)
    assert one.folder != other.folder
    written = [path for path in sorted(one.folder.iterdir()) if path.is_file()]
    assert len(written) >= 10
    for path in written:
        assert path.read_bytes() == (other.folder / path.name).read_bytes(), path.name
    shutil.rmtree(other.folder)


def test_the_demo_has_its_published_size(real: Callable[[str], Path]) -> None:
    stays = store(real("mimic-iv-demo")).stays
    assert (len(stays), stays["patient_id"].n_unique()) == (140, 100)
    assert stays["hospital_death"].null_count() == 0
    assert stays["age"].is_between(18, 100).all()
