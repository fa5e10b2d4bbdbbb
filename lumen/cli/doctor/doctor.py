"""`lumen doctor`: check this machine for everything that Lumen needs, and say how to fix what fails."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumen.cli import command, tables
from lumen.cli.doctor.machine import check_compiler, check_devices
from lumen.cli.doctor.packages import check_packages
from lumen.cli.doctor.processes import check_processes
from lumen.cli.doctor.report import Finding, print_report, summarize
from lumen.cli.doctor.storage import check_directory

_EXAMPLES = """\
  lumen doctor                        all checks, in a minute or two
  lumen doctor --quick                in seconds, without importing, compiling or starting anything
  lumen doctor --checkpoints runs/a   also check that checkpoints can be written there
  torchrun --nproc-per-node=2 --no-python lumen doctor --quick
                                      the environment that the launcher sets for its processes
  lumen doctor --json | jq '.findings[] | select(.status != "ok")'"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "doctor",
        help="check this machine, and say how to fix what fails",
        description="Test the software, devices, compiler and processes of this machine. Each line reads ok, missing"
        "\n(optional, not installed) or broken, with the fix. Exit code 0 if nothing is broken, otherwise 1.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--quick", action="store_true", help="import no packages, compile nothing, start no processes")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIRECTORY", help="also test this directory for checkpoints"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the checks; returns the exit code."""
    findings: list[Finding] = []

    def collect() -> Iterator[Finding]:
        for finding in run_checks(options.quick, options.checkpoints):
            findings.append(finding)
            yield finding

    if options.json:
        rows = [dataclasses.asdict(finding) for finding in collect()]
        tables.print_json({"ok": _is_ok(findings), "findings": rows})
    else:
        print_report(collect())
        print(summarize(findings))
    return 0 if _is_ok(findings) else 1


def run_checks(quick: bool, checkpoints: Path | None) -> Iterator[Finding]:
    """Run all checks, and yield each finding as soon as it is known."""
    yield from check_packages(quick)
    yield from check_devices()
    if not quick:
        yield check_compiler()
    yield from check_processes(quick)
    if checkpoints is not None:
        yield from check_directory(checkpoints)


def _is_ok(findings: list[Finding]) -> bool:
    return not any(finding.status == "broken" for finding in findings)
