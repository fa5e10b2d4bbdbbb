"""The steps of two checkouts beside each other: python -m benchmarks.versus ../before

Each checkout runs in a process of its own, with its own `lumen` and `benchmarks`, on one thread. The processes take
turns section by section, so what slows the machine for a while slows both. A ratio is the median over such pairs of the
processor time of a step, this checkout's to the other's, with its quartiles. Processor time, unlike wall time, does not
count what other programs of a busy machine take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import quartiles

HERE = Path(__file__).parents[1]
CASES = ("lumen", "lumen-donate", "lumen-clip", "lumen-guard", "lumen-compile-donate", "runner-donate")

# What runs in each checkout: for each line "CASE STEPS", seconds per step of processor time, as JSON.
WORKER = """
import json, sys, time, types
from benchmarks import ours, tasks, timing
timing.prepare(1)
timing.time = types.SimpleNamespace(perf_counter=time.process_time)
task = tasks.make(sys.argv[1])
built = {}
for line in sys.stdin:
    case, steps = line.split()
    if case not in built:
        built[case] = next(v for v in ours.VARIANTS if v.name == case).build(task)
    print("=" + json.dumps(built[case](int(steps) or task.steps)), flush=True)
"""


class Checkout:
    """A process that measures the steps of one checkout."""

    def __init__(self, root: Path, task: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, task],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def seconds(self, case: str, steps: int) -> float:
        """Processor seconds per step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case} {steps}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("="):
                return float(json.loads(line[1:]))
        raise RuntimeError(f"the process that measures {case} ended with exit code {self._process.wait()}")


def compared(this: Checkout, other: Checkout, case: str, options: Any) -> str:
    """One row of the table."""
    times: tuple[list[float], list[float]] = [], []
    for turn in range(options.rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        seconds = {place: (this, other)[place].seconds(case, options.steps) for place in order}
        if turn:  # the first round compiles and allocates
            for place, value in seconds.items():
                times[place].append(value)
    low, ratio, high = quartiles([ours / theirs for ours, theirs in zip(*times, strict=True)])
    micros = [1e6 * statistics.median(column) for column in times]
    return f"| {options.task} | {case} | {micros[0]:,.0f} | {micros[1]:,.0f} | {ratio:.3f} | {low:.3f}–{high:.3f} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--task", default="mlp", choices=("mlp", "gpt"))
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=0, help="steps of a section; 0 is the task's own number")
    options = parser.parse_args()
    sys.stdout.write("| task | case | this, µs | other, µs | ratio | quartiles |\n|---|---|---|---|---|---|\n")
    with Checkout(HERE, options.task) as this, Checkout(options.other.resolve(), options.task) as other:
        for case in options.cases:
            sys.stdout.write(compared(this, other, case, options) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
