"""What is told twice agrees: infusions and rates, SOFA and measurements, outcomes and targets, records whole and cut off; and the
sizes of the demos.

Each table is compared with another one that is made from the same records by other code, on the simulated hospitals and on the
demos where they lie beside the project. ``golden_*.csv`` hold events, stays and median of each concept of the demos; after a change
that is meant, write them again with ``summary(store).write_csv(...)`` and read the difference.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from datamodules import dictionary
from datamodules.build import build
from datamodules.cohort import Cohort
from datamodules.derive.sofa import sofa
from datamodules.dictionary import CONCEPTS, RATES
from datamodules.hospitals import EICU, MIMICIV
from datamodules.hospitals.base import Tables
from datamodules.schema import DROPPED
from datamodules.store import Store

HOSPITALS = {"MIMICIV": MIMICIV, "EICU": EICU}
DEMOS = {"MIMICIV": "mimic-iv-demo", "EICU": "eicu-demo"}
PLACES = ("simulated-MIMICIV", "simulated-EICU", "demo-MIMICIV", "demo-EICU")
DAY = 24 * 60
SLACK = 2e-6  # rates are rounded to six digits


@pytest.fixture(params=PLACES)
def place(
    request: pytest.FixtureRequest, mimic: Path, eicu: Path, real: Callable[[str], Path]
) -> Callable[..., Cohort]:
    """Gives the cohort of one hospital under options."""
    kind, name = request.param.split("-")
    simulated = {"MIMICIV": mimic, "EICU": eicu}
    root = simulated[name] if kind == "simulated" else real(DEMOS[name])
    return lambda **options: Cohort(HOSPITALS[name](str(root), **options))


def events(store: Store, *concepts: str) -> pl.DataFrame:
    frame = store.frame(0, len(store.stays)).with_columns(pl.col("concept").cast(pl.String))
    return frame.filter(pl.col("concept").is_in(concepts)) if concepts else frame


def test_every_event_is_in_range_in_order_and_not_known_before_it_was(place: Callable[..., Cohort]) -> None:
    store = place().store
    assert (store.known >= store.minute).all()
    assert dictionary.plausible(store.concept.astype(np.int64), store.value).all()
    stay = np.repeat(np.arange(len(store.stays)), np.diff(store.offsets))
    assert (np.diff((stay << 32) + store.minute.astype(np.int64) + 2**24) >= 0).all()
    coverage = store.coverage()
    reasons = DROPPED.categories.to_list()
    assert coverage.filter(pl.col("rows") != pl.col("events") + pl.sum_horizontal(reasons)).is_empty()
    assert coverage["events"].sum() == len(store.minute)


def test_rates_and_infusions_agree(place: Callable[..., Cohort]) -> None:
    """Where an interval starts the rate is at least its own; at every step it is the sum of the intervals that run, clipped."""
    cohort = place()
    intervals = pl.read_parquet(cohort.infusions())
    assert len(intervals) and (intervals["rate"] > 0).all()
    assert (intervals["end_minute"] > intervals["start_minute"]).all()
    drugs = intervals["drug"].unique().to_list()
    assert set(drugs) <= set(RATES)
    high = pl.DataFrame([(c.name, c.high) for c in CONCEPTS], ["drug", "high"], orient="row")
    steps = events(cohort.store, *drugs).rename({"concept": "drug"})
    started = intervals.join(high, on="drug").join(
        steps, left_on=["stay_id", "drug", "start_minute"], right_on=["stay_id", "drug", "minute"], how="left"
    )
    assert started["value"].null_count() == 0
    least = pl.min_horizontal("rate", "high")
    assert started.filter(pl.col("value") < least * (1 - 1e-6) - SLACK).is_empty()
    running = steps.join(intervals, on=["stay_id", "drug"], how="left").with_columns(
        runs=pl.col("minute").is_between("start_minute", "end_minute", closed="left").fill_null(False)
    )
    total = running.group_by("stay_id", "drug", "minute").agg(
        pl.col("value").first(), total=pl.col("rate").filter("runs").sum()
    )
    total = total.join(high, on="drug").with_columns(total=pl.min_horizontal("total", "high"))
    assert total.height == steps.height
    assert total.filter((pl.col("value") - pl.col("total")).abs() > 1e-6 * pl.col("total") + SLACK).is_empty()


def worst_of_day(records: pl.DataFrame, hours: pl.DataFrame, worst: pl.Expr) -> pl.DataFrame:
    """``hours`` with the ``worst`` value of the minutes (end - 24 h, end]; a record is in the 24 windows that begin with its own hour."""
    stroke = hours.group_by("stay_id").agg(stroke=pl.col("end_minute").first() % 60)
    first = pl.col("stroke") - (pl.col("stroke") - pl.col("minute")) // 60 * 60
    spread = records.join(stroke, on="stay_id").with_columns(
        end_minute=pl.int_ranges(first, first + DAY, 60).cast(pl.List(pl.Int32))
    )
    seen = spread.explode("end_minute").group_by("stay_id", "end_minute").agg(worst=worst)
    return hours.join(seen, on=["stay_id", "end_minute"], how="left", maintain_order="left")


def laboratory(cohort: Cohort) -> dict[str, pl.DataFrame]:
    """Records of creatinine, platelets and bilirubin that SOFA reads: of the store on eICU; on MIMIC-IV those of mimic-code's items
    and of the stay's admission, from the raw table."""
    names = {"creatinine": 50912, "platelets": 51265, "bilirubin_total": 50885}
    if cohort.hospital.name == "EICU":
        return {name: events(cohort.store, name).select("stay_id", "minute", "value") for name in names}
    tables = cohort.hospital.tables(cohort.store.stays)
    stays = tables["icu/icustays"].select("hadm_id", "stay_id", "intime")
    minute = ((pl.col("charttime") - pl.col("intime")).dt.total_seconds() / 60).floor().cast(pl.Int32)
    rows = tables["hosp/labevents"].filter(pl.col("valuenum") > 0).join(stays, on="hadm_id")
    rows = rows.select("stay_id", "itemid", minute=minute, value="valuenum").collect()
    rows = rows.filter((pl.col("itemid") != names["creatinine"]) | (pl.col("value") <= 150))
    return {name: rows.filter(pl.col("itemid") == item).drop("itemid") for name, item in names.items()}


