"""The shared clinical variables: one row each, the same names and units for every hospital.

A source file (``mimiciv.py``, ``eicu.py``, ``physionet.py``) says where a concept is charted; this file says what it
is: its unit, the range outside which a charted value is taken for a charting error, and how several values within
one hour become one.

Sources of the plausible ranges:
  [V] mimic-code ``measurement/vitalsign.sql`` (MIT)      https://github.com/MIT-LCP/mimic-code
  [E] eicu-code ``pivoted/pivoted-lab.sql``, ``pivoted-bg.sql``, ``pivoted-gcs.sql``, ``pivoted-weight.sql`` (MIT)
  [R] accepted infusion rates used by the public eICU and MIMIC pipelines (Bennett 2023, doi:10.1093/gigascience/giad041)
  [P] physiological or assay limits set by this project, wide enough to keep every survivable value
"""

from typing import NamedTuple

import polars as pl


class Concept(NamedTuple):
    """One clinical variable.

    Attributes:
        name: the name used in every table, model and report.
        unit: the unit in which values are stored.
        low: smallest plausible value, inclusive.
        high: largest plausible value, inclusive.
        hourly: how an hour's values become one: "mean", "sum" (volumes), or "rate" (a step function that holds from one
            record to the next and is averaged over time).
        source: source of the range, see the head of this file.
        treatment: True where the variable is a treatment or, like urine, the response that it is titrated to.
    """

    name: str
    unit: str
    low: float
    high: float
    hourly: str = "mean"
    source: str = "P"
    treatment: bool = False


CONCEPTS: tuple[Concept, ...] = (
    # vital signs
    Concept("heart_rate", "/min", 0, 300, source="V"),
    Concept("systolic_bp", "mmHg", 0, 400, source="V"),  # catheter or cuff, see *_cuff
    Concept("diastolic_bp", "mmHg", 0, 300, source="V"),
    Concept("mean_bp", "mmHg", 0, 300, source="V"),
    Concept("systolic_bp_cuff", "mmHg", 0, 400, source="V"),  # only where the publisher's benchmark keeps the cuff apart
    Concept("diastolic_bp_cuff", "mmHg", 0, 300, source="V"),
    Concept("mean_bp_cuff", "mmHg", 0, 300, source="V"),
    Concept("respiratory_rate", "/min", 0, 70, source="V"),
    Concept("temperature", "C", 10, 50, source="V"),
    Concept("spo2", "%", 1, 100, source="V"),
    Concept("etco2", "mmHg", 0, 150),
    # consciousness
    Concept("gcs", "points", 3, 15, source="E"),
    Concept("gcs_eyes", "points", 1, 4, source="E"),
    Concept("gcs_verbal", "points", 1, 5, source="E"),
    Concept("gcs_motor", "points", 1, 6, source="E"),
    # blood gas
    Concept("ph", "", 6.5, 8.5, source="E"),
    Concept("paco2", "mmHg", 5, 250, source="E"),
    Concept("pao2", "mmHg", 15, 720, source="E"),
    Concept("sao2", "%", 1, 100),
    Concept("base_excess", "mmol/L", -50, 50),
    Concept("bicarbonate", "mmol/L", 0, 70),
    Concept("lactate", "mmol/L", 0.1, 40),
    Concept("methemoglobin", "%", 0, 100),
    Concept("calcium_ionized", "mmol/L", 0.2, 4),
    # chemistry
    Concept("sodium", "mmol/L", 90, 215, source="E"),
    Concept("potassium", "mmol/L", 0.05, 15, source="E"),
    Concept("chloride", "mmol/L", 50, 175),
    Concept("bun", "mg/dL", 1, 280, source="E"),
    Concept("creatinine", "mg/dL", 0.1, 28.28, source="E"),
    Concept("glucose", "mg/dL", 5, 2000),
    Concept("calcium", "mg/dL", 2, 25),
    Concept("magnesium", "mg/dL", 0.1, 20),
    Concept("phosphate", "mg/dL", 0.1, 30),
    Concept("albumin", "g/dL", 0.5, 6.5, source="E"),
    Concept("bilirubin_total", "mg/dL", 0.1, 75),
    Concept("bilirubin_direct", "mg/dL", 0, 60),
    Concept("alt", "U/L", 0, 25000),
    Concept("ast", "U/L", 0, 40000),
    Concept("alkaline_phosphatase", "U/L", 0, 5000),
    Concept("ck", "U/L", 0, 500000),
    Concept("ck_mb", "ng/mL", 0, 2000),
    Concept("troponin_t", "ng/mL", 0, 100),
    Concept("troponin_i", "ng/mL", 0, 1000),
    Concept("crp", "mg/L", 0, 700),
    Concept("cholesterol", "mg/dL", 20, 1200),
    # blood count and coagulation
    Concept("wbc", "10^9/L", 0, 1000),
    Concept("neutrophils", "%", 0, 100),
    Concept("lymphocytes", "%", 0, 100),
    Concept("bands", "%", 0, 100),
    Concept("hemoglobin", "g/dL", 1, 28),
    Concept("hematocrit", "%", 5, 80),
    Concept("mch", "pg", 5, 70),
    Concept("mchc", "g/dL", 15, 60),
    Concept("mcv", "fL", 30, 180),
    Concept("platelets", "10^9/L", 0, 9999, source="E"),
    Concept("inr", "", 0.5, 25),
    Concept("ptt", "s", 5, 500),
    Concept("fibrinogen", "mg/dL", 10, 2500),
    # body and fluids
    Concept("height", "cm", 60, 250, source="E"),
    Concept("weight", "kg", 20, 300, source="E"),
    Concept("urine", "mL", 0, 5000, hourly="sum", treatment=True),
    # support and treatment
    Concept("fio2", "%", 20, 100, source="E", treatment=True),
    Concept("peep", "cmH2O", 0, 50, treatment=True),
    Concept("ventilation", "level", 0, 2, treatment=True),  # 0 none, 1 non-invasive (mask, high flow), 2 invasive
    Concept("norepinephrine", "mcg/kg/min", 0, 3, hourly="rate", source="R", treatment=True),
    Concept("epinephrine", "mcg/kg/min", 0, 1.5, hourly="rate", source="R", treatment=True),
    Concept("dopamine", "mcg/kg/min", 0, 50, hourly="rate", source="R", treatment=True),
    Concept("dobutamine", "mcg/kg/min", 0, 50, hourly="rate", source="R", treatment=True),
    Concept("phenylephrine", "mcg/kg/min", 0, 15, hourly="rate", treatment=True),
    Concept("vasopressin", "units/h", 0, 12, hourly="rate", treatment=True),
    Concept("milrinone", "mcg/kg/min", 0, 2, hourly="rate", treatment=True),
    Concept("fluids", "mL", 0, 10000, hourly="sum", treatment=True),  # intravenous: crystalloids, colloids, blood, carriers
    # derived in treatment.py, the same for every hospital
    Concept("norepinephrine_equivalent", "mcg/kg/min", 0, 10, hourly="rate", treatment=True),
    Concept("norepinephrine_equivalent_change", "mcg/kg/min", -10, 10, hourly="rate", treatment=True),  # against 3 hours before
    Concept("vasopressor_estimated", "share", 0, 1, hourly="rate", treatment=True),  # the rate's unit had to be assumed
    Concept("urine_rate", "mL/kg/h", 0, 50, treatment=True),  # since the urine charted before
)

