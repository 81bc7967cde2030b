"""eICU: evidence of infection, where cultures are rare and tables are missing by hospital.

The rules of the definitions are explained in ``derive/sepsis.py``; the names of antibiotics are those of MIMIC-IV.

Sources of the rules:
  [E] eicu-code ``concepts/diagnosis/apache-groups.sql`` (MIT), https://github.com/MIT-LCP/eicu-code
  [M] mimic-code ``medication/antibiotic.sql`` (MIT): ``antibiotics.csv``
  [Y] van de Water 2024, YAIB, https://openreview.net/forum?id=ox2ATRM90I: antibiotics alone are suspicion enough in
      eICU
  [V] Moor 2023, doi:10.1016/j.eclinm.2023.102124: two antibiotics in 24 hours or a positive culture
  [P] choices of this project, measured on the demo
"""

import polars as pl

from datamodules.derive import sepsis
from datamodules.derive.sepsis import Definition, Evidence
from datamodules.dictionary import words
from datamodules.hospitals.base import Tables

# Sources of antibiotics: "name" (medication by name), "code" (medication without a name, by HICL code), "infusion"
# (infusionDrug by name), "treatment". Of diagnoses: "apache" (admission diagnosis of sepsis), "pneumonia" (likewise),
# "diagnosis" (the text of ``diagnosis``).
NAMED = ("name", "infusion")  # all that the pipelines of [V] and [Y] read
ANY = ("name", "code", "infusion", "treatment")
DEFINITIONS = {
    "eicu": Definition(
        "2 antibiotics in 24 hours, an early diagnosis of sepsis or a positive culture; SOFA of 2 or more",
        *(ANY, "two"),
        diagnoses=("apache", "diagnosis"),
        growth=True,
    ),
    "apache": Definition("APACHE admission diagnosis of sepsis; SOFA of 2 or more", diagnoses=("apache",)),
    "diagnosis": Definition("diagnosis of sepsis written within 24 hours; SOFA of 2 or more", diagnoses=("diagnosis",)),
    "any_antibiotic_and_diagnosis": Definition(
        "an antibiotic in any table and one of these two diagnoses; SOFA of 2 or more",
        ANY,
        diagnoses=("apache", "diagnosis"),
        diagnosis_too=True,
    ),
    "yaib": Definition(
        "antibiotic kept up for 3 days; SOFA rises by 2 around the first suspicion (YAIB)",
        *(NAMED, "kept_up"),
        baseline="running_min",
        suspicions="first",
    ),
    "moor": Definition(
        "2 antibiotics in 24 hours or a positive culture; SOFA rises by 2 around any suspicion (Moor 2023)",
        *(NAMED, "two"),
        growth=True,
        baseline="running_min",
    ),
    "literal": Definition("antibiotic and culture as Sepsis-3 asks; SOFA of 2 or more", ANY, "culture"),
    # suspicions that are no definition by themselves, to show what each table adds
    "apache_or_pneumonia": Definition("", diagnoses=("apache", "pneumonia"), diagnosis_by=None, partial=True),
    "diagnosis_any_time": Definition("knows the discharge", diagnoses=("diagnosis",), diagnosis_by=None, partial=True),
    "apache_or_diagnosis": Definition("", diagnoses=("apache", "diagnosis"), partial=True),
    "named_antibiotic": Definition("", NAMED, partial=True),
    "named_or_coded_antibiotic": Definition("", ("name", "code", "infusion"), partial=True),
    "named_antibiotic_or_treatment": Definition("", (*NAMED, "treatment"), partial=True),
    "any_antibiotic": Definition("", ANY, partial=True),
    "two_named_antibiotics": Definition("", NAMED, "two", partial=True),
    "two_antibiotics": Definition("", ANY, "two", partial=True),
    "positive_culture": Definition("", growth=True, partial=True),
    "named_antibiotic_and_culture": Definition("", NAMED, "culture", partial=True),
}

