"""eICU: suspicion of infection and sepsis, where cultures are rare and tables are missing by hospital.

Sources of the rules:
  [E] eicu-code ``concepts/diagnosis/apache-groups.sql`` (MIT), https://github.com/MIT-LCP/eicu-code
  [M] mimic-code ``medication/antibiotic.sql`` (MIT): the names of antibiotics, in ``terms/mimiciv_antibiotics.csv``
  [Y] van de Water 2024, YAIB, https://openreview.net/forum?id=ox2ATRM90I: antibiotics alone are suspicion enough in eICU
  [V] Moor 2023, doi:10.1016/j.eclinm.2023.102124: two antibiotics in 24 hours or a positive culture
  [P] choices of this project, measured on the demo
"""

from pathlib import Path
from typing import Literal

import polars as pl

from datamodules import sepsis
from datamodules.eicu_sofa import hospitals, open_table, sofa_inputs
from datamodules.sofa import SOFA, sofa
from datamodules.tables import reading, scan

DEFINITIONS = ("eicu", "apache", "diagnosis", "any_antibiotic_and_diagnosis", "yaib", "moor", "literal")

DAY = 24 * 60
APACHE_SEPSIS = (  # patient.apacheadmissiondx [E]
    "Sepsis, cutaneous/soft tissue",
    "Sepsis, GI",
    "Sepsis, gynecologic",
    "Sepsis, other",
    "Sepsis, pulmonary",
    "Sepsis, renal/UTI (including bladder)",
    "Sepsis, unknown",
)
SEPSIS_TEXT = "sepsis|septic"  # in diagnosis.diagnosisstring
NOT_GROWN = "no growth"  # microLab.organism
# In full [P]: the ointments among the names of [M], and forms that do not reach the blood.
LOCAL_DRUGS = ["cream", "oint", "gel", "ophth", "otic", "drops", "topical", "mupirocin", "bactroban", "neomycin"]
LOCAL_ROUTES = ("top", "tp", "topical", "ophthalmic", "otic", "nasal")
# treatment.treatmentstring; what is given to prevent an infection is not suspicion of one [P]
ANTIBIOTIC_TREATMENT, PROPHYLAXIS = "antibacterials|antibiotics", "prophylactic"
TERMS = Path(__file__).parent / "terms"
SOFA_EICU = {**SOFA, "pressor_source": pl.String()}  # by hospital: infusion (rates), treatment (tiers of dose), none (not told)


def derive(
    root: Path,
    stays: pl.DataFrame,
    definition: str = "eicu",
    *,
    gcs_intubated: Literal["normal", "carried"] = "normal",
    fio2_missing: float | None = None,
    pressor_min_minutes: int = 0,
    urine_min_hours: float = 22,
    min_hospital_percent: float = 0,
) -> dict[str, pl.DataFrame]:
    """SOFA, suspicion of infection and sepsis of the given stays.

    Args:
        root: folder of the eICU files.
        stays: schema ``schema.STAYS``.
        definition: one of ``DEFINITIONS``, explained in ``sepsis.DEFINITIONS``. "eicu" leaves out hospitals that fill
            neither ``medication`` nor ``treatment``.
        gcs_intubated: "normal" gives a patient with a tube a GCS of 15, "carried" the last one from before the tube.
        fio2_missing: FiO2 in % for blood gases without one (21 = room air); None leaves them out.
        pressor_min_minutes: shortest vasopressor episode that counts (0 or 60).
        urine_min_hours: charted hours that a 24-hour urine volume needs (22 or 12).
        min_hospital_percent: septic stays count only in hospitals where they are at least this share of the stays, in %
            ([V] asks for 15).

    Returns:
        "sofa" (``SOFA_EICU``), "suspicion" (``sepsis.SUSPICION``), "sepsis3" (``sepsis.SEPSIS3``).
    """
    sepsis.check_definition(definition, DEFINITIONS, "eICU")
    scores = _scores(
        root,
        stays,
        gcs_intubated,
        fio2_missing=fio2_missing,
        pressor_min_minutes=pressor_min_minutes,
        urine_min_hours=urine_min_hours,
    )
    suspected = suspicion(root, stays, definition)
    septic = _septic(definition, suspected, scores)
    if min_hospital_percent > 0:
        share = stays.group_by("hospital_id").agg(percent=100 * pl.col("stay_id").is_in(septic["stay_id"].implode()).mean())
        kept = stays.join(share.filter(pl.col("percent") >= min_hospital_percent), on="hospital_id", how="semi")
        septic = septic.join(kept, on="stay_id", how="semi")
    return {"sofa": scores, "suspicion": suspected, "sepsis3": septic}


