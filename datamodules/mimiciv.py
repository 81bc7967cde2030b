"""MIMIC-IV (2.2, 3.1 and the demo): where each concept is charted, and raw tables -> stays and events.

Item ids follow mimic-code's ``concepts/measurement`` and ``concepts/medication`` (MIT,
https://github.com/MIT-LCP/mimic-code); the files are those of https://physionet.org/content/mimiciv/.
"""

from pathlib import Path

import polars as pl

from datamodules.concepts import CONCEPT
from datamodules.schema import STAYS, VASOPRESSORS, conform
from datamodules.tables import columns, read, reading, scan
from datamodules.treatment import estimated_events, rate_events, volume_events

LOOKBACK = 24 * 60  # minutes before ICU admission from which hospital-wide records (laboratory) are still taken

# concept -> ((itemid, unit where none is charted), ...)
CHART: dict[str, tuple[int, ...]] = {
    "heart_rate": (220045,),
    "systolic_bp": (220179, 220050, 225309),
    "diastolic_bp": (220180, 220051, 225310),
    "mean_bp": (220181, 220052, 225312),
    "respiratory_rate": (220210, 224690),
    "temperature": (223761, 223762),
    "spo2": (220277,),
    "gcs_eyes": (220739,),
    "gcs_verbal": (223900,),
    "gcs_motor": (223901,),
    "glucose": (225664, 220621, 226537),
    "fio2": (223835,),
    "peep": (220339, 224700),
    "weight": (226512, 224639),
    "height": (226707, 226730),
}
CHART_UNITS = {223761: "°F", 226707: "inch"}  # items whose unit is not the concept's, where valueuom is empty
VENTILATION_ITEMS = (226732, 223849, 229314)  # oxygen device, ventilator mode, Hamilton mode: text, see terms/
VENTILATION_VALUE = {"InvasiveVent": 2.0, "Tracheostomy": 2.0, "NonInvasiveVent": 1.0, "HFNC": 1.0, "SupplementalOxygen": 0.0, "None": 0.0}

LABS: dict[str, tuple[int, ...]] = {
    "ph": (50820,),
    "paco2": (50818,),
    "pao2": (50821,),
    "sao2": (50817,),
    "base_excess": (50802,),
    "fio2": (50816,),
    "bicarbonate": (50882,),
    "lactate": (50813,),
    "methemoglobin": (50814,),
    "calcium_ionized": (50808,),
    "sodium": (50983,),
    "potassium": (50971,),
    "chloride": (50902,),
    "bun": (51006,),
    "creatinine": (50912,),
    "glucose": (50931, 50809),
    "calcium": (50893,),
    "magnesium": (50960,),
    "phosphate": (50970,),
    "albumin": (50862,),
    "bilirubin_total": (50885,),
    "bilirubin_direct": (50883,),
    "alt": (50861,),
    "ast": (50878,),
    "alkaline_phosphatase": (50863,),
    "ck": (50910,),
    "ck_mb": (50911,),
    "troponin_t": (51003,),
    "troponin_i": (51002,),
    "crp": (50889,),
    "cholesterol": (50907,),
    "wbc": (51301, 51300),
    "neutrophils": (51256,),
    "lymphocytes": (51244,),
    "bands": (51144,),
    "hemoglobin": (51222, 50811),
    "hematocrit": (51221, 50810),
    "mch": (51248,),
    "mchc": (51249,),
    "mcv": (51250,),
    "platelets": (51265,),
    "inr": (51237,),
    "ptt": (51275,),
    "fibrinogen": (51214,),
}
SPECIMEN_ITEM = 52033  # text of the blood gas specimen: "ART.", "VEN.", ...
ARTERIAL_ONLY = (50820, 50818, 50821, 50817, 50802)

# mimic-code urine_output.sql; 227488 is irrigant put in, so it counts negative. 227510 ("TF Residual"), listed as urine
# by some pipelines, is gastric residual and is not.
URINE = (226559, 226560, 226561, 226584, 226563, 226564, 226565, 226567, 226557, 226558, 227488, 227489)
IRRIGANT_IN = 227488

INFUSIONS: dict[int, str] = {
    221906: "norepinephrine",
    221289: "epinephrine",
    229617: "epinephrine",
    221662: "dopamine",
    221653: "dobutamine",
    221749: "phenylephrine",
    229630: "phenylephrine",
    229631: "phenylephrine",
    229632: "phenylephrine",
    222315: "vasopressin",
    221986: "milrinone",
}

