"""`lumen doctor`: whether this machine has all that Lumen needs, and what to do where it has not."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumen.cli import command, tables
from lumen.cli.doctor.machine import compiler, devices
from lumen.cli.doctor.packages import software
from lumen.cli.doctor.processes import several
from lumen.cli.doctor.report import Finding, report, summed
from lumen.cli.doctor.storage import storage

_EXAMPLES = """\
  lumen doctor                        all of it, in a minute or two
  lumen doctor --quick                in seconds: nothing is imported, compiled or started
  lumen doctor --checkpoints runs/a   also whether checkpoints can be written there
  torchrun --nproc-per-node=2 --no-python lumen doctor --quick
                                      what the launcher tells its processes
  lumen doctor --json | jq '.findings[] | select(.status != "ok")'"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = command.add(
        commands,
        "doctor",
        help="say what this machine has, what it misses, and how to mend it",
        description="Look at the software, the devices, the compiler and the processes of this machine, and try each."
        "\nEvery line says ok, missing (of use only to those who ask for it) or broken, and the fix."
        "\nExit code 0 where nothing is broken, 1 where something is.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--quick", action="store_true", help="import no packages, compile nothing, start no processes")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIRECTORY", help="where checkpoints will be written: try that too"
    )
    parser.add_argument("--json", action="store_true", help="for a program to read")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine; returns the exit code."""
    found: list[Finding] = []

    def kept() -> Iterator[Finding]:
        for each in examined(options.quick, options.checkpoints):
            found.append(each)
            yield each

    if options.json:
        findings = [dataclasses.asdict(each) for each in kept()]
        tables.as_json({"ok": _well(found), "findings": findings})
    else:
        report(kept())
        print(summed(found))
    return 0 if _well(found) else 1


def examined(quick: bool, checkpoints: Path | None) -> Iterator[Finding]:
    """All findings, each as soon as it is made."""
    yield from software(quick)
    yield from devices()
    if not quick:
        yield compiler()
    yield from several(quick)
    if checkpoints is not None:
        yield from storage(checkpoints)


def _well(found: list[Finding]) -> bool:
    return not any(each.status == "broken" for each in found)
