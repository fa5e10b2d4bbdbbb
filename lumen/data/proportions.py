"""The periodic sequence of sets that a mixture draws from: of each set, its share of every beginning, within one draw.

Item j of a set with share w comes after slot (j - 1) / w and before slot j / w. Among the sets whose time has come, the
one whose time ends first is next. So after i slots each set has been drawn less than one time more or less than w * i
(S. K. Baruah, N. K. Cohen, C. G. Plaxton, D. A. Varvel, "Proportionate progress: A notion of fairness in resource
allocation", Algorithmica 15, 1996; that it is possible: R. Tijdeman, "The chairman assignment problem", Discrete
Mathematics 32, 1980).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from lumen.errors import BatchError

MAX_PERIOD = 2**16


def counts(weights: Mapping[str, float]) -> list[int]:
    """How often each set is drawn in a period: exact if `MAX_PERIOD` draws allow it, else rounded to that many."""
    fractions = [_fraction(name, weight) for name, weight in weights.items()]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    rounded = _largest_remainder(shares)
    for name, count in zip(weights, rounded, strict=True):
        if not count:
            raise BatchError(
                f"the weight of {name!r}, {weights[name]}, is less than 1/{MAX_PERIOD} of the sum of all. Leave this"
                " set out, or give it more weight."
            )
    return rounded


def schedule(counts: list[int]) -> NDArray[np.int64]:
    """The set of each slot of a period, in which each set has its count."""
    period = sum(counts)
    waiting = [(0, number, 1) for number in range(len(counts))]  # (first slot, set, item)
    ready: list[tuple[int, int, int]] = []  # (slot that it must come before, set, item)
    slots = np.empty(period, np.int64)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, number, item = heappop(waiting)
            heappush(ready, (-(-item * period // counts[number]), number, item))
        _, number, item = heappop(ready)
        slots[slot] = number
        heappush(waiting, (item * period // counts[number], number, item + 1))
    return slots


def _fraction(name: str, weight: float) -> Fraction:
    if not 0 < weight < math.inf:
        raise BatchError(f"the weight of {name!r} is {weight}; a weight is a number above 0. Leave out a set without.")
    return Fraction(repr(float(weight)))  # 0.1 is a tenth


def _largest_remainder(shares: list[Fraction]) -> list[int]:
    exact = [share * MAX_PERIOD for share in shares]
    rounded = [int(count) for count in exact]
    order = sorted(range(len(shares)), key=lambda number: rounded[number] - exact[number])
    for number in order[: MAX_PERIOD - sum(rounded)]:
        rounded[number] += 1
    return rounded
