"""Checkpoints under kill -9, full disks, flipped bits and malice: complete, or an error, or invisible."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from lumen import checkpoint
from lumen.checkpoint import Store, _load, _save, header
from lumen.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LumenError,
)
from tests import zygote


def value_of(step):
    generator = torch.Generator().manual_seed(step)
    params = {f"layer{i}.weight": torch.randn(64, 65, generator=generator) for i in range(4)}
    return {"params": params, "half": torch.randn(33, generator=generator).bfloat16(), "step": step}


def assert_whole(store, step):
    found = store.restore(step, value_of(0))
    expected = value_of(step)
    assert found["step"] == step
    assert torch.equal(found["half"], expected["half"])
    assert all(torch.equal(found["params"][name], expected["params"][name]) for name in expected["params"])


# ------------------------------------------------------------------------------------------------------- kill -9

RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint_store import value_of
from lumen.checkpoint import Store

with Store(sys.argv[1], keep=2, keep_every=50) as store:
    step = (store.latest() or 0) + 1
    while True:
        store.save(step, value_of(step))
        store.save(step, value_of(step))  # replaces it
        print(step, flush=True)
        step += 1
"""


def test_kill_at_any_moment(tmp_path):
    """At random moments of saves, replacements and deletions, in one directory whose run goes on each time."""
    chance = random.Random(0)
    store = Store(tmp_path, keep=2, keep_every=50)
    last = 0
    command = [sys.executable, "-c", RUN, str(tmp_path), str(Path(__file__).parent)]
    for _ in range(12):
        process = zygote.start(command, stdout=subprocess.PIPE)
        try:
            process.stdout.readline()  # it has saved something
            time.sleep(chance.uniform(0, 0.25))
        finally:
            process.kill()
        said, _ = process.communicate(timeout=60)
        last = max([last, *map(int, said.split())])
        for step in store.steps():
            assert_whole(store, step)
        with Store(tmp_path, keep=2, keep_every=50) as again:
            steps = again.steps()
            assert set(os.listdir(tmp_path)) == {".lumen-lock", *map(str, steps)}
            assert steps[-1] >= last  # its first save was written before the second was taken
            for step in steps:
                assert_whole(again, step)
        last = steps[-1]
    assert last >= 12


def test_a_replacement_cut_short_is_undone(tmp_path):
    with Store(tmp_path) as store:
        store.save(3, value_of(3))
        store.wait()
    os.rename(tmp_path / "3", tmp_path / f".3{_save.REPLACED}")
    shutil.copytree(tmp_path / f".3{_save.REPLACED}", tmp_path / f".4{_save.DELETED}")
    (tmp_path / f".5{_save.TEMPORARY}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Store(tmp_path) as store:
        assert store.steps() == [3]
        assert_whole(store, 3)
    assert sorted(os.listdir(tmp_path)) == [".lumen-lock", "3"]


# --------------------------------------------------------------------------------------------- ends of a process

END = """
import sys, torch
from lumen.checkpoint import Store
store = Store(sys.argv[1]).open()
store.save(1, {"x": torch.arange(3_000_000.0)})
"""


@pytest.mark.parametrize("how", ["", "sys.exit(3)", "raise ValueError('mine')", "del store"])
def test_a_process_that_ends_finishes_its_save(tmp_path, how):
    result = zygote.run([sys.executable, "-c", END + how, str(tmp_path)])
    assert result.returncode == {"": 0, "sys.exit(3)": 3, "del store": 0}.get(how, 1)
    found = Store(tmp_path).restore(1, {"x": torch.zeros(3_000_000)})
    assert torch.equal(found["x"], torch.arange(3_000_000.0))


def test_a_failure_at_the_end_is_said(tmp_path):
    broken = """
store.wait()
import lumen.checkpoint._save as writing
writing.sync = lambda *_: 1 / 0
store.save(2, {"x": torch.ones(1)})
"""
    result = zygote.run([sys.executable, "-c", END + broken, str(tmp_path)])
    assert "ZeroDivisionError" in result.stderr
    assert sorted(os.listdir(tmp_path)) == [".lumen-lock", "1"]


def test_an_interrupt_while_waiting(tmp_path, monkeypatch):
    write = _save.write

    def interrupted(*args, **kwargs):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        write(*args, **kwargs)

    store = Store(tmp_path).open()
    monkeypatch.setattr(_save, "write", interrupted)
    store.save(1, value_of(1))
    with pytest.raises(KeyboardInterrupt):
        store.wait()
    store.close()
    assert_whole(store, 1)


# ------------------------------------------------------------------------------------------------- failing writes


SPOTS = {
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "open": (os, "open"),
    "header": (Path, "write_text"),
    "orbax": (_save._orbax, "write"),
    "read": (Path, "read_bytes"),
}


@pytest.mark.parametrize("spot", SPOTS)
@pytest.mark.parametrize("nth", [0, 1, 3, 9])
def test_an_error_anywhere_leaves_what_was_there(tmp_path, monkeypatch, spot, nth):
    place, name = SPOTS[spot]
    real = getattr(place, name)
    seen = []

    def failing(*args, **kwargs):
        seen.append(args)
        if len(seen) == nth + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with Store(tmp_path) as store:
        store.save(1, value_of(1))
        store.wait()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing)
            store.save(1, value_of(2))  # replaces: the one that is there must outlive the failure
            store._writer._queue.join()
        if len(seen) <= nth:  # there are not that many calls
            assert store.restore(1, value_of(0))["step"] == 2
            return
        with pytest.raises(CheckpointError, match=r"saving step 1 to .*No space left.*\[1\]") as caught:
            store.check()
        assert isinstance(caught.value.__cause__, OSError)
        store.check()  # said once
        assert store.restore(1, value_of(0))["step"] in (1, 2)
        assert set(os.listdir(tmp_path)) == {".lumen-lock", "1"}
        store.save(5, value_of(5))
        store.wait()
        assert store.steps() == [5]
        assert_whole(store, 5)


