"""`Stragglers`: which rank is slowest, and by how much the others have to wait for it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence

from lumen.errors import InexactWarning
from lumen.train.distributed import ProcessGroupContext
from lumen.train.goodput import GoodputRecorder

RATIO = 1.4  # of the slowest rank's time to the median rank's, for a warning
WINDOWS = 3  # in succession, before a warning
WINDOW_SECONDS = 10.0  # of the median rank; shorter windows are added up, as they measure noise


class Stragglers:
    """Compares the ranks' own times: in steps, without waiting in collectives, and waiting for data.

    >>> from lumen.train.goodput import GoodputRecorder
    >>> group = ProcessGroupContext({})
    >>> stragglers = Stragglers(group, GoodputRecorder(lambda: 0.0))
    >>> stragglers.numbers([(1.0, 0.0), (1.0, 2.0), (1.5, 0.0)])
    {'slowest_rank': 1, 'slowest_ratio': 2.0}
    """

    def __init__(self, group: ProcessGroupContext, goodput: GoodputRecorder) -> None:
        self._group = group
        self._goodput = goodput
        self._before = (0.0, 0.0)
        self._window: list[tuple[float, float]] = []
        self._streak = (-1, 0)  # the slowest rank of the last windows, and of how many
        self._warned = -1

    def own_times(self) -> tuple[float, float]:
        """The seconds of this rank in steps and waiting for data, since the last call."""
        now = self._group.step_seconds, self._goodput.data_seconds
        steps, data = now[0] - self._before[0], now[1] - self._before[1]
        self._before = now
        return steps, data

    def numbers(self, times: Sequence[Sequence[float]]) -> dict[str, float]:
        """What is logged of the `own_times` of all ranks: the slowest rank, and its time over the median.

        Of an even number of ranks the lower one counts as the median. Rank 0 warns of a rank that stays behind.
        """
        totals = [steps + data for steps, data in times]
        median = statistics.median_low(totals) if len(totals) > 1 else 0.0
        if median <= 0:
            return {}
        self._judge(times)
        slowest = max(range(len(totals)), key=totals.__getitem__)
        return {"slowest_rank": slowest, "slowest_ratio": totals[slowest] / median}

    def _judge(self, times: Sequence[Sequence[float]]) -> None:
        """Add a window, and warn if the same rank was the slowest for long."""
        window = self._window or [(0.0, 0.0)] * len(times)
        self._window = [(a + c, b + d) for (a, b), (c, d) in zip(window, times, strict=True)]
        totals = [steps + data for steps, data in self._window]
        median = statistics.median_low(totals)
        if median < WINDOW_SECONDS:
            return
        slowest = max(range(len(totals)), key=totals.__getitem__)
        ratio, data = totals[slowest] / median, self._window[slowest][1] / totals[slowest]
        self._window = []
        count = self._streak[1] + 1 if self._streak[0] == slowest else 1
        self._streak = (slowest, count) if ratio >= RATIO else (-1, 0)
        if self._streak[1] >= WINDOWS and self._warned != slowest and self._group.is_main:
            self._warned = slowest
            _warn(slowest, ratio, data)


def _warn(rank: int, ratio: float, data: float) -> None:
    warnings.warn(
        f"rank {rank} has been the slowest rank in the last {WINDOWS} windows, and the others wait for it: its steps"
        f" take {ratio:.1f} times as long as the median rank's, and {data:.0%} of that is waiting for data. Compare its"
        " host and device with the others, and profile it: lm.Profile(...) writes a trace for each rank.",
        InexactWarning,
        stacklevel=2,
    )
