"""Simulated patients -> eICU-shaped tables of many unequal hospitals, in the publisher's names and units; no real data.

A hospital has habits (``Hospitals``): how densely it charts, the unit of its infusion pumps, offsets of its
laboratory, and which tables it fills at all. So "no infusionDrug row" means "no pressor" in one hospital and nothing
in another, as in the real database.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.simulate.eicu_treatment import (
    write_apache,
    write_boluses,
    write_infection,
    write_infusions,
    write_urine,
)
from datamodules.simulate.habits import (
    LAB_CATALOGUE,
    Add,
    Event,
    Hospitals,
    Rows,
    antibiotic_orders,
    as_text,
    cuff_values,
    draw_minutes,
    lab_values,
    laboratory_delay,
    later_entry,
    panel_draws,
    rate_intervals,
    scatter,
    spoil,
    stack,
    twice,
)
from datamodules.simulate.patient import CaseMix, Patients

# severity, infected, age, units, hospitals, offset, target, hazard, weights: see CaseMix
EICU_MIX = CaseMix(0.0, 0.38, 67, (0.16, 0.08, 0.12, 0.06, 0.06, 0.52), 40, 0.6, 63, -9.2, (1.2, 1.5, 1.5, 1.3))
UNIT_TYPES = ("MICU", "SICU", "Cardiac ICU", "CSICU", "Neuro ICU", "Med-Surg ICU")
SEPSIS_DIAGNOSES = (
    "Sepsis, pulmonary",
    "Sepsis, renal/UTI (including bladder)",
    "Sepsis, GI",
    "Sepsis, unknown",
    "Pneumonia, bacterial",
)
OTHER_DIAGNOSES = (
    "Emphysema/bronchitis",
    "Bleeding, upper GI",
    "Infarction, acute myocardial (MI)",
    "CABG alone, coronary artery bypass grafting",
    "CVA, cerebrovascular accident/stroke",
    "CHF, congestive heart failure",
)
LAB_TYPES = {"gas": 7, "count": 3, "differential": 3, "coagulation": 3, "fibrinogen": 3}  # all others: 1, chemistry
IDLE_LABELS = ("Pain Score", "Bed Position", "Safety Check", "Braden Score")  # charted, extracted by nobody


def write_hospitals(hospitals: Hospitals, add: Add) -> None:
    """Add the table ``hospital``.

    Args:
        hospitals: the habits of their hospitals.
        add: takes the next rows of a table.
    """
    index = np.arange(len(hospitals.id))
    size = np.array([">= 500", "250 - 499", "100 - 249", "<100"])[np.minimum(index // 10, 3)]
    region = np.array(["Midwest", "South", "West", "Northeast"])[index % 4]
    teaching = np.where(index < 8, "t", "f")
    add(
        "hospital",
        pl.DataFrame(
            {"hospitalid": hospitals.id, "numbedscategory": size, "teachingstatus": teaching, "region": region}
        ),
    )


def write_eicu(
    patients: Patients, hospitals: Hospitals, base: int, extra: int, rng: np.random.Generator, add: Add
) -> None:
    """Add the rows of some stays to every table.

    Args:
        patients: the simulated stays.
        hospitals: the habits of their hospitals.
        base: number of stays already written, from which the ids are counted.
        extra: further rows of nurseCharting, three quarters of them of items that nobody extracts.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    rows = Rows(base, add)
    orders = antibiotic_orders(patients, rng)
    _patient(patients, hospitals, base, rng, rows)
    _vitals(patients, hospitals, rng, rows)
    _nurse_charting(patients, hospitals, rng, rows)
    _lab(patients, hospitals, rng, rows)
    _respiratory(patients, hospitals, rng, rows)
    write_infusions(patients, hospitals, rng, rows)
    write_urine(patients, hospitals, rng, rows)
    write_infection(patients, hospitals, orders, rng, rows)
    write_apache(patients, rng, rows)
    write_boluses(patients, hospitals, rng, rows)
    for start in range(0, extra, 1_000_000):
        _extra_nurse_charting(patients, min(1_000_000, extra - start), rng, rows)


