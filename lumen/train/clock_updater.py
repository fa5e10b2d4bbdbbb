"""`ClockUpdater`: reads the time, and counts rows and tokens, for the clock of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lumen.train.batch_size import TokenCount, count_rows
from lumen.train.clock import Clock
from lumen.train.distributed import ProcessGroupContext


class ClockUpdater:
    """Keeps `clock`; under several ranks its time is that of the first, and its counts are sums over all.

    With `exact_tokens`, counts are summed after each step: all ranks must find at the same step that there were enough.
    """

    def __init__(
        self,
        clock: Clock,
        group: ProcessGroupContext,
        time_fn: Callable[[], float],
        count_tokens: TokenCount | None,
        exact_tokens: bool,
    ) -> None:
        self._clock = clock
        self._group = group
        self._time_fn = time_fn
        self._count_tokens = count_tokens
        self._exact_tokens = exact_tokens
        self._uncounted = [0, 0]  # rows and tokens of this rank that the clock does not have yet
        self._began = time_fn()

    def resume(self) -> None:
        """Continue from the seconds that the clock has."""
        self._began = self._time_fn() - self._clock.seconds

    def seconds(self) -> float:
        """How long the run takes so far, by this rank's own clock."""
        return self._time_fn() - self._began

    def count_batch(self, batch: Any, steps: int) -> None:
        """Count what was in a batch; under several ranks it comes to the clock when they synchronize anyway."""
        rows, count_tokens = count_rows(batch, steps > 1), self._count_tokens
        tokens = count_tokens(batch) if count_tokens is not None else 0
        if self._group.size == 1:
            self._clock.rows += rows
            self._clock.tokens += tokens
            return
        self._uncounted = [self._uncounted[0] + rows, self._uncounted[1] + tokens]
        if self._exact_tokens:
            self.read()

    def read(self) -> None:
        """Set the time; under several ranks that of the first, so that all find the same things due."""
        clock = self._clock
        clock.seconds = self._time_fn() - self._began
        if self._group.size > 1:
            clock.seconds, (rows, tokens) = self._group.reduce_clock(clock.seconds, self._uncounted)
            clock.rows += rows
            clock.tokens += tokens
            self._uncounted = [0, 0]

    def read_on_all_ranks(self) -> None:
        """The same, where there are several; alone, the time was read after the step."""
        if self._group.size > 1:
            self.read()
