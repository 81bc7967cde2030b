"""PhysioNet/CinC Challenge 2012 (https://physionet.org/content/challenge-2012/): 12,000 stays, 48 hours, in-hospital
death."""

import io
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from datamodules.dictionary import CONCEPT, care_unit, mapping
from datamodules.hospitals import archives
from datamodules.hospitals.base import Hospital, Tables
from datamodules.schema import STAYS, as_events, conform

HOURS = 48
SOURCES = ("set-{}.tar.gz", "set-{}")
DESCRIPTORS = ("Age", "Gender", "Height", "ICUType")
OUTCOMES = {"RecordID": pl.Int64, "Length_of_stay": pl.Int32, "In-hospital_death": pl.Int32}
LEAST_ROWS = (
    6  # records of up to five rows, no more than the descriptors of admission, are no stays, as in published benchmarks
)
VENTILATED = 2.0  # MechVent is always 1 and means invasive ventilation


class PhysioNet2012(Hospital):
    """PhysioNet/CinC Challenge 2012: death in hospital from the first 48 hours in the ICU.

    Set a is the test split. Sets b and c are divided 80 to 20 into train and val with the permutation that published
    work shares (legacy numpy seed 123 over the sorted records of both: Tipirneni & Reddy 2022, doi:10.1145/3516367),
    whichever of them are chosen; so ``seed`` and ``split_by`` do not apply. With only one of the two in the folder
    there is no such split.

    Args:
        root: Folder with the publisher's files.
        sets: Letters of the sets whose stays are used, such as b,c; default: all that are in the folder.
    """

    name = "PhysioNet2012"
    defaults: ClassVar[dict[str, Any]] = {"hours": HOURS}

    def __init__(
        self,
        root: str = "data/physionet2012",
        sets: str | None = None,
        min_age: float = 0,
        **kwargs: Any,
    ):
        super().__init__(root, min_age=min_age, **kwargs)
        self.sets = archives.letters(sets, "abc", "sets")
        if self.seed != 0 or self.split_by != "patient":
            raise ValueError("PhysioNet2012 has the split of published work: leave out --data.seed and --data.split_by")

    def sources(self) -> dict[str, Path]:
        """Set -> its archive or folder: the chosen ones, and both b and c where one of them is, since they share a
        split."""
        present = {s: path for s in "abc" if (path := archives.first_of(self.root, SOURCES, s))}
        lacking = [s for s in self.sets or () if s not in present]
        if lacking or not present:
            raise archives.no_data(self.root, (lacking or ["a"])[0], SOURCES)
        chosen = set(self.sets or present)
        if chosen & {"b", "c"}:
            chosen |= {"b", "c"}
        return {s: path for s, path in present.items() if s in chosen}

    def files(self) -> list[Path]:
        """Archives or records, and outcomes."""
        outcomes = [p for s in self.sources() if (p := self.root / f"Outcomes-{s}.txt").exists()]
        return [f for source in self.sources().values() for f in archives.files_of(source, ".txt")] + outcomes

    def extraction(self) -> dict[str, Any]:
        """Which sets are read."""
        return {"sets": sorted(self.sources())}

    def rules(self) -> list[tuple[str, pl.Expr]]:
        """Stays of the chosen sets, where others had to be read."""
        if self.sets is None or set(self.sources()) <= set(self.sets):
            return []
        return [(f"set {' or '.join(self.sets)}", pl.col("hospital_id").is_in(self.sets))]

    def stays(self) -> pl.DataFrame:
        """Stays with at least six rows; -1 means not recorded. ``hospital_id`` is the set."""
        rows = self._records
        outcomes = pl.concat([self._outcomes(s) for s in self.sources()])
        descriptors = rows.filter(pl.col("minute") == 0, pl.col("parameter").is_in(DESCRIPTORS))
        static = descriptors.pivot(
            "parameter",
            on_columns=list(DESCRIPTORS),
            index=["stay_id", "set"],
            values="value",
            aggregate_function="first",
        )
        counted = rows.drop_nulls("parameter").group_by("stay_id").len().filter(pl.col("len") >= LEAST_ROWS)
        stays = static.join(counted, on="stay_id", how="semi").join(outcomes, on="stay_id", how="left")
        frame = stays.select(
            "stay_id",
            patient_id=pl.col("stay_id").cast(pl.String),
            hospital_id="set",
            stay_number=1,
            age=pl.when(pl.col("Age") >= 0).then("Age"),
            sex=pl.when(pl.col("Gender") >= 0).then("Gender"),
            height=pl.when(pl.col("Height") > 0).then("Height"),
            unit=care_unit("physionet2012", pl.col("ICUType").cast(pl.Int64).cast(pl.String)),
            icu_minutes=HOURS * 60,
            discharge_minute=pl.when(pl.col("Length_of_stay") > 0).then(pl.col("Length_of_stay") * 1440),
            hospital_death=pl.col("In-hospital_death") == 1,
        )
        return conform(frame.sort("stay_id"), STAYS, "2012 stays")

    def tables(self, stays: pl.DataFrame) -> Tables:
        """The records of all sets that are read, as one table."""
        return {"records": self._records.lazy().select("stay_id", "minute", "parameter", "value")}

    def events(self, tables: Tables, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        """The time series; a record of minute 48:00 counts to the last hour, FiO2 is a fraction."""
        variables = mapping("physionet").filter(pl.col("challenge") == "2012")
        variables = variables.select(parameter="variable", concept=pl.col("concept").cast(CONCEPT), unit="unit")
        rows = tables["records"].join(variables.lazy(), on="parameter")
        recorded = pl.col("value") >= 0
        ventilated = pl.when(recorded & (pl.col("parameter") == "MechVent")).then(VENTILATED).otherwise("value")
        return [
            as_events(
                rows.with_columns(
                    minute=pl.col("minute").clip(0, HOURS * 60 - 1),
                    value=ventilated,
                    dropped=pl.when(~recorded.fill_null(False)).then(pl.lit("not_a_number")),
                )
            )
        ]

    def published_split(self, stays: pl.DataFrame, everyone: pl.DataFrame) -> pl.Series:
        """See the class; null for stays of b and c where the folder does not hold both."""
        shared = everyone.filter(pl.col("hospital_id") != "a")["stay_id"].sort().to_numpy()
        train = shared[np.random.RandomState(123).permutation(len(shared))[: int(0.8 * len(shared))]]
        both = {"b", "c"} <= set(everyone["hospital_id"].unique())
        of_shared = pl.when(pl.col("stay_id").is_in(train)).then(pl.lit("train")).otherwise(pl.lit("val"))
        of_shared = of_shared if both else pl.lit(None, pl.String)
        return stays.select(
            split=pl.when(pl.col("hospital_id") == "a").then(pl.lit("test")).otherwise(of_shared)
        ).to_series()

    def split_advice(self) -> str:
        """What to do where the split cannot be told."""
        return "the split of published work needs sets b and c in one folder: add the other, or use --data.split all"

    @cached_property
    def _records(self) -> pl.DataFrame:
        """``set, stay_id, minute, parameter, value`` of every row; each record starts with its RecordID, carried down
        to its rows."""
        tables = []
        for letter, source in self.sources().items():
            text = b"\n".join(content for _, content in archives.members(source, ".txt"))  # empty lines are skipped
            table = pl.read_csv(
                io.BytesIO(text), has_header=False, new_columns=["time", "parameter", "value"], infer_schema=False
            )
            tables.append(_parsed(table.filter(pl.col("time") != "Time"), source).with_columns(set=pl.lit(letter)))
        return pl.concat(tables)

    def _outcomes(self, letter: str) -> pl.DataFrame:
        path = self.root / f"Outcomes-{letter}.txt"
        if not path.exists():  # prediction on new patients
            return pl.DataFrame(schema=OUTCOMES).rename({"RecordID": "stay_id"})
        table = pl.read_csv(path, infer_schema=False)
        missing = [c for c in OUTCOMES if c not in table.columns]
        if missing:
            raise ValueError(
                f"{path}: column {', '.join(missing)} is missing; "
                f"expected {', '.join(OUTCOMES)}, found {', '.join(table.columns)}"
            )
        try:
            return table.select(pl.col(c).cast(kind) for c, kind in OUTCOMES.items()).rename({"RecordID": "stay_id"})
        except pl.exceptions.InvalidOperationError as error:
            raise ValueError(
                f"{path}: expected whole numbers ({str(error).splitlines()[0]}); download it again"
            ) from error


def _parsed(table: pl.DataFrame, source: Path) -> pl.DataFrame:
    broken = table.filter(pl.col("value").is_not_null() & pl.col("value").cast(pl.Float64, strict=False).is_null())
    if len(broken):
        raise ValueError(
            f"{source}: expected a number as value, found {broken['value'][0]!r} for {broken['parameter'][0]}; "
            f"download the file again"
        )
    untimed = table.filter(~pl.col("time").str.contains(r"^\d+:\d\d$"))
    if len(untimed):
        raise ValueError(
            f"{source}: expected a time as hh:mm, found {untimed['time'][0]!r} for {untimed['parameter'][0]}; "
            f"download the file again"
        )
    clock = pl.col("time").str.split_exact(":", 1).struct
    record = pl.when(pl.col("parameter") == "RecordID").then(pl.col("value").cast(pl.Float64).cast(pl.Int64))
    rows = table.select(
        stay_id=record.forward_fill(),
        minute=clock.field("field_0").cast(pl.Int32) * 60 + clock.field("field_1").cast(pl.Int32),
        parameter="parameter",
        value=pl.col("value").cast(pl.Float64),
    )
    return rows.filter(pl.col("parameter").ne_missing("RecordID"))
