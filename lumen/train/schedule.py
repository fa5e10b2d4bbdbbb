"""`Schedule`: when to log, to validate and to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lumen.train.clock import NEVER, Clock, Every, Timer, Until


class Schedule:
    """The timers of a run: for logging, for each of its validations, and for saving.

    Nothing happens between two steps before the step `next_event`, unless `every_step` is set.
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
        # A callback, or a limit or an interval that is not a number of steps.
        self.every_step = watched or has_seconds or not until.only_steps()

    def plan(self) -> None:
        """Compute the step of the next event."""
        self.next_event = min(self._until.steps() or NEVER, *[timer.next_step for timer in self._timers])

    def wake(self) -> None:
        """Check all timers after this step; a signal handler may call it."""
        self.next_event = 0

    def steps_left(self) -> int:
        """The number of steps until the next event that must not be skipped; logging may be late."""
        next_steps = [timer.next_step for timer in self._timers if timer is not self.log]
        return max(1, min([*next_steps, self._until.steps() or NEVER]) - self._clock.step)

    def save_due(self, epoch_end: bool) -> bool:
        """Whether a checkpoint is due."""
        return self.save is not None and self.save.due(self._clock, epoch_end)

    def due_by_time(self, seconds: float) -> bool:
        """Whether something is due at this time, which only rank 0 knows."""
        now = replace(self._clock, seconds=seconds)
        timers = [t for t in self._timers if t.every.seconds is not None and t.every.epochs is None]
        return self._until.reached(now) or any(timer.due(now) for timer in timers)

    def total_steps(self, epoch_length: int | None) -> int | None:
        """The step at which the run ends, or None if that is unknown."""
        clock, ends = self._clock, [self._until.steps()]
        epochs = self._until.epochs()
        if epochs is not None and epoch_length is not None:
            ends.append(clock.step + (epochs - clock.epoch) * epoch_length - clock.batch)
        return min((step for step in ends if step is not None), default=None)

    def state_dict(self) -> list[dict[str, Any]]:
        """The times at which the intervals of the timers began."""
        return [timer.state_dict() for timer in self._timers]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Continue the intervals that `state_dict` returned."""
        for timer, state in zip(self._timers, saved, strict=False):
            timer.load_state_dict(state)
