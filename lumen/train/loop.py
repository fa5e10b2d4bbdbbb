"""The training loop: fetch a batch, run a step, count; log, validate and save when that is due.

Between two logging points the loop only fetches a batch, calls the step and counts. No number leaves the device, and
nothing synchronizes.

With several processes each runs this loop, and `ProcessGroupContext` keeps them together. Rank 0 writes, and its time
counts; what only one rank knows reaches the others between two steps.

If several things are due at a step, they happen in the order log, validate, save. Each counts as done only when it is
complete, so a run that is interrupted between them does the remaining ones first when it resumes.
"""

from __future__ import annotations

import warnings
from typing import Any

from lumen.errors import InexactWarning
from lumen.train.run_checkpoints import RunCheckpoints
from lumen.train.run_context import RunContext
from lumen.train.signals import Interrupted
from lumen.train.step_batches import StepBatches
from lumen.train.stragglers import Stragglers
from lumen.train.validator import Validator


class TrainingLoop:
    """Trains until the run ends."""

    def __init__(
        self, run: RunContext, batches: StepBatches, validator: Validator, checkpoints: RunCheckpoints
    ) -> None:
        self._run = run
        self._batches = batches
        self._validator = validator
        self._checkpoints = checkpoints
        self._has_on_step = run.settings.callbacks.listens("on_step")
        self._stragglers = Stragglers(run.group, run.goodput)

    def train(self) -> None:
        """Train all epochs from the position of the clock."""
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
        """Train until the end of the epoch or of the run."""
        run, clock, group, schedule = self._run, self._run.clock, self._run.group, self._run.schedule
        ticks = run.logger.progress.ticks
        add_metrics, count_batch = run.logger.accumulator.add, run.clock_updater.count_batch
        if group.should_sync(clock.step) and self._sync():
            return
        for step_fn, batch, steps in run.goodput.batches(lambda: self._batches.epoch(run.state)):  # fetch
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
            elif ticks:
                self._tick()
            if group.should_sync(clock.step) and self._sync():
                return

    def _log_validate_save(self, epoch_end: bool) -> None:
        """Do what is due, in this order. What a signal interrupts is done when the run resumes."""
        run, schedule, is_best = self._run, self._run.schedule, False
        if schedule.log.due(run.clock):
            if self._checkpoints.rewind():
                return
            self._log()
        if epoch_end:
            self._log_epoch()
        for number, timer in enumerate(schedule.validations):
            if timer.due(run.clock, epoch_end):
                if not self._validate(number):
                    return
                is_best = is_best or self._checkpoints.is_best()
        if is_best or schedule.save_due(epoch_end):
            self._checkpoints.save(again=is_best)

    # ---------------------------------------------------------------------------------------- events

    def _start(self) -> None:
        run = self._run
        run.is_training = True
        run.logger.sinks.configure(run.settings.description)
        self._show_params()
        run.callback("on_start")
        run.stop.sync_requests()
        self._plan()
        if run.clock.step:  # what was due but not done when the checkpoint was saved
            self._log_validate_save(epoch_end=run.clock.batch == 0)

    def _finish(self) -> None:
        run = self._run
        has_validated = self._validate_last()
        if run.stop.is_interrupted:
            self._checkpoints.save()
            run.callback("on_exception", Interrupted(run.result()))
            return
        self._log()
        self._log_epoch(complete=False)
        self._show_params(last=True)
        self._checkpoints.save(again=has_validated)
        if run.group.is_main:
            for message in run.monitors.never_published(run.logger.newest):
                warnings.warn(message, InexactWarning, stacklevel=2)
        run.callback("on_end")

    def _callback_on_step(self, metrics: Any, batch: Any) -> None:
        run = self._run
        run.stop.in_sync = False
        run.settings.callbacks.call("on_step", run.callback_context(metrics, batch))
        run.stop.in_sync = True

    def _after_step(self, epoch_end: bool = False) -> None:
        """Update the clock, and do what is due."""
        run, updater = self._run, self._run.clock_updater
        if run.group.size == 1 or epoch_end:
            updater.read()
        elif run.group.is_main and run.schedule.due_by_time(updater.seconds()):
            run.group.request_sync()
        self._log_validate_save(epoch_end)
        run.logger.progress.tick(run.clock)
        self._plan()

    def _tick(self) -> None:
        """Show the display that a step is complete after which nothing is due."""
        run = self._run
        if run.group.size == 1:
            run.clock_updater.read()
        run.logger.progress.tick(run.clock)

    def _sync(self) -> bool:
        """Synchronize the time, signals and stop requests of all ranks; returns whether the run is over."""
        run = self._run
        run.clock_updater.read()
        run.stop.sync_signals()
        run.stop.sync_requests()
        self._log_validate_save(epoch_end=False)
        self._plan()
        return run.stop.is_over(run.clock)

    def _plan(self) -> None:
        self._run.schedule.plan()
        if self._run.stop.signal:  # checked last, as a signal may arrive meanwhile
            self._run.schedule.wake()

    def _log(self) -> None:
        """Publish the metrics of the steps since the last call."""
        run = self._run
        times = run.clock_updater.read_on_all_ranks(self._stragglers.own_times())
        run.schedule.log.restart(run.clock)
        self._checkpoints.check()
        values = run.logger.training(run.state)
        if values:
            run.publish({**values, **run.goodput.numbers(), **self._stragglers.numbers(times)})
            run.monitors.check(run.logger.newest.keys() | run.logger.epoch_metrics.names)
            self._show_params()
            run.stop.sync_requests()

    def _log_epoch(self, complete: bool = True) -> None:
        """Publish the metrics of the epoch, or of what there is of it at the end of the run."""
        run = self._run
        values = run.logger.epoch(complete)
        if values:
            run.publish(values)
            run.stop.sync_requests()

    def _show_params(self, last: bool = False) -> None:
        params = None if self._checkpoints.shards_params else getattr(self._run.state, "params", None)
        self._run.logger.sinks.show_params(self._run.clock.step, params, last)

    def _validate(self, number: int) -> bool:
        """Run a validation; returns False if a signal interrupted it."""
        self._log()
        with self._run.goodput.during("validation"):
            return self._validator.run(number)

    def _validate_last(self) -> bool:
        """Run the validations with `last=True` that did not run at this step; returns whether there were any."""
        stop, clock, has_validated = self._run.stop, self._run.clock, False
        for number, timer in enumerate(self._run.schedule.validations):
            last = self._validator.validations[number].last
            if not last or stop.is_interrupted or timer.since == clock.step:
                continue
            if not self._validate(number):
                stop.reason = str(stop.signal)  # the resumed run does it
                break
            has_validated = True
        return has_validated
