"""`guard(spike=…)` on shards: it skips what one process skips on the whole batch, and all ranks decide alike."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import distributed as world
from lumen.parallel.comm.consistency import check_equal
from tests.distributed.models import batches, make_state, part
from tests.distributed.models import train as train_on

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS, AT = 26, 23
STACKS = {
    "ddp outside": lambda guard: [lm.ddp(), guard],
    "ddp inside, accumulate, clip": lambda guard: [guard, lm.clip(1e9), lm.ddp(), lm.accumulate(2)],
    "fsdp 2": lambda guard: [guard, lm.fsdp(stage=2)],
    "fsdp 3": lambda guard: [lm.fsdp(stage=3), guard],
}


def step(state, batch):
    """A loss that grows with the inputs, in spite of the model's tanh."""

    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of(out.square().sum(1) * (1 + batch["x"][:, 1].square()), batch["mask"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def data():
    """Ordinary batches, and one in which a single row of the last rank is far too large."""
    made = batches(STEPS, 8, torch.float64)
    made[AT]["x"][7, 1] = 1e3
    made[AT]["mask"][7] = True
    return made


def window_of(wrapped, state):
    slot = state.slots["guard"]
    return int(slot.skipped), slot.spikes.values.double(), slot.spikes.count, wrapped.export(state).params


def decisions(names):
    """Of each stack: the updates skipped, the values compared, and the params, as each rank has them."""
    results = []
    for name in names:
        wrapped = lm.compose(*STACKS[name](lm.guard(spike=6.0, window=20)))(step)
        rows = [part(batch, (4, 4), world.rank()) for batch in data()]
        _, state = train_on(wrapped, make_state("mlp"), rows)
        if "ddp" in name:
            check_equal(state)
        results.append(window_of(wrapped, state))
    return results


def test_decisions_are_those_of_one_process(world2):
    alone = lm.guard(spike=6.0, window=20)(step)
    _, state = train_on(alone, make_state("mlp"), data())
    skipped, values, count, params = window_of(alone, state)
    assert skipped == 1
    for results in world2.run(decisions, list(STACKS)):
        for name, result in zip(STACKS, results, strict=True):
            assert result[0] == skipped, name
            assert torch.equal(result[2], count), name
            torch.testing.assert_close(result[1], values, rtol=1e-6, atol=1e-6)
            for leaf, expected in params.items():
                torch.testing.assert_close(result[3][leaf], expected, rtol=1e-9, atol=1e-10)
