"""Simulated patients -> rows of MIMIC-IV and eICU tables, in the publishers' columns, names, units and bad habits.

The values come from ``synthetic_patient.simulate``; this file decides what is charted, where, how often and how badly: about 0.1 %
of the charted numbers are typing errors, 0.3 % of the rows stand twice, some cultures have a date only, eICU hospitals differ in
density, infusion units and in the tables that they fill at all. Simulated data throughout: no row is of a real patient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.synthetic_patient import Patients

Add = Callable[[str, pl.DataFrame], None]  # takes the next rows of a table
Orders = tuple[NDArray, NDArray, NDArray, NDArray]  # of antibiotics: stay, which, start minute, stop minute


# the publishers' columns, table by table
MIMICIV: dict[str, str] = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,admission_location,"
    "discharge_location,insurance,language,marital_status,race,edregtime,edouttime,hospital_expire_flag",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,"
    "valueuom,ref_range_lower,ref_range_upper,flag,priority,comments",
    "hosp/prescriptions": "subject_id,hadm_id,pharmacy_id,poe_id,poe_seq,order_provider_id,starttime,stoptime,drug_type,drug,"
    "formulary_drug_cd,gsn,ndc,prod_strength,form_rx,dose_val_rx,dose_unit_rx,form_val_disp,form_unit_disp,doses_per_24_hrs,route",
    "hosp/microbiologyevents": "microevent_id,subject_id,hadm_id,micro_specimen_id,order_provider_id,chartdate,charttime,spec_itemid,"
    "spec_type_desc,test_seq,storedate,storetime,test_itemid,test_name,org_itemid,org_name,isolate_num,quantity,ab_itemid,ab_name,"
    "dilution_text,dilution_comparison,dilution_value,interpretation,comments",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/d_items": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,highnormalvalue",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning",
    "icu/inputevents": "subject_id,hadm_id,stay_id,caregiver_id,starttime,endtime,storetime,itemid,amount,amountuom,rate,rateuom,"
    "orderid,linkorderid,ordercategoryname,secondaryordercategoryname,ordercomponenttypedescription,ordercategorydescription,"
    "patientweight,totalamount,totalamountuom,isopenbag,continueinnextdept,statusdescription,originalamount,originalrate",
    "icu/outputevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valueuom",
    "icu/procedureevents": "subject_id,hadm_id,stay_id,caregiver_id,starttime,endtime,storetime,itemid,value,valueuom,location,"
    "locationcategory,orderid,linkorderid,ordercategoryname,ordercategorydescription,patientweight,isopenbag,continueinnextdept,"
    "statusdescription,ORIGINALAMOUNT,ORIGINALRATE",
}

EICU: dict[str, str] = {
    "patient": "patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,wardid,apacheadmissiondx,admissionheight,"
    "hospitaladmittime24,hospitaladmitoffset,hospitaladmitsource,hospitaldischargeyear,hospitaldischargetime24,"
    "hospitaldischargeoffset,hospitaldischargelocation,hospitaldischargestatus,unittype,unitadmittime24,unitadmitsource,"
    "unitvisitnumber,unitstaytype,admissionweight,dischargeweight,unitdischargetime24,unitdischargeoffset,unitdischargelocation,"
    "unitdischargestatus,uniquepid",
    "hospital": "hospitalid,numbedscategory,teachingstatus,region",
    "vitalPeriodic": "vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,etco2,"
    "systemicsystolic,systemicdiastolic,systemicmean,pasystolic,padiastolic,pamean,st1,st2,st3,icp",
    "vitalAperiodic": "vitalaperiodicid,patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,"
    "noninvasivemean,paop,cardiacoutput,cardiacinput,svr,svri,pvr,pvri",
    "lab": "labid,patientunitstayid,labresultoffset,labtypeid,labname,labresult,labresulttext,labmeasurenamesystem,"
    "labmeasurenameinterface,labresultrevisedoffset",
    "nurseCharting": "nursingchartid,patientunitstayid,nursingchartoffset,nursingchartentryoffset,nursingchartcelltypecat,"
    "nursingchartcelltypevallabel,nursingchartcelltypevalname,nursingchartvalue",
    "respiratoryCharting": "respchartid,patientunitstayid,respchartoffset,respchartentryoffset,respcharttypecat,"
    "respchartvaluelabel,respchartvalue",
    "respiratoryCare": "respcareid,patientunitstayid,respcarestatusoffset,currenthistoryseqnum,airwaytype,airwaysize,airwayposition,"
    "cuffpressure,ventstartoffset,ventendoffset,priorventstartoffset,priorventendoffset,apneaparams,lowexhmvlimit,hiexhmvlimit,"
    "lowexhtvlimit,hipeakpreslimit,lowpeakpreslimit,hirespratelimit,lowrespratelimit,sighpreslimit,lowironoxlimit,highironoxlimit,"
    "meanairwaypreslimit,peeplimit,cpaplimit,setapneainterval,setapneatv,setapneaippeephigh,setapnearr,setapneapeakflow,"
    "setapneainsptime,setapneaie,setapneafio2",
    "infusionDrug": "infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,volumeoffluid,patientweight",
    "intakeOutput": "intakeoutputid,patientunitstayid,intakeoutputoffset,intaketotal,outputtotal,dialysistotal,nettotal,"
    "intakeoutputentryoffset,cellpath,celllabel,cellvaluenumeric,cellvaluetext",
    "medication": "medicationid,patientunitstayid,drugorderoffset,drugstartoffset,drugivadmixture,drugordercancelled,drugname,"
    "drughiclseqno,dosage,routeadmin,frequency,loadingdose,prn,drugstopoffset,gtc",
    "treatment": "treatmentid,patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge",
    "diagnosis": "diagnosisid,patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring,icd9code,diagnosispriority",
    "admissionDx": "admissiondxid,patientunitstayid,admitdxenteredoffset,admitdxpath,admitdxname,admitdxtext",
    "microLab": "microlabid,patientunitstayid,culturetakenoffset,culturesite,organism,antibiotic,sensitivitylevel",
    "apacheApsVar": "apacheapsvarid,patientunitstayid,intubated,vent,dialysis,eyes,motor,verbal,meds,urine,wbc,temperature,"
    "respiratoryrate,sodium,heartrate,meanbp,ph,hematocrit,creatinine,albumin,pao2,pco2,bun,glucose,bilirubin,fio2",
}


class Lab(NamedTuple):
    """One laboratory value: the panel it is drawn with, its simulated name and its names in both systems."""

    panel: str
    name: str
    itemid: int
    unit: str
    eicu: str
    eicu_unit: str
    decimals: int


LABS: tuple[Lab, ...] = (
    Lab("gas", "ph", 50820, "units", "pH", "", 2),
    Lab("gas", "pao2", 50821, "mm Hg", "paO2", "mm Hg", 0),
    Lab("gas", "paco2", 50818, "mm Hg", "paCO2", "mm Hg", 0),
    Lab("gas", "base_excess", 50802, "mEq/L", "Base Excess", "mEq/L", 0),
    Lab("gas_fio2", "fio2_percent", 50816, "%", "FiO2", "%", 0),
    Lab("gas_lactate", "lactate", 50813, "mmol/L", "lactate", "mmol/L", 1),
    Lab("gas_extra", "spo2", 50817, "%", "O2 Sat (%)", "%", 0),
    Lab("gas_extra", "calcium_ionized", 50808, "mmol/L", "ionized calcium", "mmol/L", 2),
    Lab("gas_rare", "methemoglobin", 50814, "%", "Methemoglobin", "%", 1),
    Lab("chemistry", "sodium", 50983, "mEq/L", "sodium", "mmol/L", 0),
    Lab("chemistry", "potassium", 50971, "mEq/L", "potassium", "mmol/L", 1),
    Lab("chemistry", "chloride", 50902, "mEq/L", "chloride", "mmol/L", 0),
    Lab("chemistry", "bicarbonate", 50882, "mEq/L", "bicarbonate", "mmol/L", 0),
    Lab("chemistry", "anion_gap", 50868, "mEq/L", "anion gap", "", 0),
    Lab("chemistry", "bun", 51006, "mg/dL", "BUN", "mg/dL", 0),
    Lab("chemistry", "creatinine", 50912, "mg/dL", "creatinine", "mg/dL", 1),
    Lab("chemistry", "glucose", 50931, "mg/dL", "glucose", "mg/dL", 0),
    Lab("chemistry", "calcium", 50893, "mg/dL", "calcium", "mg/dL", 1),
    Lab("chemistry", "magnesium", 50960, "mg/dL", "magnesium", "mg/dL", 1),
    Lab("chemistry", "phosphate", 50970, "mg/dL", "phosphate", "mg/dL", 1),
    Lab("count", "wbc", 51301, "K/uL", "WBC x 1000", "K/mcL", 1),
    Lab("count", "hemoglobin", 51222, "g/dL", "Hgb", "g/dL", 1),
    Lab("count", "hematocrit", 51221, "%", "Hct", "%", 1),
    Lab("count", "platelets", 51265, "K/uL", "platelets x 1000", "K/mcL", 0),
    Lab("count", "mcv", 51250, "fL", "MCV", "fL", 0),
    Lab("count", "mch", 51248, "pg", "MCH", "pg", 1),
    Lab("count", "mchc", 51249, "g/dL", "MCHC", "g/dL", 1),
    Lab("differential", "neutrophils", 51256, "%", "-polys", "%", 1),
    Lab("differential", "lymphocytes", 51244, "%", "-lymphs", "%", 1),
    Lab("differential", "bands", 51144, "%", "-bands", "%", 0),
    Lab("liver", "bilirubin", 50885, "mg/dL", "total bilirubin", "mg/dL", 1),
    Lab("liver", "alt", 50861, "IU/L", "ALT (SGPT)", "Units/L", 0),
    Lab("liver", "ast", 50878, "IU/L", "AST (SGOT)", "Units/L", 0),
    Lab("liver", "alkaline_phosphatase", 50863, "IU/L", "alkaline phos.", "Units/L", 0),
    Lab("liver", "albumin", 50862, "g/dL", "albumin", "g/dL", 1),
    Lab("liver_extra", "bilirubin_direct", 50883, "mg/dL", "direct bilirubin", "mg/dL", 1),
    Lab("coagulation", "inr", 51237, "", "PT - INR", "ratio", 1),
    Lab("coagulation", "ptt", 51275, "sec", "PTT", "sec", 1),
    Lab("fibrinogen", "fibrinogen", 51214, "mg/dL", "fibrinogen", "mg/dL", 0),
    Lab("cardiac", "ck", 50910, "IU/L", "CPK", "Units/L", 0),
    Lab("cardiac", "ck_mb", 50911, "ng/mL", "CPK-MB", "ng/mL", 0),
    Lab("cardiac", "troponin_t", 51003, "ng/mL", "troponin - T", "ng/mL", 2),
    Lab("crp", "crp", 50889, "mg/L", "CRP", "mg/L", 1),
)


class Antibiotic(NamedTuple):
    """One antibiotic: name and administration item in MIMIC-IV; order name, HICL code and treatment string in eICU."""

    drug: str
    itemid: int
    order: str
    hicl: int
    treatment: str


ANTIBIOTICS: tuple[Antibiotic, ...] = (
    Antibiotic("Vancomycin", 225798, "VANCOMYCIN 1.25 GM IN NS 250 ML IVPB (REPACKAGE)", 10093, "vancomycin"),
    Antibiotic("Piperacillin-Tazobactam", 225893, "PIPERACILLIN-TAZOBACTAM 3.375 G", 8738, "penicillins|piperacillin/tazobactam"),
    Antibiotic("CefePIME", 225851, "CEFEPIME HCL 2 G IJ SOLR", 10132, "fourth generation cephalosporin|cefepime"),
    Antibiotic("CeftriaXONE", 225855, "CEFTRIAXONE 1 GM IVPB", 3996, "third generation cephalosporin|ceftriaxone"),
    Antibiotic("Meropenem", 225883, "MEROPENEM 1 GM VIAL", 11254, "carbapenem|meropenem"),
    Antibiotic("Levofloxacin", 225879, "LEVOFLOXACIN 750 MG/150 ML IVPB", 12383, "quinolone|levofloxacin"),
    Antibiotic("CefazoLIN", 225850, "CEFAZOLIN 2 GM IVPB", 26808, "first generation cephalosporin|cefazolin"),
)


class Event(NamedTuple):
    """Rows of one item: index of the stay, minute since ICU admission, charted text or number, and the item's own fields."""

    stay: NDArray
    minute: NDArray
    value: NDArray | pl.Series
    fields: dict[str, Any]


