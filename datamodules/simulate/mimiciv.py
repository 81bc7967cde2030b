"""Simulated patients -> MIMIC-IV-shaped tables: the publisher's item ids, texts, units and dates; no real data."""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.simulate.habits import (
    ANTIBIOTICS,
    LAB_CATALOGUE,
    Add,
    Calendar,
    Event,
    Hospitals,
    antibiotic_orders,
    as_text,
    charting_delay,
    draw_minutes,
    lab_values,
    laboratory_delay,
    panel_draws,
    spoil,
    stack,
    twice,
)
from datamodules.simulate.mimiciv_treatment import write_inputevents, write_orders_and_cultures, write_outputevents
from datamodules.simulate.patient import CaseMix, Patients

# severity, infected, age, units, hospitals, offset, target, hazard, weights: see CaseMix
MIMICIV_MIX = CaseMix(0.15, 0.42, 64, (0.34, 0.22, 0.10, 0.14, 0.08, 0.12), 1, 0.0, 66, -9.7, (0.7, 2.8, 3.4, 0.6))
WARDS = (
    "Medical Intensive Care Unit (MICU)",
    "Surgical Intensive Care Unit (SICU)",
    "Coronary Care Unit (CCU)",
    "Cardiac Vascular Intensive Care Unit (CVICU)",
    "Neuro Surgical Intensive Care Unit (Neuro SICU)",
    "Medical/Surgical Intensive Care Unit (MICU/SICU)",
)
EYE_WORDS = ("None", "To Pain", "To Speech", "Spontaneously")
VERBAL_WORDS = ("No Response", "Incomprehensible sounds", "Inappropriate Words", "Confused", "Oriented")
MOTOR_WORDS = (
    "No response",
    "Abnormal extension",
    "Abnormal Flexion",
    "Flex-withdraws",
    "Localizes Pain",
    "Obeys Commands",
)
# itemid, label, table, category, unit, type; the charted unit of an item is written here and nowhere else
ITEMS: tuple[tuple[int, str, str, str, str | None, str], ...] = (
    (220045, "Heart Rate", "chartevents", "Routine Vital Signs", "bpm", "Numeric"),
    (220050, "Arterial Blood Pressure systolic", "chartevents", "Routine Vital Signs", "mmHg", "Numeric"),
    (220051, "Arterial Blood Pressure diastolic", "chartevents", "Routine Vital Signs", "mmHg", "Numeric"),
    (220052, "Arterial Blood Pressure mean", "chartevents", "Routine Vital Signs", "mmHg", "Numeric"),
    (220179, "Non Invasive Blood Pressure systolic", "chartevents", "Routine Vital Signs", "mmHg", "Numeric"),
    (220180, "Non Invasive Blood Pressure diastolic", "chartevents", "Routine Vital Signs", "mmHg", "Numeric"),
    (220181, "Non Invasive Blood Pressure mean", "chartevents", "Routine Vital Signs", "mmHg", "Numeric"),
    (220210, "Respiratory Rate", "chartevents", "Respiratory", "insp/min", "Numeric"),
    (220277, "O2 saturation pulseoxymetry", "chartevents", "Respiratory", "%", "Numeric"),
    (223761, "Temperature Fahrenheit", "chartevents", "Routine Vital Signs", "°F", "Numeric"),
    (223762, "Temperature Celsius", "chartevents", "Routine Vital Signs", "°C", "Numeric"),
    (220739, "GCS - Eye Opening", "chartevents", "Neurological", None, "Text"),
    (223900, "GCS - Verbal Response", "chartevents", "Neurological", None, "Text"),
    (223901, "GCS - Motor Response", "chartevents", "Neurological", None, "Text"),
    (223835, "Inspired O2 Fraction", "chartevents", "Respiratory", None, "Numeric"),
    (220339, "PEEP set", "chartevents", "Respiratory", "cmH2O", "Numeric"),
    (223849, "Ventilator Mode", "chartevents", "Respiratory", None, "Text"),
    (226732, "O2 Delivery Device(s)", "chartevents", "Respiratory", None, "Text"),
    (223834, "O2 Flow", "chartevents", "Respiratory", "L/min", "Numeric"),
    (226512, "Admission Weight (Kg)", "chartevents", "General", "kg", "Numeric"),
    (224639, "Daily Weight", "chartevents", "General", "kg", "Numeric"),
    (226730, "Height (cm)", "chartevents", "General", "cm", "Numeric"),
    (220621, "Glucose (serum)", "chartevents", "Labs", None, "Numeric"),
    (220046, "Heart rate Alarm - High", "chartevents", "Alarms", "bpm", "Numeric"),
    (220047, "Heart Rate Alarm - Low", "chartevents", "Alarms", "bpm", "Numeric"),
    (223751, "Non-Invasive Blood Pressure Alarm - High", "chartevents", "Alarms", "mmHg", "Numeric"),
    (220074, "Central Venous Pressure", "chartevents", "Hemodynamics", "mmHg", "Numeric"),
    (221906, "Norepinephrine", "inputevents", "Medications", "mg", "Solution"),
    (221289, "Epinephrine", "inputevents", "Medications", "mg", "Solution"),
    (221662, "Dopamine", "inputevents", "Medications", "mg", "Solution"),
    (221653, "Dobutamine", "inputevents", "Medications", "mg", "Solution"),
    (221749, "Phenylephrine", "inputevents", "Medications", "mg", "Solution"),
    (222315, "Vasopressin", "inputevents", "Medications", "units", "Solution"),
    (225158, "NaCl 0.9%", "inputevents", "Fluids/Intake", "mL", "Solution"),
    *((drug.itemid, drug.drug, "inputevents", "Antibiotics", "dose", "Solution") for drug in ANTIBIOTICS),
    (226559, "Foley", "outputevents", "Output", "mL", "Numeric"),
    (226560, "Void", "outputevents", "Output", "mL", "Numeric"),
    (225792, "Invasive Ventilation", "procedureevents", "2-Ventilation", None, "Processes"),
)
CHARTED_UNITS = {item: unit for item, _, _, _, unit, _ in ITEMS}
TUBES = {"gas": 0, "count": 2, "differential": 2, "coagulation": 3, "fibrinogen": 3}  # all others: 1, chemistry
IDLE_ITEMS = np.array([220046, 220047, 223751, 220074])  # charted, extracted by nobody


