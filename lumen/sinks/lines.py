"""Text files of whole lines that a run may append to after an earlier one died in the middle of a line."""

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
from lumen.sinks.config import write_beside

_CHUNK = 1 << 16


class RowFile(ABC):
    """What JSONL and CSV share: a file of rows that is opened late, continued, counted and cut."""

    def __init__(
        self, path: str | os.PathLike[str], *, on_error: OnError = "raise", time_fn: Callable[[], float] = time.time
    ) -> None:
        check_on_error(on_error)
        self.path = Path(path)
        self.on_error = on_error
        self._time_fn = time_fn
        self._file: TextIO | None = None
        self._rows = 0  # in the file, as long as it is open

    def config(self, values: Mapping[str, Any]) -> None:
        """Write `values` to `NAME.config.json` beside the file, in one go."""
        write_beside(self.path, values)

    def position(self) -> int:
        """The number of rows, all of them on disk."""
        if self._file is None:
            return self._count()
        os.fsync(self._file.fileno())  # the checkpoint must not outlive rows that it has counted
        return self._rows

    def rewind(self, position: int) -> None:
        """Cut off all but the first `position` rows; a file with fewer, or none, stays as it is."""
        self.close()
        end = next(itertools.islice(self._ends(), position, None), None)
        if end is not None:
            os.truncate(self.path, end)

    def close(self) -> None:
        """Close the file; a later `log` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Into the file that has the path: one that was taken away is begun anew; after an error it is opened again,
        which cuts off a row that was half written."""
        if self._file is not None and not _is_at(self._file, self.path):
            self.close()
        try:
            yield
        except OSError:
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):
                    file.close()
            raise

    def _count(self) -> int:
        return max(0, sum(1 for _ in self._ends()) - 1)

    def _ends(self) -> Iterator[int]:
        """Where no row, one row, two rows, … end, in bytes."""
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from self._row_ends(file)

    @staticmethod
    @abstractmethod
    def _row_ends(file: BinaryIO) -> Iterator[int]:
        """The same of an open file: rows that were not ended are none."""


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def open_lines(path: Path) -> TextIO:
    """Open for appending, in UTF-8; makes the directory, and cuts off a last line that was not ended."""
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
