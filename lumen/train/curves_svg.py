"""Curves as SVG, for a page or a notebook, whose colors of text and ground it takes."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Sequence

from lumen.sinks.format import short
from lumen.train.curves import COLORS, DASHES, Line, Panel, fraction, ticks, value_ticks

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LINE = 340, 150, 52, 22, 20, 14


def svg(panel: Panel) -> str:
    """The panel as an SVG element, drawn in the color of the text round it."""
    rows = _legend_rows(panel)
    height = _TOP + _HEIGHT + _BOTTOM + _LINE * len(rows) + 4
    width = _LEFT + _WIDTH + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" font-family="sans-serif" font-size="10" fill="currentColor">'
        f"<title>{html.escape(panel.title)}</title>"
        f'<text x="{_LEFT}" y="13" font-size="12" font-weight="bold">{html.escape(panel.title)}</text>'
    ]
    span = panel.span()
    if span is None:
        parts.append(f'<text x="{_LEFT + 8}" y="{_TOP + 20}" opacity="0.6">no finite number</text>')
    else:
        parts += _axes(panel, *span)
        parts += [each for line in panel.lines for each in _curve(panel, line, *span)]
    parts += _legend(rows)
    return "".join([*parts, "</svg>"])


def _place(value: float, span: tuple[float, float], length: float) -> float:
    return round(fraction(value, span) * length, 1)


def _axes(panel: Panel, across: tuple[float, float], up: tuple[float, float]) -> list[str]:
    found = []
    for value, label in value_ticks(panel, up):
        y = round(_TOP + _HEIGHT - _place(value, up, _HEIGHT), 1)
        found.append(f'<path d="M{_LEFT} {y}h{_WIDTH}" stroke="#888" stroke-opacity="0.3"/>')
        found.append(f'<text x="{_LEFT - 5}" y="{y + 3}" text-anchor="end" opacity="0.8">{label}</text>')
    for value in ticks(*across, 5):
        x = round(_LEFT + _place(value, across, _WIDTH), 1)
        found.append(
            f'<text x="{x}" y="{_TOP + _HEIGHT + 13}" text-anchor="middle" opacity="0.8">{short(value)}</text>'
        )
    found.append(
        f'<text x="{_LEFT + _WIDTH}" y="{_TOP - 5}" text-anchor="end" opacity="0.6">{html.escape(panel.x_name)}</text>'
    )
    return found


def _curve(panel: Panel, line: Line, across: tuple[float, float], up: tuple[float, float]) -> Iterator[str]:
    color, dash = COLORS[line.color % len(COLORS)], DASHES[line.dash % len(DASHES)]
    raw = [(piece, ' opacity="0.25"') for piece in panel.pieces(line, raw=True)] if line.raw is not None else []
    for piece, look in [*raw, *((piece, "") for piece in panel.pieces(line))]:
        # What was smoothed may leave the axes before it was.
        places = [(_LEFT + _place(x, across, _WIDTH), _TOP + _HEIGHT - _place(y, up, _HEIGHT)) for x, y in piece]
        places = thinned([(round(x, 1), round(min(max(y, _TOP), _TOP + _HEIGHT), 1)) for x, y in places])
        points = " ".join(f"{x},{y}" for x, y in places)
        if len(places) == 1:
            x, y = places[0]
            yield f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"{look}/>'
        else:
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            yield (
                f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"'
                f' stroke-linejoin="round"{dashes}{look}/>'
            )


def thinned(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many points of a picture those that are seen: for each of its columns the first, the extremes and the last.

    >>> thinned([(0.0, 5.0), (0.1, 1.0), (0.2, 9.0), (0.3, 4.0), (0.4, 4.5), (3.0, 2.0)])
    [(0.0, 5.0), (0.1, 1.0), (0.2, 9.0), (0.4, 4.5), (3.0, 2.0)]
    """
    found: list[tuple[float, float]] = []
    for _, column in itertools.groupby(places, lambda place: round(place[0])):
        points = list(enumerate(column))
        least, most = (choose(points, key=lambda point: point[1][1]) for choose in (min, max))
        found += [point for _, point in sorted({points[0], least, most, points[-1]})]
    return found


def _legend_rows(panel: Panel) -> list[list[tuple[float, Line]]]:
    """Names beside each other as far as there is room, each with its place."""
    rows: list[list[tuple[float, Line]]] = []
    x = math.inf
    for line in (each for each in panel.lines if each.name):
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
