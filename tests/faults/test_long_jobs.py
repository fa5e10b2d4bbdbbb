"""Errors that a long job meets, of its data, sinks and disk: what is saved, what is set aside, what ends it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings

import pytest
import torch

import lumen as lm
from lumen import checkpoint
from lumen.checkpoint import _load, _save, header
from lumen.errors import (
    CheckpointError,
    CheckpointLockedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InexactWarning,
    SinkError,
)

BATCHES = [torch.full((2,), float(i)) for i in range(6)]


def step(state, batch):
    return {"w": state["w"] * 0.5 + batch.mean()}, {"loss": batch.mean()}


class Data:
    """Batches, of which the one at `bad` raises `error`."""

    def __init__(self, error=None, bad=5):
        self.error, self.bad = error, bad

    def __iter__(self):
        for place, batch in enumerate(BATCHES):
            if place == self.bad and self.error is not None:
                raise self.error
            yield batch


class Failing:
    """A sink whose `log` fails at some steps, and whose `close` may."""

    def __init__(self, steps=(), close=None, on_error="raise"):
        self.steps, self.close_error, self.on_error, self.rows = steps, close, on_error, []

    def log(self, step, values):
        if step in self.steps:
            raise TimeoutError(f"no answer at step {step}")
        self.rows.append(step)

    def close(self):
        if self.close_error:
            raise self.close_error


def fit(directory, data=BATCHES, *, resume="auto", every=2, epochs=1, keep=None, **options):
    runner = lm.Runner(
        step,
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=every), keep=keep),
        log_every=1,
        progress=False,
        **options,
    )
    return runner.fit({"w": torch.zeros(1)}, data, until=lm.Epochs(epochs), resume=resume)


def steps_of(directory):
    return lm.Checkpointer(directory).store.steps()


def rows_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- data and sinks


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), FileNotFoundError("a.jpg"), TimeoutError("s3")])
def test_an_os_error_of_the_data_ends_in_a_checkpoint(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        fit(tmp_path, Data(error), every=4)
    assert caught.value.__notes__ == ["raised after step 5 (epoch 0, batch 5)"]
    assert steps_of(tmp_path) == [4, 5]


def test_an_error_of_the_checkpoints_own_disk_is_not_met_twice(tmp_path, monkeypatch):
    saves = []

    def full(*_args, **_kwargs):
        saves.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_save, "_write_single", full)
    with pytest.raises(CheckpointError, match="No space left"):
        fit(tmp_path, epochs=3)
    assert len(saves) == 1
    monkeypatch.undo()
    monkeypatch.setattr(os, "scandir", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(CheckpointError, match="denied"):
        lm.Checkpointer(tmp_path).store.steps()


def test_a_sink_that_fails_ends_the_run_with_a_checkpoint_and_the_others_have_the_row(tmp_path):
    log = lm.sinks.JSONL(tmp_path / "m.jsonl")
    for sinks in ([Failing(steps=(3,)), log], [log, Failing(steps=(5,))]):
        with pytest.raises(TimeoutError, match="no answer") as caught:
            fit(tmp_path, sinks=sinks, every=100)
        assert any("Failing could not log the values of step" in note for note in caught.value.__notes__)
        assert rows_of(tmp_path / "m.jsonl") == list(range(1, steps_of(tmp_path)[-1] + 1))
    fit(tmp_path, sinks=[log], every=100)
    assert steps_of(tmp_path) == [3, 5, 6]
    assert rows_of(tmp_path / "m.jsonl") == [1, 2, 3, 4, 5, 6]


def test_a_sink_may_fail_where_it_says_so(tmp_path):
    sink = Failing(steps=(2, 3, 5), close=OSError("not closed"), on_error="warn")
    other = lm.sinks.Memory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(tmp_path, sinks=[sink, other])
    said = [str(each.message) for each in caught if each.category is InexactWarning]
    assert result.clock.step == 6
    assert sink.rows == [1, 4, 6]
    assert other["train/loss"] == ([1, 2, 3, 4, 5, 6], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    told = ["step 2 (TimeoutError", "step 5 (TimeoutError", "close (OSError: not closed)"]
    assert len(said) == 3
    assert all(what in text for what, text in zip(told, said, strict=True))
    with pytest.raises(SinkError, match="'raise' or 'warn'"):
        fit(tmp_path / "other", sinks=[Failing(on_error="ignore")])
    with pytest.raises(SinkError, match="'raise' or 'warn'"):
        lm.sinks.JSONL(tmp_path / "m.jsonl", on_error="ignore")


def test_a_sink_that_cannot_close_is_an_error_after_the_last_checkpoint(tmp_path):
    log = lm.sinks.JSONL(tmp_path / "m.jsonl")
    with pytest.raises(OSError, match="not closed") as caught:
        fit(tmp_path, sinks=[Failing(close=OSError("not closed")), log])
    assert "could not close" in caught.value.__notes__[0]
    assert steps_of(tmp_path)[-1] == 6
    assert log._file is None
    with pytest.raises(TimeoutError) as first:  # the first error is the one to see
        fit(tmp_path / "two", Data(TimeoutError("s3")), sinks=[Failing(close=OSError("not closed"))])
    assert "a sink could not close either: OSError: not closed" in first.value.__notes__


@pytest.mark.parametrize("kind", [lm.sinks.JSONL, lm.sinks.CSV])
def test_rows_after_a_failed_one_and_after_a_file_that_was_taken_away(tmp_path, kind):
    sink = kind(tmp_path / "rows", on_error="warn")
    sink.log(1, {"loss": 1.0})
    written, sink._file.flush = sink._file, lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(OSError, match="No space"):
        sink.log(2, {"loss": 2.0})
    assert written.closed
    sink.log(3, {"loss": 3.0})
    count = sink.position()
    assert count == (tmp_path / "rows").read_text().count("\n") - (kind is lm.sinks.CSV)
    os.rename(tmp_path / "rows", tmp_path / "moved")
    sink.log(4, {"loss": 4.0})
    sink.close()
    assert sink.position() == 1
    assert "4" in (tmp_path / "rows").read_text()


# ------------------------------------------------------------------------------------------- the directory


def test_a_checkpoint_without_its_header_is_set_aside(tmp_path):
    whole = fit(tmp_path / "whole").state
    fit(tmp_path, BATCHES[:4])
    lost = tmp_path / "checkpoints" / "4"
    os.remove(lost / header.FILE)
    with pytest.raises(CorruptCheckpointError, match="has lost its header"):
        checkpoint.load(lost)
    with pytest.raises(CheckpointError, match="up to step 4"):
        fit(tmp_path, resume="never")
    with pytest.warns(InexactWarning, match="the checkpoint 4 is damaged and was set aside; the run resumes from 2"):
        assert torch.equal(fit(tmp_path).state["w"], whole["w"])
    assert steps_of(tmp_path) == [2, 4, 6]
    assert (lost.parent / "damaged-4").is_dir()
    for each in (2, 4, 6):
        os.remove(lost.parent / str(each) / header.FILE)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoints/6 has lost its header"):
        fit(tmp_path)
    with checkpoint.Store(lost.parent) as store, pytest.warns(InexactWarning, match="was renamed to damaged-4-1"):
        store.save(4, {"w": torch.ones(1)})
    with pytest.raises(CheckpointNotFoundError, match="was not written by Lumen"):
        checkpoint.load(tmp_path)


def test_a_directory_that_was_deleted_under_a_run_is_locked_again(tmp_path):
    with checkpoint.Store(tmp_path / "run", keep=None) as store:
        store.save(1, {"w": torch.ones(1)})
        store.wait()
        shutil.rmtree(tmp_path / "run")
        with pytest.warns(InexactWarning, match="was deleted or moved away during the run"):
            store.save(2, {"w": torch.ones(1)})
        with pytest.raises(CheckpointLockedError):
            checkpoint.Store(tmp_path / "run").open()
        store.save(3, {"w": torch.ones(1)})
        store.wait()
        assert store.steps() == [2, 3]
        shutil.rmtree(tmp_path / "run")
        with checkpoint.Store(tmp_path / "run"), pytest.raises(CheckpointLockedError):  # another one was faster
            store.save(4, {"w": torch.ones(1)})


# ------------------------------------------------------------------------------------------- hostile names


def test_no_message_has_a_control_character_of_a_leafs_name(tmp_path):
    path, name = tmp_path / "first", "a\x1b[31m\nb\x07"
    checkpoint.save(path, {name: torch.ones(2), "c": torch.ones(3)})

    def said(error, call):
        with pytest.raises(error) as caught:
            call()
        text = str(caught.value)
        assert "a\\x1b[31m\\nb\\x07" in text
        assert all(c.isprintable() for line in text.split("\n") for c in line)

    said(CheckpointMismatchError, lambda: checkpoint.restore(path, {"c": torch.ones(3)}))
    said(CheckpointMismatchError, lambda: checkpoint.restore(path, {name: torch.ones(5), "c": torch.ones(3)}))
    said(CheckpointMismatchError, lambda: checkpoint.restore(path, {name: torch.ones(2), name + "2": torch.ones(3)}))
    said(CheckpointNotFoundError, lambda: checkpoint.load(path, under="d"))
    said(CheckpointNotFoundError, lambda: checkpoint.export(path, tmp_path / "out.safetensors", what="params"))
    data = next(each for each in path.rglob("*") if each.is_file() and each.parent.name == "c" and "1B" in str(each))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    said(CorruptCheckpointError, lambda: checkpoint.load(path))
    row = {"item": "state", "path": ["w"], "kind": "tensor", "dtype": "float32", "shape": [1], "array": "w\x1b"}
    with pytest.raises(ValueError, match=r"the path 'w\\x1b' is not allowed"):
        header._record_from_json(row)
    assert _load.read_header(path).records[0].path == (name,)
