"""The habits of the simulated eICU hospitals, and the rows of their tables with the publisher's ids."""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.synthetic_patient import SYSTEMS
from datamodules.synthetic_tables import EICU, LABS, Add

URINE = ("Urine", "URINE CATHETER", "Urinary Catheter Output: Indwelling/Continuous Ure")
PUMP_UNITS = ("mcg/min", "ml/hr", "", "mcg/kg/min")


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


class Rows:
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
