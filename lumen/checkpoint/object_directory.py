"""The checkpoints of a store in an object store: which there are, and how one is added, replaced and deleted.

An object store has no rename. A checkpoint counts when its header is there, which is one object and uploaded last. So a
checkpoint that replaces one of the same step gets another name, such as `1500.1`, and the old one is deleted after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lumen.checkpoint import _load, _save, header, step_metrics
from lumen.checkpoint.coordinator import SaveSession
from lumen.checkpoint.lock import Lock
from lumen.checkpoint.owner import Owner
from lumen.checkpoint.snapshot import Snapshot
from lumen.checkpoint.store_directory import damaged_name
from lumen.checkpoint.upload import Upload
from lumen.core.object_store import DELAYS, ObjectStore, in_parallel
from lumen.core.urls import basename
from lumen.errors import CheckpointError, CheckpointNotFoundError, ObjectStoreError

_ENTRY = re.compile(r"(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?")  # a step, and the number of its checkpoint
_OPEN_RETRIES = 2  # before the first step, and before a local copy is written: it should be known soon

Entries = dict[int, str]  # the name of the newest complete checkpoint by step


class ObjectDirectory:
    """The checkpoints below the URL `path`. A checkpoint is written to `staging`, a local directory, and uploaded."""

    def __init__(self, path: str, staging: Path | None = None) -> None:
        self.path = path
        digest = hashlib.sha256(path.encode()).hexdigest()[:16]
        self.staging = (staging or _user_cache()) / digest
        self._objects = ObjectStore(path)
        self._owner: Owner | None = None  # while the store is open
        self._owned: Entries | None = None  # the same: nobody else changes them
        self._metrics: dict[str, dict[str, float]] = {}  # by entry

    def checkpoint(self, step: int) -> str:
        """The URL of the checkpoint of `step`, whether it exists or not."""
        return f"{self.path}/{self._entries().get(step, step)}"

    def existing(self, step: int) -> str:
        """The URL of the complete checkpoint of `step`; raises `CheckpointNotFoundError` if there is none."""
        entries = self._entries()
        if step not in entries:
            steps = sorted(entries) or "none"
            raise CheckpointNotFoundError(f"{self.path} has no checkpoint of step {step}; it has {steps}.")
        return f"{self.path}/{entries[step]}"

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._entries())

    def damaged(self) -> list[int]:
        """None: without a header, it is a checkpoint whose upload has not ended."""
        return []

    def blocked_by(self, step: int) -> Path | None:
        """None: a new checkpoint gets a name that nothing else has."""
        return None

    def metrics_by_step(self) -> dict[int, dict[str, float]]:
        """The metrics of each complete checkpoint."""
        return {step: self._entry_metrics(entry) for step, entry in self._entries().items()}

    def _entry_metrics(self, entry: str) -> dict[str, float]:
        if entry not in self._metrics:
            with contextlib.suppress(CheckpointError):  # a damaged one has no metrics
                fields = _load.read_header(f"{self.path}/{entry}").fields
                self._metrics[entry] = step_metrics.from_json(fields.get("metrics"))
        return self._metrics.get(entry, {})

    def clear_cache(self) -> None:
        """Forget which checkpoints there are, and their metrics; they are read again when they are needed."""
        self._metrics.clear()
        self._owned = None

    # ------------------------------------------------------------------------------------------- writing

    def lock(self) -> Lock:
        """Take the URL over from earlier runs, and remove what one that crashed left behind.

        The lock is one on the staging directory. It keeps out runs of this machine; those of others meet their end at
        `Owner.check`.
        """
        self.staging.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.staging, shown=self.path)
        try:
            objects = ObjectStore(self.path, retries=_OPEN_RETRIES)
            previous = Owner.read(objects)
            self._send_leftovers(previous)
            self._owner = Owner(objects)
            names = objects.sizes()
            self._owned = _complete(names)
            in_parallel(self._objects.delete, [name for name in names if _is_leftover(name, self._owned)])
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
        await_turn: Callable[[Path], None],
    ) -> None:
        """Write and upload the checkpoint of `step`; with `session`, on rank 0 of those that write it together.

        A single process calls `await_turn` between the two, with the path of the local copy.
        """
        assert self._owner is not None
        folder = self.staging / self._owner.run
        folder.mkdir(exist_ok=True)
        staged = folder / str(step)
        temporary = folder / f".{step}{_save.TEMPORARY}"
        if session is None:
            _save.write(staged, temporary, snap, fields, replace=True)
            await_turn(staged)
        entry = self._free_entry_or_unique(step)
        upload = Upload(f"{self.path}/{entry}", session)
        if session is not None:
            _save.write(staged, temporary, snap, fields, replace=True, session=session, upload=upload)
        upload.publish(staged, self._owner.check)
        self._metrics[entry] = dict(metrics)
        self._appeared(step, entry)
        shutil.rmtree(staged)

    def write_shard(self, session: SaveSession, snap: Snapshot) -> None:
        """Write this process's shards on another rank than 0, and upload them."""
        _save.write_shard(session, snap, self.staging.with_name(f"{self.staging.name}-rank{session.rank}"))

    def delete(self, step: int) -> None:
        """Delete the checkpoint of `step`: its header first, so that no half of it is seen."""
        entries = dict(self._entries())
        entry = entries.pop(step)
        self._delete_objects(entry)
        if self._owned is not None:
            self._owned = entries
        self._metrics.pop(entry, None)  # last: the training loop may ask for them meanwhile

    def quarantine(self, path: Path | str) -> str:
        """Rename a damaged checkpoint, so that it no longer counts as a step; returns the new URL."""
        entry, count = basename(path), 0
        names = self._objects.sizes()
        while any(name.startswith(f"{damaged_name(entry, count)}/") for name in names):
            count += 1
        for name in names:
            if name.startswith(f"{entry}/"):
                self._objects.copy(name, f"{damaged_name(entry, count)}{name.removeprefix(entry)}")
        self._delete_objects(entry)
        if self._owned is not None:
            self._owned = {step: other for step, other in self._owned.items() if other != entry}
        self._metrics.pop(entry, None)
        return f"{self.path}/{damaged_name(entry, count)}"

    # ------------------------------------------------------------------------------------------- entries

    def _entries(self) -> Entries:
        return self._owned if self._owned is not None else _complete(self._objects.sizes())

    def _free_entry(self, step: int, retries: int = len(DELAYS)) -> str:
        """A name for a checkpoint of `step` that comes after all that there are, complete or not."""
        entries = {name.partition("/")[0] for name in ObjectStore(self.path, retries=retries).sizes()}
        numbers = [int(m[2] or 0) for m in map(_ENTRY.fullmatch, entries) if m and int(m[1]) == step]
        return f"{step}.{max(numbers) + 1}" if numbers else str(step)

    def _free_entry_or_unique(self, step: int) -> str:
        """The same; if the store does not answer, a name by the time, so that the checkpoint is written locally."""
        try:
            return self._free_entry(step, retries=_OPEN_RETRIES)
        except ObjectStoreError:
            return f"{step}.{time.time_ns()}"

    def _appeared(self, step: int, entry: str) -> None:
        """A complete checkpoint is there: it counts from now on, and the one that it replaces is deleted."""
        entries = self._entries()
        replaced = entries.get(step)
        if self._owned is not None:
            self._owned = {**entries, step: entry}
        if replaced not in (None, entry):
            self._delete_objects(str(replaced))
            self._metrics.pop(str(replaced), None)

    def _delete_objects(self, entry: str) -> None:
        self._objects.delete(f"{entry}/{header.FILE}")
        in_parallel(self._objects.delete, self._objects.sizes(entry))

    def _send_leftovers(self, previous: str | None) -> None:
        """Upload the checkpoints that an earlier run of this machine could not, if no other run came after it."""
        for folder in [path for path in self.staging.iterdir() if path.is_dir()]:
            for staged in _complete_checkpoints(folder) if folder.name == previous else ():
                step = int(staged.name)
                if step >= max(_complete(self._objects.sizes()), default=0):
                    Upload(f"{self.path}/{self._free_entry(step)}").publish(staged)
                shutil.rmtree(staged)
            if not _checkpoints(folder):
                shutil.rmtree(folder)


