"""PhysioNet/CinC Challenge 2019 (https://physionet.org/content/challenge-2019/): two hospital systems, hourly rows,
sepsis label."""

import io
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from datamodules.dictionary import CONCEPT, mapping
from datamodules.hospitals import archives
from datamodules.hospitals.base import Hospital, Tables
from datamodules.schema import STAYS, as_events, conform

SOURCES = ("training_set{}.zip", "training_set{}", "training_{}", "training_{}.zip")
LABEL_LEAD = 6 * 60  # the publisher's label turns 1 six hours before the onset
STATIC = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS")


class PhysioNet2019(Hospital):
    """PhysioNet/CinC Challenge 2019: onset of sepsis, predicted at the end of every hour in the ICU.

    By default from hour 1 on, and with ``after_onset``, as the challenge does.

    Args:
        root: Folder with the publisher's files.
        systems: Letters of the hospital systems that are read, such as A or A,B; default: all that are in the folder.
    """

    name = "PhysioNet2019"
    defaults: ClassVar[dict[str, Any]] = {"task": "sepsis_onset", "hours": 1, "after_onset": True}

    def __init__(
        self,
        root: str = "data/physionet2019",
        systems: str | None = None,
        min_age: float = 0,
        **kwargs: Any,
    ):
        super().__init__(root, min_age=min_age, **kwargs)
        self.systems = archives.letters(systems, "AB", "systems")

    def sources(self) -> dict[str, Path]:
        """System -> its archive or folder."""
        present = {s: path for s in "AB" if (path := archives.first_of(self.root, SOURCES, s))}
        lacking = [s for s in self.systems or () if s not in present]
        if lacking or not present:
            raise archives.no_data(self.root, (lacking or ["A"])[0], SOURCES)
        return {s: path for s, path in present.items() if s in (self.systems or present)}

    def files(self) -> list[Path]:
        """Archives or records."""
        return [f for source in self.sources().values() for f in archives.files_of(source, ".psv")]

    def extraction(self) -> dict[str, Any]:
        """Which systems are read."""
        return {"systems": sorted(self.sources())}

    def stays(self) -> pl.DataFrame:
        """Row ICULOS = k is the k-th hour in the ICU and lies at minute 60 (k - 1).

        ``sepsis_minute`` is the end of the first labelled row plus six hours; without a SepsisLabel column it is null.
        Some records begin later than the stay (``first_minute``): no prediction is made before.
        """
        first_labelled = pl.col("minute").filter(pl.col("SepsisLabel") == 1).min()
        unit = (
            pl.when(pl.col("Unit1").max() == 1).then(pl.lit("medical"))
            .when(pl.col("Unit2").max() == 1).then(pl.lit("surgical"))
            .otherwise(pl.lit("other"))
        )  # fmt: skip
        stays = self._records.group_by("stay_id", "hospital_id").agg(
            age=pl.col("Age").max(),
            sex=pl.col("Gender").max(),
            unit=unit,
            admit_minute=(pl.col("HospAdmTime").min() * 60).round(),
            icu_minutes=pl.col("ICULOS").max() * 60,
            first_minute=pl.col("minute").min(),
            sepsis_minute=first_labelled + 60 + LABEL_LEAD,
        )
        stays = stays.with_columns(patient_id=pl.col("stay_id").cast(pl.String), stay_number=1).sort("stay_id")
        return conform(stays, STAYS, "2019 stays")

    def tables(self, stays: pl.DataFrame) -> Tables:
        """The hourly rows of the systems that are read, as one table."""
        return {"records": self._records.lazy().select("stay_id", "minute", *_variables())}

    def events(self, tables: Tables, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        """One event a filled cell."""
        concepts = pl.LazyFrame(
            list(_variables().items()), schema={"variable": pl.String, "concept": CONCEPT}, orient="row"
        )
        long = tables["records"].unpivot(index=["stay_id", "minute"], variable_name="variable", value_name="value")
        return [as_events(long.drop_nulls("value").join(concepts, on="variable"))]

    @cached_property
    def _records(self) -> pl.DataFrame:
        tables = [_rows(source).with_columns(hospital_id=pl.lit(s)) for s, source in self.sources().items()]
        return pl.concat(tables, how="diagonal").with_columns(minute=((pl.col("ICULOS") - 1) * 60).cast(pl.Int32))


def _variables() -> dict[str, str]:
    return dict(mapping("physionet").filter(pl.col("challenge") == "2019").select("variable", "concept").iter_rows())


def _rows(source: Path) -> pl.DataFrame:
    """All patients of a system as one table; the files carry no id, so it is repeated by their number of lines."""
    names, contents, header = [], [], b""
    for name, content in archives.members(source, ".psv"):
        first, _, rest = content.partition(b"\n")
        if header and first != header:
            raise ValueError(
                f"{source}: {name} has other columns than the files before it; "
                f"expected {header.decode()}, found {first.decode()}"
            )
        header = first
        names.append(name)
        contents.append(rest if rest.endswith(b"\n") or not rest else rest + b"\n")
    columns = header.decode().strip().split("|")
    expected = [*_variables(), *STATIC]
    missing = [c for c in expected if c not in columns]
    if missing:
        raise ValueError(
            f"{source}: column {', '.join(missing)} is missing; expected {'|'.join(expected)}, found {header.decode()}"
        )
    try:
        table = pl.read_csv(
            io.BytesIO(b"".join(contents)),
            separator="|",
            has_header=False,
            new_columns=columns,
            null_values="NaN",
            schema_overrides=dict.fromkeys(columns, pl.Float64),
        )
    except pl.exceptions.ComputeError as error:
        raise ValueError(
            f"{source}: expected numbers, found something else ({str(error).splitlines()[0]}); download the file again"
        ) from error
    ids = np.repeat([int(n[1:]) for n in names], [c.count(b"\n") for c in contents])
    label = [] if "SepsisLabel" in columns else [pl.lit(None, pl.Float64).alias("SepsisLabel")]
    return table.with_columns(pl.Series("stay_id", ids, dtype=pl.Int64), *label)
