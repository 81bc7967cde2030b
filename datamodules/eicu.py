"""eICU Collaborative Research Database 2.0 (and its demo): raw tables -> stays, events, vasopressor intervals.

All offsets of eICU count minutes from admission to the unit, which is what ``stays`` and ``events`` want.

Sources of the rules:
  [E] eicu-code ``concepts/pivoted/*.sql`` (MIT)                       https://github.com/MIT-LCP/eicu-code
  [B] Bennett 2023 (ricu's rules for eICU)                              doi:10.1093/gigascience/giad041
  [D] documentation of the tables                                       https://eicu-crd.mit.edu/eicutables
"""

from pathlib import Path

import polars as pl

from datamodules import tables
from datamodules.eicu_infusions import infusion_rows, intervals, vasopressors
from datamodules.schema import RAW_EVENTS, STAYS, conform
from datamodules.treatment import estimated_events, rate_events, ventilation_events

__all__ = ["events", "infusion_rows", "stays", "vasopressors"]

URINE_CELLS = Path(__file__).parent / "terms" / "eicu_urine_cellpaths.csv"
OUTPUT_CELLS = "flowsheet|flowsheet cell labels|i&o|output (ml)|"
INTAKE_CELLS = "flowsheet|flowsheet cell labels|i&o|intake (ml)|"
# cells below INTAKE_CELLS that are no volume into a vein: by mouth or tube, sums of other cells, doses; this project's list
NOT_INTRAVENOUS = (
    r"total|p\.o|\bpo\b|oral|enteral|tube|gastric|jejun|meal|feed|formula|irrigant|\(mcg\)|^intake$|^misc|^#|^insulin$|^fentanyl$"
)
PARENTERAL_NUTRITION = r"tpn|ppn|lipid|fat emulsion"
ENTRY_MAX = 2000  # mL in one entry; this project's limit: the demo goes up to 7,746, a shift's total or a typing error
DAY = 1440  # minutes

TABLES = (
    *("patient", "vitalPeriodic", "vitalAperiodic", "lab", "nurseCharting", "apacheApsVar"),
    *("respiratoryCharting", "respiratoryCare", "intakeOutput", "infusionDrug"),
)

UNIT_TYPES = {
    "MICU": "medical",
    "SICU": "surgical",
    "Cardiac ICU": "cardiac",
    "CCU-CTICU": "cardiac",  # a coronary care unit that also takes surgical patients
    "CSICU": "cardiac_surgery",
    "CTICU": "cardiac_surgery",
    "Neuro ICU": "neuro",
    "Med-Surg ICU": "mixed",
}

PERIODIC = {
    "heartrate": "heart_rate",
    "respiration": "respiratory_rate",
    "sao2": "spo2",  # pulse oximeter, in spite of the column's name [D]
    "temperature": "temperature",
    "systemicsystolic": "systolic_bp",
    "systemicdiastolic": "diastolic_bp",
    "systemicmean": "mean_bp",
    "etco2": "etco2",
}
APERIODIC = {"noninvasivesystolic": "systolic_bp", "noninvasivediastolic": "diastolic_bp", "noninvasivemean": "mean_bp"}