def test_sofa_and_measurements_agree(place: Callable[..., Cohort]) -> None:
    """Coagulation and liver are those of the worst value of the day; renal is no less than its creatinine says."""
    cohort = place()
    hours = pl.read_parquet(cohort.sepsis_tables()["sofa"])
    records = laboratory(cohort)

    def points(name: str, worst: pl.Expr, *reached: pl.Expr) -> pl.DataFrame:
        table = worst_of_day(records[name], hours, worst)
        return table.with_columns(points=pl.sum_horizontal(limit.fill_null(False) for limit in reached))

    worst = pl.col("worst")
    platelets = points("platelets", pl.col("value").min(), *(worst < limit for limit in (150, 100, 50, 20)))
    assert platelets.filter(pl.col("coagulation") != pl.col("points")).is_empty()
    bilirubin = points("bilirubin_total", pl.col("value").max(), *(worst >= limit for limit in (1.2, 2, 6, 12)))
    assert bilirubin.filter(pl.col("liver") != pl.col("points")).is_empty()
    creatinine = points("creatinine", pl.col("value").max(), *(worst >= limit for limit in (1.2, 2, 3.5, 5)))
    assert creatinine.filter(pl.col("renal") < pl.col("points")).is_empty()
    # what the urine adds is 3 or 4 points
    assert set(creatinine.filter(pl.col("renal") > pl.col("points"))["renal"]) <= {3, 4}
    assert (creatinine["points"] == 4).any() and (platelets["points"] > 0).any() and (bilirubin["points"] > 0).any()


def test_sofa_and_infusions_agree(place: Callable[..., Cohort]) -> None:
    """Norepinephrine or epinephrine that runs at the end of an hour: 3 points, 4 above 0.1 mcg/kg/min."""
    cohort = place()
    drugs = pl.read_parquet(cohort.infusions()).filter(pl.col("drug").is_in(["norepinephrine", "epinephrine"]))
    ends = pl.read_parquet(cohort.sepsis_tables()["sofa"]).select("stay_id", "end_minute", "cardiovascular").join(
        drugs.rename({"end_minute": "stop_minute"}), on="stay_id"
    )  # fmt: skip
    runs = (pl.col("start_minute") < pl.col("end_minute")) & (pl.col("end_minute") <= pl.col("stop_minute"))
    running = ends.filter(runs)
    assert len(running)
    assert running.filter(pl.col("cardiovascular") < 3).is_empty()
    assert running.filter(pl.col("rate") > 0.1 + SLACK, pl.col("cardiovascular") < 4).is_empty()


