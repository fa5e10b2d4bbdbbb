"""Measure Lumen beside raw loops and other libraries.

    python -m benchmarks                            # every benchmark
    python -m benchmarks leaves sweep               # two of them
    python -m benchmarks overhead --cases mlp --only 'Lumen*' '*JAX*'
    python -m benchmarks --quick                    # a first look: few rounds, small cases
    python -m benchmarks --markdown runs/bench/report.json

Each benchmark runs in a separate process, one after the other; the machine should do nothing else. Every figure is
measured beside its reference in interleaved rounds. A ratio is the median over rounds, with the quartiles. Results are
printed as tables and written as JSON and as a picture (SVG). Lumen's ratios are then compared with the committed
baseline, benchmarks/baseline.json: see benchmarks/regression.py for the rule. Set BENCH_TRACEBACK=1 to see where a
variant failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import picture, regression, report
from benchmarks.apart import ApartError, apart
from benchmarks.options import Options, parser
from benchmarks.parts import PARTS, about, measured


def main(arguments: list[str] | None = None) -> int:
    """Run the selected benchmarks; returns the exit code."""
    asked = parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if asked.list:
        for part in PARTS:
            console.print(f"{part:16}{about(part)}", markup=False)
        return 0
    if asked.markdown:
        print(report.markdown(regression.load(asked.markdown)), end="")
        return 0
    found: dict[str, Any] = {"quick": asked.quick, "parts": {}}
    failed = False
    for part in asked.parts or PARTS:
        began = time.perf_counter()
        try:
            machine, rows = apart(measured, part, options_of(asked))
        except ApartError as error:
            console.print(f"{part} failed: {error}", style="red", markup=False)
            failed = True
            continue
        seconds = time.perf_counter() - began
        found["parts"][part] = {"machine": machine, "seconds": seconds, "rows": [row.as_json() for row in rows]}
        console.print(report.described(machine), style="dim", markup=False)
        report.show(console, part, rows)
        for row in rows:
            if row.value is None:
                console.print(f"missing: {row.case}, {row.variant}: {row.note}", markup=False, style="yellow")
        report.write(asked.output / "report.json", found)
        (asked.output / "report.svg").write_text(picture.svg(regression.rows_of(found)))
    console.print(f"written to {asked.output}/report.json and report.svg", markup=False)
    worse = judged(console, found, asked)
    return int(failed or (worse and asked.strict))


def judged(console: Console, found: dict[str, Any], asked: argparse.Namespace) -> bool:
    """Compare with the baseline, or write a new one; returns whether anything is worse."""
    baseline = regression.load(asked.baseline)
    if asked.write_baseline:
        report.write(asked.baseline, regression.merged(baseline, found))
        console.print(f"{', '.join(found['parts'])}: now the baseline, in {asked.baseline}", markup=False)
        return False
    verdict = regression.compare(regression.rows_of(found), regression.rows_of(baseline))
    for line in regression.elsewhere(found, baseline):
        console.print(f"note: {line}", markup=False, style="dim")
    for line in verdict.lines():
        console.print(line, markup=False, style="yellow" if line.startswith("warning") else None, soft_wrap=True)
    return bool(verdict.warnings)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("python -m benchmarks", __doc__)
    command.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    command.add_argument("--list", action="store_true", help="list the benchmarks and what they measure")
    command.add_argument("--quick", action="store_true", help="few rounds and small cases, a few minutes in all")
    command.add_argument("--cases", nargs="+", default=(), metavar="GLOB", help="only these cases")
    command.add_argument("--only", nargs="+", default=(), metavar="GLOB", help="only these variants, and the reference")
    command.add_argument("--rounds", type=int, help="interleaved rounds (each benchmark has its own default)")
    command.add_argument("--threads", type=int, default=2, help="and cores, of one process (2)")
    command.add_argument("--worlds", type=int, nargs="+", default=(), metavar="N", help="numbers of processes")
    command.add_argument("--wire", type=float, metavar="MB/s", help="emulate a network of this speed (parallel, ranks)")
    command.add_argument("--directory", type=Path, help="a directory on the disk for checkpoints (a temporary one)")
    command.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR", help="(runs/bench)")
    command.add_argument("--baseline", type=Path, default=regression.BASELINE, metavar="PATH")
    command.add_argument("--write-baseline", action="store_true", help="save the results as the new baseline")
    command.add_argument("--strict", action="store_true", help="exit with 1 if a ratio is worse than the baseline")
    command.add_argument("--markdown", type=Path, metavar="REPORT", help="print the tables of a report and exit")
    asked = command.parse_args(arguments)
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown:
        command.error(f"there is no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if asked.quick and asked.write_baseline:
        command.error("a quick look makes no baseline: leave out --quick")
    return asked


def options_of(asked: argparse.Namespace) -> Options:
    """The options of one benchmark."""
    return Options(
        quick=asked.quick,
        rounds=asked.rounds,
        threads=asked.threads,
        only=tuple(asked.only),
        cases=tuple(asked.cases),
        worlds=tuple(asked.worlds),
        wire=asked.wire,
        directory=asked.directory,
    )


if __name__ == "__main__":
    sys.exit(main())
