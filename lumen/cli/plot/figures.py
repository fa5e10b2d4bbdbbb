"""Write panels of curves to a PNG, SVG or PDF file with matplotlib, or to a self-contained HTML page."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumen.cli.tables import escape
from lumen.core.versions import install_extra
from lumen.errors import LumenError
from lumen.train.curves import COLORS, DASHES, Line, Panel
from lumen.train.curves_svg import svg

FORMATS = (".png", ".svg", ".pdf", ".html")
_MAX_VALUE = 1e250
_MARKER_LIMIT = 30  # curves of up to this many points get markers
_STYLE = (
    ":root{color-scheme:light dark}body{font:14px sans-serif;margin:2em;max-width:1300px}"
    "div{display:flex;flex-wrap:wrap;gap:1em}p{opacity:.7}"
)


def write(file: Path, panels: Sequence[Panel], title: str, notes: Sequence[str]) -> None:
    """Write the panels in the format of the file's suffix.

    Raises `LumenError` if the suffix is unknown, matplotlib is needed but missing, or the file cannot be written.
    """
    kind = file.suffix.lower()
    if kind not in FORMATS:
        raise LumenError(f"-o {file} has an unknown suffix: use {file.stem}.png, .svg, .pdf or .html.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == ".html":
            file.write_text(page(panels, title, notes), encoding="utf-8")
        else:
            _save(figure(panels), file, kind)
    except OSError as error:
        raise LumenError(f"{file} cannot be written: {error.strerror or error}.") from error


def page(panels: Sequence[Panel], title: str, notes: Sequence[str]) -> str:
    """A self-contained HTML page, without scripts or external style sheets and fonts."""
    paragraphs = "".join(f"<p>{html.escape(escape(note))}</p>" for note in notes)
    images = "".join(svg(panel) for panel in panels)
    heading = html.escape(escape(title))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>{heading}</h1><div>{images}</div>{paragraphs}</body></html>\n"
    )


def figure(panels: Sequence[Panel]) -> Any:
    """The panels as a matplotlib figure; raises `LumenError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LumenError(
            f"PNG, SVG and PDF need matplotlib: {install_extra('examples')}. Without it, write -o curves.html, or"
            " omit -o to plot on the terminal."
        )
    from matplotlib.figure import Figure

    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    grid = fig.subplots(rows, columns, squeeze=False).flatten()
    for panel, axes in zip(panels, grid, strict=False):
        _plot_panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return fig


def _plot_panel(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        x = [_clamp(value) for value in line.x]
        style = {"color": COLORS[line.color % len(COLORS)], "linestyle": _dashes(line), "linewidth": 1.4}
        if line.raw is not None:
            axes.plot(x, _drawable(panel, line.raw), **{**style, "alpha": 0.25})
        marker = "." if len(line.x) <= _MARKER_LIMIT else ""
        axes.plot(x, _drawable(panel, line.y), **style, marker=marker, label=f" {line.name}")
    if panel.log and panel.span() is not None:
        axes.set_yscale("log")
    # A dollar sign in a name does not start mathematics.
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_xlabel(panel.x_name, fontsize=8, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(line.name for line in panel.lines):
        for text in axes.legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)


def _dashes(line: Line) -> Any:
    dashes = [float(length) for length in DASHES[line.dash % len(DASHES)].split()]
    return (0, dashes) if dashes else "-"


def _drawable(panel: Panel, values: Sequence[float]) -> list[float]:
    return [_clamp(value, panel.log) if panel.drawable(value) else math.nan for value in values]


def _clamp(value: float, log: bool = False) -> float:
    """Clamp the value to a range that matplotlib can handle: its axis limits must not overflow."""
    return min(max(value, 1 / _MAX_VALUE if log else -_MAX_VALUE), _MAX_VALUE)


def _save(fig: Any, file: Path, kind: str) -> None:
    from matplotlib import rc_context

    # Text stays text, and equal curves give an identical file, which may be under version control.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lumen"}):
        date = {} if kind == ".png" else {"metadata": {"Date" if kind == ".svg" else "CreationDate": None}}
        fig.savefig(file, dpi=150, **date)
