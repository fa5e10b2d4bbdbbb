"""Runs of a sequence in which one stretch follows itself again and again, as the layers of a model do in its trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

# A stretch is worth a graph of its own if it comes so often, and if so many items need not be compiled again.
MIN_COUNT = 4
MIN_SAVED = 200
_TOLERANCE, _NEGLIGIBLE = 1.1, 1024.0  # a cut that costs little more than the cheapest may save one stretch more
_MAX_PERIODS = 64  # periods that are tried, the most frequent distances between equal items first


class Repeat(NamedTuple):
    """Stretches of `period` items each, `times` of them, of which the first begins at `start`."""

    start: int
    period: int
    times: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.times


def may_repeat(size: int) -> bool:
    """Whether a sequence of this size can have a run that is worth a graph of its own."""
    return size * (MIN_COUNT - 1) >= MIN_SAVED * MIN_COUNT


def find_repeats(items: Sequence[int], split_cost: Callable[[int], float]) -> list[Repeat]:
    """The runs of equal stretches in `items`, in order and without overlap, the longest repeats first.

    A run of layers may be cut into stretches at any of its items: `split_cost(i)` is what it costs to cut before item
    `i` (`inf` where that cannot be), and the cheapest place is taken.

    >>> layers = [1, *[2, 3, 4] * 100, 5]
    >>> find_repeats(layers, lambda i: 0.0)
    [Repeat(start=1, period=3, times=100)]
    >>> find_repeats(layers, lambda i: 0.0 if layers[i] == 3 else inf)
    [Repeat(start=2, period=3, times=99)]
    """
    sequence = torch.as_tensor(items, dtype=torch.int64)
    repeats: list[Repeat] = []
    ranges = [(0, len(items))]
    while ranges:
        low, high = ranges.pop()
        repeat = _longest(sequence[low:high], lambda i, low=low: split_cost(low + i))  # type: ignore[misc]
        if repeat is not None:
            repeat = repeat._replace(start=low + repeat.start)
            repeats.append(repeat)
            ranges += [(low, repeat.start), (repeat.stop, high)]
    return sorted(repeats)


def _longest(sequence: Tensor, split_cost: Callable[[int], float]) -> Repeat | None:
    """The run that saves most items."""
    lengths = {(period, start): length for period in _periods(sequence) for start, length in _matches(sequence, period)}
    runs = [(length // period * period, -period, start) for (period, start), length in lengths.items()]
    for saved, negative, start in sorted(runs, reverse=True):
        if saved < MIN_SAVED:
            return None
        period = -negative
        costs = [split_cost(start + i) for i in range(period)]
        bound = _TOLERANCE * min(costs) + _NEGLIGIBLE
        size = lengths[period, start] + period
        cuts = [
            _cuttable(Repeat(start + i, period, (size - i) // period), split_cost)
            for i, cost in enumerate(costs)
            if cost < inf and cost <= bound
        ]
        best = max(cuts, key=lambda repeat: repeat.times, default=None)  # of those, the first
        if best is not None and best.times >= MIN_COUNT:
            return best
    return None


def _cuttable(repeat: Repeat, split_cost: Callable[[int], float]) -> Repeat:
    """As many of the first stretches as can be cut off."""
    ends = range(repeat.start + repeat.period, repeat.stop + 1, repeat.period)
    possible = [times for times, end in enumerate(ends, 1) if split_cost(end) < inf]
    are_inner_splits_possible = len(possible) >= repeat.times - 1 and possible[: repeat.times - 1] == [
        *range(1, repeat.times)
    ]
    return repeat._replace(times=possible[-1] if are_inner_splits_possible and possible else 0)


def _periods(sequence: Tensor) -> list[int]:
    """The distances between equal items that explain most of the sequence."""
    order = sequence.argsort(stable=True)
    is_same = sequence[order[1:]] == sequence[order[:-1]]
    periods, counts = (order[1:] - order[:-1])[is_same].unique(return_counts=True)
    return periods[(periods * counts).argsort(descending=True)[:_MAX_PERIODS]].tolist()  # type: ignore[no-any-return]


def _matches(sequence: Tensor, period: int) -> list[tuple[int, int]]:
    """Start and length of each stretch of items that are equal to those `period` later, if they make `MIN_COUNT`."""
    is_same = (sequence[:-period] == sequence[period:]).to(torch.int8)
    edges = torch.diff(is_same, prepend=is_same.new_zeros(1), append=is_same.new_zeros(1))
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    is_long = stops - starts >= (MIN_COUNT - 1) * period
    return list(zip(starts[is_long].tolist(), (stops - starts)[is_long].tolist(), strict=True))
