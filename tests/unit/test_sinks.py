"""Sinks: what is logged can be read back, in spite of late columns, NaN, crashes and full disks."""

import csv
import errno
import io
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from lumen.sinks import CSV, JSONL, Memory, TensorBoard, scalars
from tests import zygote

names = st.text("abcxyz_/ ,\"'é", min_size=1, max_size=6)
numbers = st.floats() | st.integers(-(2**53), 2**53)
logs = st.lists(st.dictionaries(names, numbers, max_size=4), max_size=6)
FILES = [(JSONL, "metrics.jsonl"), (CSV, "metrics.csv")]
SINKS = [*FILES, (TensorBoard, "board")]


def ticking():
    return iter([float(second) for second in range(100)]).__next__


def read(path):
    """The rows of a JSONL or CSV file as numbers by name."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [{name: float(value) for name, value in json.loads(line).items()} for line in text.splitlines()]
    table = csv.DictReader(io.StringIO(text, newline=""))
    return [{name: float(value) for name, value in row.items() if value != ""} for row in table]


def read_events(logdir):
    """(step, wall time, values) of each event in the files of a directory, by TensorBoard's record format."""
    found = []
    for path in sorted(logdir.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("summary"):
                values = {value.tag: value.simple_value for value in event.summary.value}
                found.append((event.step, event.wall_time, values))
    return found


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[name] == other[name] or (math.isnan(one[name]) and math.isnan(other[name])) for name in one
    )


@pytest.mark.parametrize(("make", "name"), FILES)
@given(logged=logs, sessions=st.integers(1, 3))
def test_what_is_logged_is_read_back(tmp_path_factory, make, name, logged, sessions):
    path = tmp_path_factory.mktemp("sink") / "new" / name
    clock = ticking()
    for session in range(sessions):
        sink = make(path, time_fn=clock)
        for step, values in enumerate(logged):
            if step % sessions == session:
                sink.log(step, values)
        sink.close()
        sink.close()
    steps = [step for session in range(sessions) for step in range(session, len(logged), sessions)]
    expected = [{"step": step, "time": float(i), **logged[step]} for i, step in enumerate(steps)]
    if expected:
        assert all(equal(one, other) for one, other in zip(read(path), expected, strict=True))
    assert path.exists() == bool(expected)


@pytest.mark.parametrize(("make", "name"), FILES)
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_left_unfinished_by_a_crash_is_cut_off(tmp_path, make, name, cut):
    path = tmp_path / name
    for step in range(2):
        sink = make(path, time_fn=lambda: 0.5)
        sink.log(step, {"loss": 0.25})
        sink.close()
    path.write_bytes(path.read_bytes()[:-cut])
    sink = make(path, time_fn=lambda: 0.5)
    sink.log(2, {"loss": 0.25, "late": 1.0})
    sink.close()
    row = {"time": 0.5, "loss": 0.25}
    assert read(path) == [{"step": 0, **row}, {"step": 2, **row, "late": 1.0}]


@pytest.mark.parametrize(("make", "name"), FILES)
def test_each_row_is_on_disk_when_log_returns(tmp_path, make, name):
    sink = make(tmp_path / name)
    for step in range(3):
        sink.log(step, {"loss": float(step)})
        assert [row["loss"] for row in read(tmp_path / name)] == [float(s) for s in range(step + 1)]
    sink.close()
    sink.log(3, {"loss": 3.0})  # opens again
    sink.close()
    assert len(read(tmp_path / name)) == 4


def test_json_is_strict(tmp_path):
    sink = JSONL(tmp_path / "a", time_fn=lambda: 1.0)
    sink.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "n": 3})
    sink.close()
    text = (tmp_path / "a").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 0, "time": 1.0, "a": "NaN", "b": "Infinity", "c": "-Infinity", "n": 3,
    }  # fmt: skip


