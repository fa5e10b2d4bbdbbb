"""Panels of curves in a file: PNG, SVG or PDF by matplotlib, or a page of HTML that needs nothing."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumen.cli.tables import readable
from lumen.errors import LumenError
from lumen.train.curves import COLORS, DASHES, Line, Panel
from lumen.train.curves_svg import svg

FORMATS = (".png", ".svg", ".pdf", ".html")
_MOST = 1e250
_FEW = 30  # points, below which each is marked
_STYLE = (
    ":root{color-scheme:light dark}body{font:14px sans-serif;margin:2em;max-width:1300px}"
    "div{display:flex;flex-wrap:wrap;gap:1em}p{opacity:.7}"
)


def write(file: Path, panels: Sequence[Panel], title: str, notes: Sequence[str]) -> None:
    """Write the panels in the format that the name of the file ends in.

    Raises `LumenError` where that is another one, matplotlib is wanted and missing, or the file cannot be written.
    """
    kind = file.suffix.lower()
    if kind not in FORMATS:
        raise LumenError(f"-o {file} does not end in a known format: write {file.stem}.png, .svg, .pdf or .html.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == ".html":
            file.write_text(page(panels, title, notes), encoding="utf-8")
        else:
            _save(figure(panels), file, kind)
    except OSError as error:
        raise LumenError(f"{file} cannot be written: {error.strerror or error}.") from error


def page(panels: Sequence[Panel], title: str, notes: Sequence[str]) -> str:
    """A page of HTML in which all is inside: no script, no style sheet, no font from elsewhere."""
    said = "".join(f"<p>{html.escape(readable(note))}</p>" for note in notes)
    drawn = "".join(svg(panel) for panel in panels)
    name = html.escape(readable(title))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>{name}</h1><div>{drawn}</div>{said}</body></html>\n"
    )


def figure(panels: Sequence[Panel]) -> Any:
    """The same as a figure of matplotlib's; raises `LumenError` where that is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LumenError(
            "matplotlib, which draws PNG, SVG and PDF, is missing: pip install 'lumen-torch[examples]'. Without it,"
            " -o curves.html writes a page, and no -o draws on the terminal."
        )
    from matplotlib.figure import Figure

    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = math.ceil(len(panels) / columns)
    made = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    grid = made.subplots(rows, columns, squeeze=False).flatten()
    for panel, axes in zip(panels, grid, strict=False):
        _fill(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return made


def _fill(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        across = [_within(x) for x in line.x]
        look = {"color": COLORS[line.color % len(COLORS)], "linestyle": _dashes(line), "linewidth": 1.4}
        if line.raw is not None:
            axes.plot(across, _drawable(panel, line.raw), **{**look, "alpha": 0.25})
        marker = "." if len(line.x) <= _FEW else ""
        axes.plot(across, _drawable(panel, line.y), **look, marker=marker, label=f" {line.name}")
    if panel.log and panel.span() is not None:
        axes.set_yscale("log")
    # A name may hold dollars, which are no mathematics.
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_xlabel(panel.x_name, fontsize=8, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(line.name for line in panel.lines):
        for text in axes.legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)


def _dashes(line: Line) -> Any:
    dashes = [float(each) for each in DASHES[line.dash % len(DASHES)].split()]
    return (0, dashes) if dashes else "-"


def _drawable(panel: Panel, values: Sequence[float]) -> list[float]:
    return [_within(value, panel.log) if panel.drawable(value) else math.nan for value in values]


def _within(value: float, log: bool = False) -> float:
    """The value where matplotlib can count with it; its axes end a little further, and fail where floats do."""
    return min(max(value, 1 / _MOST if log else -_MOST), _MOST)


def _save(made: Any, file: Path, kind: str) -> None:
    from matplotlib import rc_context

    # Text stays text, and the same curves are the same file: it may lie in a repository.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lumen"}):
        date = {} if kind == ".png" else {"metadata": {"Date" if kind == ".svg" else "CreationDate": None}}
        made.savefig(file, dpi=150, **date)
