"""`RankMonitor`: what the ranks of one run tell each other outside of collectives.

A collective cannot report that a rank will never reach it. So each rank has a daemon thread, which writes the rank's
progress to the store of the world and reads that of the others. A step costs two assignments.

The monitor answers three questions, none of which may cost a collective in each step:

- *Has a rank failed?* The first error is written to the store. A rank that is blocked in a collective cannot be woken
  (Gloo has no way to), so its thread ends the process if it does not end by itself.
- *Which rank hangs, or has died?* The ranks that gave up waiting say so. The others are named, with their last step.
- *After which step do all ranks synchronize?* Any rank may request it. Each thread answers with the step that its rank
  has begun, and from then on the rank checks after each step. All ranks synchronize after the largest answer: no rank
  has begun a later step, and no rank is blocked before it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from lumen.errors import BatchError, WorldError
from lumen.parallel.comm.hang_dump import HangDump
from lumen.parallel.comm.process_groups import close_on_leave

GRACE = 5.0  # seconds that a process has to end by itself after another rank failed
SILENCE = 30.0  # seconds of waiting after which missing ranks are checked for heartbeats
_STORES = 1000  # requests per second that all ranks together may send to the store
_SHORT = 0.005


class _RankStore:
    """The keys of one run in the store: for each key a value of each rank, heartbeats, and the first failure."""

    def __init__(self, store: Store, rank: int, size: int, hang_dump: HangDump | None) -> None:
        self.store, self._rank, self._size, self._hang_dump = store, rank, size, hang_dump
        self.interval = max(0.1, size / _STORES)

    def post(self, key: str, value: int) -> None:
        """Write this rank's value."""
        self.store.set(f"{key}/{self._rank}", str(value))
        self.store.add(f"{key}/count", 1)

    def all_posted(self, key: str) -> bool:
        """Whether every rank has written a value."""
        return self.store.add(f"{key}/count", 0) >= self._size

    def posted(self, key: str) -> Sequence[int]:
        """The values of all ranks."""
        return [int(value) for value in self.store.multi_get([f"{key}/{rank}" for rank in range(self._size)])]

    def missing(self, key: str) -> list[int]:
        """The ranks that have written no value."""
        return [rank for rank in range(self._size) if not self.store.check([f"{key}/{rank}"])]

    def heartbeat(self, rank: int) -> tuple[int, int, int]:
        """The last heartbeat of a rank: the step it has begun, the step it is making, and the number of heartbeats."""
        if not self.store.check([f"beat/{rank}"]):
            return 0, 0, 0
        begun, working, beats = map(int, self.store.get(f"beat/{rank}").split())
        return begun, working, beats

    def is_alive(self, rank: int) -> bool:
        """Whether a rank sends another heartbeat in the next moments."""
        before = self.heartbeat(rank)
        return _wait_for(lambda: self.heartbeat(rank) != before, 10 * self.interval)

    def publish_failure(self, rank: int, text: str) -> None:
        """Write the failure of a rank, unless there is one already."""
        self.store.compare_set("failure", "", f"{rank} {text}")

    def failure(self, step: int) -> tuple[int, str] | None:
        """The first failure, if there is one; if a rank hangs, this one writes its state first, with its `step`."""
        if not self.store.check(["failure"]):
            return None
        rank, _, text = self.store.get("failure").decode().partition(" ")
        if self._hang_dump is not None and self.store.check(["hangs"]):
            self._hang_dump.write(step)
        self.store.add("known", 1)
        return int(rank), text

    def silence(self, rank: int) -> str:
        """What to say of a rank that sends no heartbeats. Each rank that hears of it writes its state."""
        self.store.set("hangs", "1")
        return f"rank {rank} stopped sending heartbeats after it began step {self.heartbeat(rank)[0]}.{self._advice()}"

    def hang(self, rank: int) -> str:
        """What to say of a rank that the others waited for in vain."""
        silence = self.silence(rank)
        if not self.is_alive(rank):
            return silence
        step = self.heartbeat(rank)[0]
        return f"rank {rank} hangs in step {step}: the others waited for it in a collective.{self._advice()}"

    def _advice(self) -> str:
        return "" if self._hang_dump is None else self._hang_dump.advice

    def forget(self, number: int) -> None:
        """Delete the keys of a synchronization that all ranks have left, as they answer the next one."""
        if number >= 0:
            ranks = [f"{number}/at/{rank}" for rank in range(self._size)]
            for key in (*ranks, f"{number}/at/count", f"{number}/step", f"{number}/called"):
                self.store.delete_key(key)

    def release(self) -> None:
        """Use the store no more; rank 0, whose process may own it, waits a while until no rank does.

        Without torchrun, whose agent owns the store, the store ends with rank 0. A rank that has not yet read that all
        ranks have finished would take that for a failure.
        """
        try:
            self.store.add("parted", 1)
            if self._rank == 0:
                _wait_for(lambda: self.store.add("parted", 0) >= self._size, GRACE)
        except RuntimeError:  # it has ended already, and no rank waits for an answer
            return


