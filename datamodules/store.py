"""Reads the store that ``build`` writes: a folder that is only memory-mapped.

::

    stays.parquet   one row a stay, schema ``STAYS``
    offsets.i8      events of stay i are rows offsets[i] .. offsets[i + 1] of the four columns below
    minute.i4       minutes from ICU admission, ascending within a stay
    known.i4        when the event was known; for steps of a rate, which count from then on, the same as ``minute``
    concept.u1      index into ``dictionary.NAMES``
    value.f4        in the concept's unit
    rates.i8        rows of the events that are steps of a rate
    coverage.csv    what was read, kept and dropped, per concept
    units.csv       every (concept, charted unit) pair and how it was converted
    unread.csv      what is in the raw files and is not read, where the hospital can tell
    hospitals.parquet  which raw tables each hospital fills
    rows/           the rows of the raw tables that were kept, by raw table and bucket of stays
    buckets.parquet the bucket of each stay and the minute of its last event
    derived/        tables that ``derive`` made of them
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from datamodules.dictionary import CONCEPT, NAMES, RATES

EXPORT_ROWS = 3_000_000  # events written at a time
_RATE_OF = np.array(
    [RATES.index(name) if name in RATES else -1 for name in NAMES]
)  # concept -> position among the rates, or -1


class Store:
    """A prepared hospital, memory-mapped: opening it reads only ``stays.parquet``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stays = pl.read_parquet(folder / "stays.parquet")
        self.offsets = np.fromfile(folder / "offsets.i8", np.int64)
        self.minute, self.known = (_mapped(folder / f"{name}.i4", np.int32) for name in ("minute", "known"))
        self.concept = _mapped(folder / "concept.u1", np.uint8)
        self.value = _mapped(folder / "value.f4", np.float32)
        self._rates = _mapped(folder / "rates.i8", np.int64)
        self._steps: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, stays: pl.DataFrame, events: tuple[np.ndarray, ...]) -> "Store":
        """A store in memory.

        Args:
            stays: schema ``STAYS``.
            events: stay (row of ``stays``), minute, known minute, concept and value of each, as of ``build.canonical``.
        """
        store = cls.__new__(cls)
        stay, minute, known, concept, value = events
        store.stays = stays
        store.offsets = np.searchsorted(stay, np.arange(len(stays) + 1)).astype(np.int64)
        store.minute, store.known = minute.astype(np.int32), known.astype(np.int32)
        store.concept, store.value = concept.astype(np.uint8), value.astype(np.float32)
        store._rates = np.flatnonzero(_RATE_OF[store.concept] >= 0)
        store._steps = None
        return store

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)  # a worker process maps the files again instead of receiving their content

    def coverage(self) -> pl.DataFrame:
        """What was read, kept and dropped, per concept."""
        return pl.read_csv(self.folder / "coverage.csv")

    def units(self) -> pl.DataFrame:
        """Every (concept, charted unit) pair: ``rows, factor, offset``; null where the unit is not known."""
        return pl.read_csv(self.folder / "units.csv", infer_schema_length=None)

    def unread(self) -> pl.DataFrame | None:
        """``code, description, rows, why`` of what is in the raw files and is not read; None where nobody can tell."""
        path = self.folder / "unread.csv"
        return pl.read_csv(path, schema_overrides={"description": pl.String}) if path.exists() else None

    def hospitals(self) -> pl.DataFrame:
        """``hospital_id, stays`` and, per raw table, whether any stay of the hospital has a row in it."""
        return pl.read_parquet(self.folder / "hospitals.parquet")

    def at_or_after(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
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

    def any_known(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(stays,) Whether a stay has an event of minutes ``start`` <= minute < ``end`` that was known before ``end``.

        Args:
            start: (stays,) for every stay.
            end: (stays,) likewise.
        """
        known = np.zeros(len(self.stays), bool)
        for first, last in self.pieces():
            minute, when_known = (self._column(name, np.int32, first, last) for name in ("minute.i4", "known.i4"))
            stay = np.repeat(np.arange(first, last), np.diff(self.offsets[first : last + 1]))
            seen = (minute >= start[stay]) & (minute < end[stay]) & (when_known < end[stay])
            known[stay[seen]] = True
        return known

    def running(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """(S, R) The rates that are in force just before a minute, in the order of ``dictionary.RATES``; 0 where none
        was set."""
        if self._steps is None:  # rates are few: their keys fit in memory
            row = self._rates
            of_stay = np.searchsorted(self.offsets, row, side="right") - 1
            key = _key(of_stay, _RATE_OF[self.concept[row]], self.minute[row])
            order = np.argsort(key, kind="stable")  # of several at one minute the last holds
            self._steps = key[order], self.value[row][order]
        key, value = self._steps
        if not len(key):
            return np.zeros((len(stay), len(RATES)), np.float32)
        rate = np.arange(len(RATES))
        position = np.searchsorted(key, _key(stay[:, None], rate, minute[:, None])) - 1
        before = np.maximum(position, 0)
        same = (position >= 0) & (key[before] >> 32 == _key(stay[:, None], rate, 0) >> 32)
        return np.where(same, value[before], 0).astype(np.float32)

    def last_minutes(self) -> pl.Series:
        """(stays,) Minute of each stay's last event; null where it has none."""
        return pl.read_parquet(self.folder / "buckets.parquet")["last_minute"]

    def frame(self, start: int, stop: int) -> pl.DataFrame:
        """``stay_id, minute, known_minute, concept, value`` of the stays ``start`` .. ``stop``."""
        ids = np.repeat(self.stays["stay_id"].to_numpy()[start:stop], np.diff(self.offsets[start : stop + 1]))
        concept = pl.Series("concept", NAMES, CONCEPT).gather(
            self._column("concept.u1", np.uint8, start, stop).astype(np.uint32)
        )
        columns = {
            "stay_id": ids,
            "minute": self._column("minute.i4", np.int32, start, stop),
            "known_minute": self._column("known.i4", np.int32, start, stop),
            "concept": concept,
            "value": self._column("value.f4", np.float32, start, stop),
        }
        return pl.DataFrame(columns)

    def _column(self, name: str, kind: type, start: int, stop: int) -> np.ndarray:
        """A column of the stays ``start`` .. ``stop``, read and not mapped: pages of a map that is walked from end to
        end would stay in memory."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return np.fromfile(self.folder / name, kind, last - first, offset=first * np.dtype(kind).itemsize)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of stays of about ``EXPORT_ROWS`` events each."""
        piece = self.offsets[1:] // EXPORT_ROWS
        return pairwise([0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(self.stays)])

    def buckets(self) -> list[tuple[int, int]]:
        """Ranges of stays whose kept rows lie in one bucket of ``rows/``."""
        sizes = pl.read_parquet(self.folder / "buckets.parquet").group_by("bucket").len().sort("bucket")["len"]
        return list(pairwise([0, *sizes.cum_sum().to_list()]))


def _key(stay: np.ndarray, rate: np.ndarray, minute: np.ndarray | int) -> np.ndarray:
    """Stay, rate and minute in one number that sorts by them."""
    return (
        (np.asarray(stay, np.int64) << 40) + (np.asarray(rate, np.int64) << 32) + (np.asarray(minute, np.int64) + 2**31)
    )


def _mapped(path: Path, dtype: type) -> np.ndarray:
    return (
        np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)
    )  # np.memmap itself is slow to index