DAY = 24 * 60
SEPSIS_TEXT = "sepsis|septic"  # in diagnosis.diagnosisstring
PNEUMONIA = "Pneumonia"  # how apacheadmissiondx begins
NOT_GROWN = "no growth"  # microLab.organism
# microLab tells when a specimen was taken and not when its result came; 48 hours is when most organisms have a name [P]
GROWTH_KNOWN = pl.duration(hours=48)
# In full [P]: the ointments among the names of [M], and forms that do not reach the blood.
LOCAL_DRUGS = ["cream", "oint", "gel", "ophth", "otic", "drops", "topical", "mupirocin", "bactroban", "neomycin"]
LOCAL_ROUTES = ("top", "tp", "topical", "ophthalmic", "otic", "nasal")
# treatment.treatmentstring; what is given to prevent an infection is not suspicion of one [P]
ANTIBIOTIC_TREATMENT, PROPHYLAXIS = "antibacterials|antibiotics", "prophylactic"

# table -> offset, columns, columns that a file may lack
TABLES: dict[str, tuple[str | None, dict[str, str], dict[str, str]]] = {
    "patient": (None, {"apacheadmissiondx": "str"}, {}),
    "admissionDx": ("admitdxenteredoffset", {"admitdxname": "str"}, {}),
    "medication": (
        "drugstartoffset",
        {
            "drugname": "str",
            "drughiclseqno": "int",
            "routeadmin": "str",
            "drugordercancelled": "str",
            "drugstopoffset": "int",
        },
        {"drugorderoffset": "int"},
    ),
    "treatment": ("treatmentoffset", {"treatmentstring": "str"}, {}),
    "diagnosis": ("diagnosisoffset", {"diagnosisstring": "str"}, {}),
    "microLab": ("culturetakenoffset", {"culturesite": "str", "organism": "str"}, {}),
}
START = pl.datetime(2000, 1, 1)  # eICU dates nothing: every stay begins on this day


def suspicion(tables: Tables, stays: pl.DataFrame, definition: Definition) -> pl.DataFrame:
    """Suspicions of infection of some stays, schema ``derive.sepsis.SUSPICION``; a stay stands for the patient."""
    admitted = stays.lazy().select(
        "stay_id", "patient_id", admitted=START, death=START + pl.duration(minutes="death_minute")
    )
    ids = stays.lazy().select("stay_id")
    kinds = (_antibiotics(tables), _cultures(tables), _diagnoses(tables))
    given, taken, written = (rows.join(ids, on="stay_id", how="semi") for rows in kinds)
    return sepsis.suspicion(Evidence(admitted, given, taken, written), definition)


def _at(minute: str) -> pl.Expr:
    return START + pl.duration(minutes=pl.col(minute))