NAMES: tuple[str, ...] = tuple(c.name for c in CONCEPTS)
BY_NAME: dict[str, Concept] = {c.name: c for c in CONCEPTS}
CONCEPT = pl.Enum(NAMES)  # the polars type of a ``concept`` column

# (concept, charted unit in lower case without spaces) -> (factor, offset): stored value = charted value * factor + offset.
# A missing unit means the concept's own unit. A unit that is neither here nor the concept's own is "unmapped": the row
# is dropped, counted and shown in the coverage table.
CONVERSIONS: dict[tuple[str, str], tuple[float, float]] = {
    ("temperature", "°f"): (5 / 9, -160 / 9),
    ("temperature", "f"): (5 / 9, -160 / 9),
    ("fio2", "fraction"): (100, 0),
    ("height", "inch"): (2.54, 0),
    ("weight", "lb"): (0.45359237, 0),
    ("weight", "lbs"): (0.45359237, 0),
    ("lactate", "mg/dl"): (1 / 9.008, 0),
    ("creatinine", "umol/l"): (1 / 88.42, 0),
    ("bilirubin_total", "umol/l"): (1 / 17.104, 0),
    ("bilirubin_direct", "umol/l"): (1 / 17.104, 0),
    ("glucose", "mmol/l"): (18.016, 0),
    ("hemoglobin", "g/l"): (0.1, 0),
    ("albumin", "g/l"): (0.1, 0),
    ("fibrinogen", "g/l"): (100, 0),
    ("crp", "mg/dl"): (10, 0),
    ("mchc", "%"): (1, 0),
    ("magnesium", "meq/l"): (1.2153, 0),
    ("calcium_ionized", "mg/dl"): (1 / 4.008, 0),
    ("urine", "l"): (1000, 0),
}

# Other spellings of a concept's own unit, in lower case without spaces.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "/min": ("bpm", "insp/min", "breaths/min", "beats/min"),
    "mmHg": ("torr", "mm(hg)", "mm/hg"),
    "C": ("°c", "degc"),
    "": ("units", "unit(s)", "ratio", "none"),
    "mmol/L": ("meq/l", "mm/l"),
    "U/L": ("iu/l", "units/l", "unit/l"),
    "10^9/L": (
        *("k/ul", "k/mcl", "k/mm3", "k/cmm", "k/mmcu", "10*3/ul", "10*9/l", "10(3)/mcl", "10(3)mcl", "10e3/mcl", "10"),
        *("x10^9/l", "x10(3)/mcl", "x10(3)", "x103", "x103/ul", "thou/cumm", "thou/mcl", "thou/ul", "ths/ul", "th/cmm", "th/cumm", "th/ul"),
    ),
    "g/dL": ("gm/dl",),
    "%": ("%thb", "%totalhgb", "%sat."),
    "pg": ("uug",),
    "fL": ("u3",),
    "s": ("sec", "sec.", "secs", "seconds", "second(s)"),
    "cmH2O": ("cm/h2o", "cmh20", "cmh?o"),
    "points": ("point",),
}
