"""One call of `Runner.fit`: the loop, and what happens between its steps.

Between two logging points the loop does nothing but fetch a batch, call the step and count: no number leaves the
device, nothing is synchronized.

Under several processes each runs this loop, and `ProcessGroupContext` keeps them together: rank 0 writes, and decides
about the time; what one rank alone knows becomes known to all between two steps.

At a step where several things are due they happen in one order: log, validate, save. Each counts as done only when it
is, so a run that is interrupted in the middle of them, and goes on from there, does the rest first.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from lumen import checkpoint, tree
from lumen.checkpoint import rng
from lumen.checkpoint.shard_specs import is_spread
from lumen.core.donation import is_retired
from lumen.core.flops import flops_of
from lumen.core.step import Step, StepFn, compose
from lumen.errors import BatchError, CheckpointError, CorruptCheckpointError, InexactWarning
from lumen.parallel.comm import consistency
from lumen.train import frozen_params
from lumen.train import result as result_page
from lumen.train.batch_size import count_rows, count_tokens
from lumen.train.callbacks import CallbackContext
from lumen.train.checkpointer import candidates, first_whole
from lumen.train.clock import NEVER, Clock, Timer, Until
from lumen.train.device_feed import opened
from lumen.train.distributed import ProcessGroupContext
from lumen.train.history import History
from lumen.train.metric_merge import MetricMerger
from lumen.train.monitored_metrics import Monitors, names_of
from lumen.train.plateau import update_plateau
from lumen.train.progress import Silent, make_progress
from lumen.train.rank_rng import restore_rng
from lumen.train.rank_state import gather_rank_state, own_rank_state
from lumen.train.run_log import RunLogger
from lumen.train.signals import Interrupted, Signals, interactive
from lumen.train.sink_group import SinkGroup
from lumen.train.validate import Validate, evaluate_until, params_for
from lumen.transforms._unroll import stack, unroll

if TYPE_CHECKING:
    from lumen.train.runner import Runner


@dataclass(frozen=True, repr=False)
class Result:
    """How a run ended: its last `state`, the newest of each of its `metrics`, its `clock`, and the `reason`.

    The state still has the slots of the run's transforms (`lm.ema.params(result.state)`), and can be given to
    `Runner.fit` again; `export()` gives the plain one.

    `history` has what this call of `fit` logged: `steps, losses = result.history["train/loss"]`, and
    `result.history.best("val/loss")`. `files` says where the run's checkpoints and its sinks' files are. A notebook
    shows all of it, with curves.

    >>> import lumen as lm, torch
    >>> result = lm.Runner(lambda state, batch: (state, {"loss": batch.sum()}), log_every=1, progress=False).fit(
    ...     {}, [torch.ones(1), torch.zeros(1)], until=lm.Epochs(1)
    ... )
    >>> result.history["train/loss"], result.history.best("train/loss")
    (([1, 2], [1.0, 0.0]), (2, 0.0))
    """

    state: Any
    metrics: dict[str, float]
    clock: Clock
    reason: str
    step: Step
    history: History = field(default_factory=History, compare=False)
    files: Mapping[str, Path] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return result_page.line(self)

    def _repr_html_(self) -> str:
        return result_page.page(self)

    def export(self) -> Any:
        """The plain state, without slots and in ordinary places."""
        return self.step.export(self.state)


class Fit:
    """One run."""

    def __init__(
        self, runner: Runner, state: Any, data: Any, until: Until, validations: list[Validate], limit: int | None
    ) -> None:
        self.runner = runner
        self.state = state
        self.until = until
        self.validations = validations
        self.clock = Clock(step=_step_of(state))
        self.reason = ""
        self._description = runner.description()  # once: it asks git
        self._limit = limit
        self._everyone = ProcessGroupContext(state)
        self._merger = MetricMerger(self._everyone)
        self._feed = opened(data, state, self._everyone)
        # Opened here, as what cannot be measured on is to be told before the first step.
        self._held_out = [
            [(name, opened(each, state, self._everyone)) for name, each in validate.loaders()]
            for validate in validations
        ]
        self._resumed: int | None = None  # the step of the checkpoint, while no batch has come
        # What is done once, whatever the number of processes.
        self._sinks = SinkGroup(runner.sinks if self._everyone.is_main else ())
        # A state that is the same everywhere is written by the first; of one that is spread, each writes its parts.
        self._shards_params = any(
            t.opaque_state or (t.shards and self._everyone.size > 1) for t in runner.step.transforms
        )
        spread = self._shards_params or is_spread(state)
        saves = runner.checkpoint is not None and (spread or self._everyone.is_main)
        self._store = runner.checkpoint.store if runner.checkpoint is not None and saves else None
        self._together = runner.step if spread else None
        self._progress = make_progress(runner.progress if self._everyone.is_main else False)
        better = (
            {} if runner.checkpoint is None or runner.checkpoint.metric is None else dict([runner.checkpoint.metric])
        )
        self._journal = RunLogger(
            self._sinks, self._progress, self.clock, runner.peak(state), self._merger, History(better)
        )
        self._monitors = Monitors(runner, names_of(validations))
        self._signals = Signals(self._everyone.rank)
        self._agreed_signal: str | None = None
        self._stop_request = ""  # why a callback of this process would end the run
        self._in_sync = True  # whether all processes come to this very place
        self._single, self._unrolled = without_unroll(runner.step)
        self._count_tokens = runner.tokens or (count_tokens if until.needs_tokens() else None)
        self._uncounted = [0, 0]  # rows and tokens of this process that the clock does not have yet
        self._log_timer = Timer(runner.log_every, self.clock)
        self._timers = [Timer(validate.every, self.clock) for validate in validations]
        # What frozen weights are known by, where checkpoints do without them.
        apart = runner.checkpoint is not None and not runner.checkpoint.frozen
        self._fingerprint = frozen_params.fingerprint(state) if apart else None
        self._save_timer = None if runner.checkpoint is None else Timer(runner.checkpoint.every, self.clock)
        self._saved_at: tuple[Any, ...] = ()
        self._compared = False  # what the processes hold, with the first checkpoint
        self._stopped = ""  # why a callback ended the run
        self._training = False
        self._before: Any = None  # the state that the step was given which is being made
        self._listens = runner.callbacks.listens("on_step")
        self._began = runner.now()
        # Something looks at every step: a display, a callback, or a limit that is not a number of steps.
        timed = any(timer.every.seconds is not None for timer in self._all_timers())
        self._watched = self._listens or timed or not isinstance(self._progress, Silent) or not until.only_steps()
        self._wake = 0

    def run(self, resume: str | os.PathLike[str]) -> Result:
        """Train until the end, and clean up however it comes."""
        # The store is the last to close: it tells its own failure only where there was no other.
        with self._everyone, self._opened():
            try:
                self._everyone.assert_same_on_all_ranks(self._epoch_length())
                self._resume(resume)
                with self._signals.listening(self._wake_up):
                    self._progress.start(self._total(), self.clock.step)
                    self._train()
                    if self._store is not None:
                        self._store.wait()
                    self._everyone.barrier()
            except BaseException as error:
                first = self._everyone.report_failure(error, self._where())
                try:
                    try:
                        self._failed(first)
                    finally:
                        self._close(first)
                    if first is not error:
                        raise first from error
                    raise
                finally:
                    del first  # its traceback has this frame, and would keep the run alive
            self._close()
        result = self._result()
        if self.reason == self._signal and not (self.reason == "SIGINT" and interactive()):
            if self.runner.checkpoint is not None and self._everyone.is_main:
                self.runner.checkpoint.mark_interrupted(self.reason, self.clock.step)
            raise Interrupted(result)
        return result

    def _opened(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._store is None else self._store.open(self._together)

    # ---------------------------------------------------------------------------------------- the loop

    def _train(self) -> None:
        callbacks = self.runner.callbacks
        self._training = True
        self._sinks.configure(self._description)
        self._show_params()
        callbacks.call("on_start", self._view(self._journal.newest))
        self._agree()
        self._wake = self._next_event()
        if self.clock.step:  # what was due, and not done, when the checkpoint was made
            self._events(epoch_end=self.clock.batch == 0)
        while not self._over():
            began = self.clock.batch
            self._epoch()
            self._check_went_on(began)
            if self.reason and self.clock.batch != self._epoch_length():
                break
            self._everyone.end_epoch(self.clock.epoch, self.clock.step)
            if self.clock.batch == 0:
                self._no_batch()
                break
            self.clock.epoch += 1
            self.clock.batch = 0
            self._tick(epoch_end=True)
        again = self._validate_last()
        if self.reason == self._signal:
            self._save()
            callbacks.call("on_exception", self._view(self._journal.newest), Interrupted(self._result()))
            return
        self._log()
        self._show_params(last=True)
        self._save(again)
        if self._everyone.is_main:
            for message in self._monitors.never_published(self._journal.newest):
                warnings.warn(message, InexactWarning, stacklevel=2)
        callbacks.call("on_end", self._view(self._journal.newest))

    def _epoch(self) -> None:
        clock, meter, everyone = self.clock, self._journal.meter, self._everyone
        if self._meets():
            return
        for run, batch, count in self._calls():
            self._before = self.state
            everyone.step_begins(clock.step)
            self.state, metrics = run(self.state, batch)
            everyone.step_ends()
            meter.add(metrics)
            clock.step += count
            clock.batch += count
            self._count(batch, count)
            self._before = None
            if clock.step >= self._wake or self._watched:
                if self._listens:
                    self._in_sync = False
                    self.runner.callbacks.call("on_step", self._view(metrics, batch))
                    self._in_sync = True
                self._tick()
                if self._over():
                    return
            if self._meets():
                return

    def _count(self, batch: Any, steps: int) -> None:
        """Count what was in a batch; under several processes those of all, at the next time that they meet anyway."""
        rows, count = count_rows(batch, steps > 1), self._count_tokens
        tokens = count(batch) if count is not None else 0
        if self._everyone.size == 1:
            self.clock.rows += rows
            self.clock.tokens += tokens
            return
        self._uncounted = [self._uncounted[0] + rows, self._uncounted[1] + tokens]
        if self.until.needs_tokens():  # all must find at the same step that there have been enough
            self._read_clock()

    def _batches(self) -> Iterator[Any]:
        batches = self._feed.epoch(self.clock.epoch, self.clock.batch)
        if self.runner.mfu and self._journal.flops_per_step is None:
            batches = self._measured(batches)
        if self._limit is None:
            return batches
        return itertools.islice(batches, max(0, self._limit - self.clock.batch))

    def _measured(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, after the FLOPs of a step on the first one were counted."""
        for batch in batches:
            self._journal.flops_per_step = flops_of(self.runner.step, self.state, batch)
            return itertools.chain([batch], batches)
        return iter(())

    def _calls(self) -> Iterator[tuple[StepFn, Any, int]]:
        """`(step, batch, how many optimizer steps)`: one by one, or stacked in groups where the step unrolls."""
        single, size = self._single, self._unrolled
        if size == 1:
            for batch in self._batches():
                yield single, batch, 1
            return
        for batch, count in self._groups(size):
            yield self.runner.step if count > 1 else single, batch, count

    def _groups(self, size: int) -> Iterator[tuple[Any, int]]:
        """`size` batches at a time, stacked, and how many; one by one where an event or the epoch's end is nearer."""

        def wanted() -> int:
            return size if self._steps_left() >= size else 1

        found = None
        if not self.runner.mfu or self._journal.flops_per_step is not None:  # they are counted on a single batch
            stop = sys.maxsize if self._limit is None else self._limit
            found = self._feed.stacked(self.clock.epoch, self.clock.batch, stop, wanted)
        return _gathered(self._batches(), wanted) if found is None else found

    def _tick(self, epoch_end: bool = False) -> None:
        if self._everyone.size == 1 or epoch_end:
            self._read_clock()
        elif self._is_time():
            self._everyone.request_sync()
        self._progress.tick(self.clock)
        self._events(epoch_end)
        self._wake = self._next_event()

    def _meets(self) -> bool:
        """Meet the other processes, where somebody has asked for it; whether the run is over."""
        if not self._everyone.should_sync(self.clock.step):
            return False
        self._read_clock()
        self._agreed_signal = self._everyone.any_rank_value(self._signals.received or "") or None
        self._agree()
        self._events(epoch_end=False)
        self._wake = self._next_event()
        return self._over()

    def _agree(self) -> None:
        """End the run where a callback of any process wants it; all come here."""
        wish, self._stop_request = self._everyone.any_rank_value(self._stop_request), ""
        if wish:
            self.reason = self._stopped = self.reason or wish

    def _read_clock(self) -> None:
        """Set the time; under several processes that of the first, so that all find the same things due."""
        self.clock.seconds = self.runner.now() - self._began
        if self._everyone.size > 1:
            self.clock.seconds, (rows, tokens) = self._everyone.reduce_clock(self.clock.seconds, self._uncounted)
            self.clock.rows += rows
            self.clock.tokens += tokens
            self._uncounted = [0, 0]

    def _is_time(self) -> bool:
        """Whether something is due by the time of the first process, which the others do not know."""
        if not self._everyone.is_main:
            return False
        now = replace(self.clock, seconds=self.runner.now() - self._began)
        timers = [t for t in self._all_timers() if t.every.seconds is not None and t.every.epochs is None]
        return self.until.reached(now) or any(timer.due(now) for timer in timers)

    @property
    def _signal(self) -> str | None:
        """The signal that ends the run."""
        return self._signals.received if self._everyone.size == 1 else self._agreed_signal

    def _over(self) -> bool:
        if self._signal and not self.reason:
            self.reason = self._signal
        elif self.until.reached(self.clock) and not self.reason:
            self.reason = repr(self.until)
        return bool(self.reason)

    # ---------------------------------------------------------------------------------------- events

    def _events(self, epoch_end: bool) -> None:
        if self._log_timer.due(self.clock):
            self._log()
        save = False
        for number, (validate, timer) in enumerate(zip(self.validations, self._timers, strict=True)):
            if (epoch_end or validate.every.epochs is None) and timer.due(self.clock):
                if not self._validate(number):
                    return  # a signal: what is left is done when the run goes on
                timer.restart(self.clock)
                save = save or self._makes_best()
        if save or (self._save_timer is not None and self._save_due(self._save_timer, epoch_end)):
            self._save(again=save)

    def _validate_last(self) -> bool:
        """Measure what asks for it at the end and was not measured at this step; whether there was any."""
        measured = False
        for number, (validate, timer) in enumerate(zip(self.validations, self._timers, strict=True)):
            if not validate.last or self.reason == self._signal or timer.since == self.clock.step:
                continue
            if not self._validate(number):
                self.reason = str(self._signal)  # the run that goes on does it
                break
            timer.restart(self.clock)
            measured = True
        return measured

    def _makes_best(self) -> bool:
        """Whether what was just measured is among the best, and so is to be kept."""
        checkpointer = self.runner.checkpoint
        if checkpointer is None:
            return False
        return bool(self._everyone.broadcast_object(self._everyone.is_main and checkpointer.wants(self._journal.fresh)))

    def _save_due(self, timer: Timer, epoch_end: bool) -> bool:
        return (epoch_end or timer.every.epochs is None) and timer.due(self.clock)

    def _log(self) -> None:
        if self._everyone.size > 1:
            self._read_clock()
        self._log_timer.restart(self.clock)
        if self._store is not None:
            self._store.check()
        values = self._journal.training(self.state)
        if values:
            self._publish(values)
            self._monitors.check(self._journal.newest)
            self._show_params()
            self._agree()

    def _validate(self, number: int) -> bool:
        """Whether it was done, rather than cut off by a signal."""
        validate = self.validations[number]
        self._log()
        state = params_for(validate, self.state)
        found: dict[str, float] = {}
        for name, data in self._held_out[number]:
            values = evaluate_until(
                validate.step,
                state,
                data.epoch(0),
                self.runner.step.transforms,
                self._merger,
                limit=validate.limit,
                # Several processes finish it: none can leave the collectives of an evaluation by itself.
                stop=lambda: self._signal is not None,
                key=name,
            )
            if values is None:
                return False
            found.update({f"{name}/{key}": value for key, value in values.items()})
        self._publish(found)
        if self.runner.plateau in found or f"{self.runner.plateau}/0" in found:
            self.state = update_plateau(self.state, str(self.runner.plateau), found)
        self.runner.callbacks.call("on_validate", self._view(self._journal.newest))
        self._monitors.validated([name for name, _ in validate.loaders()], found)
        self._monitors.check(self._journal.newest)
        self._agree()
        self._read_clock()
        self._journal.mark()  # throughput is that of training alone
        return True

    def _publish(self, values: Mapping[str, Any]) -> None:
        self._journal.publish(values)
        if self.runner.callbacks.listens("on_log"):
            self.runner.callbacks.call("on_log", self._view(values))

    def _show_params(self, last: bool = False) -> None:
        params = None if self._shards_params else getattr(self.state, "params", None)
        self._sinks.show_params(self.clock.step, params, last)

    # ---------------------------------------------------------------------------------------- saving

    def _save(self, again: bool = False) -> None:
        """A checkpoint of this very moment, unless there is one already that knows as much."""
        place = self._place()
        if self.runner.checkpoint is None or self._save_timer is None or (self._saved_at == place and not again):
            return
        if self._everyone.size > 1:
            self._read_clock()
            if not self._compared:
                self._compared = True
                consistency.check_fields(self.state, dist.group.WORLD, self.runner.step.shard_specs(self.state))
        self._save_timer.restart(self.clock)
        extra = gather_rank_state(
            self._everyone,
            {
                "rng": rng.capture(),
                "meter": self._journal.meter.state_dict(),
                "feed": self._feed.state_dict(self.clock.epoch, self.clock.batch),
            },
        )
        if self._store is not None:
            meta, metrics = self._checkpoint_meta(), self._journal.fresh
            self._store.save(self.clock.step, self._without_frozen(self.state), extra=extra, meta=meta, metrics=metrics)
        self._saved_at = place
        self.runner.callbacks.call("on_checkpoint", self._view(self._journal.newest))
        self._agree()

    def _checkpoint_meta(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors: plain data."""
        return {
            "clock": self.clock.state_dict(),
            "timers": [timer.state_dict() for timer in self._all_timers()],
            "journal": self._journal.state_dict(),
            "callbacks": self.runner.callbacks.state_dict(),
            "stopped": self._stopped,
            "processes": self._everyone.size,
            **self._description,
            **({} if self._fingerprint is None else {"frozen": self._fingerprint}),
        }

    def _without_frozen(self, state: Any) -> Any:
        """What of `state` a checkpoint holds."""
        return state if self._fingerprint is None else frozen_params.without(state)

    def _resume(self, resume: str | os.PathLike[str]) -> None:
        """Take up the run where the checkpoint left it, if there is one."""
        if self.runner.checkpoint is not None and self._everyone.is_main:
            self.runner.checkpoint.interrupted.unlink(missing_ok=True)
        found = self._find(resume)
        if found is None:
            if self.runner.checkpoint is not None and self._everyone.is_main:
                self._sinks.rewind(self.runner.checkpoint.begin(resume, self._sinks.positions()))
            return
        self.state, extra, meta, _ = found
        own, meters = own_rank_state(self._everyone, extra, meta.get("processes", 1))
        self.clock.load_state_dict(meta["clock"])
        self._began = self.runner.now() - self.clock.seconds
        for timer, saved in zip(self._all_timers(), meta["timers"], strict=False):
            timer.load_state_dict(saved)
        self._journal.load_state_dict(meta["journal"])
        self._journal.meter.load_state_dict(*meters)
        self.runner.callbacks.load_state_dict(meta["callbacks"])
        self._feed.load_state_dict(own.get("feed", {}))
        self._resumed = self.clock.step
        if resume == "auto":  # a run that a callback ended is over
            self.reason = self._stopped = meta["stopped"]
        self._saved_at = self._place()
        restore_rng(own["rng"], extra["rng"])

    def _find(self, resume: str | os.PathLike[str]) -> tuple[Any, Any, Any, Path] | None:
        """What to go on from: the first process knows what there is, and all read it."""
        choice = [(str(path), optional) for path, optional in self._candidates(resume)]
        paths = ((Path(path), optional) for path, optional in self._everyone.broadcast_object(choice))
        found: tuple[Any, Any, Any, Path] | None = first_whole(paths, self._read_by_all, self._set_aside)
        return found

    def _candidates(self, resume: str | os.PathLike[str]) -> Iterator[tuple[Path, bool]]:
        return candidates(self.runner.checkpoint, resume) if self._everyone.is_main else iter(())

    def _set_aside(self, path: Path, instead: Path, why: CorruptCheckpointError) -> None:
        if not self._everyone.is_main:
            return
        assert self._store is not None
        self._store.quarantine(path)
        warnings.warn(
            f"the checkpoint {path.name} is damaged and was set aside; the run goes on from {instead.name}: {why}",
            InexactWarning,
            stacklevel=2,
        )

    def _read_by_all(self, path: Path) -> tuple[Any, Any, Any, Path]:
        """What each reads of it; raises `CorruptCheckpointError` where what any of them needs is damaged."""
        found, damage = None, None
        try:
            found = self._read(path)
        except CorruptCheckpointError as error:
            damage = error
        first = self._everyone.any_rank_value(str(damage or ""))
        try:
            if first or found is None:
                raise damage or CorruptCheckpointError(first)
            return found
        finally:
            del damage  # its traceback has this frame, and would keep the run alive

    def _read(self, path: Path) -> tuple[Any, Any, Any, Path]:
        meta = checkpoint.metadata(path)["meta"]
        state = self.state if "frozen" not in meta else frozen_params.without(self.state, meta["frozen"], path)
        state = checkpoint.restore(path, state, step=self.runner.step)
        return frozen_params.with_those_of(state, self.state), checkpoint.load(path, item="extra"), meta, path

    # ---------------------------------------------------------------------------------------- endings

    def _failed(self, error: BaseException) -> None:
        """Say where it failed, and save what is whole."""
        clock = self.clock
        if not self._training:
            return
        error.add_note(f"raised {self._where()} (epoch {clock.epoch}, batch {clock.batch})")
        # Several processes make a checkpoint together, for which it is too late.
        alone = self._everyone.size == 1
        # What the checkpoint's own disk did would only happen again; other disks are no reason to save nothing.
        savable = isinstance(error, Exception) and not isinstance(error, CheckpointError)
        if alone and savable and self._is_whole():
            try:
                self._save()
            except Exception as second:  # the first error is the one to show
                error.add_note(f"and no checkpoint could be made of step {clock.step}: {second}")
        self.runner.callbacks.call("on_exception", self._view(self._journal.newest), error)

    def _where(self) -> str:
        if not self._training:
            return "before its first step"
        return f"after step {self.clock.step}" if self._before is None else f"in step {self.clock.step + 1}"

    def _is_whole(self) -> bool:
        """Whether the state is that of the clock's step: an error may come at any moment, as from a signal handler."""
        donating = any(transform.donates for transform in self.runner.step.transforms)
        half_done = self._before is not None and (donating or self.state is not self._before)
        return self.clock.step > 0 and not is_retired(self.state) and not half_done

    def _close(self, because: BaseException | None = None) -> None:
        self._progress.stop()
        try:
            self._sinks.close()
        except Exception as error:
            if because is None:
                raise
            because.add_note(f"besides, a sink could not close: {type(error).__name__}: {error}")

    def _result(self) -> Result:
        journal = self._journal
        files = result_page.files(self.runner.checkpoint, self._sinks) if self._everyone.is_main else {}
        return Result(self.state, journal.newest, self.clock, self.reason, self.runner.step, journal.history, files)

    def _no_batch(self) -> None:
        if self.clock.epoch == 0:
            raise BatchError(
                "the data is empty: it gave no batch. Check the dataset's length, and that batch_size with"
                " drop_last=True is not larger than it; a generator that was used before is empty too."
            )
        if self._resumed == self.clock.step:
            raise BatchError(
                f"the run went on from step {self.clock.step}, in epoch {self.clock.epoch}, and its data gave no batch,"
                f" where it is to train until {self.until!r}: nothing would be trained. A generator, or an iterator"
                " that was used before, has one epoch: give data that can be iterated anew, or until= what was reached."
            )
        self.reason = f"the data ended after {self.clock.epoch} epochs"

    def _check_went_on(self, began: int) -> None:
        """Raise `BatchError` where an epoch was to go on from the batch `began`, and nothing came."""
        length, ended = self._feed.length, self.clock.batch == began and not self.reason
        limited = self._limit is not None and began >= self._limit
        if began and ended and not limited and length is not None and began != length:
            raise BatchError(
                f"the run goes on at batch {began} of epoch {self.clock.epoch}, and its data gave none, while an epoch"
                f" has {length}: it is not the data of the checkpoint, or its state there says that it is over."
            )

    def _stop(self, reason: str) -> None:
        if self._everyone.size == 1:
            self.reason = self._stopped = self.reason or reason
            return
        self._stop_request = self._stop_request or reason
        if not self._in_sync:
            self._everyone.request_sync()

    def _place(self) -> tuple[Any, ...]:
        """What tells two checkpoints apart."""
        return self.clock.step, self.clock.epoch, self.clock.batch, self._stopped

    def _wake_up(self) -> None:
        self._wake = 0
        self._everyone.request_sync()

    def _view(self, metrics: Any, batch: Any = None) -> CallbackContext:
        return CallbackContext(self.clock, self.state, metrics, batch, stop=self._stop, log=self._publish)

    # ---------------------------------------------------------------------------------------- when

    def _all_timers(self) -> list[Timer]:
        saving = [] if self._save_timer is None else [self._save_timer]
        return [self._log_timer, *saving, *self._timers]

    def _next_event(self) -> int:
        """The step before which nothing but steps happens."""
        if self._signal:
            return 0
        return min(*(timer.next_step for timer in self._all_timers()), self.until.steps() or NEVER)

    def _steps_left(self) -> int:
        """Steps until the next event that must not be passed over."""
        due = [timer.next_step for timer in self._all_timers() if timer is not self._log_timer]
        return max(1, min([*due, self.until.steps() or NEVER]) - self.clock.step)

    def _epoch_length(self) -> int | None:
        length = self._feed.length
        return min((n for n in (length, self._limit) if n is not None), default=None)

    def _total(self) -> int | None:
        ends = [self.until.steps()]
        epochs, length = self.until.epochs(), self._epoch_length()
        if epochs is not None and length is not None:
            ends.append(self.clock.step + (epochs - self.clock.epoch) * length - self.clock.batch)
        return min((n for n in ends if n is not None), default=None)


def _gathered(batches: Iterator[Any], wanted: Callable[[], int]) -> Iterator[tuple[Any, int]]:
    """Single batches in groups: stacked where a group is complete and its batches are alike, else one by one."""
    for first in batches:
        group = [first, *itertools.islice(batches, (count := wanted()) - 1)]
        if len(group) == count > 1 and _alike(group):
            yield stack(group), count
            continue
        for batch in group:
            yield batch, 1


def _alike(group: list[Any]) -> bool:
    shapes = [[leaf.shape for leaf in tree.tensors(batch)] for batch in (group[0], group[-1])]
    return shapes[0] == shapes[1]


def without_unroll(step: Step) -> tuple[StepFn, int]:
    """The step without its `unroll`, for what does not fill a group, and by how many it unrolls."""
    unrolls = [t for t in step.transforms if isinstance(t, unroll)]
    if not unrolls:
        return step, 1
    others = [t for t in step.transforms if not isinstance(t, unroll)]
    return compose(*others)(step.user), unrolls[0].k


def _step_of(state: Any) -> int:
    step = getattr(state, "step", None)
    return int(step.max()) if isinstance(step, Tensor) else 0
