"""`RunCheckpoints`: what the checkpoints of a run contain, and how a run resumes from one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from lumen import checkpoint
from lumen.checkpoint import rng
from lumen.checkpoint.shard_specs import is_sharded
from lumen.core.urls import basename, parse_location
from lumen.errors import CorruptCheckpointError, InexactWarning
from lumen.parallel.comm import consistency
from lumen.train import frozen_params
from lumen.train.checkpointer import candidates, first_undamaged
from lumen.train.rank_rng import restore_rng
from lumen.train.rank_state import gather_rank_state, own_rank_state
from lumen.train.run_context import RunContext
from lumen.train.step_batches import StepBatches


class Restored(NamedTuple):
    """The contents of the checkpoint at `path`: the `state`, other tensors (`extra`) and plain data (`meta`)."""

    path: Path | str
    state: Any
    extra: Any
    meta: Any


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
        self._omits_frozen = checkpointer is not None and not checkpointer.frozen
        self._fingerprint: str | None = None
        if self._omits_frozen:
            self._own_fingerprint()
        self._saved_at: tuple[Any, ...] = ()
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

    def save(self, again: bool = False) -> None:
        """Save a checkpoint, unless there is one of this position; `again` saves in any case."""
        run, position = self._run, self._run.position()
        if run.schedule.save is None or (self._saved_at == position and not again):
            return
        run.clock_updater.read_on_all_ranks()
        self._compare_ranks()
        run.schedule.save.restart(run.clock)
        extra = gather_rank_state(run.group, self._rank_state())
        if self._store is not None:
            meta, metrics = self._meta(), run.logger.current
            self._store.save(run.clock.step, self._without_frozen(run.state), extra=extra, meta=meta, metrics=metrics)
        self._saved_at = position
        run.callback("on_checkpoint")
        run.stop.sync_requests()

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
            "processes": run.group.size,
            **run.settings.description,
            **({"monitor": monitor} if monitor else {}),
            **({"frozen": self._own_fingerprint()} if self._omits_frozen else {}),
        }

    def _without_frozen(self, state: Any) -> Any:
        """The state to save: without frozen params, if the checkpointer omits them."""
        return frozen_params.without(state) if self._omits_frozen else state

    def _own_fingerprint(self) -> str:
        """The fingerprint of the run's frozen params, which never change; all ranks ask for it first together."""
        if self._fingerprint is None:
            state = self._run.state
            self._fingerprint = frozen_params.fingerprint(state, self._run.settings.step.shard_specs(state))
        return self._fingerprint

    # ---------------------------------------------------------------------------------------- resuming

    def resume(self, resume: str | os.PathLike[str]) -> None:
        """Restore the run from its checkpoint, if there is one."""
        run = self._run
        if self._checkpointer is not None and run.group.is_main:
            self._checkpointer.clear_interrupted()
        restored = self._find(resume)
        if restored is not None:
            self._apply(restored, same_run=resume == "auto")
        elif self._checkpointer is not None and run.group.is_main:
            sinks = run.logger.sinks
            sinks.rewind(self._checkpointer.begin(resume, sinks.positions()))

    def _apply(self, restored: Restored, same_run: bool) -> None:
        run = self._run
        path, run.state, extra, meta = restored
        own, metrics = own_rank_state(run.group, extra, meta.get("processes", 1))
        run.clock.load_state_dict(meta["clock"])
        run.clock_updater.resume()
        run.schedule.load_state_dict(meta["timers"])
        run.logger.load_state_dict(meta["run_log"])
        run.logger.load_metrics(metrics)
        run.settings.callbacks.load_state_dict(meta["callbacks"])
        self._batches.load_state_dict(own.get("feed", {}))
        if same_run:  # a run that a callback ended stays ended
            run.stop.reason = run.stop.stopped = meta["stopped"]
        self._saved_at = run.position()
        restore_rng(own["rng"], extra["rng"])
        run.logger.progress.note(f"resumed from {path}: step {run.clock.step}, epoch {run.clock.epoch}")

    def _find(self, resume: str | os.PathLike[str]) -> Restored | None:
        """Read the checkpoint to resume from: rank 0 lists the candidates, and all ranks read them."""
        choices = self._run.group.broadcast_object([(str(path), last) for path, last in self._candidates(resume)])
        if choices and self.shards_params and getattr(getattr(self._run.state, "apply_fn", None), "frozen", ()):
            self._own_fingerprint()  # all ranks together, before one that cannot read a file leaves the others
        paths = ((parse_location(path), optional) for path, optional in choices)
        restored: Restored | None = first_undamaged(paths, self._read_on_all_ranks, self._quarantine)
        return restored

    def _candidates(self, resume: str | os.PathLike[str]) -> Iterator[tuple[Path | str, bool]]:
        return candidates(self._checkpointer, resume) if self._run.group.is_main else iter(())

    def _quarantine(self, path: Path | str, restored: Path | str, error: CorruptCheckpointError) -> None:
        if not self._run.group.is_main or self._store is None:
            return
        self._store.quarantine(path)
        warnings.warn(
            f"the checkpoint {basename(path)} is damaged and was set aside; the run resumes from {basename(restored)}:"
            f" {error}",
            InexactWarning,
            stacklevel=2,
        )

    def _read_on_all_ranks(self, path: Path | str) -> Restored:
        """Read a checkpoint; raises `CorruptCheckpointError` on all ranks if one of them cannot read its share."""
        restored, damage = None, None
        try:
            restored = self._read(path)
        except CorruptCheckpointError as error:
            damage = error
        first_damage = self._run.group.any_rank_value(str(damage or ""))
        try:
            if first_damage or restored is None:
                raise damage or CorruptCheckpointError(first_damage)
            return restored
        finally:
            del damage  # its traceback has this frame, and would keep the run alive

    def _read(self, path: Path | str) -> Restored:
        meta, initial = checkpoint.metadata(path)["meta"], self._run.state
        like = initial
        if "frozen" in meta:
            frozen_params.check(self._own_fingerprint(), meta["frozen"], path)
            like = frozen_params.without(initial)
        state = checkpoint.restore(path, like, step=self._run.settings.step)
        return Restored(path, frozen_params.with_frozen(state, initial), checkpoint.load(path, item="extra"), meta)
