"""Leaving the world: no thread of it lives on, whoever holds what was made in it."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from subprocess import PIPE

import pytest
import torch.distributed as dist

import lumen as lm
from lumen.errors import WorldError
from lumen.parallel.comm import process_groups
from lumen.parallel.comm.init import leave, leave_at_exit
from lumen.parallel.comm.rank_monitor import RankMonitor
from lumen.train.distributed import ProcessGroupContext
from tests import zygote
from tests.distributed.leaving import a_thread_of_gloo_appears, threads

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def test_no_thread_outlives_the_world(tmp_path):
    ports = ",".join(map(str, zygote.free_ports(2)))
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "tests.distributed.leaving", ports, str(tmp_path)]
    jobs = [
        zygote.start(command, cwd=ROOT, env={**world, "RANK": rank, "LOCAL_RANK": rank}, stderr=PIPE, bare=True)
        for rank in ("0", "1")
    ]
    try:
        said = [job.communicate(timeout=500)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for rank, job in enumerate(jobs):
        assert job.returncode == 1, said[rank]
        assert "rounded codes" in said[rank]
        assert "terminate" not in said[rank]
        assert "still referenced" not in said[rank]
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sum("gloo" in name for name in found["in it"]) > 1, "this test looks for what is not there"
        assert found["left"] == found["at exit"] == []
        assert all("belongs to a world that this process has left" in text for text in found["refused"]), found[
            "refused"
        ]
        index, size, old, *sizes = found["again"]
        assert (index, size, sizes) == (rank, 2, [2, 1, 1, 1, 1])
        assert "lm.mesh(data=2) belongs to a world" in old


def watched():
    """A watch over a world of one, as it lives."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    watch = RankMonitor(store, 0, 1)
    watch.start()
    return watch, store


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "lumen ranks"]


def test_leaving_ends_a_watch_that_nobody_closed():
    watch, _store = watched()
    assert len(watchers()) == 1
    leave()
    assert watchers() == []
    watch.close()  # once more does nothing


def test_the_rank_with_the_store_ends_after_those_that_ask_it():
    """Without torchrun the store ends with rank 0, whose peers would take that for a failure."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    first, second = (RankMonitor(store, rank, 2) for rank in (0, 1))
    first.start()
    second.start()
    closing = threading.Thread(target=first.close)
    closing.start()
    closing.join(1.0)
    assert closing.is_alive()
    second.close()
    closing.join(3.0)
    assert not closing.is_alive()


def test_a_watch_ends_where_telling_of_the_failure_fails(monkeypatch):
    watch, _store = watched()
    group = ProcessGroupContext(None)
    group._monitor = watch
    monkeypatch.setattr(watch, "fail", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        group.__exit__(ValueError, ValueError("first"), None)
    assert watchers() == []


@pytest.fixture
def alone():
    """A world of one, over Gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    leave()


def test_a_group_that_is_kept_is_told_of_at_exit_and_a_fork_leaves_nothing(alone):
    mesh = lm.mesh(data=1, device="cpu")
    kept = process_groups.hand_out(mesh.torch.get_group("data"))
    leave_at_exit(os.getpid() + 1)
    assert dist.is_initialized()
    with pytest.warns(RuntimeWarning, match=r"Keep the mesh, not the result of mesh.group"):
        leave_at_exit(os.getpid())
    assert not dist.is_initialized()
    with pytest.raises(WorldError, match="has left"):
        _ = mesh.torch
    assert (mesh.size(), repr(mesh)) == (1, "lm.mesh()")
    del kept
    leave_at_exit(os.getpid())


def test_a_world_that_was_destroyed_by_hand_counts_as_left(alone):
    mesh, ref = lm.mesh(data=1, device="cpu"), process_groups.GroupRef(dist.group.WORLD)
    assert ref() is dist.group.WORLD
    number = process_groups.world_number()
    dist.destroy_process_group()
    assert process_groups.world_number() == 0
    for asked in (ref, lambda: mesh.torch, lambda: mesh.index("data"), mesh.bound):
        with pytest.raises(WorldError, match="has left"):
            asked()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert process_groups.world_number() == number + 1
    for asked in (ref, lambda: mesh.torch):
        with pytest.raises(WorldError, match="has left"):
            asked()
    assert lm.mesh(data=1, device="cpu").index("data") == 0


def test_a_world_that_somebody_else_has_joined_is_left_to_them(alone):
    held = lm.mesh(data=1, device="cpu"), lm.mesh(data=1, device="cpu").torch
    assert a_thread_of_gloo_appears()
    leave_at_exit(os.getpid(), own=False)
    assert dist.is_initialized()
    dist.destroy_process_group()
    assert threads() == []
    assert held
