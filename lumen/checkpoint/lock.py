"""A lock on a directory, so that two runs do not write their checkpoints to the same one.

It is a POSIX record lock: a forked data worker does not inherit it, and it ends with the process, however that exits.
Within one process record locks do not exclude each other, and closing the file anywhere would release the lock. So a
table of the locked directories is consulted first.
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

_owners: dict[tuple[int, int, int], str] = {}  # by process, device and inode


class Lock:
    """The lock on `directory`, acquired at construction; raises `CheckpointLockedError` if another run has it.

    `shown` is what a message calls the directory, if it stands for something else.
    """

    def __init__(self, directory: Path, shown: str | None = None) -> None:
        status = os.stat(directory)
        self._key = (os.getpid(), status.st_dev, status.st_ino)
        since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        if self._key in _owners:
            raise _refusal(shown or directory, _owners[self._key])
        self._file = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._acquire(directory, shown or directory)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, owner.encode(), 0)
        except BaseException:
            os.close(self._file)
            raise
        _owners[self._key] = owner

    def _acquire(self, directory: Path, shown: Path | str) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.pread(self._file, 1000, 0).decode(errors="replace")
                raise _refusal(shown, owner) from None
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"the file system of {directory} has no locks ({error.strerror}): nothing prevents a second run from"
                " writing its checkpoints there too.",
                InexactWarning,
                stacklevel=4,
            )

    def holds(self, directory: Path) -> bool:
        """Whether this is the lock on the directory that now has this path."""
        try:
            return os.path.samestat(os.stat(directory / FILE), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock; has no effect in a forked child."""
        if self._key[0] == os.getpid() and _owners.pop(self._key, None) is not None:
            os.close(self._file)


def _refusal(directory: Path | str, owner: str) -> CheckpointLockedError:
    try:
        fields = json.loads(owner)
        holder = f"process {fields['pid']} on {fields['host']}, since {fields['since']}"
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    return CheckpointLockedError(
        f"{directory} is in use: {holder} writes its checkpoints there. End that run, or use another directory for this"
        " one. Reading (steps, restore) needs no lock."
    )
