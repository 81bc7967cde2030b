"""PhysioNet/CinC Challenges 2012 and 2019: archives or folders of one small file a stay -> stays and events.

2012 (https://physionet.org/content/challenge-2012/): sets a, b, c of 4,000 stays, the first 48 hours, in-hospital death.
2019 (https://physionet.org/content/challenge-2019/): hospital systems A and B, hourly rows, sepsis label.
"""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from datamodules.concepts import CONCEPT
from datamodules.schema import STAYS, conform
from datamodules.tasks import LABEL_LEAD

# 2012: the publisher's 37 time series -> concepts. Arterial and cuff pressures are the publisher's own, separate, variables.
VARIABLES_2012 = {
    "Albumin": "albumin", "ALP": "alkaline_phosphatase", "ALT": "alt", "AST": "ast", "Bilirubin": "bilirubin_total", "BUN": "bun",
    "Cholesterol": "cholesterol", "Creatinine": "creatinine", "DiasABP": "diastolic_bp", "FiO2": "fio2", "GCS": "gcs", "Glucose": "glucose",
    "HCO3": "bicarbonate", "HCT": "hematocrit", "HR": "heart_rate", "K": "potassium", "Lactate": "lactate", "Mg": "magnesium",
    "MAP": "mean_bp",
    "MechVent": "ventilation", "Na": "sodium", "NIDiasABP": "diastolic_bp_cuff", "NIMAP": "mean_bp_cuff", "NISysABP": "systolic_bp_cuff",
    "PaCO2": "paco2", "PaO2": "pao2", "pH": "ph", "Platelets": "platelets", "RespRate": "respiratory_rate", "SaO2": "sao2",
    "SysABP": "systolic_bp",
    "Temp": "temperature", "TroponinI": "troponin_i", "TroponinT": "troponin_t", "Urine": "urine", "WBC": "wbc", "Weight": "weight",
}  # fmt: skip
UNITS_2012 = {1: "cardiac", 2: "cardiac_surgery", 3: "medical", 4: "surgical"}  # ICUType
HOURS_2012 = 48

VARIABLES_2019 = {
    "HR": "heart_rate", "O2Sat": "spo2", "Temp": "temperature", "SBP": "systolic_bp", "MAP": "mean_bp", "DBP": "diastolic_bp",
    "Resp": "respiratory_rate", "EtCO2": "etco2", "BaseExcess": "base_excess", "HCO3": "bicarbonate", "FiO2": "fio2", "pH": "ph",
    "PaCO2": "paco2", "SaO2": "sao2", "AST": "ast", "BUN": "bun", "Alkalinephos": "alkaline_phosphatase", "Calcium": "calcium",
    "Chloride": "chloride", "Creatinine": "creatinine", "Bilirubin_direct": "bilirubin_direct", "Glucose": "glucose", "Lactate": "lactate",
    "Magnesium": "magnesium", "Phosphate": "phosphate", "Potassium": "potassium", "Bilirubin_total": "bilirubin_total",
    "TroponinI": "troponin_i", "Hct": "hematocrit", "Hgb": "hemoglobin", "PTT": "ptt", "WBC": "wbc", "Fibrinogen": "fibrinogen",
    "Platelets": "platelets",
}  # fmt: skip
COLUMNS_2019 = [*VARIABLES_2019, "Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS"]


def files_2012(root: Path, sets: list[str] | None) -> dict[str, list[Path]]:
    """Set -> its files under ``root``; ``sets`` None takes every set that is there."""
    return _pick(
        root,
        sets,
        "abc",
        lambda s: [p for p in (root / f"set-{s}.tar.gz", root / f"set-{s}", root / f"Outcomes-{s}.txt") if p.exists()],
        "set-{}.tar.gz (or a folder set-{})",
        "sets",
        1,
    )


def files_2019(root: Path, systems: list[str] | None) -> dict[str, list[Path]]:
    """System -> its archive or folder under ``root``; ``systems`` None takes every system that is there."""
    names = ("training_set{}.zip", "training_set{}", "training_{}", "training_{}.zip")
    return _pick(
        root,
        systems,
        "AB",
        lambda s: [p for n in names if (p := root / n.format(s)).exists()][:1],
        "training_set{}.zip (or a folder training_set{})",
        "systems",
        1,
    )


def _pick(root, chosen, known, look, expected, option, least):  # type: ignore[no-untyped-def]
    wrong = [c for c in chosen or [] if c not in known]
    if wrong:
        raise ValueError(f"--data.{option} {','.join(wrong)}: expected letters among {','.join(known)}, such as {known[0]},{known[1]}")
    found = {c: look(c) for c in (chosen or known)}
    found = (
        {c: files for c, files in found.items() if len(files) >= least and any("utcomes" not in p.name for p in files)}
        if chosen is None
        else found
    )
    lacking = [c for c, files in found.items() if not any("utcomes" not in p.name for p in files)]
    if lacking or not found:
        letter = (lacking or list(known))[0]
        raise FileNotFoundError(
            f"no data of {letter} in {root}: expected {expected.format(letter, letter)}; set --data.root to the folder that holds it"
        )
    return found


