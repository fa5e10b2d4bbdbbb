"""Measure how time and memory grow with the work: params, leaves, microbatches, lanes, ranks, rows, metrics, steps.

    python -m benchmarks.growth                         # every axis, about a minute each
    python -m benchmarks.growth --axes leaves steps     # two axes; the others stay as the report has them
    python -m benchmarks.growth --quick                 # the smaller sizes, and two rounds

Each axis is measured in processes of its own, on one thread: processor time, which leaves out what other programs take,
in interleaved rounds, and then resident memory, with an allocator that returns what is free. A slope is that of the
line through all sizes, or through the three largest ones, on logarithmic axes, by least squares: 1 is proportional, 0
is flat. That of time is the median over rounds, with the quartiles; memory is measured once. Growth of memory below
1 MiB counts as 1 MiB.

The results are in runs/growth/growth.json, and drawn in growth.svg. A slope of the largest sizes above what is expected
is a warning.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import report, timing
from benchmarks.growth import chart, measure
from benchmarks.growth.axes import AXES
from benchmarks.growth.slopes import LARGEST, Curve
from benchmarks.options import parser

ROUNDS, QUICK_ROUNDS, LONG_ROUNDS = 5, 2, 2
TOLERANCE = 0.15  # above the expected slope


def main(arguments: list[str] | None = None) -> int:
    """Measure the selected axes; returns the exit code."""
    asked = parsed(arguments)
    console, path = Console(), asked.output / "growth.json"
    found: dict[str, Any] = json.loads(path.read_text())["axes"] if path.exists() else {}
    for name in asked.axes or AXES:
        began = time.perf_counter()
        axis = AXES[name]
        sizes = axis.sizes[:LARGEST] if asked.quick else axis.sizes
        default = QUICK_ROUNDS if asked.quick else LONG_ROUNDS if axis.is_long or axis.build is None else ROUNDS
        curves = measure.measured(name, sizes, asked.rounds or default)
        found[name] = {
            "machine": timing.machine(),
            "seconds": time.perf_counter() - began,
            "time": curves[0].as_json(),
            "memory": curves[1].as_json(),
        }
        report.write(path, {"axes": found})
        console.print(f"{name}: {found[name]['seconds']:.0f} s", style="dim", highlight=False)
    curves_of = {name: (_curve(each["time"]), _curve(each["memory"])) for name, each in found.items()}
    (asked.output / "growth.svg").write_text(chart.svg(AXES, curves_of))
    console.print(table(curves_of))
    for line in warnings(curves_of):
        console.print(f"warning: {line}", style="yellow", highlight=False)
    return 0


def table(curves: dict[str, tuple[Curve, Curve]]) -> Table:
    """The slopes."""
    shown = Table("axis", "sizes", "time", f"largest {LARGEST}", "memory", f"largest {LARGEST}")
    for name, pair in curves.items():
        slopes = [str(slope) for curve in pair for slope in (curve.slope(), curve.slope(LARGEST))]
        shown.add_row(f"{name} (a {AXES[name].unit})", f"{pair[0].sizes[0]:,} to {pair[0].sizes[-1]:,}", *slopes)
    return shown


def warnings(curves: dict[str, tuple[Curve, Curve]]) -> Iterator[str]:
    """The axes that are steeper than expected."""
    for name, pair in curves.items():
        for what, curve, expected in zip(("time", "memory"), pair, (AXES[name].time, AXES[name].memory), strict=True):
            slope = curve.slope(LARGEST)
            if slope.low > expected + TOLERANCE:
                yield f"{name}: the slope of {what} is {slope}, and at most {expected:g} is expected"


def _curve(figures: dict[str, Any]) -> Curve:
    return Curve(figures["sizes"], figures["values"])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("python -m benchmarks.growth", __doc__)
    command.add_argument("--axes", nargs="+", default=(), choices=tuple(AXES), metavar="AXIS", help=", ".join(AXES))
    command.add_argument("--quick", action="store_true", help="the smaller sizes, and two rounds")
    command.add_argument("--rounds", type=int, help=f"interleaved rounds ({ROUNDS}; of long units {LONG_ROUNDS})")
    command.add_argument("--output", type=Path, default=Path("runs/growth"), metavar="DIR", help="(runs/growth)")
    return command.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
