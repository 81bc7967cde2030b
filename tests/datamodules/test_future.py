"""Nothing from the future: raw tables cut at an hour of every stay, rebuilt, give the same past, event by event and member by member.

A cut leaves what had been entered before that hour of a patient's first stay, outcomes included. Events that were known by then and
stays that were known to be septic by then must be the same as from the whole files, under every definition.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from datamodules import hospitals, raw
from datamodules.cohort import Cohort
from datamodules.hospitals.base import Hospital

CUTS = [
    ("simulated", 6),
    ("simulated", 24),
    ("demo", 8),
    ("demo", 48),
]  # kind of data, and the hour at which they are cut
DAY = 24 * 60

# table -> columns of time of which the latest says when a row was there
MIMICIV = {
    "icu/chartevents": ("charttime", "storetime"),
    "icu/outputevents": ("charttime", "storetime"),
    "icu/inputevents": ("starttime",),
    "hosp/labevents": ("charttime",),
    "hosp/prescriptions": ("starttime",),
    "hosp/microbiologyevents": ("charttime", "chartdate"),
}
EICU = {
    "vitalPeriodic": ("observationoffset",),
    "vitalAperiodic": ("observationoffset",),
    "lab": ("labresultoffset", "labresultrevisedoffset"),
    "nurseCharting": ("nursingchartoffset", "nursingchartentryoffset"),
    "respiratoryCharting": ("respchartoffset", "respchartentryoffset"),
    "respiratoryCare": ("respcarestatusoffset",),
    "intakeOutput": ("intakeoutputoffset", "intakeoutputentryoffset"),
    "infusionDrug": ("infusionoffset",),
    "medication": ("drugstartoffset", "drugorderoffset"),
    "treatment": ("treatmentoffset",),
    "diagnosis": ("diagnosisoffset",),
    "microLab": ("culturetakenoffset",),
    "admissionDx": ("admitdxenteredoffset",),
}
SYSTEMS = {"MIMICIV": hospitals.MIMICIV, "EICU": hospitals.EICU}


def read(root: Path, table: str) -> pl.DataFrame:
    """A raw table as text, names of columns in lower case."""
    path = raw.find(root, table)
    assert path is not None, table
    frame = pl.read_csv(path, infer_schema=False)
    return frame.rename({c: c.lower() for c in frame.columns})


def put(frame: pl.DataFrame, out: Path, table: str) -> None:
    path = out / f"{table}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_csv(path)


def cut_mimiciv(root: Path, out: Path, hours: int) -> list[int]:
    """Write the tables as they were ``hours`` after the start of each patient's first ICU stay; gives these stays."""
    icu = read(root, "icu/icustays").with_columns(pl.col("intime", "outtime").str.to_datetime())
    first = icu.sort("subject_id", "intime", "stay_id").unique("subject_id", keep="first", maintain_order=True)
    ends = first.select("subject_id", cut=pl.col("intime") + pl.duration(hours=hours))

    def known(frame: pl.DataFrame, *times: str) -> pl.DataFrame:
        latest = pl.max_horizontal(pl.col(c).str.to_datetime(strict=False) for c in times if c in frame.columns)
        joined = frame.join(ends, on="subject_id", how="left", maintain_order="left")
        return joined.filter((latest < pl.col("cut")).fill_null(True)).drop("cut")

    for path in sorted(root.rglob("*.csv*")):
        table = str(path.relative_to(root)).split(".csv")[0]
        if table in MIMICIV:
            put(known(read(root, table), *MIMICIV[table]), out, table)
        elif table not in ("icu/icustays", "hosp/admissions"):
            (out / table).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.relative_to(root))
    blank = icu.join(ends, on="subject_id").filter(pl.col("intime") < pl.col("cut"))
    blank = blank.with_columns(outtime=pl.when(pl.col("outtime") < pl.col("cut")).then("outtime")).drop("cut")
    put(blank.with_columns(pl.col("intime", "outtime").dt.strftime("%Y-%m-%d %H:%M:%S")), out, "icu/icustays")
    admissions = read(root, "hosp/admissions").join(ends, on="subject_id", how="left", maintain_order="left")
    there = (pl.col("dischtime").str.to_datetime(strict=False) < pl.col("cut")).fill_null(False)
    outcomes = ("dischtime", "deathtime", "hospital_expire_flag")
    put(admissions.with_columns(pl.when(there).then(c).alias(c) for c in outcomes).drop("cut"), out, "hosp/admissions")
    return first["stay_id"].cast(pl.Int64).to_list()