def text(values: NDArray, decimals: int) -> pl.Series:
    """Numbers as a nurse or a laboratory would write them: 7.40 -> "7.4", 80.0 -> "80"."""
    return pl.Series(np.round(values, decimals) + 0.0, dtype=pl.Float64).cast(pl.String).str.strip_suffix(".0")


def spoil(values: NDArray, rng: np.random.Generator, rate: float = 0.001) -> NDArray:
    """Replace a few values by what typing errors and loose cables leave behind."""
    values = np.array(values, float)
    where = np.flatnonzero(rng.random(len(values)) < rate)
    wrong = np.stack([np.zeros(len(where)), -values[where], values[where] * 10, np.full(len(where), 9999.0)])
    values[where] = wrong[rng.integers(0, 4, len(where)), np.arange(len(where))]
    return values


def twice(frame: pl.DataFrame, rng: np.random.Generator, rate: float = 0.003) -> pl.DataFrame:
    """The frame with a few of its rows standing twice."""
    return pl.concat([frame, frame[np.flatnonzero(rng.random(frame.height) < rate)]])


def stack(events: list[Event]) -> pl.DataFrame:
    """All events as one frame: ``stay``, ``minute``, ``value`` (text, null if empty) and the fields, by stay and minute."""
    frames = []
    for event in events:
        value = event.value if isinstance(event.value, pl.Series) else text(event.value, 1)
        columns = {"stay": event.stay.astype(np.int64), "minute": event.minute.astype(np.int64), "value": value.rename("value")}
        columns |= {name: field for name, field in event.fields.items() if isinstance(field, np.ndarray | pl.Series)}
        constant = {name: field for name, field in event.fields.items() if name not in columns}
        frames.append(pl.DataFrame(columns).with_columns(pl.lit(field).alias(name) for name, field in constant.items()))
    return pl.concat(frames, how="diagonal_relaxed").sort("stay", "minute", maintain_order=True)