def _patient(patients: Patients, hospitals: Hospitals, base: int, rng: np.random.Generator, rows: Rows) -> None:
    """patient and admissionDx.

    Some body sizes are in another unit or in each other's field; a few who died in the unit left the hospital alive.
    """
    p = patients.stays
    count = len(p["age"])
    clock = rng.integers(0, 1440, count)

    def of_day(minute: NDArray) -> pl.Series:
        clock_minute = pl.Series((clock + minute) % 1440)
        return pl.select(
            (clock_minute // 60).cast(pl.String).str.zfill(2)
            + ":"
            + (clock_minute % 60).cast(pl.String).str.zfill(2)
            + ":00"
        ).to_series()

    # admission and hospital discharge are those of the whole hospital stay, seen from each of its ICU stays
    first, every = p["admission"], np.arange(count)
    final = np.flatnonzero(p["last_of_admission"])[np.cumsum(p["last_of_admission"]) - p["last_of_admission"]]
    admitted = p["since_minute"][first] - p["since_minute"] - p["before_minute"][first]
    discharged = p["since_minute"][final] - p["since_minute"] + p["discharge_minute"][final]
    dies = p["hospital_death"][final]
    septic = p["infected"] & (p["onset_minute"] < 600) & (rng.random(count) < 0.45)
    cause = np.where(
        septic,
        np.array(SEPSIS_DIAGNOSES)[rng.integers(0, len(SEPSIS_DIAGNOSES), count)],
        np.array(OTHER_DIAGNOSES)[p["unit"]],
    )
    cause = np.where(rng.random(count) < 0.1, "", cause)
    age = np.where(p["age"] >= 90, "> 89", p["age"].astype(int).astype(str))
    reported = rng.random(count) > 0.01
    slips = rng.spawn(1)[0]
    height, weight = _body_sizes(p["height"], p["weight"], slips)
    status = np.where(dies & ~(p["icu_death"] & (slips.random(count) < 0.04)), "Expired", "Alive")
    frame = pl.DataFrame(
        {
            "patienthealthsystemstayid": 120_000 + base + first,
            "gender": np.where(p["male"], "Male", "Female"),
            "age": np.where(rng.random(count) < 0.002, "", age),
            "hospitalid": hospitals.id[p["hospital"]],
            "wardid": hospitals.id[p["hospital"]] * 10 + p["unit"],
            "apacheadmissiondx": cause,
            "admissionheight": pl.Series(np.where(rng.random(count) < 0.02, np.nan, height)).fill_nan(None),
            "hospitaladmittime24": of_day(admitted),
            "hospitaladmitoffset": admitted,
            "hospitaldischargetime24": of_day(discharged),
            "hospitaldischargeoffset": discharged,
            "hospitaldischargelocation": np.where(dies, "Death", "Home"),
            "hospitaldischargestatus": np.where(reported, status, ""),
            "unittype": np.array(UNIT_TYPES)[p["unit"]],
            "unitadmittime24": of_day(0 * every),
            "unitvisitnumber": p["visit"],
            "unitstaytype": np.where(p["visit"] > 1, "readmit", "admit"),
            "admissionweight": pl.Series(np.where(rng.random(count) < 0.03, np.nan, weight)).fill_nan(None),
            "unitdischargetime24": of_day(p["icu_minutes"]),
            "unitdischargeoffset": p["icu_minutes"],
            "unitdischargelocation": np.where(p["icu_death"], "Death", "Floor"),
            "unitdischargestatus": np.where(p["icu_death"], "Expired", "Alive"),
            "uniquepid": pl.select(pl.lit("002-") + pl.Series(10_000 + base + p["first"]).cast(pl.String)).to_series(),
        }
    )
    constant = {
        "ethnicity": "Other/Unknown",
        "hospitaladmitsource": "Emergency Department",
        "unitadmitsource": "Emergency Department",
    }
    rows.put("patient", frame.with_columns(stay=every), hospitaldischargeyear=2015, **constant)
    with_cause = np.flatnonzero((cause != "") & (rng.random(count) < 0.92))
    path = "admission diagnosis|All Diagnosis|Non-operative|Diagnosis|Cardiovascular|"
    named = pl.DataFrame(
        {"admitdxname": cause[with_cause], "admitdxenteredoffset": rng.integers(5, 300, len(with_cause))}
    )
    named = named.with_columns(admitdxpath=pl.lit(path) + pl.col("admitdxname"), admitdxtext="admitdxname")
    rows.put("admissionDx", named.with_columns(stay=with_cause))


def _body_sizes(height: NDArray, weight: NDArray, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Heights (cm) and weights (kg) as written: 2 % in inches, 1 % in metres, 1.5 % in pounds, 0.5 % swapped."""
    slip = np.digitize(rng.random(len(height)), (0.02, 0.03, 0.045, 0.05))
    tall = np.choose(slip, (np.round(height / 2.54), height / 100, height, weight, height))
    return tall, np.choose(slip, (weight, weight, np.round(weight * 2.2046, 1), height, weight))


def _vitals(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """vitalPeriodic (monitor, every 15 minutes, arterial pressure only with a catheter) and vitalAperiodic (cuff).

    Every hospital's cuffs read a little high or low, and their rows come in no order.
    """
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    density, charted = hospitals.density[hospital], ~p["silent"][stay]
    line = (p["catheter"][stay] & (density > 0.7)) | (h["dose"] > 0.1)
    at = np.repeat(np.arange(len(stay)), 4)
    offset = hour[at] * 60 + np.tile(np.arange(4) * 15, len(stay)) + rng.integers(0, 15, len(p["age"]))[stay][at]
    keep = (charted[at]) & (rng.random(len(at)) < density[at]) & (offset <= p["icu_minutes"][stay[at]])
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
        numbers = as_text(spoil(values, rng, 0.0005), decimals)
        frame = frame.with_columns(
            pl.when(pl.lit(pl.Series(~missing if where is None else where))).then(numbers).alias(name)
        )
    rows.put("vitalPeriodic", frame.with_columns(stay=stay[at]))
    at = np.flatnonzero(charted & (rng.random(len(stay)) < np.where(line, 0.3, density)))
    offset = hour[at] * 60 + rng.integers(0, 60, len(at))
    pressures, noise = cuff_values(patients, hospitals), rng.normal(0, 3, len(stay))[at]
    cuff = {"observationoffset": offset}
    names = (
        ("noninvasivesystolic", "systolic"),
        ("noninvasivediastolic", "diastolic"),
        ("noninvasivemean", "map_read"),
    )
    frame = pl.DataFrame(cuff | {to: as_text(spoil(pressures[name][at] + noise, rng), 0) for to, name in names})
    frame = twice(frame.with_columns(stay=stay[at]), rng)
    rows.put("vitalAperiodic", scatter(frame, rng.spawn(1)[0]))


def _nurse_charting(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """nurseCharting: GCS in two spellings, temperature, the vital signs once more; a quarter is entered later."""
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    charted = ~p["silent"][stay] & hospitals.fills["nurse"][hospital]
    chance = rng.random(len(stay)) < hospitals.density[hospital]
    fourth = charted & chance & (hour % 4 == 0)
    fahrenheit, value_only = hospitals.fahrenheit[hospital], hospital % 3 == 2
    minute = hour * 60 + rng.integers(0, 60, len(p["age"]))[stay]
    events = []

    def chart(where: NDArray, values: NDArray, decimals: int, kind: str, label: str, name: str) -> None:
        at = np.flatnonzero(where)
        fields = {
            "nursingchartcelltypecat": kind,
            "nursingchartcelltypevallabel": label,
            "nursingchartcelltypevalname": name,
        }
        events.append(Event(stay[at], minute[at], as_text(spoil(values[at], rng), decimals), fields))

    total = h["eyes"] + h["verbal"] + h["motor"]
    for values, name in ((total, "GCS Total"), (h["eyes"], "Eyes"), (h["verbal"], "Verbal"), (h["motor"], "Motor")):
        chart(fourth & ~value_only, values, 0, "Scores", "Glasgow coma score", name)
    chart(fourth & value_only, total, 0, "Scores", "Score (Glasgow Coma Scale)", "Value")
    chart(fourth & ~fahrenheit, h["temperature"], 1, "Vital Signs", "Temperature", "Temperature (C)")
    chart(fourth & fahrenheit, h["temperature"] * 1.8 + 32, 1, "Vital Signs", "Temperature", "Temperature (F)")
    second = charted & chance & (hour % 2 == 0)
    chart(second, h["heart_rate"], 0, "Vital Signs", "Heart Rate", "Heart Rate")
    chart(second, h["respiration"], 0, "Vital Signs", "Respiratory Rate", "Respiratory Rate")
    chart(second, h["spo2"], 0, "Vital Signs", "O2 Saturation", "O2 Saturation")
    pressures = cuff_values(patients, hospitals)
    for name, label in (("systolic", "Systolic"), ("diastolic", "Diastolic"), ("map_read", "Mean")):
        chart(second, pressures[name], 0, "Vital Signs", "Non-Invasive BP", f"Non-Invasive BP {label}")
    frame = stack(events)
    _add_nurse_charting(twice(frame.with_columns(entry=later_entry(frame["minute"], rng.spawn(1)[0])), rng), rows)


def _add_nurse_charting(frame: pl.DataFrame, rows: Rows) -> None:
    frame = frame.with_columns(nursingchartoffset="minute", nursingchartentryoffset="entry", nursingchartvalue="value")
    rows.put("nurseCharting", frame)


def _extra_nurse_charting(patients: Patients, count: int, rng: np.random.Generator, rows: Rows) -> None:
    """Rows for benchmarks: checks and the like of random hours, one quarter heart rates of the patient."""
    h = patients.hours
    charted = np.flatnonzero(~patients.stays["silent"][h["stay"]])
    at = np.sort(charted[rng.integers(0, len(charted), count)])
    real = rng.random(count) < 0.25
    which = np.where(real, len(IDLE_LABELS), rng.integers(0, len(IDLE_LABELS), count))
    number = np.clip(np.where(real, h["heart_rate"][at], rng.integers(0, 11, count)), 0, 300).astype(int)
    frame = pl.DataFrame(
        {
            "stay": h["stay"][at].astype(np.int64),
            "minute": h["hour"][at] * 60 + rng.integers(0, 60, count),
            "value": pl.Series([str(n) for n in range(301)]).gather(number),
            "nursingchartcelltypecat": pl.Series(["Other Vital Signs and Infusions", "Vital Signs"]).gather(
                real.astype(int)
            ),
            "nursingchartcelltypevallabel": pl.Series([*IDLE_LABELS, "Heart Rate"]).gather(which),
        }
    )
    entry = later_entry(frame["minute"], rng)
    _add_nurse_charting(
        frame.with_columns(nursingchartcelltypevalname="nursingchartcelltypevallabel", entry=entry), rows
    )


def _lab(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """lab: every hospital's assays read a little high or low.

    One result in seven is revised later than the draw, and a few of these had another value before. A few results are
    only text, such as ">16.00" or "26".
    """
    p, h = patients.stays, patients.hours
    hospital = p["hospital"]
    values, slips = lab_values(patients, hospitals), rng.spawn(1)[0]
    panels = panel_draws(patients, rng, 0.8 * hospitals.density[hospital])
    drawn = draw_minutes(patients, rng)
    events = []
    for lab in LAB_CATALOGUE:
        at = panels[lab.panel]
        number = spoil(values[lab.name][at], rng, 0.0005)
        if lab.name == "fio2_percent":
            number = np.where(hospitals.fraction[hospital[h["stay"][at]]], values[lab.name][at] / 100, np.round(number))
        fields = {"labname": lab.eicu, "labmeasurenamesystem": lab.eicu_unit, "labmeasurenameinterface": lab.eicu_unit}
        fields["labtypeid"] = LAB_TYPES.get(lab.panel.split("_")[0], 1)  # type: ignore[assignment]
        decimals = 2 if lab.name == "fio2_percent" else lab.decimals
        before = as_text(number * np.exp(slips.normal(0, 0.2, len(at))), decimals)
        events.append(Event(h["stay"][at], drawn[at], as_text(number, decimals), fields | {"before": before}))
    frame = stack(events).with_columns(labresultoffset="minute")
    revised = np.where(slips.random(frame.height) < 0.15, laboratory_delay(frame.height, slips), 0)
    frame = frame.with_columns(labresultrevisedoffset=frame["minute"] + revised)
    corrected = pl.Series((revised > 0) & (slips.random(frame.height) < 0.05)) & (frame["before"] != frame["value"])
    first = frame.filter(corrected).with_columns(value="before", labresultrevisedoffset="minute")
    frame = pl.concat([frame, first]).sort("stay", "minute", maintain_order=True)
    share = pl.Series(slips.random(frame.height))
    above = (share < 0.002) & ~frame["value"].str.contains("[-.]")
    frame = frame.with_columns(
        labresult=pl.when(share > 0.005).then("value"),
        labresulttext=pl.when(above).then(">" + pl.col("value") + ".00").otherwise("value"),
    )
    rows.put("lab", twice(frame, rng, 0.001))


def _respiratory(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """respiratoryCharting every few hours, respiratoryCare for the intervals of ventilation.

    respiratoryCharting has spells of a ventilator shorter than half an hour, rows that are entered hours later, and no
    order. A row of respiratoryCare is written hours after its start, often with an end of 0: the ventilator still runs.
    """
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    charted = ~p["silent"][stay] & (rng.random(len(stay)) < hospitals.density[hospital]) & (hour % 3 == 0)
    vent = h["vent"] > 0
    minute = hour * 60 + rng.integers(0, 60, len(p["age"]))[stay]
    slips = rng.spawn(1)[0]
    events = []

    def chart(where: NDArray, make: Callable[[NDArray], pl.Series], kind: str, label: str) -> None:
        at = np.flatnonzero(where)
        events.append(Event(stay[at], minute[at], make(at), {"respcharttypecat": kind, "respchartvaluelabel": label}))

    on_oxygen = charted & (vent | (h["fio2"] > 0.35))
    percent = hospital % 5 == 4
    chart(on_oxygen & ~percent, lambda at: as_text(spoil(h["fio2"][at] * 100, rng), 0), "respFlowSettings", "FiO2")
    chart(on_oxygen & percent, lambda at: as_text(h["fio2"][at] * 100, 0) + "%", "respFlowSettings", "FiO2")
    chart(charted & vent, lambda at: as_text(h["peep"][at], 0), "respFlowSettings", "PEEP")
    chart(charted & vent, lambda at: as_text(h["respiration"][at], 0), "respFlowPtVentData", "Total RR")
    chart(
        charted & vent & (hour % 12 == 0),
        lambda at: pl.repeat("Continued", len(at), eager=True),
        "respFlowCareData",
        "RT Vent On/Off",
    )
    names = pl.Series(("None (Room air)", "Nasal cannula", "high flow nasal cannula", "Ventilator"))
    chart(charted & (hour % 6 == 0), lambda at: names.gather(h["support"][at]), "respFlowCareData", "O2 Device")
    short = np.flatnonzero(charted & ~vent & (slips.random(len(stay)) < 0.004))
    start = hour[short] * 60 + slips.integers(0, 30, len(short))
    spell = {"respcharttypecat": "respFlowCareData", "respchartvaluelabel": "RT Vent On/Off"}
    events.append(Event(stay[short], start, pl.repeat("Start", len(short), eager=True), spell))
    stop = start + slips.integers(5, 30, len(short))
    events.append(Event(stay[short], stop, pl.repeat("Off", len(short), eager=True), spell))
    frame = stack(events).with_columns(respchartoffset="minute", respchartvalue="value")
    frame = frame.with_columns(respchartentryoffset=later_entry(frame["minute"], slips))
    rows.put("respiratoryCharting", scatter(frame, slips))
    index, first, after, _ = rate_intervals(patients, "vent", 1.0)
    kept = rng.random(len(index)) < hospitals.density[p["hospital"][index]]
    start, end = first[kept] * 60 + 1, np.minimum(after[kept] * 60, p["icu_minutes"][index[kept]])
    index, leave = index[kept], p["icu_minutes"][index[kept]]
    status = np.minimum(start + slips.integers(10, 720, len(start)), leave)
    seen_off = slips.random(len(start)) < 0.5
    off = np.minimum(end + slips.integers(0, 240, len(end)), leave)
    frame = pl.DataFrame(
        {
            "stay": np.concatenate([index, index[seen_off]]),
            "respcarestatusoffset": np.concatenate([status, off[seen_off]]),
            "ventstartoffset": np.concatenate([start, start[seen_off]]),
            "ventendoffset": np.concatenate([np.where(status < end, 0, end), end[seen_off]]),
        }
    )
    frame = frame.sort("stay", "respcarestatusoffset", maintain_order=True)
    prior = {"priorventstartoffset": 0, "priorventendoffset": 0}
    rows.put("respiratoryCare", frame, currenthistoryseqnum=1, airwaytype="Oral ETT", **prior)