def cut_eicu(root: Path, out: Path, hours: int) -> list[int]:
    """Write the tables as they were ``hours`` after the admission of each unit stay; gives the stays."""
    for path in sorted(root.glob("*.csv*")):
        table = next((t for t in EICU if path.name.lower().startswith(f"{t.lower()}.csv")), None)
        if table is not None:
            frame = read(root, table)
            latest = pl.max_horizontal(pl.col(c).cast(pl.Float64) for c in EICU[table] if c in frame.columns)
            put(frame.filter((latest < 60 * hours).fill_null(True)), out, table)
        elif not path.name.lower().startswith(("patient.", "apacheapsvar.")):
            shutil.copy(path, out / path.name)
    patient = read(root, "patient")
    offset = [pl.col(f"{place}dischargeoffset").cast(pl.Float64) < 60 * hours for place in ("unit", "hospital")]
    columns = {"unit": offset[0], "hospital": offset[1]}
    blanked = [
        pl.when(gone).then(c).alias(c)
        for place, gone in columns.items()
        for c in (f"{place}dischargeoffset", f"{place}dischargestatus")
    ]
    put(patient.with_columns(blanked), out, "patient")
    scores = read(root, "apacheApsVar")
    put(scores if 60 * hours > DAY else scores.clear(), out, "apacheApsVar")
    return patient["patientunitstayid"].cast(pl.Int64).to_list()


CUT: dict[str, Callable[[Path, Path, int], list[int]]] = {"MIMICIV": cut_mimiciv, "EICU": cut_eicu}


def events(hospital: Hospital, stays: list[int], before: int) -> pl.DataFrame:
    """What was known of some stays before a minute."""
    store = Cohort(hospital).store
    frame = store.frame(0, len(store.stays)).filter(pl.col("stay_id").is_in(stays))
    return frame.filter(pl.col("minute") < before, pl.col("known_minute") < before)


def members(system: str, root: Path, stays: list[int], hours: int, definition: str) -> set[int]:
    """Stays that a cohort of septic patients may hold at an hour."""
    cohort = Cohort(SYSTEMS[system](str(root), hours=hours, definition=definition))
    return set(cohort.known_septic()["stay_id"]) & set(stays)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, int], tuple[Path, list[int]]]:
    """Gives the folder of cut tables and the stays that are compared."""

    @cache
    def make(system: str, root: Path, hours: int) -> tuple[Path, list[int]]:
        out = tmp_path_factory.mktemp(f"{system}-{hours}")
        stays = CUT[system](root, out, hours)
        return out, stays

    return make


def roots(system: str, request: pytest.FixtureRequest, kind: str) -> Path:
    if kind == "simulated":
        return request.getfixturevalue("mimic" if system == "MIMICIV" else "eicu")
    return request.getfixturevalue("real")("mimic-iv-demo" if system == "MIMICIV" else "eicu-demo")


@pytest.mark.parametrize(("kind", "hours"), CUTS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_event_changes_with_what_comes_later(system, kind, hours, cuts, request) -> None:  # type: ignore[no-untyped-def]
    root = roots(system, request, kind)
    folder, stays = cuts(system, root, hours)
    whole, past = (events(SYSTEMS[system](str(place)), stays, 60 * hours) for place in (root, folder))
    assert len(whole) > 50 * len(set(whole["stay_id"]))
    keys = ["stay_id", "minute", "known_minute", "concept", "value"]
    only = [a.join(b, on=keys, how="anti") for a, b in ((whole, past), (past, whole))]
    assert [len(o) for o in only] == [0, 0], [o.group_by("concept").len().rows() for o in only]


@pytest.mark.parametrize(("kind", "hours"), CUTS)
@pytest.mark.parametrize(
    ("system", "definition"),
    [(s, name) for s, kind in SYSTEMS.items() for name, d in kind.definitions.items() if not d.partial],
)
def test_no_member_changes_with_what_comes_later(system, definition, kind, hours, cuts, request) -> None:  # type: ignore[no-untyped-def]
    root = roots(system, request, kind)
    folder, stays = cuts(system, root, hours)
    assert members(system, root, stays, hours, definition) == members(system, folder, stays, hours, definition)


def test_some_members_are_only_known_later(request: pytest.FixtureRequest) -> None:
    """The comparison has teeth: the retrospective table holds stays that are not known at hour 8."""
    root = request.getfixturevalue("eicu")
    cohort = Cohort(hospitals.EICU(str(root), hours=8))
    retrospective = pl.read_parquet(cohort.sepsis_tables()["sepsis3"]).filter(pl.col("onset_minute") < 480)
    known = set(cohort.known_septic()["stay_id"])
    assert known and not np.array_equal(sorted(known), sorted(retrospective["stay_id"]))
