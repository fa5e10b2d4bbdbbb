"""Text files of lines that a run can append to, even if an earlier run died in the middle of a line."""

from __future__ import annotations

import itertools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import write_config
from lumen.sinks.location import Location

_CHUNK = 1 << 16


class RowFile(ABC):
    """Base class of JSONL and CSV: a file of rows that is opened lazily, continued, counted and truncated."""

    def __init__(
        self, path: str | os.PathLike[str], *, on_error: OnError = "raise", time_fn: Callable[[], float] = time.time
    ) -> None:
        check_on_error(on_error)
        self._location = Location(path, f"the path of {type(self).__name__}")
        self.url = self._location.url
        self.on_error = on_error
        self._time_fn = time_fn
        self._file: TextIO | None = None
        self._rows = 0  # in the file while it is open

    @property
    def path(self) -> Path:
        """The file; of a URL its local copy, which is downloaded if there is none yet."""
        return self._location.path

    def config(self, values: Mapping[str, Any]) -> None:
        """Write `values` to `NAME.config.json` next to the file, atomically."""
        write_config(self.path, values)
        self._location.changed()

    def position(self) -> int:
        """The number of rows, after syncing them to disk; of a URL, their upload begins."""
        if self._file is None:
            return self._count()
        os.fsync(self._file.fileno())  # a checkpoint must not count rows that are not on disk
        self._location.request()
        return self._rows

    def rewind(self, position: int) -> None:
        """Truncate the file to the first `position` rows; a shorter or missing file is left unchanged."""
        self._close_file()
        end = next(itertools.islice(self._ends(), position, None), None)
        if end is not None:
            os.truncate(self.path, end)

    def close(self) -> None:
        """Close the file; a later `log` reopens it. Returns when it is uploaded, if it is at a URL."""
        self._close_file()
        self._location.flush()

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Reopen the file if its path was moved or deleted, and after an error, which removes an incomplete row."""
        if self._file is not None and not _is_at(self._file, self.path):
            self._close_file()
        try:
            yield
        except OSError:
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):
                    file.close()
            raise
        self._location.changed()

    def _count(self) -> int:
        return max(0, sum(1 for _ in self._ends()) - 1)

    def _ends(self) -> Iterator[int]:
        """The byte offsets at which zero rows, one row, two rows, … end."""
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from self._row_ends(file)

    @staticmethod
    @abstractmethod
    def _row_ends(file: BinaryIO) -> Iterator[int]:
        """The same for an open file; an incomplete row does not count."""


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def open_lines(path: Path) -> TextIO:
    """Open for appending, in UTF-8; creates the directory, and removes an incomplete last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8", newline="")
    try:
        os.truncate(path, _end_of_lines(path))
    except BaseException:
        file.close()
        raise
    return file


def _end_of_lines(path: Path) -> int:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
