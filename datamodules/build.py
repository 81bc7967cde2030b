"""Raw tables of a hospital -> the store that every batch is cut from, in one pass over each table.

Each raw table is streamed once, its kept rows divided into buckets of some thousand stays as they come, whatever order
they stand in. Then bucket after bucket is sorted into the store, so that memory does not grow with the number of stays.
Parts are written to a temporary name and renamed, and so is the store: a run that is killed leaves finished parts that
the next run takes up, and never a store that is incomplete. A lock lets one process build while others wait.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial as partial_of
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import polars as pl
from filelock import FileLock

from datamodules import dictionary, raw
from datamodules.derive.treatment import Columns, derived
from datamodules.dictionary import CONCEPT, CONCEPTS, NAMES, RATES, conversion
from datamodules.hospitals.base import Hospital, Tables
from datamodules.schema import DROPPED, STAYS, as_events, check_stays
from datamodules.store import Store

BUCKET = 500  # stays whose rows are sorted together
ROW_GROUP = 50_000  # rows that each open file of a bucket may hold in memory
SOURCES = ("schema.py", "dictionary.py", "raw.py", "build.py", "store.py", "hospitals/**/*.py", "derive/*.py")
NEVER = np.iinfo(np.int32).min  # the last minute of a stay without events
RATE = np.isin(NAMES, RATES)
SUM = np.array([c.hourly == "sum" for c in CONCEPTS])
KEPT, CLIPPED = 0, len(DROPPED.categories) + 1  # states of a row; between them the reasons of ``DROPPED``
UNMAPPED, NOT_A_NUMBER, OUTSIDE = (
    DROPPED.categories.to_list().index(r) + 1 for r in ("unmapped_unit", "not_a_number", "out_of_range")
)
Rows = TypeVar("Rows", pl.DataFrame, pl.LazyFrame)
Work = TypeVar("Work")
Made = TypeVar("Made")
Step = Callable[[str, int, int], None]  # told of progress: what is done, how much of it, of how much


def fingerprint(hospital: Hospital) -> str:
    """A key that changes with the raw files (name, size, times), the options, the dictionary and the code that reads.

    Times are those of content and of the file itself, so that a copy that keeps its date is another file.
    """
    facts = [(str(p.relative_to(hospital.root)), *_times(p)) for p in sorted(hospital.files())]
    folder = Path(__file__).parent
    code = [dictionary.digest(folder, pattern) for pattern in (*SOURCES, "dictionary/*.csv")]
    content = json.dumps([hospital.name, hospital.extraction(), facts, code], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _times(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def build(hospital: Hospital, folder: Path, step: Step = lambda *_: None) -> Store:
    """Open the store at ``folder``; write it first where it is not there yet.

    Args:
        hospital: whose tables are read.
        folder: where the store is to be.
        step: told of progress.
    """

    def make(partial: Path) -> None:
        stays = _bucketed(check_stays(hospital.stays()), hospital.partition)
        _extract(hospital, stays, partial, step)
        if (unread := hospital.unread()) is not None:
            unread.write_csv(partial / "unread.csv")
        _assemble(hospital, stays, partial, step)

    once(folder, make, resume=True)
    return Store(folder)


def once(folder: Path, make: Callable[[Path], None], resume: bool = False) -> None:
    """Fill a folder unless it is there, so that it is whole or not there, whoever else wants it at the same time.

    Args:
        folder: what is to be there.
        make: fills the folder that it is given.
        resume: let ``make`` go on with what a run that was killed has left, instead of from nothing.
    """
    if folder.exists():  # before any lock: a cache that is shared may be read-only
        return
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return
            partial = folder.with_name(f"{folder.name}.partial")
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            try:
                make(partial)
            except (ValueError, FileNotFoundError):  # the raw files must change, and with them the name of the store
                shutil.rmtree(partial)
                raise
            partial.replace(folder)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk and the like, of which Python, numpy and polars each speak differently, into one error."""
    try:
        yield
    except (OSError, pl.exceptions.ComputeError) as error:
        message = str(error)
        system = getattr(error, "errno", None) is not None or "os error" in message or "requested and" in message
        if not system or isinstance(error, FileNotFoundError):  # a raw table's fault: its message says what to do
            raise
        raise OSError(
            f"the store {folder} could not be written ({error}): is the disk full, or the folder not yours? "
            f"Free some space or set --data.cache to another folder, then run again: finished tables are kept"
        ) from error


