"""A state that is sharded and gathered is bitwise what it was, whatever leaves look like its params."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import lumen as lm
from lumen.core.param_leaves import key_paths
from lumen.parallel.comm import consistency
from tests.laws.test_shard_specs import PLAN, make_state, stack

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SHAPES = {"weight": (4, 2), "mu": (1, 2), "lr": (), "a][b": (3, 2)}
PARALLEL = {
    "stage 1": lambda: lm.fsdp(stage=1),
    "stage 2": lambda: lm.fsdp(stage=2),
    "stage 3": lambda: lm.fsdp(),
    "offload": lambda: lm.fsdp(offload=True),
    "tensor": lambda: lm.tensor_parallel(PLAN, lm.mesh(tensor=-1, device="cpu")),
}


def there_and_back(names):
    """For each strategy the leaves that differ after `export`, and how many are shards after `init`."""
    found = []
    for name in names:
        for optimizer in ("custom", "partition"):
            plain = make_state(SHAPES, optimizer)
            step = stack([PARALLEL[name]()], outside=False)
            state = step.init(plain)
            back = step.transforms[0].export(state)  # with the slots of the transforms inside
            wanted = stack([], outside=False).init(plain)
            pairs = zip(key_paths(wanted), lm.tree.leaves(wanted), lm.tree.leaves(back), strict=True)
            full = dict(zip(key_paths(wanted), lm.tree.leaves(wanted), strict=True))
            shards = zip(key_paths(state), lm.tree.leaves(state), strict=True)
            found.append(
                (
                    [path for path, a, b in pairs if not torch.equal(a, b)],
                    sum(leaf.shape != full[path].shape for path, leaf in shards),
                )
            )
    return found


def test_gathering_is_the_inverse_of_sharding(world2):
    for found in world2.run(there_and_back, [*PARALLEL]):
        assert len(found) == 2 * len(PARALLEL)
        assert all(not moved and shards for moved, shards in found)


class first_params(lm.Transform):  # noqa: N801
    """Keeps a copy of the params in a slot that does not say so."""

    name = "first_params"

    def init(self, state):
        return lm.extend.add_slot(state, self.name, lambda: {k: p.clone() for k, p in state.params.items()})


def undeclared():
    step = lm.compose(first_params(), lm.fsdp())(lambda state, batch: (state, {}))
    state = step.init(make_state(SHAPES, "custom"))
    with pytest.raises(
        lm.LumenError, match=r"slots\[first_params\].*differs from that of rank 0(.|\n)*param_field\(\)"
    ):
        consistency.check_fields(state, dist.group.WORLD, step.shard_specs(state))
    declared = lm.compose(lm.ema(0.9), lm.fsdp())(lambda state, batch: (state, {}))
    state = declared.init(make_state(SHAPES, "custom"))
    consistency.check_fields(state, dist.group.WORLD, declared.shard_specs(state))


def test_a_slot_that_differs_by_rank_and_is_not_declared_is_refused(world2):
    world2.run(undeclared)
