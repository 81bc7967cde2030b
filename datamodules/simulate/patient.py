"""The simulated ICU patient: NOT real data, no patient was ever looked at; it exists for demos, tests and benchmarks.

What drives what, hour by hour:

- A hidden severity (mean-reverting to a level of its own, pushed up by an infection) strains six organs, each with a
  susceptibility of its own, so that no single measurement tells the severity.
- The strained organs move the *native* vital signs and the laboratory values (creatinine, bilirubin, platelets with a
  lag).
- Treatment masks illness: a pressor is titrated every hour against a target mean pressure, oxygen and ventilation
  against a target saturation. Charted pressure is native pressure plus pressor effect, so that the dose carries what
  the pressure hides.
- Some pressors are left as they are for a day or longer, as long as the pressure is not far from its target.
- Low pressure is answered with boluses of half a litre, low oxygen with a cannula, then high flow, then the ventilator.
- A few stays have not ended when the records are taken; the bladder of a few is irrigated.
- The hourly hazard of death depends on the severity, the *native* shock, the urine deficit and the chronic risk.

The systems share the physiology and differ in their ``CaseMix``: patients, targets, hospital offsets, weights of the
hazard. Arrays are ragged: ``hours`` has one entry per stay and hour, stays one after the other; ``stays`` one entry
per stay.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CHUNK = 2000  # stays simulated at a time
HOURS = 240  # longest simulated ICU stay
BEFORE = 8  # hours simulated before ICU admission, in which treatment starts
CARE_UNITS = ("medical", "surgical", "cardiac", "cardiac_surgery", "neuro", "mixed")


SUPPORT = ("none", "cannula", "high flow", "ventilator")  # of breathing


class CaseMix(NamedTuple):
    """How one hospital system differs from the other.

    Attributes:
        severity: mean hidden severity on admission.
        infected: share of infected patients.
        age: mean age in years.
        units: share of each of ``CARE_UNITS``.
        hospitals: number of hospitals.
        offset: standard deviation of the hospitals' measurement offsets, in units of a typical personal offset.
        target: mean arterial pressure that pressors are titrated to, mmHg.
        hazard: log hazard of death per hour of an average patient.
        weights: weights of severity, native shock, urine deficit and chronic risk in the log hazard.
    """

    severity: float
    infected: float
    age: float
    units: tuple[float, ...]
    hospitals: int
    offset: float
    target: float
    hazard: float
    weights: tuple[float, float, float, float]


class Patients(NamedTuple):
    """Some simulated stays: ``stays[name]`` one entry per stay, ``hours[name]`` one entry per stay and hour."""

    stays: dict[str, NDArray]
    hours: dict[str, NDArray]


def _bend(x: Array) -> Array:
    """Softplus: an organ copes with little strain and fails in proportion to much."""
    return np.logaddexp(0.0, x)


def simulate_stays(mix: CaseMix, count: int, rng: np.random.Generator) -> Patients:
    """Simulate ``count`` stays.

    Args:
        mix: who the patients of the hospital system are.
        count: number of stays; some are of the same patient, one after the other.
        rng: source of randomness.

    Returns:
        The stays. Times are minutes (``*_minute``) or hours since ICU admission; doses are mcg/kg/min, vasopressin
        units/h, pressures mmHg, urine and bolus mL in the hour. ``severity`` and ``native_map`` are hidden: no table
        shows them.
    """
    rare = rng.spawn(1)[0]  # what few stays have leaves the draws of all others as they are
    stays = _people(mix, count, rng)
    stays["steady"] = rare.random(count) < 0.03
    stays["irrigated"] = stays["foley"] & (rare.random(count) < 0.04)
    course = _course(mix, stays, rng)
    length = _outcomes(mix, stays, course, rng)
    ended = np.append(stays["again"][1:], False) | stays["hospital_death"]
    stays["present"] = ~ended & (rare.random(count) < 0.007)
    inside = np.arange(HOURS) < length[:, None]  # (B, T)
    hours: dict[str, NDArray] = {name: values[:, BEFORE:][inside] for name, values in course.items()}
    hours["stay"], hours["hour"] = (index.astype(np.int32) for index in np.nonzero(inside))
    _measure(stays, hours, rng)
    hours["bolus"] = np.where((hours["map"] < 62) & (rare.random(len(hours["map"])) < 0.15), 500.0, 0.0)
    return Patients(stays, hours)


def _people(mix: CaseMix, n: int, rng: np.random.Generator) -> dict[str, NDArray]:
    """Who they are: demographics, chronic risk, care unit, infection, personal offsets and susceptibilities."""
    again = rng.random(n) < 0.16  # this stay is of the same patient as the one before
    again[0] = False
    first = np.maximum.accumulate(np.where(again, 0, np.arange(n)))  # the patient's first stay
    age = np.clip(rng.normal(mix.age, 16, n), 19, 97)
    age = np.where(rng.random(n) < 0.01, rng.integers(15, 18, n), age)[first]
    male = (rng.random(n) < 0.56)[first]
    height = (np.where(male, 176, 162) + rng.normal(0, 7.5, n)[first]).round()
    weight = np.clip(np.exp(rng.normal(np.log(27.5), 0.2, n))[first] * (height / 100) ** 2, 38, 190).round(1)
    chronic = 0.025 * (age - 64) + rng.normal(0, 0.6, n)[first]
    # a hospital's weight falls with its number: some large, many small
    size = 1 / (np.arange(mix.hospitals) + 3.0)
    hospital = rng.choice(mix.hospitals, n, p=size / size.sum())[first]
    unit = rng.choice(len(CARE_UNITS), n, p=mix.units)
    infected = rng.random(n) < mix.infected + np.array([0.1, 0, -0.15, -0.2, -0.1, 0.03])[unit]
    onset = np.where(rng.random(n) < 0.12, rng.uniform(24, 96, n), np.clip(rng.normal(-2, 7, n), -14, 24))
    start = mix.severity + 0.3 * chronic + np.array([0.1, 0, 0, -0.2, -0.1, 0])[unit] + rng.normal(0, 0.85, n)
    stays: dict[str, NDArray] = {
        "again": again,
        "first": first,
        "age": age,
        "male": male,
        "height": height,
        "weight": weight,
        "chronic": chronic,
        "hospital": hospital,
        "unit": unit,
        "infected": infected,
        "onset_minute": (onset * 60).round().astype(np.int64),
        "burden": np.where(infected, 0.5 + rng.gamma(2.0, 0.4, n), 0.0),
        "start": start,
        "level": start - 0.35 + rng.normal(0, 0.8, n),  # what severity drifts to: most get better, some worse
        "silent": rng.random(n) < 0.006,  # a stay without any charting
        "agent": rng.choice(3, n, p=(0.86, 0.06, 0.08)),  # pressor: norepinephrine, dopamine, phenylephrine
        "foley": rng.random(n) < 0.6,
        "catheter": rng.random(n) < 0.45,
    }
    stays["silent"][0] = False
    for organ in ("heart", "lung", "kidney", "brain", "liver", "blood"):
        stays[organ] = np.exp(rng.normal(0, 0.3, n))  # how strongly severity strains it
        stays[organ + "_bias"] = rng.normal(-0.5, 1.8 if organ in ("heart", "kidney") else 0.7, n)
    stays["lung_bias"] += np.where(infected & (rng.random(n) < 0.5), 0.8, 0.0)  # pneumonia
    return stays


def _course(mix: CaseMix, p: dict[str, NDArray], rng: np.random.Generator) -> dict[str, Array]:
    """The hidden course and the treatment titrated against it, each (B, hours from -BEFORE)."""
    n = len(p["age"])
    names = (
        "severity",
        "native_map",
        "map",
        "dose",
        "vaso",
        "vent",
        "pf",
        "fio2",
        "urine",
        "creatinine",
        "platelets",
        "bilirubin",
    )
    course = {name: np.zeros((n, BEFORE + HOURS)) for name in names}
    base = 85 + rng.normal(0, 8, n)  # a person's own mean pressure
    response = np.exp(rng.normal(0, 0.25, n))  # to pressors
    flow = np.exp(rng.normal(0.1, 0.3, n))  # urine, mL/kg/h
    target = mix.target + rng.normal(0, 2.5, n)
    fever = p["onset_minute"] / 60
    lasting = rng.uniform(20, 70, n)  # of an infection, h
    creatinine0 = np.exp(rng.normal(-0.1, 0.25, n) + 0.12 * p["chronic"])
    platelets0 = np.exp(rng.normal(np.log(225), 0.3, n))
    bilirubin0 = np.exp(rng.normal(np.log(0.6), 0.4, n))
    operated = (p["unit"] == 3) | ((p["unit"] == 1) & (rng.random(n) < 0.4))
    awake = rng.uniform(3, 14, n)  # hours of ventilation after an operation
    level, wander = p["start"].copy(), rng.normal(0, 5, n)
    dose, vaso, vent = np.zeros(n), np.zeros(n, bool), operated.copy()
    creatinine, platelets, bilirubin = creatinine0.copy(), platelets0.copy(), bilirubin0.copy()
    for column in range(BEFORE + HOURS):
        hour = column - BEFORE
        noise = rng.normal(size=(6, n))
        level += 0.025 * (p["level"] - level) + 0.09 * noise[0]
        since = np.maximum(hour - fever, 0)
        severity = level + p["burden"] * (1 - np.exp(-since / 5)) * np.exp(-np.maximum(since - 12, 0) / lasting)
        wander += -0.15 * wander + 2 * noise[1]
        native = base + wander - 12 * _bend(p["heart"] * 1.1 * severity + p["heart_bias"] - 0.4)
        native = np.maximum(native, 22 + 2 * noise[1])
        total = dose + 0.1 * vaso
        pressure = native + response * 62 * total / (total + 0.25)
        lung = _bend(p["lung"] * severity + p["lung_bias"])
        pf = 430 * np.exp(-0.55 * lung + 0.06 * noise[2])
        vent = np.where(
            vent, (pf < 260) | (hour < 6) | operated & (hour < awake), (pf < 150 + 12 * noise[3]) | (severity > 3.3)
        )
        fio2 = np.clip(np.round(92 / pf * 20) / 20, np.where(vent, 0.4, 0.21), 1.0)
        kidney = 2.0 - 1.5 * _bend(p["kidney"] * severity + p["kidney_bias"])
        course["urine"][:, column] = p["weight"] * flow * np.exp(0.3 * noise[4]) * 1.25 / (1 + np.exp(-kidney))
        state = (severity, native, pressure, dose, vaso, vent, pf, fio2, creatinine, platelets, bilirubin)
        for name, now in zip([name for name in names if name != "urine"], state, strict=True):
            course[name][:, column] = now
        # what nurses do about it, and what organs become, by the next hour
        error = target - (pressure + 2 * noise[5])
        step = np.where(p["steady"] & (np.abs(error) < 16), 0, 0.009 * np.clip(error, -2.5, 15))
        started = np.where((dose == 0) & (error > 6), 0.03 + 0.004 * error, 0)
        dose = np.clip(np.where(dose > 0, dose + step, started), 0, 1.6)
        dose = np.where(dose < 0.02, 0, dose)
        vaso = np.where(vaso, dose > 0.08, dose > 0.3)
        creatinine += 0.02 * (creatinine0 * (1 + 1.3 * np.maximum(1.6 - kidney, 0)) - creatinine)
        platelets += 0.02 * (
            platelets0 * np.exp(-0.55 * _bend(p["blood"] * severity + p["blood_bias"])) * 1.3 - platelets
        )
        bilirubin += 0.02 * (
            bilirubin0 * np.exp(1.1 * _bend(p["liver"] * severity + p["liver_bias"] - 0.8)) - bilirubin
        )
    course["deficit"] = np.clip(1 - course["urine"] / (0.8 * p["weight"] * flow)[:, None], 0, 1)
    return course


def _outcomes(
    mix: CaseMix, p: dict[str, NDArray], course: dict[str, Array], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Length of stay, death and the place of a stay in its patient's history; returns the hours in the ICU."""
    n = len(p["age"])
    sick, shock, dry, frail = mix.weights
    strain = (
        sick * course["severity"] + shock * np.clip(66 - course["native_map"], 0, 40) / 10 + dry * course["deficit"]
    )
    # log hazards above -3 (5 % an hour) do not grow further
    log_hazard = np.minimum(mix.hazard + strain[:, BEFORE:] + frail * p["chronic"][:, None], -3.0)
    dies = rng.random((n, HOURS)) < np.exp(log_hazard)
    death = np.where(dies.any(1), dies.argmax(1) + 1, HOURS + 1)
    planned = np.exp(rng.normal(np.log(56), 0.6, n) + 0.12 * p["start"] + 0.15 * p["burden"])
    planned = np.where(rng.random(n) < 0.12, rng.uniform(3, 23, n), np.clip(planned, 24, HOURS)).astype(np.int64)
    in_icu = death <= planned
    length = np.minimum(death, planned)
    end = log_hazard[np.arange(n), length - 1]
    later = ~in_icu & (rng.random(n) < 1 / (1 + np.exp(-(end + 5.0)))) & (rng.random(n) < 0.7)  # dies on the ward
    after = np.where(
        later, rng.uniform(6, 120, n), rng.gamma(2.0, 50, n)
    )  # hours from ICU to hospital discharge or death
    minutes = length * 60 + rng.integers(0, 60, n) * ~in_icu
    p["icu_minutes"] = minutes
    p["discharge_minute"] = np.where(in_icu, minutes, minutes + after * 60).astype(np.int64)
    p["icu_death"], p["hospital_death"] = in_icu, in_icu | later
    p["before_minute"] = rng.gamma(1.2, 600, n).astype(np.int64) + 40  # hospital admission before the ICU
    # nobody comes back from death: such a stay is another patient's
    p["again"] = p["again"] & ~np.concatenate([[True], p["hospital_death"][:-1]])
    p["first"] = np.maximum.accumulate(np.where(p["again"], 0, np.arange(n)))
    p["same_admission"] = p["again"] & (rng.random(n) < 0.35)
    gap = np.where(p["same_admission"], rng.integers(600, 5000, n), rng.integers(20000, 300000, n) + p["before_minute"])
    step = np.where(p["again"], np.concatenate([[0], p["discharge_minute"][:-1]]) + gap, 0)
    back = np.concatenate([[0], p["icu_minutes"][:-1]]) + gap  # same admission: from the end of the ICU stay
    step = np.where(p["same_admission"], back, step)
    p["since_minute"] = np.cumsum(step) - np.cumsum(step)[p["first"]]  # ICU admission, from the patient's first
    follows = np.concatenate([p["same_admission"][1:], [False]])
    admission = np.maximum.accumulate(
        np.where(p["same_admission"], 0, np.arange(n))
    )  # first stay of the hospital admission
    p["admission"], p["last_of_admission"] = admission, ~follows
    p["visit"] = np.arange(n) - admission + 1
    return length


