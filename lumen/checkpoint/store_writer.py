"""The writing side of a store: the lock on its directory, the copy in host memory, and the background save."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from lumen.checkpoint import _load, _orbax, header, shard_specs, step_metrics
from lumen.checkpoint.coordinator import SaveCoordinator, SaveSession
from lumen.checkpoint.lock import Lock
from lumen.checkpoint.object_directory import ObjectDirectory
from lumen.checkpoint.retention import Retention
from lumen.checkpoint.save_queue import QueuedSave, SaveQueue
from lumen.checkpoint.snapshot import HostMemory, Snapshot, take_snapshot
from lumen.checkpoint.store_directory import StoreDirectory, reported_errors
from lumen.core import distributed
from lumen.core.annotations import integer_of
from lumen.core.step import StepFn
from lumen.core.urls import basename
from lumen.errors import CheckpointError, CheckpointExistsError, CheckpointLockedError, InexactWarning

Directory = StoreDirectory | ObjectDirectory

_UPLOADS = 2  # checkpoints that wait on the local disk while the store does not answer


class StoreWriter:
    """Saves to a directory until it is closed.

    Without `step_fn` one process writes. With it, all processes of the world save together, and rank 0 locks the
    directory and deletes old checkpoints.
    """

    def __init__(self, directory: Directory, retention: Retention, step_fn: StepFn | None, timeout: float) -> None:
        distributed_save = step_fn is not None and distributed.world_size() > 1
        self.process = os.getpid()
        self.closed = False
        self._directory = directory
        self._retention = retention
        self._step_fn = step_fn
        self._is_main = not distributed_save or distributed.rank() == 0
        self._memory = HostMemory()
        self._queue = SaveQueue(_UPLOADS if isinstance(directory, ObjectDirectory) and not distributed_save else 1)
        self._lock = self._acquire_lock() if self._is_main else None
        self._coordinator = SaveCoordinator(timeout) if distributed_save else None

    def _acquire_lock(self) -> Lock:
        try:
            lock = self._directory.lock()
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"checkpoints cannot be written to {self._directory.path}: {error.strerror or error}. Use a directory"
                " that this user may write to."
            ) from error
        try:
            _orbax.load()
        except BaseException:
            lock.release()
            raise
        return lock

    def close(self) -> None:
        """Wait for the running save, then unlock the directory and free the memory; raises what the save raised."""
        try:
            self.wait()
        finally:
            if not self._queue.running():  # it is, if the wait was interrupted: the save still needs both
                if self._lock is not None:
                    self._lock.release()
                self._directory.clear_cache()
                self._memory.release()
                self.closed = True

    def shorten_timeout(self) -> None:
        """Wait only briefly for other processes from now on, because the run has failed."""
        if self._coordinator is not None:
            self._coordinator.shorten_timeout()

    def save(
        self,
        step: int,
        tree: Any,
        extra: Any,
        meta: Mapping[str, Any] | None,
        metrics: Mapping[str, Any] | None,
    ) -> None:
        """Copy `tree` and `extra` to host memory, and start to write them; see `Store.save`."""
        session = None if self._coordinator is None else self._coordinator.next()
        with (
            nullcontext() if session is None else session.sharing_failures(),
            reported_errors(self._directory.path),
        ):
            step = _step_number(step)
            self._queue.make_room(step)
            self.check()
            self._check_writable(step)
            numbers = step_metrics.to_floats(metrics or {})
            fields = {"meta": header.check_json(dict(meta or {}), "meta"), "metrics": step_metrics.to_json(numbers)}
            snap = self._snapshot(tree, extra)
            save = self._queue.add(step, numbers)
            save.start(partial(self._write, save, snap, fields, session))

    def _check_writable(self, step: int) -> None:
        """Check that the checkpoint of `step` can be written, and that this process still holds the lock."""
        if not self._is_main:
            return
        self._ensure_locked()
        path = self._directory.blocked_by(step)
        if path is None:
            return
        if not _load.lost_header(path):
            raise CheckpointExistsError(f"{path} exists and is no checkpoint: move it away.")
        new = self.quarantine(path)
        warnings.warn(
            f"the checkpoint {path} has lost its header; it was renamed to {basename(new)}, and step {step} is"
            " saved again.",
            InexactWarning,
            stacklevel=5,
        )

    def _ensure_locked(self) -> None:
        """Lock the directory again if it was deleted during the run; another process may hold the lock by now."""
        assert self._lock is not None
        if isinstance(self._directory.path, str) or self._lock.holds(self._directory.path):
            return  # of a URL, who owns it is checked before a checkpoint appears
        self._lock.release()
        self._lock = self._acquire_lock()
        self._directory.clear_cache()
        warnings.warn(
            f"{self._directory.path} was deleted or moved away during the run, together with its checkpoints. The"
            " directory was created again, and new checkpoints are saved there.",
            InexactWarning,
            stacklevel=6,
        )

    def _snapshot(self, tree: Any, extra: Any) -> Snapshot:
        advice = f"with lm.checkpoint.Store({str(self._directory.path)!r}).open(step) as store: store.save(...)"
        shard_specs.check(self._step_fn, tree, advice)
        items = {"state": shard_specs.strip_sharding(self._step_fn, tree), "extra": {} if extra is None else extra}
        specs = shard_specs.leaf_specs(self._step_fn, tree)
        return take_snapshot(items, self._memory, specs, with_unsharded=self._is_main)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of steps after `step`; of several processes, the first one does."""
        self.wait()
        if not self._is_main:
            return
        self._ensure_locked()
        with reported_errors(self._directory.path):
            for later in reversed(self._directory.steps()):
                if later > step:
                    self._directory.delete(later)

    def quarantine(self, path: Path | str) -> Path | str:
        """Rename a damaged checkpoint after the running save; see `StoreDirectory.quarantine`."""
        self.wait()
        return self._directory.quarantine(path)

    def check(self) -> None:
        """Raise `CheckpointError` if a save has failed; each failure is raised once."""
        failures = self._queue.failures()
        if not failures:
            return
        label, error = failures[0]
        later = "".join(f" Saving {label} failed: {error}." for label, error in failures[1:])
        kind = CheckpointLockedError if isinstance(error, CheckpointLockedError) else CheckpointError
        raise kind(
            f"saving {label} to {self._directory.path} failed: {error}.{later} Complete checkpoints there:"
            f" {self._directory.steps() or 'none'}."
        ) from error

    def wait(self) -> None:
        """Return when all saves have ended; raises `CheckpointError` if one failed."""
        if self.process == os.getpid():  # a forked child has this object, but not its thread
            self._queue.join()
            self.check()

    def saved_metrics(self) -> dict[int, dict[str, float]]:
        """The metrics of each checkpoint, with those of saves that wait for the store."""
        if self._queue.depth == 1:
            self.wait()
        self.check()
        return self._directory.metrics_by_step() | self._queue.metrics()

    def _write(self, save: QueuedSave, snap: Snapshot, fields: dict[str, Any], session: SaveSession | None) -> None:
        if session is None:
            self._write_main(save, snap, fields)
            return
        with session.sharing_failures():
            if self._is_main:
                self._write_main(save, snap, fields, session)
                session.finish()
            else:
                self._directory.write_shard(session, snap)

    def _write_main(
        self, save: QueuedSave, snap: Snapshot, fields: dict[str, Any], session: SaveSession | None = None
    ) -> None:
        if isinstance(self._directory, ObjectDirectory):
            self._directory.write(save.step, snap, fields, save.metrics, session, save.await_turn)
        else:
            self._directory.write(save.step, snap, fields, save.metrics, session)
        saved = self._directory.metrics_by_step()
        for old in sorted(saved.keys() - self._retention.steps_to_keep(saved) - {save.step}):
            try:
                self._directory.delete(old)
            except OSError as error:
                raise CheckpointError(f"it is on disk, but step {old} could not be deleted: {error}") from error


def _step_number(step: Any) -> int:
    number = integer_of(step, low=0)
    if number is None:
        raise CheckpointError(f"a step is an int from 0 up, got {step!r}.")
    return number
