"""`ObjectStore`: the objects below a URL, whose operations are retried."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lumen.errors import ObjectStoreError

T = TypeVar("T")

_MAX_THREADS = 16  # objects at a time
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # seconds between tries, four minutes in all
_BEAT = 0.5  # seconds between calls of `beat` during a delay
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def _no_beat() -> None:
    pass


def in_parallel(operation: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """What `operation` returns for each object, in the order of `names`; several run at a time."""
    with ThreadPoolExecutor(_MAX_THREADS) as pool:
        return list(pool.map(operation, names))


class ObjectStore:
    """The objects below `url`, by their names relative to it.

    An operation that fails is tried again after 1, 2, 4, … 128 seconds, at most `retries` times, and then raises
    `ObjectStoreError`. `beat` is called every now and then while an operation takes time.
    """

    def __init__(self, url: str, beat: Callable[[], object] = _no_beat, retries: int = len(DELAYS)) -> None:
        self.url = url
        self._beat = beat
        self._retries = retries
        self._fs: Any = None

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none of this name."""
        return self._unless_missing(lambda fs: bytes(fs.cat_file(self._at(name))), f"read {name!r}")

    def write(self, name: str, content: bytes) -> None:
        """Write an object, which others see either before, or completely."""
        self._try(lambda fs: fs.pipe_file(self._at(name), content), f"write {name!r}", final=_MISSING)

    def upload(self, path: Path, name: str) -> None:
        """Copy a file of the local disk to an object."""
        beat = _callback(self._beat)
        self._try(lambda fs: fs.put_file(str(path), self._at(name), callback=beat), f"write {name!r}", final=_MISSING)
        self._beat()

    def download(self, name: str, path: Path) -> bool:
        """Copy an object to a file of the local disk; returns False if there is no such object."""

        def get(fs: Any) -> bool:
            fs.get_file(self._at(name), str(path), callback=_callback(self._beat))
            return True

        return bool(self._unless_missing(get, f"read {name!r}"))

    def copy(self, name: str, new: str) -> None:
        """Copy an object within the store."""
        self._try(lambda fs: fs.cp_file(self._at(name), self._at(new)), f"write {new!r}")

    def sizes(self, under: str = "") -> dict[str, int]:
        """The size of each object below the name `under`, by the name relative to `url`."""
        return self._unless_missing(lambda fs: self._find(fs, under), "list the objects") or {}

    def delete(self, name: str) -> None:
        """Delete an object; one that is missing is no error."""
        self._unless_missing(lambda fs: fs.rm_file(self._at(name)), f"delete {name!r}")

    def _find(self, fs: Any, under: str) -> dict[str, int]:
        from fsspec.core import strip_protocol

        root = str(strip_protocol(self.url))
        entries = fs.find(self._at(under) if under else self.url, detail=True).values()
        # Of a prefix that no object has below it, some stores return the object of that very name.
        return {
            entry["name"][len(root) + 1 :]: int(entry["size"])
            for entry in entries
            if entry.get("type") == "file" and entry["name"].startswith(f"{root}/")
        }

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _filesystem(self) -> Any:
        if self._fs is None:
            import fsspec

            protocol = self.url.partition("://")[0]
            self._fs = fsspec.filesystem(protocol, use_listings_cache=False)
        return self._fs

    def _unless_missing(self, run: Callable[[Any], T], what: str) -> T | None:
        try:
            return self._try(run, what, final=_MISSING)
        except ObjectStoreError as error:
            if isinstance(error.__cause__, _MISSING):
                return None
            raise

    def _try(self, run: Callable[[Any], T], what: str, final: tuple[type[Exception], ...] = ()) -> T:
        """Run an operation until it succeeds; raises `ObjectStoreError` after the last try, or an error in `final`."""
        delays = DELAYS[: self._retries]
        for tries, delay in enumerate((*delays, 0.0), 1):
            try:
                return run(self._filesystem())
            except Exception as error:
                if tries > len(delays) or isinstance(error, final):
                    raise ObjectStoreError(
                        f"{self.url} could not {what} (tried {tries} times): {type(error).__name__}: {error}"
                    ) from error
            self._sleep(delay)
        raise AssertionError  # the last try returns or raises

    def _sleep(self, delay: float) -> None:
        until = time.monotonic() + delay
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, _BEAT))
            self._beat()


def _callback(beat: Callable[[], object]) -> Any:
    """What fsspec calls after each part of a file."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"beat": lambda size, value, **kwargs: beat()})
