"""Which samples share a batch, in which order, and which process of several takes which of them."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler

BATCH_EVENTS = 2**17  # events in a batch with their padding, over which a batch of long stays is made smaller
JITTER = 0.08  # by which the logarithm of a length is shuffled


class Batches(DistributedSampler):
    """Rows in batches: in order, or shuffled by (seed, epoch) so that an epoch can be repeated after a restart.

    With lengths, samples of like length share a batch, so that little of it is padding, and a batch of long ones holds
    fewer. Training shuffles lengths by a few percent first, so that batches are composed anew in every epoch, and then
    the order of the batches; how many there are is the same in every epoch.

    Several processes share a batch of ``size`` samples each: process r takes every ``world``-th of its rows from the
    r-th on, so all have as many batches, of like size and length, and one process with ``world`` times the size has the
    same ones. It is a ``DistributedSampler`` so that Lightning does not put another one around it, which would divide
    the batches once more.

    Args:
        rows: (N,) row numbers of samples, at least one for each process.
        size: most samples of a process in a batch; one more where a last batch of fewer samples than processes joins
            the one before it.
        seed: of the shuffling; None: no shuffling.
        epoch: the epoch.
        start: the batch at which it begins, to go on within an epoch; the next epoch begins at its first.
        lengths: (N,) events of each row.
        rank: this process.
        world: the number of processes.
        whole: processes take the batches of one process in turns instead of a part of each, so that what is said of a
            sample does not depend on their number, to the last bit; they may have one batch more or less.
    """

    def __init__(
        self,
        rows: np.ndarray,
        size: int,
        seed: int | None,
        epoch: int = 0,
        start: int = 0,
        *,
        lengths: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
        whole: bool = False,
    ):
        self.data, self.seed, self.epoch, self.start, self.rank, self.world = rows, seed, epoch, start, rank, world
        self.log_length = None if lengths is None else np.log(np.maximum(lengths, 1))
        self.numbered = False  # each batch comes with the epoch, for what training does anew in each
        self.whole, parts = whole, 1 if whole else world
        cuts = (
            list(range(0, len(rows), size * parts)) if lengths is None else _cuts(np.sort(lengths)[::-1], size, parts)
        )
        self.starts = np.array(cuts[:-1] if len(cuts) > 1 and len(rows) - cuts[-1] < parts else cuts)

    def set_epoch(
        self, epoch: int
    ) -> None:  # called by Lightning before every epoch; by then it has begun the batches of the first
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return len(self.starts[self.rank :: self.world]) if self.whole else len(self.starts)

    def __iter__(self) -> Iterator[np.ndarray | tuple[int, np.ndarray]]:
        batches = self._shared()[self.start :]
        mine = batches[self.rank :: self.world] if self.whole else [b[self.rank :: self.world] for b in batches]
        return iter([(self.epoch, rows) for rows in mine] if self.numbered else mine)

    def _shared(self) -> list[np.ndarray]:
        """The batches of an epoch, each of all processes."""
        rng = None if self.seed is None else np.random.default_rng((self.seed, self.epoch))
        rows = self.data if rng is None else rng.permutation(self.data)
        if self.log_length is None:
            return np.split(rows, self.starts[1:])
        key = self.log_length if rng is None else self.log_length + rng.uniform(-JITTER, JITTER, len(rows))
        batches = np.split(self.data[np.argsort(-key, kind="stable")], self.starts[1:])
        return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def _cuts(longest_first: np.ndarray, size: int, parts: int) -> list[int]:
    """Where batches start so that a process's part of each holds at most ``size`` samples and ``BATCH_EVENTS`` events
    with their padding."""
    cuts, start = [], 0
    while start < len(longest_first):
        cuts.append(start)
        start += parts * min(size, max(int(BATCH_EVENTS // max(longest_first[start], 1)), 1))
    return cuts