def test_outcomes_agree(place: Callable[..., Cohort]) -> None:
    """A death in the unit is one in hospital, has a minute, and nobody who left alive has one."""
    stays = place().store.stays
    assert stays.filter("icu_death", ~pl.col("hospital_death")).is_empty()
    assert stays.filter(pl.col("hospital_death").fill_null(False) != pl.col("death_minute").is_not_null()).is_empty()
    in_unit = stays.filter("icu_death")
    assert len(in_unit) and (in_unit["death_minute"] <= in_unit["icu_minutes"]).all()
    # 4 stays of the eICU demo left the hospital before the unit, by the publisher's own times
    later = stays.filter("hospital_death", ~pl.col("icu_death"))
    assert len(later) and len(later.filter(pl.col("death_minute") < pl.col("icu_minutes"))) <= 4


def test_targets_agree_with_the_outcomes(place: Callable[..., Cohort]) -> None:
    """Mortality in hospital is the outcome of the stay; mortality within 24 hours is 1 at the hours of the last day and no others."""
    cohort = place(hours=12)
    outcome = cohort.store.stays.select("stay_id", "hospital_death", "death_minute", "icu_minutes")
    hospital = cohort.samples()[0].join(outcome, on="stay_id", how="left")
    assert hospital["stay_id"].is_unique().all() and (hospital["minute"] == 720).all()
    assert (hospital["target"] == hospital["hospital_death"].cast(pl.Float32)).all()
    day = place(hours=12, task="mortality_24h", rolling=True).samples()[0].join(outcome, on="stay_id", how="left")
    left = pl.col("death_minute") - pl.col("minute")
    assert day.filter((left <= 0).fill_null(False)).is_empty()  # nobody is predicted after death
    assert day.filter((pl.col("target") == 1) != (left <= DAY).fill_null(False)).is_empty()
    assert set(day["stay_id"]) == set(hospital["stay_id"])
    died = hospital.filter(pl.col("target") == 1)
    soon = died.filter(pl.col("death_minute") <= pl.col("icu_minutes"))  # in the unit: the last day is seen
    assert len(soon) and set(soon["stay_id"]) <= set(day.filter(pl.col("target") == 1)["stay_id"]) <= set(
        died["stay_id"]
    )


CUT = 1440
READ = {  # by SOFA and by the definitions of sepsis
    *("icu/icustays", "icu/chartevents", "icu/inputevents", "icu/outputevents", "hosp/labevents"),
    *("hosp/prescriptions", "hosp/microbiologyevents"),
    *("treatment", "apacheApsVar", "patient", "admissionDx", "medication", "infusionDrug", "diagnosis", "microLab"),
}
ENTERED = {
    "lab": "labresultrevisedoffset",
    "nurseCharting": "nursingchartentryoffset",
    "respiratoryCharting": "respchartentryoffset",
    "intakeOutput": "intakeoutputentryoffset",
    "medication": "drugorderoffset",
}


