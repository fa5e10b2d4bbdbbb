"""`CheckpointReader`: finds and reads the checkpoint that a run resumes from, or goes back to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lumen import checkpoint
from lumen.checkpoint import Store
from lumen.core.urls import basename, parse_location
from lumen.errors import CorruptCheckpointError, InexactWarning
from lumen.train import frozen_params
from lumen.train.checkpointer import candidates, first_undamaged
from lumen.train.run_context import RunContext


class Restored(NamedTuple):
    """The contents of the checkpoint at `path`: the `state`, other tensors (`extra`) and plain data (`meta`)."""

    path: Path | str
    state: Any
    extra: Any
    meta: Any


class CheckpointReader:
    """Reads checkpoints on all ranks of a run.

    `store` is where this process quarantines damaged ones, and `shards_params` says whether each rank has its own.
    """

    def __init__(self, run: RunContext, store: Store | None, shards_params: bool) -> None:
        self._run = run
        self._store = store
        self._shards_params = shards_params
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """The fingerprint of the run's frozen params, which never change; all ranks ask for it first together."""
        if self._fingerprint is None:
            state = self._run.state
            self._fingerprint = frozen_params.fingerprint(state, self._run.settings.step.shard_specs(state))
        return self._fingerprint

    def find(self, resume: str | os.PathLike[str]) -> Restored | None:
        """Read the checkpoint to resume from: rank 0 lists the candidates, and all ranks read them."""
        choices = self._run.group.broadcast_object([(str(path), last) for path, last in self._candidates(resume)])
        if choices and self._shards_params and getattr(getattr(self._run.state, "apply_fn", None), "frozen", ()):
            self.fingerprint()  # all ranks together, before one that cannot read a file leaves the others
        paths = ((parse_location(path), optional) for path, optional in choices)
        restored: Restored | None = first_undamaged(paths, self.read, self._quarantine)
        return restored

    def _candidates(self, resume: str | os.PathLike[str]) -> Iterator[tuple[Path | str, bool]]:
        return candidates(self._run.settings.checkpoint, resume) if self._run.group.is_main else iter(())

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

    def read(self, path: Path | str) -> Restored:
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
            frozen_params.check(self.fingerprint(), meta["frozen"], path)
            like = frozen_params.without(initial)
        state = checkpoint.restore(path, like, step=self._run.settings.step)
        return Restored(path, frozen_params.with_frozen(state, initial), checkpoint.load(path, item="extra"), meta)
