"""Check on one GPU what no machine without one can: laws on CUDA, 16 and 8 bits, graphs, copies, NCCL, speed.

    python -m benchmarks.gpu                      # everything, in about eight minutes
    python -m benchmarks.gpu laws graphs          # two groups
    python -m benchmarks.gpu --dry-run            # the same code at small sizes on the CPU
    python -m benchmarks.gpu --list

It runs with any Python that has torch and what Lumen imports; what else is missing is named, and the rest runs. Each
group has a process of its own, and each check a limit of time. A check that crashes its process, or exceeds its limit,
fails alone: a new process does the rest of the group. The results are in runs/gpu/gpu.json (with tracebacks) and
runs/gpu/gpu.md (a table), which are written anew after each group. The exit code is 1 if a check failed or was not
reached, and 2 if nothing could run. A check that needs a package or another GPU, or that Lumen refuses by name where
that is an answer, is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.options import parser

if TYPE_CHECKING:  # it imports torch and Lumen, which may be missing
    from benchmarks.gpu.check import Group

REQUIRED = ("torch", "numpy", "optree")  # what `import lumen` imports


def main(arguments: list[str] | None = None) -> int:
    """Run the selected groups; returns the exit code."""
    asked = parsed(arguments)
    if problem := obstacle(asked.dry_run) or unknown(asked.groups):
        print(problem, file=sys.stderr)
        return 2
    from benchmarks.gpu.check import GROUPS

    groups = [group for group in GROUPS if group.name in asked.groups or not asked.groups]
    if asked.list:
        for group in groups:
            print(f"{group.name}: {', '.join(check.name for check in group.checks())}")
        return 0
    if asked.dry_run:
        importlib.import_module("torch._inductor.config")  # once, for all groups, which are forks then
    return checked(groups, asked)


def checked(groups: Sequence[Group], asked: argparse.Namespace) -> int:
    """Run groups, first those that measure time, each alone; write the results after each group."""
    from benchmarks.gpu import report
    from benchmarks.gpu.supervise import Supervisor

    device, began = "cpu" if asked.dry_run else "cuda:0", time.monotonic()
    supervisor = Supervisor(device, began + 60 * asked.minutes)
    about, results = report.machine(device), []

    def add(found: list[dict[str, Any]]) -> None:
        results.extend(found)
        for result in found:
            print(report.line(result), flush=True)
        report.write({"machine": about, "seconds": time.monotonic() - began, "checks": results}, asked.output)

    together = [group for group in groups if not group.alone and asked.jobs > 1]
    for group in groups:
        if group not in together:
            add(supervisor.results(group))
    with ThreadPoolExecutor(asked.jobs) as pool:
        for done in as_completed([pool.submit(supervisor.results, group) for group in together]):
            add(done.result())
    print(f"{report.summary(results)}; written to {asked.output}/gpu.json and gpu.md")
    return int(report.has_failed(results))


def unknown(names: Sequence[str]) -> str | None:
    """What is wrong with the names of groups; None if nothing is."""
    from benchmarks.gpu.check import GROUPS

    wrong = sorted(set(names) - {group.name for group in GROUPS})
    return f"there is no group {', '.join(wrong)}; there are: {', '.join(g.name for g in GROUPS)}" if wrong else None


def obstacle(dry_run: bool) -> str | None:
    """Why nothing can run, and what to do; None if something can."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} lacks {', '.join(missing)}, without which Lumen cannot be imported: install them, or put"
            " a folder that has them on PYTHONPATH."
        )
    import torch

    if not dry_run and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here. Without one: python -m benchmarks.gpu --dry-run"
    return None


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("python -m benchmarks.gpu", __doc__)
    command.add_argument("groups", nargs="*", metavar="GROUP", help="all by default; see --list")
    command.add_argument("--list", action="store_true", help="list the groups and their checks")
    command.add_argument("--dry-run", action="store_true", help="on the CPU, at small sizes")
    command.add_argument("--jobs", type=int, default=None, metavar="N", help="groups at a time that measure nothing")
    command.add_argument("--minutes", type=float, default=8.0, help="after which no check runs any more (8)")
    command.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR", help="(runs/gpu)")
    asked = command.parse_args(arguments)
    if asked.jobs is None:
        asked.jobs = 1 if asked.dry_run else 3
    return asked


if __name__ == "__main__":
    sys.exit(main())
