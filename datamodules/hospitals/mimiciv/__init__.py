"""MIMIC-IV (2.2, 3.1 and the demo): raw tables -> stays and events.

Items are in ``dictionary/mimiciv.csv``; they follow mimic-code's ``concepts/measurement`` and ``concepts/medication``
(MIT, https://github.com/MIT-LCP/mimic-code). The files are those of https://physionet.org/content/mimiciv/. SOFA is in
``sofa.py``, suspicion of infection in ``infection.py``.

When a record was known: bedside charting when it was stored (``storetime``), laboratory values when drawn (or stored,
``labs``), infusions when they start or end, since the pump acts whether it is written down or not.
"""

from functools import cached_property
from typing import Any

import polars as pl

from datamodules import raw
from datamodules.derive.sepsis import Definition
from datamodules.derive.sofa import Inputs
from datamodules.derive.treatment import estimated_events, rate_events, volume_events
from datamodules.dictionary import BY_NAME, CONCEPT, care_unit, concept_of, mapping, words
from datamodules.hospitals.base import Hospital, Tables
from datamodules.hospitals.mimiciv import infection, sofa
from datamodules.hospitals.mimiciv.records import infusion_rows, minutes, once, urine_rows
from datamodules.schema import INFUSIONS, STAYS, as_events, conform

LOOKBACK = 24 * 60  # minutes before ICU admission from which hospital-wide records (laboratory) are still taken
VENTILATION = {
    "InvasiveVent": 2.0,
    "Tracheostomy": 2.0,
    "NonInvasiveVent": 1.0,
    "HFNC": 1.0,
    "SupplementalOxygen": 0.0,
    "None": 0.0,
}
# orders whose volume does not go into a vein, or ran before the ICU at a time that is not charted
NOT_INTRAVENOUS = ("13-Enteral Nutrition", "14-Oral/Gastric Intake", "16-Pre Admission/Non-ICU")
VOLUMES = {"ml": 1.0, "l": 1000.0}