# labname -> concept. "-polys", "-lymphs" and "-bands" are shares of the white cells; a count in another unit stays unmapped.
LABS = {
    "-polys": "neutrophils",
    "-lymphs": "lymphocytes",
    "-bands": "bands",
    "ALT (SGPT)": "alt",
    "AST (SGOT)": "ast",
    "BUN": "bun",
    "Base Deficit": "base_excess",  # sign turned below
    "Base Excess": "base_excess",
    "CPK": "ck",
    "CPK-MB": "ck_mb",
    "CRP": "crp",
    "FiO2": "fio2",
    "HCO3": "bicarbonate",
    "Hct": "hematocrit",
    "Hgb": "hemoglobin",
    "MCH": "mch",
    "MCHC": "mchc",
    "MCV": "mcv",
    "Methemoglobin": "methemoglobin",
    "O2 Sat (%)": "sao2",
    "PEEP": "peep",
    "PT - INR": "inr",
    "PTT": "ptt",
    "Total CO2": "bicarbonate",
    "WBC x 1000": "wbc",
    "albumin": "albumin",
    "alkaline phos.": "alkaline_phosphatase",
    "bedside glucose": "glucose",
    "bicarbonate": "bicarbonate",
    "calcium": "calcium",
    "chloride": "chloride",
    "creatinine": "creatinine",
    "direct bilirubin": "bilirubin_direct",
    "fibrinogen": "fibrinogen",
    "glucose": "glucose",
    "ionized calcium": "calcium_ionized",
    "lactate": "lactate",
    "magnesium": "magnesium",
    "pH": "ph",
    "paCO2": "paco2",
    "paO2": "pao2",
    "phosphate": "phosphate",
    "platelets x 1000": "platelets",
    "potassium": "potassium",
    "sodium": "sodium",
    "total bilirubin": "bilirubin_total",
    "total cholesterol": "cholesterol",
    "troponin - I": "troponin_i",
    "troponin - T": "troponin_t",
}

# "label|name" of nurseCharting -> concept [E: pivoted-vital.sql, pivoted-gcs.sql]
NURSE = {
    "Heart Rate|Heart Rate": "heart_rate",
    "Respiratory Rate|Respiratory Rate": "respiratory_rate",
    "O2 Saturation|O2 Saturation": "spo2",
    "Temperature|Temperature (C)": "temperature",
    "Non-Invasive BP|Non-Invasive BP Systolic": "systolic_bp",
    "Non-Invasive BP|Non-Invasive BP Diastolic": "diastolic_bp",
    "Non-Invasive BP|Non-Invasive BP Mean": "mean_bp",
    "Invasive BP|Invasive BP Systolic": "systolic_bp",
    "Invasive BP|Invasive BP Diastolic": "diastolic_bp",
    "Invasive BP|Invasive BP Mean": "mean_bp",
    "MAP (mmHg)|Value": "mean_bp",
    "Arterial Line MAP (mmHg)|Value": "mean_bp",
    "Glasgow coma score|GCS Total": "gcs",
    "Score (Glasgow Coma Scale)|Value": "gcs",
    "Glasgow coma score|Eyes": "gcs_eyes",
    "Glasgow coma score|Verbal": "gcs_verbal",
    "Glasgow coma score|Motor": "gcs_motor",
}

RESPIRATORY = {
    "FiO2": "fio2",
    "FIO2 (%)": "fio2",
    "O2 Percentage": "fio2",
    "Set Fraction of Inspired Oxygen (FIO2)": "fio2",
    "PEEP": "peep",
    "PEEP/CPAP": "peep",
}
# Signs of breathing support in respiratoryCharting. By the value (lower case), for labels that name a device or a switch:
DEVICE_LABELS = ("RT Vent On/Off", "O2 Device", "Oxygen Delivery Method")
DEVICES = {
    "start": 2,
    "continued": 2,
    "ventilator": 2,
    "mechanical ventilator": 2,
    "bi-pap": 1,
    "bipap": 1,
    "cpap": 1,
    "off": 0,
    "suspended": 0,
    "nasal cannula": 0,
    "none (room air)": 0,
    "room air": 0,
    "simple mask": 0,
    "face mask": 0,
    "face tent": 0,
    "aerosol mask": 0,
    "venturi mask": 0,
    "non-rebreather mask": 0,
    "high flow mask": 0,
    "high flow nasal cannula": 0,
    "heated high flow nasal cannula": 0,
}
# ... and by the label: what only a mask ventilator, or only an invasive one, reports. ricu [B] takes every row of the category
# respFlowPtVentData for a sign; "RR (patient)" and "SaO2" in it are charted for patients on room air, so they are left out, and
# two settings that only a ventilator has are taken in. Against the ventilation flag of APACHE's first day in the demo, 37 % of
# the stays found by the whole category are ventilated, 64 % of those found here.
MASK_LABELS = ("B1: IPAP", "B2: EPAP", "B3: Est Mask Leak", "Bipap Delivery Mode", "NIV Setting EPAP", "NIV Pt/Vent Spont_TidalV")
VENTILATOR_CATEGORY = "respFlowPtVentData"
NOT_A_VENTILATOR = ("RR (patient)", "SaO2", "ETCO2")
VENTILATOR_SETTINGS = ("Tidal Volume (set)", "Vent Rate")


