"""Charts of memory over a step: a sparkline for a terminal, SVG for a page, matplotlib for a file."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lumen.core.inspect import human_bytes
from lumen.planner.memory import CATEGORIES, Moment

Timeline = Sequence[tuple[Moment, Mapping[str, int]]]

COLORS = dict(
    zip(
        CATEGORIES,
        ("#3b4cc0", "#6f92f3", "#aac7fd", "#dddddd", "#f7b89c", "#2a9d8f", "#8ab17d", "#e07a5f", "#b5838d"),
        strict=True,
    )
)
_BLOCKS = "▁▂▃▄▅▆▇█"
_POINTS = 400  # of a chart; each shows the largest of its neighbors
_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 260, 70, 16


def sampled(timeline: Timeline, points: int) -> list[tuple[Moment, Mapping[str, int]]]:
    """At most `points` of a timeline, each the largest of its neighbors."""
    count = len(timeline)
    if count <= points:
        return list(timeline)
    edges = [i * count // points for i in range(points + 1)]
    return [max(timeline[a:b], key=_total) for a, b in itertools.pairwise(edges)]


def _total(point: tuple[Moment, Mapping[str, int]]) -> int:
    return sum(point[1].values())


def sparkline(values: Sequence[float]) -> str:
    """Numbers as block characters, scaled to the largest.

    >>> sparkline([0, 1, 2, 4, 8, 3])
    '▁▂▃▅█▄'
    """
    most = max(values, default=0) or 1
    return "".join(_BLOCKS[min(int(value / most * len(_BLOCKS)), len(_BLOCKS) - 1)] for value in values)


def bar(fraction: float, width: int = 24) -> str:
    """A fraction of one as a bar.

    >>> bar(0.5, 4), bar(0.3, 4)
    ('██', '█▎')
    """
    full, eighths = divmod(round(max(0.0, min(fraction, 1.0)) * width * 8), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def phases(points: Timeline) -> list[tuple[str, int, int]]:
    """Each phase with its first point and the one after its last; points between phases belong to the previous one."""
    spans: list[tuple[str, int, int]] = []
    for index, (moment, _) in enumerate(points):
        phase = moment.phase if moment.phase in ("forward", "backward", "update") else ""
        if spans and phase in ("", spans[-1][0]):
            spans[-1] = (spans[-1][0], spans[-1][1], index + 1)
        else:
            spans.append((phase, index, index + 1))
    return spans


def svg(timeline: Timeline, limit: float | None, title: str) -> str:
    """The stacked timeline as an SVG element, with a line at `limit` if it is near."""
    points = sampled(timeline, _POINTS)
    highest = max(map(_total, points), default=1) or 1
    top = max(highest, limit) if limit is not None and limit < 3 * highest else highest
    drawing = _Drawing(len(points), top * 1.05)
    height = _TOP + _HEIGHT + 66
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" role="img"'
        f' font-family="sans-serif" font-size="11"><title>{html.escape(title)}</title>'
    ]
    elements += drawing.ticks() + drawing.areas(points) + drawing.marks(points)
    if top == limit or (limit is not None and highest > limit):
        elements.append(drawing.line(float(limit or 0), "device"))
    elements += drawing.legend(points)
    return "".join([*elements, "</svg>"])


class _Drawing:
    """The coordinates and elements of the SVG chart."""

    def __init__(self, count: int, top: float) -> None:
        self.count, self.top = max(count, 2), top

    def x(self, index: float) -> float:
        return round(_LEFT + index * _WIDTH / (self.count - 1), 1)

    def y(self, value: float) -> float:
        return round(_TOP + _HEIGHT * (1 - value / self.top), 1)

    def areas(self, points: Timeline) -> list[str]:
        polygons = []
        floor = [0.0] * len(points)
        for name in CATEGORIES:
            roof = [low + point[1][name] for low, point in zip(floor, points, strict=True)]
            if roof != floor:
                up = [f"{self.x(i)},{self.y(value)}" for i, value in enumerate(roof)]
                down = [f"{self.x(i)},{self.y(value)}" for i, value in enumerate(floor)]
                polygons.append(f'<polygon fill="{COLORS[name]}" points="{" ".join(up + down[::-1])}"/>')
            floor = roof
        return polygons

    def ticks(self) -> list[str]:
        elements = []
        for i in range(5):
            value = self.top * i / 4
            y = self.y(value)
            elements.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}" stroke="#8883"/>')
            elements.append(
                f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end" fill="currentColor">{human_bytes(value)}</text>'
            )
        return elements

    def marks(self, points: Timeline) -> list[str]:
        elements = []
        for phase, begin, end in phases(points):
            if begin:
                x = self.x(begin)
                elements.append(
                    f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" stroke="#888" stroke-dasharray="2 3"/>'
                )
            if (end - begin) * _WIDTH / self.count > 40:
                middle = self.x((begin + end - 1) / 2)
                elements.append(
                    f'<text x="{middle}" y="{_TOP + _HEIGHT + 14}" text-anchor="middle" fill="currentColor">'
                    f"{phase}</text>"
                )
        return elements

    def line(self, value: float, label: str) -> str:
        y = self.y(value)
        return (
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}" stroke="#c1121f" stroke-width="1.5"/>'
            f'<text x="{_LEFT + _WIDTH - 4}" y="{y - 4}" text-anchor="end" fill="#c1121f">{label}</text>'
        )

    def legend(self, points: Timeline) -> list[str]:
        elements = []
        used = [name for name in CATEGORIES if any(point[1][name] for point in points)]
        for index, name in enumerate(used):
            x, y = _LEFT + (index % 5) * 150, _TOP + _HEIGHT + 28 + (index // 5) * 18
            elements.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{COLORS[name]}"/>')
            elements.append(f'<text x="{x + 16}" y="{y + 10}" fill="currentColor">{name}</text>')
        return elements


def figure(timeline: Timeline, limit: float | None, title: str) -> Any:
    """The same as a matplotlib figure."""
    from matplotlib.figure import Figure

    points = sampled(timeline, _POINTS)
    fig = Figure(figsize=(9, 4), layout="constrained")
    axes = fig.add_subplot()
    used = [name for name in CATEGORIES if any(point[1][name] for point in points)]
    heights = [[point[1][name] / 2**30 for point in points] for name in used]
    axes.stackplot(range(len(points)), heights, labels=used, colors=[COLORS[name] for name in used])
    highest = max(map(_total, points), default=0)
    if limit is not None and limit < 3 * highest:
        axes.axhline(limit / 2**30, color="#c1121f", label="device")
    for phase, begin, _ in phases(points):
        axes.axvline(begin, color="#888", linestyle=":", linewidth=0.8)
        axes.text(begin, highest * 1.02 / 2**30, f" {phase}", fontsize=8)
    axes.set_ylabel("GiB")
    axes.set_xlabel("operations of one step, in order")
    axes.set_xticks([])
    axes.set_title(title, fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    return fig
