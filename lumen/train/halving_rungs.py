"""The rule of successive halving: its rungs, and which trials of a rung go on to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """A comparison of `size` trials, each after `step` steps, `steps` of which came after the rung before.

    `keep` trials go on; of the last rung that is the best one.
    """

    step: int
    steps: int
    size: int
    keep: int


def make_rungs(trials: int, eta: int, min_steps: int, max_steps: int) -> list[Rung]:
    """The rungs at min_steps · eta^i below `max_steps`, and the last one at `max_steps`.

    Rung i has ⌊trials / eta^i⌋ trials, and at least one.

    >>> [(rung.step, rung.size) for rung in make_rungs(27, 3, 10, 270)]
    [(10, 27), (30, 9), (90, 3), (270, 1)]
    """
    at = [min_steps]
    while at[-1] * eta < max_steps:
        at.append(at[-1] * eta)
    at += [max_steps] * (at[-1] < max_steps)
    sizes = [max(1, trials // eta**i) for i in range(len(at))]
    steps = [step - before for before, step in zip([0, *at], at, strict=False)]
    return [Rung(*fields) for fields in zip(at, steps, sizes, [*sizes[1:], 1], strict=True)]


def promoted(metrics: Mapping[int, float], keep: int, mode: str) -> list[int]:
    """The `keep` trials with the best metrics, best first; NaN is the worst, and of equal trials the first is better.

    >>> promoted({0: 0.5, 1: float("nan"), 2: 0.25, 3: 0.5}, 3, "min")
    [2, 0, 3]
    """
    sign = 1.0 if mode == "min" else -1.0

    def rank(trial: int) -> tuple[bool, float, int]:
        is_nan = math.isnan(metrics[trial])
        return is_nan, 0.0 if is_nan else sign * metrics[trial], trial

    return sorted(metrics, key=rank)[:keep]