def draws(patients: Patients, rng: np.random.Generator, density: NDArray) -> dict[str, NDArray]:
    """Indices into the hours at which each panel is drawn; ``density`` is one factor per stay for draws beyond the daily one."""
    h, stay = patients.hours, patients.hours["stay"]
    count, size = len(density), len(stay)
    first, sick = h["hour"] == 0, np.clip(h["severity"], 0, 3) * density[stay]
    daily = first | ((h["hour"] + rng.integers(0, 24, count)[stay]) % 24 == 0)
    invasive = (h["vent"] > 0) | (h["dose"] > 0)

    def chance(share: NDArray | float) -> NDArray:
        return rng.random(size) < share

    gas = chance(invasive * 0.16 * density[stay] + 0.008 + 0.01 * sick) | (first & (invasive | chance(0.25)))
    chemistry = daily | chance(0.02 * sick)
    heart = np.isin(patients.stays["unit"][stay], (2, 3))
    panels = {
        "gas": gas,
        "gas_fio2": gas & chance(0.6),
        "gas_lactate": (gas & chance(0.8)) | (daily & chance(0.2 + 0.1 * sick)),
        "gas_extra": gas & chance(0.5),
        "gas_rare": gas & chance(0.03),
        "chemistry": chemistry,
        "count": chemistry & chance(0.93),
        "differential": daily & chance(0.3),
        "liver": daily & chance(0.35 + 0.1 * sick),
        "liver_extra": daily & chance(0.04),
        "coagulation": daily & chance(0.55),
        "fibrinogen": daily & chance(0.06 + 0.05 * sick),
        "cardiac": (h["hour"] % 8 == 0) & (h["hour"] < 24) & chance(np.where(heart, 0.8, 0.12)),
        "crp": daily & chance(0.06),
    }
    return {name: np.flatnonzero(mask & ~patients.stays["silent"][stay]) for name, mask in panels.items()}


