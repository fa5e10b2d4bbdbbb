"""All axes as one SVG: a panel for each, time and memory relative to the smallest size, on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.growth.axes import Axis
from benchmarks.growth.slopes import LARGEST, Curve
from benchmarks.picture import FAINT, INK, OTHERS, OURS, text_at

COLUMNS, WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 3, 300, 250, 44, 64, 34, 14
HEAD = 34
PROPORTIONAL = "#cbd5e1"


def svg(axes: Mapping[str, Axis], curves: Mapping[str, tuple[Curve, Curve]]) -> str:
    """The picture of the axes that were measured."""
    names = [name for name in axes if name in curves]
    width, height = COLUMNS * WIDTH, HEAD + HEIGHT * math.ceil(len(names) / COLUMNS)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" font-family="system-ui, sans-serif" font-size="11" fill="{INK}">'
        f'<title>How time and memory grow</title><rect width="{width}" height="{height}" fill="#ffffff"/>'
    )
    body = [
        text_at(8, 16, "Processor time (blue) and memory (gray), relative to the smallest size", weight=600),
        text_at(8, 30, f"The line is proportional growth. Slopes: all sizes; the largest {LARGEST} [quartiles]"),
    ]
    for at, name in enumerate(names):
        row, column = divmod(at, COLUMNS)
        body += Panel(column * WIDTH, HEAD + row * HEIGHT, axes[name], *curves[name]).drawn()
    return "\n".join([head, *body, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Panel:
    """One axis at (x, y)."""

    x: float
    y: float
    axis: Axis
    time: Curve
    memory: Curve

    def drawn(self) -> Iterator[str]:
        """Its elements."""
        axis = self.axis
        yield text_at(self.x + 8, self.y + 20, f"{axis.title}: a {axis.unit}", weight=600)
        for line, label, curve in ((34, "time", self.time), (47, "memory", self.memory)):
            yield text_at(self.x + 8, self.y + line, f"{label} {curve.slope().middle:.2f}; {curve.slope(LARGEST)}")
        yield from self._grid()
        for curve, color in ((self.memory, OTHERS), (self.time, OURS)):
            yield from self._curve(curve, color)

    def _grid(self) -> Iterator[str]:
        left, right, bottom = self.x + LEFT, self.x + WIDTH - RIGHT, self.y + HEIGHT - BOTTOM
        low, high = self._decades
        for power in range(low, high + 1):
            y = self._at_y(10.0**power)
            yield f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{FAINT}"/>'
            yield text_at(left - 6, y + 4, _short(10.0**power), anchor="end")
        for size in self.axis.sizes:
            x = self._at_x(size)
            yield f'<path d="M{x:.1f} {bottom:.1f}v4" stroke="{INK}"/>'
            yield text_at(x, bottom + 16, _short(size), anchor="middle")
        last = self.time.sizes[-1]
        end = min(last, self.time.sizes[0] * 10.0**high)
        start = f"{self._at_x(self.time.sizes[0]):.1f} {self._at_y(1):.1f}"
        stop = f"{self._at_x(end):.1f} {self._at_y(end / self.time.sizes[0]):.1f}"
        yield f'<path d="M{start}L{stop}" stroke="{PROPORTIONAL}" stroke-dasharray="4 3"/>'

    def _curve(self, curve: Curve, color: str) -> Iterator[str]:
        points = [
            (self._at_x(size), self._at_y(value / curve.medians[0]))
            for size, value in zip(curve.sizes, curve.medians, strict=True)
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        yield f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points)

    @property
    def _decades(self) -> tuple[int, int]:
        """The lowest and the highest power of ten."""
        ratios = [value / curve.medians[0] for curve in (self.time, self.memory) for value in curve.medians]
        return math.floor(math.log10(min(ratios))), max(1, math.ceil(math.log10(max(ratios))))

    def _at_x(self, size: float) -> float:
        first, last = self.time.sizes[0], self.time.sizes[-1]
        share = math.log(size / first) / math.log(last / first)
        return self.x + LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 24)

    def _at_y(self, ratio: float) -> float:
        low, high = self._decades
        share = (math.log10(ratio) - low) / (high - low)
        return self.y + HEIGHT - BOTTOM - 8 - share * (HEIGHT - TOP - BOTTOM - 8)


def _short(number: float) -> str:
    power = round(math.log10(number), 9) // 1
    if power < 3:
        return f"{number:g}"
    lead = number / 10**power
    return f"{lead:g}e{power:g}"
