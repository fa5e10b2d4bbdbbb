"""A run's checkpoints: which are kept, who may write, and what a save costs the loop."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from lumen.checkpoint import Store, _save, load, save, snapshot
from lumen.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointLockedError,
    CheckpointNotFoundError,
    HyperparameterError,
)
from tests import zygote


def tree(value=0.0):
    return {"params": {"w": torch.full((8,), float(value))}, "n": int(value)}


def fill(directory, values, metric="val/loss", **kwargs):
    with Store(directory, **kwargs) as store:
        for step, value in enumerate(values):
            store.save(step, tree(step), metrics={} if value is None else {metric: value})
    return store


# --------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("values", "kwargs", "kept"),
    [
        ([10, 9, 2.8, 5, 2.5], {"monitor": "val/loss", "mode": "min", "keep_best": 2}, [2, 4]),
        ([10, 9, 2.8, 5, 2.5], {"monitor": "val/loss", "mode": "min", "keep_best": 3}, [2, 3, 4]),
        ([10, 9, 2.8, 5, 2.5], {"monitor": "val/loss", "mode": "max", "keep_best": 1}, [0, 4]),
        ([10, 9, 2.8, 5, 2.5], {}, [4]),
        ([10, 9, 2.8, 5, 2.5], {"keep": None}, [0, 1, 2, 3, 4]),
        ([10, 9, 2.8, 5, 2.5], {"keep": 2, "keep_every": 3}, [0, 3, 4]),
        ([1.0, 1.0, 1.0, 2.0], {"monitor": "val/loss", "mode": "min"}, [2, 3]),  # a tie: the later
        ([math.nan, 3.0, math.nan], {"monitor": "val/loss", "mode": "max"}, [1, 2]),
        ([math.inf, math.nan, 5.0], {"monitor": "val/loss", "mode": "max"}, [0, 2]),
        ([None, 3.0, None, 4.0, None], {"monitor": "val/loss", "mode": "min"}, [1, 4]),
        ([None, None], {"monitor": "val/loss", "mode": "min", "keep_best": 2}, [1]),
    ],
)
def test_what_is_kept(tmp_path, values, kwargs, kept):
    store = fill(tmp_path, values, **kwargs)
    assert store.steps() == kept
    assert store.latest() == kept[-1]
    for step in kept:
        assert store.restore(step, tree())["n"] == step
    assert sorted(os.listdir(tmp_path)) == sorted([".lumen-lock", *map(str, kept)])


def test_the_best_is_known_to_a_later_run_and_to_readers(tmp_path):
    fill(tmp_path, [3.0, 1.0, 2.0], monitor="val/loss")
    reader = Store(tmp_path, monitor="val/loss")
    assert (reader.steps(), reader.best(), reader.metrics(1)) == ([1, 2], 1, {"val/loss": 1.0})
    with Store(tmp_path, monitor="val/loss") as store:
        store.save(3, tree(3), metrics={"val/loss": torch.tensor(1.5)})
        store.wait()
        assert (store.steps(), store.best()) == ([1, 3], 1)
        store.save(4, tree(4), metrics={"val/loss": 0.5})
    assert (reader.steps(), reader.best()) == ([4], 4)
    assert Store(tmp_path).best() is None
    assert Store(tmp_path / "none", monitor="val/loss").best() is None


def test_an_earlier_step_after_later_ones_is_not_deleted_by_its_own_save(tmp_path):
    fill(tmp_path, [None] * 4, keep=2)
    with Store(tmp_path, keep=2) as store:
        store.save(1, tree(1))
        store.wait()
        assert store.steps() == [1, 2, 3]
        store.save(4, tree(4))
        store.wait()
        assert store.steps() == [3, 4]


def test_a_step_saved_again_is_replaced(tmp_path):
    with Store(tmp_path) as store:
        store.save(7, tree(1))
        store.save(7, tree(2), metrics={"a": 1})
        store.wait()
        assert store.restore(7, tree())["n"] == 2
        assert store.metrics(7) == {"a": 1.0}
    assert sorted(os.listdir(tmp_path)) == [".lumen-lock", "7"]


def test_what_is_no_checkpoint_is_neither_a_step_nor_deleted(tmp_path):
    for name in ("5", "007", "notes", "-1"):
        (tmp_path / name).mkdir()
    save(tmp_path / "elsewhere", tree(9))
    (tmp_path / "9").symlink_to(tmp_path / "elsewhere")
    with Store(tmp_path) as store:
        assert store.steps() == []
        store.save(10, tree(10))
        store.save(11, tree(11))
        for taken in (5, 9):
            with pytest.raises(CheckpointExistsError, match="is no checkpoint"):
                store.save(taken, tree())
    assert store.steps() == [11]
    assert {"5", "007", "notes", "-1", "9", "elsewhere", "11"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize(
    "kwargs",
    [{"keep": 0}, {"keep": True}, {"keep_best": 0}, {"keep_best": None}, {"keep_every": -1}, {"keep": 1.5},
     {"monitor": ("val/loss", "min")}, {"monitor": "val/loss", "mode": "least"}],
)  # fmt: skip
def test_bad_retention(tmp_path, kwargs):
    with pytest.raises(HyperparameterError):
        Store(tmp_path, **kwargs)


def test_set_aside(tmp_path):
    with Store(tmp_path, keep=None) as store:
        for _ in range(2):
            store.save(3, tree())
            store.wait()
            assert store.quarantine(store.path(3)).is_dir()
        assert store.steps() == []
        assert len([name for name in os.listdir(tmp_path) if name.startswith("damaged-3")]) == 2


# ---------------------------------------------------------------------------------------------------- using it


def test_misuse(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not open. Write: with lm.checkpoint.Store"):
        store.save(0, tree())
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 3; it has none"):
        store.restore(3, tree())
    with store:
        with pytest.raises(CheckpointError, match="already open"):
            store.open()
        for step in (-1, True, 1.0, "1"):
            with pytest.raises(CheckpointError, match="a step is an int"):
                store.save(step, tree())
        with pytest.raises(CheckpointError, match="metrics must be numbers"):
            store.save(0, tree(), metrics={"a": torch.ones(2)})
        store.save(0, tree())
    store.close()  # twice is no harm
    assert store.steps() == [0]


def test_the_loop_waits_for_the_copy_alone(tmp_path, monkeypatch):
    go = threading.Event()
    write = _save.write

    def slow(*args, **kwargs):
        assert go.wait(30)
        write(*args, **kwargs)

    monkeypatch.setattr(_save, "write", slow)
    value = tree(1)
    with Store(tmp_path) as store:
        store.save(1, value)
        value["params"]["w"].zero_()  # a donated step writes into the state
        store.check()
        assert store.steps() == []
        go.set()
    assert store.restore(1, tree())["params"]["w"].tolist() == [1.0] * 8


def test_blocked_is_measured_and_a_second_save_waits(tmp_path, monkeypatch):
    write = _save.write

    def slow(*args, **kwargs):
        time.sleep(0.2)
        write(*args, **kwargs)

    with Store(tmp_path, keep=None) as store:
        monkeypatch.setattr(_save, "write", slow)
        store.save(0, tree())
        assert store.blocked < 0.15
        store.save(1, tree())
        assert store.blocked > 0.15
    assert store.steps() == [0, 1]


def test_host_memory_lasts_for_the_run_and_no_longer(tmp_path, monkeypatch):
    taken = []
    empty = torch.empty
    monkeypatch.setattr(snapshot.torch, "empty", lambda *a, **k: taken.append(a) or empty(*a, **k))
    with Store(tmp_path) as store:
        for step in range(4):
            store.save(step, tree(step))
        assert len(taken) == 1
        store.wait()
        memory = store._writer._memory
    assert memory._block is None


# -------------------------------------------------------------------------------------------------------- lock

HOLD = """
import sys, time
from lumen.checkpoint import Store
store = Store(sys.argv[1]).open()
print("open", flush=True)
time.sleep(100)
"""


def test_another_process_is_refused_until_it_is_gone(tmp_path):
    process = zygote.start([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(CheckpointLockedError, match=rf"process {process.pid} on .*, since 20\d\d-"):
            Store(tmp_path).open()
        assert Store(tmp_path).steps() == []
    finally:
        process.kill()
        process.communicate()
    with Store(tmp_path) as store:
        store.save(0, tree())


def test_the_same_process_is_refused_too_and_does_not_lose_its_lock(tmp_path):
    with Store(tmp_path) as store:
        for _ in range(2):
            with pytest.raises(CheckpointLockedError, match=f"process {os.getpid()} on"):
                Store(tmp_path / ".." / tmp_path.name).open()
        result = zygote.run([sys.executable, "-c", HOLD, str(tmp_path)])
        assert "CheckpointLockedError" in result.stderr
        store.save(0, tree())
    with Store(tmp_path):
        pass


def in_a_fork(run):
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_forked_worker_neither_saves_nor_unlocks(tmp_path):
    def child():
        with pytest.raises(CheckpointError, match="which alone can save"):
            store.save(1, tree())
        with pytest.raises(CheckpointLockedError):
            Store(tmp_path).open()
        store.close()

    with Store(tmp_path) as store:
        store.save(0, tree())
        assert in_a_fork(child) == 0
        store.save(2, tree())
        result = zygote.run([sys.executable, "-c", HOLD, str(tmp_path)])
        assert "CheckpointLockedError" in result.stderr
    assert store.steps() == [2]


# --------------------------------------------------------------------------------------------- jax, and light

LIGHT = """
import sys
import lumen.checkpoint
assert not {"jax", "orbax", "tensorstore", "safetensors"} & set(sys.modules)
"""
READ = """
import sys, torch
from lumen.checkpoint import Store
print(Store(sys.argv[1]).restore(0, {"params": {"w": torch.zeros(8)}, "n": 0}))
assert not {"jax", "orbax", "tensorstore"} & set(sys.modules)
"""
CPU_ONLY = """
import os, sys, torch
before = dict(os.environ)
from lumen.checkpoint import _orbax, save
save(sys.argv[1], {"a": torch.ones(1)})
import jax
assert _orbax.loaded_here
assert jax.config.jax_platforms is None, jax.config.jax_platforms
assert {d.platform for d in jax.devices()} == {"cpu"}
assert dict(os.environ) == before
"""
THEIRS = """
import sys, torch, jax
jax.config.update("jax_platforms", "cpu,cuda")
from lumen.checkpoint import _orbax
_orbax.load()
assert not _orbax.loaded_here
assert jax.config.jax_platforms == "cpu,cuda"
"""


@pytest.mark.parametrize("code", [LIGHT, READ, CPU_ONLY, THEIRS])
def test_orbax_and_jax_in_a_process_of_their_own(tmp_path, code):
    with Store(tmp_path) as store:
        store.save(0, tree())
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    argument = str(tmp_path if code is READ else tmp_path / "new")
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code, argument]
    result = zygote.run(command, env=environment, bare=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_users_logging_is_as_it_was(tmp_path, caplog):
    import logging

    logger = logging.getLogger("absl")
    before = (list(logger.filters), list(logger.handlers), logger.level, list(logging.getLogger().handlers))
    save(tmp_path / "x", tree())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (list(logger.filters), list(logger.handlers), logger.level, list(logging.getLogger().handlers)) == before


def test_saves_of_several_threads_do_not_disturb_each_other(tmp_path):
    """A failing step is dumped while the last checkpoint is still on its way."""
    failed = []

    def work(number):
        try:
            for i in range(8):
                save(tmp_path / f"{number}-{i}", {"a": torch.full((3,), float(number))})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert all(load(tmp_path / f"{n}-{i}")["a"].eq(n).all() for n in range(3) for i in range(8))
