"""Stays that go on: events are added as they are charted, and batches cut of what is known so far.

What a batch holds equals what ``--data Tables`` gives of the same stays and events.
"""

import copy

import numpy as np
import polars as pl
import torch

from datamodules.build import admission, canonical
from datamodules.contract import STATISTICS, VIEWS, Batch, Spec, View
from datamodules.hospitals.tables import COLUMNS, OPTIONAL, given, with_defaults
from datamodules.scaler import Statics
from datamodules.schema import EVENTS, STAYS, as_events, check_stays, conform
from datamodules.store import Store
from datamodules.views import Views


class Live:
    """Stays and what was charted of them so far.

    Args:
        spec: of the model.
        view: what it reads.
        summary: whether it reads the summary, too.
    """

    def __init__(self, spec: Spec, view: View, summary: bool):
        self.spec, self.view, self.summary = spec, view, summary or view == "summary"
        self.stays: dict[int, pl.DataFrame] = {}
        self._charted: dict[int, list[pl.DataFrame]] = {}
        self._statics: dict[int, Statics] = {}
        self._views: dict[int, Views] = {}  # of stays of which nothing was charted since

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
        rows = admission(table).collect()
        for one in table.iter_slices(1):
            stay = one["stay_id"][0]
            self.stays[stay] = one
            self._charted[stay] = [_charted(rows.filter(stay_id=stay))]

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
        kept = as_events(given(events, "events").lazy()).collect()
        parts = kept.partition_by("stay_id", as_dict=True, include_key=True, maintain_order=True)
        strangers = [stay for (stay,) in parts if stay not in self.stays]
        if strangers:
            raise ValueError(f"events of stay {strangers[0]}, which was not admitted: give its row of the stays first")
        for (stay,), rows in parts.items():
            self._charted[stay].append(_charted(rows))
            self._views.pop(stay, None)
        return [stay for (stay,) in parts]

    def discharge(self, stay: int) -> None:
        """Forget a stay."""
        for of in (self.stays, self._charted, self._statics, self._views):
            of.pop(stay, None)

    def batch(self, stay: int, minute: int, without: np.ndarray | None = None) -> Batch:
        """What was known of a stay before a minute: a batch of one sample or, with ``without``, of as many as its rows.

        Args:
            stay: that was admitted.
            minute: since ICU admission.
            without: (B, F) variables of each sample that are left out of its record.
        """
        if stay not in self.stays:
            raise ValueError(f"stay {stay} was not admitted")
        if stay not in self._views:
            self._charted[stay] = [pl.concat(self._charted[stay])]
            store = Store.of(self.stays[stay], canonical(self._charted[stay][0])[0])
            views = self._views[stay] = Views(store, self.spec.variables, self.spec.window)
            if stay not in self._statics:
                self._statics[stay] = Statics(store.stays, self.spec, views)
            self._statics[stay].views = views
        views, statics = self._views[stay], self._statics[stay]
        count = 1 if without is None else len(without)
        at = np.zeros(count, np.int64), np.full(count, minute, np.int64)
        if without is not None:
            views, statics = views.less(without), copy.copy(statics)
            statics.views = views
        static = torch.from_numpy(statics.batch(*at))
        summary = torch.from_numpy(views.summary(*at)) if self.summary else torch.zeros(count, 0, len(STATISTICS))
        unknown, row = torch.full((count,), torch.nan), torch.zeros(count, dtype=torch.int64)
        if self.view == "grid":
            return VIEWS["grid"](static, summary, *views.grid(self.spec, *at), unknown, row)
        if self.view == "triplets":
            return VIEWS["triplets"](static, summary, *views.triplets(self.spec, *at), unknown, row)
        return VIEWS["summary"](static, summary, unknown, row)


def _charted(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of one stay in schema ``EVENTS`` as ``canonical`` reads them."""
    assert rows.columns == list(EVENTS)
    return rows.select(
        pl.lit(0, pl.Int64).alias("stay"), "minute", pl.coalesce("known_minute", "minute").alias("known_minute"),
        "concept", pl.col("value").cast(pl.Float32), pl.col("unit").cast(pl.Categorical), "dropped",
    )  # fmt: skip
