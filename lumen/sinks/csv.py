"""A sink that writes a CSV table."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TextIO

from lumen.core.arguments import checked
from lumen.errors import SinkError, printable
from lumen.sinks.jsonl import make_record
from lumen.sinks.lines import RowFile, open_lines
from lumen.sinks.media import split

_INDEX_COLUMNS = ["step", "time"]


@checked
class CSV(RowFile):
    """Appends one row for each `log`: `step`, `time` (seconds since the epoch) and a column for each name.

    A new name becomes a new last column: the file is rewritten and replaced atomically. Cells without a value are
    empty; NaN and infinity are `nan` and `inf`. Cells are numbers: histograms, images and texts are ignored. Each row
    is flushed. An existing file is continued; an incomplete last row is removed, and so are the rows after the
    checkpoint that a run resumes from. The configuration is written to `NAME.config.json` next to the file.

    `path` may be a URL in an object store, such as `s3://bucket/runs/a/metrics.csv`: rows are written to a local file,
    which is uploaded in the background, at each checkpoint and by `close`.

    Raises OSError if the file cannot be written, and SinkError for a value named `step` or `time` and for an existing
    file with other columns.

    >>> import lumen as lm, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.csv")
    >>> sink = lm.sinks.CSV(path, time_fn=lambda: 12.5)
    >>> sink.log(0, {"loss": 0.5})
    >>> sink.log(1, {"loss": 0.25, "accuracy": 0.75})
    >>> sink.close()
    >>> print(path.read_text())
    step,time,loss,accuracy
    0,12.5,0.5,
    1,12.5,0.25,0.75
    """

    _columns: Sequence[str] = ()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one row."""
        record = make_record(step, self._time_fn(), split(values)[0])
        with self._writing():
            file = self._open()
            new_columns = [name for name in record if name not in self._columns]
            if new_columns:
                file = self._add_columns(file, [*self._columns, *new_columns])
            _write(file, [[record.get(name, "") for name in self._columns]])
            file.flush()
        self._rows += 1

    def _open(self) -> TextIO:
        if self._file is None:
            self._file = open_lines(self.path)
            self._file.seek(0)
            self._columns = next(csv.reader(self._file), [])
            self._file.seek(0, os.SEEK_END)
            self._rows = self._count()
        if self._columns and self._columns[:2] != _INDEX_COLUMNS:
            self._close_file()
            raise SinkError(
                f"{self.url or self.path} is a table with the columns {', '.join(map(printable, self._columns))}; CSV"
                f" continues files that begin with {', '.join(_INDEX_COLUMNS)}: choose another path, or move the file"
                " away."
            )
        return self._file

    def _add_columns(self, file: TextIO, columns: Sequence[str]) -> TextIO:
        temporary = self.path.with_name(self.path.name + ".new")
        with temporary.open("w", encoding="utf-8", newline="") as new:
            _write(new, [columns])
            file.seek(0)
            rows = itertools.islice(csv.reader(file), 1, None)
            _write(new, (row + [""] * (len(columns) - len(row)) for row in rows))
            new.flush()
            os.fsync(new.fileno())  # otherwise a machine crash could leave the renamed file without its rows
        self._close_file()
        temporary.replace(self.path)
        return self._open()

    @staticmethod
    def _row_ends(file: BinaryIO) -> Iterator[int]:
        end = 0

        def lines() -> Iterator[str]:
            nonlocal end
            for line in file:
                if line.endswith(b"\n"):
                    end += len(line)
                    yield line.decode()

        for _ in csv.reader(lines()):  # a row may span several lines: a column's name may contain newlines
            yield end


def _write(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)
