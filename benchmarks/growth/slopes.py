"""Slopes on logarithmic axes: 1 is proportional, 0 is flat, 2 is quadratic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.rows import quartiles

LARGEST = 3  # sizes whose slope is also given alone: there what grows outweighs what is fixed


@dataclass(frozen=True)
class Slope:
    """The median over rounds of a slope, and its quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.middle:.2f}"
        return f"{self.middle:.2f} [{self.low:.2f}–{self.high:.2f}]"


@dataclass(frozen=True)
class Curve:
    """What was measured at each size: `values[i]` has a figure of each round at `sizes[i]`."""

    sizes: Sequence[int]
    values: Sequence[Sequence[float]]

    @property
    def medians(self) -> list[float]:
        """The median at each size."""
        return [statistics.median(figures) for figures in self.values]

    def slope(self, largest: int = 0) -> Slope:
        """The slope over all sizes, or over the `largest` ones."""
        sizes, values = self.sizes[-largest:], self.values[-largest:]
        return Slope(*quartiles([slope_of(sizes, figures) for figures in zip(*values, strict=True)]))

    def as_json(self) -> dict[str, Any]:
        """Sizes, figures and slopes."""
        slopes = {"all": asdict(self.slope()), "largest": asdict(self.slope(LARGEST))}
        return {"sizes": list(self.sizes), "values": [list(figures) for figures in self.values], "slopes": slopes}


def slope_of(sizes: Sequence[float], figures: Sequence[float]) -> float:
    """The slope of the line through points on logarithmic axes, by least squares.

    >>> round(slope_of([1, 10, 100], [5, 50, 500]), 6), round(slope_of([1, 2, 4], [3, 3, 3]), 6)
    (1.0, 0.0)
    """
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(y) for y in figures]).slope
