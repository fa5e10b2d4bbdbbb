"""The ratios of a report as an SVG: a dot for each variant, a bar from quartile to quartile, and a line at 1."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Sequence

from benchmarks.rows import Row

OURS, OTHERS, INK, FAINT = "#2563eb", "#94a3b8", "#1f2937", "#e2e8f0"
LEFT, ACROSS, RIGHT, LINE, TOP = 330, 460, 60, 16, 44


def svg(rows: Sequence[Row]) -> str:
    """The picture of all rows that have a ratio, on a logarithmic axis."""
    shown = [row for row in rows if row.ratio]
    low, high = _span(shown)
    body: list[str] = []
    y = TOP
    for (part, case, metric), group in itertools.groupby(shown, key=lambda row: (row.part, row.case, row.metric)):
        better = ", higher is better" if (members := list(group))[0].higher else ""
        y += LINE // 2
        body.append(text_at(8, y, f"{part}: {case}, {metric}{better}", weight=600))
        for row in members:
            y += LINE
            body += _row(row, y, low, high)
        y += LINE
    width, height = LEFT + ACROSS + RIGHT, y + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" font-family="system-ui, sans-serif" font-size="11" fill="{INK}">'
        f'<title>Ratios of the benchmarks</title><rect width="{width}" height="{height}" fill="#ffffff"/>'
        f"{text_at(8, 16, 'Ratio to the reference of each case [quartiles]; Lumen in blue', weight=600)}"
    )
    return "\n".join([head, *_grid(low, high, height), *body, "</svg>"]) + "\n"


def _row(row: Row, y: int, low: float, high: float) -> Iterator[str]:
    ratio = row.ratio or 1.0
    color = OURS if row.ours else OTHERS
    x = _x(ratio, low, high)
    yield text_at(LEFT - 10, y + 4, row.variant, anchor="end")
    if row.low and row.high:
        start, end = _x(row.low, low, high), _x(row.high, low, high)
        yield f'<path d="M{start:.1f} {y}H{end:.1f}" stroke="{color}" stroke-width="5" stroke-opacity="0.45"/>'
    yield f'<circle cx="{x:.1f}" cy="{y}" r="3.5" fill="{color}"/>'
    yield text_at(LEFT + ACROSS + RIGHT - 8, y + 4, f"{ratio:.2f}", anchor="end")


def _grid(low: float, high: float, height: int) -> Iterator[str]:
    for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1):
        x = _x(2.0**power, low, high)
        stroke = INK if power == 0 else FAINT
        yield f'<path d="M{x:.1f} {TOP - 8}V{height - 8}" stroke="{stroke}"/>'
        yield text_at(x, TOP - 12, f"{2.0**power:g}", anchor="middle")


def _span(rows: Sequence[Row]) -> tuple[float, float]:
    values = [each for row in rows for each in (row.ratio, row.low, row.high) if each]
    return min([0.5, *values]) / 1.05, max([2.0, *values]) * 1.05


def _x(value: float, low: float, high: float) -> float:
    return LEFT + ACROSS * math.log(value / low) / math.log(high / low)


def text_at(x: float, y: float, text: str, *, anchor: str = "start", weight: int = 400) -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{html.escape(text)}</text>'
