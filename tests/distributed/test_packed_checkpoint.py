"""Small arrays that are packed (checkpoint format 3) where several processes save: the same leaves for any reader."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.checkpoint import packing
from tests.distributed import models
from tests.distributed.test_sharded_checkpoint import assert_same, bits, restore_under, save_trained

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def save_packed(path, name):
    """Saved by all, with what rank 0 writes alone packed; the whole state, as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MANY", 1)
        return save_trained(path, name)


def packed(path):
    """The names of the arrays that hold several leaves."""
    return {each.name for each in (path / "state").iterdir() if each.name.startswith("~packed")}


@pytest.mark.parametrize(("name", "other"), [("ddp", "fsdp3"), ("fsdp3", "ddp")])
def test_saved_by_two_it_is_restored_by_one_and_by_two(name, other, world2, tmp_path):
    path = tmp_path / "first"
    wanted = world2.run(save_packed, path, name)[0]
    assert lm.checkpoint.metadata(path)["format"] == 3
    assert packed(path) == {"~packed.float32", "~packed.float64", "~packed.int64"}
    arrays = {each.name for each in (path / "state").iterdir()}
    assert ("params.blocks.0.down.weight" in arrays) == (name == "fsdp3"), "what ranks hold shards of is not packed"
    alone = lm.compose(*models.transforms(["ema", "donate"]))(models.step)
    like = alone.init(models.make_state("deep", torch.float32))
    assert_same(bits(lm.checkpoint.restore(path, like)), wanted)
    for found in world2.run(restore_under, path, other):
        assert_same(found, wanted)
