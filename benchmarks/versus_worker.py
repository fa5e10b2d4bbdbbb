"""The process that `benchmarks.versus` starts for each checkout: its `lumen` under the cases of this folder.

For each line "CASE STEPS" it prints what a step of the case costs, in seconds of processor time or in instructions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lumen as lm
from benchmarks import fit, instructions, ours, runner, stacks, tasks, timing

CASES: dict[str, Callable[[tasks.Task], timing.Measure]] = {
    "plain": ours.called(),
    "donate": ours.called(lm.donate),
    "clip": ours.called(lambda: lm.clip(tasks.NO_BOUND), lm.donate),
    "guard": ours.called(lm.guard, lambda: lm.clip(tasks.NO_BOUND), lm.donate),
    "ema": ours.called(lambda: lm.ema(0.999), lm.donate),
    "accumulate": ours.called(lm.donate, lambda: lm.accumulate(2)),
    "precision": ours.called(lm.donate, lambda: lm.precision("bf16")),
    "replay": ours.called(lambda: lm.compile(backend="eager")),
    "replay-donate": ours.called(lambda: lm.compile(backend="eager"), lm.donate),
    "runner-donate": ours.driven(lm.donate),
    "compile-donate": ours.called(lm.compile, lm.donate),
    "runner-nothing": lambda _task: _nothing,
    # Without a bar, which is drawn by the time, and without checkpoints, whose threads wait for the disk.
    "fit": fit.counted(fit.driven(progress=False, saves=False)),
}
# Those of benchmarks.stacks, such as "job-4" and, with the raw loop, "job-4-by-hand".
STACKS = {variant.name: (case.rows, variant.build) for case in stacks.cases("mlp") for variant in case.variants()}
WARM_UP = 3  # steps, after which every cache of Lumen's is filled
DEFAULT = tuple(case for case in CASES if case not in ("compile-donate", "fit"))  # which take minutes


def _measure(case: str, task: tasks.Task) -> timing.Measure:
    if case in CASES:
        return CASES[case](task)
    rows, build = STACKS[case]
    return build(stacks.with_rows(task, rows))


def _nothing(steps: int) -> float:
    """A step of `Runner.fit` over a step that does next to nothing, with a sink."""
    with tempfile.TemporaryDirectory() as folder:
        return runner.runner(max(steps, 2 * runner.LOG_EVERY), Path(folder))


def serve(root: str, task_name: str, count: str, *cases: str) -> None:
    """Answer each line of standard input, about one of `cases`."""
    if Path(root) not in Path(lm.__file__).parents:
        raise RuntimeError(f"lumen was imported from {lm.__file__}, which is not in {root}")
    timing.prepare(1)
    task = tasks.make(task_name)
    measures = {case: _measure(case, task) for case in cases}
    clock: Callable[[], Any] = time.process_time
    if count == "instructions":
        timing.WARM_UP = WARM_UP  # each counted step takes a while, and nothing depends on the machine's caches
        for measure in measures.values():  # what is traced or compiled, before counting slows it down
            measure(1)
        clock = instructions.Counter()
    for module in (timing, runner):
        module.time = types.SimpleNamespace(perf_counter=clock)  # type: ignore[attr-defined]
    with timing.collected():
        for line in sys.stdin:
            case, steps = line.split()
            sys.stdout.write("=" + json.dumps(measures[case](int(steps) or task.steps)) + "\n")
            sys.stdout.flush()
