"""Simulated patients -> eICU-shaped tables of what is done to them: infusions, orders, urine, infection, scores."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.simulate.habits import (
    ANTIBIOTICS,
    PUMP_UNITS,
    URINE_CELLS,
    Hospitals,
    Orders,
    Rows,
    as_text,
    later_entry,
    rate_intervals,
    scatter,
    specimens,
    spoil,
    twice,
)
from datamodules.simulate.patient import Patients

CULTURE_SITES = ("Blood, Venipuncture", "Urine, Catheter Specimen", "Sputum, Tracheal Specimen", "Nasopharynx")
CULTURE_RESULTS = (
    "Escherichia coli",
    "Staphylococcus aureus",
    "Klebsiella pneumoniae",
    "Pseudomonas aeruginosa",
    "Enterococcus faecalis",
    "no growth",
)
# drug, name, step, mcg per mL (vasopressin: units per mL), HICL code of an order
INFUSED_DRUGS: tuple[tuple[str, str, float, float, int], ...] = (
    ("norepinephrine", "Norepinephrine", 0.01, 32, 2051),
    ("epinephrine", "Epinephrine", 0.01, 40, 2050),
    ("dopamine", "Dopamine", 1.0, 1600, 2060),
    ("dobutamine", "Dobutamine", 1.0, 2000, 8777),
    ("phenylephrine", "Phenylephrine", 0.1, 200, 2087),
    ("vasopressin", "Vasopressin", 0.6, 0.4, 2839),
)


def write_infusions(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """Add infusionDrug in the hospital's unit, orders in medication, and the vasopressor strings of treatment.

    A rate is written when it changes and every one to eight hours while it holds, as the hospital does it. Where it
    ends follows a 0 or "OFF", or nothing at all. A few rates are slips ("ERROR", "2..5"), some have a comma ("1,000").

    Args:
        patients: the simulated stays.
        hospitals: the habits of their hospitals.
        rng: source of randomness.
        rows: takes the next rows of a table, with ids.
    """
    p, h = patients.stays, patients.hours
    slips = rng.spawn(1)[0]
    frames, noted = [], []
    for drug, name, step, strength, hicl in INFUSED_DRUGS:
        stay, first, after, rate = rate_intervals(patients, drug, step)
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
        filled = hospitals.fills["infusionDrug"][hospital]
        every = hospitals.pump_every[hospital]
        times = np.where(filled, -(-(after - first) // every), 0)
        row = np.repeat(np.arange(len(stay)), times)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(times) - times, times)
        columns = {
            "stay": stay[row],
            "infusionoffset": offset[row] + nth * every[row] * 60,
            "drugrate": _rate_texts(dose[row], slips),
            "unit": units[unit[row]],
            "patientweight": pl.Series(weighed[row]).fill_nan(None),
        }
        frames.append(pl.DataFrame(columns).with_columns(name=pl.lit(name)))
        following = np.append((stay[1:] == stay[:-1]) & (first[1:] == after[:-1]), False)[: len(stay)]
        over = ~following & filled & (ends < p["icu_minutes"][stay]) & (slips.random(len(stay)) < 0.7)
        zero = {
            "stay": stay[over],
            "infusionoffset": ends[over],
            "drugrate": pl.Series(("0", "OFF")).gather((slips.random(over.sum()) < 0.3).astype(int)),
        }
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
        noted.append(
            pl.DataFrame({"stay": stay[daily], "treatmentoffset": offset[daily] + 30}).with_columns(
                treatmentstring=strings
            )
        )
        begin = np.unique(stay, return_index=True)[1]
        begin = begin[hospitals.fills["medication"][hospital[begin]]]
        _medication(
            stay[begin],
            offset[begin] - 10,
            ends[begin],
            name.upper(),
            np.full(len(begin), hicl),
            patients,
            hospitals,
            rng,
            rows,
        )
    frame = pl.concat(frames, how="diagonal_relaxed").sort("stay", "infusionoffset", "name", maintain_order=True)
    frame = frame.with_columns(drugname=pl.format("{} ({})", "name", "unit"))
    frame = frame.with_columns(infusionrate=pl.when(pl.col("unit") == "ml/hr").then("drugrate"))
    rows.put("infusionDrug", frame)
    notes = pl.concat(noted).sort("stay", "treatmentoffset", maintain_order=True)
    rows.put("treatment", notes, activeupondischarge="False")
    sick = np.flatnonzero((h["vent"] > 0) & (h["hour"] % 24 == 3))
    frame = pl.DataFrame({"stay": h["stay"][sick], "treatmentoffset": h["hour"][sick] * 60})
    string = "pulmonary|ventilation and oxygenation|mechanical ventilation"
    rows.put("treatment", frame, treatmentstring=string, activeupondischarge="False")


def _rate_texts(rates: NDArray, rng: np.random.Generator) -> pl.Series:
    """Rates as written: numbers, those from 1,000 up with a comma half the time, and 0.4 % words and slips."""
    share = pl.Series(rng.random(len(rates)))
    frame = pl.DataFrame({"text": as_text(rates, 3), "share": share, "rate": rates})
    return frame.select(
        pl.when(pl.col("share") < 0.002)
        .then(pl.lit("ERROR"))
        .when((pl.col("share") < 0.01) & pl.col("text").str.contains(".", literal=True))
        .then(pl.col("text").str.replace(".", "..", literal=True))
        .when((pl.col("share") < 0.5) & (pl.col("rate") >= 1000))
        .then(pl.col("text").str.replace(r"^(\d+)(\d{3})", "$1,$2"))
        .otherwise("text")
    ).to_series()


def _medication(
    stay: NDArray,
    start: NDArray,
    stop: NDArray,
    name: str | pl.Series,
    hicl: NDArray,
    patients: Patients,
    hospitals: Hospitals,
    rng: np.random.Generator,
    rows: Rows,
) -> None:
    """medication: an order carries the drug's name, or only its HICL code; some are written after the start."""
    hospital = patients.stays["hospital"][stay]
    named = rng.random(len(stay)) < hospitals.named[hospital]
    coded = ~named | (rng.random(len(stay)) < 0.85)
    slips = rng.spawn(1)[0]
    ordered = start + np.where(slips.random(len(stay)) < 0.15, slips.integers(5, 120, len(stay)), -20)
    frame = pl.DataFrame({"stay": stay, "drugorderoffset": ordered, "drugstartoffset": start, "drugstopoffset": stop})
    frame = frame.with_columns(
        drugname=pl.when(pl.Series(named)).then(pl.lit(name)),
        drughiclseqno=pl.when(pl.Series(coded)).then(pl.Series(hicl)),
    )
    rows.put("medication", frame, drugivadmixture="No", drugordercancelled="No", routeadmin="IV", prn="No")