def _antibiotics(tables: Tables) -> pl.LazyFrame:
    """Systemic antibiotics by source. Cancelled orders are left out; an order counts from its start, known when it was
    entered.

    Four in ten rows of ``medication`` have no name but a code; ``eicu_antibiotic_codes.csv`` has the codes whose named
    rows in the demo are antibiotics.
    """
    fragments = words("antibiotics")["fragment"].to_list()
    codes = words("eicu_antibiotic_codes").select(pl.col("drughiclseqno").cast(pl.Int64), coded="drug").lazy()
    name = pl.col("name").str.to_lowercase()
    systemic = name.str.contains_any(fragments) & ~name.str.contains_any(LOCAL_DRUGS)
    orders = tables["medication"].rename({"drugname": "name", "drugstopoffset": "stop_minute"})
    local = pl.col("routeadmin").str.to_lowercase().str.strip_chars().is_in(LOCAL_ROUTES)
    orders = orders.filter((pl.col("drugordercancelled") != "Yes").fill_null(True), ~local.fill_null(False))
    orders = orders.with_columns(known_minute=pl.max_horizontal("minute", pl.col("drugorderoffset").cast(pl.Int32)))
    named = orders.filter(systemic).with_columns(antibiotic="name", source=pl.lit("name"))
    coded = orders.filter(pl.col("name").is_null()).join(codes, on="drughiclseqno")
    coded = coded.with_columns(antibiotic="coded", source=pl.lit("code"))
    infused = tables["infusionDrug"].rename({"drugname": "name"}).filter(systemic)
    infused = infused.with_columns(antibiotic="name", source=pl.lit("infusion"))
    text = pl.col("treatmentstring").str.to_lowercase()
    treated = tables["treatment"].filter(text.str.contains(ANTIBIOTIC_TREATMENT), ~text.str.contains(PROPHYLAXIS))
    treated = treated.with_columns(antibiotic="treatmentstring", source=pl.lit("treatment"))
    at_once = [rows.with_columns(stop_minute="minute", known_minute="minute") for rows in (infused, treated)]
    columns = ["stay_id", "antibiotic", "source", "minute", "stop_minute", "known_minute"]
    rows = pl.concat([part.select(columns) for part in (named, coded, *at_once)], how="vertical_relaxed")
    return rows.select(
        "stay_id", "antibiotic", "source", patient_id="stay_id", icu_stay_id="stay_id",
        time=_at("minute"), stop=_at("stop_minute"), known=_at("known_minute"),
    )  # fmt: skip


def _cultures(tables: Tables) -> pl.LazyFrame:
    """Specimens of ``microLab``; only some 12 hospitals in 186 fill it."""
    grown = (pl.col("organism").is_not_null() & (pl.col("organism") != NOT_GROWN)).any()
    rows = tables["microLab"].group_by("stay_id", "minute", specimen="culturesite").agg(positive=grown)
    rows = rows.sort("stay_id", "minute", "specimen").with_row_index("specimen_id")
    return rows.select(
        "stay_id", "specimen_id", "specimen", "positive", patient_id="stay_id", time=_at("minute"),
        date=_at("minute").dt.truncate("1d"), result=_at("minute") + GROWTH_KNOWN,
    )  # fmt: skip


def _diagnoses(tables: Tables) -> pl.LazyFrame:
    """Diagnoses of sepsis and pneumonia: "apache" and "pneumonia" of admission, "diagnosis" when it was written.

    The diagnosis of admission counts at minute 0 and is known when ``admissionDx`` says that it was entered, else when
    APACHE's first day is over.
    """
    apache = pl.col("apacheadmissiondx")
    septic = apache.is_in(words("eicu_apache_sepsis")["apacheadmissiondx"].to_list())
    pneumonia = apache.str.starts_with(PNEUMONIA)
    source = pl.when(septic).then(pl.lit("apache")).when(pneumonia).then(pl.lit("pneumonia"))
    admission = tables["patient"].select("stay_id", "apacheadmissiondx", source=source).drop_nulls("source")
    if "admissionDx" in tables:
        entered = (
            tables["admissionDx"]
            .group_by("stay_id", apacheadmissiondx="admitdxname")
            .agg(entered=pl.col("minute").min())
        )
        admission = admission.join(entered, on=["stay_id", "apacheadmissiondx"], how="left")
    else:
        admission = admission.with_columns(entered=pl.lit(None, pl.Int32))
    admission = admission.with_columns(minute=pl.lit(0), known_minute=pl.col("entered").fill_null(DAY))
    written = tables["diagnosis"].filter(pl.col("diagnosisstring").str.to_lowercase().str.contains(SEPSIS_TEXT))
    written = written.select("stay_id", "minute", known_minute="minute", source=pl.lit("diagnosis"))
    columns = ["stay_id", "source", "minute", "known_minute"]
    rows = pl.concat([admission.select(columns), written.select(columns)], how="vertical_relaxed")
    return rows.select("stay_id", "source", time=_at("minute"), known=_at("known_minute"))
