"""Simulated patients -> MIMIC-IV-shaped tables: the publisher's columns, item ids, texts, units and shifted dates. No real data."""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.synthetic_patient import Patients
from datamodules.synthetic_tables import (
    ANTIBIOTICS,
    LABS,
    Add,
    Event,
    Orders,
    antibiotics,
    cultures,
    draws,
    runs,
    spoil,
    stack,
    text,
    twice,
)

WARDS = (
    "Medical Intensive Care Unit (MICU)",
    "Surgical Intensive Care Unit (SICU)",
    "Coronary Care Unit (CCU)",
    "Cardiac Vascular Intensive Care Unit (CVICU)",
    "Neuro Surgical Intensive Care Unit (Neuro SICU)",
    "Medical/Surgical Intensive Care Unit (MICU/SICU)",
)
EYES = ("None", "To Pain", "To Speech", "Spontaneously")
VERBAL = ("No Response", "Incomprehensible sounds", "Inappropriate Words", "Confused", "Oriented")
MOTOR = ("No response", "Abnormal extension", "Abnormal Flexion", "Flex-withdraws", "Localizes Pain", "Obeys Commands")
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
UNITS = {item: unit for item, _, _, _, unit, _ in ITEMS}
IDLE = np.array([220046, 220047, 223751, 220074])  # charted, extracted by nobody
DRIPS = (  # drug, item, step of the pump
    ("norepinephrine", 221906, 0.01),
    ("epinephrine", 221289, 0.01),
    ("dopamine", 221662, 1.0),
    ("dobutamine", 221653, 1.0),
    ("phenylephrine", 221749, 0.1),
    ("vasopressin", 222315, 0.6),
)
SPECIMENS = (  # specimen item and name, test item and name
    (70012, "BLOOD CULTURE", 90201, "Blood Culture, Routine"),
    (70079, "URINE", 90039, "URINE CULTURE"),
    (70062, "SPUTUM", 90055, "RESPIRATORY CULTURE"),
    (70091, "MRSA SCREEN", 90189, "MRSA SCREEN"),
)
ORGANISMS = (
    (80002, "ESCHERICHIA COLI"),
    (80023, "STAPH AUREUS COAG +"),
    (80004, "KLEBSIELLA PNEUMONIAE"),
    (80026, "PSEUDOMONAS AERUGINOSA"),
    (80053, "ENTEROCOCCUS SP."),
)


