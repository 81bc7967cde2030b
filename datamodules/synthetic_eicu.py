"""Simulated patients -> eICU-shaped tables of many unequal hospitals: the publisher's columns, names, units and gaps. No real data.

A hospital has habits (``Hospitals``): how densely it charts, the unit of its infusion pumps, offsets of its laboratory, and which
tables it fills at all. So "no infusionDrug row" means "no pressor" in one hospital and nothing in another, as in the real database.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.synthetic_patient import SYSTEMS, Patients
from datamodules.synthetic_tables import (
    ANTIBIOTICS,
    EICU,
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

UNIT_TYPES = ("MICU", "SICU", "Cardiac ICU", "CSICU", "Neuro ICU", "Med-Surg ICU")
SEPSIS = ("Sepsis, pulmonary", "Sepsis, renal/UTI (including bladder)", "Sepsis, GI", "Sepsis, unknown", "Pneumonia, bacterial")
OTHER = (
    "Emphysema/bronchitis",
    "Bleeding, upper GI",
    "Infarction, acute myocardial (MI)",
    "CABG alone, coronary artery bypass grafting",
    "CVA, cerebrovascular accident/stroke",
    "CHF, congestive heart failure",
)
URINE = ("Urine", "URINE CATHETER", "Urinary Catheter Output: Indwelling/Continuous Ure")
SITES = ("Blood, Venipuncture", "Urine, Catheter Specimen", "Sputum, Tracheal Specimen", "Nasopharynx")
ORGANISMS = (
    "Escherichia coli",
    "Staphylococcus aureus",
    "Klebsiella pneumoniae",
    "Pseudomonas aeruginosa",
    "Enterococcus faecalis",
    "no growth",
)
PUMP_UNITS = ("mcg/min", "ml/hr", "", "mcg/kg/min")
# drug, name, step, mcg per mL (vasopressin: units per mL), HICL code of an order
DRIPS: tuple[tuple[str, str, float, float, int], ...] = (
    ("norepinephrine", "Norepinephrine", 0.01, 32, 2051),
    ("epinephrine", "Epinephrine", 0.01, 40, 2050),
    ("dopamine", "Dopamine", 1.0, 1600, 2060),
    ("dobutamine", "Dobutamine", 1.0, 2000, 8777),
    ("phenylephrine", "Phenylephrine", 0.1, 200, 2087),
    ("vasopressin", "Vasopressin", 0.6, 0.4, 2839),
)
LAB_TYPES = {"gas": 7, "count": 3, "differential": 3, "coagulation": 3, "fibrinogen": 3}  # all others: 1, chemistry
ALARMS = ("Pain Score", "Bed Position", "Safety Check", "Braden Score")  # charted, extracted by nobody


class Hospitals:
    """The habits of the simulated hospitals, one entry each."""

    def __init__(self, rng: np.random.Generator) -> None:
        world = SYSTEMS["EICU"]
        count = world.hospitals
        self.id = 100 + 7 * np.arange(count)
        self.density = rng.uniform(0.45, 1.0, count)  # of vital signs and of draws beyond the daily one
        self.pump = rng.choice(len(PUMP_UNITS), count, p=(0.46, 0.40, 0.09, 0.05))
        self.strong = rng.random(count) < 0.15  # pumps in mL/h are filled with twice the usual concentration
        self.fills = {  # does the hospital fill the table at all?
            table: rng.random(count) < share
            for table, share in (("infusionDrug", 0.68), ("medication", 0.78), ("intakeOutput", 0.88), ("microLab", 0.1), ("nurse", 0.85))
        }
        self.fills["infusionDrug"][:2] = self.fills["medication"][:2] = True  # the two largest fill them
        self.urine_every = rng.choice((1, 2, 4, 6), count, p=(0.3, 0.3, 0.25, 0.15))
        self.urine_cell = rng.choice(len(URINE), count, p=(0.8, 0.12, 0.08))
        self.named = rng.uniform(0.2, 1.0, count)  # share of orders whose drug is named, not only coded
        self.fraction = rng.random(count) < 0.1  # oxygen as 0.4 instead of 40
        self.fahrenheit = rng.random(count) < 0.2
        self.assay = {lab.name: np.exp(rng.normal(0, 0.06 * world.offset, count)) for lab in LABS}
        for name in ("lactate", "creatinine", "bilirubin", "troponin_t", "crp", "bun"):
            self.assay[name] = np.exp(rng.normal(0, 0.2 * world.offset, count))
        for name in ("ph", "spo2", "sodium", "chloride"):  # well standardised
            self.assay[name] = np.ones(count)
        self.pressure = rng.normal(0, 5 * world.offset, count)  # offset of the cuffs, mmHg

    def write(self, add: Add) -> None:
        """Add the table of hospitals."""
        index = np.arange(len(self.id))
        size = np.array([">= 500", "250 - 499", "100 - 249", "<100"])[np.minimum(index // 10, 3)]
        region = np.array(["Midwest", "South", "West", "Northeast"])[index % 4]
        teaching = np.where(index < 8, "t", "f")
        add("hospital", pl.DataFrame({"hospitalid": self.id, "numbedscategory": size, "teachingstatus": teaching, "region": region}))


class _Rows:
    """Adds rows with the id of their stay and a number of their own."""

    def __init__(self, base: int, add: Add) -> None:
        self.base, self.add, self.count = base, add, dict.fromkeys(EICU, 0)

    def put(self, table: str, stay: NDArray | pl.Series, frame: pl.DataFrame, **constant: Any) -> None:
        first = self.base * 50_000 + self.count[table]  # no table has so many rows per stay
        self.count[table] += frame.height
        ids = {EICU[table].split(",")[0]: first + np.arange(frame.height)}
        if table == "patient":
            ids = {}
        ids["patientunitstayid"] = 140_000 + self.base + np.asarray(stay, np.int64)
        self.add(table, frame.with_columns(**ids, **{k: pl.lit(v) for k, v in constant.items()}))


def write_chunk(patients: Patients, hospitals: Hospitals, base: int, extra: int, rng: np.random.Generator, add: Add) -> None:
    """Add the rows of some stays to every table.

    Args:
        patients: the simulated stays.
        hospitals: the habits of their hospitals.
        base: number of stays already written, from which the ids are counted.
        extra: further rows of nurseCharting, three quarters of them of items that nobody extracts.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    rows = _Rows(base, add)
    orders = antibiotics(patients, rng)
    _people(patients, hospitals, base, rng, rows)
    _monitor(patients, hospitals, rng, rows)
    _nurse(patients, hospitals, rng, rows)
    _labs(patients, hospitals, rng, rows)
    _breathing(patients, hospitals, rng, rows)
    _drips(patients, hospitals, rng, rows)
    _urine(patients, hospitals, rng, rows)
    _infection(patients, hospitals, orders, rng, rows)
    _day_one(patients, rng, rows)
    for start in range(0, extra, 1_000_000):
        _extra(patients, min(1_000_000, extra - start), rng, rows)


