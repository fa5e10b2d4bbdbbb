"""`lumen plot`: plot the curves of runs on the terminal or in a file."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lumen.cli import command, locations, tables
from lumen.cli.plot import braille, figures, select
from lumen.cli.plot.read_logs import RunLog, read_run
from lumen.errors import HyperparameterError
from lumen.sinks.format import short
from lumen.train.curves import Extremes, Panel

_EXAMPLES = """\
  lumen plot runs/demo                              what the run measured, on the terminal
  lumen plot runs/a runs/b --metric loss            training and validation loss of two runs in one panel
  lumen plot runs/a --metric "val/*" lr --log       by pattern and by name, on a logarithmic vertical axis
  lumen plot runs/a --x seconds --smooth 0.9 -o curves.png
  lumen plot runs/* -o curves.html                  a self-contained page
  lumen plot runs/a/metrics.csv --json | jq '.runs[0].metrics["val/loss"].last'"""
_HEIGHT = 10  # lines per panel
_MAX_NAMES = 8
_MAX_PANELS = {"terminal": 6, "file": 24}  # panels, without --metric


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "plot",
        help="plot the curves of runs on the terminal or in a file",
        description="Plot the logs of runs: metrics.jsonl or CSV, or else TensorBoard's event files. Curves of several"
        "\nruns, and of training and validation, share a panel. NaN and infinity leave gaps, which a note reports.",
        examples=_EXAMPLES,
    )
    parser.add_argument("paths", type=locations.local, nargs="+", metavar="RUN", help="a run's directory, or a log")
    parser.add_argument(
        "--metric",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help='"val/loss"; "loss" for training and validation; "val/*" (default: all metrics of the model)',
    )
    parser.add_argument(
        "--x",
        choices=("step", "seconds", "epoch"),
        default="step",
        help="the horizontal axis; seconds are wall-clock time since the first row",
    )
    parser.add_argument(
        "--smooth", type=float, default=0.0, metavar="WEIGHT", help="weight of the running mean, at least 0 and below 1"
    )
    parser.add_argument("--log", action="store_true", help="a logarithmic vertical axis")
    parser.add_argument("-o", "--output", type=locations.local, metavar="FILE", help="curves.png, .svg, .pdf or .html")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plot the runs; returns the exit code."""
    if not 0 <= options.smooth < 1:
        raise HyperparameterError(f"--smooth must be at least 0 and below 1, got {options.smooth:g}: --smooth 0.9.")
    runs = [read_run(path) for path in dict.fromkeys(options.paths)]
    panels = select.panels(runs, options.metric, options.x, options.smooth, options.log)
    limit = len(panels) if options.metric or options.json else _MAX_PANELS["file" if options.output else "terminal"]
    notes = [*_notes(runs, select.select_metrics(runs, options.metric), panels), *_note_omitted(panels[limit:])]
    if options.output is not None:
        figures.write(options.output, panels[:limit], ", ".join(select.run_names(runs)), notes)
    if options.json:
        tables.print_json(_json_data(runs, options))
        return 0
    if options.output is None:
        _print_panels(panels[:limit])
        _print_extremes(runs, panels[:limit])
    else:
        print(tables.escape(f"{options.output}: {', '.join(panel.title for panel in panels[:limit])}"))
    for note in notes:
        print(tables.escape(f"note: {note}"), file=sys.stderr)
    return 0


def _notes(runs: Sequence[RunLog], metrics: Sequence[str], panels: Sequence[Panel]) -> Iterator[str]:
    """Notes on what the plot does not show."""
    for name, log in zip(select.run_names(runs), runs, strict=True):
        yield from (f"{name}: {note}" for note in log.notes)
        absent = [metric for metric in metrics if log.rows and metric not in log.names]
        if absent:
            yield f"{name}: {', '.join(absent[:_MAX_NAMES])}{', …' * (len(absent) > _MAX_NAMES)} not logged"
    for panel in panels:
        for line in panel.lines:
            values = line.y if line.raw is None else line.raw
            where = f"{panel.title} ({line.name})" if line.name else panel.title
            nonfinite = [x for x, y in zip(line.x, values, strict=True) if not math.isfinite(y)]
            if nonfinite:
                count = f"{len(nonfinite)} of {len(values)}"
                yield f"{where}: {count} are NaN or infinite, the first at {panel.x_name} {short(nonfinite[0])}"
            nonpositive = sum(math.isfinite(y) and not panel.drawable(y) for y in values)
            if nonpositive:
                yield f"{where}: {nonpositive} of {len(values)} are not positive, so a logarithmic axis omits them"


def _note_omitted(panels: Sequence[Panel]) -> list[str]:
    if not panels:
        return []
    names = ", ".join(panel.title for panel in panels[:_MAX_NAMES]) + ", …" * (len(panels) > _MAX_NAMES)
    return [f"{len(panels)} more metrics were logged; plot them with --metric: {names}"]


def _print_panels(panels: Sequence[Panel]) -> None:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for panel in panels:
        print("\n".join(braille.render_panel(panel, width, _HEIGHT, color)), end="\n\n")


def _print_extremes(runs: Sequence[RunLog], panels: Sequence[Panel]) -> None:
    """Print a table of the logged values, without smoothing."""
    rows = []
    for panel in panels:
        for line in panel.lines:
            extremes = Extremes.of(line.x, line.y if line.raw is None else line.raw)
            points = (extremes.last, extremes.lowest, extremes.highest)
            rows.append((f"{panel.title} {line.name}".rstrip(), *map(_point, points)))
    tables.print_table(("metric", f"last ({panels[0].x_name})", "lowest", "highest"), rows)


def _point(point: tuple[float, float] | None) -> str:
    return "" if point is None else f"{short(point[1])} at {short(point[0])}"


def _json_data(runs: Sequence[RunLog], options: argparse.Namespace) -> dict[str, Any]:
    metrics = select.select_metrics(runs, options.metric)
    run_data = []
    for name, log in zip(select.run_names(runs), runs, strict=True):
        curves = {}
        for metric in metrics:
            x, y = select.curve(log.rows, select.x_positions(log, options.x), metric)
            if y:
                curves[metric] = _curve_data(x, y, options.smooth)
        run_data.append(
            {"name": name, "path": str(log.path), "rows": len(log.rows), "notes": log.notes, "metrics": curves}
        )
    return {"x": options.x, "smooth": options.smooth, "runs": run_data}


def _curve_data(x: list[float], y: list[float], smooth: float) -> dict[str, Any]:
    extremes = Extremes.of(x, y)
    points = {"last": extremes.last, "lowest": extremes.lowest, "highest": extremes.highest}
    extra = {"smoothed": select.smooth_curve(y, smooth)} if smooth else {}
    return {**{name: point and point[1] for name, point in points.items()}, "x": x, "y": y, **extra}
