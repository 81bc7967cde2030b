"""The dictionary: checked when it is read, and its numbers against others that do not come from it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules import dictionary
from datamodules.dictionary import BY_NAME, CONCEPTS, NAMES, conversion
from datamodules.hospitals.eicu import infusions

# (concept, charted unit, charted value, value in the concept's unit), by molar mass or by definition
CONVERTED = [
    ("temperature", "°F", 98.6, 37.0),
    ("temperature", "F", 212, 100.0),
    ("temperature", "Deg. C", None, None),
    ("fio2", "fraction", 0.4, 40),
    ("height", "Inch", 71, 180.34),
    ("weight", "lbs", 220.462, 100),
    ("lactate", "mg/dL", 18.016, 2.0),  # lactate 90.08 g/mol
    ("creatinine", "umol/L", 88.42, 1.0),  # 113.12 g/mol
    ("bilirubin_total", "umol/L", 17.104, 1.0),  # 584.66 g/mol
    ("bilirubin_direct", "umol/L", 34.208, 2.0),
    ("glucose", "mmol/L", 10, 180.16),  # 180.16 g/mol
    ("hemoglobin", "g/L", 120, 12),
    ("albumin", "g/L", 35, 3.5),
    ("fibrinogen", "g/L", 2.5, 250),
    ("crp", "mg/dL", 4.2, 42),
    ("magnesium", "mEq/L", 2, 2.431),  # 24.305 g/mol, two charges
    ("calcium_ionized", "mg/dL", 4.008, 1.0),  # 40.08 g/mol
    ("sodium", "mEq/L", 140, 140),
    ("platelets", "K/uL", 250, 250),
    ("urine", "L", 1.2, 1200),
    ("sodium", "cups", None, None),
    ("heart_rate", "bpm", 80, 80),
    ("inr", "", 1.1, 1.1),
]


@pytest.mark.parametrize(("concept", "unit", "charted", "expected"), CONVERTED)
def test_units(concept: str, unit: str, charted: float | None, expected: float | None) -> None:
    factor, offset = conversion(concept, unit)
    if charted is None:
        assert factor is None and offset is None
    else:
        assert factor is not None and offset is not None
        assert charted * factor + offset == pytest.approx(expected, rel=2e-3)


# (concept, implausible, plausible, ...): limits as the cited sources state them
LIMITS = [
    ("heart_rate", [0, 300, -1], [1, 299]),  # vitalsign.sql: > 0 and < 300
    ("systolic_bp", [0, 400], [30, 399]),
    ("diastolic_bp", [0, 300], [10, 299]),
    ("mean_bp", [0, 300], [10, 299]),
    ("respiratory_rate", [0, 70], [1, 69]),
    ("temperature", [10, 50], [10.1, 49.9]),
    ("spo2", [0, 100.5], [1, 100]),  # > 0 and <= 100
    ("creatinine", [0.05, 28.5], [0.1, 28.28]),  # pivoted-lab.sql
    ("potassium", [0, 12.5], [0.05, 12]),
    ("sodium", [89, 216], [90, 215]),
    ("bun", [0.5, 281], [1, 280]),
    ("platelets", [0, 10000], [1, 9999]),
    ("albumin", [0.4, 6.6], [0.5, 6.5]),
    ("ph", [6.4, 8.6], [6.5, 8.5]),  # pivoted-bg.sql
    ("pao2", [14, 721], [15, 720]),
    ("paco2", [4, 251], [5, 250]),
    ("fio2", [19, 101], [20, 100]),
    ("gcs", [2, 16], [3, 15]),
    ("weight", [19, 301], [20, 300]),
    ("norepinephrine", [-0.1, 3.1], [0, 3]),  # accepted rates
    ("dopamine", [51], [0, 50]),
]


@pytest.mark.parametrize(("concept", "implausible", "plausible"), LIMITS)
def test_ranges(concept: str, implausible: list[float], plausible: list[float]) -> None:
    code = np.full(len(implausible) + len(plausible), NAMES.index(concept))
    values = np.array([*implausible, *plausible], np.float32)
    expected = [False] * len(implausible) + [True] * len(plausible)
    assert dictionary.plausible(code, values).tolist() == expected
    assert not dictionary.plausible(code[:1], np.array([np.nan], np.float32))[0]


def test_typical_bags() -> None:
    """Concentrations of the public eICU pipelines, mcg/mL: 8 mg in 250 mL, 10 in 250, 400 in 250, 500 in 250, 50 in 250."""
    bags = {"norepinephrine": 8 / 250, "epinephrine": 10 / 250, "dopamine": 400 / 250, "dobutamine": 500 / 250}
    bags |= {"phenylephrine": 50 / 250, "milrinone": 40 / 200}
    for drug, mg_per_ml in bags.items():
        assert infusions.CONCENTRATION[drug] == pytest.approx(1000 * mg_per_ml)
    assert infusions.CONCENTRATION["vasopressin"] == pytest.approx(20 / 100)  # units/mL


def test_pressures_rates_and_saturations_of_zero_are_no_measurement() -> None:
    vital = [
        c for c in CONCEPTS if "bp" in c.name or c.name in ("heart_rate", "respiratory_rate", "spo2", "sao2", "etco2")
    ]
    assert len(vital) == 11
    assert all(c.low == 0 and c.low_open for c in vital)


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ("concepts", "pulse,/min,0-300,mean,,V,", "range '0-300'"),
        ("concepts", 'pulse,/min,"[5,3]",mean,,V,', "low < high"),
        ("concepts", 'pulse,/min,"[0,3]",median,,V,', "'median'"),
        ("concepts", 'heart_rate,/min,"[0,3]",mean,,V,', "heart_rate stands more than once"),
        ("units", "heart_rate,mmHg,x,1,0", "expected a concept"),
        ("units", ",cubits,x,1,0", "expected a concept"),
        ("units", ",mmHg,Torr,1,0", "lower case"),
        ("mimiciv", "chartevents,1,pulse,,,", "pulse is no concept"),
        ("mimiciv", "chartevents,220045,heart_rate,,,", "more than once"),
    ],
)
def test_a_mistake_is_refused(
    table: str, row: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dictionary"
    shutil.copytree(dictionary.FOLDER, folder)
    with (folder / f"{table}.csv").open("a") as file:
        file.write(row + "\n")
    monkeypatch.setattr(dictionary, "FOLDER", folder)
    dictionary._factors.cache_clear()
    dictionary.mapping.cache_clear()
    read = {"concepts": dictionary._concepts, "units": dictionary._factors}
    try:
        with pytest.raises(ValueError, match=f"{table}.csv") as error:
            read.get(table, lambda: dictionary.mapping(table))()
        assert message in str(error.value)
    finally:
        dictionary._factors.cache_clear()
        dictionary.mapping.cache_clear()


def test_every_concept_is_charted_somewhere_or_derived() -> None:
    charted = {c for name in ("mimiciv", "eicu", "physionet") for c in dictionary.mapping(name)["concept"].drop_nulls()}
    derived = {"norepinephrine_equivalent", "norepinephrine_equivalent_change", "vasopressor_estimated", "urine_rate"}
    by_name = {"urine", "fluids", "weight", "height", "ventilation", *infusions.CONCENTRATION}
    assert set(NAMES) == charted | derived | by_name
    assert BY_NAME["ventilation"].treatment and not BY_NAME["lactate"].treatment