class CutMIMICIV(MIMICIV):
    """MIMIC-IV as it stood at minute ``CUT`` of each stay; infusions that run go on to then."""

    def tables(self, stays: pl.DataFrame) -> Tables:
        tables = super().tables(stays)
        start, now = pl.col("intime"), pl.col("intime") + pl.duration(minutes=CUT)
        icu = tables["icu/icustays"]
        of_stay, of_patient = icu.select("stay_id", "intime"), icu.select("patient_id", "intime")
        for name in ("icu/chartevents", "icu/outputevents"):
            known = pl.max_horizontal("charttime", "storetime") < now
            tables[name] = tables[name].join(of_stay, on="stay_id").filter(known).drop("intime")
        labs = tables["hosp/labevents"].join(of_patient, on="patient_id").filter(pl.col("charttime") < now)
        tables["hosp/labevents"] = labs.drop("intime")
        begins, ends = ((pl.col(c) - start).dt.total_seconds() // 60 for c in ("starttime", "endtime"))
        share = (CUT - begins) / (ends - begins)
        infused = tables["icu/inputevents"].join(of_stay, on="stay_id").filter(pl.col("starttime") < now)
        infused = infused.with_columns(amount=pl.col("amount") * pl.when(ends > CUT).then(share).otherwise(1.0))
        tables["icu/inputevents"] = infused.with_columns(endtime=pl.min_horizontal("endtime", now)).drop("intime")
        taken = pl.coalesce("charttime", pl.col("chartdate") + pl.duration(days=1)) < now  # a date is over at its end
        for name, known in (("hosp/prescriptions", pl.col("starttime") < now), ("hosp/microbiologyevents", taken)):
            tables[name] = tables[name].join(of_patient, on="patient_id").filter(known).drop("intime")
        return tables


class CutEICU(EICU):
    """eICU as it stood at minute ``CUT`` of each stay, when APACHE's first day is not yet over."""

    def tables(self, stays: pl.DataFrame) -> Tables:
        tables = super().tables(stays)
        for name, rows in tables.items():
            if "minute" in rows.collect_schema() and name != "microLab":  # taken then, but grown later
                known = pl.max_horizontal("minute", ENTERED[name]) if name in ENTERED else pl.col("minute")
                tables[name] = rows.filter(known < CUT)
        return tables | {"apacheApsVar": tables["apacheApsVar"].filter(pl.lit(False))}


def test_nothing_that_was_known_hangs_on_what_came_later(place: Callable[..., Cohort], tmp_path: Path) -> None:
    """A record that is cut off at hour 24 holds the very events that the whole record says were known by then."""
    cohort = place()
    cut = build(
        {"MIMICIV": CutMIMICIV, "EICU": CutEICU}[cohort.hospital.name](str(cohort.hospital.root)), tmp_path / "cut"
    )
    alone = pl.len().over("patient_id") == 1  # a laboratory value may belong to several stays of a patient
    stays = cohort.store.stays.filter(alone if cohort.hospital.name == "MIMICIV" else True).select("stay_id")

    def known(store: Store) -> pl.DataFrame:
        table = events(store).filter(pl.col("minute") < CUT, pl.col("known_minute") < CUT)
        return table.join(stays, on="stay_id", how="semi").sort("stay_id", "minute", "concept", "known_minute", "value")

    whole, early = known(cohort.store), known(cut)
    assert whole.height > 10_000
    assert whole.drop("value").equals(early.drop("value"))
    # a volume's share is computed anew
    assert np.allclose(whole["value"], early["value"], rtol=1e-5, atol=1e-6)


def test_scores_and_suspicions_hang_on_nothing_that_came_later(place: Callable[..., Cohort]) -> None:
    """SOFA of what was known before hour 24, and the suspicions that were known by then under every definition, are the same from
    the whole record and from one that is cut off there."""
    cohort = place()
    stays, store = cohort.store.stays, cohort.store
    if cohort.hospital.name == "MIMICIV":
        stays = stays.filter(pl.len().over("patient_id") == 1)
    recorded = store.frame(0, len(store.stays)).join(stays, on="stay_id", how="semi").lazy()
    cut = {"MIMICIV": CutMIMICIV, "EICU": CutEICU}[cohort.hospital.name](str(cohort.hospital.root))
    held = [
        {name: rows.collect().lazy() for name, rows in hospital.tables(stays).items() if name in READ}
        for hospital in (cohort.hospital, cut)
    ]

    def scores(tables: Tables) -> pl.DataFrame:
        found = sofa(cohort.hospital.sofa_inputs(tables, recorded, stays, CUT), cohort.hospital.sofa)
        return found.filter(pl.col("end_minute") < CUT, pl.col("stay_id").is_in(stays["stay_id"].implode()))

    whole, early = (scores(tables) for tables in held)
    assert whole["sofa_24h"].max() > 5  # type: ignore[operator]
    assert whole.equals(early)
    columns = ("stay_id", "evidence", "antibiotic", "suspected_minute", "known_minute")
    compared = 0
    for definition in cohort.hospital.definitions.values():
        found, earlier = (
            cohort.hospital.suspicion(tables, stays, definition)
            .filter(pl.col("suspected_minute").is_not_null(), pl.col("known_minute") < CUT)
            .join(stays, on="stay_id", how="semi")
            .select(columns)
            .sort(columns)
            for tables in held
        )
        assert found.equals(earlier), definition
        compared += len(found)
    assert compared > 100


def summary(store: Store) -> pl.DataFrame:
    """``concept, events, stays, median`` of every concept that has an event, in the order of concepts.csv."""
    frame = store.frame(0, len(store.stays))
    table = frame.group_by("concept").agg(
        events=pl.len().cast(pl.Int64),
        stays=pl.col("stay_id").n_unique().cast(pl.Int64),
        median=pl.col("value").cast(pl.Float64).median().round(6),
    )
    return table.sort("concept").with_columns(pl.col("concept").cast(pl.String))


@pytest.mark.parametrize("name", ["MIMICIV", "EICU"])
def test_the_demos_are_read_as_before(name: str, real: Callable[[str], Path]) -> None:
    """Counts exactly, medians to 1e-4."""
    golden = pl.read_csv(Path(__file__).with_name(f"golden_{name.lower()}.csv"))
    found = summary(Cohort(HOSPITALS[name](str(real(DEMOS[name])))).store)
    counts = ("concept", "events", "stays")
    assert found.select(counts).rows() == golden.select(counts).rows()
    assert found["median"].to_list() == pytest.approx(golden["median"].to_list(), rel=1e-4, abs=1e-4)