# orders whose volume does not go into a vein, or ran before the ICU at a time that is not charted
NOT_INTRAVENOUS = ("13-Enteral Nutrition", "14-Oral/Gastric Intake", "16-Pre Admission/Non-ICU")

CARE_UNITS = (  # fragment of first_careunit -> unit; the first that matches
    ("Cardiac Vascular", "cardiac_surgery"),
    ("Coronary", "cardiac"),
    ("MICU/SICU", "mixed"),
    ("Neuro", "neuro"),
    ("Medical Intensive", "medical"),
    ("Surgical Intensive", "surgical"),
    ("Trauma", "surgical"),
)

TABLES = ("hosp/patients", "hosp/admissions", "icu/icustays", "icu/chartevents", "hosp/labevents", "icu/outputevents", "icu/inputevents")


def stays(root: Path) -> pl.DataFrame:
    """Every ICU stay of ``icu/icustays``, schema ``STAYS``, in the order of the patients (as the event files are).

    Age is ``anchor_age + year(intime) - anchor_year`` (mimic-code ``demographics/age.sql``; above 89 the publisher writes
    91). Height and weight are charted, so they come as events. Without the outcome columns of ``hosp/admissions``
    (prediction on new patients) the outcomes are null.
    """
    icu = read(
        root,
        "icu/icustays",
        {"subject_id": "int", "hadm_id": "int", "stay_id": "int", "first_careunit": "str", "intime": "time", "outtime": "time"},
    )
    patients = read(root, "hosp/patients", {"subject_id": "int", "gender": "str", "anchor_age": "float", "anchor_year": "int"})
    wanted = {"hadm_id": "int", "admittime": "time", "dischtime": "time", "deathtime": "time", "hospital_expire_flag": "int"}
    present = set(columns(root, "hosp/admissions"))
    admissions = read(root, "hosp/admissions", {c: kind for c, kind in wanted.items() if c in present or c in ("hadm_id", "admittime")})
    absent = [c for c in wanted if c not in present and c not in ("hadm_id", "admittime")]
    admissions = admissions.with_columns(
        pl.lit(None, pl.Int64 if c == "hospital_expire_flag" else pl.Datetime("us")).alias(c) for c in absent
    )
    unit = pl.lit("other")
    for fragment, name in reversed(CARE_UNITS):
        unit = pl.when(pl.col("first_careunit").str.contains(fragment, literal=True)).then(pl.lit(name)).otherwise(unit)
    death = pl.col("hospital_expire_flag") == 1
    died = pl.when(death).then(pl.coalesce("deathtime", "dischtime"))
    frame = (
        icu.join(patients, on="subject_id", how="left")
        .join(admissions, on="hadm_id", how="left")
        .sort("subject_id", "intime", "stay_id")
        .select(
            stay_id="stay_id",
            patient_id=pl.col("subject_id").cast(pl.String),
            hospital_id=pl.lit("BIDMC"),
            stay_number=pl.int_range(pl.len()).over("subject_id") + 1,
            age=pl.col("anchor_age") + pl.col("intime").dt.year() - pl.col("anchor_year"),
            sex=pl.col("gender").replace_strict({"M": 1.0, "F": 0.0}, default=None),
            unit=unit,
            admit_minute=_minutes(pl.col("admittime")),
            icu_minutes=_minutes(pl.col("outtime")),
            discharge_minute=_minutes(pl.coalesce("dischtime", "deathtime")),
            death_minute=_minutes(died),
            hospital_death=death,
            icu_death=pl.when(pl.col("hospital_expire_flag").is_not_null()).then((death & (died <= pl.col("outtime"))).fill_null(False)),
        )
    )
    return conform(frame, STAYS, "MIMIC-IV stays")


def events(root: Path, stays: pl.DataFrame) -> dict[str, pl.LazyFrame]:
    """The raw tables as lazy frames of schema ``RAW_EVENTS``."""
    times = _times(root)
    given = vasopressors(root, stays)
    unmapped = _infusions(root, stays).filter(pl.col("rate").is_null())
    lost = unmapped.select("stay_id", minute="start_minute", concept=pl.col("drug").cast(CONCEPT), value="charted", unit="rateuom")
    return {
        "icu/chartevents": _chartevents(root, times),
        "hosp/labevents": _labevents(root, times, stays),
        "icu/outputevents": _outputevents(root, times),
        "icu/inputevents": pl.concat([rate_events(given.lazy()), estimated_events(given.lazy()), lost, _fluids(root, times)]),
    }


