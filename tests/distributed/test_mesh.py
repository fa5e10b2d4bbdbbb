"""Meshes: the grid, its groups, collectives by name, and worlds that do not fit."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import warnings

import pytest
import torch

import lumen as lm
from lumen.core import distributed, rules
from lumen.errors import AxisError, WorldError
from lumen.parallel import mesh
from lumen.parallel.comm.mesh import _sizes
from tests.distributed.pool import TaskError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def describe(**sizes):
    grid = mesh(**sizes, device="cpu")
    with grid.bound():
        x = torch.tensor(float(distributed.rank()), requires_grad=True)
        total = lm.psum(x, "data")
        largest = lm.pmax(x, "shard")
        (total * (1 + distributed.rank())).backward()
        index = [int(lm.axis_index(name)) for name in ("data", "shard", "tensor")]
    assert rules.axis("data") is None
    return repr(grid), index, float(total), float(largest), float(x.grad)


def test_a_world_of_two_by_two(world4):
    found = world4.run(describe2x2)
    assert {each[0] for each in found} == {"lm.mesh(data=2, shard=2)"}
    assert [each[1] for each in found] == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert [each[2] for each in found] == [2.0, 4.0, 2.0, 4.0]  # ranks 0+2, 1+3
    assert [each[3] for each in found] == [1.0, 1.0, 3.0, 3.0]  # max(0, 1), max(2, 3)
    assert [each[4] for each in found] == [4.0, 6.0, 4.0, 6.0]  # the weights 1+3, 2+4 of both members


def describe2x2():
    return describe(data=2, shard=2)


def both_axes():
    grid = mesh(data=2, shard=-1, device="cpu")
    x = torch.ones(1)
    torch.distributed.all_reduce(x, group=grid.group("data", "shard"))
    again = grid.group("data", "shard")
    return grid.sizes, float(x), again is grid.group("data", "shard"), grid.group("tensor") is None


def groups_of_many_meshes():
    found = {mesh(shard=2, device="cpu").group("data", "shard") for _ in range(3)}
    found |= {mesh(shard=-1, device="cpu").group("shard") for _ in range(3)}
    return len(found), len({mesh(device="cpu").group("data") for _ in range(3)})


def test_meshes_of_one_form_share_their_groups(world2):
    assert world2.run(groups_of_many_meshes) == [(1, 1)] * 2  # each has threads and connections of its own


def test_axes_together_are_one_group(world4):
    sizes = {"data": 2, "shard": 2, "pipeline": 1, "context": 1, "tensor": 1}
    assert world4.run(both_axes) == [(sizes, 4.0, True, True)] * 4


def test_alone_it_is_the_identity():
    grid = mesh(data=1)
    with grid.bound():
        assert float(lm.psum(torch.tensor(3.0), "data")) == 3.0
        assert int(lm.axis_index("shard")) == 0
    assert (grid.size(), grid.group("data"), repr(grid)) == (1, None, "lm.mesh()")


def inside_vmap():
    grid = mesh(device="cpu")
    with grid.bound():
        return torch.func.vmap(lambda x: lm.psum(x, "data"))(torch.ones(3))


def test_a_collective_inside_vmap_is_refused(world2):
    with pytest.raises(TaskError) as caught:
        world2.run(inside_vmap)
    assert {kind for _, kind, _ in caught.value.errors} == {AxisError.__name__}


@pytest.mark.parametrize(
    ("asked", "processes", "says"),
    [
        ({"data": 3}, 4, r"needs 3 processes, but the world size is 4.*lm\.mesh\(data=4\)"),
        ({"shard": 2}, 4, r"lm\.mesh\(data=2, shard=2\)"),
        ({"shard": 3}, 4, r"torchrun --nproc-per-node=3"),
        ({"data": -1, "shard": -1}, 4, "only one can be the rest of the world"),
        ({"data": -1, "tensor": 3}, 4, "needs a multiple of 3 processes"),
        ({"data": 0}, 4, "positive number"),
        ({"data": True}, 1, "positive number"),
    ],
)
def test_a_world_that_the_axes_do_not_make_up(asked, processes, says):
    with pytest.raises(WorldError, match=says):
        _sizes({"data": None, "shard": None, "tensor": None, **asked}, processes)


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WorldError, match=r'lm\.mesh\(device="cpu"\)'):
        mesh(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(WorldError, match="--nproc-per-node=1"):
        mesh(device="cuda")


def test_half_an_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(WorldError, match="MASTER_ADDR.*torchrun"):
        mesh(device="cpu")


def die_on_one():
    if distributed.rank() == 1:
        os._exit(3)
    time.sleep(30)


def test_the_pool_itself_notices_a_death_and_recovers(world2):
    with pytest.raises(TaskError, match="rank 1 died with exit code 3"):
        world2.run(die_on_one, limit=10)
    assert len(world2.run(both_ranks)) == 2


def both_ranks():
    return distributed.rank()


def say(directory):
    logger = logging.getLogger("train")
    with contextlib.redirect_stderr(io.StringIO()) as terminal:
        lm.parallel.setup_logging(directory)
        logger.info("begins")
        logger.debug("too small to tell")
        logger.warning("odd")
        warnings.warn("also odd", UserWarning, stacklevel=1)
        lm.parallel.setup_logging(directory)
        logger.info("again")
    logging.captureWarnings(False)
    return terminal.getvalue(), sum(handler.name == "lumen" for handler in logging.getLogger().handlers)


def test_one_process_speaks_and_all_are_written_down(world2, tmp_path):
    (first, handlers), (second, _) = world2.run(say, tmp_path)
    assert "train INFO: begins" in first
    assert "[rank" not in first
    assert "begins" not in second
    assert "[rank 1] train WARNING: odd" in second
    assert "also odd" in second
    assert handlers == 2
    for rank in (0, 1):
        text = (tmp_path / f"rank-{rank}.log").read_text()
        assert text.count(f"[rank {rank}] train INFO: begins") == text.count("again") == 1
        assert "too small" not in text