@pytest.mark.parametrize("call", ["check", "wait", "save", "close"])
def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    store = Store(tmp_path).open()
    monkeypatch.setattr(_save, "sync", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    store.save(1, value_of(1))
    while store._writer._queue.running():
        time.sleep(0.01)
    calls = {"check": store.check, "wait": store.wait, "save": lambda: store.save(2, value_of(2)), "close": store.close}
    with pytest.raises(CheckpointError, match="saving step 1 to .*bad disk"):
        calls[call]()
    store.close()
    with Store(tmp_path):  # it was unlocked all the same
        pass


def test_the_first_error_is_the_one_to_see(tmp_path, monkeypatch):
    monkeypatch.setattr(_save, "sync", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    with pytest.raises(ValueError, match="mine") as caught, Store(tmp_path) as store:
        store.save(1, value_of(1))
        raise ValueError("mine")
    assert "bad disk" in caught.value.__notes__[0]


LIMITED = """
import resource, signal, sys, torch, traceback
from lumen.checkpoint import Store, save
from lumen.errors import CheckpointError
with Store(sys.argv[1]) as store:
    store.save(1, {"x": torch.ones(1000)})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses longer files, for Orbax too
    store.save(2, {"x": torch.ones(1_000_000)})
    try:
        store.wait()
    except CheckpointError as error:
        print(error.__cause__ is not None, store.steps())
        assert len("".join(traceback.format_exception(error)).splitlines()) < 60
    try:
        save(sys.argv[1] + "/other", {"x": torch.ones(1_000_000)})
    except CheckpointError as error:
        print(error.__cause__ is not None)
"""


def test_a_disk_that_takes_no_more(tmp_path):
    result = zygote.run([sys.executable, "-c", LIMITED, str(tmp_path)])
    assert (result.stdout, result.returncode) == ("True [1]\nTrue\n", 0), result.stderr
    assert result.stderr == ""
    assert sorted(os.listdir(tmp_path)) == [".lumen-lock", "1"]


def test_a_directory_that_cannot_be_written_is_refused_at_open(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="checkpoints cannot be written to .*file"):
            Store(path).open()
        assert Store(path).steps() == []
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoint.save(path / "x", {"a": 1})


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_directory_is_refused_at_open(tmp_path):
    tmp_path.chmod(0o500)
    for path in (tmp_path, tmp_path / "new"):
        with pytest.raises(CheckpointError, match="Permission denied. Use a directory that this user may write to"):
            Store(path).open()
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, value_of(3), extra={"rng": torch.arange(5)}, meta={"a": "text"})
    return path


def files(path):
    return sorted(each for each in path.rglob("*") if each.is_file())


def read_all(path):
    return checkpoint.restore(path, value_of(0)), checkpoint.load(path, item="extra"), checkpoint.metadata(path)["meta"]


def same(one, other):
    return repr(one) == repr(other) and torch.equal(one[1]["rng"], other[1]["rng"]) and all(
        torch.equal(one[0]["params"][name], other[0]["params"][name]) for name in other[0]["params"]
    )  # fmt: skip


def test_a_flipped_bit_anywhere_is_found(saved):
    chance = random.Random(0)
    whole = read_all(saved)
    for file in files(saved):
        content = file.read_bytes()
        positions = {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(12))}
        for position in sorted(positions):
            damaged = bytearray(content)
            damaged[position] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            try:
                found = read_all(saved)
            except (CorruptCheckpointError, CheckpointFormatError):
                continue
            else:  # an escaped letter in the header in another case is the same letter
                assert same(found, whole), (file, position)
                assert file.name == "metadata", (file, position)
        file.write_bytes(content)
    assert same(read_all(saved), whole)