def runs(patients: Patients, drug: str, step: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Intervals of constant rate (rounded to ``step``): stay, first hour, hour after the last, rate; zero rates are left out."""
    stay, hour = patients.hours["stay"], patients.hours["hour"]
    level = np.round(patients.hours[drug] / step).astype(np.int64)
    change = np.ones(len(stay), bool)
    change[1:] = (level[1:] != level[:-1]) | (stay[1:] != stay[:-1])
    start = np.flatnonzero(change)
    end = np.append(start[1:], len(stay)) - 1
    keep = (level[start] > 0) & ~patients.stays["silent"][stay[start]]
    start, end = start[keep], end[keep]
    return stay[start], hour[start], hour[end] + 1, level[start] * step


def antibiotics(patients: Patients, rng: np.random.Generator) -> Orders:
    """Orders: stay, index into ``ANTIBIOTICS``, start and stop minute. Infected stays get one or two, some others a prophylaxis."""
    p = patients.stays
    begin = (p["onset_minute"] + rng.integers(30, 400, len(p["age"]))) // 60 * 60
    treated = p["infected"] & (rng.random(len(begin)) < 0.96) & (begin < p["icu_minutes"])
    broad, glyco = np.flatnonzero(treated), np.flatnonzero(treated & (rng.random(len(begin)) < 0.6))
    surgery = np.flatnonzero(~p["infected"] & (rng.random(len(begin)) < np.where(np.isin(p["unit"], (1, 3)), 0.6, 0.05)))
    stay = np.concatenate([broad, glyco, surgery])
    drug = np.concatenate([rng.integers(1, 6, len(broad)), np.zeros(len(glyco), np.int64), np.full(len(surgery), 6)])
    start = np.concatenate([begin[broad], begin[glyco] + 60, np.full(len(surgery), -60)])
    planned = np.where(drug == 6, start + 1440, start + rng.integers(36, 200, len(stay)) * 60)
    return stay, drug, start, np.minimum(planned, np.maximum(p["discharge_minute"][stay], start + 60))


def cultures(patients: Patients, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Specimens: stay, minute, kind (0 blood, 1 urine, 2 sputum, 3 MRSA screen) and organism (-1 none)."""
    p = patients.stays
    count = len(p["age"])
    taken = p["onset_minute"] + np.where(rng.random(count) < 0.75, rng.integers(-300, 60, count), rng.integers(60, 900, count))
    parts = []
    for which, share in enumerate((0.85, 0.55, 0.3)):
        chosen = np.flatnonzero((p["infected"] & (rng.random(count) < share)) | (rng.random(count) < 0.06))
        parts.append((chosen, np.where(p["infected"], taken, rng.integers(-300, 2000, count))[chosen], np.full(len(chosen), which)))
    screened = np.flatnonzero(rng.random(count) < 0.4)
    parts.append((screened, rng.integers(60, 600, len(screened)), np.full(len(screened), 3)))
    stay, minute, kind = (np.concatenate(column) for column in zip(*parts, strict=True))
    positive = rng.random(len(stay)) < np.where(p["infected"][stay], 0.3, 0.05)
    return stay, minute, kind, np.where(positive, rng.integers(0, 5, len(stay)), -1)