def stays(root: Path) -> pl.DataFrame:
    """All unit stays, schema ``schema.STAYS``.

    - ``age``: "> 89" is 90 (years). ``height`` (cm) and ``weight`` (kg) are repaired as in [E: pivoted-weight.sql]: swapped when
      they stand in each other's field, heights in metres or in decimetres rescaled, the rest outside the limits null.
    - ``stay_number`` counts a patient's unit stays, step-down stays included. eICU dates nothing: within one hospital stay
      ``unitvisitnumber`` orders the units; hospital stays are ordered by year of discharge and age where those differ, else by
      ``patienthealthsystemstayid``, which is arbitrary.
    - ``hospital_death`` follows ``hospitaldischargestatus``; empty is null, except that a death in the unit is a death in
      hospital. ``death_minute`` is the discharge from the unit for a death there, else the discharge from hospital.
    - A folder without outcome columns (for prediction) gives null outcomes.

    Args:
        root: folder with ``patient.csv.gz``.
    """
    present = tables.columns(root, "patient")
    outcome = {
        "hospitaldischargeyear": "int",
        "hospitaldischargeoffset": "int",
        "hospitaldischargestatus": "str",
        "unitdischargeoffset": "int",
        "unitdischargestatus": "str",
    }
    needed = {
        "patientunitstayid": "int",
        "patienthealthsystemstayid": "int",
        "uniquepid": "str",
        "hospitalid": "str",
        "gender": "str",
        "age": "str",
        "admissionheight": "float",
        "admissionweight": "float",
        "unittype": "str",
        "unitvisitnumber": "int",
        "hospitaladmitoffset": "int",
    }
    with tables.reading(root, "patient"):
        table = tables.scan(root, "patient", needed | {c: kind for c, kind in outcome.items() if c in present})
        absent = [pl.lit(None, tables.TYPES[kind]).alias(c) for c, kind in outcome.items() if c not in present]
        age = pl.when(pl.col("age").str.contains("89") & pl.col("age").str.starts_with(">")).then(pl.lit("90")).otherwise("age")
        table = table.with_columns(*absent, age=age.cast(pl.Float32, strict=False), **_body())
        order = ["hospitaldischargeyear", "age", "patienthealthsystemstayid", "unitvisitnumber", "patientunitstayid"]
        ranked = table.sort("uniquepid", *order).with_columns(stay_number=pl.int_range(1, pl.len() + 1).over("uniquepid"))
        in_unit, in_hospital = (_expired(pl.col(f"{place}dischargestatus")) for place in ("unit", "hospital"))
        found = ranked.select(
            "age",
            "height",
            "weight",
            "stay_number",
            stay_id="patientunitstayid",
            patient_id="uniquepid",
            hospital_id="hospitalid",
            sex=pl.col("gender").replace_strict({"Male": 1.0, "Female": 0.0}, default=None),
            unit=pl.col("unittype").replace_strict(UNIT_TYPES, default="other"),
            admit_minute="hospitaladmitoffset",
            icu_minutes="unitdischargeoffset",
            discharge_minute="hospitaldischargeoffset",
            death_minute=pl.when(in_unit).then("unitdischargeoffset").when(in_hospital).then("hospitaldischargeoffset"),
            hospital_death=pl.coalesce(in_hospital, pl.when(in_unit).then(pl.lit(True))),
            icu_death=in_unit,
        )
        return conform(found.sort("stay_id").collect(), STAYS, "eICU stays")