def test_late_columns_come_last_and_leave_no_file_behind(tmp_path):
    sink = CSV(tmp_path / "a.csv", time_fn=lambda: 1.0)
    sink.log(0, {"b": 1})
    sink.log(1, {"c": 2, "a": 3})
    sink.log(2, {"b": 4})
    sink.close()
    assert (tmp_path / "a.csv").read_text() == "step,time,b,c,a\n0,1.0,1,,\n1,1.0,,2,3\n2,1.0,4,,\n"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_crash_while_widening_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    sink = CSV(path)
    sink.log(0, {"a": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            sink.log(1, {"b": 2})
    assert path.read_bytes() == before
    sink.log(1, {"b": 2})
    sink.close()
    assert [row["step"] for row in read(path)] == [0, 1]


def test_another_table_is_not_continued(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    sink = CSV(tmp_path / "a.csv")
    for _ in range(2):
        with pytest.raises(ValueError, match="a table with the columns x, y"):
            sink.log(0, {"a": 1})
    assert (tmp_path / "a.csv").read_text() == "x,y\n1,2\n"


# ------------------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_reads_the_scalars(tmp_path):
    sink = TensorBoard(tmp_path / "run", time_fn=ticking())
    sink.log(0, {"train/loss": 0.5, "lr": 1e-3})
    sink.log(10, {"train/loss": torch.tensor(0.25), "f1": np.array([0.5, 1.0])})
    on_disk = read_events(tmp_path / "run")
    sink.close()
    assert on_disk == read_events(tmp_path / "run") == [
        (0, 0.0, {"train/loss": 0.5, "lr": float(np.float32(1e-3))}),
        (10, 1.0, {"train/loss": 0.25, "f1/0": 0.5, "f1/1": 1.0}),
    ]  # fmt: skip


def test_event_files_of_one_second_do_not_collide(tmp_path):
    for step in range(3):
        sink = TensorBoard(tmp_path)
        sink.log(step, {"loss": 1.0})
        sink.close()
        sink.close()
    assert sorted(step for step, _, _ in read_events(tmp_path)) == [0, 1, 2]


def test_a_missing_tensorboardx_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'tensorboardX>=2\.6\.2'"):
        TensorBoard(tmp_path)


def test_tensorboardx_loads_on_first_use():
    code = "import sys, lumen.sinks; assert 'tensorboardX' not in sys.modules"
    assert zygote.run([sys.executable, "-c", code], bare=True).returncode == 0


# ---------------------------------------------------------------------------------------------- all sinks


@pytest.mark.parametrize(("make", "name"), SINKS)
def test_making_and_closing_a_sink_touches_no_file(tmp_path, make, name):
    make(tmp_path / "runs" / name).close()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("make", "name"), SINKS)
def test_a_path_that_cannot_be_is_an_error(tmp_path, make, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make(tmp_path / "file" / name).log(0, {"loss": 1.0})


@pytest.mark.parametrize(("make", "name"), SINKS)
def test_a_full_disk_is_an_error(tmp_path, monkeypatch, make, name):
    class FullDisk(io.BytesIO if make is TensorBoard else io.StringIO):
        flush = full_disk

    opener = {JSONL: "lumen.sinks.jsonl.open_lines", CSV: "lumen.sinks.csv.open_lines"}
    monkeypatch.setattr(opener.get(make, "tensorboardX.record_writer.open_file"), lambda _: FullDisk())
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / name).log(0, {"loss": 1.0})


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("make", [JSONL, CSV])
@pytest.mark.parametrize("taken", ["step", "time"])
def test_a_value_cannot_take_the_name_of_the_sinks_own(tmp_path, make, taken):
    with pytest.raises(ValueError, match=f"A value is named '{taken}'"):
        make(tmp_path / "a").log(0, {taken: 1.0})


def test_memory_keeps_rows():
    sink = Memory()
    sink.log(1, {"a": torch.tensor(0.5)})
    sink.log(2, {"b": 1})
    sink.log(3, {"a": 0.25, "b": 2})
    sink.close()
    assert sink["a"] == ([1, 3], [0.5, 0.25])
    assert sink.rows[1] == (2, {"b": 1})
    with pytest.raises(KeyError, match="'c' was not logged; logged were a, b"):
        sink["c"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, {"m": 1}),
        (0.1, {"m": 0.1}),
        (True, {"m": 1}),
        (np.float32(0.5), {"m": 0.5}),
        (np.int64(3), {"m": 3}),
        (np.array(2.0), {"m": 2.0}),
        (torch.tensor(0.5, dtype=torch.bfloat16), {"m": 0.5}),
        (torch.tensor(0.5, requires_grad=True), {"m": 0.5}),
        (torch.tensor([[1, 2]]), {"m/0/0": 1, "m/0/1": 2}),
        ([0.5, True], {"m/0": 0.5, "m/1": 1.0}),
        (torch.zeros(0), {}),
    ],
)
def test_scalars(value, expected):
    found = scalars({"m": value})
    assert found == expected
    assert [type(each) for each in found.values()] == [type(each) for each in expected.values()]


@pytest.mark.parametrize("value", ["0.5", None, 1j, object(), {"a": 1}])
def test_what_is_not_a_number_is_named(value):
    with pytest.raises(TypeError, match=r"'m' is .* sinks take real numbers"):
        scalars({"m": value})