def _complete(names: Iterable[str]) -> Entries:
    """The entries that have a header, by step; of several of a step the newest."""
    newest: dict[int, tuple[int, str]] = {}
    for name in names:
        entry, _, rest = name.partition("/")
        match = _ENTRY.fullmatch(entry)
        if match and rest == header.FILE:
            step, number = int(match[1]), int(match[2] or 0)
            newest[step] = max(newest.get(step, (-1, "")), (number, entry))
    return {step: entry for step, (_, entry) in newest.items()}


def _is_leftover(name: str, entries: Entries) -> bool:
    """Whether an object belongs to a checkpoint that is not complete, or was replaced."""
    entry = name.partition("/")[0]
    return bool(_ENTRY.fullmatch(entry)) and entry not in entries.values()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a staging folder, by step."""
    paths = [path for path in folder.iterdir() if path.name.isdigit() and (path / header.FILE).is_file()]
    return sorted(paths, key=lambda path: int(path.name))


def _complete_checkpoints(folder: Path) -> list[Path]:
    """The same without those of which other processes have shards."""
    return [path for path in _checkpoints(folder) if _has_all_files(path)]


def _has_all_files(path: Path) -> bool:
    return all((path / name).is_file() for name in header.load((path / header.FILE).read_bytes(), str(path)).files)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumen" / "uploads"
