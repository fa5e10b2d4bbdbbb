"""How long this process is blocked in collectives: the time that it waits for ranks that are slower than itself.

It is the host's time. Gloo's collectives block the host until their result is there; those of NCCL block only the
device's stream, and collectives inside a compiled graph are waited for there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class WaitTime:
    """The `seconds` for which this process was blocked, on the clock `time_fn`, which a run replaces by its own."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.time_fn: Callable[[], float] = time.monotonic

    def wait(self, work: Any) -> None:
        """Wait for the `Work` of a collective."""
        time_fn = self.time_fn
        began = time_fn()
        work.wait()
        self.seconds += time_fn() - began


WAIT_TIME = WaitTime()
"""The waiting of this process, in all of its groups."""


class StepTime:
    """This rank's own time in its steps: without the time in which it is blocked in collectives.

    >>> now = iter([0.0, 3.0])
    >>> step_time = StepTime(lambda: next(now))
    >>> step_time.begin()
    >>> WAIT_TIME.seconds += 2.0  # it waits for another rank
    >>> step_time.end()
    >>> step_time.seconds
    1.0
    """

    def __init__(self, time_fn: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._time_fn = time_fn
        self._began = self._waited = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = self._time_fn(), WAIT_TIME.seconds

    def end(self) -> None:
        """The step has ended."""
        self.seconds += self._time_fn() - self._began - (WAIT_TIME.seconds - self._waited)
