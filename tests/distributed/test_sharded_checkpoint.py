"""Checkpoints that several processes write together: whole or invisible, and the same whatever wrote and reads them."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import world
from lumen.parallel.ddp import ddp
from lumen.parallel.fsdp import fsdp
from tests.distributed import fsdp_models, models  # noqa: F401 (the first adds models)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def strategy(name, size=None):
    """A strategy by a short name, in a world of any size."""
    size = size or world.world_size()
    if name == "ddp":
        return ddp(lm.mesh(data=size, device="cpu"))
    if name == "hsdp":
        return fsdp(lm.mesh(data=2, shard=size // 2, device="cpu"))
    return fsdp(lm.mesh(shard=size, device="cpu"), level=int(name[-1]))


def step_under(name, others=("ema", "donate")):
    return lm.compose(strategy(name), *models.transforms(others))(models.step)


def trained(name, model="deep", dtype=torch.float32, steps=2):
    """A step under a strategy, and its state after a few steps."""
    step = step_under(name)
    state = step.init(models.make_state(model, dtype))
    data = models.batches(steps, 8, dtype)
    share = [2] * 4 if world.world_size() == 4 else [8 // world.world_size()] * world.world_size()
    for batch in data:
        state, _ = step(state, models.part(batch, share, world.rank()))
    return step, state


def whole(step, state):
    """Every leaf of the state that no process holds a part of alone, with the slots of the other transforms."""
    return bits(step.transforms[0].export(state))


def bits(state):
    """Every leaf of a whole state."""
    return {path: leaf.clone() for path, leaf in lm.tree.named_tensors(state)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        have = found[name]
        assert (have.dtype, have.shape) == (want.dtype, want.shape), name
        assert raw(have).equal(raw(want)), name


def raw(tensor):
    """Its bytes: a NaN is equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def save_trained(path, name, model="deep", dtype=torch.float32):
    """Saved by all; the whole state, as it was."""
    step, state = trained(name, model, dtype)
    lm.checkpoint.save(path, state, step=step, meta={"by": name})
    return whole(step, state)


def restore_under(path, name, model="deep", dtype=torch.float32):
    """The whole state, put together from what each process read; then saved again by all."""
    step = step_under(name)
    like = step.init(models.make_state(model, dtype))
    state = lm.checkpoint.restore(path, like, step=step)
    assert lm.tree.structure(state) == lm.tree.structure(like)
    lm.checkpoint.save(path.with_name(f"again-{world.world_size()}-{name}"), state, step=step)
    return whole(step, state)


# ------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("level", ["fsdp3", "fsdp2", "fsdp1", "hsdp"])
def test_saved_by_four_it_is_restored_by_any_number_under_any_strategy(level, worlds, tmp_path):
    path = tmp_path / "first"
    wanted = worlds(4).run(save_trained, path, level)[0]
    alone = lm.compose(*models.transforms(["ema", "donate"]))(models.step)
    like = alone.init(models.make_state("deep", torch.float32))
    assert_same(bits(lm.checkpoint.restore(path, like)), wanted)
    for size, names in {2: ["ddp", "fsdp1", "fsdp3"], 3: ["fsdp3"], 4: ["hsdp", "fsdp2"]}.items():
        for name in names:
            for found in worlds(size).run(restore_under, path, name):
                assert_same(found, wanted)
            again = lm.checkpoint.restore(tmp_path / f"again-{size}-{name}", like)
            assert_same(bits(again), wanted)
