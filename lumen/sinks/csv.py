"""One table of all logged steps."""

from __future__ import annotations

import csv
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lumen.sinks.jsonl import stamped
from lumen.sinks.lines import open_lines

_OWN = ["step", "time"]


class CSV:
    """Appends one row for each `log`: `step`, `time` (seconds since the epoch) and a column for each name.

    A name that appears later becomes a new last column: the file is then written anew beside the old one and
    put in its place, so that a reader finds either. Cells without a value are empty; NaN and infinity are
    `nan` and `inf`. Each row is flushed. A file that exists is continued; a last row that an earlier run left
    unfinished is cut off.

    Raises OSError where the file cannot be written, and ValueError for a value named `step` or `time` and for
    a file that is another table.

    >>> import lumen as lm, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.csv")
    >>> sink = lm.sinks.CSV(path, clock=lambda: 12.5)
    >>> sink.log(0, {"loss": 0.5})
    >>> sink.log(1, {"loss": 0.25, "accuracy": 0.75})
    >>> sink.close()
    >>> print(path.read_text())
    step,time,loss,accuracy
    0,12.5,0.5,
    1,12.5,0.25,0.75
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one row."""
        record = stamped(step, self._clock(), values)
        file = self._opened()
        added = [name for name in record if name not in self._columns]
        if added:
            file = self._widened(file, [*self._columns, *added])
        _write(file, [[record.get(name, "") for name in self._columns]])
        file.flush()

    def close(self) -> None:
        """Close the file; a later `log` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _opened(self) -> TextIO:
        if self._file is None:
            self._file = open_lines(self.path)
            self._file.seek(0)
            self._columns = next(csv.reader(self._file), [])
            self._file.seek(0, os.SEEK_END)
        if self._columns and self._columns[:2] != _OWN:
            self.close()
            raise ValueError(
                f"{self.path} is a table with the columns {', '.join(self._columns)}; CSV continues"
                f" files that begin with {', '.join(_OWN)}: choose another path, or move the file away."
            )
        return self._file

    def _widened(self, file: TextIO, columns: Sequence[str]) -> TextIO:
        beside = self.path.with_name(self.path.name + ".new")
        with beside.open("w", encoding="utf-8", newline="") as new:
            _write(new, [columns])
            file.seek(0)
            rows = itertools.islice(csv.reader(file), 1, None)
            _write(new, (row + [""] * (len(columns) - len(row)) for row in rows))
            new.flush()
            os.fsync(new.fileno())  # else a crash of the machine could leave the new name without the rows
        self.close()
        beside.replace(self.path)
        return self._opened()


def _write(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)
