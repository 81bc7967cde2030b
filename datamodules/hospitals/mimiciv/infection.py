"""MIMIC-IV: evidence of infection from the raw tables, by default exactly as mimic-code's SQL has it.

Sources: mimic-code ``mimic-iv/concepts`` (MIT, https://github.com/MIT-LCP/mimic-code), named at each function; the
    words
and the rules of the definitions are explained in ``derive/sepsis.py``.
"""

from pathlib import Path

import polars as pl

from datamodules import raw
from datamodules.derive import sepsis
from datamodules.derive.sepsis import Definition, Evidence
from datamodules.dictionary import words
from datamodules.hospitals.base import Tables

# Sources of antibiotics: "ordered" (hosp/prescriptions) and "given" (icu/inputevents).
DEFINITIONS = {
    "mimic_code": Definition(
        "antibiotic ordered in the ICU and culture; SOFA of 2 or more (mimic-code)",
        ("ordered",),
        "culture",
        in_icu=True,
    ),
    "ricu": Definition(
        "antibiotic ordered or given, and culture, in the admission; SOFA rises by 2 around the first suspicion (ricu)",
        *(("ordered", "given"), "culture"),
        baseline="running_min",
        suspicions="first",
    ),
    "yaib": Definition(
        "antibiotic given and kept up for 3 days, and culture; SOFA rises by 2 around the first suspicion (YAIB)",
        *(("given",), "kept_up_culture"),
        baseline="running_min",
        suspicions="first",
    ),
    "moor": Definition(
        "antibiotic ordered or given, and culture, in the admission; SOFA rises by 2 around any suspicion (Moor 2023)",
        *(("ordered", "given"), "culture"),
        baseline="running_min",
    ),
}

ORDER = {"subject_id": "int", "hadm_id": "int", "starttime": "time", "stoptime": "time"}
ORDER |= {"drug_type": "str", "drug": "str", "route": "str"}
SPECIMEN = {"subject_id": "int", "micro_specimen_id": "int", "chartdate": "time", "charttime": "time"}
SPECIMEN |= {"spec_type_desc": "str", "org_itemid": "int", "org_name": "str"}
NO_CULTURE = (90856, 90760)  # organism items that say "negative" and "cancelled"
NOT_SYSTEMIC_ROUTES = ("OU", "OS", "OD", "AU", "AS", "AD", "TP")
NOT_SYSTEMIC_DRUGS = ["cream", "desensitization", "ophth oint", "gel"]


def suspicion(tables: Tables, stays: pl.DataFrame, definition: Definition) -> pl.DataFrame:
    """One row per antibiotic of the patients of ``stays``, schema ``derive.sepsis.SUSPICION``.

    A definition ``in_icu`` gives an order to the ICU stay in which it starts. The others count every antibiotic of the
    hospital admission for the stay that is in progress or comes next, else for the last.
    """
    icu = tables["icu/icustays"].select("patient_id", "hadm_id", "stay_id", "intime", "outtime")
    death = stays.lazy().select("stay_id", "death_minute")
    admitted = icu.join(death, on="stay_id", how="left").select(
        "stay_id", "patient_id", admitted="intime", death=pl.col("intime") + pl.duration(minutes="death_minute")
    )
    ordered = (
        tables["hosp/prescriptions"]
        .sort("patient_id", "starttime", "stoptime", "drug", "hadm_id")
        .select("patient_id", "hadm_id", antibiotic="drug", time="starttime", stop="stoptime", source=pl.lit("ordered"))
    )
    given = tables["icu/inputevents"].filter(pl.col("antibiotic").is_not_null()).select(
        "patient_id", "hadm_id", "antibiotic", time="starttime", stop="endtime", source=pl.lit("given")
    )  # fmt: skip
    antibiotics = pl.concat([ordered, given]).with_columns(known="time")
    diagnoses = pl.LazyFrame(
        schema={"stay_id": pl.Int64, "source": pl.String, "time": pl.Datetime, "known": pl.Datetime}
    )
    return sepsis.suspicion(Evidence(admitted, _stays_of(antibiotics, icu), _cultures(tables), diagnoses), definition)


