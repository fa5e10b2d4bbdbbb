"""tensor_parallel: processes that compute the same rows together are one process."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import distributed as world
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.tensor.tensor_parallel import tensor_parallel
from tests.distributed.models import (
    AROUND,
    assert_within,
    bare,
    batches,
    furthest,
    make_state,
    part,
    step,
    train,
    transforms,
)
from tests.distributed.tensor_models import PLANS
from tests.distributed.test_fsdp import OPTIMIZERS
from tests.tiers import in_turns, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = pick(4, 20)


def outer(name, grid):
    """The transform that joins rows, by name."""
    made = {
        "ddp": lambda: [lm.ddp(grid)],
        "fsdp1": lambda: [lm.fsdp(grid, stage=1)],
        "fsdp2": lambda: [lm.fsdp(grid, stage=2)],
        "fsdp3": lambda: [lm.fsdp(grid)],
        "alone": list,
    }
    return made[name]()


def law(cases, axes=None, around="alone", dtype=torch.float64, steps=STEPS, tx="adam"):
    """For each case how far the step on parts is from one process: the losses, and the furthest leaf."""
    found = []
    grid = mesh(**(axes or {"tensor": -1}), device="cpu")
    for model, names, sizes, sequence in cases:
        inside = transforms(names)
        parallel = [*outer(around, grid), tensor_parallel(PLANS[model, sequence], grid)]
        wrapped = lm.compose(*parallel, *inside)(step)
        whole = batches(steps, sum(sizes), dtype)
        data = [part(batch, sizes, world.rows()[0]) for batch in whole]
        losses, state = train(wrapped, make_state(model, dtype, OPTIMIZERS[tx]()), data)
        for transform in parallel:
            state = transform.export(state)
        wanted, other = train(lm.compose(*inside)(step), make_state(model, dtype, OPTIMIZERS[tx]()), whole)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(state), bare(other))))
    return found


def check(world, cases, *settings, tolerance=1e-10):
    assert_within(tolerance, cases, world.run(law, cases, *settings))


@pytest.mark.parametrize("kind", PLANS, ids=lambda kind: kind[0] + "-sequence" * kind[1])
def test_two_processes_compute_as_one(kind, world2):
    model, sequence = kind
    check(
        world2,
        [
            (model, names, [7], sequence)
            for names in pick([["accumulate"], AROUND[-1]], [[], ["accumulate"], AROUND[-1]])
        ],
    )


def test_a_spike_is_judged_by_the_norm_of_the_full_gradient(world2):
    """The values compared are in the state, in float32."""
    check(world2, [("tiny", ["spike", "clip"], [7], True)], tolerance=1e-6)


EVEN, UNEVEN, EMPTY = [4, 4], [5, 3], [8, 0]


KINDS = [("tiny", False), ("tiny", True), ("llama", False), ("reading", False)]


@pytest.mark.parametrize(("kind", "around"), in_turns(KINDS, ["ddp", "fsdp1", "fsdp2", "fsdp3"]), ids=str)
def test_rows_and_matrices_are_cut_at_once(kind, around, world4):
    axes = {"data" if around == "ddp" else "shard": 2, "tensor": 2}
    model, sequence = kind
    cases = [(model, ["guard", "clip", "ema", "donate"], EMPTY, sequence)]
    cases += [(model, ["accumulate", "clip"], UNEVEN, sequence), *pick([], [(model, [], UNEVEN, sequence)])]
    check(world4, cases, axes, around)