def write_items(hospitals: Hospitals, add: Add) -> None:
    """Add ``icu/d_items``, which depends on nobody.

    Args:
        hospitals: the habits of their hospitals.
        add: takes the next rows of a table.
    """
    columns = ("itemid", "label", "linksto", "category", "unitname", "param_type")
    add("icu/d_items", pl.DataFrame(list(ITEMS), schema=columns, orient="row").with_columns(abbreviation="label"))


def write_mimiciv(
    patients: Patients, hospitals: Hospitals, base: int, extra: int, rng: np.random.Generator, add: Add
) -> None:
    """Add the rows of some stays to every table.

    Args:
        patients: the simulated stays.
        hospitals: one, whose habits are those of this file.
        base: number of stays already written, from which the ids are counted.
        extra: further rows of chartevents, three quarters of them of items that nobody extracts.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    dates = Calendar(patients, base, rng)
    _admissions(patients, dates, add)
    _chartevents(patients, dates, rng, add)
    _labevents(patients, hospitals, dates, base, rng, add)
    orders = antibiotic_orders(patients, rng)
    write_inputevents(patients, dates, orders, rng, add)
    write_outputevents(patients, dates, rng, add)
    write_orders_and_cultures(patients, dates, orders, base, rng, add)
    for start in range(0, extra, 1_000_000):
        _extra_chartevents(patients, dates, min(1_000_000, extra - start), rng, add)


def _admissions(patients: Patients, dates: Calendar, add: Add) -> None:
    """icustays, admissions, patients and diagnoses_icd; nothing is written about the end of a stay that goes on."""
    p = patients.stays
    every = np.arange(len(p["age"]))
    outtime = _unless(p["present"], dates.when(every, p["icu_minutes"], grain=1))
    ward = pl.Series(WARDS).gather(p["unit"])
    stays = {
        "first_careunit": ward,
        "last_careunit": ward,
        "intime": dates.when(every, 0 * every, grain=1),
        "outtime": outtime,
    }
    add(
        "icu/icustays",
        pl.DataFrame({**dates.ids(every), **stays, "los": _unless(p["present"], pl.Series(p["icu_minutes"] / 1440))}),
    )
    # one row per hospital admission: begins before its first stay, ends with its last
    last = np.flatnonzero(p["last_of_admission"])
    first = p["admission"][last]
    dies = p["hospital_death"][last]
    present = p["present"][last]
    left = _unless(present, dates.when(last, p["discharge_minute"][last], grain=1))
    admissions = pl.DataFrame(
        {
            **dates.ids(first, "subject", "hadm"),
            "admittime": dates.when(first, -p["before_minute"][first]),
            "dischtime": left,
            "deathtime": _unless(~dies, left),
            "discharge_location": _unless(present, pl.Series(np.where(dies, "DIED", "HOME"))),
            "hospital_expire_flag": _unless(present, pl.Series(dies.astype(np.int8))),
        }
    )
    constant = {
        "admission_type": "EW EMER.",
        "admission_location": "EMERGENCY ROOM",
        "insurance": "Medicare",
        "language": "ENGLISH",
    }
    add(
        "hosp/admissions",
        admissions.with_columns(pl.lit(v).alias(k) for k, v in constant.items()).with_columns(race=pl.lit("UNKNOWN")),
    )
    diagnosis = np.where(
        p["infected"][last], "A419", np.array(["J9600", "K922", "I214", "I2510", "I639", "I509"])[p["unit"][last]]
    )
    coded = pl.DataFrame({**dates.ids(first, "subject", "hadm"), "icd_code": diagnosis})
    add("hosp/diagnoses_icd", coded.with_columns(seq_num=pl.lit(1), icd_version=pl.lit(10)))
    # one row per patient, at the first stay; dod from the last
    one = np.flatnonzero(p["first"] == every)
    final = np.append(one[1:], len(every)) - 1
    years = dates.when(one, 0 * one).str.slice(0, 4)
    dod = _unless(~p["hospital_death"][final], dates.when(final, p["discharge_minute"][final]).str.slice(0, 10))
    patients_table = pl.DataFrame(
        {
            **dates.ids(one, "subject"),
            "gender": np.where(p["male"][one], "M", "F"),
            "anchor_age": np.where(p["age"][one] > 89, 91, p["age"][one]).astype(np.int64),
            "anchor_year": years,
            "dod": dod,
        }
    )
    add("hosp/patients", patients_table.with_columns(anchor_year_group=pl.lit("2011 - 2013")))


def _unless(empty: NDArray, values: pl.Series) -> pl.Series:
    """The values, null where ``empty``."""
    return pl.select(pl.when(pl.Series(~empty)).then(values)).to_series()


def _chartevents(patients: Patients, dates: Calendar, rng: np.random.Generator, add: Add) -> None:
    """chartevents: vital signs by the hour, consciousness and ventilation every four hours, weight once a day.

    What a nurse charts in one round is stored together, later: see ``charting_delay``.
    """
    p, h = patients.stays, patients.hours
    stay, hour, size = h["stay"], h["hour"], len(h["stay"])
    minute = hour * 60 + dates.pad[stay]
    charted = ~p["silent"][stay] & (minute <= p["icu_minutes"][stay])
    fourth = charted & (hour % 4 == 0)
    line = charted & (p["catheter"][stay] | (h["dose"] > 0))
    cuff = charted & (~line | (hour % 4 == 1))
    vent = h["vent"] > 0
    celsius = rng.random(len(p["age"]))[stay] < 0.08
    oxygen = ~vent & (h["fio2"] > 0.21)
    delay = charting_delay(size, rng.spawn(1)[0])
    events = []

    def chart(item: int, where: NDArray, values: NDArray, decimals: int, share: float = 0.97) -> None:
        at = np.flatnonzero(where & (rng.random(size) < share))
        fields = {"itemid": item, "delay": delay[at]}
        events.append(Event(stay[at], minute[at], as_text(spoil(values[at], rng), decimals), fields))

    def note(item: int, where: NDArray, words: tuple[str, ...], which: NDArray, score: bool = False) -> None:
        at = np.flatnonzero(where & (rng.random(size) < 0.95))
        fields: dict[str, Any] = {"itemid": item, "delay": delay[at]}
        if score:
            fields["valuenum"] = as_text(np.minimum(which[at] + 1, 6.0), 0)
        events.append(Event(stay[at], minute[at], pl.Series(words).gather(which[at].astype(int)), fields))

    chart(220045, charted, h["heart_rate"], 0)
    chart(220210, charted, h["respiration"], 0)
    chart(220277, charted, h["spo2"], 0)
    for items, where in (((220050, 220051, 220052), line), ((220179, 220180, 220181), cuff)):
        for item, name in zip(items, ("systolic", "diastolic", "map_read"), strict=True):
            chart(item, where, h[name] + (0 if where is line else rng.normal(0, 3, size)), 0)
    chart(223761, fourth & ~celsius, h["temperature"] * 1.8 + 32, 1)
    chart(223762, fourth & celsius, h["temperature"], 1)
    chart(223835, fourth & (vent | (oxygen & (h["fio2"] >= 0.4))), h["fio2"] * 100, 0)
    chart(220339, fourth & vent, h["peep"], 0)
    chart(223834, fourth & oxygen, np.clip((h["fio2"] - 0.21) * 25, 1, 15), 0)
    chart(220621, fourth & (hour % 8 == 0), h["glucose"], 0, 0.6)
    chart(226512, charted & (hour == 0), h["weight"], 1, 0.96)
    chart(226730, charted & (hour == 0), p["height"][stay], 0, 0.6)
    chart(224639, charted & (hour % 24 == 6), h["weight"], 1, 0.6)
    note(220739, fourth, EYE_WORDS, h["eyes"] - 1, score=True)
    note(223900, fourth & ~vent, VERBAL_WORDS, h["verbal"] - 1, score=True)
    note(223900, fourth & vent, ("No Response-ETT",), 0 * stay, score=True)
    note(223901, fourth, MOTOR_WORDS, h["motor"] - 1, score=True)
    note(223849, fourth & vent, ("CMV/ASSIST/AutoFlow", "CPAP/PSV"), (h["fio2"] < 0.5).astype(int))
    note(226732, fourth, ("None", "Nasal cannula", "High flow nasal cannula", "Endotracheal tube"), h["support"])
    _add_chartevents(twice(stack(events), rng), dates, add)


def _add_chartevents(rows: pl.DataFrame, dates: Calendar, add: Add) -> None:
    stay, minute = rows["stay"].to_numpy(), rows["minute"].to_numpy()
    number = pl.col("valuenum") if "valuenum" in rows.columns else pl.lit(None, pl.String)
    unit = pl.col("itemid").replace_strict(CHARTED_UNITS, return_dtype=pl.String)
    worded = pl.col("itemid").is_in([223849, 226732])
    rows = rows.with_columns(
        valuenum=pl.when(~worded).then(pl.coalesce(number, "value")),
        valueuom=unit,
        charttime=dates.when(stay, minute),
        storetime=dates.when(stay, minute + rows["delay"].to_numpy()),
        warning=pl.lit("0"),
    )
    add("icu/chartevents", rows.with_columns(**dates.ids(stay)))


def _extra_chartevents(patients: Patients, dates: Calendar, count: int, rng: np.random.Generator, add: Add) -> None:
    """Rows for benchmarks: alarms and the like of random hours, one quarter heart rates of the patient."""
    h = patients.hours
    charted = np.flatnonzero(~patients.stays["silent"][h["stay"]])
    at = np.sort(charted[rng.integers(0, len(charted), count)])
    real = rng.random(count) < 0.25
    item = np.where(real, 220045, IDLE_ITEMS[rng.integers(0, len(IDLE_ITEMS), count)])
    words = pl.Series([str(n) for n in range(301)])
    value = words.gather(np.clip(np.where(real, h["heart_rate"][at], rng.integers(1, 160, count)), 0, 300).astype(int))
    rows = pl.DataFrame(
        {
            "stay": h["stay"][at].astype(np.int64),
            "minute": h["hour"][at] * 60 + rng.integers(1, 60, count),
            "itemid": item,
            "delay": charting_delay(count, rng),
        }
    )
    _add_chartevents(rows.with_columns(value=value), dates, add)


def _labevents(
    patients: Patients, hospitals: Hospitals, dates: Calendar, base: int, rng: np.random.Generator, add: Add
) -> None:
    """labevents: values of one draw share a specimen_id; a blood gas carries its kind of blood (52033).

    Results are stored later than the draw: see ``laboratory_delay``.
    """
    h, count = patients.hours, len(patients.stays["age"])
    values = lab_values(patients, hospitals)
    panels = panel_draws(patients, rng, np.ones(count))
    drawn = draw_minutes(patients, rng)
    delay = laboratory_delay(len(drawn), rng.spawn(1)[0])
    events = []

    def result(panel: str, at: NDArray, value: pl.Series, item: int, unit: str | None) -> None:
        # values of one tube of one hour belong to one specimen
        specimen = base * 4000 + at.astype(np.int64) * 4 + TUBES.get(panel.split("_")[0], 1)
        fields = {"itemid": item, "specimen_id": specimen, "valueuom": unit, "delay": delay[at]}
        events.append(Event(h["stay"][at], drawn[at], value, fields))

    for lab in LAB_CATALOGUE:
        at = panels[lab.panel]
        number = as_text(spoil(values[lab.name][at], rng, 0.0005), lab.decimals)
        result(lab.panel, at, number, lab.itemid, lab.unit or None)
    at = panels["gas"]
    blood = pl.Series(("ART.", "VEN.")).gather((rng.random(len(at)) < 0.15).astype(int))
    result("gas", at, blood, 52033, None)
    rows = twice(stack(events), rng, 0.001)
    stay, minute = rows["stay"].to_numpy(), rows["minute"].to_numpy()
    time = dates.when(stay, minute)
    unlinked = pl.Series(rng.random(rows.height) < 0.02)
    rows = rows.with_columns(**dates.ids(stay, "subject", "hadm"))
    rows = rows.with_columns(
        labevent_id=base * 4000 + np.arange(rows.height),
        hadm_id=pl.when(~unlinked).then("hadm_id"),
        charttime=time,
        storetime=dates.when(stay, minute + rows["delay"].to_numpy()),
        valuenum=pl.when(pl.col("itemid") != 52033).then("value"),
        priority=pl.lit("ROUTINE"),
    )
    add("hosp/labevents", rows)
