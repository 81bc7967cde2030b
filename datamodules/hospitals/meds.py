"""MEDS, the Medical Event Data Standard (https://github.com/Medical-Event-Data-Standard/meds): any dataset of it, read
through a small table that says which of its codes mean what.

A dataset is one long table of ``subject_id, time, code, numeric_value, text_value``. A line of the mapping gives a
code, or all codes that begin alike, one meaning: a concept of ``dictionary/concepts.csv``, or one of ``ROLES``, which
the stays are made of. ``experiments/meds.py`` writes what is read here.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from datamodules import raw
from datamodules.dictionary import BY_NAME, CARE_UNITS, conversion
from datamodules.hospitals.base import Hospital, Tables
from datamodules.hospitals.tables import DERIVED, with_defaults
from datamodules.schema import STAYS, as_events, conform

MAPPING, CODES, SPLITS = "mapping.csv", "metadata/codes.parquet", "metadata/subject_splits.parquet"
SPLIT = {"train": "train", "tuning": "val", "held_out": "test"}  # the format's names -> ours
LOOKBACK = pl.duration(days=1)  # before ICU admission, from when on the record of a stay is taken, as of MIMIC-IV
NONE = ("", "UNK")  # how the end of a code says that it has no unit
# role -> what may stand after it and a colon; "*" is what the * of the code stands for
ROLES = {
    "icu_admission": ("", "*", *CARE_UNITS),
    "icu_discharge": ("",),
    "hospital_admission": ("",),
    "hospital_discharge": ("", "alive", "dead"),
    "birth": ("",),
    "death": ("",),
    "sex": ("male", "female"),
    "stay": tuple(c for c in STAYS if c != "stay_id"),
}
COLUMNS = ("code", "concept", "unit", "factor", "note")  # of the mapping
NEEDED: dict[str, pl.DataType] = {"subject_id": pl.Int64(), "time": pl.Datetime("us"), "code": pl.String()}
OPTIONAL: dict[str, pl.DataType] = {
    "numeric_value": pl.Float64(),
    "text_value": pl.String(),
    "unit": pl.String(),
    "known_time": pl.Datetime("us"),
    "stay_id": pl.Int64(),
    "icustay_id": pl.Int64(),
}


class Line(NamedTuple):
    """A line of the mapping."""

    code: str  # the code, or how codes begin and a *
    name: str  # concept or role
    argument: str  # what stands after it and a colon
    unit: str | None  # in which the values are; "*": what the * of the code stands for
    factor: float  # value * factor is in ``unit``


class MEDS(Hospital):
    """A dataset of the Medical Event Data Standard: ``data/**/*.parquet`` and ``metadata/``.

    Every ICU admission is a stay. A row belongs to the stay that its column ``stay_id`` or ``icustay_id`` names, where
    all ICU admissions have one; else to every stay in whose record its time lies, which goes from a day before ICU
    admission to ICU discharge. A column ``known_time`` says when a row became known (default: at its time). Where
    ``metadata/subject_splits.parquet`` is there, it is the split, so ``seed`` and ``split_by`` do not apply.

    Args:
        root: Folder with the dataset.
        mapping: CSV that says which code means what (docs/data.md); default: mapping.csv in the folder.
    """

    name = "MEDS"
    published_ids = False
    raw_tables = ("data",)

    def __init__(self, root: str = "data/meds", mapping: str | None = None, **kwargs: Any):
        super().__init__(root, **kwargs)
        self.mapping = self.root / MAPPING if mapping is None else Path(mapping)
        if (self.root / SPLITS).exists() and (self.seed != 0 or self.split_by != "patient"):
            raise ValueError(f"{self.root / SPLITS} is the split: leave out --data.seed and --data.split_by")

    def files(self) -> list[Path]:
        """The shards, and the list of codes."""
        return [*self._paths(), *([self.root / CODES] if (self.root / CODES).exists() else [])]

    def extraction(self) -> dict[str, Any]:
        """What the mapping says."""
        return {"mapping": hashlib.blake2b(repr(self._lines).encode(), digest_size=8).hexdigest()}

    def stays(self) -> pl.DataFrame:
        """One stay an ICU admission; a column that the mapping gives (stay:COLUMN) is taken from its rows alone."""
        given = self._given()
        made = self._made()
        table = made.drop(c for c in given.columns if c != "stay_id" and c in made.columns)
        table = table.join(given, on="stay_id", how="left", maintain_order="left")
        return with_defaults(conform(table, STAYS, f"stays of {self.root}"))

    def tables(self, stays: pl.DataFrame) -> Tables:
        """The rows of concepts that lie in a stay."""
        rows = self._placed(self._rows().join(self._concepts(), on="code", maintain_order="left"), self._records)
        return {
            "data": rows.select(
                "stay_id",
                minute=_minutes(pl.col("time")),
                known_minute=_minutes(pl.col("known_time")),
                concept="name",
                value=_VALUE,
                unit=pl.when(pl.col("constant").is_null()).then(pl.coalesce("unit_of_code", "unit")),
            )
        }

    def events(self, tables: Tables, stays: pl.DataFrame) -> list[pl.LazyFrame]:
        """The rows; a number that stands in the text only counts."""
        return [as_events(tables["data"])]

    def unread(self) -> pl.DataFrame:
        """Rows of codes without a line in the mapping, and rows of concepts that lie in no stay or have no time."""
        after = pl.col("until").cum_max().shift().over("subject_id", order_by="begin") + pl.duration(microseconds=1)
        apart = self._records.with_columns(begin=pl.max_horizontal("begin", after))  # a row counts once
        mapped = self._rows().join(self._concepts(), on="code").select(*NEEDED, "stay")
        placed = self._collect(self._placed(mapped, apart).group_by("code").len("placed"))
        codes = self._codes.join(self._described, on="code", how="left").join(placed, on="code", how="left")
        unknown = pl.col("name").is_null()
        table = codes.filter(unknown | ~pl.col("name").is_in(list(ROLES))).select(
            pl.col("code").fill_null("no code"),
            "description",
            rows=pl.when(unknown).then("rows").otherwise(pl.col("rows") - pl.col("placed").fill_null(0)),
            why=pl.when(unknown).then(pl.lit("not in the mapping")).otherwise(pl.lit("in no stay")),
        )
        return table.filter(pl.col("rows") > 0).sort("rows", "code", descending=[True, False])

    def published_split(self, stays: pl.DataFrame, everyone: pl.DataFrame) -> pl.Series | None:
        """The split of the dataset, where it has one; null for a subject that is in none of train, tuning, held_out."""
        path = self.root / SPLITS
        if not path.exists():
            return None
        table = _read(path, {"subject_id": pl.Int64(), "split": pl.String()})
        of_subject = table.unique("subject_id", keep="first", maintain_order=True)
        split = pl.col("split").replace_strict(SPLIT, default=None, return_dtype=pl.String)
        if any(line.argument == "patient_id" for line in self._lines):
            subjects = stays.join(self._records, on="stay_id", how="left", maintain_order="left").select("subject_id")
        else:  # without a look into the data
            subjects = stays.select(subject_id=pl.col("patient_id").cast(pl.Int64))
        return subjects.join(of_subject, on="subject_id", how="left", maintain_order="left").select(split).to_series()

    def split_advice(self) -> str:
        """What to do where the split cannot be told."""
        return f"{SPLITS} names no subject of it ({', '.join(SPLIT)}); correct or remove it, or use --data.split all"

    # ---- the dataset -----------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}: expected a MEDS dataset; set --data.root")
        shards = sorted((self.root / "data").rglob("*.parquet"))
        if not shards:
            raise FileNotFoundError(f"no MEDS dataset in {self.root}: expected data/*.parquet; set --data.root")
        return shards

    @cached_property
    def _shards(self) -> list[tuple[pl.Schema, list[Path]]]:
        """The shards, those of the same columns together."""
        alike: dict[tuple[Any, ...], tuple[pl.Schema, list[Path]]] = {}
        for path in self._paths():
            schema = _schema(path, NEEDED, OPTIONAL)
            alike.setdefault(tuple(schema.items()), (schema, []))[1].append(path)
        return list(alike.values())

    def _rows(self) -> pl.LazyFrame:
        """Every row: ``subject_id, time, code``, those of ``OPTIONAL``, and as ``stay`` the stay that it names."""
        parts = [_conformed(paths, schema, NEEDED | OPTIONAL) for schema, paths in self._shards]
        return pl.concat(parts).with_columns(stay=pl.coalesce("stay_id", "icustay_id")).drop("stay_id", "icustay_id")

    def _collect(self, rows: pl.LazyFrame) -> pl.DataFrame:
        return raw.attempt(self.root, "data", lambda: rows.collect(engine="streaming"))

    @cached_property
    def _described(self) -> pl.DataFrame:
        """``code, description`` of the dataset's own list of codes."""
        path, kinds = self.root / CODES, {"code": pl.String(), "description": pl.String()}
        if not path.exists():
            return pl.DataFrame(schema=kinds)
        return _read(path, {"code": pl.String()}, {"description": pl.String()}).unique("code", maintain_order=True)

    # ---- the mapping -----------------------------------------------------------------------------------------------

    @cached_property
    def _lines(self) -> list[Line]:
        """The mapping, checked."""
        path = self.mapping
        if not path.is_file():
            raise FileNotFoundError(
                f"no mapping {path}: expected a CSV with the columns code, concept, which says which code means what "
                f"(docs/data.md); set --data.mapping"
            )
        try:
            table = pl.read_csv(path, infer_schema=False)
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{path}: the mapping cannot be read ({str(error).splitlines()[0]}); repair it") from error
        odd = [c for c in table.columns if c not in COLUMNS]
        if odd or not {"code", "concept"} <= set(table.columns):
            raise ValueError(
                f"{path}: expected the columns code and concept, and of unit, factor and note what is needed; "
                f"found {', '.join(table.columns)}"
            )
        table = table.select(pl.all().str.strip_chars()).filter(~pl.all_horizontal(pl.all().is_null()))
        lines = [_line(row, path) for row in table.iter_rows(named=True)]
        codes = [line.code for line in lines]
        repeated = [code for code in codes if codes.count(code) > 1]
        if repeated:
            raise ValueError(f"{path}: code {repeated[0]} stands more than once; remove one line")
        if not any(line.name == "icu_admission" for line in lines):
            raise ValueError(f"{path}: no code is mapped to icu_admission, and stays are made of these; add a line")
        return lines

    @cached_property
    def _codes(self) -> pl.DataFrame:
        """Every code of the data: ``code, rows``, and what the mapping says: ``name, argument, unit_of_code, factor,
        constant``; the exact line holds, else that of the longest beginning."""
        counted = self._collect(self._rows().group_by("code").len("rows")).sort("code")
        exact = {line.code: line for line in self._lines}
        begun = {line.code[:-1]: line for line in self._lines if line.code.endswith("*")}
        longest = sorted(begun, key=len, reverse=True)

        def line_of(code: str) -> Line | None:
            return exact.get(code) or next((begun[start] for start in longest if code.startswith(start)), None)

        known = {*counted["code"].drop_nulls(), *self._described["code"].drop_nulls()}
        idle = [code for code in exact if code[-1] != "*" and code not in known]
        idle += [f"{start}*" for start in begun if not any(code.startswith(start) for code in known)]
        if idle:
            raise ValueError(
                f"{self.mapping}: code {', '.join(idle[:5])} is neither in the data of {self.root} nor in {CODES}; "
                f"correct or remove {'the line' if len(idle) == 1 else f'these {len(idle)} lines'}"
            )
        meant = {code: line for code in counted["code"].drop_nulls() if (line := line_of(code))}
        rows = []
        for code, line in meant.items():
            rest = code[len(line.code) - 1 :] if line.code.endswith("*") else ""
            argument, unit = (
                (None if rest in NONE else rest) if said == "*" else said for said in (line.argument, line.unit)
            )
            rows.append((code, line.name, argument, unit, line.factor, _constant(line)))
        text, numbers = ("code", "name", "argument", "unit_of_code"), ("factor", "constant")
        schema = dict.fromkeys(text, pl.String) | dict.fromkeys(numbers, pl.Float64)
        return counted.join(pl.DataFrame(rows, schema, orient="row"), on="code", how="left", maintain_order="left")

    def _concepts(self) -> pl.LazyFrame:
        """The codes that mean a concept."""
        return self._codes.lazy().drop("rows").filter(~pl.col("name").is_in(list(ROLES)))

    # ---- the stays -------------------------------------------------------------------------------------------------

    @cached_property
    def _roles(self) -> pl.DataFrame:
        """The rows of codes that have a role."""
        codes = self._codes.lazy().drop("rows").filter(pl.col("name").is_in(list(ROLES)))
        return self._collect(self._rows().join(codes, on="code").with_columns(value=_VALUE))

    def _role(self, name: str) -> pl.DataFrame:
        return self._roles.filter(pl.col("name") == name, pl.col("time").is_not_null())

    @cached_property
    def _records(self) -> pl.DataFrame:
        """Per stay ``stay_id, subject_id, admitted, left`` (the ICU)``, begin, until`` (of the record)``, care_unit,
        named`` (whether rows name their stay)."""
        starts = self._role("icu_admission")
        if starts.is_empty():
            raise ValueError(
                f"no ICU admission in {self.root}: expected rows with a time whose code {self.mapping} maps to "
                f"icu_admission"
            )
        named = starts["stay"].null_count() == 0
        starts = starts.sort("subject_id", "time", "stay")
        starts = starts.unique(["subject_id", "stay" if named else "time"], keep="first", maintain_order=True)
        stays = starts.select(
            "subject_id", stay_id="stay" if named else pl.int_range(1, pl.len() + 1, dtype=pl.Int64), admitted="time",
            care_unit=pl.col("argument").replace("", None), named=pl.lit(named),
            following=pl.col("time").shift(-1).over("subject_id"),
        )  # fmt: skip
        stays = stays.with_columns(_nearest(stays, "admitted", self._role("icu_discharge"), "forward", False)["found"])
        of_another = (pl.col("following") < pl.col("found")).fill_null(False)
        stays = stays.with_columns(left=pl.when(~of_another).then("found"))
        stays = stays.with_columns(begin=pl.col("admitted") - LOOKBACK, until=pl.coalesce("left", "following"))
        return stays.drop("found", "following")

    def _placed(self, rows: pl.LazyFrame, records: pl.DataFrame, static: bool = False) -> pl.LazyFrame:
        """``rows`` with the columns of the stays that they belong to; those of none are left out.

        Args:
            rows: with ``subject_id, time, stay``.
            records: of the stays.
            static: whether a row without a time belongs to all stays of its subject, or to none.
        """
        time, stay = pl.col("time"), pl.when("named").then("stay")
        timed = (time >= pl.col("begin")) & (pl.col("until").is_null() | (time <= pl.col("until")))
        if static:
            timed = timed | time.is_null()
        joined = rows.join(records.lazy(), on="subject_id", maintain_order="left")
        kept = joined.filter((stay == pl.col("stay_id")) | (stay.is_null() & timed))
        return kept if static else kept.filter(time.is_not_null())

    def _given(self) -> pl.DataFrame:
        """``stay_id`` and the columns of the stays that lines of the mapping give: a stay's first row holds."""
        columns = {ln.argument if ln.name == "stay" else "sex" for ln in self._lines if ln.name in ("stay", "sex")}
        rows = self._roles.filter(pl.col("name").is_in(("stay", "sex")))
        placed = self._placed(rows.lazy(), self._records, static=True).sort("time", maintain_order=True)
        column = pl.when(pl.col("name") == "sex").then(pl.lit("sex")).otherwise("argument")

        def of(name: str) -> pl.Expr:
            if name.endswith(("_minute", "_minutes")):
                value = _minutes(pl.col("time"))
            elif STAYS[name] == pl.String:
                value = pl.col("text_value")
            else:
                value = pl.col("value")
            return value.filter(column == name).drop_nulls().first().cast(STAYS[name]).alias(name)

        return placed.group_by("stay_id").agg(of(c) for c in STAYS if c in columns).collect()

    def _made(self) -> pl.DataFrame:
        """The stays as admissions, discharges, births and deaths tell them, in schema ``STAYS`` as far as they do."""
        stays, told = self._records, {(line.name, line.argument) for line in self._lines}
        stays = stays.with_columns(gone=pl.coalesce("left", "admitted"))
        arrivals, departures = self._role("hospital_admission"), self._role("hospital_discharge")
        out = _nearest(stays, "admitted", departures, "forward")
        # those of another time in hospital do not count
        next_in = _nearest(stays, "gone", arrivals, "forward", False)["found"]
        last_in = _nearest(stays, "gone", arrivals, "backward")["found"]
        last_out = _nearest(stays, "admitted", departures, "backward", False)["found"]
        other = (next_in < out["found"]).fill_null(False)
        stays = stays.with_columns(
            arrived=pl.when(~(last_in < last_out).fill_null(False)).then(last_in),
            departed=pl.when(~other).then(out["found"]),
            outcome=pl.when(~other).then(out["argument"]),
        )
        for role in ("birth", "death"):
            first = self._role(role).group_by("subject_id").agg(pl.col("time").min().alias(role))
            stays = stays.join(first, on="subject_id", how="left", maintain_order="left")
        death, departed = pl.col("death"), pl.col("departed")
        last = pl.max_horizontal("departed", "until")  # null: the patient is still there
        died = (pl.col("outcome") == "dead").fill_null(False) | (death.is_not_null() & (death <= last).fill_null(True))
        deaths_told = ("death", "") in told or ("hospital_discharge", "dead") in told
        alive = (pl.col("outcome") == "alive").fill_null(False)
        stays = stays.with_columns(
            hospital_death=pl.when(alive).then(False).when(died).then(True).when(departed.is_not_null() & deaths_told)
            .then(False)
        )  # fmt: skip
        end = pl.when("hospital_death").then(pl.coalesce("death", "departed"))
        in_icu = pl.col("left").is_null() | (end <= pl.col("left"))
        born, admitted = pl.col("birth").dt, pl.col("admitted").dt
        birthday_to_come = admitted.strftime("%m%d") < born.strftime("%m%d")
        return stays.sort("subject_id", "admitted", "stay_id").select(
            "stay_id",
            patient_id=pl.col("subject_id").cast(pl.String),
            stay_number=pl.int_range(1, pl.len() + 1).over("subject_id"),
            age=admitted.year() - born.year() - birthday_to_come.cast(pl.Int32),
            unit="care_unit",
            admit_minute=_minutes(pl.col("arrived")),
            icu_minutes=_minutes(pl.col("left")),
            discharge_minute=_minutes(pl.coalesce(departed, end)),
            death_minute=_minutes(end),
            hospital_death="hospital_death",
            icu_death=pl.when("hospital_death").then(in_icu)
            .when(pl.col("hospital_death").not_() | (pl.col("left").is_not_null() & deaths_told)).then(False),
        )  # fmt: skip