def antibiotic_orders(root: Path) -> pl.DataFrame:
    """Systemic antibiotics of ``hosp/prescriptions``: orders, not administrations (``medication/antibiotic.sql``).

    A drug and route that were ordered once, for any patient, as other than a base solution count in every order, as in
    the SQL.
    """
    fragments = words("antibiotics")["fragment"].to_list()
    drug, route = pl.col("drug").str.to_lowercase(), pl.col("route").str.to_lowercase()

    def named() -> pl.DataFrame:
        table = raw.scan(root, "hosp/prescriptions", ORDER)
        return table.filter(drug.str.contains_any(fragments)).collect(engine="streaming")

    orders = raw.attempt(root, "hosp/prescriptions", named)
    local = (
        pl.col("route").is_in(NOT_SYSTEMIC_ROUTES)
        | route.str.contains("ear|eye")
        | drug.str.contains_any(NOT_SYSTEMIC_DRUGS)
    )
    pairs = orders.filter(~local, pl.col("drug_type") != "BASE").select("drug", "route").unique()
    systemic = orders.join(pairs, on=["drug", "route"], how="semi").rename({"subject_id": "patient_id"})
    return systemic.sort("patient_id", "starttime", "stoptime", "drug", "hadm_id")


def specimens(root: Path) -> pl.LazyFrame:
    """Rows of ``hosp/microbiologyevents`` with the columns that are read."""
    table = raw.scan(root, "hosp/microbiologyevents", SPECIMEN)
    return table.rename({"subject_id": "patient_id"})


def _cultures(tables: Tables) -> pl.LazyFrame:
    """One row per specimen, of every kind, screening swabs too (``suspicion_of_infection.sql``)."""
    grown = ~pl.col("org_itemid").is_in(NO_CULTURE) & (
        pl.col("org_name") != "CANCELLED"
    )  # null where no organism is named
    return (
        tables["hosp/microbiologyevents"]
        .group_by(specimen_id="micro_specimen_id")
        .agg(
            patient_id=pl.col("patient_id").max(),
            date=pl.col("chartdate").max(),
            time=pl.col("charttime").max(),
            specimen=pl.col("spec_type_desc").max(),
            positive=grown.fill_null(False).any(),
        )
    )


def _stays_of(antibiotics: pl.LazyFrame, icu: pl.LazyFrame) -> pl.LazyFrame:
    """Add the ICU stay of the same admission in which an antibiotic starts (``icu_stay_id``, or none), and the one that
    ends next after it, or the last one (``stay_id``). A stay without an end is still in progress."""
    stays = icu.select("hadm_id", "intime", pl.col("outtime").fill_null(pl.datetime(9999, 1, 1)), near="stay_id")
    last = stays.sort("outtime").group_by("hadm_id", maintain_order=True).agg(last=pl.col("near").last())
    rows = antibiotics.with_row_index("row").sort("time", nulls_last=True)
    rows = rows.join_asof(
        stays.rename({"near": "icu_stay_id", "outtime": "until"}).sort("intime"),
        left_on="time", right_on="intime", by="hadm_id", coalesce=False, check_sortedness=False,
    )  # fmt: skip
    rows = rows.join_asof(
        stays.select("hadm_id", "near", "outtime").sort("outtime"),
        left_on="time", right_on="outtime", by="hadm_id", strategy="forward", coalesce=False, check_sortedness=False,
    )  # fmt: skip
    inside = (pl.col("time") < pl.col("until")).fill_null(False)
    rows = rows.join(last, on="hadm_id", how="left").with_columns(
        icu_stay_id=pl.when(inside).then("icu_stay_id"),
        stay_id=pl.when(pl.col("time").is_not_null()).then(pl.coalesce("near", "last")),
    )
    return rows.sort("row").drop("row", "intime", "until", "near", "outtime", "last", "hadm_id")
