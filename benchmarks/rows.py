"""`Row`: one figure of the suite, and how measured times become rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Key = tuple[str, str, str, str]
UNITS = {"µs": 1e6, "ms": 1e3, "s": 1.0}  # of a second


@dataclass(frozen=True)
class Row:
    """The figures of one variant in one case of a benchmark.

    `ratio` compares with the variant of the case that has 1.00, `low` and `high` are the quartiles of it, where it was
    measured more than once. `higher` says that more is better; `bound` is what no implementation can go below.
    A row without a value says in `note` why.
    """

    part: str
    case: str
    variant: str
    metric: str
    unit: str
    value: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    higher: bool = False
    bound: float | None = None
    note: str = ""

    @property
    def key(self) -> Key:
        """The key that identifies this row in another report."""
        return self.part, self.case, self.variant, self.metric

    @property
    def ours(self) -> bool:
        """Whether this row measures Lumen."""
        return self.variant.startswith("Lumen")

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def timed(
    part: str, case: str, times: Mapping[str, Sequence[float]], base: str, *, unit: str = "µs", metric: str = "step"
) -> list[Row]:
    """One row for each variant from seconds of its rounds: the median, and ratios to `base` in the same round."""
    rows = []
    for label, found in times.items():
        low, ratio, high = quartiles([mine / other for mine, other in zip(found, times[base], strict=True)])
        value = statistics.median(found) * UNITS[unit]
        rows.append(Row(part, case, label, metric, unit, value, ratio, low, high))
    return rows


def throughput(
    part: str, case: str, times: Mapping[str, Sequence[float]], base: str, *, unit: str, amount: float
) -> list[Row]:
    """The same for `amount` items per round: the ratio is one of speeds."""
    rows = []
    for label, found in times.items():
        low, ratio, high = quartiles([other / mine for mine, other in zip(found, times[base], strict=True)])
        value = amount / statistics.median(found)
        rows.append(Row(part, case, label, "throughput", unit, value, ratio, low, high, higher=True))
    return rows