def compare_definitions(root: Path, stays: pl.DataFrame) -> pl.DataFrame:
    """How many stays each definition finds, in how many hospitals, and how many of them died: one row a definition.

    The last rows are suspicions that are no definition by themselves, to show what each table adds; "diagnosis_any_time"
    knows the discharge and is shown for that reason.
    """
    scores = _scores(root, stays, "normal")
    rows = []
    for definition in DEFINITIONS:
        suspected = suspicion(root, stays, definition)
        rows.append(sepsis.summarise(definition, suspected, _septic(definition, suspected, scores), stays))
    found, written = antibiotics(root, stays), diagnoses(root, stays)
    named = found.filter(pl.col("source").is_in(("name", "infusion")))
    apache = written.filter(pl.col("evidence") == "apache")
    parts = {
        "apache_or_pneumonia": pl.concat([apache, _apache(root, stays, pl.col("text").str.starts_with("Pneumonia"))]),
        "diagnosis_any_time": written.filter(pl.col("evidence") == "diagnosis"),
        "apache_or_diagnosis": written.filter(pl.col("minute") <= DAY),
        "named_antibiotic": named,
        "named_or_coded_antibiotic": found.filter(pl.col("source") != "treatment"),
        "named_antibiotic_or_treatment": found.filter(pl.col("source") != "code"),
        "any_antibiotic": found,
        "two_named_antibiotics": _two(named),
        "two_antibiotics": _two(found),
        "positive_culture": cultures(root, stays).filter("positive"),
    }
    for name, part in parts.items():
        suspected = _rows(part, stays)
        rows.append(sepsis.summarise(name, suspected, sepsis.sepsis3(suspected, scores), stays))
    suspected = _literal(named, cultures(root, stays), stays)
    rows.append(sepsis.summarise("named_antibiotic_and_culture", suspected, sepsis.sepsis3(suspected, scores), stays))
    return pl.concat(rows)


def suspicion(root: Path, stays: pl.DataFrame, definition: str = "eicu") -> pl.DataFrame:
    """The evidence that ``definition`` takes for suspicion of infection, schema ``sepsis.SUSPICION``, by stay and time."""
    found = antibiotics(root, stays)
    named = found.filter(pl.col("source").is_in(("name", "infusion")))  # all that the pipelines of [V] and [Y] read
    early = diagnoses(root, stays).filter(pl.col("minute") <= DAY)
    grown = cultures(root, stays).filter("positive")
    if definition == "literal":
        return _literal(found, cultures(root, stays), stays)
    if definition == "yaib":
        died = stays.lazy().select("stay_id", "death_minute")
        kept = sepsis.kept_up(named.join(died, on="stay_id").rename({"minute": "antibiotic_minute"}))
        return _rows(kept.rename({"antibiotic_minute": "minute"}), stays)
    if definition == "moor":
        return _rows(pl.concat([_two(named), grown], how="diagonal"), stays)
    if definition == "any_antibiotic_and_diagnosis":
        return _rows(found.join(early, on="stay_id", how="semi"), stays)
    if definition == "eicu":
        told = hospitals(root, stays).filter(pl.col("medication") | pl.col("treatment"))
        covered = stays.join(told, on="hospital_id", how="semi")
        return _rows(pl.concat([_two(found), early, grown], how="diagonal"), covered)
    return _rows(early.filter(pl.col("evidence") == definition), stays)


