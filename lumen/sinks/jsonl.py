"""One JSON object per logged step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lumen.sinks.base import Number, scalars
from lumen.sinks.lines import open_lines


class JSONL:
    """Appends one line for each `log`: an object of `step`, `time` (seconds since the epoch) and the values.

    Each line is written whole and flushed, so that other programs can follow the file. JSON has no NaN or
    infinity: they are the strings "NaN", "Infinity" and "-Infinity", which `float` and JavaScript's `Number`
    read back. A file that exists is continued; a last line that an earlier run left unfinished is cut off.

    Raises OSError where the file cannot be written, and ValueError for a value named `step` or `time`.

    >>> import lumen as lm, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> sink = lm.sinks.JSONL(path, clock=lambda: 12.5)
    >>> sink.log(3, {"loss": 0.25, "norm": float("inf")})
    >>> sink.close()
    >>> print(path.read_text())
    {"step": 3, "time": 12.5, "loss": 0.25, "norm": "Infinity"}
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self._file: TextIO | None = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line."""
        record = stamped(step, self._clock(), values)
        line = json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False)
        if self._file is None:
            self._file = open_lines(self.path)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a later `log` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def stamped(step: int, now: float, values: Mapping[str, Any]) -> dict[str, Number]:
    """One flat record of the step, the time and the values; raises ValueError where a value has their name."""
    flat = scalars(values)
    taken = [name for name in ("step", "time") if name in flat]
    if taken:
        raise ValueError(f"A value is named {taken[0]!r}, as the sink's own: rename it.")
    return {"step": int(step), "time": now, **flat}


def _plain(value: Number) -> Number | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
