"""`lumen doctor`: check that checkpoints can be written to a directory, and are locked there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lumen.checkpoint.fsync import sync_directory
from lumen.cli.doctor.report import Finding
from lumen.core.inspect import human_bytes

_SECTION = "checkpoints"
_MIN_FREE = 2**30  # bytes
_BLOCK = bytes(2**20)


def check_directory(directory: Path) -> Iterator[Finding]:
    """Write a temporary file the way a checkpoint is written."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    name = str(directory)
    if not existing.is_dir():
        yield Finding(_SECTION, name, "broken", f"{existing} is not a directory", "choose another path")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".lumen-doctor-", dir=existing) as scratch:
            seconds = _write(Path(scratch))
            lockable = _supports_locks(Path(scratch))
    except OSError as error:
        fix = "choose a directory that this user may write to" if error.errno in (errno.EACCES, errno.EROFS) else ""
        yield Finding(_SECTION, name, "broken", f"cannot write to {existing}: {error.strerror}", fix)
        return
    status = "writable" if existing == directory.absolute() else f"can be created in {existing}"
    yield Finding(_SECTION, name, "ok", f"{status}; 1 MiB was synced to disk in {seconds * 1e3:.0f} ms")
    if lockable:
        yield Finding(_SECTION, "locks", "ok", "a second run cannot write to a directory in use")
    else:
        fix = "give each run its own directory, or use another file system"
        yield Finding(_SECTION, "locks", "missing", "the file system has no locks: nothing stops a second run", fix)
    yield _check_space(existing)


def _write(directory: Path) -> float:
    """Write, sync and rename a file; returns the seconds it took. Network file systems may fail at this."""
    start = time.monotonic()
    with open(directory / "file.tmp", "wb") as file:
        file.write(_BLOCK)
        file.flush()
        os.fsync(file.fileno())
    (directory / "file.tmp").rename(directory / "file")
    sync_directory(directory)
    return time.monotonic() - start


def _supports_locks(directory: Path) -> bool:
    with open(directory / "lock", "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _check_space(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    text = f"{human_bytes(free)} are free"
    if free < _MIN_FREE:
        fix = "free some space, or keep fewer checkpoints: lm.Checkpointer(…, keep=1)"
        return Finding(_SECTION, "space", "broken", f"only {text}", fix)
    return Finding(_SECTION, "space", "ok", text)
