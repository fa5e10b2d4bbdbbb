"""Read the logs of a run: JSONL or CSV, otherwise TensorBoard's event files.

The run may be in progress, may have died in the middle of a line, or may have restarted: lines that are not rows are
skipped, and `notes` report them.
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
_INDEX_COLUMNS = ("step", "time")
_MAX_STEP = 2**63
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as the JSONL sink writes them


class Row(NamedTuple):
    """The values of one log call; `time` is in seconds since the epoch, or None if unknown."""

    step: int
    time: float | None
    values: dict[str, float]


@dataclass
class RunLog:
    """The rows of one run in the order of its steps, with notes on reading them."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all logged values, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))


def read_run(path: Path) -> RunLog:
    """Read the log file `path`, or the logs of the run in the directory `path`.

    Raises `LumenError`, which suggests other paths, if there is nothing to read.
    """
    try:
        files = _find_files(path)
        is_board = _select_reader(files[0]) is _read_events
        run = RunLog(files[0].parent if is_board else files[0], config=_read_config(files[0]))
        for file in files:
            _select_reader(file)(file, run)
    except OSError as error:
        raise LumenError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not run.rows and not run.notes:
        run.notes.append("nothing has been logged yet")
    return run


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise LumenError(f"{path} does not exist. {find_checkpoints.suggest_path(path)}")
    for name, pattern in (("metrics.jsonl", "*.jsonl"), ("metrics.csv", "*.csv")):
        files = sorted(file for file in path.glob(pattern) if file.is_file())
        if path / name in files or len(files) == 1:
            return [path / name if path / name in files else files[0]]
        if files:
            raise LumenError(f"{path} contains several log files; pass one of them: {', '.join(map(str, files))}.")
    events = sorted(path.glob(_EVENTS))
    if not events:
        raise LumenError(f"{path} contains no metrics.jsonl, CSV or event files. {_suggest_below(path)}")
    return events


def _suggest_below(path: Path) -> str:
    directories = {file.parent for pattern in ("*.jsonl", "*.csv", _EVENTS) for file in path.glob(f"*/{pattern}")}
    if directories:
        return f"There are some in {find_checkpoints.format_paths(sorted(directories))}."
    return 'A run writes one with lm.Runner(step, sinks=[lm.sinks.JSONL("runs/a/metrics.jsonl")]).'


def _read_config(file: Path) -> Mapping[str, Any]:
    """The configuration that the JSONL and CSV sinks write next to their file."""
    try:
        config = json.loads(file.with_name(f"{file.stem}.config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _select_reader(file: Path) -> Callable[[Path, RunLog], None]:
    if "tfevents" in file.name:
        return _read_events
    return _read_csv if file.suffix == ".csv" else _read_jsonl


def _add_row(run: RunLog, row: Row) -> None:
    """Add a row. If its step is lower than the last one, the run restarted there: drop the rows from that step on."""
    if run.rows and row.step < run.rows[-1].step:
        _rewind(run, row.step)
    run.rows.append(row)


def _rewind(run: RunLog, step: int) -> None:
    earlier = [row for row in run.rows if row.step < step]
    if len(earlier) < len(run.rows):
        run.notes.append(f"the run restarted at step {step}: rows logged twice show the later values")
    run.rows = earlier


# ------------------------------------------------------------------------------------------- JSONL and CSV


def _read_jsonl(file: Path, run: RunLog) -> None:
    text = _complete_lines(file, run)
    bad_lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        row = _parse_row(line)
        if row is None:
            bad_lines.append(number)
        else:
            _add_row(run, row)
    _note_unreadable(run, file, bad_lines, 'a JSON object such as {"step": 50, "time": 1.7e9, "train/loss": 0.5}')


def _parse_row(line: str) -> Row | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("step"), int) or abs(fields["step"]) >= _MAX_STEP:
        return None
    numbers = ((name, _to_float(value)) for name, value in fields.items() if name not in _INDEX_COLUMNS)
    return Row(fields["step"], _to_float(fields.get("time")), {name: n for name, n in numbers if n is not None})


def _to_float(value: Any) -> float | None:
    """The value as a float, or None if it is not a number, such as a text or a histogram."""
    if isinstance(value, int | float) or value in _NOT_FINITE:
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    return None


def _read_csv(file: Path, run: RunLog) -> None:
    rows = csv.reader(io.StringIO(_complete_lines(file, run), newline=""))
    bad_lines: list[int] = []
    try:
        columns = next(rows, [])
        for cells in rows:
            row = _parse_cells(columns, cells)
            if row is None:
                bad_lines.append(rows.line_num)
            else:
                _add_row(run, row)
    except csv.Error:
        bad_lines.append(rows.line_num)
    _note_unreadable(run, file, bad_lines, "a table with the columns step, time, …")


def _parse_cells(columns: list[str], cells: list[str]) -> Row | None:
    try:
        values = {name: float(cell) for name, cell in zip(columns, cells, strict=False) if cell}
        step = int(values.pop("step"))
        return Row(step, values.pop("time", None), values) if abs(step) < _MAX_STEP else None
    except (KeyError, ValueError, OverflowError):
        return None


def _complete_lines(file: Path, run: RunLog) -> str:
    """The text up to the last newline: the run is still writing the next line, or died while writing it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        run.notes.append("the last line is incomplete and was skipped")
    return complete


def _note_unreadable(run: RunLog, file: Path, bad_lines: list[int], expected: str) -> None:
    if not bad_lines:
        return
    if not run.rows:
        raise LumenError(f"{file} is not a log of a run: line {bad_lines[0]} is not {expected}.")
    numbers = ", ".join(map(str, bad_lines[:3])) + ("…" if len(bad_lines) > 3 else "")
    run.notes.append(f"skipped unreadable {'line' if len(bad_lines) == 1 else 'lines'} {numbers}")


# --------------------------------------------------------------------------------------- TensorBoard


def _read_events(file: Path, run: RunLog) -> None:
    """Read the numbers of an event file. A start marker drops the rows of later steps in earlier files."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    except ImportError as error:
        raise LumenError(
            f"reading the event file {file} needs tensorboardX: pip install 'tensorboardX>=2.6.2'"
        ) from error
    for record in _read_records(file, run):
        try:
            event = Event.FromString(record)
        except DecodeError:
            run.notes.append(f"{file.name} is damaged: its remaining records were skipped")
            return
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            _rewind(run, event.step)
        values = {item.tag: item.simple_value for item in event.summary.value if item.HasField("simple_value")}
        if values:
            _add_row(run, Row(event.step, event.wall_time, values))


def _read_records(file: Path, run: RunLog) -> Iterator[bytes]:
    """Read the records of a TFRecord file: 8 bytes of length, and two checksums of 4 bytes, surround each record."""
    with file.open("rb") as stream:
        while header := stream.read(12):
            # Never read past the end of the file: a damaged length may be any number.
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            remaining = file.stat().st_size - stream.tell()
            if len(header) < 12 or length + 4 > remaining:
                run.notes.append("the last record is incomplete and was skipped")
                return
            yield stream.read(length)
            stream.read(4)
