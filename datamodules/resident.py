"""Samples that are made once and kept, on the GPU where the model is there: later epochs pick their batches from them.

Shape letters: N samples, B of a batch, T hours, E events of all samples, F variables, S static features.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.contract import STATISTICS, Batch, Spec, Triplets, View

EVENTS = {"time": torch.float32, "variable": torch.int16, "value": torch.float32}  # of triplets, one after another
HOURS = ("value", "mask", "since")  # of a grid


def megabytes(spec: Spec, view: View, summary: bool, count: int, events: int) -> float:
    """What samples take in memory.

    Args:
        spec: of the data.
        view: what is made of a record.
        summary: whether the summary is, too.
        count: N.
        events: E, of triplets.
    """
    width = len(spec.variables)
    numbers = len(spec.statics) + 2 + summary * width * len(STATISTICS)
    if view == "grid":
        numbers += len(HOURS) * spec.window * width
    return (4.0 * count * numbers + (view == "triplets") * events * 10) / 2**20


class Resident(Dataset):
    """Samples in memory, each made when it is first asked for; indexed as ``module.Samples``.

    Args:
        make: gives the batch of some rows.
        rows: (N,) numbers of the samples.
        capacity: (N,) most events of each, of triplets; None: another view.
        device: where they are kept, and batches are.
    """

    def __init__(
        self, make: Callable[[np.ndarray], Batch], rows: np.ndarray, capacity: np.ndarray | None, device: torch.device
    ):
        self.make, self.device = make, device
        self.place = np.full(int(rows.max()) + 1, -1)
        self.place[rows] = np.arange(len(rows))
        self.made = np.zeros(len(rows), bool)
        self.kept: dict[str, Tensor] = {}
        self.kind: type[Batch] | None = None
        self.events: dict[str, torch.dtype] = {} if capacity is None else EVENTS
        capacity = np.zeros(len(rows), np.int64) if capacity is None else capacity
        self.start, self.total = np.cumsum(capacity) - capacity, int(capacity.sum())
        self.length = np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, item: np.ndarray | tuple[int, np.ndarray]) -> Batch:
        rows = item[1] if isinstance(item, tuple) else item
        place = self.place[rows]
        new = ~self.made[place]
        if new.any():
            self._keep(place[new], self.make(rows[new]))
        assert self.kind is not None
        index = self._moved(place)
        fields = {name: self.kept[name][index] for name in self.kind._fields if name not in self.events}
        if self.events:
            longest = max(int(self.length[place].max()), 1)
            position = torch.arange(longest, device=self.device)
            real = position < fields["length"][:, None]
            at = (self._moved(self.start[place])[:, None] + position).where(real, 0)
            for name in self.events:
                kept = (self.kept[name][at] * real).to(torch.int64 if name == "variable" else torch.float32)
                fields[name] = kept
        return self.kind(**fields)

    def _keep(self, place: np.ndarray, batch: Batch) -> None:
        if self.kind is None:
            self.kind = type(batch)
            for name, tensor in zip(batch._fields, batch, strict=True):
                shape, kind = (len(self), *tensor.shape[1:]), tensor.dtype
                if name in self.events:
                    shape, kind = (self.total,), self.events[name]
                self.kept[name] = torch.zeros(shape, dtype=kind, device=self.device)
        index = self._moved(place)
        for name, tensor in zip(batch._fields, batch, strict=True):
            if name not in self.events:
                self.kept[name][index] = tensor.to(self.device)
        if isinstance(batch, Triplets):
            self.length[place] = batch.length.numpy()
            at = self._moved((self.start[place][:, None] + np.arange(batch.time.shape[1]))[batch.real.numpy()])
            for name, kind in self.events.items():
                self.kept[name][at] = getattr(batch, name)[batch.real].to(self.device, kind)
        self.made[place] = True

    def _moved(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)