class _Calendar:
    """Ids and shifted dates of some stays: every patient's first ICU admission lies between 2110 and 2190."""

    def __init__(self, patients: Patients, base: int, rng: np.random.Generator) -> None:
        p = patients.stays
        origin = rng.integers(4_418_064_000, 6_942_585_600, len(p["age"]))  # 2110 .. 2189, seconds since 1970
        self.seconds = origin[p["first"]] + p["since_minute"] * 60
        self.pad = -(-self.seconds // 3600) * 60 - self.seconds // 60  # minutes to the next full hour of the clock
        self.subject, self.hadm = 10_000_000 + base + p["first"], 20_000_000 + base + p["admission"]
        self.stay = 30_000_000 + base + np.arange(len(p["age"]))

    def when(self, stay: NDArray, minute: NDArray, grain: int = 60) -> pl.Series:
        """Minute since ICU admission -> "YYYY-MM-DD HH:MM:SS", on the full minute as staff writes it (``grain`` seconds)."""
        return (
            pl.Series((self.seconds[stay] + minute * 60) // grain * grain * 1000).cast(pl.Datetime("ms")).dt.to_string("%Y-%m-%d %H:%M:%S")
        )

    def ids(self, stay: NDArray, *names: str) -> dict[str, NDArray]:
        return {f"{name}_id": getattr(self, name)[stay] for name in names or ("subject", "hadm", "stay")}


def write_constant(add: Add) -> None:
    """The tables that do not depend on the patients."""
    columns = ("itemid", "label", "linksto", "category", "unitname", "param_type")
    add("icu/d_items", pl.DataFrame(list(ITEMS), schema=columns, orient="row").with_columns(abbreviation="label"))


def write_chunk(patients: Patients, base: int, extra: int, rng: np.random.Generator, add: Add) -> None:
    """Add the rows of some stays to every table.

    Args:
        patients: the simulated stays.
        base: number of stays already written, from which the ids are counted.
        extra: further rows of chartevents, three quarters of them of items that nobody extracts.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    dates = _Calendar(patients, base, rng)
    _people(patients, dates, add)
    _chart(patients, dates, rng, add)
    _labs(patients, dates, base, rng, add)
    orders = antibiotics(patients, rng)
    _inputs(patients, dates, orders, rng, add)
    _outputs(patients, dates, rng, add)
    _infection(patients, dates, orders, base, rng, add)
    for start in range(0, extra, 1_000_000):
        _extra(patients, dates, min(1_000_000, extra - start), rng, add)


def _people(patients: Patients, dates: _Calendar, add: Add) -> None:
    p = patients.stays
    every = np.arange(len(p["age"]))
    outtime = dates.when(every, p["icu_minutes"], grain=1)
    ward = pl.Series(WARDS).gather(p["unit"])
    stays = {"first_careunit": ward, "last_careunit": ward, "intime": dates.when(every, 0 * every, grain=1), "outtime": outtime}
    add("icu/icustays", pl.DataFrame({**dates.ids(every), **stays, "los": p["icu_minutes"] / 1440}))
    # one row per hospital admission: begins before its first stay, ends with its last
    last = np.flatnonzero(p["last_of_admission"])
    first = p["admission"][last]
    dies = p["hospital_death"][last]
    left = dates.when(last, p["discharge_minute"][last], grain=1)
    admissions = pl.DataFrame(
        {
            **dates.ids(first, "subject", "hadm"),
            "admittime": dates.when(first, -p["before_minute"][first]),
            "dischtime": left,
            "deathtime": pl.DataFrame({"t": left, "d": dies}).select(pl.when("d").then("t")).to_series(),
            "discharge_location": np.where(dies, "DIED", "HOME"),
            "hospital_expire_flag": dies.astype(np.int8),
        }
    )
    constant = {"admission_type": "EW EMER.", "admission_location": "EMERGENCY ROOM", "insurance": "Medicare", "language": "ENGLISH"}
    add("hosp/admissions", admissions.with_columns(pl.lit(v).alias(k) for k, v in constant.items()).with_columns(race=pl.lit("UNKNOWN")))
    diagnosis = np.where(p["infected"][last], "A419", np.array(["J9600", "K922", "I214", "I2510", "I639", "I509"])[p["unit"][last]])
    coded = pl.DataFrame({**dates.ids(first, "subject", "hadm"), "icd_code": diagnosis})
    add("hosp/diagnoses_icd", coded.with_columns(seq_num=pl.lit(1), icd_version=pl.lit(10)))
    # one row per patient, at the first stay; dod from the last
    one = np.flatnonzero(p["first"] == every)
    final = np.append(one[1:], len(every)) - 1
    years = dates.when(one, 0 * one).str.slice(0, 4)
    dod = pl.DataFrame({"t": dates.when(final, p["discharge_minute"][final]).str.slice(0, 10), "d": p["hospital_death"][final]})
    patients_table = pl.DataFrame(
        {
            **dates.ids(one, "subject"),
            "gender": np.where(p["male"][one], "M", "F"),
            "anchor_age": np.where(p["age"][one] > 89, 91, p["age"][one]).astype(np.int64),
            "anchor_year": years,
            "dod": dod.select(pl.when("d").then("t")).to_series(),
        }
    )
    add("hosp/patients", patients_table.with_columns(anchor_year_group=pl.lit("2011 - 2013")))


def _chart(patients: Patients, dates: _Calendar, rng: np.random.Generator, add: Add) -> None:
    """chartevents: vital signs by the hour, consciousness and ventilation every four hours, weight once a day."""
    p, h = patients.stays, patients.hours
    stay, hour, size = h["stay"], h["hour"], len(h["stay"])
    minute = hour * 60 + dates.pad[stay]
    seen = ~p["silent"][stay] & (minute <= p["icu_minutes"][stay])
    fourth = seen & (hour % 4 == 0)
    line = seen & (p["catheter"][stay] | (h["dose"] > 0))
    cuff = seen & (~line | (hour % 4 == 1))
    vent = h["vent"] > 0
    celsius = rng.random(len(p["age"]))[stay] < 0.08
    oxygen = ~vent & (h["fio2"] > 0.21)
    events = []

    def chart(item: int, where: NDArray, values: NDArray, decimals: int, share: float = 0.97) -> None:
        at = np.flatnonzero(where & (rng.random(size) < share))
        events.append(Event(stay[at], minute[at], text(spoil(values[at], rng), decimals), {"itemid": item}))

    def note(item: int, where: NDArray, words: tuple[str, ...], which: NDArray, score: bool = False) -> None:
        at = np.flatnonzero(where & (rng.random(size) < 0.95))
        events.append(Event(stay[at], minute[at], pl.Series(words).gather(which[at].astype(int)), {"itemid": item}))
        if score:
            events[-1].fields["valuenum"] = text(np.minimum(which[at] + 1, 6.0), 0)

    chart(220045, seen, h["heart_rate"], 0)
    chart(220210, seen, h["respiration"], 0)
    chart(220277, seen, h["spo2"], 0)
    for items, where in (((220050, 220051, 220052), line), ((220179, 220180, 220181), cuff)):
        for item, name in zip(items, ("systolic", "diastolic", "map_read"), strict=True):
            chart(item, where, h[name] + (0 if where is line else rng.normal(0, 3, size)), 0)
    chart(223761, fourth & ~celsius, h["temperature"] * 1.8 + 32, 1)
    chart(223762, fourth & celsius, h["temperature"], 1)
    chart(223835, fourth & (vent | (oxygen & (h["fio2"] >= 0.4))), h["fio2"] * 100, 0)
    chart(220339, fourth & vent, h["peep"], 0)
    chart(223834, fourth & oxygen, np.clip((h["fio2"] - 0.21) * 25, 1, 15), 0)
    chart(220621, fourth & (hour % 8 == 0), h["glucose"], 0, 0.6)
    chart(226512, seen & (hour == 0), p["weight"][stay], 1, 0.96)
    chart(226730, seen & (hour == 0), p["height"][stay], 0, 0.6)
    chart(224639, seen & (hour % 24 == 6), p["weight"][stay] + 0.03 * hour, 1, 0.6)
    note(220739, fourth, EYES, h["eyes"] - 1, score=True)
    note(223900, fourth & ~vent, VERBAL, h["verbal"] - 1, score=True)
    note(223900, fourth & vent, ("No Response-ETT",), 0 * stay, score=True)
    note(223901, fourth, MOTOR, h["motor"] - 1, score=True)
    note(223849, fourth & vent, ("CMV/ASSIST/AutoFlow", "CPAP/PSV"), (h["fio2"] < 0.5).astype(int))
    device = np.where(vent, 3, np.digitize(h["fio2"], (0.22, 0.45)))
    note(226732, fourth, ("None", "Nasal cannula", "High flow nasal cannula", "Endotracheal tube"), device)
    _add_chart(twice(stack(events), rng), dates, add)


def _add_chart(rows: pl.DataFrame, dates: _Calendar, add: Add) -> None:
    stay = rows["stay"].to_numpy()
    time = dates.when(stay, rows["minute"].to_numpy())
    number = pl.col("valuenum") if "valuenum" in rows.columns else pl.lit(None, pl.String)
    unit = pl.col("itemid").replace_strict(UNITS, return_dtype=pl.String)
    worded = pl.col("itemid").is_in([223849, 226732])
    rows = rows.with_columns(
        valuenum=pl.when(~worded).then(pl.coalesce(number, "value")), valueuom=unit, charttime=time, storetime=time, warning=pl.lit("0")
    )
    add("icu/chartevents", rows.with_columns(**dates.ids(stay)))


def _extra(patients: Patients, dates: _Calendar, count: int, rng: np.random.Generator, add: Add) -> None:
    """Rows for benchmarks: alarms and the like of random hours, and one quarter heart rates that agree with the patient's own."""
    h = patients.hours
    heard = np.flatnonzero(~patients.stays["silent"][h["stay"]])
    at = np.sort(heard[rng.integers(0, len(heard), count)])
    real = rng.random(count) < 0.25
    item = np.where(real, 220045, IDLE[rng.integers(0, len(IDLE), count)])
    words = pl.Series([str(n) for n in range(301)])
    value = words.gather(np.clip(np.where(real, h["heart_rate"][at], rng.integers(1, 160, count)), 0, 300).astype(int))
    rows = pl.DataFrame({"stay": h["stay"][at].astype(np.int64), "minute": h["hour"][at] * 60 + rng.integers(0, 60, count), "itemid": item})
    _add_chart(rows.with_columns(value=value), dates, add)


def _labs(patients: Patients, dates: _Calendar, base: int, rng: np.random.Generator, add: Add) -> None:
    """labevents: values of one draw share a specimen_id; a blood gas carries its kind of blood (52033)."""
    h, count = patients.hours, len(patients.stays["age"])
    values = {**h, "fio2_percent": h["fio2"] * 100, "anion_gap": h["sodium"] - h["chloride"] - h["bicarbonate"]}
    panels = draws(patients, rng, np.ones(count))
    jitter = rng.integers(-50, 50, len(h["stay"]))
    tubes = {"gas": 0, "count": 2, "differential": 2, "coagulation": 3, "fibrinogen": 3}  # all others: 1, the chemistry tube
    events = []

    def tube(panel: str, at: NDArray) -> NDArray:  # values of one tube of one hour belong to one specimen
        return base * 4000 + at.astype(np.int64) * 4 + tubes.get(panel.split("_")[0], 1)

    for lab in LABS:
        at = panels[lab.panel]
        number = text(spoil(values[lab.name][at], rng, 0.0005), lab.decimals)
        extra = {"itemid": lab.itemid, "specimen_id": tube(lab.panel, at), "valueuom": lab.unit or None}
        events.append(Event(h["stay"][at], h["hour"][at] * 60 + jitter[at], number, extra))
    at = panels["gas"]
    blood = pl.Series(("ART.", "VEN.")).gather((rng.random(len(at)) < 0.15).astype(int))
    fields: dict[str, Any] = {"itemid": 52033, "specimen_id": tube("gas", at), "valueuom": None}
    events.append(Event(h["stay"][at], h["hour"][at] * 60 + jitter[at], blood, fields))
    rows = twice(stack(events), rng, 0.001)
    stay, minute = rows["stay"].to_numpy(), rows["minute"].to_numpy()
    time = dates.when(stay, minute)
    unlinked = pl.Series(rng.random(rows.height) < 0.02)
    rows = rows.with_columns(**dates.ids(stay, "subject", "hadm"))
    rows = rows.with_columns(
        labevent_id=base * 4000 + np.arange(rows.height),
        hadm_id=pl.when(~unlinked).then("hadm_id"),
        charttime=time,
        storetime=dates.when(stay, minute + 55),
        valuenum=pl.when(pl.col("itemid") != 52033).then("value"),
        priority=pl.lit("ROUTINE"),
    )
    add("hosp/labevents", rows)


def _inputs(patients: Patients, dates: _Calendar, orders: Orders, rng: np.random.Generator, add: Add) -> None:
    """inputevents: drips as intervals of constant rate, fluid boluses, antibiotic doses."""
    p, frames = patients.stays, []
    drip, bolus, dose = "01-Drips", "03-IV Fluid Bolus", "08-Antibiotics (IV)"

    def give(stay: NDArray, start: NDArray, end: NDArray, item: int, amount: NDArray, kind: str, **fields: Any) -> None:
        keep = (end > start) & ~p["silent"][stay]
        columns = {"stay": stay.astype(np.int64), "start": start.astype(np.int64), "end": end.astype(np.int64), "amount": amount}
        frame = pl.DataFrame({**columns, **{k: v for k, v in fields.items() if isinstance(v, np.ndarray)}})
        constant = {"itemid": item, "ordercategoryname": kind, **{k: v for k, v in fields.items() if isinstance(v, str)}}
        frames.append(frame.with_columns(pl.lit(v).alias(k) for k, v in constant.items()).filter(pl.Series(keep)))

    for drug, item, step in DRIPS:
        stay, first, after, rate = runs(patients, drug, step)
        start = np.minimum(first * 60 + dates.pad[stay], p["icu_minutes"][stay])
        end = np.minimum(after * 60 + dates.pad[stay], p["icu_minutes"][stay])
        weight = p["weight"][stay]
        if drug == "vasopressin":
            give(stay, start, end, item, rate * (end - start) / 60, drip, rate=rate, rateuom="units/hour", amountuom="units")
            continue
        amount = rate * weight * (end - start) / 1000
        absolute = drug == "phenylephrine" and rng.random() < 0.3  # charted per minute, not per kg
        rateuom = "mcg/min" if absolute else "mcg/kg/min"
        give(stay, start, end, item, amount, drip, rate=rate * weight if absolute else rate, rateuom=rateuom, amountuom="mg")
    low = np.flatnonzero((patients.hours["map"] < 62) & (rng.random(len(patients.hours["map"])) < 0.15))
    stay, start = patients.hours["stay"][low], patients.hours["hour"][low] * 60
    give(
        stay, start, start + 30, 225158, np.full(len(low), 500.0), bolus, rate=np.full(len(low), 1000.0), rateuom="mL/hour", amountuom="ml"
    )
    stay, drug_index, begin, stop = orders
    for index, drug_row in enumerate(ANTIBIOTICS):
        for hours in range(0, 216, 8 if index == 1 else 12):
            at = begin + 60 * hours
            due = (drug_index == index) & (at < stop) & (at >= 0) & (at < p["icu_minutes"][stay])
            give(stay[due], at[due], at[due] + 1, drug_row.itemid, np.ones(due.sum()), dose, amountuom="dose")
    rows = twice(pl.concat(frames, how="diagonal").sort("stay", "start", maintain_order=True), rng)
    stay = rows["stay"].to_numpy()
    rows = rows.with_columns(
        **dates.ids(stay),
        starttime=dates.when(stay, rows["start"].to_numpy()),
        endtime=dates.when(stay, rows["end"].to_numpy()),
        storetime=dates.when(stay, rows["start"].to_numpy()),
        orderid=(dates.stay[stay] % 10_000_000) * 10_000 + np.arange(rows.height) % 10_000,
        patientweight=p["weight"][stay],
    )
    rows = rows.with_columns(
        linkorderid="orderid",
        originalamount="amount",
        originalrate="rate",
        ordercomponenttypedescription=pl.lit("Main order parameter"),
        ordercategorydescription=pl.lit("Continuous Med"),
        statusdescription=pl.lit("FinishedRunning"),
    )
    add("icu/inputevents", rows)


def _outputs(patients: Patients, dates: _Calendar, rng: np.random.Generator, add: Add) -> None:
    """outputevents and procedureevents: urine by the hour (catheter) or every four (void), intervals of invasive ventilation."""
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    minute = hour * 60 + dates.pad[stay]
    foley = p["foley"][stay]
    at = np.flatnonzero(~p["silent"][stay] & (minute <= p["icu_minutes"][stay]) & (foley | (hour % 4 == 3)))
    total = np.cumsum(h["urine"])
    four = total - np.where(np.arange(len(stay)) >= 4, np.roll(total, 4), 0)
    volume = np.where(foley, h["urine"], four)[at]
    events = Event(stay[at], minute[at], text(spoil(volume, rng), 0), {"itemid": np.where(foley[at], 226559, 226560), "valueuom": "mL"})
    rows = twice(stack([events]), rng)
    index = rows["stay"].to_numpy()
    time = dates.when(index, rows["minute"].to_numpy())
    add("icu/outputevents", rows.with_columns(**dates.ids(index), charttime=time, storetime=time))
    index, first, after, _ = runs(patients, "vent", 1.0)
    start, end = first * 60, np.minimum(after * 60, p["icu_minutes"][index])
    times = {"starttime": dates.when(index, start), "endtime": dates.when(index, end), "storetime": dates.when(index, end)}
    frame = pl.DataFrame({**dates.ids(index), **times, "value": end - start, "patientweight": p["weight"][index]})
    constant = {"itemid": 225792, "valueuom": "min", "ordercategoryname": "Ventilation", "statusdescription": "FinishedRunning"}
    add("icu/procedureevents", frame.with_columns(pl.lit(v).alias(k) for k, v in constant.items()))


def _infection(patients: Patients, dates: _Calendar, orders: Orders, base: int, rng: np.random.Generator, add: Add) -> None:
    """prescriptions (antibiotics, and drugs that must not be taken for them) and microbiologyevents."""
    count = len(patients.stays["age"])
    stay, drug, start, stop = orders
    route, kind = np.full(len(stay), "IV"), np.full(len(stay), "MAIN")
    names = np.array([a.drug for a in ANTIBIOTICS])[drug]
    decoys = (("Heparin", "SC", "MAIN"), ("0.9% Sodium Chloride", "IV", "BASE"), ("Erythromycin 0.5% Ophth Oint", "OU", "MAIN"))
    for name, way, sort in decoys:
        also = np.flatnonzero(rng.random(count) < (0.02 if way == "OU" else 0.5))
        stay, start, stop = np.append(stay, also), np.append(start, 0 * also), np.append(stop, 0 * also + 2880)
        names, route = np.append(names, np.full(len(also), name)), np.append(route, np.full(len(also), way))
        kind = np.append(kind, np.full(len(also), sort))
    times = {"starttime": dates.when(stay, start, grain=3600), "stoptime": dates.when(stay, stop, grain=3600)}
    frame = pl.DataFrame({**dates.ids(stay, "subject", "hadm"), **times, "drug_type": kind, "drug": names, "route": route})
    add("hosp/prescriptions", frame.with_columns(pharmacy_id=base * 20 + np.arange(len(stay)) + 40_000_000))

    stay, minute, specimen, organism = cultures(patients, rng)
    time = dates.when(stay, minute)
    where = pl.Series(specimen)
    named = np.where(organism >= 0, organism, len(ORGANISMS))
    day = time.str.slice(0, 10) + " 00:00:00"
    frame = pl.DataFrame(
        {
            **dates.ids(stay, "subject", "hadm"),
            "microevent_id": base * 10 + np.arange(len(stay)),
            "micro_specimen_id": 5_000_000 + base * 10 + np.arange(len(stay)),
            "chartdate": day,
            "charttime": pl.DataFrame({"t": time, "k": rng.random(len(stay)) > 0.034}).select(pl.when("k").then("t")).to_series(),
            "spec_itemid": pl.Series([s[0] for s in SPECIMENS]).gather(where),
            "spec_type_desc": pl.Series([s[1] for s in SPECIMENS]).gather(where),
            "test_itemid": pl.Series([s[2] for s in SPECIMENS]).gather(where),
            "test_name": pl.Series([s[3] for s in SPECIMENS]).gather(where),
            "org_itemid": pl.Series([*(o[0] for o in ORGANISMS), None]).gather(named),
            "org_name": pl.Series([*(o[1] for o in ORGANISMS), None]).gather(named),
        }
    )
    add("hosp/microbiologyevents", frame.with_columns(test_seq=pl.lit(1), storedate=pl.col("chartdate"), storetime=pl.col("chartdate")))
