"""Configuration and exact resume: after a crash anywhere, a file ends as that of a run without one."""

import errno
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from lumen.errors import ValueKindError
from lumen.sinks import CSV, JSONL, Console, Memory, TensorBoard, Text, configure, position, rewind

FILES = [(JSONL, "metrics.jsonl"), (CSV, "metrics.csv")]
names = st.sampled_from(["loss", "val/loss", "a,b", 'q"', "two\nlines"])
logs = st.lists(st.dictionaries(names, st.floats(), max_size=3), min_size=1, max_size=6)


class Run:
    """A sink whose clock tells the step, so that two runs can write the same bytes."""

    def __init__(self, make, path):
        self.now = 0.0
        self.sink = make(path, time_fn=lambda: self.now)

    def log(self, logged, begin, end):
        for step in range(begin, end):
            self.now = float(step)
            self.sink.log(step, logged[step])


@pytest.mark.parametrize(("make", "name"), FILES)
@given(logged=logs, data=st.data())
def test_after_a_crash_the_file_is_that_of_an_uninterrupted_run(tmp_path_factory, make, name, logged, data):
    folder = tmp_path_factory.mktemp("resume")
    whole = Run(make, folder / "whole" / name)
    whole.log(logged, 0, len(logged))
    whole.sink.close()

    path = folder / "crashed" / name
    saved = data.draw(st.integers(0, len(logged)), label="rows at the checkpoint")
    crash = data.draw(st.integers(saved, len(logged)), label="rows at the crash")
    first = Run(make, path)
    first.log(logged, 0, saved)
    place = position(first.sink)
    assert place == saved
    first.log(logged, saved, crash)
    first.sink.close()
    if crash > saved:  # the last row may be torn
        text = path.read_bytes()
        last = len(text) - (text[:-1].rfind(b"\n") + 1)
        path.write_bytes(text[: len(text) - data.draw(st.integers(0, last), label="bytes lost")])

    resumed = first if data.draw(st.booleans(), label="same sink") else Run(make, path)
    rewind(resumed.sink, place)
    assert position(resumed.sink) == (saved if path.exists() else 0)
    resumed.log(logged, saved, len(logged))
    assert position(resumed.sink) == len(logged)
    resumed.sink.close()
    assert position(resumed.sink) == position(make(path)) == len(logged)
    assert path.read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize(("make", "name"), FILES)
def test_a_file_that_was_moved_away_or_cut_stays_as_it_is(tmp_path, make, name):
    sink = make(tmp_path / name)
    rewind(sink, 3)
    assert not (tmp_path / name).exists()
    sink.log(0, {"loss": 1.0})
    sink.close()
    before = (tmp_path / name).read_bytes()
    rewind(make(tmp_path / name), 2)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize(("make", "name"), FILES)
def test_a_sink_that_is_open_can_be_rewound(tmp_path, make, name):
    sink = make(tmp_path / name, time_fn=lambda: 1.0)
    for step in range(3):
        sink.log(step, {"loss": 1.0})
    rewind(sink, 1)
    assert position(sink) == 1
    sink.log(1, {"loss": 1.0})
    assert position(sink) == 2
    sink.close()


@pytest.mark.parametrize(("make", "name"), FILES)
def test_a_torn_row_is_none(tmp_path, make, name):
    sink = make(tmp_path / name)
    for step in range(2):
        sink.log(step, {"loss": 1.0})
    sink.close()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert position(make(tmp_path / name)) == 1


@pytest.mark.parametrize(("make", "name"), FILES)
def test_a_position_stands_for_rows_on_disk(tmp_path, monkeypatch, make, name):
    sink = make(tmp_path / name)
    sink.log(0, {"loss": 1.0})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        position(sink)
    sink.close()


def test_memory_is_rewound():
    sink = Memory()
    for step in range(4):
        sink.log(step, {"loss": 1.0})
    assert position(sink) == 4
    rewind(sink, 9)
    rewind(sink, 2)
    assert sink["loss"][0] == [0, 1]


class Two:
    """A user's sink of two methods."""

    def log(self, step, values):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("make", [Two, Console])
def test_a_sink_of_two_methods_is_passed_over(make, capsys):
    sink = make()
    configure(sink, {"lr": 0.1})
    assert position(sink) is None
    rewind(sink, 3)
    assert capsys.readouterr().out == ("" if make is Two else "config  lr 0.1\n")


@pytest.mark.parametrize(("make", "name"), FILES)
def test_no_position_is_no_rewind(tmp_path, make, name):
    sink = make(tmp_path / name)
    sink.log(0, {"loss": 1.0})
    rewind(sink, None)
    assert position(sink) == 1
    sink.close()


# ------------------------------------------------------------------------------------------ TensorBoard


