"""From memory-mapped events to what a model sees: the hourly grid, the triplets and the summary, for a whole batch.

An event is seen if it lies before the prediction and was known before it. Shape letters: B samples, T hours, N events,
F variables, R rates.
"""

import copy
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from datamodules.contract import Spec
from datamodules.dictionary import BY_NAME, NAMES, RATES
from datamodules.store import Store
from datamodules.summary import summarise

CLIP = 5.0  # standardised values are clipped to +-CLIP: raw records keep errors such as pH 100
CARRY = 24  # hours before the window from which values are carried into it
COMMON = 6  # observations of a variable in a window from which on thinning leaves some out; rarer ones are kept
Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Thinning(NamedTuple):
    """Which observations training leaves out: the same ones in every view of a sample, others in every epoch.

    Whether an observation stays depends on nothing but ``seed``, ``epoch`` and its place in the store. Of a variable
    with fewer than ``COMMON`` observations in the window, and of rates, which are steps and not samples of a course,
    all stay.
    """

    share: float  # that is left out
    seed: int
    epoch: int

    def uniform(self, row: np.ndarray) -> np.ndarray:
        """(N,) A number in [0, 1) for each row of the store (N,)."""
        key = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        return (_mix(row.astype(np.uint64) + key) >> np.uint64(11)) * 2.0**-53


