"""A lock on a directory, so that two runs do not write their checkpoints to the same one.

It is a POSIX record lock: a forked data worker does not inherit it, and it ends with the process however that ends.
Within one process record locks do not exclude each other (and closing the file anywhere would drop the lock), so a
table of the directories held comes first.
"""

from __future__ import annotations

import datetime as dt
import errno
import fcntl
import json
import os
import socket
import warnings
from pathlib import Path

from lumen.errors import CheckpointLockedError, InexactWarning

FILE = ".lumen-lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

_held: dict[tuple[int, int, int], str] = {}  # by process, device and inode


class Lock:
    """The lock on `directory`, taken when it is made; raises `CheckpointLockedError` where another has it."""

    def __init__(self, directory: Path) -> None:
        found = os.stat(directory)
        self._key = (os.getpid(), found.st_dev, found.st_ino)
        since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        if self._key in _held:
            raise _refusal(directory, _held[self._key])
        self._file = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._acquire(directory)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, owner.encode(), 0)
        except BaseException:
            os.close(self._file)
            raise
        _held[self._key] = owner

    def _acquire(self, directory: Path) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.pread(self._file, 1000, 0).decode(errors="replace")
                raise _refusal(directory, owner) from None
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"the file system of {directory} has no locks ({error.strerror}): nothing stops a second run from"
                " writing its checkpoints there too.",
                InexactWarning,
                stacklevel=4,
            )

    def holds(self, directory: Path) -> bool:
        """Whether it is the lock on what has that path now; a forked child asks in vain."""
        try:
            return os.path.samestat(os.stat(directory / FILE), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go; a forked child lets nothing go."""
        if self._key[0] == os.getpid() and _held.pop(self._key, None) is not None:
            os.close(self._file)


def _refusal(directory: Path, owner: str) -> CheckpointLockedError:
    try:
        found = json.loads(owner)
        who = f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return CheckpointLockedError(
        f"{directory} is in use: {who} writes its checkpoints there. End that run, or give this one a directory of"
        " its own; reading (steps, restore) needs no lock."
    )
