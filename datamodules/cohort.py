"""Stays and events of one hospital system -> a columnar store on disk that every batch is cut from.

A store is a folder, written once and then only memory-mapped::

    stays.parquet   one row a stay, schema ``STAYS``
    offsets.i8      events of stay i are rows offsets[i] .. offsets[i + 1] of the three columns below
    minute.i4       minutes from ICU admission, ascending within a stay
    concept.u1      index into ``concepts.NAMES``
    value.f4        in the concept's unit
    coverage.csv    what was read, kept and dropped, per concept
    units.csv       every (concept, charted unit) pair and how it was converted
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
from filelock import FileLock
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from datamodules.concepts import BY_NAME, CONCEPT, CONCEPTS, CONVERSIONS, NAMES, SPELLINGS
from datamodules.schema import check_stays
from datamodules.tables import reading
from datamodules.treatment import NOREPINEPHRINE_EQUIVALENT, derived

VERSION = 2  # raised whenever the extraction or the layout changes, so that old caches are not read
LOW, HIGH = np.array([c.low for c in CONCEPTS], np.float32), np.array([c.high for c in CONCEPTS], np.float32)
FIO2 = NAMES.index("fio2")
DERIVED_FROM = [NAMES.index(name) for name in (*NOREPINEPHRINE_EQUIVALENT, "urine", "weight")]
CHUNK_ROWS = 3_000_000  # events sorted at a time: bounds memory to well under 2 GB


class Store:
    """A prepared cohort, memory-mapped: opening it reads only ``stays.parquet``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stays = pl.read_parquet(folder / "stays.parquet")
        self.offsets = np.fromfile(folder / "offsets.i8", np.int64)
        self.minute = _mapped(folder / "minute.i4", np.int32)
        self.concept = _mapped(folder / "concept.u1", np.uint8)
        self.value = _mapped(folder / "value.f4", np.float32)

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)  # a worker process maps the files again instead of receiving their content

    def coverage(self) -> pl.DataFrame:
        return pl.read_csv(self.folder / "coverage.csv")

    def units(self) -> pl.DataFrame:
        return pl.read_csv(self.folder / "units.csv", infer_schema_length=None)

    def first_after(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """For pairs of stay index and minute, both ``(S,)``: the row of that stay's first event at or after the minute.

        One binary search for all pairs at once; it touches some 20 pages of the memory map per pair.
        """
        low, high = self.offsets[stay], self.offsets[stay + 1]
        last = max(len(self.minute) - 1, 0)
        while np.any(low < high):
            middle = (low + high) // 2
            before = (low < high) & (self.minute[np.minimum(middle, last)] < minute)
            high = np.where((low < high) & ~before, middle, high)
            low = np.where(before, middle + 1, low)
        return low

    def export(self, folder: Path) -> None:
        """Write ``events.parquet`` (``stay_id, minute, concept, value``) into ``folder``, a piece at a time."""
        ids = self.stays["stay_id"].to_numpy()
        names = pl.Series(NAMES, dtype=CONCEPT)
        pieces = folder / ".events.partial"
        shutil.rmtree(pieces, ignore_errors=True)  # of a run that was killed
        try:
            with _writing(folder):
                pieces.mkdir()
                for number, (start, stop) in enumerate(pairwise(_chunks(np.diff(self.offsets)))):
                    rows = slice(self.offsets[start], self.offsets[stop])
                    counts = np.diff(self.offsets[start : stop + 1])
                    frame = pl.DataFrame({"stay_id": np.repeat(ids[start:stop], counts), "minute": self.minute[rows]})
                    frame = frame.with_columns(
                        names.gather(self.concept[rows].astype(np.uint32)).alias("concept"), pl.Series("value", self.value[rows])
                    )
                    frame.write_parquet(pieces / f"{number:06d}.parquet")
                pl.scan_parquet(pieces / "*.parquet").sink_parquet(pieces / "events.tmp")
                (pieces / "events.tmp").replace(folder / "events.parquet")
        finally:
            shutil.rmtree(pieces, ignore_errors=True)


def _mapped(path: Path, dtype: type) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r"))  # np.memmap itself is slow to index


def fingerprint(files: list[Path], root: Path, config: dict) -> str:
    """A key that changes with the raw files' names, sizes and times, the configuration and the layout of the store."""
    facts = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    said = json.dumps([VERSION, NAMES, config, facts], sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def build(
    folder: Path,
    stays: Callable[[], pl.DataFrame],
    events: Callable[[pl.DataFrame], dict[str, pl.LazyFrame]],
    root: Path,
) -> Store:
    """Open the store at ``folder``; write it first where it is not there yet.

    Each raw table is streamed into its own parquet part, then stays are sorted a few million events at a time. Parts are
    written to a temporary name and renamed, and so is the store, so a run that is killed leaves finished parts that the
    next run takes up, and never a store that is incomplete. A lock lets one process build while others wait.

    Args:
        folder: where the store is to be.
        stays: gives the table of schema ``STAYS``.
        events: gives, from the stays, one lazy frame of schema ``RAW_EVENTS`` per raw table.
        root: folder with the publisher's files, for messages.
    """
    with _writing(folder):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    partial = folder.with_name(folder.name + ".partial")
                    partial.mkdir(exist_ok=True)
                    try:
                        table = check_stays(stays())
                        _extract(partial, table, events(table), root)
                        _assemble(partial, table)
                    except (ValueError, FileNotFoundError):  # the raw files must change, and with them the name of the store
                        shutil.rmtree(partial)
                        raise
                    shutil.rmtree(partial / "parts")
                    partial.replace(folder)
    return Store(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a full disk and the like, of which Python, numpy and polars each speak differently, into one error."""
    try:
        yield
    except (OSError, pl.exceptions.ComputeError) as error:
        said = str(error)
        system = getattr(error, "errno", None) is not None or "os error" in said or "requested and" in said  # Python, polars, numpy
        if not system or isinstance(error, FileNotFoundError):  # a raw table's fault: its message says what to do
            raise
        raise OSError(
            f"the store {folder} could not be written ({error}): is the disk full, or the folder not yours? "
            f"Free some space or set --data.cache to another folder, then run again: finished tables are kept"
        ) from error


def _extract(partial: Path, stays: pl.DataFrame, events: dict[str, pl.LazyFrame], root: Path) -> None:
    (partial / "parts").mkdir(exist_ok=True)
    index = stays.select("stay_id").with_row_index("stay").cast({"stay": pl.Int32}).lazy()
    admission = [
        stays.select(
            "stay_id",
            pl.lit(0, pl.Int32).alias("minute"),
            pl.lit(c, CONCEPT).alias("concept"),
            pl.col(c).cast(pl.Float64).alias("value"),
            pl.lit(None, pl.String).alias("unit"),
        )
        for c in ("height", "weight")
    ]
    frames = {**events, "stays": pl.concat(admission).drop_nulls("value").lazy()}
    with progress() as bar:
        for number, (name, frame) in enumerate(frames.items(), 1):
            done = partial / "parts" / f"{name.replace('/', '.')}.parquet"
            task = bar.add_task(f"[{number}/{len(frames)}] {name}", total=1)
            if not done.exists():
                kept = frame.join(index, on="stay_id").select(
                    "stay", "minute", "concept", pl.col("value").cast(pl.Float32), pl.col("unit").replace("", None).cast(pl.Categorical)
                )
                unfinished = done.with_suffix(".tmp")
                with reading(root, name):
                    kept.sink_parquet(unfinished, compression="lz4", row_group_size=500_000, engine="streaming")
                unfinished.replace(done)
            bar.update(task, completed=1)


def _assemble(partial: Path, stays: pl.DataFrame) -> None:
    files = sorted((partial / "parts").glob("*.parquet"))
    parts = pl.concat([pl.scan_parquet(f) for f in files])
    pairs = parts.group_by("concept", "unit").len("rows").collect(engine="streaming")
    units = _conversions(pairs.with_columns(pl.col("unit").cast(pl.String)).sort("concept", "unit"))
    per_stay = np.zeros(len(stays), np.int64)
    counted = parts.group_by("stay").len().collect(engine="streaming")
    per_stay[counted["stay"].to_numpy()] = counted["len"].to_numpy()
    bounds = _chunks(per_stay)
    counts = _Counts(len(stays))
    table = units.with_row_index("pair").select(pl.col("pair").cast(pl.Int32), "concept", pl.col("unit").cast(pl.Categorical))
    factor, offset = (units[c].fill_null(np.nan).to_numpy().astype(np.float32) for c in ("factor", "offset"))
    with ExitStack() as stack, progress() as bar:
        out = {name: stack.enter_context((partial / name).open("wb")) for name in ("minute.i4", "concept.u1", "value.f4")}
        task = bar.add_task("sorting events by stay", total=len(bounds) - 1)
        for start, stop in pairwise(bounds):
            rows = parts.filter(pl.col("stay").is_between(start, stop, closed="left"))
            chunk = rows.join(table.lazy(), on=["concept", "unit"], nulls_equal=True).collect(engine="streaming")
            concept, pair = chunk["concept"].to_physical().to_numpy().astype(np.int64), chunk["pair"].to_numpy()
            value = chunk["value"].fill_null(np.nan).to_numpy() * factor[pair] + offset[pair]
            # FiO2 is charted as a percentage or as a fraction, often without a unit (mimic-code bg.sql)
            value = np.where((concept == FIO2) & (value >= 0.2) & (value <= 1), value * 100, value)
            inside = (value >= LOW[concept]) & (value <= HIGH[concept])
            state = np.where(np.isnan(factor[pair]), 1, np.where(~np.isfinite(value), 2, np.where(inside, 0, 3)))
            counts.read(concept, state)
            columns = (chunk["stay"].to_numpy(), chunk["minute"].to_numpy(), concept, value)
            good = _once(*(c[state == 0] for c in columns))  # nothing is derived from a duplicate
            extra = _derived(*good)
            counts.read(extra[2], np.zeros(len(extra[2]), np.int64))
            stay, minute, concept, value = _once(*(np.concatenate(both) for both in zip(good, extra, strict=True)))
            counts.kept(stay, concept)
            minute.astype(np.int32).tofile(out["minute.i4"])
            concept.astype(np.uint8).tofile(out["concept.u1"])
            value.astype(np.float32).tofile(out["value.f4"])
            bar.advance(task)
    if not counts.events.sum():
        raise ValueError("no event found in any stay: expected rows of known items with a time inside a stay")
    np.concatenate([[0], np.cumsum(counts.per_stay)]).astype(np.int64).tofile(partial / "offsets.i8")
    counts.table().write_csv(partial / "coverage.csv")
    units.write_csv(partial / "units.csv")
    stays.write_parquet(partial / "stays.parquet")


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # stay, minute, concept, value


def _once(stay: np.ndarray, minute: np.ndarray, concept: np.ndarray, value: np.ndarray) -> Columns:
    """Rows sorted by stay, minute, concept and value, each once."""
    key = (stay.astype(np.int64) << 40) + ((minute.astype(np.int64) + 2**31) << 8) + concept
    order = np.argsort(key)
    key, value = key[order], value[order].astype(np.float32) + 0  # -0.0 becomes 0.0
    tie = np.flatnonzero(np.diff(key, prepend=key[:1] - 1) == 0)
    tie = np.union1d(tie, tie - 1)  # rows that share stay, minute and concept: few, so only these are sorted by value
    value[tie] = value[tie][np.lexsort((value[tie], key[tie]))]
    first = np.ones(len(key), bool)
    first[1:] = (key[1:] != key[:-1]) | (value[1:] != value[:-1])
    key = key[first]
    return key >> 40, ((key >> 8) & 0xFFFFFFFF) - 2**31, key & 0xFF, value[first]


def _derived(stay: np.ndarray, minute: np.ndarray, concept: np.ndarray, value: np.ndarray) -> Columns:
    """``treatment.derived`` of these rows, within the plausible ranges."""
    source = np.isin(concept, DERIVED_FROM)
    named = pl.Series(NAMES, dtype=CONCEPT).gather(concept[source].astype(np.uint32))
    columns = {"stay": stay[source].astype(np.int32), "minute": minute[source].astype(np.int32), "concept": named, "value": value[source]}
    made = derived(pl.DataFrame(columns))
    which, what = made["concept"].to_physical().to_numpy().astype(np.int64), made["value"].to_numpy()
    inside = (what >= LOW[which]) & (what <= HIGH[which])
    return made["stay"].to_numpy()[inside], made["minute"].to_numpy()[inside], which[inside], what[inside]


class _Counts:
    """What was read, kept and dropped, per concept, over all chunks."""

    def __init__(self, stays: int):
        self.states = np.zeros((len(NAMES), 4), np.int64)  # kept, unmapped unit, not a number, out of range
        self.events, self.stays = np.zeros(len(NAMES), np.int64), np.zeros(len(NAMES), np.int64)
        self.per_stay = np.zeros(stays, np.int64)

    def read(self, concept: np.ndarray, state: np.ndarray) -> None:
        self.states += np.bincount(concept * 4 + state, minlength=self.states.size).reshape(self.states.shape)

    def kept(self, stay: np.ndarray, concept: np.ndarray) -> None:
        self.events += np.bincount(concept, minlength=len(NAMES))
        self.per_stay += np.bincount(stay, minlength=len(self.per_stay))
        if len(stay):
            first = int(stay.min())
            seen = np.zeros((int(stay.max()) - first + 1, len(NAMES)), bool)
            seen[stay - first, concept] = True
            self.stays += seen.sum(0)

    def table(self) -> pl.DataFrame:
        """Rows read, events kept, stays with an event, and rows dropped by reason; only concepts that were charted."""
        kept, unmapped, number, outside = self.states.T
        table = pl.DataFrame(
            {
                "concept": NAMES,
                "unit": [c.unit for c in CONCEPTS],
                "rows": self.states.sum(1),
                "events": self.events,
                "stays": self.stays,
                "stays_percent": np.round(100 * self.stays / max(len(self.per_stay), 1), 1),
                "duplicate": kept - self.events,
                "unmapped_unit": unmapped,
                "not_a_number": number,
                "out_of_range": outside,
            }
        )
        return table.filter(pl.col("rows") > 0)


def _conversions(pairs: pl.DataFrame) -> pl.DataFrame:
    """Add ``factor`` and ``offset`` to the distinct (concept, unit) pairs; null where the unit is not known."""

    def factor(concept: str, unit: str | None) -> tuple[float | None, float | None]:
        said = "" if unit is None else "".join(unit.lower().split())
        own = BY_NAME[concept].unit
        if not said or said == own.lower().replace(" ", "") or said in SPELLINGS.get(own, ()):
            return 1.0, 0.0
        return CONVERSIONS.get((concept, said), (None, None))

    found = [factor(c, u) for c, u in pairs.select("concept", "unit").iter_rows()]
    schema = {"factor": pl.Float64, "offset": pl.Float64}
    return pairs.hstack(pl.DataFrame(found, schema=schema, orient="row"))


def _chunks(per_stay: np.ndarray) -> list[int]:
    """Stay indices at which to cut so that each piece has about ``CHUNK_ROWS`` events."""
    piece = np.cumsum(per_stay) // CHUNK_ROWS
    return [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(per_stay)]


def progress() -> Progress:
    """The one kind of progress bar: a line per step with the time it took."""
    from rich.console import Console

    return Progress(
        SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True)
    )
