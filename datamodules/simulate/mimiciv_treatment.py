"""Simulated patients -> MIMIC-IV-shaped tables of what is done to them: drugs, fluids, urine, ventilation, cultures."""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.simulate.habits import (
    ANTIBIOTICS,
    Add,
    Calendar,
    Event,
    Orders,
    as_text,
    charting_delay,
    rate_intervals,
    specimens,
    spoil,
    stack,
    twice,
)
from datamodules.simulate.patient import Patients

PUMP_ITEMS = (  # drug, item, step of the pump, highest rate that a typing error leaves
    ("norepinephrine", 221906, 0.01, 8.0),
    ("epinephrine", 221289, 0.01, 4.0),
    ("dopamine", 221662, 1.0, 120.0),
    ("dobutamine", 221653, 1.0, 120.0),
    ("phenylephrine", 221749, 0.1, 40.0),
    ("vasopressin", 222315, 0.6, 40.0),
)
IRRIGANT_IN_ITEM, IRRIGANT_OUT_ITEM = 227488, 227489
SPECIMEN_ITEMS = (  # specimen item and name, test item and name
    (70012, "BLOOD CULTURE", 90201, "Blood Culture, Routine"),
    (70079, "URINE", 90039, "URINE CULTURE"),
    (70062, "SPUTUM", 90055, "RESPIRATORY CULTURE"),
    (70091, "MRSA SCREEN", 90189, "MRSA SCREEN"),
)
ORGANISM_ITEMS = (
    (80002, "ESCHERICHIA COLI"),
    (80023, "STAPH AUREUS COAG +"),
    (80004, "KLEBSIELLA PNEUMONIAE"),
    (80026, "PSEUDOMONAS AERUGINOSA"),
    (80053, "ENTEROCOCCUS SP."),
)


