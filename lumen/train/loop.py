"""The training loop: fetch a batch, make a step, count; and log, validate and save where that is due.

Between two logging points the loop does nothing but fetch a batch, call the step and count: no number leaves the
device, nothing is synchronized.

Under several processes each runs this loop, and `ProcessGroupContext` keeps them together: rank 0 writes, and decides
about the time; what one rank alone knows becomes known to all between two steps.

At a step where several things are due they happen in one order: log, validate, save. Each counts as done only when it
is, so a run that is interrupted in the middle of them, and goes on from there, does the rest first.
"""

from __future__ import annotations

import warnings
from typing import Any

from lumen.errors import InexactWarning
from lumen.train.resume import RunCheckpoints
from lumen.train.run_context import RunContext
from lumen.train.signals import Interrupted
from lumen.train.step_batches import StepBatches
from lumen.train.validator import Validator


class TrainingLoop:
    """Trains a run until it is over."""

    def __init__(
        self, run: RunContext, batches: StepBatches, validator: Validator, checkpoints: RunCheckpoints
    ) -> None:
        self._run = run
        self._batches = batches
        self._validator = validator
        self._checkpoints = checkpoints
        self._has_on_step = run.settings.callbacks.listens("on_step")

    def train(self) -> None:
        """All epochs, from where the clock is."""
        run, clock, stop = self._run, self._run.clock, self._run.stop
        self._start()
        while not stop.is_over(clock):
            first_batch = clock.batch
            self._train_epoch()
            if not stop.reason:
                self._batches.check_resumed(first_batch)
            elif clock.batch != self._batches.epoch_length():
                break
            run.group.end_epoch(clock.epoch, clock.step)
            if clock.batch == 0:
                stop.reason = self._batches.no_batch(stop.until)
                break
            clock.epoch += 1
            clock.batch = 0
            self._after_step(epoch_end=True)
        self._finish()

    def _train_epoch(self) -> None:
        """The steps until the end of the epoch, or of the run."""
        run, clock, group, schedule = self._run, self._run.clock, self._run.group, self._run.schedule
        add_metrics, count_batch = run.logger.meter.add, run.clock_updater.count_batch
        if group.should_sync(clock.step) and self._sync():
            return
        for step_fn, batch, steps in self._batches.epoch(run.state):  # fetch
            run.input_state = run.state
            group.step_begins(clock.step)
            run.state, metrics = step_fn(run.state, batch)
            group.step_ends()
            add_metrics(metrics)
            clock.step += steps
            clock.batch += steps
            count_batch(batch, steps)
            run.input_state = None
            if clock.step >= schedule.next_event or schedule.every_step:
                if self._has_on_step:
                    self._callback_on_step(metrics, batch)
                self._after_step()
                if run.stop.is_over(clock):
                    return
            if group.should_sync(clock.step) and self._sync():
                return

    def _log_validate_save(self, epoch_end: bool) -> None:
        """Do what is due, in this order; what a signal cuts off is done when the run goes on."""
        run, schedule, is_best = self._run, self._run.schedule, False
        if schedule.log.due(run.clock):
            self._log()
        for number, timer in enumerate(schedule.validations):
            if timer.due(run.clock, epoch_end):
                if not self._validate(number):
                    return
                is_best = is_best or self._checkpoints.is_best()
        if is_best or schedule.save_due(epoch_end):
            self._checkpoints.save(again=is_best)

    # ---------------------------------------------------------------------------------------- its parts

    def _start(self) -> None:
        run = self._run
        run.is_training = True
        run.logger.sinks.configure(run.settings.description)
        self._show_params()
        run.callback("on_start")
        run.stop.sync_requests()
        self._plan()
        if run.clock.step:  # what was due, and not done, when the checkpoint was made
            self._log_validate_save(epoch_end=run.clock.batch == 0)

    def _finish(self) -> None:
        run = self._run
        validated = self._validate_last()
        if run.stop.is_interrupted:
            self._checkpoints.save()
            run.callback("on_exception", Interrupted(run.result()))
            return
        self._log()
        self._show_params(last=True)
        self._checkpoints.save(again=validated)
        if run.group.is_main:
            for message in run.monitors.never_published(run.logger.newest):
                warnings.warn(message, InexactWarning, stacklevel=2)
        run.callback("on_end")

    def _callback_on_step(self, metrics: Any, batch: Any) -> None:
        run = self._run
        run.stop.in_sync = False
        run.settings.callbacks.call("on_step", run.view(metrics, batch))
        run.stop.in_sync = True

    def _after_step(self, epoch_end: bool = False) -> None:
        """Read the clock, and do what is due."""
        run, updater = self._run, self._run.clock_updater
        if run.group.size == 1 or epoch_end:
            updater.read()
        elif run.group.is_main and run.schedule.due_by_time(updater.seconds()):
            run.group.request_sync()
        run.logger.progress.tick(run.clock)
        self._log_validate_save(epoch_end)
        self._plan()

    def _sync(self) -> bool:
        """Synchronize all ranks: the time, signals, and what callbacks ask for; whether the run is over."""
        run = self._run
        run.clock_updater.read()
        run.stop.sync_signals()
        run.stop.sync_requests()
        self._log_validate_save(epoch_end=False)
        self._plan()
        return run.stop.is_over(run.clock)

    def _plan(self) -> None:
        self._run.schedule.plan()
        if self._run.stop.signal:  # asked for last, as it may come meanwhile
            self._run.schedule.wake()

    def _log(self) -> None:
        """Publish the metrics of the steps since the last time."""
        run = self._run
        run.clock_updater.read_on_all_ranks()
        run.schedule.log.restart(run.clock)
        self._checkpoints.check()
        values = run.logger.training(run.state)
        if values:
            run.publish(values)
            run.monitors.check(run.logger.newest)
            self._show_params()
            run.stop.sync_requests()

    def _show_params(self, last: bool = False) -> None:
        params = None if self._checkpoints.shards_params else getattr(self._run.state, "params", None)
        self._run.logger.sinks.show_params(self._run.clock.step, params, last)

    def _validate(self, number: int) -> bool:
        """Whether it was done, rather than cut off by a signal."""
        self._log()
        return self._validator.run(number)

    def _validate_last(self) -> bool:
        """Measure what asks for it at the end and was not measured at this step; whether there was any."""
        stop, clock, measured = self._run.stop, self._run.clock, False
        for number, timer in enumerate(self._run.schedule.validations):
            last = self._validator.validations[number].last
            if not last or stop.is_interrupted or timer.since == clock.step:
                continue
            if not self._validate(number):
                stop.reason = str(stop.signal)  # the run that goes on does it
                break
            measured = True
        return measured
