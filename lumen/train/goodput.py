"""`Goodput`: the share of a run's wall-clock time that went into training steps, and where the rest went.

The definition follows Google's ML Goodput Measurement (https://docs.cloud.google.com/tpu/docs/goodput): productive time
is that of steps which are preserved, over all restarts of the run; the rest is divided by its cause. As there, the
first step after a start counts as startup, since it compiles and warms up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

STEPS = "steps"
OVERHEADS = ("startup", "data", "validation", "checkpoint", "logging", "rewind", "restart")


@dataclass(frozen=True, repr=False)
class Goodput:
    """Where the time of a run went, all its restarts included: `seconds` by name, in total `total`.

    | name | the time |
    |---|---|
    | `steps` | in training steps that were kept: all that is not listed below |
    | `startup` | from the call of `fit` to the end of its first step, which compiles: resuming included |
    | `data` | that the loop waited for batches |
    | `validation` | in validations |
    | `checkpoint` | that the loop was blocked by saving |
    | `logging` | in sinks, the display and `on_log` callbacks |
    | `rewind` | in steps that `lm.Rewind` undid |
    | `restart` | from the checkpoint of the run before to the start of this one: lost steps and downtime |

    >>> Goodput({"steps": 90.0, "data": 4.0, "restart": 6.0})
    Goodput(90.0% of 100.0 s; restart 6.0%, data 4.0%)
    """

    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float:
        """The share of the time that went into steps: from 0 to 1, and 0 for a run without any time."""
        return self.seconds.get(STEPS, 0.0) / self.total if self.total > 0 else 0.0

    def lost(self) -> dict[str, float]:
        """What took the rest of the time, as shares of all of it, the largest first."""
        shares = {name: seconds / self.total for name, seconds in self.seconds.items() if name != STEPS and seconds > 0}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def __repr__(self) -> str:
        rest = ", ".join(f"{name} {share:.1%}" for name, share in self.lost().items())
        return f"Goodput({self.ratio:.1%} of {self.total:,.1f} s{f'; {rest}' if rest else ''})"


class GoodputRecorder:
    """Measures the `Goodput` of a run on the clock `time_fn`; time counts as that of steps unless it has another cause.

    A step costs two readings of the clock, those around the wait for its batch. Nothing waits for the device: between
    two logging points its work overlaps with the host's, and what is measured is the host.
    """

    def __init__(self, time_fn: Callable[[], float]) -> None:
        self.data_seconds = 0.0  # that this process waited for batches, also before the end of its first step
        self._time_fn = time_fn
        self._began = time_fn()
        self._overheads = dict.fromkeys(OVERHEADS, 0.0)
        self._earlier: dict[str, float] = {}  # the seconds of the runs that this one continues
        self._is_starting = True
        self._is_measuring = False
        self._window = (0.0, self._began)  # data_seconds, and the time, at the last `data_wait`

    def batches(self, open_batches: Callable[[], Iterable[T]]) -> Iterator[T]:
        """What `open_batches` returns; the time until each batch is there, and to open them, counts as `data`."""
        time_fn = self._time_fn
        began = time_fn()
        fetch = iter(open_batches()).__next__
        del open_batches
        while True:
            try:
                batch = fetch()
            except StopIteration:
                self.data_seconds += time_fn() - began
                return
            self.data_seconds += time_fn() - began
            yield batch
            if self._is_starting:
                self._end_startup()
            began = time_fn()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count the time of the block as `name`; a block inside of another counts as part of that."""
        if self._is_measuring:
            yield
            return
        self._is_measuring, began = True, self._time_fn()
        try:
            yield
        finally:
            self._is_measuring = False
            self._overheads[name] += self._time_fn() - began

    def _end_startup(self) -> None:
        self._is_starting = False
        self._overheads["startup"] = self._unexplained()
        self._overheads["data"] = -self.data_seconds  # what startup includes already

    def _unexplained(self) -> float:
        return self._time_fn() - self._began - sum(self._overheads.values())

    def _own(self) -> dict[str, float]:
        """The seconds of this call of `fit`, by name."""
        rest = self._unexplained()
        if self._is_starting:
            return {STEPS: 0.0, **self._overheads, "startup": rest}
        data = self._overheads["data"] + self.data_seconds
        return {STEPS: rest - self.data_seconds, **self._overheads, "data": data}

    def measured(self) -> Goodput:
        """The goodput so far, with that of the runs before."""
        return Goodput({name: self._earlier.get(name, 0.0) + seconds for name, seconds in self._own().items()})

    def numbers(self) -> dict[str, float]:
        """What is logged: the goodput so far, and the share of the time since the last call spent waiting for data."""
        data, now = self.data_seconds - self._window[0], self._time_fn()
        seconds, self._window = now - self._window[1], (self.data_seconds, now)
        return {"goodput": self.measured().ratio, "data_wait": data / seconds if seconds > 0 else 0.0}

    def undo(self, saved: Mapping[str, Any]) -> None:
        """The run has gone back to the checkpoint that has this `state_dict`: its steps since then were in vain."""
        lost = self.measured().seconds[STEPS] - saved["seconds"][STEPS]
        self._overheads["rewind"] += max(0.0, lost)

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far, and the time of day, as plain data."""
        return {"seconds": dict(self.measured().seconds), "saved_at": time.time()}

    def load_state_dict(self, saved: Mapping[str, Any], same_run: bool) -> None:
        """Continue from `state_dict`; the time since then counts as `restart` if this is the `same_run`."""
        self._earlier = dict(saved["seconds"])
        if same_run:
            gap = time.time() - (self._time_fn() - self._began) - saved["saved_at"]
            self._earlier["restart"] = self._earlier.get("restart", 0.0) + max(0.0, gap)