class Views:
    """Cuts the samples of a batch from a store.

    Args:
        store: the events.
        variables: F names in the order of the last axis.
        window: T, hours before the prediction time.
    """

    def __init__(self, store: Store, variables: list[str], window: int):
        self.store, self.variables, self.window = store, variables, window
        position = {name: i for i, name in enumerate(variables)}
        self._variable = np.array([position.get(name, -1) for name in NAMES])  # concept code -> last axis, or -1
        self._rate_variable = np.array([position.get(name, -1) for name in RATES])  # rate -> last axis, or -1
        self._is_rate = np.array([BY_NAME[n].hourly == "rate" for n in variables], bool)
        self._is_sum = np.array([BY_NAME[n].hourly == "sum" for n in variables], bool)
        self._without: np.ndarray | None = None

    def less(self, without: np.ndarray) -> Self:
        """The views of one batch as if some variables had never been charted nor set: (B, F) true of each left out."""
        views = copy.copy(self)
        views._without = without
        return views

    def grid(
        self, spec: Spec, stay: np.ndarray, minute: np.ndarray, thinning: Thinning | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, mask and since of ``contract.Grid``, each (B, T, F), for pairs of stay index and prediction minute."""
        value, mask, since = self.hourly(stay, minute, thinning)
        never = (since == self.window + CARRY) & ~self._is_rate
        standard = np.where(never, 0, self._standard(spec, value, slice(None)))
        since = np.minimum(since / np.float32(self.window), 1)
        dense = [torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (standard, mask, since)]
        return dense[0], dense[1], dense[2]

    def triplets(
        self, spec: Spec, stay: np.ndarray, minute: np.ndarray, thinning: Thinning | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Time, variable, value, each (B, N), and length (B,) of ``contract.Triplets``."""
        owner, time, variable, value = self._with_running(stay, minute, thinning)
        length = np.bincount(owner, minlength=len(stay))
        place = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
        shape = (len(stay), max(int(length.max(initial=0)), 1))
        times, variables, values = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        times.numpy()[owner, place] = 2 * time / (60 * self.window) - 1
        variables.numpy()[owner, place] = variable + 1
        values.numpy()[owner, place] = self._standard(spec, value, variable)
        return times, variables, values, torch.from_numpy(length)

    def summary(self, stay: np.ndarray, minute: np.ndarray, thinning: Thinning | None = None) -> np.ndarray:
        """Statistics of ``contract.Summary``, (B, F, 16), in units.

        A rate counts as its steps and, where it runs when the window opens, one in the first minute. Where observations
        are left out, those of a variable that stay count for all of its number, and so do sums.
        """
        owner, row, time, variable, value = self._cut(stay, minute, CARRY)
        time = time - 60 * CARRY
        before = time < 0
        weight = None
        if thinning is not None:
            stays = self._stays(owner, row, variable, before, thinning)
            slot = 2 * (owner * len(self.variables) + variable) + (time >= 30 * self.window)  # each half by itself
            inside = ~before
            many = np.bincount(slot[inside], minlength=2 * len(stay) * len(self.variables))
            left = np.bincount(slot[inside & stays], minlength=len(many))
            weight = np.where(inside, many[slot] / np.maximum(left[slot], 1), 1)[stays]
            owner, time, variable, value, before = (a[stays] for a in (owner, time, variable, value, before))
        opening = self._running(stay, minute, (owner[~before], time[~before], variable[~before]))
        if len(opening[0]):
            weight = None if weight is None else np.append(np.ones(len(opening[0])), weight)
            before = np.append(np.zeros(len(opening[0]), bool), before)
            owner, time, variable, value = (
                np.append(first, then) for first, then in zip(opening, (owner, time, variable, value), strict=True)
            )
            order = np.argsort(time, kind="stable")
            owner, time, variable, value, before = (a[order] for a in (owner, time, variable, value, before))
            weight = None if weight is None else weight[order]
        shape = (len(stay), len(self.variables))
        return summarise((owner, time, variable, value), before, shape, self.window, weight)

    def elapsed(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """(B, 1 + 2 F): hours since ICU admission, and of each variable the number of observations since its record
        began and that number per hour; both as log(1 + x)."""
        store, width = self.store, len(self.variables)
        low, high = store.offsets[stay], store.at_or_after(stay, minute)
        owner, row = _expanded(low, high)
        variable = self._variable[store.concept[row]]
        seen = self._seen(owner, variable) & (store.known[row] < minute[owner])
        cell = owner[seen] * width + variable[seen]
        number = np.bincount(cell, minlength=len(stay) * width).reshape(-1, width)
        hours = np.maximum(minute / 60, 1)[:, None]
        return np.concatenate([minute[:, None] / 60, np.log1p(number), np.log1p(number / hours)], 1)

    def last(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """(B, F) The last value of each variable, of those that are carried into the grid; NaN where there is none."""
        owner, _, variable, value = self.events(stay, minute, CARRY)
        last = np.full((len(stay), len(self.variables)), np.nan)
        last[owner, variable] = value  # in order of time: of several, the last one stays
        return last

    def lengths(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """(B,) events in each sample's window, of any variable: what ``triplets`` gives is at most that long."""
        low, high = self._rows(stay, minute, self.window)
        running = self.store.running(stay, minute - 60 * self.window)
        return high - low + (running[:, self._rate_variable >= 0] != 0).sum(1)

    def _with_running(self, stay: np.ndarray, minute: np.ndarray, thinning: Thinning | None) -> Events:
        """``events``, and for each rate that runs when the window opens one in its first minute unless it is set anew
        then."""
        events = self.events(stay, minute, 0, thinning)
        opening = self._running(stay, minute, events[:3])
        if not len(opening[0]):
            return events
        columns = [np.concatenate([first, then]) for first, then in zip(opening, events, strict=True)]
        concept = np.array(
            [NAMES.index(name) for name in self.variables]
        )  # of several at one minute, in the order of concepts
        order = np.lexsort((concept[columns[2]], columns[1], columns[0]))
        return columns[0][order], columns[1][order], columns[2][order], columns[3][order]

    def _running(
        self, stay: np.ndarray, minute: np.ndarray, events: tuple[np.ndarray, np.ndarray, np.ndarray]
    ) -> Events:
        """An event in the first minute for each rate that runs when the window opens, unless ``events`` (owner, time,
        variable) set it anew then."""
        running = self.store.running(stay, minute - 60 * self.window)
        sample, rate = np.nonzero(running)
        ours = self._seen(sample, self._rate_variable[rate])
        sample, rate = sample[ours], rate[ours]
        owner, time, variable = events
        anew = owner[time == 0] * len(self.variables) + variable[time == 0]
        fresh = ~np.isin(sample * len(self.variables) + self._rate_variable[rate], anew)
        sample, rate = sample[fresh], rate[fresh]
        return sample, np.zeros(len(sample), time.dtype), self._rate_variable[rate], running[sample, rate]

    def _rows(self, stay: np.ndarray, minute: np.ndarray, hours: int) -> np.ndarray:
        """First row of the store of each sample's last ``hours``, and the first after them."""
        times = np.concatenate([minute - 60 * hours, minute])
        return self.store.at_or_after(np.tile(stay, 2), times).reshape(2, -1)

    def _standard(self, spec: Spec, value: np.ndarray, variable: np.ndarray | slice) -> np.ndarray:
        center, scale = np.array(spec.center, np.float32), np.array(spec.scale, np.float32)
        return np.clip((value - center[variable]) / scale[variable], -CLIP, CLIP)

    def events(self, stay: np.ndarray, minute: np.ndarray, carry: int = 0, thinning: Thinning | None = None) -> Events:
        """Events of each sample from ``carry`` hours before its window up to, not including, its prediction, known by
        then.

        Returns:
            owner (position of the sample in ``stay``), minutes since the start (window and carry), variable, value;
            each (N,), by owner, minute and concept.
        """
        owner, row, time, variable, value = self._cut(stay, minute, carry)
        if thinning is None:
            return owner, time, variable, value
        stays = self._stays(owner, row, variable, time < 60 * carry, thinning)
        return owner[stays], time[stays], variable[stays], value[stays]

    def _cut(self, stay: np.ndarray, minute: np.ndarray, carry: int) -> tuple[np.ndarray, ...]:
        """``events``, all of them, with the row of the store in second place."""
        store = self.store
        start = minute - 60 * (self.window + carry)
        owner, row = _expanded(*self._rows(stay, minute, self.window + carry))
        variable = self._variable[store.concept[row]]
        seen = self._seen(owner, variable) & (store.known[row] < minute[owner])
        owner, row, variable = owner[seen], row[seen], variable[seen]
        return owner, row, store.minute[row] - start[owner], variable, store.value[row]

    def _seen(self, owner: np.ndarray, variable: np.ndarray) -> np.ndarray:
        """(N,) Whether a variable of a sample is one of these views, and not left out."""
        ours = variable >= 0
        return ours if self._without is None else ours & ~self._without[owner, variable]

    def _stays(
        self, owner: np.ndarray, row: np.ndarray, variable: np.ndarray, before: np.ndarray, thinning: Thinning
    ) -> np.ndarray:
        """(N,) Which events thinning leaves: those ``before`` the window, too."""
        width = len(self.variables)
        slot = owner * width + variable
        number = np.bincount(slot[~before], minlength=int(slot.max(initial=0)) + 1)
        common = ~before & (number[slot] >= COMMON) & ~self._is_rate[variable]
        return ~common | (thinning.uniform(row) >= thinning.share)

    def hourly(
        self, stay: np.ndarray, minute: np.ndarray, thinning: Thinning | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hourly values in their units, mask, and hours since last charted; each (B, T, F).

        Values of one hour are averaged, volumes summed. A rate is a step function that goes on from what runs when the
        window
        opens: each of its events changes it by some amount, which counts for the rest of that hour and fully for every
            later
        one, so that two scattered sums and one running sum give the time-weighted mean of every hour.
        """
        batch, hours, width = len(stay), self.window + CARRY, len(self.variables)
        owner, time, variable, value = self.events(stay, minute, CARRY, thinning)
        shape = (hours, batch, width)  # time comes first, so that running along it is a pass over contiguous memory
        cell = (time // 60 * batch + owner) * width + variable
        count = np.bincount(cell, minlength=hours * batch * width)
        total = np.bincount(cell, value, minlength=len(count))
        mask = count > 0
        seen = np.flatnonzero(mask)
        mean = total[seen] / np.where(self._is_sum[seen % width], 1, count[seen])
        mean = np.append(0, mean).astype(np.float32)  # entry 0: not seen yet
        hour = np.append(-1, seen // (batch * width)).astype(np.float32)
        last = np.zeros(shape, np.intp)  # entry of ``mean`` that holds in each cell
        last.reshape(-1)[seen] = np.arange(1, len(mean))
        for now, before in zip(last[1:], last[:-1], strict=True):  # five times as fast as np.maximum.accumulate
            np.maximum(now, before, out=now)
        last = last[CARRY:]
        carried = mean.take(last)
        since = np.arange(CARRY, hours, dtype=np.float32)[:, None, None] - hour.take(last)
        since[last == 0] = hours
        if self._is_rate.any():
            rate = self._is_rate[variable]
            which = np.cumsum(self._is_rate) - 1  # position among the rates
            wide = (hours, batch, int(self._is_rate.sum()))
            steps = self._rates(
                time[rate], owner[rate], which[variable[rate]], value[rate], wide, self._opening(stay, minute)
            )
            carried[..., self._is_rate] = steps[CARRY:]
        return carried.swapaxes(0, 1), mask.reshape(shape)[CARRY:].swapaxes(0, 1), since.swapaxes(0, 1)

    def _opening(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """(B, R) What runs when the carried hours open, in the order of the variables that are rates."""
        running = self.store.running(stay, minute - 60 * (self.window + CARRY))
        of_rate = [RATES.index(name) for name, rate in zip(self.variables, self._is_rate, strict=True) if rate]
        opening = running[:, of_rate]
        return opening if self._without is None else np.where(self._without[:, self._is_rate], 0, opening)

    @staticmethod
    def _rates(
        time: np.ndarray,
        owner: np.ndarray,
        variable: np.ndarray,
        value: np.ndarray,
        shape: tuple[int, int, int],
        opening: np.ndarray,
    ) -> np.ndarray:
        """Time-weighted mean of each hour, (T, B, R), of step functions that start with ``opening`` (B, R)."""
        hours, batch, width = shape
        series = owner * width + variable
        order = np.lexsort((time, series))  # stable: of several values at one minute, the last holds
        series, time, value = series[order], time[order], value[order].astype(np.float64)
        first = np.diff(series, prepend=-1) != 0
        before = np.where(first, opening.reshape(-1)[series], np.roll(value, 1))
        hour, rest = time // 60, 1 - time % 60 / 60  # ``rest``: share of its hour for which the new value holds
        cell = hour * batch * width + series
        now = np.bincount(cell, (value - before) * rest, minlength=hours * batch * width)
        later = np.bincount(cell, (value - before) * (1 - rest), minlength=hours * batch * width)
        now, later = now.reshape(shape), later.reshape(shape)
        now[1:] += later[:-1]
        total = np.cumsum(now, axis=0) + opening
        total[np.abs(total) < 1e-6] = 0  # dust of the sums where an infusion has ended: rates are kept to 32 bits
        return total


def _expanded(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each range ``low`` .. ``high``, and the rows in it, joined."""
    count = high - low
    owner = np.repeat(np.arange(len(low)), count)
    return owner, np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[owner]


def _mix(number: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014): equally spread bits from numbers that differ a little."""
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))