_NUMBER = pl.coalesce("numeric_value", raw.censored(pl.col("text_value")))
_VALUE = pl.coalesce("constant", _NUMBER * pl.col("factor"))


def _minutes(time: pl.Expr) -> pl.Expr:
    """Minutes since ICU admission, rounded down."""
    return ((time - pl.col("admitted")).dt.total_microseconds() // 60_000_000).cast(pl.Int32)


def _nearest(
    stays: pl.DataFrame, at: str, rows: pl.DataFrame, strategy: Literal["forward", "backward"], same: bool = True
) -> pl.DataFrame:
    """For each stay ``found``, the time of the subject's nearest row before or after the time ``at``, and its
    ``argument``.

    Args:
        stays: with ``subject_id`` and ``at``.
        at: the column with a time.
        rows: with ``subject_id, time, argument``.
        strategy: which way to look.
        same: whether a row at that very time counts.
    """
    right = rows.select("subject_id", "argument", found="time").sort("found")
    left = stays.select("subject_id", at).with_row_index("row").sort(at)
    joined = left.join_asof(
        right, left_on=at, right_on="found", by="subject_id", strategy=strategy, allow_exact_matches=same,
        check_sortedness=False,
    )  # fmt: skip
    return joined.sort("row").select("found", "argument")


def _line(row: dict[str, str | None], path: Path) -> Line:
    """A line of the mapping.

    Raises:
        ValueError: it has no meaning.
    """
    code, meaning, unit = row["code"], row["concept"], row.get("unit") or None
    if not code or not meaning:
        raise ValueError(f"{path}: a line has the code {code or ''!r} and the concept {meaning or ''!r}; give both")
    place, begun = f"{path}: code {code}", code.endswith("*")
    try:
        factor = float(row.get("factor") or 1)
    except ValueError as error:
        raise ValueError(f"{place} has the factor {row['factor']!r}; expected a number") from error
    name, _, argument = meaning.partition(":")
    line = Line(code, name, argument, unit, factor)
    if name in ROLES:
        if argument not in ROLES[name] or (argument == "*" and not begun):
            choice = [f"{name}:{a}" if a else name for a in ROLES[name] if a != "*" or begun]
            raise ValueError(f"{place} is mapped to {meaning}; expected {' or '.join(choice)}")
        if unit or (factor != 1 and name != "stay"):
            raise ValueError(f"{place} is mapped to {meaning}, which has no unit and no factor; leave them out")
    elif name in DERIVED:
        raise ValueError(f"{place} is mapped to {name}, which is made of others; remove the line")
    elif name not in BY_NAME:
        raise ValueError(
            f"{place} is mapped to {name}, which is neither a concept of dictionary/concepts.csv nor one of "
            f"{', '.join(ROLES)}"
        )
    elif unit == "*" and not begun:
        raise ValueError(
            f"{place} has the unit *, what the * of a code stands for; give the unit, or end the code in *"
        )
    elif unit != "*" and conversion(name, unit) == (None, None):
        raise ValueError(
            f"{place}: {name} in {unit} is not known to dictionary/units.csv; leave the unit out and give the factor "
            f"that makes {BY_NAME[name].unit or 'a number without a unit'} of it"
        )
    elif argument:
        try:
            float(argument)
        except ValueError as error:
            raise ValueError(f"{place} is mapped to {meaning}; expected {name}, or {name}:NUMBER") from error
    return line


def _constant(line: Line) -> float | None:
    """What every row of the line's codes is worth, whatever its own number."""
    if line.name == "sex":
        return float(line.argument == "male")
    return float(line.argument) if line.name in BY_NAME and line.argument else None


def _schema(path: Path, needed: dict[str, pl.DataType], optional: dict[str, pl.DataType]) -> pl.Schema:
    """The columns of a parquet file.

    Raises:
        ValueError: the file is damaged, lacks a column, or has one of a type that cannot mean what is expected.
    """
    schema = raw.parquet(path, needed)[1]
    for column, kind in {**needed, **optional}.items():
        stored = schema.get(column, pl.Null())
        if kind == pl.Datetime:
            suits = isinstance(stored, pl.Datetime)
        elif kind == pl.String:
            suits = isinstance(stored, pl.String | pl.Categorical | pl.Enum)
        elif kind == pl.Float64:
            suits = stored.is_numeric()
        else:  # an id
            suits = stored.is_integer() or (column in optional and (stored.is_float() or stored == pl.String))
        if not suits and stored != pl.Null:
            raise ValueError(f"{path}: column {column} is {stored}; expected {kind}")
    return schema


def _conformed(paths: list[Path], found: pl.Schema, kinds: dict[str, pl.DataType]) -> pl.LazyFrame:
    """Parquet files of the same columns with the types ``kinds``; times are read as the clock on the wall."""

    def column(name: str, kind: pl.DataType) -> pl.Expr:
        if name not in found:
            return pl.lit(None, kind).alias(name)
        stored, value = found[name], pl.col(name)
        if isinstance(stored, pl.Datetime) and stored.time_zone:
            value = value.dt.replace_time_zone(None)
        if stored.is_float():
            value = value.fill_nan(None)
        return value.cast(kind, strict=stored != pl.String)

    return pl.scan_parquet(paths, hive_partitioning=False).select(column(*item) for item in kinds.items())


def _read(path: Path, needed: dict[str, pl.DataType], optional: dict[str, pl.DataType] | None = None) -> pl.DataFrame:
    """A small parquet file of the dataset's metadata."""
    return _conformed([path], _schema(path, needed, optional or {}), {**needed, **(optional or {})}).collect()
