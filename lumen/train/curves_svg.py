"""Curves as SVG, in the text color of the page or notebook around it."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Sequence

from lumen.sinks.format import short
from lumen.train.curves import COLORS, DASHES, Line, Panel, fraction, ticks, value_ticks

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LINE = 340, 150, 52, 22, 20, 14


def svg(panel: Panel) -> str:
    """The panel as an SVG element, drawn in the color of the text around it."""
    rows = _legend_rows(panel)
    height = _TOP + _HEIGHT + _BOTTOM + _LINE * len(rows) + 4
    width = _LEFT + _WIDTH + 12
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" font-family="sans-serif" font-size="10" fill="currentColor">'
        f"<title>{html.escape(panel.title)}</title>"
        f'<text x="{_LEFT}" y="13" font-size="12" font-weight="bold">{html.escape(panel.title)}</text>'
    ]
    span = panel.span()
    if span is None:
        elements.append(f'<text x="{_LEFT + 8}" y="{_TOP + 20}" opacity="0.6">no finite number</text>')
    else:
        elements += _axes(panel, *span)
        elements += [element for line in panel.lines for element in _curve(panel, line, *span)]
    elements += _legend(rows)
    return "".join([*elements, "</svg>"])


def _offset(value: float, span: tuple[float, float], length: float) -> float:
    return round(fraction(value, span) * length, 1)


def _axes(panel: Panel, across: tuple[float, float], up: tuple[float, float]) -> list[str]:
    elements = []
    for value, label in value_ticks(panel, up):
        y = round(_TOP + _HEIGHT - _offset(value, up, _HEIGHT), 1)
        elements.append(f'<path d="M{_LEFT} {y}h{_WIDTH}" stroke="#888" stroke-opacity="0.3"/>')
        elements.append(f'<text x="{_LEFT - 5}" y="{y + 3}" text-anchor="end" opacity="0.8">{label}</text>')
    for value in ticks(*across, 5):
        x = round(_LEFT + _offset(value, across, _WIDTH), 1)
        elements.append(
            f'<text x="{x}" y="{_TOP + _HEIGHT + 13}" text-anchor="middle" opacity="0.8">{short(value)}</text>'
        )
    elements.append(
        f'<text x="{_LEFT + _WIDTH}" y="{_TOP - 5}" text-anchor="end" opacity="0.6">{html.escape(panel.x_name)}</text>'
    )
    return elements


def _curve(panel: Panel, line: Line, across: tuple[float, float], up: tuple[float, float]) -> Iterator[str]:
    color, dash = COLORS[line.color % len(COLORS)], DASHES[line.dash % len(DASHES)]
    raw = [(segment, ' opacity="0.25"') for segment in panel.segments(line, raw=True)] if line.raw is not None else []
    for segment, style in [*raw, *((segment, "") for segment in panel.segments(line))]:
        # The axes fit the smoothed values; raw ones may be outside, and are clamped.
        pixels = [(_LEFT + _offset(x, across, _WIDTH), _TOP + _HEIGHT - _offset(y, up, _HEIGHT)) for x, y in segment]
        pixels = thinned([(round(x, 1), round(min(max(y, _TOP), _TOP + _HEIGHT), 1)) for x, y in pixels])
        points = " ".join(f"{x},{y}" for x, y in pixels)
        if len(pixels) == 1:
            x, y = pixels[0]
            yield f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"{style}/>'
        else:
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            yield (
                f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"'
                f' stroke-linejoin="round"{dashes}{style}/>'
            )


def thinned(pixels: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that are visible: the first, the extremes and the last of each column of pixels.

    >>> thinned([(0.0, 5.0), (0.1, 1.0), (0.2, 9.0), (0.3, 4.0), (0.4, 4.5), (3.0, 2.0)])
    [(0.0, 5.0), (0.1, 1.0), (0.2, 9.0), (0.4, 4.5), (3.0, 2.0)]
    """
    visible: list[tuple[float, float]] = []
    for _, column in itertools.groupby(pixels, lambda pixel: round(pixel[0])):
        points = list(enumerate(column))
        least, most = (choose(points, key=lambda point: point[1][1]) for choose in (min, max))
        visible += [point for _, point in sorted({points[0], least, most, points[-1]})]
    return visible


def _legend_rows(panel: Panel) -> list[list[tuple[float, Line]]]:
    """The rows of the legend: the lines that fit beside each other, each with its x position."""
    rows: list[list[tuple[float, Line]]] = []
    x = math.inf
    for line in (line for line in panel.lines if line.name):
        wide = 30 + 5.6 * len(line.name)
        if x + wide > _LEFT + _WIDTH:
            rows.append([])
            x = float(_LEFT)
        rows[-1].append((round(x, 1), line))
        x += wide
    return rows


def _legend(rows: Sequence[Sequence[tuple[float, Line]]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        y = _TOP + _HEIGHT + _BOTTOM + _LINE * number + 8
        for x, line in row:
            dash = DASHES[line.dash % len(DASHES)]
            yield (
                f'<path d="M{x} {y - 3}h18" stroke="{COLORS[line.color % len(COLORS)]}" stroke-width="2"'
                + (f' stroke-dasharray="{dash}"' if dash else "")
                + f'/><text x="{x + 22}" y="{y}">{html.escape(line.name)}</text>'
            )
