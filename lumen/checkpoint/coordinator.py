"""Coordination of the processes that write one checkpoint together.

They exchange messages through keys of the world's store, not through collectives, because a save runs in a thread
beside the collectives of the run. Every process waits for rank 0, and rank 0 for all others. A process that fails
publishes its error; rank 0 publishes one for a process that gives no sign of life. Then all raise that error.
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
_GRACE = 5.0  # the same, after the run has failed
_FIRST_PAUSE = 0.002
_MAX_SESSIONS = 3  # a process may still have to finish the save before the current one
_MAX_QUERIES = 1000  # that all processes together send to the store, per second

_coordinators = itertools.count()  # equal on all processes, because all make the same saves


class SaveCoordinator:
    """The processes that save together; makes a `SaveSession` for each save."""

    def __init__(self, timeout: float) -> None:
        self._prefix = f"lumen/checkpoint/{next(_coordinators)}"
        self._timeout = timeout
        self._count = 0
        self._sessions: list[SaveSession] = []

    def next(self) -> SaveSession:
        """The session of the next save; deletes the keys of the third save before it, which all have finished."""
        self._sessions.append(SaveSession(f"{self._prefix}/{self._count}", self._timeout))
        self._count += 1
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.pop(0).delete_keys()
        return self._sessions[-1]

    def shorten_timeout(self) -> None:
        """Wait only briefly for other processes from now on, because the run has failed."""
        for session in self._sessions:
            session.shorten_timeout()


class SaveSession:
    """The messages of one save. `rank` is this process's, of `size`; `is_main` is true on rank 0."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.rank, self.size = distributed.rank(), distributed.world_size()
        self.is_main = self.rank == 0
        self._store = distributed.store(prefix)
        self._timeout = timeout
        self._interval = max(0.05, self.size / _MAX_QUERIES)
        self._published: list[str] = []
        self._heartbeats, self._last_heartbeat = 0, 0.0

    def publish(self, event: str, value: Any = None) -> None:
        """Publish the value of an event, once, for rank 0 or for all others."""
        self._published.append(f"{event}/{self.rank}")
        self._store.set(self._published[-1], json.dumps(value))

    def await_(self, event: str, rank: int = 0) -> Any:
        """Wait for the value that a rank publishes; raises `CheckpointError` if a process fails or that rank hangs."""
        key, pause = f"{event}/{rank}", _FIRST_PAUSE
        last, since = "", time.monotonic()
        while not self._store.check([key]):
            self.check()
            current = self._heartbeat_of(rank)
            if current != last:
                last, since = current, time.monotonic()
                self.heartbeat()
            elif time.monotonic() - since > self._patience():
                raise CheckpointError(
                    f"rank {rank} hangs or has exited: it gave no sign of life for {self._patience():g} s while it was"
                    f" {_ACTIVITIES[event]}"
                )
            time.sleep(pause)
            pause = min(2 * pause, self._interval)
        self.heartbeat()
        return json.loads(self._store.get(key))

    def await_all(self, event: str) -> list[Any]:
        """The values of all other processes, by rank from 1 up; for rank 0."""
        return [self.await_(event, rank) for rank in range(1, self.size)]

    def finish(self) -> None:
        """Return when the save is complete; rank 0 calls this last, and waits briefly until all others know."""
        if not self.is_main:
            self.await_("committed")
            self.publish("over")
            return
        self.publish("committed")
        self.shorten_timeout()
        with contextlib.suppress(CheckpointError):  # the checkpoint is complete, whatever happens to the others now
            self.await_all("over")

    def heartbeat(self) -> None:
        """Publish that this process is alive; costs nothing just after the last heartbeat."""
        now = time.monotonic()
        if now - self._last_heartbeat > min(1.0, self._timeout / 4):
            self._heartbeats, self._last_heartbeat = self._heartbeats + 1, now
            self._store.set(f"at/{self.rank}", str(self._heartbeats))

    def check(self) -> None:
        """Raise `CheckpointError` if another process has failed."""
        if self._store.check(["failed"]):
            raise CheckpointError(self._store.get("failed").decode())

    @contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """Publish an exception that is raised inside; if another process failed first, raise its error instead."""
        try:
            yield
        except BaseException as error:
            first = self._publish_failure(error)
            if not self.is_main:
                with contextlib.suppress(RuntimeError):  # torch's errors of a store that no longer exists
                    self.publish("over")
            if first is None:
                raise
            raise CheckpointError(first) from error

    def abort(self, error: BaseException) -> None:
        """On rank 0: publish `error`, and wait briefly until the other processes have stopped writing."""
        self._publish_failure(error)
        keys = [f"over/{rank}" for rank in range(1, self.size)]
        until = time.monotonic() + min(self._timeout, _GRACE)
        while time.monotonic() < until and not all(self._store.check([key]) for key in keys):
            time.sleep(self._interval / 2)

    def _publish_failure(self, error: BaseException) -> str | None:
        """Publish `error` unless another process failed first; returns that process's message, or None."""
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        message = text if text.startswith("rank ") else f"rank {self.rank}: {text}"
        try:
            first = self._store.compare_set("failed", "", message).decode()
        except RuntimeError:
            return "rank 0 is gone, and with it the store that connects the ranks" if _is_store_error(error) else None
        return None if first == message else first

    def shorten_timeout(self) -> None:
        """Wait only briefly for other processes from now on."""
        self._timeout = min(self._timeout, _GRACE)

    def delete_keys(self) -> None:
        """Delete what this process published; no process reads it any more."""
        for key in [*self._published, f"at/{self.rank}", *(["failed"] if self.is_main else [])]:
            self._store.delete_key(key)

    def _heartbeat_of(self, rank: int) -> str:
        key = f"at/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _patience(self) -> float:
        # Rank 0 publishes nothing while it waits for a process that hangs, and must be the first to report that one.
        return self._timeout if self.is_main else 2 * self._timeout


_ACTIVITIES = {
    "layout": "expected to join the save",
    "plan": "planning the save",
    "fragments": "writing its shards",
    "all fragments": "waiting for the shards of others",
    "shards": "writing its shards",
    "staged": "writing the checkpoint to its disk",
    "uploaded": "uploading its shards",
    "committed": "completing the checkpoint",
    "over": "finishing the save",
}


def _is_store_error(error: BaseException) -> bool:
    return type(error).__name__.startswith("Dist") and isinstance(error, RuntimeError)
