"""`RunContext`: the state of one call of `fit`, shared by its loop, validations and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumen.core.donation import is_retired
from lumen.train.callbacks import CallbackContext
from lumen.train.clock import Clock
from lumen.train.clock_updater import ClockUpdater
from lumen.train.distributed import ProcessGroupContext
from lumen.train.goodput import GoodputRecorder
from lumen.train.monitored_metrics import Monitors
from lumen.train.result import Result, files_of
from lumen.train.run_log import RunLogger
from lumen.train.schedule import Schedule
from lumen.train.settings import RunSettings
from lumen.train.stop import StopControl


class RunContext:
    """One run. Nothing in it refers back to it, so it is freed with its last reference.

    `input_state` is the argument of the step that is running, and None between two steps.
    """

    def __init__(
        self,
        settings: RunSettings,
        state: Any,
        group: ProcessGroupContext,
        clock: Clock,
        clock_updater: ClockUpdater,
        schedule: Schedule,
        stop: StopControl,
        logger: RunLogger,
        monitors: Monitors,
        goodput: GoodputRecorder,
    ) -> None:
        self.settings = settings
        self.state = state
        self.input_state: Any = None
        self.is_training = False
        self.group = group
        self.clock = clock
        self.clock_updater = clock_updater
        self.schedule = schedule
        self.stop = stop
        self.logger = logger
        self.monitors = monitors
        self.goodput = goodput

    def publish(self, values: Mapping[str, Any]) -> None:
        """Send values to the sinks, the display and the callbacks."""
        with self.goodput.during("logging"):
            self.logger.publish(values)
            if self.settings.callbacks.listens("on_log"):
                self.settings.callbacks.call("on_log", self.callback_context(values))

    def callback(self, point: str, *args: Any) -> None:
        """Call the callbacks at `point`, with the newest number of each name."""
        self.settings.callbacks.call(point, self.callback_context(self.logger.newest), *args)

    def callback_context(self, metrics: Any, batch: Any = None) -> CallbackContext:
        """The argument of a callback."""
        return CallbackContext(
            self.clock,
            self.state,
            metrics,
            batch,
            stop=self.stop.request,
            log=self.publish,
            per_epoch=self.logger.epoch_metrics.names,
        )

    def position(self) -> tuple[Any, ...]:
        """The position of the run, which identifies a checkpoint."""
        return self.clock.step, self.clock.epoch, self.clock.batch, self.stop.stopped

    def where(self) -> str:
        """How far the run is, for the note of an error."""
        if not self.is_training:
            return "before its first step"
        step = self.clock.step
        return f"after step {step}" if self.input_state is None else f"in step {step + 1}"

    def is_consistent(self) -> bool:
        """Whether the state belongs to the clock's step: an error can occur at any point."""
        donates = any(transform.donates for transform in self.settings.step.transforms)
        is_in_step = self.input_state is not None and (donates or self.state is not self.input_state)
        return self.clock.step > 0 and not is_retired(self.state) and not is_in_step

    def result(self) -> Result:
        """The result of the run so far."""
        settings, logger = self.settings, self.logger
        files = files_of(settings.checkpoint, logger.sinks) if self.group.is_main else {}
        return Result(
            self.state,
            logger.newest,
            self.clock,
            self.stop.reason,
            settings.step,
            logger.history,
            files,
            self.goodput.measured(),
        )
