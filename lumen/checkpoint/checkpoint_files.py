"""The files of a checkpoint as they are read: from a directory, or from an object store."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

from lumen.checkpoint import header
from lumen.core.object_store import ObjectStore, in_parallel
from lumen.core.urls import path_or_url
from lumen.errors import CheckpointError, ObjectStoreError

_ORBAX = "_CHECKPOINT_METADATA"  # a file that Orbax writes to each checkpoint


class LocalFiles:
    """The files in the directory `location`."""

    def __init__(self, location: Path) -> None:
        self.location = location

    def prefetch(self, names: Collection[str]) -> None:
        """Nothing: the files are here."""

    def check(self, name: str, size: int) -> None:
        """Raise OSError if there is no such file, and ValueError if it has another size or kind."""
        with open_file(self.location, name, size):
            pass

    @contextmanager
    def open(self, name: str, size: int | None = None) -> Iterator[IO[bytes]]:
        """A context with the open file, after the same check."""
        with open_file(self.location, name, size) as file:
            yield file

    def size_of(self, name: str) -> int:
        """The size of a file that exists."""
        return (self.location / name).stat().st_size

    def exists(self) -> bool:
        """Whether there is a directory."""
        return self.location.is_dir()

    def lost_header(self) -> bool:
        """Whether there is a checkpoint whose header is missing."""
        if not self.location.is_dir() or self.location.is_symlink() or os.path.lexists(self.location / header.FILE):
            return False
        return any(os.path.lexists(self.location / name) for name in (*header.ITEMS, _ORBAX))


class RemoteFiles:
    """The objects below the URL `location`.

    An object is downloaded when it is opened, and its copy removed when it is closed.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._objects = ObjectStore(location)
        self._contents: dict[str, bytes] = {}

    def prefetch(self, names: Collection[str]) -> None:
        """Read small objects that will be opened, several at a time."""
        with _as_unreachable():
            contents = in_parallel(self._objects.read, names)
        by_name = zip(names, contents, strict=True)
        self._contents |= {name: content for name, content in by_name if content is not None}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        with _as_unreachable():
            return self._objects.sizes()

    def check(self, name: str, size: int) -> None:
        """Raise OSError if there is no such object, and ValueError if it has another size."""
        if name not in self._sizes:
            raise FileNotFoundError(f"{self.location}/{name} does not exist")
        if self._sizes[name] != size:
            raise ValueError(f"it has {self._sizes[name]} bytes, expected {size}")

    @contextmanager
    def open(self, name: str, size: int | None = None) -> Iterator[IO[bytes]]:
        """A context with an open copy of the object, after the same check."""
        if size is not None:
            self.check(name, size)
        if name in self._contents:
            yield io.BytesIO(self._contents[name])
            return
        with tempfile.TemporaryDirectory(prefix="lumen-download-") as directory:
            with _as_unreachable():
                if not self._objects.download(name, Path(directory, "object")):
                    raise FileNotFoundError(f"{self.location}/{name} does not exist")
            with open_file(Path(directory), "object", size) as file:
                yield file

    def size_of(self, name: str) -> int:
        """The size of an object that exists."""
        return self._sizes[name]

    def exists(self) -> bool:
        """Whether there is any object."""
        return bool(self._sizes)

    def lost_header(self) -> bool:
        """False: without a header it is a checkpoint whose upload has not ended, and which nobody sees."""
        return False


def files_at(path: str | os.PathLike[str]) -> LocalFiles | RemoteFiles:
    """The files of the checkpoint at a path or URL; raises `PathError` for other URLs than those of object stores."""
    location = path_or_url(path, "the path of the checkpoint")
    return RemoteFiles(location) if isinstance(location, str) else LocalFiles(location)


@contextmanager
def open_file(root: Path, name: str, size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file below `root` without following links; raises ValueError for another kind or size."""
    segments = name.split("/")
    for depth in range(1, len(segments)):
        if not stat.S_ISDIR(os.lstat(root.joinpath(*segments[:depth])).st_mode):
            raise ValueError("a parent in its path is not a directory")
    # Without O_NONBLOCK a named pipe would block until another process writes to it.
    descriptor = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if size is not None and status.st_size != size:
            raise ValueError(f"it has {status.st_size} bytes, expected {size}")
        yield file


@contextmanager
def _as_unreachable() -> Iterator[None]:
    """A store that does not answer is no damage: nothing may be set aside for it."""
    try:
        yield
    except ObjectStoreError as error:
        raise CheckpointError(f"the checkpoint could not be read: {error}") from error
