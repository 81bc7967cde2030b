"""What the simulator drew: the values behind the files that ``write`` writes, for tests of the code that reads them."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.simulate.habits import Hospitals, cuff_values, lab_values
from datamodules.simulate.patient import SUPPORT, Patients
from datamodules.simulate.write import SYSTEMS, chunks, hospitals_of

# concept -> name in the hours of a patient, where values are in the concept's unit
BEDSIDE = {
    **{name: name for name in ("heart_rate", "temperature", "spo2", "weight", "urine")},
    **{
        "systolic_bp": "systolic",
        "diastolic_bp": "diastolic",
        "mean_bp": "map_read",
        "respiratory_rate": "respiration",
    },
    **{"gcs_eyes": "eyes", "gcs_verbal": "verbal", "gcs_motor": "motor", "fluids": "bolus"},
    **{
        name: name
        for name in ("norepinephrine", "epinephrine", "dopamine", "dobutamine", "phenylephrine", "vasopressin")
    },
}
CUFF = {"systolic_bp_cuff": "systolic", "diastolic_bp_cuff": "diastolic", "mean_bp_cuff": "map_read"}
LAB_CONCEPTS = {
    "bilirubin": "bilirubin_total",
    "spo2": "sao2",
    "fio2_percent": "fio2",
}  # the others have the lab's name
NO_CONCEPT = ("anion_gap",)
LEVELS = np.array(
    [{"none": 0, "cannula": 0, "high flow": 1, "ventilator": 2}[kind] for kind in SUPPORT]
)  # of ventilation


def truth(system: str, stays: int, seed: int = 0) -> pl.DataFrame:
    """The hourly values behind ``write(system, folder, stays, seed)``, before rounding, noise of charting and errors.

    A value of hour ``h`` is charted, if at all, in the minutes ``60 h`` to ``60 h + 59`` since ICU admission, with
    these exceptions: the first laboratory values up to 50 minutes before admission; a rate from some minute of its
    hour on until the next rate (MIMIC-IV: one minute for all of a stay; eICU: one of the first ten); urine summed
    over the hours that the hospital sums it over. Spells on a ventilator of less than half an hour are none here.
    Laboratory values and pressures of the cuff (``*_cuff``) have the offsets of the stay's hospital. The ``fluids``
    are the boluses. The table grows with the stays, unlike what ``write`` needs.

    Args:
        system: a name in ``write.SYSTEMS``.
        stays: number of ICU stays, as for ``write``: with another number the last patients are others.
        seed: as for ``write``.

    Returns:
        ``stay_id`` (as in the files), ``hour`` (since ICU admission), ``concept`` and ``value`` in the names and units
        of ``concepts.py``, sorted by stay and hour; for every concept that the simulated patients drive, also for stays
        and hours without any charting.
    """
    hospitals = hospitals_of(system, seed)
    first = SYSTEMS[system].first_stay
    frames = [_hours(patients, hospitals, first + base) for base, patients in chunks(system, stays, seed)]
    return pl.concat(frames)


def _hours(patients: Patients, hospitals: Hospitals, first: int) -> pl.DataFrame:
    h, p = patients.hours, patients.stays
    labs = lab_values(patients, hospitals)
    cuff = cuff_values(patients, hospitals)
    values: dict[str, NDArray] = {concept: h[name] for concept, name in BEDSIDE.items()}
    values |= {concept: cuff[name] for concept, name in CUFF.items()}
    values |= {LAB_CONCEPTS.get(name, name): lab for name, lab in labs.items() if name not in NO_CONCEPT}
    values |= {
        "gcs": h["eyes"] + h["verbal"] + h["motor"],
        "height": p["height"][h["stay"]],
        "peep": np.where(h["vent"] > 0, h["peep"], np.nan),
        "ventilation": LEVELS[h["support"]],
    }
    index = {"stay_id": h["stay"].astype(np.int64) + first, "hour": h["hour"]}
    frame = pl.DataFrame(index | {concept: value.astype(float) for concept, value in values.items()})
    long = frame.unpivot(index=list(index), variable_name="concept", value_name="value")
    return long.filter(pl.col("value").is_not_nan()).sort("stay_id", "hour", maintain_order=True)
