"""Stays that go on: events are added as they are charted, and batches cut of what is known so far.

What a batch holds equals what ``--data Tables`` gives of the same stays and events. A record is kept as events that are
converted and each once; what is derived from them is made anew, since a late record changes it. Nothing that a network
computes can be kept for the next prediction: every time in a batch is relative to its own.
"""

import numpy as np
import polars as pl

from datamodules.build import admission, as_charted, canonical, completed, distinct
from datamodules.contract import Batch, Spec, View
from datamodules.derive.treatment import Columns
from datamodules.hospitals.tables import COLUMNS, OPTIONAL, given, with_defaults
from datamodules.scaler import Inputs
from datamodules.schema import STAYS, check_stays, conform
from datamodules.store import Store
from datamodules.views import Views

NOTHING: Columns = (*(np.zeros(0, np.int64),) * 4, np.zeros(0, np.float32))


class Live:
    """Stays and what was charted of them so far.

    Args:
        spec: of the model.
        view: what it reads.
        summary: whether it reads the summary, too.
    """

    def __init__(self, spec: Spec, view: View, summary: bool):
        self.spec, self.view, self.summary = spec, view, summary
        self.stays: dict[int, pl.DataFrame] = {}
        self._events: dict[int, Columns] = {}  # each once, without what is derived from them
        self._inputs: dict[int, Inputs] = {}
        self._news: set[int] = set()  # stays whose inputs do not know of all events yet

    def admit(self, stays: pl.DataFrame) -> None:
        """Add stays.

        Args:
            stays: ``stay_id, patient_id`` and any other column of ``schema.STAYS``.

        Raises:
            ValueError: a column is unknown, or an id is missing, repeated or there already.
        """
        table = with_defaults(check_stays(conform(stays, STAYS, "stays")))
        there = [stay for stay in table["stay_id"] if stay in self.stays]
        if there:
            raise ValueError(f"stay {there[0]} was admitted before: admit a stay once")
        for stay, one in zip(table["stay_id"], table.iter_slices(1), strict=True):
            self.stays[stay], self._events[stay] = one, NOTHING
            self._news.add(stay)
        self._add(admission(table), table["stay_id"])

    def chart(self, events: pl.DataFrame) -> list[int]:
        """Add events; gives the stays that have any.

        Args:
            events: ``stay_id, minute`` (since ICU admission)``, concept, value`` and, where they differ from the minute
                and the concept's own, ``known_minute`` and ``unit``.

        Raises:
            ValueError: a column is missing, or a stay or concept unknown.
        """
        missing = [name for name in COLUMNS if name not in events.columns]
        if missing:
            raise ValueError(
                f"events: column {', '.join(missing)} is missing; expected {', '.join([*COLUMNS, *OPTIONAL])}"
            )
        return self._add(given(events, "events"), events["stay_id"])

    def _add(self, rows: pl.LazyFrame, stay_id: pl.Series) -> list[int]:
        """Rows in schema ``EVENTS`` to the events of their stays, which it gives."""
        ids = np.unique(stay_id.to_numpy())
        stays = ids.tolist()
        strangers = [stay for stay in stays if stay not in self.stays]
        if strangers:
            raise ValueError(f"events of stay {strangers[0]}, which was not admitted: give its row of the stays first")
        place = pl.lit(pl.Series(ids)).search_sorted(pl.col("stay_id"))
        events = canonical(as_charted(rows.with_columns(stay=place)).collect())[0]
        ends = np.searchsorted(events[0], np.arange(len(stays) + 1))
        for number, stay in enumerate(stays):
            new = [column[ends[number] : ends[number + 1]] for column in events]
            new[0] = np.zeros_like(new[0])
            self._events[stay] = distinct(*map(np.concatenate, zip(self._events[stay], new, strict=True)))
        self._news.update(stays)
        return stays

    def discharge(self, stay: int) -> None:
        """Forget a stay."""
        for of in (self.stays, self._events, self._inputs):
            of.pop(stay, None)
        self._news.discard(stay)

    def batch(self, stay: int, minute: int, without: np.ndarray | None = None) -> Batch:
        """What was known of a stay before a minute: a batch of one sample or, with ``without``, of as many as its rows.

        Args:
            stay: that was admitted.
            minute: since ICU admission.
            without: (B, F) variables of each sample that are left out of its record.
        """
        if stay not in self.stays:
            raise ValueError(f"stay {stay} was not admitted")
        if stay in self._news:
            store = Store.of(self.stays[stay], completed(self._events[stay])[0])
            if stay not in self._inputs:
                views = Views(store, self.spec.variables, self.spec.window)
                self._inputs[stay] = Inputs(store.stays, self.spec, views)
            self._inputs[stay].views.store = store
            self._news.discard(stay)
        count = 1 if without is None else len(without)
        at = np.zeros(count, np.int64), np.full(count, minute, np.int64)
        return self._inputs[stay].batch(self.view, self.summary, *at, without)
