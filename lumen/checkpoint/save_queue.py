"""The saves of a store that have begun and not ended: the newest may wait for the upload of the one before it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from lumen.checkpoint.background_job import BackgroundJob
from lumen.errors import CheckpointError


class QueuedSave:
    """A save in a thread. `previous` is one whose upload comes first."""

    def __init__(self, step: int, metrics: dict[str, float], previous: QueuedSave | None) -> None:
        self.step, self.metrics = step, metrics
        self.job = BackgroundJob()
        self._previous = previous
        self._copied = threading.Event()

    def start(self, write: Callable[[], None]) -> None:
        """Start `write` in a thread."""

        def run() -> None:
            try:
                write()
            finally:
                self._previous = None
                self._copied.set()

        self.job.start(run, f"step {self.step}")

    def await_turn(self, path: Path) -> None:
        """In the thread, when the checkpoint is on the local disk at `path`: wait until the previous save has ended.

        Raises `CheckpointError` if that failed: the store is then given up, and each checkpoint is kept.
        """
        self._copied.set()
        if self._previous is None:
            return
        self._previous.job.join()
        if self._previous.job.failed:
            raise CheckpointError(
                f"it was not uploaded after the failure of {self._previous.job.label}. Nothing is lost: the checkpoint"
                f" is in {path}"
            )

    def await_copy(self) -> None:
        """Wait until the copy in host memory is no longer needed."""
        if self.job.running():
            self._copied.wait()


class SaveQueue:
    """At most `depth` saves at a time, which end in the order in which they began."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._saves: list[QueuedSave] = []

    def make_room(self, step: int) -> None:
        """Wait until a save of `step` can begin, and the memory of the copy is free."""
        if any(save.step == step for save in self._saves):
            self.join()
        while len(running := self._running()) >= self.depth:
            running[0].job.join()
        for save in running:
            save.await_copy()

    def add(self, step: int, metrics: dict[str, float]) -> QueuedSave:
        """A new save, to be started."""
        self._saves.append(QueuedSave(step, metrics, next(reversed(self._running()), None)))
        return self._saves[-1]

    def join(self) -> None:
        """Wait until all saves have ended."""
        for save in self._saves:
            save.job.join()

    def running(self) -> bool:
        """Whether a save has not ended."""
        return bool(self._running())

    def metrics(self) -> dict[int, dict[str, float]]:
        """The metrics of the saves since the last call of `failures`, and of those that were running then, by step."""
        return {save.step: save.metrics for save in self._saves}

    def failures(self) -> list[tuple[str, BaseException]]:
        """The label and the error of each save that has failed, once; forgets the saves that have ended."""
        ended = [save for save in self._saves if not save.job.running()]
        self._saves = [save for save in self._saves if save not in ended]
        errors = [(save.job.label, save.job.failure()) for save in ended]
        return [(label, error) for label, error in errors if error is not None]

    def _running(self) -> list[QueuedSave]:
        return [save for save in self._saves if save.job.running()]