def _people(patients: Patients, hospitals: Hospitals, base: int, rng: np.random.Generator, rows: _Rows) -> None:
    """patient and admissionDx."""
    p = patients.stays
    count = len(p["age"])
    clock = rng.integers(0, 1440, count)

    def hand(minute: NDArray) -> pl.Series:
        of_day = pl.Series((clock + minute) % 1440)
        return pl.select((of_day // 60).cast(pl.String).str.zfill(2) + ":" + (of_day % 60).cast(pl.String).str.zfill(2) + ":00").to_series()

    # admission and hospital discharge are those of the whole hospital stay, seen from each of its ICU stays
    first, every = p["admission"], np.arange(count)
    final = np.flatnonzero(p["last_of_admission"])[np.cumsum(p["last_of_admission"]) - p["last_of_admission"]]
    admitted = p["since_minute"][first] - p["since_minute"] - p["before_minute"][first]
    discharged = p["since_minute"][final] - p["since_minute"] + p["discharge_minute"][final]
    dies = p["hospital_death"][final]
    septic = p["infected"] & (p["onset_minute"] < 600) & (rng.random(count) < 0.45)
    cause = np.where(septic, np.array(SEPSIS)[rng.integers(0, len(SEPSIS), count)], np.array(OTHER)[p["unit"]])
    cause = np.where(rng.random(count) < 0.1, "", cause)
    age = np.where(p["age"] >= 90, "> 89", p["age"].astype(int).astype(str))
    known = rng.random(count) > 0.01
    frame = pl.DataFrame(
        {
            "patienthealthsystemstayid": 120_000 + base + first,
            "gender": np.where(p["male"], "Male", "Female"),
            "age": np.where(rng.random(count) < 0.002, "", age),
            "hospitalid": hospitals.id[p["hospital"]],
            "wardid": hospitals.id[p["hospital"]] * 10 + p["unit"],
            "apacheadmissiondx": cause,
            "admissionheight": pl.Series(np.where(rng.random(count) < 0.02, np.nan, p["height"])).fill_nan(None),
            "hospitaladmittime24": hand(admitted),
            "hospitaladmitoffset": admitted,
            "hospitaldischargetime24": hand(discharged),
            "hospitaldischargeoffset": discharged,
            "hospitaldischargelocation": np.where(dies, "Death", "Home"),
            "hospitaldischargestatus": np.where(known, np.where(dies, "Expired", "Alive"), ""),
            "unittype": np.array(UNIT_TYPES)[p["unit"]],
            "unitadmittime24": hand(0 * every),
            "unitvisitnumber": p["visit"],
            "unitstaytype": np.where(p["visit"] > 1, "readmit", "admit"),
            "admissionweight": pl.Series(np.where(rng.random(count) < 0.03, np.nan, p["weight"])).fill_nan(None),
            "unitdischargetime24": hand(p["icu_minutes"]),
            "unitdischargeoffset": p["icu_minutes"],
            "unitdischargelocation": np.where(p["icu_death"], "Death", "Floor"),
            "unitdischargestatus": np.where(p["icu_death"], "Expired", "Alive"),
            "uniquepid": pl.select(pl.lit("002-") + pl.Series(10_000 + base + p["first"]).cast(pl.String)).to_series(),
        }
    )
    constant = {"ethnicity": "Other/Unknown", "hospitaladmitsource": "Emergency Department", "unitadmitsource": "Emergency Department"}
    rows.put("patient", every, frame, hospitaldischargeyear=2015, **constant)
    with_cause = np.flatnonzero((cause != "") & (rng.random(count) < 0.92))
    path = "admission diagnosis|All Diagnosis|Non-operative|Diagnosis|Cardiovascular|"
    named = pl.DataFrame({"admitdxname": cause[with_cause], "admitdxenteredoffset": rng.integers(5, 300, len(with_cause))})
    named = named.with_columns(admitdxpath=pl.lit(path) + pl.col("admitdxname"), admitdxtext="admitdxname")
    rows.put("admissionDx", with_cause, named)


def _monitor(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: _Rows) -> None:
    """vitalPeriodic (monitor, every 15 minutes, arterial pressure only with a catheter) and vitalAperiodic (cuff)."""
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    density, seen = hospitals.density[hospital], ~p["silent"][stay]
    line = (p["catheter"][stay] & (density > 0.7)) | (h["dose"] > 0.1)
    at = np.repeat(np.arange(len(stay)), 4)
    offset = hour[at] * 60 + np.tile(np.arange(4) * 15, len(stay)) + rng.integers(0, 15, len(p["age"]))[stay][at]
    keep = (seen[at]) & (rng.random(len(at)) < density[at]) & (offset <= p["icu_minutes"][stay[at]])
    at, offset = at[keep], offset[keep]
    jitter = rng.normal(0, 2, len(at))
    probe = (rng.random(len(p["age"])) < 0.12)[stay[at]]  # a temperature probe
    columns = {
        "temperature": (h["temperature"][at], 1, probe),
        "sao2": (np.minimum(h["spo2"][at] + jitter / 4, 100), 0, None),
        "heartrate": (h["heart_rate"][at] + jitter, 0, None),
        "respiration": (h["respiration"][at] + jitter / 2, 0, None),
        "systemicsystolic": (h["systolic"][at] + jitter, 0, line[at]),
        "systemicdiastolic": (h["diastolic"][at] + jitter, 0, line[at]),
        "systemicmean": (h["map_read"][at] + jitter, 0, line[at]),
    }
    frame = pl.DataFrame({"observationoffset": offset})
    for name, (values, decimals, where) in columns.items():
        missing = rng.random(len(at)) < 0.03
        charted = text(spoil(values, rng, 0.0005), decimals)
        frame = frame.with_columns(pl.when(pl.lit(pl.Series(~missing if where is None else where))).then(charted).alias(name))
    rows.put("vitalPeriodic", stay[at], frame)
    at = np.flatnonzero(seen & (rng.random(len(stay)) < np.where(line, 0.3, density)))
    offset = hour[at] * 60 + rng.integers(0, 60, len(at))
    shift = (hospitals.pressure[hospital] + rng.normal(0, 3, len(stay)))[at]
    cuff = {"observationoffset": offset}
    names = (("noninvasivesystolic", "systolic"), ("noninvasivediastolic", "diastolic"), ("noninvasivemean", "map_read"))
    frame = pl.DataFrame(cuff | {to: text(spoil(h[name][at] + shift, rng), 0) for to, name in names})
    frame = twice(frame.with_columns(stay=stay[at]), rng)
    rows.put("vitalAperiodic", frame["stay"], frame)


def _nurse(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: _Rows) -> None:
    """nurseCharting: GCS in two spellings, temperature, and the vital signs once more."""
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    seen = ~p["silent"][stay] & hospitals.fills["nurse"][hospital]
    chance = rng.random(len(stay)) < hospitals.density[hospital]
    fourth = seen & chance & (hour % 4 == 0)
    fahrenheit, value_only = hospitals.fahrenheit[hospital], hospital % 3 == 2
    minute = hour * 60 + rng.integers(0, 60, len(p["age"]))[stay]
    events = []

    def chart(where: NDArray, values: NDArray, decimals: int, kind: str, label: str, name: str) -> None:
        at = np.flatnonzero(where)
        fields = {"nursingchartcelltypecat": kind, "nursingchartcelltypevallabel": label, "nursingchartcelltypevalname": name}
        events.append(Event(stay[at], minute[at], text(spoil(values[at], rng), decimals), fields))

    total = h["eyes"] + h["verbal"] + h["motor"]
    for values, name in ((total, "GCS Total"), (h["eyes"], "Eyes"), (h["verbal"], "Verbal"), (h["motor"], "Motor")):
        chart(fourth & ~value_only, values, 0, "Scores", "Glasgow coma score", name)
    chart(fourth & value_only, total, 0, "Scores", "Score (Glasgow Coma Scale)", "Value")
    chart(fourth & ~fahrenheit, h["temperature"], 1, "Vital Signs", "Temperature", "Temperature (C)")
    chart(fourth & fahrenheit, h["temperature"] * 1.8 + 32, 1, "Vital Signs", "Temperature", "Temperature (F)")
    second = seen & chance & (hour % 2 == 0)
    chart(second, h["heart_rate"], 0, "Vital Signs", "Heart Rate", "Heart Rate")
    chart(second, h["respiration"], 0, "Vital Signs", "Respiratory Rate", "Respiratory Rate")
    chart(second, h["spo2"], 0, "Vital Signs", "O2 Saturation", "O2 Saturation")
    for name, label in (("systolic", "Systolic"), ("diastolic", "Diastolic"), ("map_read", "Mean")):
        chart(second, h[name], 0, "Vital Signs", "Non-Invasive BP", f"Non-Invasive BP {label}")
    _add_nurse(twice(stack(events), rng), rows)


def _add_nurse(frame: pl.DataFrame, rows: _Rows) -> None:
    frame = frame.with_columns(nursingchartoffset="minute", nursingchartentryoffset="minute", nursingchartvalue="value")
    rows.put("nurseCharting", frame["stay"], frame)


def _extra(patients: Patients, count: int, rng: np.random.Generator, rows: _Rows) -> None:
    """Rows for benchmarks: checks and the like of random hours, and one quarter heart rates that agree with the patient's own."""
    h = patients.hours
    heard = np.flatnonzero(~patients.stays["silent"][h["stay"]])
    at = np.sort(heard[rng.integers(0, len(heard), count)])
    real = rng.random(count) < 0.25
    which = np.where(real, len(ALARMS), rng.integers(0, len(ALARMS), count))
    number = np.clip(np.where(real, h["heart_rate"][at], rng.integers(0, 11, count)), 0, 300).astype(int)
    frame = pl.DataFrame(
        {
            "stay": h["stay"][at].astype(np.int64),
            "minute": h["hour"][at] * 60 + rng.integers(0, 60, count),
            "value": pl.Series([str(n) for n in range(301)]).gather(number),
            "nursingchartcelltypecat": pl.Series(["Other Vital Signs and Infusions", "Vital Signs"]).gather(real.astype(int)),
            "nursingchartcelltypevallabel": pl.Series([*ALARMS, "Heart Rate"]).gather(which),
        }
    )
    _add_nurse(frame.with_columns(nursingchartcelltypevalname="nursingchartcelltypevallabel"), rows)


def _labs(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: _Rows) -> None:
    """lab: every hospital's assays read a little high or low."""
    p, h = patients.stays, patients.hours
    hospital = p["hospital"]
    values = {**h, "fio2_percent": h["fio2"] * 100, "anion_gap": h["sodium"] - h["chloride"] - h["bicarbonate"]}
    panels = draws(patients, rng, 0.8 * hospitals.density[hospital])
    jitter = rng.integers(-50, 50, len(h["stay"]))
    events = []
    for lab in LABS:
        at = panels[lab.panel]
        number = spoil(values[lab.name][at] * hospitals.assay[lab.name][hospital[h["stay"][at]]], rng, 0.0005)
        if lab.name == "fio2_percent":
            number = np.where(hospitals.fraction[hospital[h["stay"][at]]], values[lab.name][at] / 100, np.round(number))
        fields = {"labname": lab.eicu, "labmeasurenamesystem": lab.eicu_unit, "labmeasurenameinterface": lab.eicu_unit}
        fields["labtypeid"] = LAB_TYPES.get(lab.panel.split("_")[0], 1)  # type: ignore[assignment]
        decimals = 2 if lab.name == "fio2_percent" else lab.decimals
        events.append(Event(h["stay"][at], h["hour"][at] * 60 + jitter[at], text(number, decimals), fields))
    frame = twice(stack(events), rng, 0.001)
    frame = frame.with_columns(
        labresultoffset="minute", labresult="value", labresulttext="value", labresultrevisedoffset=pl.col("minute") + 40
    )
    rows.put("lab", frame["stay"], frame)


def _breathing(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: _Rows) -> None:
    """respiratoryCharting every few hours, respiratoryCare for the intervals of ventilation."""
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    seen = ~p["silent"][stay] & (rng.random(len(stay)) < hospitals.density[hospital]) & (hour % 3 == 0)
    vent = h["vent"] > 0
    minute = hour * 60 + rng.integers(0, 60, len(p["age"]))[stay]
    events = []

    def chart(where: NDArray, make: Callable[[NDArray], pl.Series], kind: str, label: str) -> None:
        at = np.flatnonzero(where)
        events.append(Event(stay[at], minute[at], make(at), {"respcharttypecat": kind, "respchartvaluelabel": label}))

    on_oxygen = seen & (vent | (h["fio2"] > 0.35))
    percent = hospital % 5 == 4
    chart(on_oxygen & ~percent, lambda at: text(spoil(h["fio2"][at] * 100, rng), 0), "respFlowSettings", "FiO2")
    chart(on_oxygen & percent, lambda at: text(h["fio2"][at] * 100, 0) + "%", "respFlowSettings", "FiO2")
    chart(seen & vent, lambda at: text(h["peep"][at], 0), "respFlowSettings", "PEEP")
    chart(seen & vent, lambda at: text(h["respiration"][at], 0), "respFlowPtVentData", "Total RR")
    chart(seen & vent & (hour % 12 == 0), lambda at: pl.repeat("Continued", len(at), eager=True), "respFlowCareData", "RT Vent On/Off")
    names = pl.Series(("None (Room air)", "Nasal cannula", "Ventilator"))
    device = np.where(vent, 2, h["fio2"] > 0.22).astype(int)
    chart(seen & (hour % 6 == 0), lambda at: names.gather(device[at]), "respFlowCareData", "O2 Device")
    frame = stack(events).with_columns(respchartoffset="minute", respchartentryoffset="minute", respchartvalue="value")
    rows.put("respiratoryCharting", frame["stay"], frame)
    index, first, after, _ = runs(patients, "vent", 1.0)
    kept = rng.random(len(index)) < hospitals.density[p["hospital"][index]]
    start, end = first[kept] * 60 + 1, np.minimum(after[kept] * 60, p["icu_minutes"][index[kept]])
    frame = pl.DataFrame({"respcarestatusoffset": start, "ventstartoffset": start, "ventendoffset": end})
    rows.put(
        "respiratoryCare", index[kept], frame, currenthistoryseqnum=1, airwaytype="Oral ETT", priorventstartoffset=0, priorventendoffset=0
    )


def _drips(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: _Rows) -> None:
    """infusionDrug in the hospital's unit, orders in medication, and the vasopressor strings of treatment."""
    p, h = patients.stays, patients.hours
    frames, told = [], []
    for drug, name, step, strength, hicl in DRIPS:
        stay, first, after, rate = runs(patients, drug, step)
        hospital, weight = p["hospital"][stay], p["weight"][stay]
        unit = hospitals.pump[hospital]
        if drug == "vasopressin":
            units = np.array(["units/min", "ml/hr", "", "units/min"])
            dose = np.where(unit == 1, rate / strength, np.where(unit == 2, rate, rate / 60))
        else:
            units = np.array(PUMP_UNITS)
            each = np.where(hospitals.strong[hospital], 2 * strength, strength)
            dose = np.where(unit == 1, rate * weight * 60 / each, np.where(unit == 3, rate, rate * weight))
        offset, ends = first * 60 + rng.integers(0, 10, len(first)), after * 60
        weighed = np.where(rng.random(len(stay)) < 0.04, weight, np.nan)
        # a row when the rate changes and every four hours while it holds; a zero where it ends
        for later in range(0, 240, 4):
            if not (first + later < after).any():
                break
            due = (first + later < after) & hospitals.fills["infusionDrug"][hospital]
            columns = {
                "stay": stay[due],
                "infusionoffset": offset[due] + later * 60,
                "drugrate": text(dose[due], 3),
                "unit": units[unit[due]],
            }
            columns["patientweight"] = pl.Series(weighed[due]).fill_nan(None)
            frames.append(pl.DataFrame(columns).with_columns(name=pl.lit(name)))
        following = np.append((stay[1:] == stay[:-1]) & (first[1:] == after[:-1]), False)[: len(stay)]
        over = ~following & hospitals.fills["infusionDrug"][hospital] & (ends < p["icu_minutes"][stay])
        zero = {"stay": stay[over], "infusionoffset": ends[over], "drugrate": pl.repeat("0", int(over.sum()), eager=True)}
        frames.append(pl.DataFrame({**zero, "unit": units[unit[over]]}).with_columns(name=pl.lit(name)))
        # once a day the daily note tells the drug and its dose tier
        daily = np.unique(stay * 20 + first // 24, return_index=True)[1]
        tier = {"norepinephrine": 0.1, "epinephrine": 0.1, "dopamine": 15}.get(drug)
        words = {"phenylephrine": "phenylephrine (Neosynephrine)"}.get(drug, drug)
        more = np.zeros(len(stay), bool) if tier is None else rate > tier + 1e-9
        high = f"{drug} >{tier} micrograms/kg/min" if drug == "dopamine" else f"{drug} > {tier} micrograms/kg/min"
        low = "dopamine  5-15 micrograms/kg/min" if drug == "dopamine" else f"{drug} <= {tier} micrograms/kg/min"
        note = np.where(more, high, low if tier is not None else words)
        if drug == "dobutamine":
            continue
        daily = daily[rng.random(len(daily)) < 0.6]
        strings = pl.lit("cardiovascular|shock|vasopressors|") + pl.Series("s", note[daily], dtype=pl.String)
        told.append(pl.DataFrame({"stay": stay[daily], "treatmentoffset": offset[daily] + 30}).with_columns(treatmentstring=strings))
        begin = np.unique(stay, return_index=True)[1]
        begin = begin[hospitals.fills["medication"][hospital[begin]]]
        _order(stay[begin], offset[begin] - 10, ends[begin], name.upper(), np.full(len(begin), hicl), patients, hospitals, rng, rows)
    frame = pl.concat(frames, how="diagonal_relaxed").sort("stay", "infusionoffset", "name", maintain_order=True)
    frame = frame.with_columns(drugname=pl.format("{} ({})", "name", "unit"))
    frame = frame.with_columns(infusionrate=pl.when(pl.col("unit") == "ml/hr").then("drugrate"))
    rows.put("infusionDrug", frame["stay"], frame)
    treatment = pl.concat(told).sort("stay", "treatmentoffset", maintain_order=True)
    rows.put("treatment", treatment["stay"], treatment, activeupondischarge="False")
    sick = np.flatnonzero((h["vent"] > 0) & (h["hour"] % 24 == 3))
    frame = pl.DataFrame({"treatmentoffset": h["hour"][sick] * 60})
    string = "pulmonary|ventilation and oxygenation|mechanical ventilation"
    rows.put("treatment", h["stay"][sick], frame, treatmentstring=string, activeupondischarge="False")


def _order(
    stay: NDArray,
    start: NDArray,
    stop: NDArray,
    name: str | pl.Series,
    hicl: NDArray,
    patients: Patients,
    hospitals: Hospitals,
    rng: np.random.Generator,
    rows: _Rows,
) -> None:
    """medication: an order carries the drug's name, or only its HICL code."""
    hospital = patients.stays["hospital"][stay]
    named = rng.random(len(stay)) < hospitals.named[hospital]
    coded = ~named | (rng.random(len(stay)) < 0.85)
    frame = pl.DataFrame({"drugorderoffset": start - 20, "drugstartoffset": start, "drugstopoffset": stop})
    frame = frame.with_columns(
        drugname=pl.when(pl.Series(named)).then(pl.lit(name)),
        drughiclseqno=pl.when(pl.Series(coded)).then(pl.Series(hicl)),
    )
    rows.put("medication", stay, frame, drugivadmixture="No", drugordercancelled="No", routeadmin="IV", prn="No")


def _urine(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: _Rows) -> None:
    """intakeOutput: urine summed over the hospital's interval."""
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    every = hospitals.urine_every[hospital]
    charted = ~p["silent"][stay] & hospitals.fills["intakeOutput"][hospital] & (rng.random(len(stay)) < 0.95)
    at = np.flatnonzero(charted & (hour % every == every - 1))
    total = np.concatenate([[0.0], np.cumsum(h["urine"])])
    volume = text(spoil(total[at + 1] - total[at + 1 - every[at]], rng), 0)
    offset = np.minimum(hour[at] * 60 + 59, p["icu_minutes"][stay[at]])
    cell = pl.Series(URINE).gather(hospitals.urine_cell[hospital[at]])
    frame = pl.DataFrame({"stay": stay[at], "intakeoutputoffset": offset, "celllabel": cell, "cellvaluenumeric": volume})
    frame = twice(frame, rng).with_columns(
        intakeoutputentryoffset="intakeoutputoffset",
        cellvaluetext="cellvaluenumeric",
        outputtotal="cellvaluenumeric",
        cellpath=pl.lit("flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|") + pl.col("celllabel"),
    )
    rows.put("intakeOutput", frame["stay"], frame, intaketotal="0.0000", dialysistotal="0.0000")


def _infection(patients: Patients, hospitals: Hospitals, orders: Orders, rng: np.random.Generator, rows: _Rows) -> None:
    """Antibiotics in medication and treatment, diagnoses, and the cultures of the few hospitals that report them."""
    p = patients.stays
    stay, drug, start, stop = orders
    hospital = p["hospital"]
    kept = hospitals.fills["medication"][hospital[stay]]
    names, codes = pl.Series([a.order for a in ANTIBIOTICS]), np.array([a.hicl for a in ANTIBIOTICS])
    _order(stay[kept], start[kept], stop[kept], names.gather(drug[kept]), codes[drug[kept]], patients, hospitals, rng, rows)
    told = np.flatnonzero((rng.random(len(stay)) < 0.6) & (drug < 6) & (start < p["icu_minutes"][stay]))
    strings = pl.Series(["infectious diseases|medications|therapeutic antibacterials|" + a.treatment for a in ANTIBIOTICS]).gather(
        drug[told]
    )
    offset = np.clip(start[told] + rng.integers(0, 200, len(told)), 5, p["icu_minutes"][stay[told]])
    rows.put("treatment", stay[told], pl.DataFrame({"treatmentoffset": offset, "treatmentstring": strings}), activeupondischarge="False")
    count = len(hospital)
    written = np.flatnonzero(p["infected"] & (rng.random(count) < 0.6))
    which = rng.choice(4, len(written), p=(0.4, 0.25, 0.15, 0.2))
    sentences = (
        ("cardiovascular|shock / hypotension|sepsis", "038.9, A41.9"),
        ("infectious diseases|systemic/other infections|sepsis", "038.9, A41.9"),
        ("cardiovascular|shock / hypotension|septic shock", "785.52, R65.21"),
        ("pulmonary|pulmonary infections|pneumonia", "486, J18.9"),
    )
    offset = np.clip(p["onset_minute"][written] + rng.integers(20, 900, len(written)), 3, p["icu_minutes"][written])
    columns = {"diagnosisoffset": offset, "diagnosisstring": pl.Series([s for s, _ in sentences]).gather(which)}
    frame = pl.DataFrame({**columns, "icd9code": pl.Series([c for _, c in sentences]).gather(which)})
    rows.put("diagnosis", written, frame, diagnosispriority="Primary", activeupondischarge="True")
    failing = np.flatnonzero(rng.random(count) < 0.3)
    frame = pl.DataFrame({"diagnosisoffset": np.minimum(rng.integers(5, 600, len(failing)), p["icu_minutes"][failing])})
    other = "pulmonary|respiratory failure|acute respiratory failure"
    priority = {"diagnosispriority": "Major", "activeupondischarge": "False"}
    rows.put("diagnosis", failing, frame, diagnosisstring=other, icd9code="518.81, J96.00", **priority)
    stay, minute, site, organism = cultures(patients, rng)
    kept = hospitals.fills["microLab"][hospital[stay]] & (site < 3) & (minute < p["icu_minutes"][stay])
    frame = pl.DataFrame({"culturetakenoffset": minute[kept], "culturesite": pl.Series(SITES).gather(site[kept])})
    rows.put("microLab", stay[kept], frame.with_columns(organism=pl.Series(ORGANISMS).gather(organism[kept] % len(ORGANISMS))))


def _day_one(patients: Patients, rng: np.random.Generator, rows: _Rows) -> None:
    """apacheApsVar: the worst values of the first day (which therefore leak into any shorter window); -1 where missing."""
    p, h = patients.stays, patients.hours
    day = h["hour"] < 24
    stay, count = h["stay"][day], len(p["age"])
    sizes = np.maximum(np.bincount(stay, minlength=count), 1)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def worst(name: str, low: bool = False, decimals: int = 0, share: float = 1.0) -> pl.Series:
        values = (np.minimum if low else np.maximum).reduceat(h[name][day], starts)
        return text(np.where(rng.random(count) < share, values, -1), decimals)

    vent = worst("vent")
    chosen = np.flatnonzero((rng.random(count) < 0.88) & ~p["silent"])
    frame = pl.DataFrame(
        {
            "intubated": vent,
            "vent": vent,
            **{name: worst(name, low=True) for name in ("eyes", "motor", "verbal")},
            "urine": text(np.add.reduceat(h["urine"][day], starts), 0),
            "wbc": worst("wbc", decimals=1, share=0.8),
            "temperature": worst("temperature", decimals=1, share=0.95),
            "respiratoryrate": worst("respiration"),
            "sodium": worst("sodium", share=0.85),
            "heartrate": worst("heart_rate"),
            "meanbp": worst("map_read", low=True),
            "ph": worst("ph", low=True, decimals=2, share=0.25),
            "hematocrit": worst("hematocrit", low=True, decimals=1, share=0.8),
            "creatinine": worst("creatinine", decimals=2, share=0.85),
            "albumin": worst("albumin", low=True, decimals=1, share=0.4),
            "pao2": worst("pao2", low=True, share=0.25),
            "pco2": worst("paco2", share=0.25),
            "bun": worst("bun", share=0.85),
            "glucose": worst("glucose", share=0.9),
            "bilirubin": worst("bilirubin", decimals=1, share=0.4),
            "fio2": text(np.where(rng.random(count) < 0.25, 100 * np.maximum.reduceat(h["fio2"][day], starts), -1), 0),
        }
    )
    rows.put("apacheApsVar", chosen, frame[chosen], dialysis=0, meds=0)