@pytest.mark.parametrize("change", ["truncated", "empty", "longer", "missing", "swapped"])
def test_files_of_another_length_or_order(saved, change):
    for file in files(saved):
        content = file.read_bytes()
        if change == "missing":
            file.unlink()
        elif change == "swapped":
            if len(content) < 8192 or content[:4096] == content[4096:8192]:
                continue
            file.write_bytes(content[4096:8192] + content[:4096] + content[8192:])
        else:
            file.write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"\0"}[change])
        with pytest.raises(CorruptCheckpointError) as caught:
            read_all(saved)
        assert (file.name if file == saved / header.FILE else str(file)) in str(caught.value)
        file.write_bytes(content)
    read_all(saved)


def test_the_leaf_is_named(saved):
    file = saved / "state" / "params.layer2.weight" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"0/0, which contains 'params/layer2.weight', is damaged: it has"):
        checkpoint.load(saved)
    assert checkpoint.load(saved, under="step") == 3


def test_a_damaged_checkpoint_in_a_store_neither_hides_nor_stops_the_others(tmp_path):
    with Store(tmp_path, monitor="loss", keep=3) as store:
        for step in range(3):
            store.save(step, value_of(step), metrics={"loss": float(step)})
    (store.path(1) / header.FILE).write_text("{")
    with Store(tmp_path, monitor="loss", keep=3) as store:
        assert (store.steps(), store.best()) == ([0, 1, 2], 0)
        with pytest.raises(CorruptCheckpointError):
            store.restore(1, value_of(0))
        store.save(3, value_of(3))
        store.wait()
        assert store.steps() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- malice


def forge(path, **changes):
    """Change the header as somebody would who knows how it is made."""
    file = path / header.FILE
    content = json.loads(file.read_text())
    content.pop("digest")
    for name, change in changes.items():
        content[name] = change(content[name])
    file.write_text(header._canonical({**content, "digest": header._digest(content)}))


def relisted(path):
    """The header's table made to fit the small files as they are."""

    def table(files):
        contents = {name: (path / name).read_bytes() for name in files}
        return {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}

    forge(path, files=table)


def test_a_newer_format_says_upgrade(saved):
    newer = header.FORMAT + 1
    forge(saved, format=lambda _: newer)
    with pytest.raises(CheckpointFormatError, match=f"format {newer}, this Lumen reads up to {newer - 1}: upgrade"):
        checkpoint.metadata(saved)


def changed_row(**changes):
    def change(rows):
        index = next(i for i, row in enumerate(rows) if row["path"] == ["half"])
        rows[index] = {**rows[index], **changes}
        return rows

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"array": "../../secret"}, {"array": ".."}, {"array": "/etc"}, {"array": "a/b"}, {"array": "a\0"}, {"array": 3},
        {"array": None}, {"item": "../x"}, {"item": "meta"}, {"kind": "pickle"}, {"kind": "int"},
        {"dtype": "object"}, {"dtype": "float4"}, {"shape": [10**15]}, {"shape": [-33]}, {"shape": [True]},
        {"shape": "33"}, {"shape": [33, 10**30]}, {"shape": [0, 10**19]}, {"path": [["a"]]}, {"path": None},
        {"shape": [0, 2**62, 2**62], "array": None}, {"shape": [0, *[1] * 64], "array": None},
        {"parts": [0]}, {"parts": [34]}, {"parts": [1]}, {"parts": [33]}, {"parts": [11, 1]}, {"parts": "3"},
        {"parts": [True]}, {"parts": None},
    ],
)  # fmt: skip
def test_rows_that_cannot_be(saved, changes):
    forge(saved, leaves=changed_row(**changes))
    with pytest.raises(CorruptCheckpointError):
        checkpoint.load(saved)


