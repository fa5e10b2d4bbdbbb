"""The upload of one checkpoint to an object store: its header last, so that it is complete or invisible."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lumen.checkpoint import header
from lumen.checkpoint.coordinator import SaveSession
from lumen.checkpoint.fsync import relative_files
from lumen.core import mirror
from lumen.core.object_store import ObjectStore, in_parallel
from lumen.errors import CheckpointError, CheckpointLockedError


class Upload:
    """Copies a checkpoint to the objects below `url`; with `session`, what each of several processes wrote of it."""

    def __init__(self, url: str, session: SaveSession | None = None) -> None:
        self.url = url
        self._session = session
        self._objects = ObjectStore(url) if session is None else ObjectStore(url, session.heartbeat)

    def put(self, directory: Path, names: Collection[str]) -> None:
        """Upload these files of a directory."""
        in_parallel(lambda name: self._objects.upload(directory / name, name), names)

    def fetch(self, directory: Path, names: Collection[str]) -> None:
        """Download the objects of which the directory has no file."""
        for name in names:
            path = directory / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                if not self._objects.download(name, path):
                    raise CheckpointError(f"{self.url}/{name}, which another process has uploaded, is missing.")

    def add(self, directory: Path, names: Collection[str]) -> None:
        """On ranks other than 0: upload this process's files of the checkpoint, when rank 0 has written its own.

        If it failed before, rank 0 would remove what it has written, and lose its share.
        """
        assert self._session is not None
        self._session.await_("staged")
        with self._keeping(directory, f"the shards of rank {self._session.rank} are"):
            self.put(directory, names)
        self._session.publish("uploaded")

    def publish(self, directory: Path, check_owner: Callable[[], None] = lambda: None) -> None:
        """Upload the files of a checkpoint, and its header when the files of all processes are there.

        `check_owner` is called before that. If it, or the upload, fails, the error names the directory, which is kept.
        """
        text = (directory / header.FILE).read_bytes()
        files = header.load(text, str(directory)).files
        if self._session is not None:
            self._session.publish("staged")
        with self._keeping(directory, "the checkpoint is" if self._session is None else "the shards of rank 0 are"):
            self.put(directory, [name for name in relative_files(directory) if name != header.FILE])
            if self._session is not None:
                self._session.await_all("uploaded")
            self._check(files)
            mirror.wait_for_uploads()  # the rows of sinks that this checkpoint counts
            check_owner()
            self._objects.write(header.FILE, text)

    def _check(self, files: header.Files) -> None:
        """Check that all files are there; delete what else is, such as fragments of shards."""
        sizes = self._objects.sizes()
        for name, (size, _) in files.items():
            if sizes.get(name) != size:
                there = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
                raise CheckpointError(f"{self.url}/{name} {there} after its upload.")
        for name in sizes.keys() - files.keys():
            self._objects.delete(name)

    @contextmanager
    def _keeping(self, directory: Path, subject: str) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointError) as error:
            kind = CheckpointLockedError if isinstance(error, CheckpointLockedError) else CheckpointError
            raise kind(f"{str(error).rstrip('.')}. Nothing is lost: {subject} in {directory}") from error


def exists(location: Path | str) -> bool:
    """Whether there is a file or directory at a path, or a checkpoint at a URL."""
    if isinstance(location, Path):
        return os.path.lexists(location)
    return ObjectStore(location).read(header.FILE) is not None
