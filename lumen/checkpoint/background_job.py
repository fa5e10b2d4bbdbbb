"""A function that runs in a thread, one at a time, and that a process finishes before it exits."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable


class BackgroundJob:
    """Runs one function at a time in a thread and keeps the exception that it raises.

    It waits for an event, not for the thread: after an interrupted `Thread.join`, Python 3.11 believes that the thread
    has ended.
    """

    def __init__(self) -> None:
        self.label = ""
        self.failed = False
        self._process = 0
        self._done = threading.Event()
        self._done.set()
        self._error: BaseException | None = None

    def start(self, run: Callable[[], None], label: str) -> None:
        """Start `run` in a new thread; `label` describes it in messages."""
        self.label = label
        self._process = os.getpid()
        self._error, self.failed = None, False
        self._done = threading.Event()
        thread = threading.Thread(target=self._run, args=(run,), name=f"lumen checkpoint {label}", daemon=False)
        _unfinished.add(self)
        _wait_at_exit()
        thread.start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self._error, self.failed = error, True
        finally:
            self._done.set()

    def running(self) -> bool:
        """Whether the function is still running; False in a forked child, which has no such thread."""
        return self._process == os.getpid() and not self._done.is_set()

    def join(self) -> None:
        """Wait until the function has returned or raised."""
        if self.running():
            self._done.wait()

    def failure(self) -> BaseException | None:
        """The exception that the function raised; later calls return None."""
        if self.running():
            return None
        _unfinished.discard(self)
        error, self._error = self._error, None
        return error


_unfinished: weakref.WeakSet[BackgroundJob] = weakref.WeakSet()
_registered: set[int] = set()


def _wait_at_exit() -> None:
    """Make a process that exits finish its job first.

    Python waits for the thread too. But before that, and long before `atexit`, it forbids new work in thread pools,
    which Orbax uses. Callbacks registered here run in reverse order, so before the one of `concurrent.futures`.
    """
    if os.getpid() not in _registered:
        _registered.add(os.getpid())
        threading._register_atexit(_finish_jobs, os.getpid())  # type: ignore[attr-defined]


def _finish_jobs(process: int) -> None:
    if process == os.getpid():
        for job in list(_unfinished):
            job.join()
            error = job.failure()
            if error is not None:
                _report(error)


def _report(error: BaseException) -> None:
    """Print an exception that no caller is left to catch."""
    threading.excepthook(
        threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
    )
