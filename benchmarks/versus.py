"""The steps of two checkouts beside each other: python -m benchmarks.versus ../before

Each checkout runs in a process of its own, with its own `lumen` under the cases of this checkout, on one thread.

`--count seconds` measures processor time, which unlike wall time does not contain what other programs of a busy machine
take. The processes take turns section by section, so what slows the machine for a while slows both. A ratio is the
median over such pairs of this checkout's figure to the other's, with its quartiles.

`--count instructions` counts what a step executes, Python's interpreter and torch's kernels alike, under valgrind. The
count repeats to about a thousandth on any machine, however busy, so one round is enough; it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import instructions
from benchmarks.rows import quartiles
from benchmarks.versus_worker import CASES, DEFAULT, STACKS

HERE = Path(__file__).parents[1]
# The other checkout's `lumen` first, then the benchmarks of this one.
WORKER = """
import sys, lumen
sys.path.insert(0, sys.argv[1])
from benchmarks.versus_worker import serve
serve(*sys.argv[2:])
"""
UNITS = {"seconds": ("µs", 1e6), "instructions": ("instructions", 1.0)}
# Counted instructions need few rounds and few steps, of which each takes seconds.
ROUNDS = {"seconds": 30, "instructions": 1}
WARM_UP_ROUNDS = {"seconds": 1, "instructions": 0}
STEPS = {("instructions", "mlp"): 10, ("instructions", "gpt-small"): 5, ("instructions", "gpt"): 2}


class Checkout:
    """A process that measures the steps of one checkout."""

    def __init__(self, root: Path, task: str, count: str, cases: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, str(HERE), str(root), task, count, *cases]
        self._folder = tempfile.TemporaryDirectory(prefix="lumen-versus-")
        if count == "instructions":
            before, more = instructions.command(Path(self._folder.name))
            command, environment = [*before, *command], environment | more
        self._process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(600)  # valgrind writes its file at the end
        self._folder.cleanup()

    def ask(self, case: str, steps: int) -> None:
        """Let the process measure a section of `case`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case} {steps}\n")
        self._process.stdin.flush()

    def figure(self) -> float:
        """What was asked for, per step."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("="):
                return float(json.loads(line[1:]))
        raise RuntimeError(f"a process that measures ended with exit code {self._process.wait()}")


def measured(checkouts: tuple[Checkout, Checkout], case: str, steps: int, count: str, turn: int) -> tuple[float, float]:
    """A section of each: of seconds one after the other, of instructions both at once."""
    figures = [0.0, 0.0]
    together = count == "instructions"
    if together:
        for checkout in checkouts:
            checkout.ask(case, steps)
    for place in (0, 1) if turn % 2 else (1, 0):
        if not together:
            checkouts[place].ask(case, steps)
        figures[place] = checkouts[place].figure()
    return figures[0], figures[1]


def compared(checkouts: tuple[Checkout, Checkout], case: str, options: Any) -> str:
    """One row of the table."""
    rounds = options.rounds or ROUNDS[options.count]
    steps = options.steps or STEPS.get((options.count, options.task), 0)
    pairs = []
    warm_up = WARM_UP_ROUNDS[options.count]  # which compiles and allocates
    for turn in range(warm_up + rounds):
        pair = measured(checkouts, case, steps, options.count, turn)
        if turn >= warm_up:
            pairs.append(pair)
    low, ratio, high = quartiles([ours / theirs for ours, theirs in pairs])
    ours, theirs = (UNITS[options.count][1] * statistics.median(column) for column in zip(*pairs, strict=True))
    return f"| {options.task} | {case} | {ours:,.0f} | {theirs:,.0f} | {ratio:.3f} | {low:.3f}–{high:.3f} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--task", default="mlp", choices=("mlp", "gpt", "gpt-small"))
    parser.add_argument("--cases", nargs="*", default=DEFAULT, choices=(*CASES, *STACKS))
    parser.add_argument("--count", default="seconds", choices=tuple(UNITS))
    parser.add_argument("--rounds", type=int, default=0, help="0 is 30 for seconds and 1 for instructions")
    parser.add_argument("--steps", type=int, default=0, help="steps of a section; 0 is the task's own number")
    options = parser.parse_args()
    unit = UNITS[options.count][0]
    sys.stdout.write(f"| task | case | this, {unit} | other, {unit} | ratio | quartiles |\n|---|---|---|---|---|---|\n")
    with (
        Checkout(HERE, options.task, options.count, options.cases) as this,
        Checkout(options.other.resolve(), options.task, options.count, options.cases) as other,
    ):
        for case in options.cases:
            sys.stdout.write(compared((this, other), case, options) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