class MIMICIV(Hospital):
    """MIMIC-IV: folders ``hosp/`` and ``icu/`` as published."""

    name = "MIMICIV"
    raw_tables = (
        *("icu/chartevents", "icu/icustays", "hosp/patients", "hosp/admissions", "hosp/labevents", "icu/outputevents"),
        *("icu/inputevents", "icu/d_items", "hosp/prescriptions", "hosp/microbiologyevents"),
    )
    partition = "patient_id"  # a patient's laboratory values belong to whichever stay is near
    definitions = infection.DEFINITIONS

    def __init__(self, root: str = "data/mimiciv", **kwargs: Any):
        super().__init__(root, **kwargs)

    def stays(self) -> pl.DataFrame:
        """Every ICU stay of ``icu/icustays``, schema ``STAYS``, in the order of the patients (as the event files are).

        Age is ``anchor_age + year(intime) - anchor_year`` (mimic-code ``demographics/age.sql``; above 89 the publisher
        writes 91). Height and weight are charted, so they come as events. Without the outcome columns of
        ``hosp/admissions`` (prediction on new patients) the outcomes are null.
        """
        icu = _icustays(self)
        patients = raw.read(
            self.root,
            "hosp/patients",
            {"subject_id": "int", "gender": "str", "anchor_age": "float", "anchor_year": "int"},
        )
        outcomes = {"dischtime": "time", "deathtime": "time", "hospital_expire_flag": "int"}
        admissions = raw.read(self.root, "hosp/admissions", {"hadm_id": "int", "admittime": "time"}, outcomes)
        death = pl.col("hospital_expire_flag") == 1
        died = pl.when(death).then(pl.coalesce("deathtime", "dischtime"))
        frame = (
            icu.join(patients, left_on="patient_id", right_on="subject_id", how="left")
            .join(admissions, on="hadm_id", how="left")
            .sort("patient_id", "intime", "stay_id")
            .select(
                stay_id="stay_id",
                patient_id=pl.col("patient_id").cast(pl.String),
                hospital_id=pl.lit("BIDMC"),
                stay_number=pl.int_range(pl.len()).over("patient_id") + 1,
                age=pl.col("anchor_age") + pl.col("intime").dt.year() - pl.col("anchor_year"),
                sex=pl.col("gender").replace_strict({"M": 1.0, "F": 0.0}, default=None),
                unit=care_unit("mimiciv", pl.col("first_careunit"), whole=False),
                admit_minute=minutes("admittime"),
                icu_minutes=minutes("outtime"),
                discharge_minute=minutes(pl.coalesce("dischtime", "deathtime")),
                death_minute=minutes(died),
                hospital_death=death,
                icu_death=pl.when(pl.col("hospital_expire_flag").is_not_null()).then(
                    (death & (pl.col("outtime").is_null() | (died <= pl.col("outtime")))).fill_null(False)
                ),
            )
        )
        return conform(frame, STAYS, "MIMIC-IV stays")

    def tables(self, stays: pl.DataFrame) -> Tables:
        """Only the items of ``dictionary/mimiciv.csv``; of text only what is read; orders only of antibiotics."""
        items = {table: group["itemid"].to_list() for (table,), group in mapping("mimiciv").group_by("table")}
        texts = mapping("mimiciv").filter(
            pl.col("role").is_in(("oxygen_device", "ventilator_mode", "oxygen_flow", "verbal"))
        )
        text = pl.when(pl.col("itemid").is_in(texts["itemid"].to_list())).then("value")
        charted = raw.scan(
            self.root,
            "icu/chartevents",
            {
                "subject_id": "int",
                "stay_id": "int",
                "itemid": "int",
                "charttime": "time",
                "value": "str",
                "valuenum": "float",
            },
            {"storetime": "time", "valueuom": "str"},
            only=("itemid", items["chartevents"]),
        )
        labs = raw.scan(
            self.root,
            "hosp/labevents",
            {"subject_id": "int", "specimen_id": "int", "itemid": "int", "charttime": "time", "valuenum": "float"},
            {"hadm_id": "int", "storetime": "time", "value": "str", "valueuom": "str"},
            only=("itemid", items["labevents"]),
        )
        output = raw.scan(
            self.root,
            "icu/outputevents",
            {"stay_id": "int", "itemid": "int", "charttime": "time", "value": "float"},
            {"storetime": "time", "valueuom": "str"},
            only=("itemid", items["outputevents"]),
        )
        icu = _icustays(self)
        named = {
            "icu/icustays": icu.lazy(),
            "icu/chartevents": charted.with_columns(value=text).rename({"subject_id": "patient_id"}),
            "hosp/labevents": labs.rename({"subject_id": "patient_id"}),
            "icu/outputevents": output.join(
                icu.lazy().select("stay_id", "patient_id"), on="stay_id", maintain_order="left"
            ),
            "icu/inputevents": _inputevents(self),
        }
        if set(infection.ORDER) <= set(raw.columns(self.root, "hosp/prescriptions")):
            named["hosp/prescriptions"] = self._orders.lazy()
        if set(infection.SPECIMEN) <= set(raw.columns(self.root, "hosp/microbiologyevents")):
            named["hosp/microbiologyevents"] = infection.specimens(self.root)
        return named

    def events(self, tables: Tables, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        """What was charted, measured, put out and infused, schema ``schema.EVENTS``."""
        infused = infusion_rows(tables)
        usable = _usable(infused)
        refused = infused.filter(pl.col("rate").is_null() | pl.col("dropped").is_not_null()).select(
            "stay_id",
            "dropped",
            minute="start_minute",
            concept=pl.col("drug").cast(CONCEPT),
            value="charted",
            unit="rateuom",
        )
        return [
            _charted(tables),
            _measured(tables, self.labs),
            _urine(tables),
            rate_events(usable),
            estimated_events(usable),
            as_events(refused),
            _fluids(tables),
        ]

    def infusions(self, tables: Tables, stays: pl.DataFrame) -> pl.LazyFrame:
        """Infusion intervals of ``icu/inputevents``; a rate in a unit without a rule is left out and counted in the
        coverage table."""
        return _usable(infusion_rows(tables)).filter(pl.col("rate") > 0)

    def sofa_inputs(
        self, tables: Tables, events: pl.LazyFrame, stays: pl.DataFrame, before: int | None = None
    ) -> Inputs:
        """As mimic-code's SQL takes them from the raw tables, see ``sofa.py``."""
        return sofa.sofa_inputs(tables, self.infusions(tables, stays), self.labs, before)

    def suspicion(self, tables: Tables, stays: pl.DataFrame, definition: Definition) -> pl.DataFrame:
        """See ``infection.py``."""
        if "hosp/prescriptions" not in tables:
            infection.antibiotic_orders(self.root)  # says what is missing
        if "hosp/microbiologyevents" not in tables:
            infection.specimens(self.root)
        return infection.suspicion(tables, stays, definition)

    @cached_property
    def _orders(self) -> pl.DataFrame:
        return infection.antibiotic_orders(self.root)


def _icustays(hospital: Hospital) -> pl.DataFrame:
    """``patient_id, hadm_id, stay_id, first_careunit, intime, outtime`` of every stay."""
    columns = {"subject_id": "int", "hadm_id": "int", "stay_id": "int", "intime": "time"}
    table = raw.read(hospital.root, "icu/icustays", columns, {"first_careunit": "str", "outtime": "time"})
    return table.rename({"subject_id": "patient_id"})


def _inputevents(hospital: Hospital) -> pl.LazyFrame:
    """Rows with a rate or an amount, with the drug or the antibiotic that an item is, if it is one."""
    table = raw.scan(
        hospital.root,
        "icu/inputevents",
        {"subject_id": "int", "stay_id": "int", "itemid": "int", "starttime": "time", "endtime": "time"}
        | {"rate": "float"},
        {
            "hadm_id": "int", "storetime": "time", "rateuom": "str", "amount": "float", "amountuom": "str",
            "orderid": "int", "ordercategoryname": "str", "patientweight": "float", "statusdescription": "str",
        },
    )  # fmt: skip
    drugs = (
        concept_of("mimiciv", "itemid", table="inputevents")
        .select("itemid", drug=pl.col("concept").cast(pl.String))
        .lazy()
    )
    table = table.rename({"subject_id": "patient_id"}).join(drugs, on="itemid", how="left", maintain_order="left")
    if not raw.find(hospital.root, "icu/d_items"):
        return table.with_columns(antibiotic=pl.lit(None, pl.String))
    items = raw.read(
        hospital.root, "icu/d_items", {"itemid": "int", "label": "str", "category": "str", "linksto": "str"}
    )
    given = items.filter(pl.col("category") == "Antibiotics", pl.col("linksto") == "inputevents")
    given = given.select("itemid", antibiotic="label")
    return table.join(given.lazy(), on="itemid", how="left", maintain_order="left")


def _usable(infused: pl.LazyFrame) -> pl.LazyFrame:
    running = infused.filter(pl.col("dropped").is_null(), pl.col("rate").is_not_null())
    return running.sort("stay_id", "drug", "start_minute").select(pl.col(c).cast(kind) for c, kind in INFUSIONS.items())


def _charted(tables: Tables) -> pl.LazyFrame:
    """``icu/chartevents``; ventilation from the text of device and mode."""
    items = mapping("mimiciv").filter(pl.col("table") == "chartevents", pl.col("concept").is_not_null())
    concepts = items.select("itemid", pl.col("concept").cast(CONCEPT), own="unit").lazy()
    status = words("mimiciv_ventilation").select(
        pl.col("itemid").cast(pl.Int64),
        text=pl.col("text").str.strip_chars(),
        level=pl.col("status").replace_strict(VENTILATION, return_dtype=pl.Float64),
    )
    ventilation = pl.col("concept") == "ventilation"
    rows = (
        tables["icu/chartevents"]
        .join(concepts, on="itemid")
        .join(tables["icu/icustays"].select("stay_id", "intime"), on="stay_id")
    )
    rows = rows.select(
        "stay_id",
        "concept",
        "itemid",
        minute=minutes("charttime"),
        known_minute=minutes(pl.max_horizontal("charttime", "storetime")),
        text=pl.when(ventilation).then(pl.col("value").str.strip_chars()),
        value="valuenum",
        unit=pl.coalesce("valueuom", "own"),
    )
    device = rows.filter(ventilation).join(status.lazy(), on=["itemid", "text"])
    device = device.with_columns(value="level", unit=pl.lit(None, pl.String))
    return pl.concat([as_events(rows.filter(~ventilation)), as_events(device)])


def _measured(tables: Tables, labs: str) -> pl.LazyFrame:
    """Laboratory values by patient and time: they carry no stay, and those of the day before admission are kept.

    Venous and mixed gases are left out where the specimen is named (mimic-code ``bg.sql`` scores arterial ones only). A
    result that stands in the text only, such as ">16.00", counts as its limit.
    """
    items = mapping("mimiciv").filter(pl.col("table") == "labevents")
    arterial = items.filter(pl.col("role") == "arterial")["itemid"].to_list()
    specimen = items.filter(pl.col("role") == "specimen")["itemid"].to_list()
    rows = tables["hosp/labevents"]
    gas = rows.filter(pl.col("itemid").is_in(specimen), ~pl.col("value").str.to_uppercase().str.starts_with("ART"))
    gas = gas.select("specimen_id", venous=pl.lit(True)).unique()
    draw, leave = pl.col("charttime"), pl.col("outtime")
    known = pl.max_horizontal("charttime", "storetime") if labs == "stored" else draw
    near = (draw >= pl.col("intime") - pl.duration(minutes=LOOKBACK)) & (leave.is_null() | (draw <= leave))
    return as_events(
        rows.join(concept_of("mimiciv", "itemid", table="labevents").lazy(), on="itemid")
        .join(tables["icu/icustays"].select("patient_id", "stay_id", "intime", "outtime"), on="patient_id")
        .filter(near)
        .join(gas, on="specimen_id", how="left")
        .filter(pl.col("venous").is_null() | ~pl.col("itemid").is_in(arterial))
        .select(
            "stay_id",
            "concept",
            minute=minutes("charttime"),
            known_minute=minutes(known),
            value=pl.coalesce("valuenum", raw.censored(pl.col("value"))),
            unit="valueuom",
        )
    )


def _urine(tables: Tables) -> pl.LazyFrame:
    """Urine by the minute, net of the irrigant that was put in before and has not come out yet."""
    rows = urine_rows(tables)
    volume = BY_NAME["urine"]
    entry = pl.col("put_in") | pl.col("value").is_between(volume.low, volume.high)
    usable = (
        pl.col("dropped").is_null()
        & entry.fill_null(False)
        & (pl.col("unit").fill_null("mL").str.to_lowercase() == "ml")
    )
    at = ["stay_id", "known_minute", "minute"]
    summed = rows.filter(usable).group_by(at).agg(
        pl.col("value").sum(), only_in=pl.col("put_in").all(), put_in=pl.col("put_in").any()
    )  # fmt: skip

    def so_far(expression: pl.Expr) -> pl.Expr:  # in the order in which it was known
        return expression.over("stay_id", order_by=["known_minute", "minute"])

    # what came out so far, less what was put in, is urine once it passes what was counted before
    balance = summed.with_columns(
        total=pl.max_horizontal(so_far(pl.col("value").cum_sum()), 0.0), irrigated=so_far(pl.col("put_in").cum_max())
    ).with_columns(so_far(pl.col("total").cum_max()))
    passed = (pl.col("total") - so_far(pl.col("total").shift(fill_value=0))).round(6)
    net = balance.with_columns(value=pl.when("irrigated").then(passed).otherwise("value"))
    urine = as_events(net.filter(~pl.col("only_in")).with_columns(concept=pl.lit("urine"), unit=pl.lit("mL")))
    return pl.concat([urine, as_events(rows.filter(~usable).with_columns(concept=pl.lit("urine")))])


def _fluids(tables: Tables) -> pl.LazyFrame:
    """Everything that ran into a vein, by the hour: rows whose amount is a volume, drips' carriers included."""
    volume = pl.col("amount") * pl.col("amountuom").str.to_lowercase().replace_strict(
        VOLUMES, default=None, return_dtype=pl.Float64
    )
    rows = once(tables["icu/inputevents"]).with_columns(volume=volume)
    rows = rows.filter(
        pl.col("volume") > 0,
        pl.col("endtime") > pl.col("starttime"),
        ~pl.col("ordercategoryname").fill_null("").is_in(NOT_INTRAVENOUS),
    )
    timed = rows.join(tables["icu/icustays"].select("stay_id", "intime"), on="stay_id").select(
        "stay_id", "volume", "dropped", start_minute=minutes("starttime"), end_minute=minutes("endtime")
    )
    refused = timed.filter(pl.col("dropped").is_not_null())
    refused = refused.select("stay_id", "dropped", minute="start_minute", concept=pl.lit("fluids"), value="volume")
    return pl.concat([volume_events(timed.filter(pl.col("dropped").is_null()), "fluids"), as_events(refused)])
