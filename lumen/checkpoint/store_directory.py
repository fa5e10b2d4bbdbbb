"""The directory of a store: which checkpoints it contains, with which metrics, and what a crashed run left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lumen.checkpoint import _load, _save, header, step_metrics
from lumen.checkpoint.coordinator import SaveSession
from lumen.checkpoint.fsync import sync_directory
from lumen.checkpoint.lock import Lock
from lumen.checkpoint.snapshot import Snapshot
from lumen.errors import CheckpointError, CheckpointNotFoundError

_REPLACED = re.compile(rf"\.([0-9]+){re.escape(_save.REPLACED)}")
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(rf"\.[0-9]+(\.[0-9]+)?({re.escape(_save.TEMPORARY)}|{re.escape(_save.DELETED)})(\..*)?")


class StoreDirectory:
    """The checkpoints in the directory `path`, each in a subdirectory named by its step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: dict[int, dict[str, float]] = {}  # a cache: only of checkpoints whose header was read

    def checkpoint(self, step: int) -> Path:
        """The path of the checkpoint of `step`, whether it exists or not."""
        return self.path / str(step)

    def existing(self, step: int) -> Path:
        """The path of the complete checkpoint of `step`; raises `CheckpointNotFoundError` if there is none."""
        steps = self.steps()
        if step not in steps:
            raise CheckpointNotFoundError(f"{self.path} has no checkpoint of step {step}; it has {steps or 'none'}.")
        return self.checkpoint(step)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return [step for step in self._step_names() if (self.checkpoint(step) / header.FILE).is_file()]

    def damaged(self) -> list[int]:
        """The steps whose checkpoint has lost its header, ascending."""
        return [step for step in self._step_names() if _load.lost_header(self.checkpoint(step))]

    def _step_names(self) -> list[int]:
        """The entries of the directory whose name is a step, ascending."""
        try:
            with (
                reported_errors(self.path, passing=(FileNotFoundError, NotADirectoryError)),
                os.scandir(self.path) as entries,
            ):
                names = [entry.name for entry in entries if _STEP.fullmatch(entry.name) and not entry.is_symlink()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(map(int, names))

    def blocked_by(self, step: int) -> Path | None:
        """What is where the checkpoint of `step` is to be written, and is not a complete checkpoint."""
        path = self.checkpoint(step)
        return path if os.path.lexists(path) and step not in self.steps() else None

    def metrics_by_step(self) -> dict[int, dict[str, float]]:
        """The metrics of each complete checkpoint."""
        result = {}
        for step in self.steps():
            if step not in self._metrics:
                # A checkpoint that is damaged, or was just deleted, has no metrics and is never the best.
                with contextlib.suppress(CheckpointError):
                    fields = _load.read_header(self.checkpoint(step)).fields
                    self._metrics[step] = step_metrics.from_json(fields.get("metrics"))
            result[step] = self._metrics.get(step, {})
        return result

    def lock(self) -> Lock:
        """Create the directory, lock it, and remove what a crashed run left behind."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.path)
        try:
            self._clean_up()
        except BaseException:
            lock.release()
            raise
        return lock

    def write(
        self,
        step: int,
        snap: Snapshot,
        fields: dict[str, Any],
        metrics: Mapping[str, float],
        session: SaveSession | None,
    ) -> None:
        """Write the checkpoint of `step`; with `session`, on rank 0 of the processes that write it together."""
        temporary = self.path / f".{step}{_save.TEMPORARY}"
        _save.write(self.checkpoint(step), temporary, snap, fields, replace=True, session=session)
        self._metrics[step] = dict(metrics)

    def write_shard(self, session: SaveSession, snap: Snapshot) -> None:
        """Write this process's shards on another rank than 0."""
        _save.write_shard(session, snap)

    def clear_cache(self) -> None:
        """Forget the metrics of all checkpoints; they are read again when they are needed."""
        self._metrics.clear()

    def delete(self, step: int) -> None:
        """Delete the checkpoint of `step`."""
        _save.delete(self.checkpoint(step))
        self._metrics.pop(step, None)

    def quarantine(self, path: Path | str) -> Path:
        """Rename a damaged checkpoint, so that it no longer counts as a step; returns the new path."""
        path, count = Path(path), 0
        while os.path.lexists(new := path.with_name(damaged_name(path.name, count))):
            count += 1
        with reported_errors(self.path):
            os.rename(path, new)
            sync_directory(self.path)
        self._metrics.pop(int(path.name), None)
        return new

    def _clean_up(self) -> None:
        """Remove what a crashed run left behind, and restore a checkpoint that it was about to replace."""
        for path in list(self.path.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if replaced and not os.path.lexists(self.checkpoint(int(replaced[1]))):
                os.rename(path, self.checkpoint(int(replaced[1])))
            elif replaced or _LEFTOVER.fullmatch(path.name):
                _remove(path)


@contextmanager
def reported_errors(directory: Path | str, passing: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Raise an `OSError` as a `CheckpointError`, so that a run can tell it from errors of its data and sinks."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (CheckpointError, *passing)):
            raise
        raise CheckpointError(f"the checkpoints in {directory} cannot be reached: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def damaged_name(name: str, count: int) -> str:
    """The name of a damaged checkpoint that was called `name`, where `count` others have been renamed before."""
    return f"damaged-{name}" + (f"-{count}" if count else "")