def stays_2012(root: Path, sets: list[str] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Stays (schema ``STAYS`` and ``set``) and events (schema ``RAW_EVENTS``) of the 2012 challenge.

    Values below 0 mean "not recorded" and rows without a parameter are dropped. Records of at most five rows,
    which is no more than the descriptors of admission, are dropped, as in the published benchmarks (12 of the 12,000). A record of minute
    48:00 counts to the last hour. FiO2 is a fraction; MechVent is always 1 and means invasive ventilation.
    """
    tables = []
    for letter, files in files_2012(root, sets).items():
        source = next(p for p in files if not p.name.startswith("Outcomes"))
        rows = _rows_2012(source)
        outcomes = _outcomes_2012(root / f"Outcomes-{letter}.txt")
        tables.append((letter, rows, outcomes))
    rows = pl.concat([r.with_columns(set=pl.lit(letter)) for letter, r, _ in tables])
    outcomes = pl.concat([o for *_, o in tables])
    static = rows.filter(pl.col("minute") == 0, pl.col("parameter").is_in(["Age", "Gender", "Height", "ICUType"])).pivot(
        "parameter", on_columns=["Age", "Gender", "Height", "ICUType"], index=["stay_id", "set"], values="value", aggregate_function="first"
    )
    long_enough = rows.drop_nulls("parameter").group_by("stay_id").len().filter(pl.col("len") > 5)
    valid = rows.filter(pl.col("parameter").is_in(list(VARIABLES_2012)), pl.col("value") >= 0)
    stays = (
        static.join(long_enough, on="stay_id", how="semi")
        .join(outcomes, on="stay_id", how="left")
        .select(
            "stay_id",
            "set",
            patient_id=pl.col("stay_id").cast(pl.String),
            hospital_id=pl.lit("2012"),
            stay_number=1,
            age=pl.when(pl.col("Age") >= 0).then("Age"),
            sex=pl.when(pl.col("Gender") >= 0).then("Gender"),
            height=pl.when(pl.col("Height") > 0).then("Height"),
            unit=pl.col("ICUType").replace_strict(UNITS_2012, default="other"),
            icu_minutes=HOURS_2012 * 60,
            discharge_minute=pl.when(pl.col("Length_of_stay") > 0).then(pl.col("Length_of_stay") * 1440),
            hospital_death=pl.col("In-hospital_death") == 1,
        )
        .sort("stay_id")
    )
    kept = stays.select("stay_id")
    events = valid.join(kept, on="stay_id", how="semi").select(
        "stay_id",
        minute=pl.col("minute").clip(0, HOURS_2012 * 60 - 1).cast(pl.Int32),
        concept=pl.col("parameter").replace_strict(VARIABLES_2012, return_dtype=CONCEPT),
        value=pl.when(pl.col("parameter") == "MechVent").then(2.0).otherwise("value"),
        unit=pl.when(pl.col("parameter") == "FiO2").then(pl.lit("fraction")),
    )
    return stays, events


def _rows_2012(source: Path) -> pl.DataFrame:
    """All records of a set as one table; each starts with its RecordID, which is carried down to its rows."""
    text = b"\n".join(content for _, content in _members(source, ".txt"))  # empty lines are skipped
    table = pl.read_csv(io.BytesIO(text), has_header=False, new_columns=["time", "parameter", "value"], infer_schema=False)
    table = table.filter(pl.col("time") != "Time")
    broken = table.filter(pl.col("value").is_not_null() & pl.col("value").cast(pl.Float64, strict=False).is_null())
    if len(broken):
        raise ValueError(
            f"{source}: expected a number as value, found {broken['value'][0]!r} for {broken['parameter'][0]}; download the file again"
        )
    untimed = table.filter(~pl.col("time").str.contains(r"^\d+:\d\d$"))
    if len(untimed):
        raise ValueError(
            f"{source}: expected a time as hh:mm, found {untimed['time'][0]!r} for {untimed['parameter'][0]}; download the file again"
        )
    clock = pl.col("time").str.split_exact(":", 1)
    return table.select(
        stay_id=pl.when(pl.col("parameter") == "RecordID").then(pl.col("value").cast(pl.Float64).cast(pl.Int64)).forward_fill(),
        minute=clock.struct.field("field_0").cast(pl.Int32) * 60 + clock.struct.field("field_1").cast(pl.Int32),
        parameter="parameter",
        value=pl.col("value").cast(pl.Float64),
    ).filter(pl.col("parameter") != "RecordID")


def _outcomes_2012(path: Path) -> pl.DataFrame:
    schema = {"RecordID": pl.Int64, "Length_of_stay": pl.Int32, "In-hospital_death": pl.Int32}
    if not path.exists():  # prediction on new patients
        return pl.DataFrame(schema=schema).rename({"RecordID": "stay_id"})
    table = pl.read_csv(path, infer_schema=False)
    missing = [c for c in schema if c not in table.columns]
    if missing:
        raise ValueError(f"{path}: column {', '.join(missing)} is missing; expected {', '.join(schema)}, found {', '.join(table.columns)}")
    return table.select(pl.col(c).cast(kind) for c, kind in schema.items()).rename({"RecordID": "stay_id"})


def stays_2019(root: Path, systems: list[str] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Stays (schema ``STAYS``) and events (schema ``RAW_EVENTS``) of the 2019 challenge.

    Row ICULOS = k is the k-th hour in the ICU and lies at minute 60 (k - 1). The label turns 1 six hours before the onset
    that it announces: ``sepsis_minute`` is the end of the first labelled row plus six hours. Without a SepsisLabel column
    it is null. Some records begin later than the stay (``first_minute``): no prediction is made before.
    """
    tables = []
    for letter, files in files_2019(root, systems).items():
        tables.append(_rows_2019(files[0]).with_columns(hospital_id=pl.lit(letter)))
    rows = pl.concat(tables, how="diagonal").with_columns(minute=((pl.col("ICULOS") - 1) * 60).cast(pl.Int32))
    septic = pl.col("minute").filter(pl.col("SepsisLabel") == 1).min()
    stays = (
        rows.group_by("stay_id", "hospital_id")
        .agg(
            age=pl.col("Age").max(),
            sex=pl.col("Gender").max(),
            unit=pl.when(pl.col("Unit1").max() == 1)
            .then(pl.lit("medical"))
            .when(pl.col("Unit2").max() == 1)
            .then(pl.lit("surgical"))
            .otherwise(pl.lit("other")),
            admit_minute=(pl.col("HospAdmTime").min() * 60).round(),
            icu_minutes=pl.col("ICULOS").max() * 60,
            first_minute=pl.col("minute").min(),
            sepsis_minute=septic + 60 + LABEL_LEAD,
        )
        .with_columns(patient_id=pl.col("stay_id").cast(pl.String), stay_number=1)
        .sort("stay_id")
    )
    events = (
        rows.select("stay_id", "minute", *VARIABLES_2019)
        .unpivot(index=["stay_id", "minute"], variable_name="concept", value_name="value")
        .drop_nulls("value")
        .select(
            "stay_id",
            "minute",
            pl.col("concept").replace_strict(VARIABLES_2019, return_dtype=CONCEPT),
            "value",
            unit=pl.lit(None, pl.String),
        )
    )
    return conform(stays, STAYS, "2019 stays"), events


def _rows_2019(source: Path) -> pl.DataFrame:
    """All patients of a system as one table; the files carry no id, so it is repeated by their number of lines."""
    names, contents, header = [], [], b""
    for name, content in _members(source, ".psv"):
        first, _, rest = content.partition(b"\n")
        if header and first != header:
            raise ValueError(
                f"{source}: {name} has other columns than the files before it; expected {header.decode()}, found {first.decode()}"
            )
        header = first
        names.append(name)
        contents.append(rest if rest.endswith(b"\n") or not rest else rest + b"\n")
    found = header.decode().strip().split("|")
    missing = [c for c in COLUMNS_2019 if c not in found]
    if missing:
        raise ValueError(f"{source}: column {', '.join(missing)} is missing; expected {'|'.join(COLUMNS_2019)}, found {header.decode()}")
    try:
        table = pl.read_csv(
            io.BytesIO(b"".join(contents)),
            separator="|",
            has_header=False,
            new_columns=found,
            null_values="NaN",
            schema_overrides=dict.fromkeys(found, pl.Float64),
        )
    except pl.exceptions.ComputeError as error:
        raise ValueError(
            f"{source}: expected numbers, found something else ({str(error).splitlines()[0]}); download the file again"
        ) from error
    ids = np.repeat([int(n[1:]) for n in names], [c.count(b"\n") for c in contents])
    label = [] if "SepsisLabel" in found else [pl.lit(None, pl.Float64).alias("SepsisLabel")]
    return table.with_columns(pl.Series("stay_id", ids, dtype=pl.Int64), *label)


def _members(source: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name without suffix and content of each file of an archive or folder, by name."""
    count = 0
    try:
        if source.is_dir():
            for path in sorted(source.rglob(f"*{suffix}")):
                count += 1
                yield path.stem, path.read_bytes()
        elif source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                for name in sorted(n for n in archive.namelist() if n.endswith(suffix)):
                    count += 1
                    yield Path(name).stem, archive.read(name)
        else:
            with tarfile.open(source) as archive:
                for member in archive:  # in the archive's order: a gzip stream cannot be read backwards
                    if member.isfile() and member.name.endswith(suffix):
                        count += 1
                        yield Path(member.name).stem, archive.extractfile(member).read()  # type: ignore[union-attr]
    except (EOFError, gzip.BadGzipFile, tarfile.ReadError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{source}: the archive is cut off or damaged ({error}); download it again") from error
    if not count:
        raise ValueError(f"{source}: no *{suffix} file found inside; expected one a stay")
