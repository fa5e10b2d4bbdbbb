"""What the processes that write one checkpoint tell each other.

They talk through keys of the store of their world, and not by collectives: this happens in threads, beside the
collectives of a run. All listen to the first process, and the first one to all. Whoever fails says so, and so does the
first process of one from which it hears nothing any more; then all fail with that error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lumen.core import distributed
from lumen.errors import CheckpointError

TIMEOUT = 600.0  # seconds without a sign of life after which a process counts as hung
_GRACE = 5.0  # that many, where the run has failed already
_SHORT = 0.002
_KEPT = 3  # a save before the one that is being written may still be left by others
_STORES = 1000  # how often per second all processes together may ask the store

_meetings = itertools.count()  # the same in each process, as all make the same saves


class SaveCoordinator:
    """The processes that come together for one save after another."""

    def __init__(self, timeout: float) -> None:
        self._prefix = f"lumen/checkpoint/{next(_meetings)}"
        self._timeout = timeout
        self._count = 0
        self._talks: list[SaveSession] = []

    def next(self) -> SaveSession:
        """For the next save; what was said for the third before it is forgotten, as all have left that one."""
        self._talks.append(SaveSession(f"{self._prefix}/{self._count}", self._timeout))
        self._count += 1
        if len(self._talks) > _KEPT:
            self._talks.pop(0).forget()
        return self._talks[-1]

    def hurry(self) -> None:
        """The run has failed: wait for no one for long."""
        for talk in self._talks:
            talk.hurry()


class SaveSession:
    """What is said for one save. `rank` is this process, of `size`."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.rank, self.size = distributed.rank(), distributed.world_size()
        self.first = self.rank == 0
        self._store = distributed.store(prefix)
        self._timeout = timeout
        self._interval = max(0.05, self.size / _STORES)
        self._said: list[str] = []
        self._beats, self._beaten = 0, 0.0

    def publish(self, what: str, value: Any = None) -> None:
        """Tell the others, or the first process, once."""
        self._said.append(f"{what}/{self.rank}")
        self._store.set(self._said[-1], json.dumps(value))

    def await_(self, what: str, rank: int = 0) -> Any:
        """What a process says, when it does; raises `CheckpointError` where one has failed, or is silent too long."""
        key, pause = f"{what}/{rank}", _SHORT
        heard, since = "", time.monotonic()
        while not self._store.check([key]):
            self.check()
            beat = self._beat_of(rank)
            if beat != heard:
                heard, since = beat, time.monotonic()
                self.beat()
            elif time.monotonic() - since > self._patience():
                raise CheckpointError(
                    f"rank {rank} hangs, or is gone: for {self._patience():g} s nothing was heard of its part"
                    f" ({_WORDS[what]})."
                )
            time.sleep(pause)
            pause = min(2 * pause, self._interval)
        self.beat()
        return json.loads(self._store.get(key))

    def hear_all(self, what: str) -> list[Any]:
        """What each of the others says, by rank from 1 up; for the first process."""
        return [self.await_(what, rank) for rank in range(1, self.size)]

    def finish(self) -> None:
        """Return when all is done: the first process comes here last, and then waits a moment until all know."""
        if not self.first:
            self.await_("committed")
            self.publish("over")
            return
        self.publish("committed")
        self.hurry()
        with contextlib.suppress(CheckpointError):  # the checkpoint is whole, whoever is lost now
            self.hear_all("over")

    def beat(self) -> None:
        """Say that this process is at work; costs nothing when it did so just now."""
        now = time.monotonic()
        if now - self._beaten > min(1.0, self._timeout / 4):
            self._beats, self._beaten = self._beats + 1, now
            self._store.set(f"at/{self.rank}", str(self._beats))

    def check(self) -> None:
        """Raise `CheckpointError` where another process has failed."""
        if self._store.check(["failed"]):
            raise CheckpointError(self._store.get("failed").decode())

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What is raised inside is told to the others; where another one failed first, its error is raised."""
        try:
            yield
        except BaseException as error:
            first = self._failed(error)
            if not self.first:
                with contextlib.suppress(RuntimeError):  # torch's errors of a store that is not there any more
                    self.publish("over")
            if first is None:
                raise
            raise CheckpointError(first) from error

    def break_up(self, error: BaseException) -> None:
        """For the first process: tell the others of `error`, and wait a moment until they have stopped writing."""
        self._failed(error)
        keys = [f"over/{rank}" for rank in range(1, self.size)]
        until = time.monotonic() + min(self._timeout, _GRACE)
        while time.monotonic() < until and not all(self._store.check([key]) for key in keys):
            time.sleep(self._interval / 2)

    def _failed(self, error: BaseException) -> str | None:
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        mine = text if text.startswith("rank ") else f"rank {self.rank}: {text}"
        try:
            first = self._store.compare_set("failed", "", mine).decode()
        except RuntimeError:
            return "rank 0 is gone, and with it the store through which the ranks talk" if _of_store(error) else None
        return None if first == mine else first

    def hurry(self) -> None:
        """Wait for no one for long."""
        self._timeout = min(self._timeout, _GRACE)

    def forget(self) -> None:
        """Take back what was said: nobody listens any more."""
        for key in [*self._said, f"at/{self.rank}", *(["failed"] if self.first else [])]:
            self._store.delete_key(key)

    def _beat_of(self, rank: int) -> str:
        key = f"at/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _patience(self) -> float:
        # The first process is silent while it waits for one that hangs, which it is the one to name.
        return self._timeout if self.first else 2 * self._timeout


_WORDS = {
    "layout": "it did not come to the save",
    "plan": "saying how the parts are to be written",
    "pieces": "writing its pieces",
    "all pieces": "waiting for pieces",
    "parts": "writing its parts",
    "committed": "completing the checkpoint",
    "over": "leaving the save",
}


def _of_store(error: BaseException) -> bool:
    return type(error).__name__.startswith("Dist") and isinstance(error, RuntimeError)