def _septic(definition: str, suspected: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    if definition in ("yaib", "moor"):
        return sepsis.sepsis3(suspected, scores, "running_min", "any" if definition == "moor" else "first")
    return sepsis.sepsis3(suspected, scores)


def antibiotics(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Systemic antibiotics: ``stay_id, minute, stop_minute, antibiotic, evidence, source``.

    Sources: "name" (``medication`` by name), "code" (``medication`` without a name, by HICL code), "infusion", "treatment".
    Four in ten rows of ``medication`` have no name. The codes of antibiotics are learnt from the rows that have both:
    a code counts where at least half of its named rows are antibiotics. Cancelled orders are left out.
    """
    fragments = pl.read_csv(TERMS / "mimiciv_antibiotics.csv")["drug_fragment_lower_case"].to_list()
    name = pl.col("name").str.to_lowercase()
    systemic = name.str.contains_any(fragments) & ~name.str.contains_any(LOCAL_DRUGS)
    columns = {"drugname": "str", "drughiclseqno": "int", "routeadmin": "str", "drugordercancelled": "str", "drugstopoffset": "int"}
    offsets = {"patientunitstayid": "stay_id", "drugstartoffset": "minute", "drugstopoffset": "stop_minute", "drugname": "name"}
    orders = scan(root, "medication", {"patientunitstayid": "int", "drugstartoffset": "int", **columns}).rename(offsets)
    local = pl.col("routeadmin").str.to_lowercase().str.strip_chars().is_in(LOCAL_ROUTES)
    orders = orders.filter((pl.col("drugordercancelled") != "Yes").fill_null(True), ~local.fill_null(False))
    with reading(root, "medication"):
        orders = orders.with_columns(pl.col("minute", "stop_minute").cast(pl.Int32), antibiotic=systemic).collect(engine="streaming").lazy()
    codes = (
        orders.filter(pl.col("name").is_not_null(), pl.col("drughiclseqno").is_not_null())
        .group_by("drughiclseqno")
        .agg(share=pl.col("antibiotic").mean(), text=pl.col("name").mode().sort().first())
        .filter(pl.col("share") >= 0.5)
    )
    orders = orders.filter(pl.col("minute").is_not_null()).join(stays.lazy().select("stay_id"), on="stay_id", how="semi")
    named = orders.filter("antibiotic").select("stay_id", "minute", "stop_minute", antibiotic="name", source=pl.lit("name"))
    coded = orders.filter(pl.col("name").is_null()).join(codes, on="drughiclseqno")
    coded = coded.select("stay_id", "minute", "stop_minute", antibiotic="text", source=pl.lit("code"))
    infusions = open_table(root, stays, "infusionDrug", "infusionoffset", {"drugname": "str"}).rename({"drugname": "name"}).filter(systemic)
    infusions = infusions.select("stay_id", "minute", stop_minute="minute", antibiotic="name", source=pl.lit("infusion"))
    text = pl.col("treatmentstring").str.to_lowercase()
    treatments = open_table(root, stays, "treatment", "treatmentoffset", {"treatmentstring": "str"})
    treatments = treatments.filter(text.str.contains(ANTIBIOTIC_TREATMENT), ~text.str.contains(PROPHYLAXIS))
    treatments = treatments.select("stay_id", "minute", stop_minute="minute", antibiotic="treatmentstring", source=pl.lit("treatment"))
    return pl.concat([named, coded, infusions, treatments]).with_columns(evidence=pl.lit("antibiotic"))


def cultures(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Specimens of ``microLab``: ``stay_id, minute, specimen, positive, evidence``; only some 12 hospitals in 186 fill it."""
    rows = open_table(root, stays, "microLab", "culturetakenoffset", {"culturesite": "str", "organism": "str"})
    grown = (pl.col("organism").is_not_null() & (pl.col("organism") != NOT_GROWN)).any()
    return rows.group_by("stay_id", "minute", specimen="culturesite").agg(positive=grown).with_columns(evidence=pl.lit("culture"))


def diagnoses(root: Path, stays: pl.DataFrame) -> pl.LazyFrame:
    """Diagnoses of sepsis: ``stay_id, minute, evidence``; "apache" at minute 0, "diagnosis" when it was written, at any time."""
    rows = open_table(root, stays, "diagnosis", "diagnosisoffset", {"diagnosisstring": "str"})
    written = rows.filter(pl.col("diagnosisstring").str.to_lowercase().str.contains(SEPSIS_TEXT))
    written = written.select("stay_id", "minute", evidence=pl.lit("diagnosis"))
    return pl.concat([_apache(root, stays, pl.col("text").is_in(APACHE_SEPSIS)), written])


def _apache(root: Path, stays: pl.DataFrame, which: pl.Expr) -> pl.LazyFrame:
    rows = scan(root, "patient", {"patientunitstayid": "int", "apacheadmissiondx": "str"}).rename({"patientunitstayid": "stay_id"})
    rows = rows.rename({"apacheadmissiondx": "text"}).filter(which).join(stays.lazy(), on="stay_id", how="semi")
    return rows.select("stay_id", minute=pl.lit(0, pl.Int32), evidence=pl.lit("apache"))


def _two(found: pl.LazyFrame) -> pl.LazyFrame:
    """Antibiotic records that another follows within 24 hours, at another minute [V]."""
    following = pl.col("minute").shift(-1).over("stay_id", order_by="minute")
    times = found.select("stay_id", "minute").unique().filter(following - pl.col("minute") <= DAY)
    return found.join(times, on=["stay_id", "minute"], how="semi")


def _rows(found: pl.LazyFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Evidence -> schema ``sepsis.SUSPICION``; each row is a suspicion at its own time."""
    table = found.join(stays.lazy().select("stay_id", "patient_id"), on="stay_id")
    absent = [c for c in ("antibiotic", "specimen", "positive") if c not in table.collect_schema()]
    table = table.with_columns(
        *(pl.lit(None).alias(c) for c in absent),
        *(pl.when(pl.col("evidence") == kind).then("minute").alias(f"{kind}_minute") for kind in ("antibiotic", "culture")),
        suspected_minute="minute",
        suspected_infection=pl.lit(True),
    )
    table = table.rename({"positive": "positive_culture"}).select(*sepsis.SUSPICION).cast(sepsis.SUSPICION)  # type: ignore[arg-type]
    return table.sort("stay_id", "suspected_minute", "evidence", "antibiotic", "specimen").collect()


def _literal(found: pl.LazyFrame, taken: pl.LazyFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Antibiotics with their culture, by the rule of MIMIC-IV; a stay stands for the patient, minutes for times."""
    time = pl.datetime(2000, 1, 1) + pl.duration(minutes="minute")
    given = found.select("stay_id", "antibiotic", "minute", patient_id="stay_id", time=time)
    specimens = taken.sort("stay_id", "minute", "specimen").with_row_index("specimen_id")
    specimens = specimens.select("specimen_id", "specimen", "positive", patient_id="stay_id", time=time, date=time.dt.truncate("1d"))
    matched = sepsis.match_cultures(given, specimens).drop("patient_id").join(stays.lazy().select("stay_id", "patient_id"), on="stay_id")

    def minutes(column: str) -> pl.Expr:
        return (pl.col(column) - pl.datetime(2000, 1, 1)).dt.total_minutes()

    table = matched.with_columns(
        evidence=pl.lit("antibiotic"),
        antibiotic_minute="minute",
        culture_minute=minutes("culture_time"),
        suspected_minute=minutes("suspected_time"),
    )
    table = table.select(*sepsis.SUSPICION).cast(sepsis.SUSPICION)  # type: ignore[arg-type]
    return table.sort("stay_id", "antibiotic_minute", "antibiotic").collect()


def _scores(root: Path, stays: pl.DataFrame, gcs_intubated: Literal["normal", "carried"], **switches) -> pl.DataFrame:
    scores = sofa(sofa_inputs(root, stays, gcs_intubated), **switches)
    source = pl.when("infusion").then(pl.lit("infusion")).when("treatment").then(pl.lit("treatment")).otherwise(pl.lit("none"))
    told = hospitals(root, stays).select("hospital_id", pressor_source=source)
    by_stay = stays.select("stay_id", "hospital_id").join(told, on="hospital_id").drop("hospital_id")
    return scores.join(by_stay, on="stay_id", how="left", maintain_order="left").select(*SOFA_EICU)
