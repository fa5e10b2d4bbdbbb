"""`RunCheckpoints`: what the checkpoints of a run contain, and how a run resumes from one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from lumen.checkpoint import rng
from lumen.checkpoint.shard_specs import is_sharded
from lumen.parallel.comm import consistency
from lumen.train import frozen_params
from lumen.train.checkpoint_reader import CheckpointReader, Restored
from lumen.train.rank_rng import restore_rng
from lumen.train.rank_state import gather_rank_state, own_rank_state
from lumen.train.rewinder import Rewinder
from lumen.train.run_context import RunContext
from lumen.train.step_batches import StepBatches


class RunCheckpoints:
    """Saves and restores a run; without a checkpointer it does nothing.

    Rank 0 writes a state that is the same on all ranks. Of a sharded state each rank writes its shards.
    """

    def __init__(self, run: RunContext, batches: StepBatches) -> None:
        step, group, checkpointer = run.settings.step, run.group, run.settings.checkpoint
        self.shards_params = any(t.opaque_state or (t.shards and group.size > 1) for t in step.transforms)
        # Rank 0 writes a state that is the same on all ranks; of a sharded one each rank writes its shards.
        self.is_sharded = self.shards_params or is_sharded(run.state)
        self._run = run
        self._batches = batches
        self._checkpointer = checkpointer
        saves = checkpointer is not None and (self.is_sharded or group.is_main)
        self._store = checkpointer.store if checkpointer is not None and saves else None
        self._reader = CheckpointReader(run, self._store, self.shards_params)
        self._omits_frozen = checkpointer is not None and not checkpointer.frozen
        if self._omits_frozen:
            self._reader.fingerprint()
        self._saved_at: tuple[Any, ...] = ()
        self.rewinder: Rewinder | None = None  # made when the run begins
        self._compared_ranks = False

    def open_store(self) -> AbstractContextManager[Any]:
        """A context in which the store is open for this run."""
        if self._store is None:
            return nullcontext()
        return self._store.open(self._run.settings.step if self.is_sharded else None)

    def check(self) -> None:
        """Raise `CheckpointError` if a save has failed in the background."""
        if self._store is not None:
            self._store.check()

    def wait(self) -> None:
        """Wait until every save is on disk."""
        if self._store is not None:
            self._store.wait()

    def mark_interrupted(self) -> None:
        """Record that the run waits to be started again."""
        if self._checkpointer is not None and self._run.group.is_main:
            self._checkpointer.mark_interrupted(self._run.stop.reason, self._run.clock.step)

    def report_interrupted(self) -> None:
        """Say on stderr where a run that a signal ended was saved, and how to resume it."""
        run, newest = self._run, None if self._checkpointer is None else self._checkpointer.latest()
        if not run.group.is_main:
            return
        if newest is None:
            advice = '; nothing was saved. To save, write lm.Runner(step, checkpoint=lm.Checkpointer("runs/a")).'
        else:
            advice = f', saved at {newest}. To go on, write fit(..., resume="auto").'
        sys.stderr.write(f"{run.stop.reason}: stopped after step {run.clock.step}{advice}\n")

    # ---------------------------------------------------------------------------------------- saving

    def is_best(self) -> bool:
        """Whether a checkpoint with the numbers of this step is among the best, and so is to be saved."""
        if self._checkpointer is None:
            return False
        group = self._run.group
        return bool(group.broadcast_object(group.is_main and self._checkpointer.is_best(self._run.logger.current)))

    def save(self, again: bool = False, metrics: Mapping[str, float] | None = None) -> None:
        """Save a checkpoint, unless there is one of this position; `again` saves in any case.

        Its metrics are those of this step, unless they are given.
        """
        run, position = self._run, self._run.position()
        if run.schedule.save is None or (self._saved_at == position and not again):
            return
        with run.goodput.during("checkpoint"):
            run.clock_updater.read_on_all_ranks()
            self._compare_ranks()
            run.schedule.save.restart(run.clock)
            self._save(metrics)
        self._saved_at = position
        if self.rewinder is not None:
            self.rewinder.saved()
        run.callback("on_checkpoint")
        run.stop.sync_requests()

    def _save(self, metrics: Mapping[str, float] | None) -> None:
        run = self._run
        extra = gather_rank_state(run.group, self._rank_state())
        if self._store is not None:
            meta, metrics = self._meta(), run.logger.current if metrics is None else metrics
            self._store.save(run.clock.step, self._without_frozen(run.state), extra=extra, meta=meta, metrics=metrics)

    def _compare_ranks(self) -> None:
        """Check with the first checkpoint that the states of all ranks have the same fields."""
        run = self._run
        if run.group.size > 1 and not self._compared_ranks:
            self._compared_ranks = True
            consistency.check_fields(run.state, dist.group.WORLD, run.settings.step.shard_specs(run.state))

    def _rank_state(self) -> dict[str, Any]:
        """The tensors that each rank has of its own."""
        return {
            "rng": rng.capture(),
            "metrics": self._run.logger.accumulator.state_dict(),
            "epoch_metrics": self._run.logger.epoch_metrics.accumulator.state_dict(),
            "feed": self._batches.state_dict(),
        }

    def _meta(self) -> dict[str, Any]:
        """The plain data of a checkpoint."""
        run, saver = self._run, self._checkpointer
        monitor = {} if saver is None or saver.monitor is None else {"metric": saver.monitor, "mode": saver.mode}
        return {
            "clock": run.clock.state_dict(),
            "timers": run.schedule.state_dict(),
            "run_log": run.logger.state_dict(),
            "callbacks": run.settings.callbacks.state_dict(),
            "stopped": run.stop.stopped,
            "goodput": run.goodput.state_dict(),
            "processes": run.group.size,
            **run.settings.description,
            **({"monitor": monitor} if monitor else {}),
            **({"frozen": self._reader.fingerprint()} if self._omits_frozen else {}),
            **({} if self.rewinder is None else {"rewind": self.rewinder.state_dict()}),
        }

    def _without_frozen(self, state: Any) -> Any:
        """The state to save: without frozen params, if the checkpointer omits them."""
        return frozen_params.without(state) if self._omits_frozen else state

    # ---------------------------------------------------------------------------------------- going back

    def rewind(self) -> bool:
        """Go back to an earlier checkpoint if the guard skipped too many updates; returns whether the run did.

        The checkpoint is saved again with the position of the next batch, so that a resumed run leaves out the same
        ones.
        """
        run, rewinder, checkpointer = self._run, self.rewinder, self._checkpointer
        if rewinder is None or checkpointer is None or not rewinder.is_due():
            return False
        self.wait()
        step = rewinder.choose(run.group.broadcast_object(checkpointer.store.steps() if run.group.is_main else None))
        restored, before = self._reader.read(checkpointer.store.path(step)), run.clock.step
        metrics = checkpointer.store.metrics(step) if run.group.is_main else {}
        if self._store is not None:
            self._store.delete_after(step)
        position = {name: getattr(run.clock, name) for name in ("epoch", "batch", "seconds")}
        run.clock.load_state_dict({**restored.meta["clock"], **position})
        run.clock_updater.discard()
        run.goodput.undo(restored.meta["goodput"])
        self._load(restored)
        rewinder.went_back(before, restored.meta)
        self.save(again=True, metrics=metrics)
        run.logger.progress.note(f"went back from step {before} to {restored.path}: lm.guard had skipped updates")
        return True

    # ---------------------------------------------------------------------------------------- resuming

    def resume(self, resume: str | os.PathLike[str]) -> None:
        """Restore the run from its checkpoint, if there is one."""
        run = self._run
        if self._checkpointer is not None and run.group.is_main:
            self._checkpointer.clear_interrupted()
        restored = self._reader.find(resume)
        if run.settings.rewind is not None:
            self.rewinder = Rewinder(run.settings.rewind, run)
        if restored is not None:
            self._apply(restored, same_run=resume == "auto")
        elif self._checkpointer is not None and run.group.is_main:
            sinks = run.logger.sinks
            sinks.rewind(self._checkpointer.begin(resume, sinks.positions()))

    def _apply(self, restored: Restored, same_run: bool) -> None:
        run, path, meta = self._run, restored.path, restored.meta
        run.clock.load_state_dict(meta["clock"])
        run.clock_updater.resume()
        run.goodput.load_state_dict(meta["goodput"], same_run)
        own = self._load(restored)
        self._batches.load_state_dict(own.get("feed", {}))
        if same_run:  # a run that a callback ended stays ended
            run.stop.reason = run.stop.stopped = meta["stopped"]
        if self.rewinder is not None:
            self.rewinder.load_state_dict(meta.get("rewind", self.rewinder.state_dict()))
        self._saved_at = run.position()
        run.logger.progress.note(f"resumed from {path}: step {run.clock.step}, epoch {run.clock.epoch}")

    def _load(self, restored: Restored) -> Mapping[str, Any]:
        """Load the state, timers, metrics, callbacks and generators of a checkpoint; returns this rank's own state."""
        run = self._run
        _, run.state, extra, meta = restored
        own, metrics = own_rank_state(run.group, extra, meta.get("processes", 1))
        run.schedule.load_state_dict(meta["timers"])
        run.logger.load_state_dict(meta["run_log"])
        run.logger.load_metrics(metrics)
        run.settings.callbacks.load_state_dict(meta["callbacks"])
        restore_rng(own["rng"], extra["rng"])
        return own
