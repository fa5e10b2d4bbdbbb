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
    "ddp": lambda guard: [lm.ddp(), guard, lm.clip(1e9), lm.accumulate(2)],
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


def rewound(directory, rows, rewind):
    """A run on rows of which some batches are not finite on one rank: its params, and what it left out."""
    runner = lm.Runner(
        step,
        transforms=[lm.guard(), lm.fsdp(stage=3)],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=2), keep=None),
        rewind=rewind,
        log_every=4,
        progress=False,
    )
    mine = [part(batch, (4, 4), world.rank()) for batch in rows]
    result = runner.fit(make_state("mlp"), lm.data.per_rank(mine), until=lm.Steps(8))
    meta = lm.checkpoint.metadata(runner.checkpoint.latest())["meta"]
    return runner.step.export(result.state).params, result.clock.rows, meta.get("rewind", {}).get("skips")


def test_all_ranks_go_back_together(world2, tmp_path):
    rows = batches(14, 8, torch.float64)
    clean = [*rows[:4], *rows[8:]]
    for number in (5, 6, 7):
        rows[number]["x"][7] = torch.nan
        rows[number]["mask"][7] = True
    results = world2.run(rewound, tmp_path / "a", rows, lm.Rewind(after=3, steps=3))
    expected = world2.run(rewound, tmp_path / "b", clean, None)
    for (params, count, skips), (others, other_count, _) in zip(results, expected, strict=True):
        assert all(torch.equal(leaf, others[name]) for name, leaf in params.items())
        assert count == other_count == 64
        assert skips == [{"from": 8, "to": 4, "first": [0, 4], "next": [0, 8]}]