def vasopressors(root: Path, stays: pl.DataFrame) -> pl.DataFrame:
    """Infusion intervals of ``icu/inputevents``, schema ``VASOPRESSORS``.

    Rates are in mcg/kg/min, vasopressin in units/h. Unit rules of mimic-code ``concepts/medication``: norepinephrine in
    mg/kg/min counts x 1000 unless the weight is charted as 1 kg; phenylephrine in mcg/min is divided by the weight;
    vasopressin in units/min counts x 60. A rate in any other unit is left out and counted in the coverage table.
    """
    known = _infusions(root, stays).filter(pl.col("rate").is_not_null())
    frame = known.drop("charted", "rateuom").filter(pl.col("rate") > 0, pl.col("end_minute") > pl.col("start_minute"))
    with reading(root, "icu/inputevents"):
        collected = frame.sort("stay_id", "drug", "start_minute").collect(engine="streaming")
    return conform(collected, VASOPRESSORS, "MIMIC-IV vasopressors")


def _infusions(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Vasopressor rows with a charted rate; ``rate`` is null where its unit is not one of the rules'."""
    items = pl.LazyFrame({"itemid": list(INFUSIONS), "drug": list(INFUSIONS.values())}, schema={"itemid": pl.Int64, "drug": pl.String})
    wanted = {
        "stay_id": "int",
        "itemid": "int",
        "starttime": "time",
        "endtime": "time",
        "rate": "float",
        "rateuom": "str",
        "patientweight": "float",
    }
    unit = (
        pl.col("rateuom")
        .str.to_lowercase()
        .str.replace_all(" ", "")
        .str.replace("minute", "min")
        .str.replace("hour", "h")
        .str.replace("hr", "h")
    )
    rate, weight = pl.col("rate"), pl.when(pl.col("patientweight").is_between(20, 300)).then("patientweight")
    per_kg = (
        pl.when(unit == "mcg/kg/min").then(rate)
        .when((unit == "mg/kg/min") & (pl.col("patientweight") == 1)).then(rate)
        .when(unit == "mg/kg/min").then(rate * 1000)
        .when(unit == "mcg/min").then(rate / weight)
        .when(unit == "mcg/kg/h").then(rate / 60)
        .when(unit == "mcg/h").then(rate / 60 / weight)
    )  # fmt: skip
    per_hour = pl.when(unit == "units/h").then(rate).when(unit == "units/min").then(rate * 60)
    vasopressin = pl.col("drug") == "vasopressin"
    return (
        scan(root, "icu/inputevents", wanted)
        .join(items, on="itemid")
        .join(stays.lazy().select("stay_id"), on="stay_id", how="semi")
        .join(_times(root), on="stay_id")
        .filter(pl.col("rate").is_not_null())
        .select(
            stay_id="stay_id",
            start_minute=_minutes(pl.col("starttime")),
            end_minute=_minutes(pl.col("endtime")),
            drug="drug",
            rate=pl.when(vasopressin).then(per_hour).otherwise(per_kg),
            unit=pl.when(vasopressin).then(pl.lit("units/h")).otherwise(pl.lit("mcg/kg/min")),
            estimated=pl.lit(False),
            charted="rate",
            rateuom=pl.col("rateuom").fill_null("no unit"),
        )
    )


def _minutes(time: pl.Expr) -> pl.Expr:
    """Whole minutes from ICU admission to ``time``, rounded down."""
    return (time - pl.col("intime")).dt.total_seconds().floordiv(60).cast(pl.Int32)


def _times(root: Path) -> pl.LazyFrame:
    """ICU admission and discharge of each stay: small, so every join against it streams."""
    return scan(root, "icu/icustays", {"subject_id": "int", "stay_id": "int", "intime": "time", "outtime": "time"})


def _items(table: dict[str, tuple[int, ...]]) -> pl.LazyFrame:
    pairs = [(item, concept) for concept, items in table.items() for item in items]
    return pl.LazyFrame(pairs, schema={"itemid": pl.Int64, "concept": CONCEPT}, orient="row")


def _chartevents(root: Path, times: pl.LazyFrame) -> pl.LazyFrame:
    text = pl.read_csv(
        Path(__file__).parent / "terms" / "mimiciv_ventilation_status.csv",
        schema={"itemid": pl.Int64, "charted_text": pl.String, "status": pl.String},
    )
    text = text.select(
        "itemid",
        pl.col("charted_text").str.strip_chars().alias("text"),
        level=pl.col("status").replace_strict(VENTILATION_VALUE, return_dtype=pl.Float64),
    )
    items = _items({**CHART, "ventilation": VENTILATION_ITEMS})
    units = pl.LazyFrame({"itemid": list(CHART_UNITS), "own": list(CHART_UNITS.values())}, schema={"itemid": pl.Int64, "own": pl.String})
    charted = scan(
        root,
        "icu/chartevents",
        {"stay_id": "int", "itemid": "int", "charttime": "time", "value": "str", "valuenum": "float", "valueuom": "str"},
    )
    return (
        charted.join(items.join(units, on="itemid", how="left"), on="itemid")
        .join(times.select("stay_id", "intime"), on="stay_id")
        .with_columns(text=pl.when(pl.col("concept") == "ventilation").then(pl.col("value")).str.strip_chars())
        .join(text.lazy(), on=["itemid", "text"], how="left")
        .select(
            stay_id="stay_id",
            minute=_minutes(pl.col("charttime")),
            concept="concept",
            value=pl.when(pl.col("concept") == "ventilation").then("level").otherwise("valuenum"),
            unit=pl.when(pl.col("concept") == "ventilation").then(None).otherwise(pl.coalesce("valueuom", "own")),
        )
        .filter((pl.col("concept") != "ventilation") | pl.col("value").is_not_null())
    )


def _labevents(root: Path, times: pl.LazyFrame, stays: pl.DataFrame) -> pl.LazyFrame:
    """Laboratory values by patient and time: they carry no stay, and those of the day before admission are kept.

    Venous and mixed gases are left out where the specimen is named (mimic-code ``bg.sql`` scores arterial ones only).
    """
    labs = scan(
        root,
        "hosp/labevents",
        {
            "subject_id": "int",
            "specimen_id": "int",
            "itemid": "int",
            "charttime": "time",
            "value": "str",
            "valuenum": "float",
            "valueuom": "str",
        },
    )
    other = (
        labs.filter(pl.col("itemid") == SPECIMEN_ITEM, ~pl.col("value").str.to_uppercase().str.starts_with("ART"))
        .select("specimen_id")
        .unique()
    )
    return (
        labs.join(_items(LABS), on="itemid")
        .join(times.join(stays.lazy().select("stay_id"), on="stay_id", how="semi"), on="subject_id")
        .filter(pl.col("charttime") >= pl.col("intime") - pl.duration(minutes=LOOKBACK), pl.col("charttime") <= pl.col("outtime"))
        .join(other.with_columns(venous=pl.lit(True)), on="specimen_id", how="left")
        .filter(pl.col("venous").is_null() | ~pl.col("itemid").is_in(ARTERIAL_ONLY))
        .select(stay_id="stay_id", minute=_minutes(pl.col("charttime")), concept="concept", value="valuenum", unit="valueuom")
    )


def _outputevents(root: Path, times: pl.LazyFrame) -> pl.LazyFrame:
    output = scan(root, "icu/outputevents", {"stay_id": "int", "itemid": "int", "charttime": "time", "value": "float", "valueuom": "str"})
    return (
        output.filter(pl.col("itemid").is_in(URINE), pl.col("value").is_not_null())
        .join(times.select("stay_id", "intime"), on="stay_id")
        .with_columns(value=pl.when(pl.col("itemid") == IRRIGANT_IN).then(-pl.col("value")).otherwise("value"))
        # irrigant in is taken off what comes out at the same time
        .group_by("stay_id", _minutes(pl.col("charttime")).alias("minute"), "valueuom")
        .agg(pl.col("value").sum())
        .select("stay_id", "minute", pl.lit("urine", CONCEPT).alias("concept"), "value", unit="valueuom")
    )


def _fluids(root: Path, times: pl.LazyFrame) -> pl.LazyFrame:
    """Everything that ran into a vein, by the hour: rows of ``icu/inputevents`` whose amount is a volume, drips' carriers included."""
    wanted = {"stay_id": "int", "starttime": "time", "endtime": "time", "amount": "float", "amountuom": "str", "ordercategoryname": "str"}
    litres = pl.col("amountuom").str.to_lowercase().replace_strict({"ml": 1.0, "l": 1000.0}, default=None, return_dtype=pl.Float64)
    rows = scan(root, "icu/inputevents", wanted).with_columns(volume=pl.col("amount") * litres)
    rows = rows.filter(
        pl.col("volume") > 0, pl.col("endtime") > pl.col("starttime"), ~pl.col("ordercategoryname").fill_null("").is_in(NOT_INTRAVENOUS)
    )
    timed = rows.join(times.select("stay_id", "intime"), on="stay_id")
    return volume_events(
        timed.select("stay_id", "volume", start_minute=_minutes(pl.col("starttime")), end_minute=_minutes(pl.col("endtime"))), "fluids"
    )