class RankMonitor:
    """This rank's monitor; the run writes `begun` and `working`, and the thread reads them."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        leave: Callable[[int], object] = os._exit,
        hang_dump: HangDump | None = None,
    ) -> None:
        self.begun = 0  # the last step that the run may be making
        self.working = 0  # the step that the run is making, 0 between two
        self.sync_pending = False  # whether a rank has requested that all synchronize
        self.failure: tuple[int, str] | None = None
        # A connection of its own: its waits must not block those of the run.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._ranks = _RankStore(self._store, rank, size, hang_dump)
        self._rank, self._size, self._leave = rank, size, leave
        self._sync_requested = False
        self._failed_itself = False
        self._released = False
        self._round = 0
        self._sync_step: int | None = None
        self._beats = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ended = threading.Event()
        self._owner = 0
        self._thread = threading.Thread(target=self._run, name="lumen ranks", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._owner = os.getpid()
        self._thread.start()
        close_on_leave(self)

    def close(self) -> None:
        """End the run on this rank; the thread ends too, unless the store does not answer it."""
        self._closed.set()
        if self._owner == os.getpid():  # a fork has no thread
            self._ended.wait(GRACE)  # after an interrupted `Thread.join` the thread counts as ended (Python 3.11)
            self._thread.join(GRACE)
            if self.failure is None and not self._failed_itself and not self._released:
                self._released = True
                self._ranks.release()

    def call(self) -> None:
        """Request that all ranks synchronize; also from a signal handler."""
        self._sync_requested = True

    def should_sync(self, step: int) -> bool:
        """Whether all ranks synchronize now, after `step`. Called between any two steps, before the next one begins."""
        self.begun = step + 1  # before reading `sync_pending`; the thread does both in reverse order
        return self.sync_pending and self._await_sync(step)

    def _await_sync(self, step: int) -> bool:
        began = time.monotonic()
        while self._sync_step is None:
            self.check()
            self._check_patience(began, f"{self._round}/at")
            time.sleep(_SHORT)
        self.check()
        if step < self._sync_step:
            return False
        with self._lock:
            # Requests up to here are answered by this synchronization.
            self.sync_pending, self._sync_step, self._sync_requested = False, None, False
            self._round += 1
        return True

    def _answer_call(self) -> None:
        """Answer a request, in the thread."""
        with self._lock:
            number, store = self._round, self._store
            if self._sync_step is not None:
                return
            if not self.sync_pending:
                if self._sync_requested:
                    self._sync_requested = False
                    store.set(f"{number}/called", "1")
                if not store.check([f"{number}/called"]):
                    return
                self.sync_pending = True
                self._ranks.post(f"{number}/at", self.begun)
            if self._rank == 0 and self._ranks.all_posted(f"{number}/at"):
                store.set(f"{number}/step", str(max(self._ranks.posted(f"{number}/at"))))
                self._ranks.forget(number - 1)
            if store.check([f"{number}/step"]):
                self._sync_step = int(store.get(f"{number}/step"))

    def agree(self, what: str, number: int, step: int | None = None) -> None:
        """Wait until all ranks have called this, for the `number`th time for `what`.

        With `step`, all must call it after the same step: raises `BatchError` where another rank makes a later step, or
        has called it after another one.
        """
        key = f"{what}/{number}"
        self._ranks.post(key, step or 0)
        began, pause = time.monotonic(), _SHORT
        while not self._ranks.all_posted(key):
            self.check()
            if step is not None:
                for rank in self._ranks.missing(key):
                    if self._ranks.heartbeat(rank)[1] > step:
                        raise _uneven(self._rank, step, rank)
            self._check_patience(began, key)
            time.sleep(pause)
            pause = min(2 * pause, self._ranks.interval)
        steps = self._ranks.posted(key)
        if step is not None and len(set(steps)) > 1:
            raise _uneven(self._rank, step, steps.index(next(other for other in steps if other != step)))

    def _check_patience(self, began: float, key: str) -> None:
        """Raise `WorldError` where a rank that is waited for has stopped sending heartbeats."""
        if time.monotonic() - began < SILENCE:
            return
        for rank in self._ranks.missing(key):
            if not self._ranks.is_alive(rank):
                raise WorldError(self._ranks.silence(rank))

    def check(self) -> None:
        """Raise `WorldError` where another rank has failed."""
        if self.failure is not None:
            raise self.error()

    def error(self) -> WorldError:
        """The first failure, as the other ranks raise it."""
        assert self.failure is not None
        return WorldError(self.failure[1])

    def fail(self, text: str) -> None:
        """Publish that this rank failed, unless one has before; waits a moment until the others have read it."""
        self._failed_itself = True
        self._publish(self._rank, f"rank {self._rank} failed {text}")
        _wait_for(lambda: self._store.add("known", 0) >= self._size - 1, GRACE / 2)

    def explain(self, error: BaseException) -> WorldError | None:
        """The failure of another rank that caused an error of this rank, if there is one."""
        try:
            if is_collective_error(error):
                return self._cause()
        except RuntimeError:  # the store ended with the process that owned it
            return WorldError("rank 0 is gone, and with it the store of this run.")
        if self.failure is None:
            return None
        return error if isinstance(error, WorldError) else self.error()

    def _cause(self) -> WorldError | None:
        """Why a collective broke: a rank failed, or did not reach it."""
        self._ranks.post("gave up", self.begun)  # at once: torchrun may end this process soon
        if _wait_for(lambda: self._failed() is not None, GRACE / 2):
            return self.error()
        _wait_for(lambda: self._ranks.all_posted("gave up") or self._failed() is not None, GRACE)
        for rank in self._ranks.missing("gave up"):
            if self._failed() is None:
                self._publish(rank, self._ranks.hang(rank))
        return self.error() if self._failed() is not None else None

    def _publish(self, rank: int, text: str) -> None:
        self._ranks.publish_failure(rank, text)
        self._failed()

    def _failed(self) -> tuple[int, str] | None:
        if self.failure is None:
            self.failure = self._ranks.failure(self.begun)
        return self.failure

    def _end_process(self) -> None:
        """After a failure of another rank: let the run notice, and end this process if it does not."""
        self.sync_pending = True
        if self.failure is None or self._failed_itself or self._closed.wait(GRACE):
            return
        # Not print: the run may hold the stream's lock.
        text = f"[rank {self._rank}] {self.failure[1]}\nThis process is blocked in its step, and is ended.\n"
        os.write(2, text.encode())
        sys.stdout.flush()
        self._leave(1)

    def _run(self) -> None:
        try:
            while True:
                closing = self._closed.wait(
                    _SHORT if self.sync_pending and self._size < _STORES / 10 else self._ranks.interval
                )
                self._beats += 1
                self._store.set(f"beat/{self._rank}", f"{self.begun} {self.working} {self._beats}")
                self._answer_call()  # also when closing: other ranks may wait for the answer
                if closing:
                    return
                if self._failed() is not None:
                    self._end_process()
                    return
        except RuntimeError as error:  # the store has ended
            self.failure = self.failure or (0, f"rank 0 is gone, and with it the store of this world ({error}).")
            if not self._closed.is_set():
                self._end_process()
        finally:
            self._ended.set()


def _uneven(rank: int, step: int, other: int) -> BatchError:
    return BatchError(
        f"the data of rank {rank} ended after step {step}, and that of rank {other} did not: all ranks must have the"
        " same number of batches. An lm.Loader splits each global batch evenly. With other data give limit=, the number"
        " of batches of the shortest rank."
    )


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (done := bool(condition())) and time.monotonic() < until:
        time.sleep(_SHORT * 4)
    return done


def is_collective_error(error: BaseException) -> bool:
    """Whether an error is that of a collective, which the failure of another rank may have caused."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection closed by"))
