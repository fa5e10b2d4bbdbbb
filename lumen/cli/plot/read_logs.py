"""What the sinks of a run left on disk, read back: JSONL, CSV, and TensorBoard's event files where there is no other.

The run may still be going on, may have died in the middle of a line, or have begun again: what is no row is left out,
and `notes` say so.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lumen.cli import find_checkpoints
from lumen.errors import LumenError

_EVENTS = "*tfevents*"
_OWN = ("step", "time")
_STEPS = 2**63
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as the JSONL sink writes them


class Row(NamedTuple):
    """What was logged at once; `time` is in seconds since the epoch, None where it is not known."""

    step: int
    time: float | None
    values: dict[str, float]


@dataclass
class Logged:
    """The rows of one run, in the order of its steps, and what is to be said of how they were read."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All that was logged, in the order of its first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))


def read(path: Path) -> Logged:
    """What the run in the directory `path` logged, or the file `path` holds.

    Raises `LumenError`, saying what is there instead, where there is nothing to read.
    """
    try:
        files = _files(path)
        is_board = _reader(files[0]) is _events
        run = Logged(files[0].parent if is_board else files[0], config=_config(files[0]))
        for each in files:
            _reader(each)(each, run)
    except OSError as error:
        raise LumenError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not run.rows and not run.notes:
        run.notes.append("nothing has been logged yet")
    return run


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise LumenError(f"{path} does not exist. {find_checkpoints.beside(path)}")
    for name, pattern in (("metrics.jsonl", "*.jsonl"), ("metrics.csv", "*.csv")):
        found = sorted(each for each in path.glob(pattern) if each.is_file())
        if path / name in found or len(found) == 1:
            return [path / name if path / name in found else found[0]]
        if found:
            raise LumenError(f"{path} holds several files of numbers; give one: {', '.join(map(str, found))}.")
    events = sorted(path.glob(_EVENTS))
    if not events:
        raise LumenError(f"{path} holds no metrics.jsonl, CSV or event files of a run. {_below(path)}")
    return events


def _below(path: Path) -> str:
    found = {each.parent for pattern in ("*.jsonl", "*.csv", _EVENTS) for each in path.glob(f"*/{pattern}")}
    if found:
        return f"There are some in {find_checkpoints.listed(sorted(found))}."
    return 'A run writes one with lm.Runner(step, sinks=[lm.sinks.JSONL("runs/a/metrics.jsonl")]).'


def _config(file: Path) -> Mapping[str, Any]:
    """The configuration that the sinks of rows leave beside their file."""
    try:
        found = json.loads(file.with_name(f"{file.stem}.config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _reader(file: Path) -> Callable[[Path, Logged], None]:
    if "tfevents" in file.name:
        return _events
    return _table if file.suffix == ".csv" else _lines


def _add(run: Logged, row: Row) -> None:
    """One more row. Where the step goes back, a run began again there: its rows take the place of the earlier ones."""
    if run.rows and row.step < run.rows[-1].step:
        _went_back(run, row.step)
    run.rows.append(row)


def _went_back(run: Logged, step: int) -> None:
    kept = [each for each in run.rows if each.step < step]
    if len(kept) < len(run.rows):
        run.notes.append(f"the run went back to step {step}: of what was logged twice, the later is shown")
    run.rows = kept


# ------------------------------------------------------------------------------------------- JSONL and CSV


def _lines(file: Path, run: Logged) -> None:
    text = _whole_lines(file, run)
    bad = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        row = _row(line)
        if row is None:
            bad.append(number)
        else:
            _add(run, row)
    _tell_bad(run, file, bad, 'an object of JSON such as {"step": 50, "time": 1.7e9, "train/loss": 0.5}')


def _row(line: str) -> Row | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int) or abs(found["step"]) >= _STEPS:
        return None
    numbers = ((name, _number(value)) for name, value in found.items() if name not in _OWN)
    return Row(found["step"], _number(found.get("time")), {name: n for name, n in numbers if n is not None})


def _number(value: Any) -> float | None:
    """A number as a float; None for what is none, such as a text or a histogram."""
    if isinstance(value, int | float) or value in _NOT_FINITE:
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    return None


def _table(file: Path, run: Logged) -> None:
    rows = csv.reader(io.StringIO(_whole_lines(file, run), newline=""))
    bad: list[int] = []
    try:
        columns = next(rows, [])
        for cells in rows:
            row = _cells(columns, cells)
            if row is None:
                bad.append(rows.line_num)
            else:
                _add(run, row)
    except csv.Error:
        bad.append(rows.line_num)
    _tell_bad(run, file, bad, "a table with the columns step, time, …")


def _cells(columns: list[str], cells: list[str]) -> Row | None:
    try:
        found = {name: float(cell) for name, cell in zip(columns, cells, strict=False) if cell}
        step = int(found.pop("step"))
        return Row(step, found.pop("time", None), found) if abs(step) < _STEPS else None
    except (KeyError, ValueError, OverflowError):
        return None


def _whole_lines(file: Path, run: Logged) -> str:
    """The text up to the last line end: what follows it is being written, or was when the run died."""
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        run.notes.append("the last line is half written: left out")
    return whole


def _tell_bad(run: Logged, file: Path, bad: list[int], wanted: str) -> None:
    if not bad:
        return
    if not run.rows:
        raise LumenError(f"{file} is not the log of a run: its line {bad[0]} is not {wanted}.")
    some = ", ".join(map(str, bad[:3])) + ("…" if len(bad) > 3 else "")
    run.notes.append(f"{'line' if len(bad) == 1 else 'lines'} {some} could not be read: left out")


# --------------------------------------------------------------------------------------- TensorBoard


def _events(file: Path, run: Logged) -> None:
    """Numbers of an event file. A mark at its beginning drops what earlier files have of later steps."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    except ImportError as error:
        raise LumenError(
            f"{file} is an event file, which tensorboardX reads; it is missing: pip install 'tensorboardX>=2.6.2'"
        ) from error
    for record in _records(file, run):
        try:
            event = Event.FromString(record)
        except DecodeError:
            run.notes.append(f"{file.name} is damaged: what follows in it is left out")
            return
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            _went_back(run, event.step)
        values = {each.tag: each.simple_value for each in event.summary.value if each.HasField("simple_value")}
        if values:
            _add(run, Row(event.step, event.wall_time, values))


def _records(file: Path, run: Logged) -> Iterator[bytes]:
    """The records of a TFRecord file: each has its length in 8 bytes before it, and two checksums of 4 bytes."""
    with file.open("rb") as opened:
        while head := opened.read(12):
            # As many bytes as there are: a damaged length may be any number.
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            rest = file.stat().st_size - opened.tell()
            if len(head) < 12 or length + 4 > rest:
                run.notes.append("the last record is half written: left out")
                return
            yield opened.read(length)
            opened.read(4)
