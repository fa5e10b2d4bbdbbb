"""Plot curves on a terminal in braille characters of two by four dots.

A hundred lines here avoid a dependency on a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lumen.sinks.format import short
from lumen.train.curves import Line, Panel, fraction
from lumen.train.curves_svg import thinned

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column, in Unicode's numbering
_MARKS = "·ox+*#@%&"  # markers of several curves without colors
_ANSI = (34, 33, 32, 35, 36, 31, 94, 93)
_MARGIN = 10  # width of the vertical axis' labels

Span = tuple[float, float]


class Canvas:
    """A dot grid of `width` by `height` characters; each character takes the color of the curve drawn last.

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
        """Draw a straight line of dots from `begin` to `end`, each (from the left, from the bottom)."""
        count = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
        for i in range(count + 1):
            x = round(begin[0] + (end[0] - begin[0]) * i / count)
            y = self.height * 4 - 1 - round(begin[1] + (end[1] - begin[1]) * i / count)
            self._bits[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            self._owners[y // 4][x // 2] = owner

    def row(self, number: int, styles: Sequence[str]) -> str:
        """A row of characters; `styles` has a format string for each curve."""
        cells = zip(self._bits[number], self._owners[number], strict=True)
        return "".join(styles[owner].format(chr(0x2800 + bits)) if bits else " " for bits, owner in cells).rstrip()


def render_panel(panel: Panel, width: int, height: int, color: bool) -> Iterator[str]:
    """Render the panel in lines of at most `width` characters: title, `height` lines of curves, axis, and legend."""
    yield panel.title + (" (log)" if panel.log else "")
    span = panel.span()
    if span is None:
        yield "  no finite number"
        return
    x_span, y_span = span
    styles = _styles(panel.lines, color)
    canvas = Canvas(max(width - _MARGIN - 2, 10), height)
    for owner, line in enumerate(panel.lines):
        for segment in panel.segments(line):
            dots = [(int(x), int(y)) for x, y in thinned([_dot(x, y, x_span, y_span, canvas) for x, y in segment])]
            for begin, end in zip(dots, dots[1:] or dots, strict=False):
                canvas.line(begin, end, owner)
    y_labels = {0: y_span[1], height // 2: (y_span[0] + y_span[1]) / 2, height - 1: y_span[0]}
    for number in range(height):
        value = y_labels.get(number)
        label = "" if value is None else short(panel.number(value))
        yield f"{label:>{_MARGIN - 1}} │{canvas.row(number, styles)}"
    first, last = short(x_span[0]), f"{panel.x_name} {short(x_span[1])}"
    yield " " * _MARGIN + "└" + "─" * canvas.width
    yield " " * (_MARGIN + 1) + first + last.rjust(canvas.width - len(first))
    legend = [
        (f"{style.format('━')} {line.name}", line) for style, line in zip(styles, panel.lines, strict=True) if line.name
    ]
    yield from _wrap_legend(legend, width)


def _styles(lines: Sequence[Line], color: bool) -> list[str]:
    if color:
        return [f"\x1b[{_ANSI[i % len(_ANSI)]}m{{}}\x1b[0m" for i in range(len(lines))]
    return ["{}"] if len(lines) == 1 else [_MARKS[i % len(_MARKS)] for i in range(len(lines))]


def _wrap_legend(names: Sequence[tuple[str, Line]], width: int) -> Iterator[str]:
    row, length = " " * _MARGIN, _MARGIN
    for name, line in names:
        entry_width = len(line.name) + 4
        if length > _MARGIN and length + entry_width > width:
            yield row
            row, length = " " * _MARGIN, _MARGIN
        row, length = f"{row} {name} ", length + entry_width
    if length > _MARGIN:
        yield row.rstrip()


def _dot(x: float, y: float, x_span: Span, y_span: Span, canvas: Canvas) -> tuple[int, int]:
    return _to_grid(x, x_span, canvas.width * 2 - 1), _to_grid(y, y_span, canvas.height * 4 - 1)


def _to_grid(value: float, span: Span, last: int) -> int:
    return min(max(math.floor(fraction(value, span) * last + 0.5), 0), last)
