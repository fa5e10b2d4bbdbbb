"""`Schedule`: what is due when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lumen.train.clock import NEVER, Clock, Every, Timer, Until


class Schedule:
    """The timers of a run: of logging, of each of its validations, and of saving, where it saves.

    Before the step `next_event` nothing happens between steps, unless `every_step` is to be looked at.
    """

    def __init__(
        self, clock: Clock, until: Until, log: Every, validations: Sequence[Every], save: Every | None, watched: bool
    ) -> None:
        self.log = Timer(log, clock)
        self.validations = [Timer(every, clock) for every in validations]
        self.save = None if save is None else Timer(save, clock)
        self.next_event = 0
        self._clock = clock
        self._until = until
        saving = [] if self.save is None else [self.save]
        self._timers = [self.log, *saving, *self.validations]  # in the order of checkpoints
        has_seconds = any(timer.every.seconds is not None for timer in self._timers)
        # A display, a callback, or a limit that is not a number of steps.
        self.every_step = watched or has_seconds or not until.only_steps()

    def plan(self) -> None:
        """Find the next event."""
        self.next_event = min(self._until.steps() or NEVER, *[timer.next_step for timer in self._timers])

    def wake(self) -> None:
        """Look at everything after this step; also from a signal handler."""
        self.next_event = 0

    def steps_left(self) -> int:
        """Steps until the next event that must not be passed over; logging may be late."""
        next_steps = [timer.next_step for timer in self._timers if timer is not self.log]
        return max(1, min([*next_steps, self._until.steps() or NEVER]) - self._clock.step)

    def save_due(self, epoch_end: bool) -> bool:
        """Whether a checkpoint is due."""
        return self.save is not None and self.save.due(self._clock, epoch_end)

    def due_by_time(self, seconds: float) -> bool:
        """Whether something is due at that time, which the first rank alone knows."""
        now = replace(self._clock, seconds=seconds)
        timers = [t for t in self._timers if t.every.seconds is not None and t.every.epochs is None]
        return self._until.reached(now) or any(timer.due(now) for timer in timers)

    def total_steps(self, epoch_length: int | None) -> int | None:
        """The step at which the run ends, where that is known."""
        clock, ends = self._clock, [self._until.steps()]
        epochs = self._until.epochs()
        if epochs is not None and epoch_length is not None:
            ends.append(clock.step + (epochs - clock.epoch) * epoch_length - clock.batch)
        return min((step for step in ends if step is not None), default=None)

    def state_dict(self) -> list[dict[str, Any]]:
        """The times from which the timers count."""
        return [timer.state_dict() for timer in self._timers]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Count from the times that `state_dict` gave."""
        for timer, state in zip(self._timers, saved, strict=False):
            timer.load_state_dict(state)
