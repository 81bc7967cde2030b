"""What the simulated systems share: habits of hospitals, laboratory catalogue, typing errors, what is ordered, row ids.

The values come from ``patient.simulate_stays``; this file decides what is charted, how often and how badly: about
0.1 % of the charted numbers are typing errors, 0.3 % of the rows stand twice, hospitals differ in density, infusion
units and in the tables that they fill at all. What is charted is entered later than it happened. Simulated data
throughout: no row is of a real patient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.simulate.headers import EICU
from datamodules.simulate.patient import CaseMix, Patients

Add = Callable[[str, pl.DataFrame], None]  # takes the next rows of a table
Orders = tuple[NDArray, NDArray, NDArray, NDArray]  # of antibiotics: stay, which, start minute, stop minute


class Lab(NamedTuple):
    """One laboratory value: the panel it is drawn with, its simulated name and its names in both systems."""

    panel: str
    name: str
    itemid: int
    unit: str
    eicu: str
    eicu_unit: str
    decimals: int


LAB_CATALOGUE: tuple[Lab, ...] = (
    Lab("gas", "ph", 50820, "units", "pH", "", 2),
    Lab("gas", "pao2", 50821, "mm Hg", "paO2", "mm Hg", 0),
    Lab("gas", "paco2", 50818, "mm Hg", "paCO2", "mm Hg", 0),
    Lab("gas", "base_excess", 50802, "mEq/L", "Base Excess", "mEq/L", 0),
    Lab("gas_fio2", "fio2_percent", 50816, "%", "FiO2", "%", 0),
    Lab("gas_lactate", "lactate", 50813, "mmol/L", "lactate", "mmol/L", 1),
    Lab("gas_extra", "spo2", 50817, "%", "O2 Sat (%)", "%", 0),
    Lab("gas_extra", "calcium_ionized", 50808, "mmol/L", "ionized calcium", "mmol/L", 2),
    Lab("gas_rare", "methemoglobin", 50814, "%", "Methemoglobin", "%", 1),
    Lab("chemistry", "sodium", 50983, "mEq/L", "sodium", "mmol/L", 0),
    Lab("chemistry", "potassium", 50971, "mEq/L", "potassium", "mmol/L", 1),
    Lab("chemistry", "chloride", 50902, "mEq/L", "chloride", "mmol/L", 0),
    Lab("chemistry", "bicarbonate", 50882, "mEq/L", "bicarbonate", "mmol/L", 0),
    Lab("chemistry", "anion_gap", 50868, "mEq/L", "anion gap", "", 0),
    Lab("chemistry", "bun", 51006, "mg/dL", "BUN", "mg/dL", 0),
    Lab("chemistry", "creatinine", 50912, "mg/dL", "creatinine", "mg/dL", 1),
    Lab("chemistry", "glucose", 50931, "mg/dL", "glucose", "mg/dL", 0),
    Lab("chemistry", "calcium", 50893, "mg/dL", "calcium", "mg/dL", 1),
    Lab("chemistry", "magnesium", 50960, "mg/dL", "magnesium", "mg/dL", 1),
    Lab("chemistry", "phosphate", 50970, "mg/dL", "phosphate", "mg/dL", 1),
    Lab("count", "wbc", 51301, "K/uL", "WBC x 1000", "K/mcL", 1),
    Lab("count", "hemoglobin", 51222, "g/dL", "Hgb", "g/dL", 1),
    Lab("count", "hematocrit", 51221, "%", "Hct", "%", 1),
    Lab("count", "platelets", 51265, "K/uL", "platelets x 1000", "K/mcL", 0),
    Lab("count", "mcv", 51250, "fL", "MCV", "fL", 0),
    Lab("count", "mch", 51248, "pg", "MCH", "pg", 1),
    Lab("count", "mchc", 51249, "g/dL", "MCHC", "g/dL", 1),
    Lab("differential", "neutrophils", 51256, "%", "-polys", "%", 1),
    Lab("differential", "lymphocytes", 51244, "%", "-lymphs", "%", 1),
    Lab("differential", "bands", 51144, "%", "-bands", "%", 0),
    Lab("liver", "bilirubin", 50885, "mg/dL", "total bilirubin", "mg/dL", 1),
    Lab("liver", "alt", 50861, "IU/L", "ALT (SGPT)", "Units/L", 0),
    Lab("liver", "ast", 50878, "IU/L", "AST (SGOT)", "Units/L", 0),
    Lab("liver", "alkaline_phosphatase", 50863, "IU/L", "alkaline phos.", "Units/L", 0),
    Lab("liver", "albumin", 50862, "g/dL", "albumin", "g/dL", 1),
    Lab("liver_extra", "bilirubin_direct", 50883, "mg/dL", "direct bilirubin", "mg/dL", 1),
    Lab("coagulation", "inr", 51237, "", "PT - INR", "ratio", 1),
    Lab("coagulation", "ptt", 51275, "sec", "PTT", "sec", 1),
    Lab("fibrinogen", "fibrinogen", 51214, "mg/dL", "fibrinogen", "mg/dL", 0),
    Lab("cardiac", "ck", 50910, "IU/L", "CPK", "Units/L", 0),
    Lab("cardiac", "ck_mb", 50911, "ng/mL", "CPK-MB", "ng/mL", 0),
    Lab("cardiac", "troponin_t", 51003, "ng/mL", "troponin - T", "ng/mL", 2),
    Lab("crp", "crp", 50889, "mg/L", "CRP", "mg/L", 1),
)


class Antibiotic(NamedTuple):
    """One antibiotic: name and administration item in MIMIC-IV; order name, HICL code and treatment string in eICU."""

    drug: str
    itemid: int
    order: str
    hicl: int
    treatment_string: str


ANTIBIOTICS: tuple[Antibiotic, ...] = (
    Antibiotic("Vancomycin", 225798, "VANCOMYCIN 1.25 GM IN NS 250 ML IVPB (REPACKAGE)", 10093, "vancomycin"),
    Antibiotic(
        "Piperacillin-Tazobactam",
        225893,
        "PIPERACILLIN-TAZOBACTAM 3.375 G",
        8738,
        "penicillins|piperacillin/tazobactam",
    ),
    Antibiotic("CefePIME", 225851, "CEFEPIME HCL 2 G IJ SOLR", 10132, "fourth generation cephalosporin|cefepime"),
    Antibiotic("CeftriaXONE", 225855, "CEFTRIAXONE 1 GM IVPB", 3996, "third generation cephalosporin|ceftriaxone"),
    Antibiotic("Meropenem", 225883, "MEROPENEM 1 GM VIAL", 11254, "carbapenem|meropenem"),
    Antibiotic("Levofloxacin", 225879, "LEVOFLOXACIN 750 MG/150 ML IVPB", 12383, "quinolone|levofloxacin"),
    Antibiotic("CefazoLIN", 225850, "CEFAZOLIN 2 GM IVPB", 26808, "first generation cephalosporin|cefazolin"),
)


URINE_CELLS = ("Urine", "URINE CATHETER", "Urinary Catheter Output: Indwelling/Continuous Ure")
PUMP_UNITS = ("mcg/min", "ml/hr", "", "mcg/kg/min")


class Hospitals:
    """The habits of the simulated hospitals, one entry each."""

    def __init__(self, mix: CaseMix, rng: np.random.Generator) -> None:
        count = mix.hospitals
        self.id = 100 + 7 * np.arange(count)
        self.density = rng.uniform(0.45, 1.0, count)  # of vital signs and of draws beyond the daily one
        self.pump = rng.choice(len(PUMP_UNITS), count, p=(0.46, 0.40, 0.09, 0.05))
        self.strong = rng.random(count) < 0.15  # pumps in mL/h are filled with twice the usual concentration
        self.fills = {  # does the hospital fill the table at all?
            table: rng.random(count) < share
            for table, share in (
                ("infusionDrug", 0.68),
                ("medication", 0.78),
                ("intakeOutput", 0.88),
                ("microLab", 0.1),
                ("nurse", 0.85),
            )
        }
        self.fills["infusionDrug"][:2] = self.fills["medication"][:2] = True  # the two largest fill them
        self.urine_every = rng.choice((1, 2, 4, 6), count, p=(0.3, 0.3, 0.25, 0.15))
        self.urine_cell = rng.choice(len(URINE_CELLS), count, p=(0.8, 0.12, 0.08))
        self.named = rng.uniform(0.2, 1.0, count)  # share of orders whose drug is named, not only coded
        self.fraction = rng.random(count) < 0.1  # oxygen as 0.4 instead of 40
        self.fahrenheit = rng.random(count) < 0.2
        self.assay = {lab.name: np.exp(rng.normal(0, 0.06 * mix.offset, count)) for lab in LAB_CATALOGUE}
        for name in ("lactate", "creatinine", "bilirubin", "troponin_t", "crp", "bun"):
            self.assay[name] = np.exp(rng.normal(0, 0.2 * mix.offset, count))
        for name in ("ph", "spo2", "sodium", "chloride", "fio2_percent"):  # well standardised, or set
            self.assay[name] = np.ones(count)
        self.pressure = rng.normal(0, 5 * mix.offset, count)  # offset of the cuffs, mmHg
        self.pump_every = rng.choice((1, 2, 4, 8), count, p=(0.2, 0.25, 0.4, 0.15))  # hours, while a rate holds


class Event(NamedTuple):
    """Rows of one item: index of the stay, minute since ICU admission, charted text or number, fields of the item."""

    stay: NDArray
    minute: NDArray
    value: NDArray | pl.Series
    fields: dict[str, Any]


def as_text(values: NDArray, decimals: int) -> pl.Series:
    """Numbers as a nurse or a laboratory would write them: 7.40 -> "7.4", 80.0 -> "80".

    Args:
        values: one per row.
        decimals: digits after the point that are kept.
    """
    return pl.Series(np.round(values, decimals) + 0.0, dtype=pl.Float64).cast(pl.String).str.strip_suffix(".0")


def spoil(values: NDArray, rng: np.random.Generator, rate: float = 0.001) -> NDArray:
    """Replace a few values by what typing errors and loose cables leave behind.

    Args:
        values: one per row.
        rng: source of randomness.
        rate: share of the values.
    """
    values = np.array(values, float)
    where = np.flatnonzero(rng.random(len(values)) < rate)
    wrong = np.stack([np.zeros(len(where)), -values[where], values[where] * 10, np.full(len(where), 9999.0)])
    values[where] = wrong[rng.integers(0, 4, len(where)), np.arange(len(where))]
    return values


def twice(frame: pl.DataFrame, rng: np.random.Generator, rate: float = 0.003) -> pl.DataFrame:
    """The frame with a few of its rows standing twice.

    Args:
        frame: rows of a table.
        rng: source of randomness.
        rate: share of the rows.
    """
    return pl.concat([frame, frame[np.flatnonzero(rng.random(frame.height) < rate)]])


def charting_delay(size: int, rng: np.random.Generator) -> NDArray:
    """Minutes from a charted time to its entry by staff: up to an hour for most, some hours for 4 %.

    Args:
        size: number of entries.
        rng: source of randomness.
    """
    late = rng.random(size) < 0.04
    return np.where(late, rng.integers(120, 360, size), rng.integers(0, 61, size))


def laboratory_delay(size: int, rng: np.random.Generator) -> NDArray:
    """Minutes from a draw to its results: 65 in the median, up to 8 hours.

    Args:
        size: number of draws.
        rng: source of randomness.
    """
    return np.clip(np.exp(rng.normal(np.log(65), 0.6, size)), 10, 480).astype(np.int64)


def later_entry(minute: NDArray | pl.Series, rng: np.random.Generator) -> NDArray:
    """When rows are entered: a quarter of them up to four hours after the minute that they are for, the others at once.

    Args:
        minute: since ICU admission, one per row.
        rng: source of randomness.
    """
    late = rng.random(len(minute)) < 0.25
    return np.asarray(minute) + np.where(late, rng.integers(1, 241, len(minute)), 0)


def scatter(frame: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """The rows in no order.

    Args:
        frame: rows of a table.
        rng: source of randomness.
    """
    return frame[rng.permutation(frame.height)]


def stack(events: list[Event]) -> pl.DataFrame:
    """All events as one frame.

    Args:
        events: rows item by item.

    Returns:
        Columns ``stay``, ``minute``, ``value`` (text, null if empty) and the fields, sorted by stay and minute.
    """
    frames = []
    for event in events:
        value = event.value if isinstance(event.value, pl.Series) else as_text(event.value, 1)
        columns = {
            "stay": event.stay.astype(np.int64),
            "minute": event.minute.astype(np.int64),
            "value": value.rename("value"),
        }
        columns |= {name: field for name, field in event.fields.items() if isinstance(field, np.ndarray | pl.Series)}
        constant = {name: field for name, field in event.fields.items() if name not in columns}
        frames.append(pl.DataFrame(columns).with_columns(pl.lit(field).alias(name) for name, field in constant.items()))
    return pl.concat(frames, how="diagonal_relaxed").sort("stay", "minute", maintain_order=True)


def lab_values(patients: Patients, hospitals: Hospitals) -> dict[str, NDArray]:
    """What the hospitals' assays read, before rounding and errors.

    Args:
        patients: the simulated stays.
        hospitals: their hospitals.

    Returns:
        Name in ``LAB_CATALOGUE`` -> values in its unit, one per stay and hour.
    """
    h, hospital = patients.hours, patients.stays["hospital"][patients.hours["stay"]]
    values = {**h, "fio2_percent": h["fio2"] * 100, "anion_gap": h["sodium"] - h["chloride"] - h["bicarbonate"]}
    return {lab.name: values[lab.name] * hospitals.assay[lab.name][hospital] for lab in LAB_CATALOGUE}


def cuff_values(patients: Patients, hospitals: Hospitals) -> dict[str, NDArray]:
    """Pressures as the hospitals' cuffs read them, before rounding and errors.

    Args:
        patients: the simulated stays.
        hospitals: their hospitals.

    Returns:
        "systolic", "diastolic" and "map_read" -> mmHg, one per stay and hour.
    """
    offset = hospitals.pressure[patients.stays["hospital"][patients.hours["stay"]]]
    return {name: patients.hours[name] + offset for name in ("systolic", "diastolic", "map_read")}


def draw_minutes(patients: Patients, rng: np.random.Generator) -> NDArray:
    """The minute of a draw in each hour, since ICU admission; in the first hour it may be before it.

    Args:
        patients: the simulated stays.
        rng: source of randomness.

    Returns:
        One minute per stay and hour.
    """
    hour = patients.hours["hour"]
    jitter = rng.integers(-50, 50, len(hour))
    return hour * 60 + np.where(hour == 0, jitter, (jitter + 50) * 59 // 100 + 1)


def panel_draws(patients: Patients, rng: np.random.Generator, density: NDArray) -> dict[str, NDArray]:
    """When each panel is drawn.

    Args:
        patients: the simulated stays.
        rng: source of randomness.
        density: one factor per stay for draws beyond the daily one.

    Returns:
        Panel -> indices into the hours of ``patients``.
    """
    h, stay = patients.hours, patients.hours["stay"]
    count, size = len(density), len(stay)
    first, sick = h["hour"] == 0, np.clip(h["severity"], 0, 3) * density[stay]
    daily = first | ((h["hour"] + rng.integers(0, 24, count)[stay]) % 24 == 0)
    invasive = (h["vent"] > 0) | (h["dose"] > 0)

    def chance(share: NDArray | float) -> NDArray:
        return rng.random(size) < share

    gas = chance(invasive * 0.16 * density[stay] + 0.008 + 0.01 * sick) | (first & (invasive | chance(0.25)))
    chemistry = daily | chance(0.02 * sick)
    heart = np.isin(patients.stays["unit"][stay], (2, 3))
    panels = {
        "gas": gas,
        "gas_fio2": gas & chance(0.6),
        "gas_lactate": (gas & chance(0.8)) | (daily & chance(0.2 + 0.1 * sick)),
        "gas_extra": gas & chance(0.5),
        "gas_rare": gas & chance(0.03),
        "chemistry": chemistry,
        "count": chemistry & chance(0.93),
        "differential": daily & chance(0.3),
        "liver": daily & chance(0.35 + 0.1 * sick),
        "liver_extra": daily & chance(0.04),
        "coagulation": daily & chance(0.55),
        "fibrinogen": daily & chance(0.06 + 0.05 * sick),
        "cardiac": (h["hour"] % 8 == 0) & (h["hour"] < 24) & chance(np.where(heart, 0.8, 0.12)),
        "crp": daily & chance(0.06),
    }
    return {name: np.flatnonzero(mask & ~patients.stays["silent"][stay]) for name, mask in panels.items()}


def rate_intervals(patients: Patients, drug: str, step: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Intervals of constant rate, zero rates left out.

    Args:
        patients: the simulated stays.
        drug: a name in their hours.
        step: what rates are rounded to, in the drug's unit.

    Returns:
        Stay, first hour, hour after the last, and rate, one entry per interval.
    """
    stay, hour = patients.hours["stay"], patients.hours["hour"]
    level = np.round(patients.hours[drug] / step).astype(np.int64)
    change = np.ones(len(stay), bool)
    change[1:] = (level[1:] != level[:-1]) | (stay[1:] != stay[:-1])
    start = np.flatnonzero(change)
    end = np.append(start[1:], len(stay)) - 1
    keep = (level[start] > 0) & ~patients.stays["silent"][stay[start]]
    start, end = start[keep], end[keep]
    return stay[start], hour[start], hour[end] + 1, level[start] * step


