"""`lumen hang`: compare what the ranks of a run wrote when one of them hung."""

from __future__ import annotations

import argparse
from typing import Any

from lumen.cli import command, locations
from lumen.errors import printable
from lumen.parallel.comm.hang_dump import DIRECTORY, compare, read_dumps

_EXAMPLES = """\
  lumen hang runs/a    which rank is behind, and in which collective the others wait"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "hang",
        help="compare what the ranks of a run wrote when one of them hung",
        description="Show the step and the last collective of each rank, and the first collective that differs between"
        "\nranks. Exit code 1 if there is none.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "path", type=locations.local, metavar="RUN", help=f"the run's directory, which has {DIRECTORY}/"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the comparison; returns the exit code."""
    dumps = read_dumps(options.path)
    for dump in dumps:
        last = dump["collectives"][-1:]
        text = f"; last collective {last[0]['number']}, {last[0]['operation']}, {last[0]['state']}" if last else ""
        print(printable(f"rank {dump['rank']}, on {dump['host']}: step {dump['step']}{text}"))
    lines = compare(dumps)
    for line in lines or ["all ranks have begun the same collectives"]:
        print(printable(line))
    directory = options.path if options.path.name == DIRECTORY else options.path / DIRECTORY
    print(f"stacks: {directory}/rank-*.txt")
    return 0 if lines else 1
