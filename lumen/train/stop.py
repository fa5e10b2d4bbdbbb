"""`StopControl`: whether a run is over, and why: its limit, a signal, a callback, or the end of its data."""

from __future__ import annotations

from lumen.train.clock import Clock, Until
from lumen.train.distributed import ProcessGroupContext
from lumen.train.signals import Signals, interactive


class StopControl:
    """Decides when the run ends, on all ranks after the same step.

    `reason` says why it ends, and `stopped` why a callback ended it, which checkpoints save. `in_sync` says whether all
    ranks reach this point of the loop.
    """

    def __init__(self, until: Until, signals: Signals, group: ProcessGroupContext) -> None:
        self.reason = ""
        self.stopped = ""
        self.in_sync = True
        self.until = until
        self.signals = signals
        self._group = group
        self._request = ""  # the reason of a callback on this rank
        self._agreed_signal: str | None = None

    @property
    def signal(self) -> str | None:
        """The signal that ends the run."""
        return self.signals.received if self._group.size == 1 else self._agreed_signal

    @property
    def is_interrupted(self) -> bool:
        """Whether the run ends because of a signal."""
        return self.reason == self.signal

    @property
    def exits_process(self) -> bool:
        """Whether the signal also ends the process: Ctrl-C at a prompt or in a notebook does not."""
        return self.is_interrupted and not (self.reason == "SIGINT" and interactive())

    def is_over(self, clock: Clock) -> bool:
        """Whether the run ends here."""
        if not self.reason:
            if signal := self.signal:
                self.reason = signal
            elif self.until.reached(clock):
                self.reason = repr(self.until)
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """End the run at the request of a callback."""
        if self._group.size == 1:
            self.reason = self.stopped = self.reason or reason
            return
        self._request = self._request or reason
        if not self.in_sync:
            self._group.request_sync()

    def sync_requests(self) -> None:
        """End the run if a callback on any rank requested it; all ranks call this."""
        request, self._request = self._group.any_rank_value(self._request), ""
        if request:
            self.reason = self.stopped = self.reason or request

    def sync_signals(self) -> None:
        """End the run if any rank received a signal; all ranks call this."""
        self._agreed_signal = self._group.any_rank_value(self.signals.received or "") or None