def write_inputevents(patients: Patients, dates: Calendar, orders: Orders, rng: np.random.Generator, add: Add) -> None:
    """Add inputevents: drips as intervals of constant rate, fluid boluses, antibiotic doses.

    They are stored after their start, see ``charting_delay``. Between normal rates stand a few that no pump could give.
    A few rows stand twice, equal in every column, and a few also as they were before a correction ("Rewritten").

    Args:
        patients: the simulated stays.
        dates: ids and times of the stays.
        orders: of antibiotics, as ``antibiotic_orders`` gives them.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    p, h, frames = patients.stays, patients.hours, []
    slips = rng.spawn(1)[0]
    drip, bolus, antibiotic = "01-Drips", "03-IV Fluid Bolus", "08-Antibiotics (IV)"

    def give(stay: NDArray, start: NDArray, end: NDArray, item: int, amount: NDArray, kind: str, **fields: Any) -> None:
        keep = (end > start) & ~p["silent"][stay]
        columns = {
            "stay": stay.astype(np.int64),
            "start": start.astype(np.int64),
            "end": end.astype(np.int64),
            "amount": amount,
        }
        frame = pl.DataFrame({**columns, **{k: v for k, v in fields.items() if isinstance(v, np.ndarray)}})
        constant = {
            "itemid": item,
            "ordercategoryname": kind,
            **{k: v for k, v in fields.items() if isinstance(v, str)},
        }
        frames.append(frame.with_columns(pl.lit(v).alias(k) for k, v in constant.items()).filter(pl.Series(keep)))

    for drug, item, step, highest in PUMP_ITEMS:
        stay, first, after, rate = rate_intervals(patients, drug, step)
        start = np.minimum(first * 60 + dates.pad[stay], p["icu_minutes"][stay])
        end = np.minimum(after * 60 + dates.pad[stay], p["icu_minutes"][stay])
        weight = p["weight"][stay]
        given, charted = rate * (end - start) / 60, _mistyped(rate, stay, highest, slips)
        if drug == "vasopressin":
            give(stay, start, end, item, given, drip, rate=charted, rateuom="units/hour", amountuom="units")
            continue
        given = given * weight * 60 / 1000
        if drug == "phenylephrine" and rng.random() < 0.3:  # charted per minute, not per kg
            give(stay, start, end, item, given, drip, rate=charted * weight, rateuom="mcg/min", amountuom="mg")
        else:
            give(stay, start, end, item, given, drip, rate=charted, rateuom="mcg/kg/min", amountuom="mg")
    low = np.flatnonzero(h["bolus"])
    stay, start, volume = h["stay"][low], h["hour"][low] * 60 + 10, h["bolus"][low]
    give(stay, start, start + 30, 225158, volume, bolus, rate=2 * volume, rateuom="mL/hour", amountuom="ml")
    stay, drug_index, begin, stop = orders
    for index, drug_row in enumerate(ANTIBIOTICS):
        for hours in range(0, 216, 8 if index == 1 else 12):
            at = begin + 60 * hours
            due = (drug_index == index) & (at < stop) & (at >= 0) & (at < p["icu_minutes"][stay])
            give(stay[due], at[due], at[due] + 1, drug_row.itemid, np.ones(due.sum()), antibiotic, amountuom="dose")
    rows = pl.concat(frames, how="diagonal").sort("stay", "start", maintain_order=True)
    stay, delay = rows["stay"].to_numpy(), charting_delay(rows.height, slips)
    rows = rows.with_columns(
        **dates.ids(stay),
        starttime=dates.when(stay, rows["start"].to_numpy()),
        endtime=dates.when(stay, rows["end"].to_numpy()),
        storetime=dates.when(stay, rows["start"].to_numpy() + delay),
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
    corrected = np.flatnonzero((rows["ordercategoryname"] == drip).to_numpy() & (slips.random(rows.height) < 0.01))
    before = rows[corrected].with_columns(
        rate=pl.col("rate") * slips.uniform(0.3, 3, len(corrected)),
        storetime="starttime",
        statusdescription=pl.lit("Rewritten"),
    )
    add("icu/inputevents", twice(pl.concat([rows, before]).sort("stay", "start", maintain_order=True), rng))


def _mistyped(rate: NDArray, stay: NDArray, highest: float, rng: np.random.Generator) -> NDArray:
    """Rates of which 1 % of those that stand between two others of their stay are far above what is plausible."""
    inside = (stay[1:-1] == stay[:-2]) & (stay[1:-1] == stay[2:])
    wrong = np.flatnonzero(inside & (rng.random(len(inside)) < 0.01)) + 1
    rate = rate.copy()
    rate[wrong] = rng.uniform(highest / 2, highest, len(wrong)).round(2)
    return rate


def write_outputevents(patients: Patients, dates: Calendar, rng: np.random.Generator, add: Add) -> None:
    """Add outputevents and procedureevents: urine by the hour (catheter) or every four (void), invasive ventilation.

    A few bladders are irrigated: what goes in and what comes out (urine and irrigant together) are charted at different
    minutes of the hour, and what goes in sometimes with a minus sign. Rows are stored later, see ``charting_delay``.

    Args:
        patients: the simulated stays.
        dates: ids and times of the stays.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    p, h = patients.stays, patients.hours
    stay, hour = h["stay"], h["hour"]
    minute = hour * 60 + dates.pad[stay]
    foley = p["foley"][stay]
    slips = rng.spawn(1)[0]
    delay = charting_delay(len(stay), slips)
    charted = ~p["silent"][stay] & (minute <= p["icu_minutes"][stay])
    irrigated = charted & p["irrigated"][stay] & (hour >= 6) & (hour < 36)
    at = np.flatnonzero(charted & (foley | (hour % 4 == 3)))
    total = np.cumsum(h["urine"])
    four = total - np.where(np.arange(len(stay)) >= 4, np.roll(total, 4), 0)
    volume = np.where(foley, h["urine"], four)[at]
    volume, kept = spoil(volume, rng), ~irrigated[at]
    at = at[kept]
    fields: dict[str, Any] = {"itemid": np.where(foley[at], 226559, 226560), "valueuom": "mL", "delay": delay[at]}
    events = [Event(stay[at], minute[at], as_text(volume[kept], 0), fields)]
    at = np.flatnonzero(irrigated)
    irrigant = slips.integers(2, 11, len(at)) * 100
    sign = np.where(slips.random(len(at)) < 0.2, -1, 1)
    for item, volume, late in (
        (IRRIGANT_IN_ITEM, irrigant * sign, 5),
        (IRRIGANT_OUT_ITEM, irrigant + h["urine"][at], 35),
    ):
        fields = {"itemid": item, "valueuom": "mL", "delay": delay[at]}
        then = hour[at] * 60 + late + slips.integers(0, 20, len(at))
        events.append(Event(stay[at], then, as_text(volume, 0), fields))
    rows = twice(stack(events), rng)
    index, minute = rows["stay"].to_numpy(), rows["minute"].to_numpy()
    times = {
        "charttime": dates.when(index, minute),
        "storetime": dates.when(index, minute + rows["delay"].to_numpy()),
    }
    add("icu/outputevents", rows.with_columns(**dates.ids(index), **times))
    index, first, after, _ = rate_intervals(patients, "vent", 1.0)
    start, end = first * 60, np.minimum(after * 60, p["icu_minutes"][index])
    times = {
        "starttime": dates.when(index, start),
        "endtime": dates.when(index, end),
        "storetime": dates.when(index, end),
    }
    frame = pl.DataFrame({**dates.ids(index), **times, "value": end - start, "patientweight": p["weight"][index]})
    constant = {
        "itemid": 225792,
        "valueuom": "min",
        "ordercategoryname": "Ventilation",
        "statusdescription": "FinishedRunning",
    }
    add("icu/procedureevents", frame.with_columns(pl.lit(v).alias(k) for k, v in constant.items()))