def events(logdir):
    for path in sorted(logdir.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown(logdir):
    """The (step, tag, value) that TensorBoard keeps: a START mark drops what has its step or a later one."""
    kept = []
    for event in events(logdir):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            kept = [row for row in kept if row[0] < event.step]
        kept += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return kept


@given(steps=st.lists(st.integers(1, 3), min_size=1, max_size=8), data=st.data())
def test_tensorboard_shows_what_an_uninterrupted_run_shows(tmp_path_factory, steps, data):
    folder = tmp_path_factory.mktemp("board")
    at = [sum(steps[: i + 1]) for i in range(len(steps))]
    saved = data.draw(st.integers(0, len(at)))
    crash = data.draw(st.integers(saved, len(at)))
    sink = TensorBoard(folder)
    for step in at[:saved]:
        sink.log(step, {"loss": step / 2})
    place = position(sink)
    for step in at[saved:crash]:
        sink.log(step, {"loss": step / 2})
    sink.close()
    resumed = sink if data.draw(st.booleans()) else TensorBoard(folder)
    rewind(resumed, place)
    assert position(resumed) == place
    for step in at[saved:]:
        resumed.log(step, {"loss": step / 2})
    resumed.close()
    assert shown(folder) == [(step, "loss", step / 2) for step in at]


def test_tensorboard_leaves_the_files_of_an_earlier_run(tmp_path):
    earlier = TensorBoard(tmp_path)
    earlier.log(5, {"loss": 1.0})
    earlier.close()
    sink = TensorBoard(tmp_path)
    assert position(sink) is None
    rewind(sink, position(sink))
    sink.log(1, {"loss": 2.0})
    sink.close()
    assert shown(tmp_path) == [(5, "loss", 1.0), (1, "loss", 2.0)]


def test_rewinding_tensorboard_touches_no_file(tmp_path):
    sink = TensorBoard(tmp_path / "run")
    rewind(sink, 3)
    sink.close()
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- configuration

CONFIG = {"model": {"width": 64, "norm": None, "bias": True}, "lr": 1e-3, "betas": (0.9, 0.95), "worst": math.inf}
PLAIN = {"model": {"width": 64, "norm": None, "bias": True}, "lr": 1e-3, "betas": [0.9, 0.95], "worst": "Infinity"}


@pytest.mark.parametrize(("make", "name"), FILES)
def test_the_configuration_lies_beside_the_file(tmp_path, make, name):
    sink = make(tmp_path / "new" / name)
    configure(sink, {"lr": 0.5})
    configure(sink, CONFIG)
    sink.close()
    assert os.listdir(tmp_path / "new") == ["metrics.config.json"]
    text = (tmp_path / "new" / "metrics.config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == PLAIN


def test_a_crash_while_writing_the_configuration_leaves_the_old_one(tmp_path, monkeypatch):
    sink = JSONL(tmp_path / "a.jsonl")
    configure(sink, {"lr": 0.5})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        configure(sink, {"lr": 0.25})
    assert json.loads((tmp_path / "a.config.json").read_text()) == {"lr": 0.5}


def test_memory_keeps_a_copy():
    config = {"model": {"width": 64}}
    sink = Memory()
    configure(sink, config)
    config["model"]["width"] = 1
    assert sink.configuration == {"model": {"width": 64}}


def test_tensorboard_shows_the_configuration_once(tmp_path):
    sink = TensorBoard(tmp_path)
    configure(sink, CONFIG)
    assert not any(tmp_path.iterdir())
    sink.log(7, {"loss": 0.5})
    sink.log(8, {"loss": 0.5})
    sink.close()
    found = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    tags = ["_hparams_/session_start_info", "config/text_summary", "loss", "loss"]
    assert [(step, value.tag) for step, value in found] == list(zip([0, 0, 7, 8], tags, strict=True))
    plugin = found[0][1].metadata.plugin_data
    assert plugin.plugin_name == "hparams"
    hparams = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    kinds = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
    assert kinds == {"model.width": 64.0, "model.bias": True, "lr": 1e-3, "betas": "[0.9, 0.95]", "worst": "Infinity"}
    assert isinstance(kinds["model.bias"], bool)
    text = found[1][1].tensor.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines())  # a block of code in Markdown
    assert json.loads(text) == PLAIN


def test_a_resumed_run_still_shows_its_configuration(tmp_path):
    sink = TensorBoard(tmp_path)
    configure(sink, CONFIG)  # in whichever order
    rewind(sink, -1)
    sink.log(0, {"loss": 0.5})
    sink.close()
    assert [tag for _, tag, _ in shown(tmp_path)] == ["_hparams_/session_start_info", "config/text_summary", "loss"]


@pytest.mark.parametrize("make", [Memory, Console, lambda: JSONL("never"), lambda: TensorBoard("never")])
@pytest.mark.parametrize("value", [object(), Text("a"), b"a"])
def test_what_json_does_not_have_is_named(make, value):
    with pytest.raises(ValueKindError, match=r"'model\.sizes\.1' of the configuration is .* write str\(value\)"):
        configure(make(), {"model": {"sizes": [1, value]}})
    assert not os.path.exists("never")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