def _measure(p: dict[str, NDArray], h: dict[str, NDArray], rng: np.random.Generator) -> None:
    """Add what a monitor, a nurse or a laboratory would read to ``h``: the course plus personal offsets and noise."""
    stay, severity = h["stay"], h["severity"]
    n, size = len(p["age"]), len(stay)

    def person(deviation: float) -> Array:
        return rng.normal(0, deviation, n)[stay]

    def noise(deviation: float) -> Array:
        return rng.normal(0, deviation, size)

    infection = (p["infected"][stay] & (h["hour"] * 60 > p["onset_minute"][stay])) * np.minimum(p["burden"][stay], 2)
    h["temperature"] = 36.8 + person(0.25) + noise(0.25) + 0.45 * infection * (0.5 + rng.random(n))[stay]
    strain = _bend(0.8 * severity)
    h["heart_rate"] = (
        74 + person(10) + noise(4) + 9 * strain + 6 * (h["temperature"] - 36.8) + 6 * np.minimum(h["dose"], 0.6)
    )
    h["map_read"] = h["map"] + noise(4)
    pulse = np.maximum(46 + person(8) - 1.5 * strain + noise(3), 18)
    h["systolic"], h["diastolic"] = h["map_read"] + pulse * 0.64, h["map_read"] - pulse * 0.36
    h["respiration"] = (
        np.where(h["vent"] > 0, 17, 14.5) + person(2) + noise(2) + 2.6 * strain * np.where(h["vent"] > 0, 0.5, 1)
    )
    h["pao2"] = np.clip(h["pf"] * h["fio2"] * np.exp(noise(0.12)), 38, 480)
    h["spo2"] = np.clip(100 / (1 + (23.4 / h["pao2"]) ** 2.7) + noise(0.8), 70, 100)
    h["support"] = np.where(h["vent"] > 0, 3, np.digitize(h["fio2"], (0.22, 0.45)))  # index into SUPPORT
    h["peep"] = np.clip(np.round(5 + 12 * (h["fio2"] - 0.4)), 5, 18)
    h["weight"] = p["weight"][stay] + 0.03 * h["hour"]  # kg, of fluids
    # consciousness: 0 = comatose .. 1 = awake
    awake = 1 / (
        1
        + np.exp(-(3.6 + person(0.9) - 2.2 * p["brain"][stay] * np.maximum(severity + p["brain_bias"][stay] - 0.2, 0)))
    )
    awake = np.where(h["vent"] > 0, awake * 0.6, awake)
    h["eyes"] = np.clip(np.round(1 + 3 * awake + noise(0.25)), 1, 4)
    h["motor"] = np.clip(np.round(1 + 5.2 * awake**0.8 + noise(0.25)), 1, 6)
    h["verbal"] = np.where(h["vent"] > 0, 1, np.clip(np.round(1 + 4.2 * awake + noise(0.25)), 1, 5))
    # laboratory
    lactate = 0.9 + 1.0 * _bend(1.1 * p["liver"][stay] * severity - 0.9) ** 1.3
    h["lactate"] = np.clip(lactate * np.exp(person(0.3) + noise(0.2)), 0.4, 25)
    h["base_excess"] = np.clip(2 - 1.4 * h["lactate"] + person(2) + noise(1), -25, 12)
    h["paco2"] = np.clip(40 + person(5) + noise(3) - 1.2 * strain, 18, 95)
    h["bicarbonate"] = np.clip(24.5 + 0.8 * h["base_excess"] + noise(1), 5, 42)
    h["ph"] = np.clip(7.40 + 0.012 * h["base_excess"] - 0.006 * (h["paco2"] - 40) + noise(0.015), 6.8, 7.65)
    h["creatinine"] = np.clip(h["creatinine"] * np.exp(noise(0.04)), 0.2, 14)
    h["bun"] = np.clip(14 * h["creatinine"] ** 0.85 * np.exp(person(0.3) + noise(0.05)), 3, 180)
    h["platelets"] = np.clip(h["platelets"] * np.exp(noise(0.05)), 4, 900)
    h["bilirubin"] = np.clip(h["bilirubin"] * np.exp(noise(0.05)), 0.1, 45)
    h["wbc"] = np.clip(8.5 * np.exp(person(0.3) + noise(0.08) + 0.22 * infection + 0.08 * strain), 0.3, 80)
    h["neutrophils"] = np.clip(68 + 5 * infection + person(7) + noise(3), 5, 97)
    h["bands"] = np.clip(2.5 * infection + noise(1.5), 0, 40)
    h["lymphocytes"] = np.clip((98 - h["neutrophils"] - h["bands"]) * 0.75, 0.5, 90)
    h["hemoglobin"] = np.clip(11.2 + person(1.8) + noise(0.3) - 0.3 * strain, 5, 18)
    h["hematocrit"] = h["hemoglobin"] * 3.02 + noise(0.5)
    h["mcv"] = 90 + person(5) + noise(0.5)
    h["mchc"] = 33 + person(0.9) + noise(0.3)
    h["mch"] = h["mcv"] * h["mchc"] / 100
    h["sodium"] = 138.5 + person(4) + noise(1.2)
    h["potassium"] = np.clip(4.1 + person(0.35) + noise(0.25) + 0.12 * np.log(h["creatinine"]), 2.2, 8)
    h["chloride"] = h["sodium"] - h["bicarbonate"] - 10.5 + noise(1.5)
    h["glucose"] = np.clip(128 * np.exp(person(0.25) + noise(0.15) + 0.05 * strain), 35, 900)
    h["calcium"] = np.clip(8.5 + person(0.5) + noise(0.2) - 0.1 * strain, 5, 12)
    h["calcium_ionized"] = np.clip(1.13 + person(0.07) + noise(0.03), 0.7, 1.6)
    h["magnesium"] = np.clip(2.05 + person(0.2) + noise(0.12), 0.9, 4.5)
    h["phosphate"] = np.clip(3.4 + person(0.6) + noise(0.3) + 0.4 * np.log(h["creatinine"]), 0.8, 11)
    h["albumin"] = np.clip(3.3 + person(0.5) + noise(0.1) - 0.15 * strain, 1.2, 5)
    h["bilirubin_direct"] = h["bilirubin"] * 0.4
    injury = np.exp(person(0.5) + 0.45 * _bend(p["liver"][stay] * severity - 0.5))
    h["alt"], h["ast"] = 24 * injury * np.exp(noise(0.08)), 30 * injury**1.1 * np.exp(noise(0.08))
    h["alkaline_phosphatase"] = 80 * np.exp(person(0.35) + noise(0.05)) * injury**0.2
    cardiac = np.where(np.isin(p["unit"][stay], (2, 3)), 1.5, 0)
    h["troponin_t"] = np.clip(0.02 * np.exp(person(0.9) + 0.5 * strain + cardiac), 0.01, 20)
    h["ck"] = 120 * np.exp(person(0.8) + noise(0.1) + 0.2 * strain + 0.5 * cardiac)
    h["ck_mb"] = 3 * np.exp(person(0.6) + noise(0.1) + cardiac)
    h["crp"] = np.clip(25 * np.exp(person(0.7) + 0.8 * infection), 0.3, 450)
    h["inr"] = np.clip(1.15 * np.exp(person(0.15) + noise(0.03) + 0.1 * _bend(p["liver"][stay] * severity)), 0.8, 11)
    h["ptt"] = np.clip(31 * np.exp(person(0.2) + noise(0.06)) * h["inr"] ** 0.4, 18, 150)
    h["fibrinogen"] = np.clip(330 * np.exp(person(0.3)) + 60 * infection - 25 * strain, 50, 950)
    h["methemoglobin"] = np.clip(0.9 + noise(0.4), 0, 4)
    # a pressor dose becomes drugs: vasopressin is added to a high dose, epinephrine to a very high one
    dose, agent = h["dose"], p["agent"][stay]
    h["epinephrine"] = np.where(agent == 0, 0.4 * np.maximum(dose - 0.5, 0), 0)
    h["norepinephrine"] = np.where((agent == 0) | (dose > 0.2), dose - h["epinephrine"], 0)
    instead = np.where((agent > 0) & (dose <= 0.2), dose, 0)
    h["dopamine"], h["phenylephrine"] = np.where(agent == 1, 100 * instead, 0), np.where(agent == 2, 10 * instead, 0)
    h["vasopressin"] = 2.4 * h["vaso"]
    h["dobutamine"] = np.where((p["unit"][stay] == 2) & (p["heart_bias"][stay] > 0) & (severity > 0.5), 5.0, 0)