def write_urine(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """Add urine to intakeOutput, summed over the hospital's interval; some entries are made hours later.

    Args:
        patients: the simulated stays.
        hospitals: the habits of their hospitals.
        rng: source of randomness.
        rows: takes the next rows of a table, with ids.
    """
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    hospital = p["hospital"][stay]
    every = hospitals.urine_every[hospital]
    charted = ~p["silent"][stay] & hospitals.fills["intakeOutput"][hospital] & (rng.random(len(stay)) < 0.95)
    at = np.flatnonzero(charted & (hour % every == every - 1))
    total = np.concatenate([[0.0], np.cumsum(h["urine"])])
    volume = as_text(spoil(total[at + 1] - total[at + 1 - every[at]], rng), 0)
    offset = np.minimum(hour[at] * 60 + 59, p["icu_minutes"][stay[at]])
    cell = pl.Series(URINE_CELLS).gather(hospitals.urine_cell[hospital[at]])
    frame = pl.DataFrame(
        {"stay": stay[at], "intakeoutputoffset": offset, "celllabel": cell, "cellvaluenumeric": volume}
    )
    slips = rng.spawn(1)[0]
    frame = frame.with_columns(intakeoutputentryoffset=later_entry(frame["intakeoutputoffset"], slips))
    frame = twice(frame, rng).with_columns(
        cellvaluetext="cellvaluenumeric",
        outputtotal="cellvaluenumeric",
        cellpath=pl.lit("flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|") + pl.col("celllabel"),
    )
    rows.put("intakeOutput", scatter(frame, slips), intaketotal="0.0000", dialysistotal="0.0000")


def write_boluses(patients: Patients, hospitals: Hospitals, rng: np.random.Generator, rows: Rows) -> None:
    """Add boluses to intakeOutput; some entries are made hours later, a few stand twice.

    Args:
        patients: the simulated stays.
        hospitals: the habits of their hospitals.
        rng: source of randomness.
        rows: takes the next rows of a table, with ids.
    """
    h = patients.hours
    stay = h["stay"]
    charted = ~patients.stays["silent"][stay] & hospitals.fills["intakeOutput"][patients.stays["hospital"][stay]]
    at = np.flatnonzero(charted & (h["bolus"] > 0))
    cell = "Crystalloids (ml)|NS "
    minute = h["hour"][at] * 60 + 30
    frame = pl.DataFrame(
        {"stay": stay[at], "intakeoutputoffset": minute, "intakeoutputentryoffset": later_entry(minute, rng)}
    ).with_columns(
        celllabel=pl.lit(cell),
        cellvaluenumeric=pl.lit("500.0000"),
        cellvaluetext=pl.lit("500"),
        intaketotal=pl.lit("500.0000"),
        cellpath=pl.lit("flowsheet|Flowsheet Cell Labels|I&O|Intake (ml)|" + cell),
    )
    rows.put("intakeOutput", scatter(twice(frame, rng), rng), outputtotal="0.0000", dialysistotal="0.0000")


def write_infection(
    patients: Patients, hospitals: Hospitals, orders: Orders, rng: np.random.Generator, rows: Rows
) -> None:
    """Antibiotics in medication and treatment, diagnoses, and the cultures of the few hospitals that report them.

    Args:
        patients: the simulated stays.
        hospitals: the habits of their hospitals.
        orders: of antibiotics, as ``antibiotic_orders`` gives them.
        rng: source of randomness.
        rows: takes the next rows of a table, with ids.
    """
    p = patients.stays
    stay, drug, start, stop = orders
    hospital = p["hospital"]
    kept = hospitals.fills["medication"][hospital[stay]]
    names, codes = pl.Series([a.order for a in ANTIBIOTICS]), np.array([a.hicl for a in ANTIBIOTICS])
    _medication(
        stay[kept], start[kept], stop[kept], names.gather(drug[kept]), codes[drug[kept]], patients, hospitals, rng, rows
    )
    noted = np.flatnonzero((rng.random(len(stay)) < 0.6) & (drug < 6) & (start < p["icu_minutes"][stay]))
    strings = pl.Series(
        ["infectious diseases|medications|therapeutic antibacterials|" + a.treatment_string for a in ANTIBIOTICS]
    ).gather(drug[noted])
    offset = np.clip(start[noted] + rng.integers(0, 200, len(noted)), 5, p["icu_minutes"][stay[noted]])
    frame = pl.DataFrame({"stay": stay[noted], "treatmentoffset": offset, "treatmentstring": strings})
    rows.put("treatment", frame, activeupondischarge="False")
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
    columns = {
        "stay": written,
        "diagnosisoffset": offset,
        "diagnosisstring": pl.Series([s for s, _ in sentences]).gather(which),
    }
    frame = pl.DataFrame({**columns, "icd9code": pl.Series([c for _, c in sentences]).gather(which)})
    rows.put("diagnosis", frame, diagnosispriority="Primary", activeupondischarge="True")
    failing = np.flatnonzero(rng.random(count) < 0.3)
    offset = np.minimum(rng.integers(5, 600, len(failing)), p["icu_minutes"][failing])
    frame = pl.DataFrame({"stay": failing, "diagnosisoffset": offset})
    other = "pulmonary|respiratory failure|acute respiratory failure"
    priority = {"diagnosispriority": "Major", "activeupondischarge": "False"}
    rows.put("diagnosis", frame, diagnosisstring=other, icd9code="518.81, J96.00", **priority)
    stay, minute, site, organism = specimens(patients, rng)
    kept = hospitals.fills["microLab"][hospital[stay]] & (site < 3) & (minute < p["icu_minutes"][stay])
    frame = pl.DataFrame(
        {
            "stay": stay[kept],
            "culturetakenoffset": minute[kept],
            "culturesite": pl.Series(CULTURE_SITES).gather(site[kept]),
            "organism": pl.Series(CULTURE_RESULTS).gather(organism[kept] % len(CULTURE_RESULTS)),
        }
    )
    rows.put("microLab", frame)


def write_apache(patients: Patients, rng: np.random.Generator, rows: Rows) -> None:
    """apacheApsVar: the worst values of the first day (they leak into any shorter window); -1 where missing.

    Args:
        patients: the simulated stays.
        rng: source of randomness.
        rows: takes the next rows of a table, with ids.
    """
    p, h = patients.stays, patients.hours
    day = h["hour"] < 24
    stay, count = h["stay"][day], len(p["age"])
    sizes = np.maximum(np.bincount(stay, minlength=count), 1)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def worst(name: str, low: bool = False, decimals: int = 0, share: float = 1.0) -> pl.Series:
        values = (np.minimum if low else np.maximum).reduceat(h[name][day], starts)
        return as_text(np.where(rng.random(count) < share, values, -1), decimals)

    vent = worst("vent")
    chosen = np.flatnonzero((rng.random(count) < 0.88) & ~p["silent"])
    frame = pl.DataFrame(
        {
            "intubated": vent,
            "vent": vent,
            **{name: worst(name, low=True) for name in ("eyes", "motor", "verbal")},
            "urine": as_text(np.add.reduceat(h["urine"][day], starts), 0),
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
            "fio2": as_text(
                np.where(rng.random(count) < 0.25, 100 * np.maximum.reduceat(h["fio2"][day], starts), -1), 0
            ),
        }
    )
    rows.put("apacheApsVar", frame.with_columns(stay=np.arange(count))[chosen], dialysis=0, meds=0)