def test_shapes_take_no_memory_that_the_files_do_not_have(saved, monkeypatch):
    description = saved / "state" / "half" / "zarr.json"
    description.write_text(description.read_text().replace("[33]", f"[{10**13}]"))
    relisted(saved)
    forge(saved, leaves=changed_row(shape=[10**13]))
    monkeypatch.setattr(_load.torch, "empty", lambda *a, **k: pytest.fail(f"{a} was taken"))
    with pytest.raises(CorruptCheckpointError, match="shape and dtype 20000000000020"):
        checkpoint.load(saved, under="half")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "state/../../secret", "state//x", "a\\b", "", "."])
def test_files_that_lie_elsewhere(saved, name):
    (saved.parent / "secret").write_text("secret")
    forge(saved, files=lambda table: {**table, name: [6, 0]})
    with pytest.raises(CorruptCheckpointError, match="not allowed"):
        checkpoint.load(saved)


def test_a_link_is_not_followed(saved, tmp_path):
    places = [each.relative_to(saved) for each in saved.rglob("*")]
    for place in places:
        away = tmp_path / "away"
        os.rename(saved / place, away)
        (saved / place).symlink_to(away)
        with pytest.raises((CorruptCheckpointError, CheckpointNotFoundError)):
            read_all(saved)
        (saved / place).unlink()
        os.rename(away, saved / place)
    read_all(saved)


def test_a_pipe_does_not_block(saved):
    for name in ("commit_success.txt", header.FILE, "state/half/c/0"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(CorruptCheckpointError, match="not a regular file"):
            read_all(saved)
        (saved / name).unlink()
        (saved / name).write_bytes(content)


def test_a_pickle_is_not_opened(saved, tmp_path):
    mark = tmp_path / "executed"
    bomb = f"cbuiltins\nopen\n(V{mark}\nVw\ntR.".encode()
    for name in (
        "data.pkl",
        "meta/data.pkl",
        "state/_strings.json",
        "state/half/data.pkl",
        "__init__.py",
        "checkpoint",
    ):
        (saved / name).write_bytes(bomb)
    read_all(saved)
    (saved / "state/half/c/0").write_bytes(bomb)
    with pytest.raises(CorruptCheckpointError):
        read_all(saved)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"name":"crc32c"}', '{"name":"zstd"}'),
        ('"codecs":[{"configuration":{"endian":"little"},"name":"bytes"}]', '"codecs":[{"name":"zstd"}]'),
        ('"endian":"little"', '"endian":"big"'),
        ('"chunk_shape":[33]', '"chunk_shape":[1]'),
        ('"data_type":"bfloat16"', '"data_type":"float16"'),
        ('"codecs":', '"kodecs":'),
        ('"node_type":"array"', '"node_type":"group"'),
        ('{"chunk_grid"', '[{"chunk_grid"'),
    ],
)
def test_another_form_of_array_is_refused(saved, old, new):
    description = saved / "state" / "half" / "zarr.json"
    text = description.read_text()
    assert old in text
    description.write_text(text.replace(old, new))
    relisted(saved)
    with pytest.raises(CorruptCheckpointError, match="'half'"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "[" * 100_000, '{"format":1}', '{"format":"1","leaves":[]}', "\xff\xfe", '{"a":1e999999}'],
)
def test_headers_that_are_none(saved, text):
    (saved / header.FILE).write_text(text, encoding="latin-1")
    with pytest.raises(CorruptCheckpointError, match=str(saved)):
        checkpoint.metadata(saved)


@pytest.mark.parametrize("value", [None, 3, [], {}, "x", [1], {"a": 1}, [[1]], {"a": [1]}, {"a": [None, "x"]}])
@pytest.mark.parametrize("field", ["leaves", "files"])
def test_tables_that_are_none(saved, field, value):
    forge(saved, **{field: lambda _: value})
    if (field, value) in (("leaves", []), ("leaves", {})):
        return
    with pytest.raises(LumenError):
        checkpoint.load(saved)
