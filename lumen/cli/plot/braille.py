"""Curves on a terminal, in braille: two by four dots to a character.

Written out here rather than taken from a plotting library: one more thing to install, for a hundred lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lumen.sinks.format import short
from lumen.train.curves import Line, Panel, fraction
from lumen.train.curves_svg import thinned

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column, in Unicode's numbering
_MARKS = "·ox+*#@%&"  # of several curves where there are no colors
_ANSI = (34, 33, 32, 35, 36, 31, 94, 93)
_MARGIN = 10  # characters for the numbers of the vertical axis

Span = tuple[float, float]


class Canvas:
    """Dots in a grid of `width` times `height` characters; a character belongs to the curve that came there last.

    >>> canvas = Canvas(4, 1)
    >>> canvas.line((0, 0), (7, 3), owner=0)
    >>> canvas.row(0, ["{}"])
    '⣀⠤⠒⠉'
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._bits = [[0] * width for _ in range(height)]
        self._owners = [[0] * width for _ in range(height)]

    def line(self, begin: tuple[int, int], end: tuple[int, int], owner: int) -> None:
        """A straight line of dots from `begin` to `end`, each (from the left, from the bottom)."""
        count = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
        for i in range(count + 1):
            x = round(begin[0] + (end[0] - begin[0]) * i / count)
            y = self.height * 4 - 1 - round(begin[1] + (end[1] - begin[1]) * i / count)
            self._bits[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            self._owners[y // 4][x // 2] = owner

    def row(self, number: int, looks: Sequence[str]) -> str:
        """A row of characters; `looks` has for each curve a format that takes the character."""
        cells = zip(self._bits[number], self._owners[number], strict=True)
        return "".join(looks[owner].format(chr(0x2800 + bits)) if bits else " " for bits, owner in cells).rstrip()


def drawn(panel: Panel, width: int, height: int, color: bool) -> Iterator[str]:
    """The panel in lines of at most `width` characters: title, curves over `height` lines, axis, and names."""
    yield panel.title + (" (log)" if panel.log else "")
    span = panel.span()
    if span is None:
        yield "  no finite number"
        return
    across, up = span
    looks = _looks(panel.lines, color)
    canvas = Canvas(max(width - _MARGIN - 2, 10), height)
    for owner, line in enumerate(panel.lines):
        for piece in panel.pieces(line):
            dots = [(int(x), int(y)) for x, y in thinned([_dot(x, y, across, up, canvas) for x, y in piece])]
            for begin, end in zip(dots, dots[1:] or dots, strict=False):
                canvas.line(begin, end, owner)
    labels = {0: up[1], height // 2: (up[0] + up[1]) / 2, height - 1: up[0]}
    for number in range(height):
        value = labels.get(number)
        label = "" if value is None else short(panel.number(value))
        yield f"{label:>{_MARGIN - 1}} │{canvas.row(number, looks)}"
    first, last = short(across[0]), f"{panel.x_name} {short(across[1])}"
    yield " " * _MARGIN + "└" + "─" * canvas.width
    yield " " * (_MARGIN + 1) + first + last.rjust(canvas.width - len(first))
    named = [
        (f"{look.format('━')} {line.name}", line) for look, line in zip(looks, panel.lines, strict=True) if line.name
    ]
    yield from _wrapped(named, width)


def _looks(lines: Sequence[Line], color: bool) -> list[str]:
    if color:
        return [f"\x1b[{_ANSI[i % len(_ANSI)]}m{{}}\x1b[0m" for i in range(len(lines))]
    return ["{}"] if len(lines) == 1 else [_MARKS[i % len(_MARKS)] for i in range(len(lines))]


def _wrapped(names: Sequence[tuple[str, Line]], width: int) -> Iterator[str]:
    row, used = " " * _MARGIN, _MARGIN
    for name, line in names:
        wide = len(line.name) + 4
        if used > _MARGIN and used + wide > width:
            yield row
            row, used = " " * _MARGIN, _MARGIN
        row, used = f"{row} {name} ", used + wide
    if used > _MARGIN:
        yield row.rstrip()


def _dot(x: float, y: float, across: Span, up: Span, canvas: Canvas) -> tuple[int, int]:
    return _part(x, across, canvas.width * 2 - 1), _part(y, up, canvas.height * 4 - 1)


def _part(value: float, span: Span, last: int) -> int:
    return min(max(math.floor(fraction(value, span) * last + 0.5), 0), last)