def _bucketed(stays: pl.DataFrame, partition: str) -> pl.DataFrame:
    """The stays with their row number ``stay`` and their ``bucket``; a patient's stays share one where rows belong to
    patients."""
    stays = stays.with_row_index("stay").cast({"stay": pl.Int32})
    bucket = pl.col("stay") // BUCKET
    stays = stays.with_columns(bucket=bucket.first().over(partition) if partition == "patient_id" else bucket)
    assert stays["bucket"].is_sorted(), "stays of one patient must stand together"
    compact = stays["bucket"].rank("dense") - 1  # without gaps
    return stays.with_columns(compact.cast(pl.Int32).alias("bucket"))


def _extract(hospital: Hospital, stays: pl.DataFrame, partial: Path, step: Step) -> None:
    """Stream each raw table once into one folder a bucket."""
    (partial / "rows").mkdir(exist_ok=True)
    names = list(hospital.tables(stays))
    for number, table in enumerate(names, 1):
        step(f"[{number}/{len(names)}] {table}", 0, 1)
        place = partial / "rows" / table.replace("/", ".")
        if not place.exists():
            unfinished = place.with_name(f".{place.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            raw.attempt(hospital.root, table, lambda table=table, to=unfinished: _divide(hospital, stays, table, to))  # type: ignore[misc]
            unfinished.replace(place)
        step(f"[{number}/{len(names)}] {table}", 1, 1)


def _divide(hospital: Hospital, stays: pl.DataFrame, table: str, folder: Path) -> None:
    rows, key = hospital.tables(stays)[table], hospital.partition
    schema = rows.collect_schema()
    pl.DataFrame(schema=schema).write_parquet(folder / "schema.parquet")
    buckets = stays.select(pl.col(key).cast(schema[key]), "bucket").unique()
    target = pl.PartitionBy(folder, key="bucket", include_key=False)
    divided = rows.join(buckets.lazy(), on=key, maintain_order="left")  # so that every run writes the same files
    divided.sink_parquet(
        target, compression="lz4", row_group_size=ROW_GROUP, statistics=False, mkdir=True, engine="streaming"
    )


def bucket_tables(folder: Path, bucket: int) -> Tables:
    """The kept rows of one bucket, lazily; a table without a row of it is empty.

    Args:
        folder: of the store, with ``rows/``.
        bucket: its number.
    """
    tables: Tables = {}
    for place in sorted((folder / "rows").iterdir()):
        files = sorted((place / f"bucket={bucket}").glob("*.parquet"))
        tables[place.name.replace(".", "/")] = pl.scan_parquet(files or place / "schema.parquet")
    return tables


def _assemble(hospital: Hospital, stays: pl.DataFrame, partial: Path, step: Step) -> None:
    """Sort each bucket into the store: converted, within range, each row once, with what is derived from them."""
    counts = _Counts(len(stays))
    buckets = stays.partition_by("bucket", maintain_order=True)
    hospitals = []
    last_minute = np.full(len(stays), NEVER, np.int32)
    with ExitStack() as stack:
        out = {name: stack.enter_context((partial / name).open("wb")) for name in (*COLUMNS, "rates.i8")}
        pool = stack.enter_context(ThreadPoolExecutor(2))  # one sorts in numpy while the other reads in polars
        sort = partial_of(_sorted, hospital, partial)
        for number, bucket in enumerate(ahead(pool, sort, buckets)):
            step("sorting events by stay", number, len(buckets))
            ends = np.flatnonzero(np.diff(bucket.stay, append=-1))
            last_minute[bucket.stay[ends]] = bucket.columns["minute.i4"][ends]
            rates = np.flatnonzero(RATE[bucket.columns["concept.u1"]]) + counts.per_stay.sum()
            rates.astype(np.int64).tofile(out["rates.i8"])
            counts.add(bucket)
            for name, kind in COLUMNS.items():
                bucket.columns[name].astype(kind).tofile(out[name])
            hospitals.append(bucket.filled)
        step("sorting events by stay", len(buckets), len(buckets))
    if not counts.events.sum():
        raise ValueError("no event found in any stay: expected rows of known items with a time inside a stay")
    np.concatenate([[0], np.cumsum(counts.per_stay)]).astype(np.int64).tofile(partial / "offsets.i8")
    counts.table().write_csv(partial / "coverage.csv")
    counts.units().write_csv(partial / "units.csv")
    filled = (
        pl.concat(hospitals)
        .group_by("hospital_id")
        .agg(pl.col("stays").sum(), pl.exclude("stays", "hospital_id").any())
    )
    filled.sort("hospital_id").write_parquet(partial / "hospitals.parquet")
    buckets_of = stays.select("bucket", last_minute=pl.Series(last_minute).replace(NEVER, None))
    buckets_of.write_parquet(partial / "buckets.parquet")
    stays.select(*STAYS).write_parquet(partial / "stays.parquet")


def ahead(pool: ThreadPoolExecutor, run: Callable[[Work], Made], works: list[Work]) -> Iterator[Made]:
    """The results of ``run`` in order, two in work at a time, so that memory holds no more."""
    waiting: deque[Future[Made]] = deque()
    for work in works:
        waiting.append(pool.submit(run, work))
        if len(waiting) == 2:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def admission(stays: pl.DataFrame) -> pl.LazyFrame:
    """Height and weight of the stays table as events of admission."""
    long = stays.lazy().select("stay_id", "height", "weight").unpivot(index="stay_id", variable_name="concept")
    return as_events(long.drop_nulls("value").with_columns(minute=pl.lit(0)))


def _filled(tables: Tables, members: pl.DataFrame, key: str) -> pl.DataFrame:
    """Per hospital, its stays and whether any of them has a row in each table."""
    filled = members.select("hospital_id", "stay_id", "patient_id")
    for name, rows in tables.items():
        ids = rows.select(pl.col(key).cast(filled.schema[key])).unique().collect()[key]
        filled = filled.with_columns(pl.col(key).is_in(ids.implode()).alias(name))
    return filled.group_by("hospital_id").agg(pl.len().cast(pl.Int64).alias("stays"), pl.col(*tables).any())


COLUMNS = {"minute.i4": np.int32, "known.i4": np.int32, "concept.u1": np.uint8, "value.f4": np.float32}


class _Bucket(NamedTuple):
    """The events of a bucket of stays and what was counted of them."""

    columns: dict[str, np.ndarray]  # of the store, by file
    stay: np.ndarray  # (N,) of each event
    states: np.ndarray  # (concepts, states) rows read
    pairs: dict[tuple[str, str | None], int]  # (concept, charted unit) -> rows
    filled: pl.DataFrame  # which raw tables the hospitals fill


def _sorted(hospital: Hospital, folder: Path, members: pl.DataFrame) -> _Bucket:
    """Read, convert and sort the events of a bucket of stays."""
    tables = bucket_tables(folder, members["bucket"][0])
    frames = hospital.events(tables, members.select(*STAYS))
    lazy = pl.concat([*frames, admission(members)]).join(members.lazy().select("stay_id", "stay"), on="stay_id")
    events, states, pairs = canonical(as_charted(lazy).collect())
    events, made = completed(events)
    states[:, KEPT] += np.bincount(made, minlength=len(NAMES))
    stay, *others = events
    columns = dict(zip(COLUMNS, others, strict=True))
    return _Bucket(columns, stay, states, pairs, _filled(tables, members, hospital.partition))


def as_charted(rows: Rows) -> Rows:
    """Rows in schema ``EVENTS``, with their ``stay``, as ``canonical`` reads them."""
    unit = pl.col("unit").cast(pl.Categorical)
    return rows.select(
        pl.col("stay", "minute").cast(pl.Int64),
        known=pl.coalesce("known_minute", "minute").cast(pl.Int64),
        concept=pl.col("concept").to_physical().cast(pl.Int64),
        value=pl.col("value").cast(pl.Float32).fill_null(np.nan),
        unit=unit,
        unit_code=(unit.to_physical().cast(pl.Int64) + 1).fill_null(0),
        state=(pl.col("dropped").to_physical().cast(pl.Int64) + 1).fill_null(KEPT),
    )


def canonical(charted: pl.DataFrame) -> "tuple[Columns, np.ndarray, dict[tuple[str, str | None], int]]":
    """What was charted as events of the store: converted, within range, each once. Each row is judged by itself, so
    that parts of a stay can be made canonical one by one, and joined by ``distinct``.

    Args:
        charted: as of ``as_charted``.

    Returns:
        Stay, minute, known, concept and value of the events; (concepts, states) rows read; rows by concept and unit.
    """
    stay, minute, known, concept = (charted[c].to_numpy() for c in ("stay", "minute", "known", "concept"))
    state = charted["state"].to_numpy().copy()
    factor, offset, pairs = _conversions(concept, charted["unit_code"].to_numpy(), charted["unit"])
    value = charted["value"].to_numpy() * factor + offset
    fio2 = concept == NAMES.index("fio2")  # a percentage or a fraction, often without a unit (mimic-code bg.sql)
    value = np.where(fio2 & (value >= 0.2) & (value <= 1), value * 100, value).astype(np.float32)
    inside, finite, rate = dictionary.plausible(concept, value), np.isfinite(value), RATE[concept]
    fresh = state == KEPT
    state[fresh & np.isnan(factor)] = UNMAPPED
    state[(state == KEPT) & ~finite] = NOT_A_NUMBER
    state[(state == KEPT) & ~inside] = OUTSIDE
    clip = (state == OUTSIDE) & rate & fresh  # dropping a step would leave the one before it in force
    value[clip] = dictionary.clipped(concept[clip], value[clip])
    state[clip] = CLIPPED
    states = np.bincount(concept * (CLIPPED + 1) + state, minlength=len(NAMES) * (CLIPPED + 1))
    good = (state == KEPT) | (state == CLIPPED)
    minute = np.where(rate, np.maximum(minute, known), minute)  # a step counts from when it is known
    known = np.maximum(minute, known)
    events = distinct(*(c[good] for c in (stay, minute, known, concept, value)))
    return events, states.reshape(len(NAMES), -1), pairs


def completed(events: Columns) -> tuple[Columns, np.ndarray]:
    """Events of whole stays, in order and each once, with what is derived from them.

    Returns:
        Stay, minute, known, concept and value of all; the concepts of those that are derived.
    """
    stay, minute, known, concept, value = derived(*events)
    value = np.where(RATE[concept], dictionary.clipped(concept, value), value)
    good = dictionary.plausible(concept, value)
    made = tuple(column[good] for column in (stay, minute, known, concept, value))
    if len(made[0]):
        events = distinct(*(np.concatenate(both) for both in zip(events, made, strict=True)))
    return events, made[3]


def _conversions(
    concept: np.ndarray, code: np.ndarray, unit: pl.Series
) -> tuple[np.ndarray, np.ndarray, dict[tuple[str, str | None], int]]:
    """Factor and offset of each row (NaN: the unit is not known), and how many rows each pair of concept and unit
    has."""
    width = int(code.max(initial=0)) + 1
    pair = concept * width + code
    rows = np.bincount(pair, minlength=len(NAMES) * width)
    place = np.zeros(len(rows), np.intp)  # of a row of each pair
    place[pair] = np.arange(len(pair))
    factors = np.full((len(NAMES) * width, 2), np.nan, np.float32)
    pairs: dict[tuple[str, str | None], int] = {}
    for number in np.flatnonzero(rows).tolist():
        name, charted = NAMES[number // width], unit[int(place[number])]
        factor, offset = conversion(name, charted)
        if factor is not None and offset is not None:
            factors[number] = factor, offset
        pairs[name, charted] = int(rows[number])
    return factors[pair, 0], factors[pair, 1], pairs


def distinct(
    stay: np.ndarray, minute: np.ndarray, known: np.ndarray, concept: np.ndarray, value: np.ndarray
) -> Columns:
    """Rows sorted by stay, minute, concept and value, each once, known as early as it was; volumes known at several
    times stay apart."""
    key = (stay << 40) + ((minute + 2**31) << 8) + concept
    order = np.argsort(key, kind="stable")
    key, known, value = key[order], known[order], value[order].astype(np.float32) + 0  # -0.0 becomes 0.0
    same = key[1:] == key[:-1]
    shared = np.zeros(len(key), bool)
    shared[1:] = same
    shared[:-1] |= same
    tie = np.flatnonzero(shared)  # rows that share stay, minute and concept: few, so only these are sorted further
    inner = np.lexsort((known[tie], value[tie], key[tie]))
    known[tie], value[tie] = known[tie][inner], value[tie][inner]
    concept = key & 0xFF
    first = np.ones(len(key), bool)
    first[1:] = (key[1:] != key[:-1]) | (value[1:] != value[:-1]) | (SUM[concept[1:]] & (known[1:] != known[:-1]))
    key, known, value = key[first], known[first], value[first]
    return key >> 40, ((key >> 8) & 0xFFFFFFFF) - 2**31, known, key & 0xFF, value


class _Counts:
    """What was read, converted, kept and dropped, per concept, over all buckets."""

    def __init__(self, stays: int):
        self.states = np.zeros((len(NAMES), CLIPPED + 1), np.int64)
        self.events, self.stays = np.zeros(len(NAMES), np.int64), np.zeros(len(NAMES), np.int64)
        self.per_stay = np.zeros(stays, np.int64)
        self.pairs: dict[tuple[str, str | None], int] = {}  # (concept, charted unit) -> rows

    def add(self, bucket: _Bucket) -> None:
        """Count a bucket."""
        self.states += bucket.states
        for pair, rows in bucket.pairs.items():
            self.pairs[pair] = self.pairs.get(pair, 0) + rows
        stay, concept = bucket.stay, bucket.columns["concept.u1"]
        self.events += np.bincount(concept, minlength=len(NAMES))
        self.per_stay += np.bincount(stay, minlength=len(self.per_stay))
        if len(stay):
            first = int(stay.min())
            seen = np.zeros((int(stay.max()) - first + 1, len(NAMES)), bool)
            seen[stay - first, concept] = True
            self.stays += seen.sum(0)

    def table(self) -> pl.DataFrame:
        """Rows read, events kept (of these clipped to the range), stays with an event, rows dropped by reason; charted
        concepts only."""
        reasons = {reason: self.states[:, i + 1] for i, reason in enumerate(DROPPED.categories)}
        stored = self.states[:, KEPT] + self.states[:, CLIPPED]
        table = pl.DataFrame(
            {
                "concept": NAMES,
                "unit": [c.unit for c in CONCEPTS],
                "rows": self.states.sum(1),
                "events": self.events,
                "stays": self.stays,
                "stays_percent": np.round(100 * self.stays / max(len(self.per_stay), 1), 1),
                "duplicate": stored - self.events + reasons["duplicate"],
                "unmapped_unit": reasons["unmapped_unit"],
                "not_a_number": reasons["not_a_number"],
                "out_of_range": reasons["out_of_range"],
                "withdrawn": reasons["withdrawn"],
                "contradictory": reasons["contradictory"],
                "clipped": self.states[:, CLIPPED],
            }
        )
        return table.filter(pl.col("rows") > 0)

    def units(self) -> pl.DataFrame:
        """``concept, unit, rows, factor, offset`` of every pair that was charted."""
        rows = [(name, unit, count, *conversion(name, unit)) for (name, unit), count in self.pairs.items()]
        schema = {
            "concept": CONCEPT,
            "unit": pl.String(),
            "rows": pl.Int64(),
            "factor": pl.Float64(),
            "offset": pl.Float64(),
        }
        return pl.DataFrame(rows, schema=schema, orient="row").sort("concept", "unit")
