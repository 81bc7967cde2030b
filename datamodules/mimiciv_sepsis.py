"""MIMIC-IV: suspicion of infection and Sepsis-3 from the raw tables, by default exactly as mimic-code's SQL has them.

Sources: mimic-code ``mimic-iv/concepts`` (MIT, https://github.com/MIT-LCP/mimic-code), named at each function; the words
and the other definitions are explained in ``sepsis.py``.
"""

from pathlib import Path
from typing import Literal

import polars as pl

from datamodules import sepsis
from datamodules.mimiciv_sofa import icu_stays, minutes, sofa_inputs
from datamodules.sofa import sofa
from datamodules.tables import reading, scan

DEFINITIONS = ("mimic_code", "ricu", "yaib", "moor")

NO_CULTURE = (90856, 90760)  # organism items that say "negative" and "cancelled"
NOT_SYSTEMIC_ROUTES = ("OU", "OS", "OD", "AU", "AS", "AD", "TP")
NOT_SYSTEMIC_DRUGS = ["cream", "desensitization", "ophth oint", "gel"]

TERMS = Path(__file__).parent / "terms"


def derive(
    root: Path,
    stays: pl.DataFrame,
    definition: str = "mimic_code",
    *,
    gcs_intubated: Literal["normal", "carried"] = "normal",
    fio2_missing: float | None = None,
    pressor_min_minutes: int = 0,
    urine_min_hours: float = 22,
) -> dict[str, pl.DataFrame]:
    """SOFA, suspicion of infection and Sepsis-3 of the given stays.

    Args:
        root: folder of the MIMIC-IV files.
        stays: schema ``schema.STAYS``; other stays of the files are passed over.
        definition: one of ``DEFINITIONS``, explained in ``sepsis.DEFINITIONS``.
        gcs_intubated: "normal" gives a patient with a tube a GCS of 15, "carried" the last one from before the tube.
        fio2_missing: FiO2 in % for blood gases without one (21 = room air); None leaves them out.
        pressor_min_minutes: shortest vasopressor episode that counts (0 or 60).
        urine_min_hours: charted hours that a 24-hour urine volume needs (22 or 12).

    Returns:
        "sofa" (``sofa.SOFA``), "suspicion" (``sepsis.SUSPICION``), "sepsis3" (``sepsis.SEPSIS3``).
    """
    sepsis.check_definition(definition, DEFINITIONS, "MIMIC-IV")
    scores = sofa(
        sofa_inputs(root, stays, gcs_intubated),
        fio2_missing=fio2_missing,
        pressor_min_minutes=pressor_min_minutes,
        urine_min_hours=urine_min_hours,
    )
    suspected = suspicion(root, stays, definition)
    return {"sofa": scores, "suspicion": suspected, "sepsis3": _septic(definition, suspected, scores)}


def compare_definitions(root: Path, stays: pl.DataFrame) -> pl.DataFrame:
    """How many stays each definition finds, in how many hospitals, and how many of them died: one row a definition."""
    scores = sofa(sofa_inputs(root, stays))
    rows = []
    for definition in DEFINITIONS:
        suspected = suspicion(root, stays, definition)
        rows.append(sepsis.summarise(definition, suspected, _septic(definition, suspected, scores), stays))
    return pl.concat(rows)


