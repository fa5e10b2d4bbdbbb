"""Signals that end a run: after the first it finishes its step and saves, the second ends it at once."""

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

# EX_TEMPFAIL of BSD's sysexits.h: nothing is wrong, try again later. It differs from 130 and 143, the codes of a
# process that was killed by a signal, so a scheduler can distinguish a run that saved from one that did not.
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds within which torchrun passes a signal on


class Interrupted(SystemExit):
    """A signal ended the run, which finished its step, and saved if it has a checkpointer.

    `result` is the run's `lm.Result` so far. A script that does not catch this exits with code 75 (`EX_TEMPFAIL`);
    started again with `resume="auto"`, it continues.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(EXIT_CODE)
        self.result = result

    def __str__(self) -> str:
        return str(self.result.reason)


class Signals:
    """While it listens, the first SIGTERM or SIGINT is stored in `received` and calls `wake`; the second acts as usual.

    Python lets only the main thread handle signals; in other threads this does nothing. Under torchrun a signal within
    two seconds of another is the same one: Ctrl-C reaches its processes from the terminal, and again from torchrun.
    """

    def __init__(self, rank: int = 0) -> None:
        self.received: str | None = None
        self._wake: Callable[[], None] = _ignore
        self._prefix = f"[rank {rank}] " if rank else ""
        self._since = 0.0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self, wake: Callable[[], None]) -> Iterator[None]:
        """Handle signals in the block. Afterwards `wake` is dropped: it refers to the run, which refers to this."""
        self._wake = wake
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    if signal.getsignal(number) not in (signal.SIG_IGN, None):
                        self._previous[number] = signal.signal(number, self._handle)
            yield
        finally:
            self._restore()
            self._wake = _ignore

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
        # Not print, since a handler may run in the middle of another write to the same stream.
        os.write(2, f"{self._prefix}{self.received}: ending after this step. Send it again to end at once.\n".encode())
        self._wake()

    def _handle_in_child(self, number: int) -> None:
        """Handle a signal in a forked process, which has inherited this handler.

        Ctrl-C reaches all processes at once. Loader workers must survive it, as the last step may wait for their batch;
        they end with their parent.
        """
        if number == signal.SIGTERM:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _ignore() -> None:
    """The default of `wake`."""


def interactive() -> bool:
    """Whether this is a prompt or a notebook, where an interrupted run returns its result."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
