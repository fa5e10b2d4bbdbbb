"""`Mirror`: a local directory whose files are copied to an object store in the background."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import weakref
from pathlib import Path

from lumen.core.object_store import ObjectStore
from lumen.errors import ObjectStoreError

INTERVAL = 30.0  # seconds between uploads of a file that grows


class Mirror:
    """A local directory of files that grow, and the same files below `url`.

    An object cannot grow, so a file that has changed is uploaded from its beginning. A failure is raised at the next
    call. The directory is removed with this object, unless its last upload failed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.directory = Path(tempfile.mkdtemp(prefix="lumen-files-"))
        self._objects = ObjectStore(url)
        self._remove = weakref.finalize(self, _remove, self.directory, os.getpid())
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of the files that are there
        self._last = time.monotonic()
        self._lock = threading.Lock()  # for the next three
        self._wanted = self._running = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._error: ObjectStoreError | None = None
        _mirrors.add(self)

    def pull(self, name: str) -> None:
        """Download a file; one that is not there is not there locally either."""
        path = self.directory / name
        path.unlink(missing_ok=True)
        if self._objects.download(name, path):
            self._uploaded[name] = _stamp(path)

    def names(self) -> list[str]:
        """The names of the objects."""
        return sorted(self._objects.sizes())

    def changed(self) -> None:
        """Upload the files that have changed, if the last upload is a while ago."""
        self._raise()
        if time.monotonic() - self._last >= INTERVAL:
            self.request()

    def request(self) -> None:
        """Upload the files that have changed, in the background."""
        self._raise()
        self._last = time.monotonic()
        with self._lock:
            self._wanted = True
            if self._running:
                return
            self._running = True
            self._thread = threading.Thread(target=self._run, name=f"lumen upload {self.url}")
            self._thread.start()  # before another thread can wait for it

    def wait(self) -> None:
        """Return when the running upload has ended."""
        if self._process != os.getpid():  # a forked child has no such thread, and maybe a lock that is held for ever
            return
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def flush(self) -> None:
        """Upload the files that have changed; raises `ObjectStoreError` if that fails."""
        self.request()
        self.wait()
        self._raise()

    def _run(self) -> None:
        while self._is_wanted():
            try:
                self._upload()
            except ObjectStoreError as error:
                self._error = error
                self._remove.detach()
            else:
                self._remove.detach()
                self._remove = weakref.finalize(self, _remove, self.directory, os.getpid())

    def _is_wanted(self) -> bool:
        with self._lock:
            self._running, self._wanted = self._wanted, False
            return self._running

    def _upload(self) -> None:
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # it was replaced just now
                stamp = _stamp(path)
                if path.suffix != ".new" and self._uploaded.get(name) != stamp:
                    self._objects.write(name, path.read_bytes())
                    self._uploaded[name] = stamp

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise ObjectStoreError(f"{error}. Nothing is lost: the files are in {self.directory}") from error


_mirrors: weakref.WeakSet[Mirror] = weakref.WeakSet()


def wait_for_uploads() -> None:
    """Return when the uploads of all mirrors that are running have ended; each raises its own failure itself."""
    for mirror in list(_mirrors):
        mirror.wait()


def _remove(directory: Path, process: int) -> None:
    if process == os.getpid():  # not in a forked child
        shutil.rmtree(directory, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
