"""Curves of logged numbers: how they are grouped into panels, where they have gaps, and their axes."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lumen.sinks.format import short

# Colors that are distinct on white and on black, and for color-blind readers (Okabe and Ito's, some changed).
COLORS = ("#2a87cc", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8c564b")
DASHES = ("", "5 3", "1.5 2.5", "7 2 1.5 2")
DIAGNOSTICS = ("goodput", "data_wait", "slowest_rank", "slowest_ratio")  # logged, and not in the lines of the display
# Numbers of the run, which do not measure the model.
_RUN = ("epoch", "lr", "mfu", *DIAGNOSTICS)
_LEAST = 1e-300  # below it, a tenth of a number is too small a distance
_MOST = 308.25  # about the power of ten of the largest number


@dataclass(frozen=True)
class Line:
    """One curve; NaN and infinity in `y` are gaps. `raw` has the values before smoothing, if it was smoothed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dash: int = 0
    raw: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Curves with common axes: one metric, in training and validation, of one run or several."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    x_name: str = "step"

    def drawable(self, value: float) -> bool:
        """Whether the axis can show this value."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def scaled(self, value: float) -> float:
        """The value in units of the axis: its logarithm on a logarithmic one."""
        return math.log10(value) if self.log else value

    def number(self, scaled: float) -> float:
        """The inverse of `scaled`."""
        return 10.0 ** min(scaled, _MOST) if self.log else scaled

    def span(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """The ranges of both axes, `y` scaled; None if there is nothing to draw."""
        points = [point for line in self.lines for segment in self.segments(line) for point in segment]
        if not points:
            return None
        return _padded_range([x for x, _ in points]), _padded_range([y for _, y in points])

    def segments(self, line: Line, raw: bool = False) -> Iterator[list[tuple[float, float]]]:
        """The segments of the curve between its gaps, with `y` scaled."""
        values = line.raw if raw and line.raw is not None else line.y
        points = zip(line.x, values, strict=True)
        for is_drawable, segment in itertools.groupby(points, lambda p: math.isfinite(p[0]) and self.drawable(p[1])):
            if is_drawable:
                yield [(x, self.scaled(y)) for x, y in segment]


def _padded_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high / 2 == low / 2:  # a flat line is drawn in the middle
        pad = abs(low) * 0.1 if abs(low) > _LEAST else 0.5
        return max(low - pad, -sys.float_info.max), min(high + pad, sys.float_info.max)
    return low, high


def fraction(value: float, span: tuple[float, float]) -> float:
    """The position of a value within the span, from 0 to 1.

    >>> fraction(3.0, (2.0, 4.0))
    0.5
    """
    # Halved, since the difference of two numbers may exceed the largest float.
    return (value / 2 - span[0] / 2) / (span[1] / 2 - span[0] / 2)


_RATES = "lr/"


def grouped(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Metrics by what they measure: for each title the names that share it, each with the label of its curve.

    >>> grouped(["train/loss", "val/loss", "lr/0", "lr/1", "val/hard/loss", "val/wer"])
    {'loss': [('train/loss', 'train'), ('val/loss', 'val'), ('val/hard/loss', 'val/hard')],
     'lr': [('lr/0', '0'), ('lr/1', '1')],
     'wer': [('val/wer', 'val')]}
    """
    trained = [name.removeprefix("train/") for name in names if name.startswith("train/")]
    trained.sort(key=len, reverse=True)  # val/head/loss goes with train/head/loss rather than with train/loss
    by_title: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if name.startswith(_RATES):  # of a lane, or of a group of a partition
            by_title.setdefault("lr", []).append((name, name.removeprefix(_RATES)))
            continue
        title = next((metric for metric in trained if name.endswith(f"/{metric}")), name.partition("/")[2] or name)
        by_title.setdefault(title, []).append((name, name[: -len(title)].rstrip("/")))
    return by_title


def measures(names: Sequence[str]) -> list[str]:
    """The names that measure the model, without learning rates, throughput and epochs; all if there are no others.

    >>> measures(["train/loss/0", "train/loss/1", "lr/0", "lr/1", "epoch"])
    ['train/loss/0', 'train/loss/1']
    """
    names = [name for name in names if not name.startswith(_RATES)]
    named = [name for name in names if "/" in name]
    return named or [name for name in names if name not in _RUN and not name.endswith("_per_second")]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them.

    >>> ticks(0.0, 0.93), ticks(0, 700)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [0, 200, 400, 600])
    """
    rough = (high - low) / count
    if not (math.isfinite(rough) and rough > 0):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    if not power:
        return []
    step = power * min((1, 2, 5, 10), key=lambda n: abs(n * power - rough))
    first = math.ceil(low / step - 1e-9)
    return [type(low)(float(f"{i * step:.10g}")) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def value_ticks(panel: Panel, span: tuple[float, float]) -> list[tuple[float, str]]:
    """The positions of the numbers on the vertical axis, scaled, with their texts."""
    low, high = span
    if panel.log:
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(powers) >= 2:
            return [(float(p), short(panel.number(p))) for p in powers[:: 1 + len(powers) // 6]]
        return [(scaled, short(panel.number(scaled))) for scaled in (low, (low + high) / 2, high)]
    return [(value, short(value)) for value in ticks(low, high)]


@dataclass(frozen=True)
class Extremes:
    """The last, the lowest and the highest number of a curve, each with its `x`, and the number of gaps."""

    last: tuple[float, float]
    lowest: tuple[float, float] | None
    highest: tuple[float, float] | None
    gaps: int

    @staticmethod
    def of(x: Sequence[float], y: Sequence[float]) -> Extremes:
        """The extremes of a curve with at least one point; of equal values the first.

        >>> extremes = Extremes.of([1, 2, 3, 4], [0.5, float("nan"), 0.25, 0.25])
        >>> extremes.last, extremes.lowest, extremes.highest, extremes.gaps
        ((4, 0.25), (3, 0.25), (1, 0.5), 1)
        """
        points = list(zip(x, y, strict=True))
        finite = [point for point in points if math.isfinite(point[1])]
        return Extremes(
            points[-1],
            min(finite, key=lambda p: p[1], default=None),
            max(finite, key=lambda p: p[1], default=None),
            len(points) - len(finite),
        )
