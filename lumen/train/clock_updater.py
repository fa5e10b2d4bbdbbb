"""`ClockUpdater`: reads the time and counts rows and tokens for the clock of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lumen.train.batch_size import TokenCount, count_rows
from lumen.train.clock import Clock
from lumen.train.distributed import ProcessGroupContext


class ClockUpdater:
    """Updates `clock`. With several ranks its time is that of rank 0, and its counts are sums over all ranks.

    With `exact_tokens` the counts are summed after each step, so that all ranks reach a limit at the same step.
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
        self._uncounted = [0, 0]  # rows and tokens of this rank that the clock does not include yet
        self._began = time_fn()

    def resume(self) -> None:
        """Continue from the seconds of the clock."""
        self._began = self._time_fn() - self._clock.seconds

    def seconds(self) -> float:
        """The running time so far, measured on this rank."""
        return self._time_fn() - self._began

    def count_batch(self, batch: Any, steps: int) -> None:
        """Count a batch. With several ranks the clock gets the sum the next time that they synchronize."""
        rows, count_tokens = count_rows(batch, steps > 1), self._count_tokens
        tokens = count_tokens(batch) if count_tokens is not None else 0
        if self._group.size == 1:
            self._clock.rows += rows
            self._clock.tokens += tokens
            return
        self._uncounted = [self._uncounted[0] + rows, self._uncounted[1] + tokens]
        if self._exact_tokens:
            self.read()

    def read(self, own: Sequence[float] = ()) -> list[tuple[float, ...]]:
        """Read the time. With several ranks it is that of rank 0, so the same things are due on all of them.

        Returns the `own` numbers of all ranks, which are sent along; nothing in a single process.
        """
        clock = self._clock
        by_rank: list[tuple[float, ...]] = []
        clock.seconds = self._time_fn() - self._began
        if self._group.size > 1:
            clock.seconds, (rows, tokens), by_rank = self._group.reduce_clock(clock.seconds, self._uncounted, own)
            clock.rows += rows
            clock.tokens += tokens
            self._uncounted = [0, 0]
        return by_rank

    def discard(self) -> None:
        """Forget what the clock does not include yet: the run has gone back."""
        self._uncounted = [0, 0]

    def read_on_all_ranks(self, own: Sequence[float] = ()) -> list[tuple[float, ...]]:
        """`read` with several ranks; a single process has read the time after its step."""
        return self.read(own) if self._group.size > 1 else []
