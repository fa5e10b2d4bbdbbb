"""`RankMonitor`: what the processes of one run tell each other beside the collectives.

A collective cannot say that somebody will never come to it. So each process has a daemon thread that writes to the
store of the world how far it is, and reads there how the others are. A step costs two assignments for it.

Three questions are answered here, none of which may cost a collective in each step:

- *Did somebody fail?* The first error is written to the store. Whoever is blocked in a collective then cannot be woken
  (Gloo has no way to), so its thread ends the process where it does not end by itself.
- *Who hangs, or is gone?* Those that gave up waiting say so; the others are named, with their last step.
- *After which step do all meet?* Whoever wants a meeting asks for it. Each thread answers with the step that its
  process has begun, and from then on the process looks after each step. The largest answer is the step after which all
  meet: nobody has begun a later one, and everybody comes to it, as no one is held back before.
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
from lumen.parallel.comm.process_groups import close_on_leave

GRACE = 5.0  # seconds in which a process should end by itself after another one failed
SILENCE = 30.0  # seconds without a word after which a process counts as gone
_STORES = 1000  # how often per second all processes together may ask the store
_SHORT = 0.005


class RankMonitor:
    """This process's part; `begun` and `working` are written by the run and read by the thread."""

    def __init__(self, store: Store, rank: int, size: int, leave: Callable[[int], object] = os._exit) -> None:
        self.begun = 0  # the last step that the run may be making
        self.working = 0  # the step that the run is making, 0 between two
        self.asked = False  # a meeting has been called
        self.failure: tuple[int, str] | None = None
        # A connection of its own: its waits must not hold up the run's.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._size, self._leave = rank, size, leave
        self._interval = max(0.1, size / _STORES)
        self._wanted = False
        self._failed_itself = False
        self._parted = False
        self._round = 0
        self._meet_at: int | None = None
        self._beats = 0
        self._turn = threading.Lock()
        self._closed = threading.Event()
        self._ended = threading.Event()
        self._owner = 0
        self._thread = threading.Thread(target=self._run, name="lumen ranks", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._owner = os.getpid()
        self._thread.start()
        close_on_leave(self)

    def close(self) -> None:
        """The run is over here; the thread has ended, unless the store does not answer it."""
        self._closed.set()
        if self._owner == os.getpid():  # a fork has no thread
            self._ended.wait(GRACE)  # an interrupted `Thread.join` takes the thread for ended (Python 3.11)
            self._thread.join(GRACE)
            if self.failure is None and not self._failed_itself and not self._parted:
                self._part()

    def _part(self) -> None:
        """Ask the store no more; rank 0, whose process may hold it, waits a while until nobody does.

        Without torchrun, whose agent has the store, it ends with rank 0: a rank that had not yet read that all have
        come to the end would take that for a failure.
        """
        self._parted = True
        try:
            self._store.add("parted", 1)
            if self._rank == 0:
                self._wait_for(lambda: self._store.add("parted", 0) >= self._size, GRACE)
        except RuntimeError:  # it is gone already, and nobody waits for an answer
            return

    # ---------------------------------------------------------------------------------------- meetings

    def call(self) -> None:
        """Ask for a meeting; also from a signal handler."""
        self._wanted = True

    def should_sync(self, step: int) -> bool:
        """Whether all meet now, after `step`. To be asked between any two steps, before the next one is prepared."""
        self.begun = step + 1  # before the look at `asked`; the thread does it the other way round
        return self.asked and self._meets(step)

    def _meets(self, step: int) -> bool:
        began = time.monotonic()
        while self._meet_at is None:
            self.check()
            self._check_patience(began, f"{self._round}/at")
            time.sleep(_SHORT)
        self.check()
        if step < self._meet_at:
            return False
        with self._turn:
            # What is wanted up to here is told at this meeting.
            self.asked, self._meet_at, self._wanted = False, None, False
            self._round += 1
        return True

    def _answer_call(self) -> None:
        """The thread's part in a meeting."""
        with self._turn:
            number, store = self._round, self._store
            if self._meet_at is not None:
                return
            if not self.asked:
                if self._wanted:
                    self._wanted = False
                    store.set(f"{number}/called", "1")
                if not store.check([f"{number}/called"]):
                    return
                self.asked = True
                self._say(f"{number}/at", self.begun)
            if self._rank == 0 and self._all_said(f"{number}/at"):
                store.set(f"{number}/step", str(max(self._said(f"{number}/at"))))
                self._forget(number - 1)
            if store.check([f"{number}/step"]):
                self._meet_at = int(store.get(f"{number}/step"))

    def _forget(self, number: int) -> None:
        """All have come from that meeting, as they answer to the next one."""
        if number >= 0:
            ranks = [f"{number}/at/{rank}" for rank in range(self._size)]
            for key in (*ranks, f"{number}/at/count", f"{number}/step", f"{number}/called"):
                self._store.delete_key(key)

    # ---------------------------------------------------------------------------------------- waiting

    def agree(self, what: str, number: int, step: int | None = None) -> None:
        """Wait until all have come here: for the `number`th time to `what`.

        With `step`, all must have come after the same step: raises `BatchError` where another process makes a later
        one, or came from another.
        """
        key = f"{what}/{number}"
        self._say(key, step or 0)
        began, pause = time.monotonic(), _SHORT
        while not self._all_said(key):
            self.check()
            if step is not None:
                self._check_ahead(key, step)
            self._check_patience(began, key)
            time.sleep(pause)
            pause = min(2 * pause, self._interval)
        steps = self._said(key)
        if step is not None and len(set(steps)) > 1:
            raise self._uneven(step, steps.index(next(each for each in steps if each != step)))

    def _check_ahead(self, key: str, step: int) -> None:
        for rank in self._missing(key):
            if self._beat(rank)[1] > step:
                raise self._uneven(step, rank)

    def _uneven(self, step: int, rank: int) -> BatchError:
        return BatchError(
            f"the data of rank {self._rank} ended after step {step}, and that of rank {rank} did not: under several"
            " processes each must have the same number of batches. An lm.Loader cuts each global batch, so that it is"
            " so; with other data give limit=, the number of batches of the shortest."
        )

    def _check_patience(self, began: float, key: str) -> None:
        """Raise where a process that is waited for says nothing any more."""
        if time.monotonic() - began < SILENCE:
            return
        for rank in self._missing(key):
            if not self._lives(rank):
                raise WorldError(self._gone(rank))

    # ---------------------------------------------------------------------------------------- failures

    def check(self) -> None:
        """Raise `WorldError` where another process has failed."""
        if self.failure is not None:
            raise self.error()

    def error(self) -> WorldError:
        """The first failure, for a process that it was not."""
        assert self.failure is not None
        return WorldError(self.failure[1])

    def fail(self, text: str) -> None:
        """Tell the others that this process failed, unless one has before; waits a moment until they know."""
        self._failed_itself = True
        self._publish(self._rank, f"rank {self._rank} failed {text}")
        self._wait_for(lambda: self._store.add("known", 0) >= self._size - 1, GRACE / 2)

    def explain(self, error: BaseException) -> WorldError | None:
        """What lies behind an error of this process, where it is that of another one."""
        try:
            if is_of_wire(error):
                return self._behind()
        except RuntimeError:  # the store went with the process that held it
            return WorldError("rank 0 is gone, and with it the store through which the ranks of this run talk.")
        if self.failure is None:
            return None
        return error if isinstance(error, WorldError) else self.error()

    def _behind(self) -> WorldError | None:
        """Why a collective broke: somebody failed, or did not come to it."""
        self._say("gave up", self.begun)  # at once: torchrun may end this process before it can say more
        if self._wait_for(lambda: self._failed() is not None, GRACE / 2):
            return self.error()
        self._wait_for(lambda: self._all_said("gave up") or self._failed() is not None, GRACE)
        for rank in self._missing("gave up"):
            if self._failed() is None:
                hangs = f"rank {rank} hangs in step {self._beat(rank)[0]}: the others waited for it in a collective."
                self._publish(rank, hangs if self._lives(rank) else self._gone(rank))
        return self.error() if self._failed() is not None else None

    def _gone(self, rank: int) -> str:
        return f"rank {rank} is gone, or frozen, since it began step {self._beat(rank)[0]}: it says nothing any more."

    def _publish(self, rank: int, text: str) -> None:
        self._store.compare_set("failure", "", f"{rank} {text}")
        self._failed()

    def _failed(self) -> tuple[int, str] | None:
        if self.failure is None and self._store.check(["failure"]):
            rank, _, text = self._store.get("failure").decode().partition(" ")
            self.failure = int(rank), text
            self._store.add("known", 1)
        return self.failure

    def _end(self) -> None:
        """Another process failed: let the run notice, and end the process where it does not."""
        self.asked = True
        if self.failure is None or self._failed_itself or self._closed.wait(GRACE):
            return
        # Not print: the run may hold the lock of its stream.
        text = f"[rank {self._rank}] {self.failure[1]}\nThis process cannot leave its step, and is ended.\n"
        os.write(2, text.encode())
        sys.stdout.flush()
        self._leave(1)

    # ---------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while True:
                closing = self._closed.wait(_SHORT if self.asked and self._size < _STORES / 10 else self._interval)
                self._beats += 1
                self._store.set(f"beat/{self._rank}", f"{self.begun} {self.working} {self._beats}")
                self._answer_call()  # also as it closes: others may wait for the answer
                if closing:
                    return
                if self._failed() is not None:
                    self._end()
                    return
        except RuntimeError as error:  # the store is gone
            self.failure = self.failure or (0, f"rank 0 is gone, and with it the store of this world ({error}).")
            if not self._closed.is_set():
                self._end()
        finally:
            self._ended.set()

    # ---------------------------------------------------------------------------------------- the store

    def _say(self, key: str, value: int) -> None:
        self._store.set(f"{key}/{self._rank}", str(value))
        self._store.add(f"{key}/count", 1)

    def _all_said(self, key: str) -> bool:
        return self._store.add(f"{key}/count", 0) >= self._size

    def _said(self, key: str) -> Sequence[int]:
        return [int(value) for value in self._store.multi_get([f"{key}/{rank}" for rank in range(self._size)])]

    def _missing(self, key: str) -> list[int]:
        return [rank for rank in range(self._size) if not self._store.check([f"{key}/{rank}"])]

    def _beat(self, rank: int) -> tuple[int, int, int]:
        """What a process said last: the step it has begun, the one it was making, and how often it spoke."""
        if not self._store.check([f"beat/{rank}"]):
            return 0, 0, 0
        begun, working, beats = map(int, self._store.get(f"beat/{rank}").split())
        return begun, working, beats

    def _lives(self, rank: int) -> bool:
        before = self._beat(rank)
        return self._wait_for(lambda: self._beat(rank) != before, 10 * self._interval)

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (done := bool(condition())) and time.monotonic() < until:
            time.sleep(_SHORT * 4)
        return done


def is_of_wire(error: BaseException) -> bool:
    """Whether an error is that of a collective, behind which there may be another process's."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection closed by"))