def _septic(definition: str, suspected: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    if definition == "mimic_code":
        return sepsis.sepsis3(suspected, scores)
    return sepsis.sepsis3(suspected, scores, "running_min", "any" if definition == "moor" else "first")


def suspicion(root: Path, stays: pl.DataFrame, definition: str = "mimic_code") -> pl.DataFrame:
    """One row per antibiotic of the patients of ``stays``, schema ``sepsis.SUSPICION``.

    "mimic_code" takes the orders of ``hosp/prescriptions`` and gives them the ICU stay in which they start. The others
    count every antibiotic of the hospital admission for the stay that is in progress or comes next, else for the last:
    "ricu" and "moor" orders and administrations, "yaib" administrations that are kept up for 3 days.
    """
    icu = icu_stays(root, stays)
    if definition == "mimic_code":
        antibiotics = _in_stay(ordered_antibiotics(root, icu), icu)
    elif definition == "yaib":
        died = stays.lazy().select("stay_id", "death_minute")
        given = _nearest_stay(given_antibiotics(root), icu).join(died, on="stay_id", how="left")
        timed = given.with_columns(antibiotic_minute=minutes("time"), stop_minute=minutes("stop"))
        antibiotics = sepsis.kept_up(timed).drop("antibiotic_minute", "stop_minute", "death_minute")
    else:
        antibiotics = _nearest_stay(pl.concat([ordered_antibiotics(root, icu), given_antibiotics(root)]), icu)
    matched = sepsis.match_cultures(antibiotics, cultures(root, icu))
    table = matched.select(
        "stay_id",
        pl.col("patient_id").cast(pl.String),
        "antibiotic",
        "specimen",
        pl.lit("antibiotic").alias("evidence"),
        "positive_culture",
        "suspected_infection",
        antibiotic_minute=minutes("time"),
        culture_minute=minutes("culture_time"),
        suspected_minute=minutes("suspected_time"),
    )
    if definition != "mimic_code":  # whose rows are in the order of the SQL
        table = table.sort("stay_id", "antibiotic_minute", "antibiotic", "suspected_minute", "culture_minute")
    with reading(root, "hosp/microbiologyevents"):
        return table.select(*sepsis.SUSPICION).cast(sepsis.SUSPICION).collect()  # type: ignore[arg-type]


def ordered_antibiotics(root: Path, icu: pl.LazyFrame) -> pl.LazyFrame:
    """Systemic antibiotics of ``hosp/prescriptions``: orders, not administrations (``medication/antibiotic.sql``).

    A drug and route that were ordered once as other than a base solution count in every order, as in the SQL.
    """
    columns = {
        "subject_id": "int",
        "hadm_id": "int",
        "starttime": "time",
        "stoptime": "time",
        "drug_type": "str",
        "drug": "str",
        "route": "str",
    }
    fragments = pl.read_csv(TERMS / "mimiciv_antibiotics.csv")["drug_fragment_lower_case"].to_list()
    drug, route = pl.col("drug").str.to_lowercase(), pl.col("route").str.to_lowercase()
    systemic = ~(pl.col("route").is_in(NOT_SYSTEMIC_ROUTES) | route.str.contains("ear|eye") | drug.str.contains_any(NOT_SYSTEMIC_DRUGS))
    with reading(root, "hosp/prescriptions"):
        orders = scan(root, "hosp/prescriptions", columns).filter(drug.str.contains_any(fragments)).collect(engine="streaming").lazy()
    pairs = orders.filter(systemic, pl.col("drug_type") != "BASE").select("drug", "route").unique()
    return (
        orders.join(pairs, on=["drug", "route"], how="semi")
        .join(icu, on="subject_id", how="semi")
        .sort("subject_id", "starttime", "stoptime", "drug", "hadm_id")
        .select("hadm_id", patient_id="subject_id", antibiotic="drug", time="starttime", stop="stoptime")
    )


def given_antibiotics(root: Path) -> pl.LazyFrame:
    """Antibiotics that were given in the ICU: ``icu/inputevents`` of the category "Antibiotics" of ``icu/d_items``."""
    items = scan(root, "icu/d_items", {"itemid": "int", "label": "str", "category": "str", "linksto": "str"})
    items = items.filter(pl.col("category") == "Antibiotics", pl.col("linksto") == "inputevents").select("itemid", "label")
    columns = {"subject_id": "int", "hadm_id": "int", "itemid": "int", "starttime": "time", "endtime": "time"}
    return (
        scan(root, "icu/inputevents", columns)
        .join(items, on="itemid")
        .select("hadm_id", patient_id="subject_id", antibiotic="label", time="starttime", stop="endtime")
    )


def cultures(root: Path, icu: pl.LazyFrame) -> pl.LazyFrame:
    """One row per specimen of ``hosp/microbiologyevents``, of every kind, screening swabs too (``suspicion_of_infection.sql``)."""
    columns = {"subject_id": "int", "micro_specimen_id": "int", "chartdate": "time", "charttime": "time", "spec_type_desc": "str"}
    organism = {"org_itemid": "int", "org_name": "str"}
    grown = ~pl.col("org_itemid").is_in(NO_CULTURE) & (pl.col("org_name") != "CANCELLED")  # null where no organism is named
    return (
        scan(root, "hosp/microbiologyevents", {**columns, **organism})
        .join(icu, on="subject_id", how="semi")
        .group_by(specimen_id="micro_specimen_id")
        .agg(
            patient_id=pl.col("subject_id").max(),
            date=pl.col("chartdate").max(),
            time=pl.col("charttime").max(),
            specimen=pl.col("spec_type_desc").max(),
            positive=grown.fill_null(False).any(),
        )
    )


def _in_stay(antibiotics: pl.LazyFrame, icu: pl.LazyFrame) -> pl.LazyFrame:
    """Add the stay of the same admission in which an antibiotic starts, or none."""
    admitted = icu.select("hadm_id", "stay_id", "intime", "outtime").sort("intime")
    joined = antibiotics.with_row_index("row").sort("time", nulls_last=True)
    joined = joined.join_asof(admitted, left_on="time", right_on="intime", by="hadm_id", coalesce=False, check_sortedness=False)
    inside = (pl.col("time") < pl.col("outtime")).fill_null(False)
    return joined.sort("row").with_columns(pl.when(inside).then(name).alias(name) for name in ("stay_id", "intime")).drop("row", "outtime")


def _nearest_stay(antibiotics: pl.LazyFrame, icu: pl.LazyFrame) -> pl.LazyFrame:
    """Add the stay of the same admission that ends next after an antibiotic, or the last one; other admissions are dropped."""
    stays = icu.select("hadm_id", "stay_id", "intime", "outtime").sort("outtime")
    last = stays.group_by("hadm_id", maintain_order=True).agg(pl.col("stay_id", "intime").last().name.prefix("last_"))
    dated = antibiotics.filter(pl.col("time").is_not_null()).sort("time")
    joined = dated.join_asof(
        stays, left_on="time", right_on="outtime", by="hadm_id", strategy="forward", coalesce=False, check_sortedness=False
    )
    filled = joined.join(last, on="hadm_id").with_columns(pl.coalesce(name, f"last_{name}") for name in ("stay_id", "intime"))
    return filled.drop("outtime", "last_stay_id", "last_intime")
