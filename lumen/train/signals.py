"""Signals that ask a run to end: the first lets it finish its step and save, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# EX_TEMPFAIL of BSD's sysexits.h: nothing is wrong, try again later. Distinct from 130 and 143, which say that a
# signal killed the process, so that a scheduler can tell a run that saved from one that was cut off.
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds within which torchrun passes a signal on


class Interrupted(SystemExit):
    """A run ended because a signal asked it to; it finished its step, and saved where it had a checkpointer.

    `result` is the run's `lm.Result` so far. A script that does not catch it exits with code 75 (`EX_TEMPFAIL`):
    start it again with `resume="auto"` and it goes on.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(EXIT_CODE)
        self.result = result

    def __str__(self) -> str:
        return str(self.result.reason)


class Signals:
    """While it listens, notes the first SIGTERM or SIGINT in `received` and calls `wake`; the second acts as always.

    Python lets only the main thread handle signals; elsewhere this does nothing. Under torchrun a signal that comes at
    once after another is the same one: Ctrl-C reaches its processes from the terminal, and again from torchrun.
    """

    def __init__(self, rank: int = 0) -> None:
        self.received: str | None = None
        self._wake: Callable[[], None] = _sleep_on
        self._who = f"[rank {rank}] " if rank else ""
        self._since = 0.0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self, wake: Callable[[], None]) -> Iterator[None]:
        """Handle signals meanwhile. `wake` is let go of afterwards: it is the run's, which has these signals."""
        self._wake = wake
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    if signal.getsignal(number) not in (signal.SIG_IGN, None):
                        self._previous[number] = signal.signal(number, self._handle)
            yield
        finally:
            self._restore()
            self._wake = _sleep_on

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._handle_in_child(number)
            return
        if self.received is not None:
            if time.monotonic() - self._since > _ECHO:
                self._restore()
                os.kill(self._owner, number)
            return
        self.received = signal.Signals(number).name
        self._since = time.monotonic()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._restore()
        # Not print: a handler may run in the middle of another write to the same stream.
        os.write(2, f"{self._who}{self.received}: ending after this step. Send it again to end at once.\n".encode())
        self._wake()

    def _handle_in_child(self, number: int) -> None:
        """Processes forked meanwhile have this handler too. Ctrl-C reaches all of them at once: loader workers must
        outlive it, as the step that is to be finished may wait for their batch. They end with their parent."""
        if number == signal.SIGTERM:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _sleep_on() -> None:
    """Whom to wake while nobody listens."""


def interactive() -> bool:
    """Whether somebody sits at a prompt or a notebook, where an interrupted run should give back what it has."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
