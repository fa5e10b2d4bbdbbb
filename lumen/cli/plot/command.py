"""`lumen plot`: the curves of runs, on the terminal or in a file."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumen.cli import command, tables
from lumen.cli.plot import braille, figures, select
from lumen.cli.plot.read_logs import Logged, read
from lumen.errors import HyperparameterError
from lumen.sinks.format import short
from lumen.train.curves import Extremes, Panel

_EXAMPLES = """\
  lumen plot runs/demo                              what was measured, on the terminal
  lumen plot runs/a runs/b --metric loss            training and validation loss of two runs over each other
  lumen plot runs/a --metric "val/*" lr --log       by pattern and by name, the vertical axis logarithmic
  lumen plot runs/a --x seconds --smooth 0.9 -o curves.png
  lumen plot runs/* -o curves.html                  a page that needs nothing else
  lumen plot runs/a/metrics.csv --json | jq '.runs[0].metrics["val/loss"].last'"""
_HEIGHT = 10  # lines of a panel
_NAMED = 8
_MOST = {"terminal": 6, "file": 24}  # panels, without --metric


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = command.add(
        commands,
        "plot",
        help="draw the curves of runs, on the terminal or in a file",
        description="Draw what runs logged: metrics.jsonl or CSV, or TensorBoard's event files where there is neither."
        "\nSeveral runs lie over each other, and so do training and validation. NaN and infinity are gaps, and said.",
        examples=_EXAMPLES,
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN", help="a run's directory, or a file of numbers")
    parser.add_argument(
        "--metric",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help='"val/loss"; "loss" for that of training and validation; "val/*"; by default all that measure the model',
    )
    parser.add_argument(
        "--x",
        choices=("step", "seconds", "epoch"),
        default="step",
        help="what the curves are drawn over; seconds are those on the clock since the first row",
    )
    parser.add_argument("--smooth", type=float, default=0.0, metavar="WEIGHT", help="a running mean, from 0 to below 1")
    parser.add_argument("--log", action="store_true", help="a logarithmic vertical axis")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="curves.png, .svg, .pdf or .html")
    parser.add_argument("--json", action="store_true", help="the curves, for a program to read")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draw; returns the exit code."""
    if not 0 <= options.smooth < 1:
        raise HyperparameterError(f"--smooth takes a number from 0 to below 1, not {options.smooth:g}: --smooth 0.9.")
    runs = [read(path) for path in dict.fromkeys(options.paths)]
    panels = select.panels(runs, options.metric, options.x, options.smooth, options.log)
    most = len(panels) if options.metric or options.json else _MOST["file" if options.output else "terminal"]
    notes = [*_notes(runs, select.chosen(runs, options.metric), panels), *_left_out(panels[most:])]
    if options.output is not None:
        figures.write(options.output, panels[:most], ", ".join(select.run_names(runs)), notes)
    if options.json:
        tables.as_json(_as_data(runs, options))
        return 0
    if options.output is None:
        _on_terminal(panels[:most])
        _extremes(runs, panels[:most])
    else:
        print(tables.readable(f"{options.output}: {', '.join(panel.title for panel in panels[:most])}"))
    for note in notes:
        print(tables.readable(f"note: {note}"), file=sys.stderr)
    return 0


def _notes(runs: Sequence[Logged], metrics: Sequence[str], panels: Sequence[Panel]) -> Iterator[str]:
    """What a reader of the picture would not see in it."""
    for name, each in zip(select.run_names(runs), runs, strict=True):
        yield from (f"{name}: {note}" for note in each.notes)
        absent = [metric for metric in metrics if each.rows and metric not in each.names]
        if absent:
            yield f"{name}: {', '.join(absent[:_NAMED])}{', …' * (len(absent) > _NAMED)} not logged"
    for panel in panels:
        for line in panel.lines:
            values = line.y if line.raw is None else line.raw
            where = f"{panel.title} ({line.name})" if line.name else panel.title
            bad = [x for x, y in zip(line.x, values, strict=True) if not math.isfinite(y)]
            if bad:
                counted = f"{len(bad)} of {len(values)}"
                yield f"{where}: {counted} are NaN or infinite, the first at {panel.x_name} {short(bad[0])}"
            low = sum(math.isfinite(y) and not panel.drawable(y) for y in values)
            if low:
                yield f"{where}: {low} of {len(values)} are not above zero, and have no place on a logarithmic axis"


def _left_out(panels: Sequence[Panel]) -> list[str]:
    if not panels:
        return []
    names = ", ".join(panel.title for panel in panels[:_NAMED]) + ", …" * (len(panels) > _NAMED)
    return [f"{len(panels)} more were logged, which --metric draws: {names}"]


def _on_terminal(panels: Sequence[Panel]) -> None:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for panel in panels:
        print("\n".join(braille.drawn(panel, width, _HEIGHT, color)), end="\n\n")


def _extremes(runs: Sequence[Logged], panels: Sequence[Panel]) -> None:
    """A table of the numbers as they were logged, without smoothing."""
    rows = []
    for panel in panels:
        for line in panel.lines:
            found = Extremes.of(line.x, line.y if line.raw is None else line.raw)
            points = (found.last, found.lowest, found.highest)
            rows.append((f"{panel.title} {line.name}".rstrip(), *map(_point, points)))
    tables.table(("metric", f"last ({panels[0].x_name})", "lowest", "highest"), rows)


def _point(point: tuple[float, float] | None) -> str:
    return "" if point is None else f"{short(point[1])} at {short(point[0])}"


def _as_data(runs: Sequence[Logged], options: argparse.Namespace) -> dict[str, Any]:
    names = select.chosen(runs, options.metric)
    found = []
    for name, each in zip(select.run_names(runs), runs, strict=True):
        curves = {}
        for metric in names:
            x, y = select.curve(each.rows, select.places(each, options.x), metric)
            if y:
                curves[metric] = _numbers(x, y, options.smooth)
        found.append(
            {"name": name, "path": str(each.path), "rows": len(each.rows), "notes": each.notes, "metrics": curves}
        )
    return {"x": options.x, "smooth": options.smooth, "runs": found}


def _numbers(x: list[float], y: list[float], smooth: float) -> dict[str, Any]:
    extremes = Extremes.of(x, y)
    points = {"last": extremes.last, "lowest": extremes.lowest, "highest": extremes.highest}
    more = {"smoothed": select.smoothing(y, smooth)} if smooth else {}
    return {**{name: point and point[1] for name, point in points.items()}, "x": x, "y": y, **more}