def events(root: Path, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
    """Raw table -> its events, schema ``schema.RAW_EVENTS``, for the stays given; values in the charted unit.

    ``nurseCharting`` is read where it is there and skipped where not (the demo that this was built on lacks it), since its
    vital signs repeat ``vitalPeriodic`` by hand; without it the Glasgow coma scale comes from ``apacheApsVar`` alone.

    Args:
        root: folder with the eICU tables.
        stays: as ``eicu.stays`` gives them.
    """
    running = intervals(root, stays)
    found = {
        "vitalPeriodic": _wide(root, stays, "vitalPeriodic", PERIODIC),
        "vitalAperiodic": _wide(root, stays, "vitalAperiodic", APERIODIC),
        "lab": _labs(root, stays),
        "apacheApsVar": _apache(root, stays),
        "respiratoryCharting": _respiratory(root, stays),
        "respiratoryCare": _ventilation(root, stays),
        "intakeOutput": _fluids(root, stays),
        "infusionDrug": pl.concat([rate_events(running), estimated_events(running)]),
    }
    if tables.find(root, "nurseCharting"):
        found["nurseCharting"] = _nurse(root, stays)
    return found


def _body() -> dict[str, pl.Expr]:
    height, weight = pl.col("admissionheight"), pl.col("admissionweight")
    swapped = (weight >= 100) & height.is_between(25, 100, closed="right") & ((height - weight).abs() >= 20)
    cm = pl.when(swapped).then(weight).otherwise(height)
    kg = pl.when(swapped).then(height).otherwise(weight)
    cm = pl.when(cm <= 0.3).then(None).when(cm <= 2.5).then(cm * 100).when(cm.is_between(10, 25)).then(cm * 10).when(cm <= 250).then(cm)
    return {"height": cm, "weight": pl.when(kg.is_between(20, 300)).then(kg)}


def _expired(status: pl.Expr) -> pl.Expr:
    return status.replace_strict({"Expired": True, "Alive": False}, default=None, return_dtype=pl.Boolean)


def _open(root: Path, stays: pl.DataFrame, table: str, minute: str, columns: dict[str, str]) -> pl.LazyFrame:
    """``table`` with ``stay_id`` and ``minute``, only the rows of ``stays``."""
    rows = tables.scan(root, table, {"patientunitstayid": "int", minute: "int"} | columns)
    rows = rows.rename({"patientunitstayid": "stay_id", minute: "minute"})
    return rows.join(stays.lazy().select("stay_id"), on="stay_id", how="semi")


def _raw(rows: pl.LazyFrame) -> pl.LazyFrame:
    """To ``RAW_EVENTS``, without empty values; no ``unit`` column means the concept's own unit."""
    if "unit" not in rows.collect_schema():
        rows = rows.with_columns(unit=pl.lit(None, pl.String))
    return rows.select(pl.col(c).cast(kind) for c, kind in RAW_EVENTS.items()).filter(pl.col("value").is_not_null())


def _number(column: str) -> pl.Expr:
    return pl.col(column).str.replace("%", "", literal=True).str.strip_chars().cast(pl.Float64, strict=False)


def _fraction(value: str) -> pl.Expr:
    """The unit of an oxygen share written without one: up to 1 it is a fraction [E: pivoted-bg.sql takes 0.2-1 and 20-100]."""
    return pl.when(pl.col(value) <= 1).then(pl.lit("fraction"))


def _named(rows: pl.LazyFrame, column: str, concepts: dict[str, str]) -> pl.LazyFrame:
    """Only the rows whose ``column`` is in ``concepts``, with the concept: a join, since ``replace_strict`` stops the streaming."""
    names = pl.LazyFrame({column: list(concepts), "concept": list(concepts.values())})
    return rows.join(names, on=column, how="inner")


def _wide(root: Path, stays: pl.DataFrame, table: str, concepts: dict[str, str]) -> pl.LazyFrame:
    rows = _open(root, stays, table, "observationoffset", dict.fromkeys(concepts, "float")).rename(concepts)
    return _raw(rows.unpivot(list(concepts.values()), index=["stay_id", "minute"], variable_name="concept"))


def _labs(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Results as last revised; a revision with several different results is no result [E: pivoted-lab.sql]."""
    rows = _open(
        root,
        stays,
        "lab",
        "labresultoffset",
        {
            "labname": "str",
            "labresult": "float",
            "labmeasurenamesystem": "str",
            "labmeasurenameinterface": "str",
            "labresultrevisedoffset": "int",
        },
    )
    rows = rows.filter(pl.col("labname").is_in(list(LABS)))
    # the hospital's own unit first: the system's is the same for a whole labname and contradicts the value in places (CRP)
    charted = pl.coalesce(pl.col(c).replace({"": None}) for c in ("labmeasurenameinterface", "labmeasurenamesystem"))
    rows = rows.select(  # narrow types: 39 million rows of the full database are grouped
        "stay_id",
        pl.col("labname").cast(pl.Enum(list(LABS))),
        pl.col("minute").cast(pl.Int32),
        revised=pl.col("labresultrevisedoffset").fill_null(pl.col("minute")).cast(pl.Int32),
        value="labresult",
        unit=charted.cast(pl.Categorical),
    )
    result = ["stay_id", "labname", "minute"]
    revisions = rows.group_by(*result, "revised").agg(pl.col("value").min(), high=pl.col("value").max(), unit=pl.col("unit").first())
    settled = revisions.filter(pl.col("value").eq_missing(pl.col("high")))
    last = settled.group_by(result).agg(pl.col("value", "unit").max_by("revised"))
    last = _named(last.with_columns(pl.col("labname", "unit").cast(pl.String)), "labname", LABS)
    name = pl.col("labname")
    unit = (
        pl.when(name == "ionized calcium")  # "mmol/L" stands beside values of both scales, which leave a gap between 1.5 and 3
        .then(pl.when(pl.col("value") < 2.5).then(pl.lit("mmol/L")).otherwise(pl.lit("mg/dL")))
        .when((name == "FiO2") & (pl.col("unit") == "%"))
        .then(_fraction("value"))
        .otherwise("unit")
    )
    signed = pl.when(name == "Base Deficit").then(-pl.col("value")).otherwise("value")
    return _raw(last.with_columns(unit=unit, value=signed))


def _nurse(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    label, name = "nursingchartcelltypevallabel", "nursingchartcelltypevalname"
    rows = _open(root, stays, "nurseCharting", "nursingchartoffset", {label: "str", name: "str", "nursingchartvalue": "str"})
    rows = rows.with_columns(cell=pl.concat_str(label, name, separator="|"), value=_number("nursingchartvalue"))
    return _raw(_named(rows, "cell", NURSE))


def _apache(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """The worst Glasgow coma scale of the first day (points), known when that day is over: minute 1440, never earlier; -1 is missing."""
    parts = ["eyes", "verbal", "motor"]
    rows = tables.scan(root, "apacheApsVar", {"patientunitstayid": "int"} | dict.fromkeys(parts, "int"))
    rows = rows.rename({"patientunitstayid": "stay_id"}).join(stays.lazy().select("stay_id"), on="stay_id", how="semi")
    rows = rows.select("stay_id", *(pl.when(pl.col(c) > 0).then(c).alias(f"gcs_{c}") for c in parts))
    total = pl.sum_horizontal((f"gcs_{c}" for c in parts), ignore_nulls=False)
    long = rows.with_columns(gcs=total).unpivot(index="stay_id", variable_name="concept").drop_nulls("value")
    return _raw(long.with_columns(minute=pl.lit(DAY)))


def _charting(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    columns = {"respcharttypecat": "str", "respchartvaluelabel": "str", "respchartvalue": "str"}
    renamed = {"respcharttypecat": "category", "respchartvaluelabel": "label", "respchartvalue": "text"}
    return _open(root, stays, "respiratoryCharting", "respchartoffset", columns).rename(renamed)


def _respiratory(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """FiO2 (text may end in "%") and PEEP (cmH2O)."""
    rows = _named(_charting(root, stays), "label", RESPIRATORY).with_columns(value=_number("text"))
    return _raw(rows.with_columns(unit=pl.when(pl.col("concept") == "fio2").then(_fraction("value"))))


def _ventilation(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Ventilation from respiratoryCare (start and end of the present and the prior episode, 0 = none) and respiratoryCharting.

    A respiratoryCare row with a start and no end says that the patient is ventilated at the time of that row. An episode of
    respiratoryCare is taken for invasive: the table records the airway and the ventilator's alarms [D].
    """
    offsets = ["ventstartoffset", "ventendoffset", "priorventstartoffset", "priorventendoffset"]
    care = _open(root, stays, "respiratoryCare", "respcarestatusoffset", dict.fromkeys(offsets, "int"))
    running = care.filter((pl.col("ventstartoffset") != 0) & (pl.col("ventendoffset") == 0)).select("stay_id", "minute", level=2)
    marks = care.drop("minute").unpivot(offsets, index="stay_id", variable_name="mark", value_name="minute").filter(pl.col("minute") != 0)
    marks = marks.select("stay_id", "minute", level=pl.when(pl.col("mark").str.contains("start")).then(2).otherwise(0))
    label = pl.col("label")
    level = (
        pl.when(label.is_in(DEVICE_LABELS))
        .then(pl.col("text").str.to_lowercase().replace_strict(DEVICES, default=None, return_dtype=pl.Int32))
        .when(label.is_in(MASK_LABELS))
        .then(1)
        .when(((pl.col("category") == VENTILATOR_CATEGORY) & ~label.is_in(NOT_A_VENTILATOR)) | label.is_in(VENTILATOR_SETTINGS))
        .then(2)
    )
    charted = _charting(root, stays).select("stay_id", "minute", level=level).drop_nulls("level")
    signs = pl.concat([part.cast({"level": pl.Int32}) for part in (running, marks.unique(), charted)])
    return ventilation_events(signs)


def _fluids(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Urine (mL, clipped at 2,000 an entry), volumes given into a vein (mL, likewise clipped) and charted body weight (kg).

    The urine cells are those of [E: pivoted-uo.sql] and a few further names (in the demo 1,330 rows of "Indwelling Catheter
    Output"), without the cells that hold a count of voids or of incontinence: a "1" there is an occasion, not a millilitre.
    """
    cells = pl.read_csv(URINE_CELLS)
    listed = {kind: cells.filter(pl.col("match") == kind)["cell"].to_list() for kind in ("exact", "regex", "not")}
    rows = _open(root, stays, "intakeOutput", "intakeoutputoffset", {"cellpath": "str", "cellvaluenumeric": "float"})
    path = pl.col("cellpath").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    rows = rows.with_columns(path=path, value="cellvaluenumeric").with_columns(cell=pl.col("path").str.strip_prefix(OUTPUT_CELLS))
    cell = pl.col("cell")
    named = cell.is_in(listed["exact"]) | cell.str.contains("|".join(listed["regex"]))
    urine = pl.col("path").str.starts_with(OUTPUT_CELLS) & named & ~cell.str.contains("|".join(listed["not"]))
    intake = pl.col("path").str.strip_prefix(INTAKE_CELLS)
    parenteral = ~intake.str.starts_with("nutrition") | intake.str.contains(PARENTERAL_NUTRITION)
    vein = pl.col("path").str.starts_with(INTAKE_CELLS) & parenteral & ~intake.str.contains(NOT_INTRAVENOUS)
    concept = (
        pl.when(urine)
        .then(pl.lit("urine"))
        .when(vein)
        .then(pl.lit("fluids"))
        .when(pl.col("path").str.ends_with("|bodyweight (kg)"))
        .then(pl.lit("weight"))
    )
    rows = rows.with_columns(concept=concept).drop_nulls("concept")
    volume = pl.col("concept").is_in(["urine", "fluids"])
    clipped = rows.with_columns(value=pl.when(volume).then(pl.col("value").clip(upper_bound=ENTRY_MAX)).otherwise("value"))
    summed = clipped.filter(volume).group_by("stay_id", "minute", "concept").agg(pl.col("value").sum())  # two catheters, two bags
    return pl.concat([_raw(summed), _raw(clipped.filter(~volume))])