def antibiotic_orders(patients: Patients, rng: np.random.Generator) -> Orders:
    """Who gets which antibiotic when: infected stays one or two, some others a prophylaxis.

    Args:
        patients: the simulated stays.
        rng: source of randomness.

    Returns:
        Stay, index into ``ANTIBIOTICS``, start and stop minute since ICU admission, one entry per order.
    """
    p = patients.stays
    begin = (p["onset_minute"] + rng.integers(30, 400, len(p["age"]))) // 60 * 60
    treated = p["infected"] & (rng.random(len(begin)) < 0.96) & (begin < p["icu_minutes"])
    broad, glyco = np.flatnonzero(treated), np.flatnonzero(treated & (rng.random(len(begin)) < 0.6))
    surgery = np.flatnonzero(
        ~p["infected"] & (rng.random(len(begin)) < np.where(np.isin(p["unit"], (1, 3)), 0.6, 0.05))
    )
    stay = np.concatenate([broad, glyco, surgery])
    drug = np.concatenate([rng.integers(1, 6, len(broad)), np.zeros(len(glyco), np.int64), np.full(len(surgery), 6)])
    start = np.concatenate([begin[broad], begin[glyco] + 60, np.full(len(surgery), -60)])
    planned = np.where(drug == 6, start + 1440, start + rng.integers(36, 200, len(stay)) * 60)
    return stay, drug, start, np.minimum(planned, np.maximum(p["discharge_minute"][stay], start + 60))


