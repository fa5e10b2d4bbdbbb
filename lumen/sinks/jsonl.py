"""A sink that writes one JSON object per step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from lumen.core.arguments import checked
from lumen.errors import SinkError
from lumen.sinks.base import Number
from lumen.sinks.config import plain_number
from lumen.sinks.lines import RowFile, open_lines
from lumen.sinks.media import Histogram, Media, Text, split


@checked
class JSONL(RowFile):
    """Appends one line for each `log`: an object of `step`, `time` (seconds since the epoch) and the values.

    Each line is written in one call and flushed, so that other programs can follow the file. JSON has no NaN or
    infinity: they become the strings "NaN", "Infinity" and "-Infinity", which `float` and JavaScript's `Number`
    parse. A `Text` is a string, a `Histogram` an object of `edges`, `counts` and, if not zero, `nonfinite`; images are
    ignored. An existing file is continued; an incomplete last line is removed, and so are the rows after the
    checkpoint that a run resumes from. The configuration is written to `NAME.config.json` next to the file.

    `path` may be a URL in an object store, such as `s3://bucket/runs/a/metrics.jsonl`: lines are written to a local
    file, which is uploaded in the background, at each checkpoint and by `close`.

    Raises OSError if the file cannot be written, and SinkError for a value named `step` or `time`.

    >>> import lumen as lm, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> sink = lm.sinks.JSONL(path, time_fn=lambda: 12.5)
    >>> sink.log(3, {"loss": 0.25, "norm": float("inf"), "sample": lm.sinks.Text("to be")})
    >>> sink.close()
    >>> print(path.read_text())
    {"step": 3, "time": 12.5, "loss": 0.25, "norm": "Infinity", "sample": "to be"}
    """

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line."""
        numbers, media = split(values)
        record = {name: plain_number(value) for name, value in make_record(step, self._time_fn(), numbers).items()}
        media_record = {name: _to_json(value) for name, value in media.items() if isinstance(value, Histogram | Text)}
        check_names(media_record)
        line = json.dumps({**record, **media_record}, allow_nan=False)
        with self._writing():
            if self._file is None:
                self._file = open_lines(self.path)
                self._rows = self._count()
            self._file.write(line + "\n")
            self._file.flush()
        self._rows += 1

    @staticmethod
    def _row_ends(file: BinaryIO) -> Iterator[int]:
        end = 0
        yield end
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                yield end


def make_record(step: int, now: float, numbers: Mapping[str, Number]) -> dict[str, Number]:
    """A flat record of the step, the time and the numbers; raises SinkError for a reserved name."""
    check_names(numbers)
    return {"step": int(step), "time": now, **numbers}


def check_names(values: Mapping[str, Any]) -> None:
    """Raise SinkError if a value has one of the reserved names."""
    reserved = [name for name in ("step", "time") if name in values]
    if reserved:
        raise SinkError(f"A value is named {reserved[0]!r}, which the sink reserves: rename it.")


def _to_json(value: Media) -> Any:
    if isinstance(value, Text):
        return value.text
    assert isinstance(value, Histogram)
    record: dict[str, Any] = {"edges": value.edges, "counts": value.counts}
    return {**record, "nonfinite": value.nonfinite} if value.nonfinite else record
