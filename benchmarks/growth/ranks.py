"""Steps under ddp on several processes of this machine, each with 8 rows."""

from __future__ import annotations

import time
from typing import NamedTuple

import lumen as lm
from benchmarks import peak, spread, tasks

STEPS = 16


class Cost(NamedTuple):
    """What a step costs rank 0."""

    seconds: float  # of processor time
    bytes: float  # of resident memory, above what was resident before the state was made


def cost(size: int, steps: int = STEPS) -> Cost:
    """The cost of a step in a new world of `size` processes."""
    return spread.world_of(size, _measured, steps)


def _measured(steps: int) -> Cost:
    task = tasks.make("gpt-small")
    data = spread.batches_of(task, steps)
    peak.settle()
    before = peak.resident("VmRSS")
    loop = spread.lumen(lm.ddp)(task)
    loop(data)
    began = time.process_time()
    loop(data)
    seconds = (time.process_time() - began) / steps
    return Cost(seconds, peak.resident("VmHWM") - before)