def specimens(patients: Patients, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Which specimens are taken when, and what grows.

    Args:
        patients: the simulated stays.
        rng: source of randomness.

    Returns:
        One entry per specimen: stay, minute since ICU admission, kind (0 blood, 1 urine, 2 sputum, 3 MRSA screen) and
        organism (-1 none).
    """
    p = patients.stays
    count = len(p["age"])
    taken = p["onset_minute"] + np.where(
        rng.random(count) < 0.75, rng.integers(-300, 60, count), rng.integers(60, 900, count)
    )
    parts = []
    for which, share in enumerate((0.85, 0.55, 0.3)):
        chosen = np.flatnonzero((p["infected"] & (rng.random(count) < share)) | (rng.random(count) < 0.06))
        parts.append(
            (
                chosen,
                np.where(p["infected"], taken, rng.integers(-300, 2000, count))[chosen],
                np.full(len(chosen), which),
            )
        )
    screened = np.flatnonzero(rng.random(count) < 0.4)
    parts.append((screened, rng.integers(60, 600, len(screened)), np.full(len(screened), 3)))
    stay, minute, kind = (np.concatenate(column) for column in zip(*parts, strict=True))
    positive = rng.random(len(stay)) < np.where(p["infected"][stay], 0.3, 0.05)
    return stay, minute, kind, np.where(positive, rng.integers(0, 5, len(stay)), -1)


MIMICIV_FIRST_STAY, EICU_FIRST_STAY = 30_000_000, 140_000  # id of the first stay


class Rows:
    """Adds rows with the id of their stay and a number of their own."""

    def __init__(self, base: int, add: Add) -> None:
        self.base, self.add, self.count = base, add, dict.fromkeys(EICU, 0)

    def put(self, table: str, frame: pl.DataFrame, **constant: Any) -> None:
        """Add rows.

        Args:
            table: its name.
            frame: the rows; column ``stay`` is the index of the stay.
            constant: further columns.
        """
        first = self.base * 50_000 + self.count[table]  # no table has so many rows per stay
        self.count[table] += frame.height
        number = EICU[table].split(",")[0]
        frame = frame.with_columns(pl.Series(number, first + np.arange(frame.height)))
        stay = EICU_FIRST_STAY + self.base + pl.col("stay").cast(pl.Int64)  # the number of a row of patient is its stay
        self.add(table, frame.with_columns(patientunitstayid=stay, **{k: pl.lit(v) for k, v in constant.items()}))


class Calendar:
    """Ids and shifted dates of some stays: every patient's first ICU admission lies between 2110 and 2190."""

    def __init__(self, patients: Patients, base: int, rng: np.random.Generator) -> None:
        p = patients.stays
        origin = rng.integers(4_418_064_000, 6_942_585_600, len(p["age"]))  # 2110 .. 2189, seconds since 1970
        self.seconds = origin[p["first"]] + p["since_minute"] * 60
        self.pad = -(-self.seconds // 3600) * 60 - self.seconds // 60  # minutes to the next full hour of the clock
        self.subject, self.hadm = 10_000_000 + base + p["first"], 20_000_000 + base + p["admission"]
        self.stay = MIMICIV_FIRST_STAY + base + np.arange(len(p["age"]))

    def when(self, stay: NDArray, minute: NDArray, grain: int = 60) -> pl.Series:
        """Minute since ICU admission -> "YYYY-MM-DD HH:MM:SS", on the full minute as staff writes it.

        Args:
            stay: index of the stay, one entry per row.
            minute: since ICU admission, one entry per row.
            grain: seconds that times are rounded down to.
        """
        return (
            pl.Series((self.seconds[stay] + minute * 60) // grain * grain * 1000)
            .cast(pl.Datetime("ms"))
            .dt.to_string("%Y-%m-%d %H:%M:%S")
        )

    def ids(self, stay: NDArray, *names: str) -> dict[str, NDArray]:
        return {f"{name}_id": getattr(self, name)[stay] for name in names or ("subject", "hadm", "stay")}