def write_orders_and_cultures(
    patients: Patients, dates: Calendar, orders: Orders, base: int, rng: np.random.Generator, add: Add
) -> None:
    """Add prescriptions (antibiotics, and drugs that must not be taken for them) and microbiologyevents.

    Growth is stored one to three days after the specimen, its absence after two to five.

    Args:
        patients: the simulated stays.
        dates: ids and times of the stays.
        orders: of antibiotics, as ``antibiotic_orders`` gives them.
        base: number of stays already written, from which the ids are counted.
        rng: source of randomness.
        add: takes the next rows of a table.
    """
    count = len(patients.stays["age"])
    stay, drug, start, stop = orders
    route, kind = np.full(len(stay), "IV"), np.full(len(stay), "MAIN")
    names = np.array([a.drug for a in ANTIBIOTICS])[drug]
    decoys = (
        ("Heparin", "SC", "MAIN"),
        ("0.9% Sodium Chloride", "IV", "BASE"),
        ("Erythromycin 0.5% Ophth Oint", "OU", "MAIN"),
    )
    for name, way, sort in decoys:
        also = np.flatnonzero(rng.random(count) < (0.02 if way == "OU" else 0.5))
        stay, start, stop = np.append(stay, also), np.append(start, 0 * also), np.append(stop, 0 * also + 2880)
        names, route = np.append(names, np.full(len(also), name)), np.append(route, np.full(len(also), way))
        kind = np.append(kind, np.full(len(also), sort))
    times = {"starttime": dates.when(stay, start, grain=3600), "stoptime": dates.when(stay, stop, grain=3600)}
    frame = pl.DataFrame(
        {**dates.ids(stay, "subject", "hadm"), **times, "drug_type": kind, "drug": names, "route": route}
    )
    add("hosp/prescriptions", frame.with_columns(pharmacy_id=base * 20 + np.arange(len(stay)) + 40_000_000))

    stay, minute, specimen, organism = specimens(patients, rng)
    time = dates.when(stay, minute)
    where = pl.Series(specimen)
    named = np.where(organism >= 0, organism, len(ORGANISM_ITEMS))
    wait = rng.spawn(1)[0].uniform(1, 3, len(stay)) * 1440
    stored = dates.when(stay, minute + np.where(organism >= 0, wait, wait * 5 / 3 + 400).astype(np.int64))
    frame = pl.DataFrame(
        {
            **dates.ids(stay, "subject", "hadm"),
            "microevent_id": base * 10 + np.arange(len(stay)),
            "micro_specimen_id": 5_000_000 + base * 10 + np.arange(len(stay)),
            "chartdate": time.str.slice(0, 10) + " 00:00:00",
            "charttime": pl.DataFrame({"t": time, "k": rng.random(len(stay)) > 0.034})
            .select(pl.when("k").then("t"))
            .to_series(),
            "spec_itemid": pl.Series([s[0] for s in SPECIMEN_ITEMS]).gather(where),
            "spec_type_desc": pl.Series([s[1] for s in SPECIMEN_ITEMS]).gather(where),
            "test_itemid": pl.Series([s[2] for s in SPECIMEN_ITEMS]).gather(where),
            "test_name": pl.Series([s[3] for s in SPECIMEN_ITEMS]).gather(where),
            "org_itemid": pl.Series([*(o[0] for o in ORGANISM_ITEMS), None]).gather(named),
            "org_name": pl.Series([*(o[1] for o in ORGANISM_ITEMS), None]).gather(named),
        }
    )
    add(
        "hosp/microbiologyevents",
        frame.with_columns(test_seq=pl.lit(1), storedate=stored.str.slice(0, 10) + " 00:00:00", storetime=stored),
    )
