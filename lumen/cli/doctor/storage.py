"""`lumen doctor`: whether checkpoints can be written to a directory, and stay there."""

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
_LITTLE = 2**30  # bytes
_PIECE = bytes(2**20)


def storage(directory: Path) -> Iterator[Finding]:
    """Write a file there as a checkpoint is written, and take it away again."""
    place = next(each for each in (directory.absolute(), *directory.absolute().parents) if each.exists())
    name = str(directory)
    if not place.is_dir():
        yield Finding(_SECTION, name, "broken", f"{place} is no directory", "name another one")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".lumen-doctor-", dir=place) as own:
            seconds = _write(Path(own))
            locks = _locks(Path(own))
    except OSError as error:
        fix = "name a directory that this user may write to" if error.errno in (errno.EACCES, errno.EROFS) else ""
        yield Finding(_SECTION, name, "broken", f"cannot write to {place}: {error.strerror}", fix)
        return
    made = "writable" if place == directory.absolute() else f"can be made in {place}"
    yield Finding(_SECTION, name, "ok", f"{made}; 1 MiB was on disk after {seconds * 1e3:.0f} ms")
    if locks:
        yield Finding(_SECTION, "locks", "ok", "a second run is kept out of a directory that is in use")
    else:
        fix = "see to it yourself that each run has a directory of its own, or use another file system"
        yield Finding(_SECTION, "locks", "missing", "the file system has none: nothing keeps out a second run", fix)
    yield _space(place)


def _write(own: Path) -> float:
    """Write, rename and wait for the disk, which network file systems may not do; the seconds that it took."""
    since = time.monotonic()
    with open(own / "part", "wb") as file:
        file.write(_PIECE)
        file.flush()
        os.fsync(file.fileno())
    (own / "part").rename(own / "whole")
    sync_directory(own)
    return time.monotonic() - since


def _locks(own: Path) -> bool:
    with open(own / "lock", "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _space(place: Path) -> Finding:
    free = shutil.disk_usage(place).free
    said = f"{human_bytes(free)} are free"
    if free < _LITTLE:
        fix = "make room; keep fewer: lm.Checkpointer(…, keep=1)"
        return Finding(_SECTION, "space", "broken", f"only {said}", fix)
    return Finding(_SECTION, "space", "ok", said)
