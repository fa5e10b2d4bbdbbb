"""`Fit`: one call of `Runner.fit`, from the setup of a run to its end or failure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lumen.errors import CheckpointError
from lumen.train.batch_size import count_tokens
from lumen.train.clock import Clock, Until
from lumen.train.clock_updater import ClockUpdater
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext
from lumen.train.goodput import GoodputRecorder
from lumen.train.history import History
from lumen.train.loop import TrainingLoop
from lumen.train.metric_merge import MetricMerger
from lumen.train.monitored_metrics import Monitors, names_of
from lumen.train.progress import make_progress
from lumen.train.result import Result
from lumen.train.run_checkpoints import RunCheckpoints
from lumen.train.run_context import RunContext
from lumen.train.run_log import RunLogger
from lumen.train.schedule import Schedule
from lumen.train.settings import RunSettings
from lumen.train.signals import Interrupted, Signals
from lumen.train.sink_group import SinkGroup
from lumen.train.step_batches import StepBatches
from lumen.train.stop import StopControl
from lumen.train.validate import Validate
from lumen.train.validator import Validator, open_validation_sets


class Fit:
    """One run: its context, and the loop over it with its batches and checkpoints."""

    def __init__(
        self,
        settings: RunSettings,
        state: Any,
        data: Any,
        until: Until,
        validations: Sequence[Validate],
        limit: int | None,
    ) -> None:
        directory = None if settings.checkpoint is None else settings.checkpoint.directory
        merger = MetricMerger(ProcessGroupContext(state, settings.time_fn, directory))
        feed = open_batches(data, state, merger.group)
        # Opened here, so that unusable data raises before the first step.
        validation_sets = open_validation_sets(validations, state, merger)
        run = _make_context(settings, state, until, validations, merger)
        self._run = run
        self._batches = StepBatches(
            feed, settings.step, run.clock, run.schedule, run.logger, limit=limit, mfu=bool(settings.mfu)
        )
        self._checkpoints = RunCheckpoints(run, self._batches)
        validator = Validator(run, validations, validation_sets, merger)
        self._loop = TrainingLoop(run, self._batches, validator, self._checkpoints)

    def run(self, resume: str | os.PathLike[str]) -> Result:
        """Train until the end, and clean up, also after an error."""
        group, stop = self._run.group, self._run.stop
        # The store closes last: it raises its own failure only if there was no other.
        with group, self._checkpoints.open_store():
            try:
                self._train(resume)
            except BaseException as error:
                cause = group.report_failure(error, self._run.where())
                try:
                    try:
                        self._handle_failure(cause)
                    finally:
                        self._close(cause)
                    if cause is not error:
                        raise cause from error
                    raise
                finally:
                    del cause  # its traceback has this frame, and would keep the run alive
            self._close()
        result = self._run.result()
        if stop.is_interrupted:
            self._checkpoints.report_interrupted()
        if stop.exits_process:
            self._checkpoints.mark_interrupted()
            raise Interrupted(result)
        return result

    def _train(self, resume: str | os.PathLike[str]) -> None:
        run, epoch_length = self._run, self._batches.epoch_length()
        run.group.assert_same_on_all_ranks(epoch_length)
        self._checkpoints.resume(resume)
        with run.stop.signals.listening(self._wake_up):
            run.logger.progress.start(run.schedule.total_steps(epoch_length), run.clock.step)
            self._loop.train()
            with run.goodput.during("checkpoint"):
                self._checkpoints.wait()
            run.group.barrier()

    def _wake_up(self) -> None:
        self._run.schedule.wake()
        self._run.group.request_sync()

    def _handle_failure(self, error: BaseException) -> None:
        """Add where the run failed to `error`, and save the state if it is consistent."""
        run, clock = self._run, self._run.clock
        if not run.is_training:
            return
        error.add_note(f"raised {run.where()} (epoch {clock.epoch}, batch {clock.batch})")
        # Several processes save together, for which it is too late.
        is_alone = run.group.size == 1
        # A save that failed would fail again; an error of another disk does not prevent a save.
        is_savable = isinstance(error, Exception) and not isinstance(error, CheckpointError)
        if is_alone and is_savable and run.is_consistent():
            try:
                self._checkpoints.save()
            except Exception as second:  # the first error is the one to show
                error.add_note(f"and step {clock.step} could not be saved: {second}")
        run.callback("on_exception", error)

    def _close(self, because: BaseException | None = None) -> None:
        self._run.logger.progress.stop()
        try:
            self._run.logger.sinks.close()
        except Exception as error:
            if because is None:
                raise
            because.add_note(f"a sink could not close either: {type(error).__name__}: {error}")


def _make_context(
    settings: RunSettings, state: Any, until: Until, validations: Sequence[Validate], merger: MetricMerger
) -> RunContext:
    group, clock = merger.group, Clock(step=_step_of(state))
    # Only rank 0 writes to sinks and to the display.
    sinks = SinkGroup(settings.sinks if group.is_main else ())
    progress = make_progress(settings.progress if group.is_main else False)
    history = History(settings.best_metric())
    logger = RunLogger(sinks, progress, clock, settings.peak_flops(state), merger, history)
    schedule = Schedule(
        clock,
        until,
        log=settings.log_every,
        validations=[validate.every for validate in validations],
        save=None if settings.checkpoint is None else settings.checkpoint.every,
        watched=settings.callbacks.listens("on_step"),
    )
    tokens = settings.tokens or (count_tokens if until.needs_tokens() else None)
    return RunContext(
        settings,
        state,
        group,
        clock,
        ClockUpdater(clock, group, settings.time_fn, tokens, exact_tokens=until.needs_tokens()),
        schedule,
        StopControl(until, Signals(group.rank), group),
        logger,
        Monitors(settings, names_of(validations)),
        GoodputRecorder(settings.time_fn),
    )


def _step_of(state: Any) -> int:
    step = getattr(state, "step", None)
    return int(step.max()) if isinstance(step, Tensor) else 0
