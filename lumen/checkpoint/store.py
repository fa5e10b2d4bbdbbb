"""`Store`: the checkpoints of one run, written in the background."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lumen.checkpoint import _load, _restore
from lumen.checkpoint.coordinator import TIMEOUT
from lumen.checkpoint.object_directory import ObjectDirectory
from lumen.checkpoint.retention import Retention
from lumen.checkpoint.store_directory import StoreDirectory
from lumen.checkpoint.store_writer import Directory, StoreWriter
from lumen.core.step import StepFn
from lumen.core.urls import local_path, path_or_url
from lumen.errors import CheckpointError, HyperparameterError


class Store:
    """The checkpoints in `directory`, each in a subdirectory named by its step.

    `save` returns when the tree has been copied to host memory; a thread writes the copy to disk. Consecutive saves
    reuse the memory of the copy.

    A store keeps the newest `keep` checkpoints (None: all). With `monitor="val/loss"` it also keeps the `keep_best`
    best by that metric, the lowest or highest as `mode` is "min" or "max": a tie goes to the later step, NaN is never
    best, and a checkpoint saved without the metric does not count. It also keeps each step that `keep_every` divides.
    An old checkpoint is deleted when the new one is on disk.

    To save, open the store: `with lm.checkpoint.Store("runs/a") as store`. Reading needs no open store, and works while
    a run writes.

    If a step's transforms shard its state over processes, every process opens the store with that step, and all save
    together: `with lm.checkpoint.Store("runs/a").open(step) as store`. Each process writes its own shards. Rank 0 also
    writes everything else, locks the directory and deletes old checkpoints. A process that gives no sign of life for
    `timeout` seconds counts as hung.

    `directory` may be a URL: `s3://bucket/a`, `gs://bucket/a` or `memory://a`. A checkpoint is then written to
    `staging`, a local directory (`~/.cache/lumen/uploads`), and uploaded from there, its header last. Its path is then
    a URL, as str. Raises `PathError` for another URL, and for one whose package is not installed.

    >>> import lumen as lm, torch, tempfile
    >>> with lm.checkpoint.Store(tempfile.mkdtemp(), keep=2) as store:
    ...     for step in range(5):
    ...         store.save(step, {"weight": torch.full((2,), float(step))})
    ...     store.wait()
    ...     store.steps(), store.restore(store.latest(), {"weight": torch.zeros(2)})
    ([3, 4], {'weight': tensor([4., 4.])})
    """

    directory: Path | str
    blocked: float  # seconds that saves have blocked so far

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 1,
        monitor: str | None = None,
        mode: str = "min",
        keep_best: int = 1,
        keep_every: int | None = None,
        timeout: float = TIMEOUT,
        staging: str | os.PathLike[str] | None = None,
    ) -> None:
        self.directory = path_or_url(directory, "the directory of a Store")
        self.blocked = 0.0
        self._retention = Retention(keep, monitor, mode, keep_best, keep_every)
        self._checkpoints = _checkpoints_at(self.directory, staging)
        self._timeout = timeout
        self._step_fn: StepFn | None = None  # whose states are saved
        self._writer: StoreWriter | None = None  # while the store is open

    def __repr__(self) -> str:
        return f"lm.checkpoint.Store({str(self.directory)!r})"

    # ------------------------------------------------------------------------------------------- writing

    def open(self, step: StepFn | None = None) -> Self:
        """Create and lock the directory, remove what a crashed run left behind, and load Orbax.

        With `step`, the states to be saved are that step's, and all processes open the store together.

        Raises `CheckpointLockedError` if another run has locked the directory, and `CheckpointError` if it is not
        writable.
        """
        if self._writer is not None:
            raise CheckpointError(f"{self!r} is already open.")
        self._writer = StoreWriter(self._checkpoints, self._retention, step, self._timeout)
        self._step_fn = step
        return self

    def close(self) -> None:
        """Wait for the running save, unlock the directory and free the memory; raises what the save raised."""
        writer = self._writer
        if writer is None:
            return
        try:
            writer.close()
        finally:
            if writer.closed:
                self._writer = None

    def __enter__(self) -> Self:
        return self if self._writer is not None else self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if self._writer is not None:
            self._writer.shorten_timeout()
        try:
            self.close()
        except CheckpointError as save_error:  # the user must see the first error
            error.add_note(f"besides, {save_error}")

    def save(
        self,
        step: int,
        tree: Any,
        *,
        extra: Any = None,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `tree` as the checkpoint of `step`; returns when the tree is copied.

        It waits for an earlier save that is still running, and raises the error of that one. To a URL, a single process
        waits for the last save but one: it saves once more while an upload is tried again. An existing checkpoint of
        the step is replaced. `extra` is a second tree, and `meta` any JSON: see `lm.checkpoint.save`. `metrics` are
        numbers or 0-d tensors, among which `monitor` is looked up.
        """
        began = time.perf_counter()
        try:
            _writer_of(self).save(step, tree, extra, meta, metrics)
        finally:
            self.blocked += time.perf_counter() - began

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of steps after `step`, the newest first, once the running save is on disk."""
        _writer_of(self).delete_after(step)

    def quarantine(self, path: Path | str) -> Path | str:
        """Rename a damaged checkpoint of this store, so that it no longer counts as a step; returns the new path."""
        return _writer_of(self).quarantine(path)

    def check(self) -> None:
        """Raise `CheckpointError` if a save has failed in the background; each failure is raised once."""
        if self._writer is not None:
            self._writer.check()

    def wait(self) -> None:
        """Return when all saves are on disk, or in the object store; raises `CheckpointError` if one failed."""
        if self._writer is not None:
            self._writer.wait()

    # ------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return self._checkpoints.steps()

    def damaged(self) -> list[int]:
        """The steps whose checkpoint has lost its header, ascending; `steps` does not list them.

        >>> import lumen as lm, tempfile
        >>> lm.checkpoint.Store(tempfile.mkdtemp()).damaged()
        []
        """
        return self._checkpoints.damaged()

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The best step by `monitor`, or None if there is no metric, or no checkpoint that has it."""
        return next(iter(self._retention.ranked(self._checkpoints.metrics_by_step())), None)

    def would_keep(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be among the best, after the running saves."""
        saved = self._checkpoints.metrics_by_step() if self._writer is None else self._writer.saved_metrics()
        return self._retention.would_keep(saved, metrics)

    def path(self, step: int) -> Path | str:
        """The path, or URL, of the checkpoint of `step`, whether it exists or not."""
        return self._checkpoints.checkpoint(step)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that the checkpoint of `step` was saved with."""
        return dict(self._checkpoints.metrics_by_step().get(step, {}))

    def metadata(self, step: int) -> dict[str, Any]:
        """See `lm.checkpoint.metadata`."""
        return _load.metadata(self._checkpoints.existing(step))

    def load(self, step: int, *, item: str = "state", under: str = "") -> Any:
        """See `lm.checkpoint.load`."""
        return _load.load(self._checkpoints.existing(step), item=item, under=under)

    def restore(
        self,
        step: int,
        like: Any,
        *,
        strict: bool = True,
        cast: bool = False,
        rename: _restore.Rename | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """See `lm.checkpoint.restore`; its `step` is the one that the store was opened with."""
        path = self._checkpoints.existing(step)
        return _restore.restore(path, like, strict=strict, cast=cast, rename=rename, device=device, step=self._step_fn)


def _checkpoints_at(directory: Path | str, staging: str | os.PathLike[str] | None) -> Directory:
    if isinstance(directory, str):
        return ObjectDirectory(directory, None if staging is None else local_path(staging, "staging"))
    if staging is not None:
        raise HyperparameterError(
            f"staging={os.fspath(staging)!r} is where checkpoints wait for their upload to a URL, and {directory} is a"
            " path: leave it out."
        )
    return StoreDirectory(directory)


def _writer_of(store: Store) -> StoreWriter:
    writer = store._writer
    if writer is None:
        raise CheckpointError(f"{store!r} is not open. Write: with {store!r} as store: store.save(...)")
    if writer.process != os.getpid():
        raise CheckpointError(f"{store!r} was opened in process {writer.process}, which alone can save to it.")
    return writer
