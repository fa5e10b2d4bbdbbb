"""The law as one table: every strategy × model × transform, with uneven parts and with a process that has none."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import lumen as lm
from lumen.core import distributed as world
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp import unit_plan
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed import fsdp_models
from tests.distributed.models import bare, batches, furthest, make_state, part, step, train, transforms
from tests.distributed.test_ddp import cut
from tests.tiers import LONG, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

assert fsdp_models  # its models are registered where it is imported

SPREAD = {
    "ddp": ddp,
    "fsdp1": functools.partial(fsdp, stage=1),
    "fsdp2": functools.partial(fsdp, stage=2),
    "fsdp3": fsdp,
    "hsdp": lambda: fsdp(mesh(data=2, shard=2, device="cpu")),
}
MODELS = ["mlp", "stack", "deep", "outside"]  # plain; convolutions and BatchNorms; a tied GPT; unused, and used outside
AROUND = ["", "accumulate", "clip", "ema", "guard", "remat", "remat save", "remat budget"]
SIZES = {2: [[5, 3], [8, 0]], 4: [[4, 0, 3, 3]]}
STEPS = pick(4, 20)


def optimizer(dtype):
    return lm.optim.adam(1e-2, eps=1e-4) if dtype == torch.float64 else lm.optim.sgd(0.05)


def inner(around):
    return transforms([around] if around else [])


@functools.cache
def one_process(model, around, sizes, dtype, steps):
    """Losses and leaves of one process on all rows, the same for every strategy. BatchNorm sees the rows of a part."""
    beside = lm.compose(*[cut(sizes)] * (model == "stack"), *inner(around))(step)
    losses, state = train(beside, make_state(model, dtype, optimizer(dtype)), batches(steps, sum(sizes), dtype))
    return losses, bare(state)


def law(spread, cases, dtype, steps):
    """How far each case on parts is from one process on all rows: the losses, and the furthest leaf."""
    found = []
    for model, around, sizes in cases:
        wrapped = lm.compose(SPREAD[spread](), *inner(around))(step)
        whole = batches(steps, sum(sizes), dtype)
        parts = [part(each, sizes, world.rank()) for each in whole]
        losses, state = train(wrapped, make_state(model, dtype, optimizer(dtype)), parts)
        wanted, leaves = one_process(model, around, tuple(sizes), dtype, steps)
        state = wrapped.transforms[0].export(state)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(state), leaves)))
    return found


def check(world, spread, cases, dtype, steps, tolerance):
    for found in world.run(law, spread, cases, dtype, steps):
        for case, (losses, worst, leaf) in zip(cases, found, strict=True):
            assert losses < tolerance, (case, losses)
            assert worst < tolerance, (case, leaf, worst)


def cases_of(size, around):
    """Each model under each transform; the ways to part the rows take turns over both."""
    made = itertools.product(enumerate(MODELS), enumerate(around))
    made = [pair for pair in made if size == 2 or LONG or (pair[0][0] + pair[1][0]) % 2 == 0]
    cases = [(model, each, SIZES[size][(i + j) % len(SIZES[size])]) for (i, model), (j, each) in made]
    return [(model, each, sizes) for model, each, sizes in cases if "remat" not in each or model in ("stack", "deep")]


@pytest.mark.parametrize("spread", ["ddp", "fsdp1", "fsdp2", "fsdp3"])
def test_steps_on_two_processes(spread, world2):
    check(world2, spread, cases_of(2, AROUND), torch.float64, STEPS, 1e-10)


def test_steps_of_copied_parts_on_four_processes(world4):
    check(world4, "hsdp", cases_of(4, AROUND), torch.float64, STEPS, 1e-10)


@pytest.mark.parametrize("spread", ["ddp", "fsdp1", "fsdp2", "fsdp3"])
def test_in_float32_and_bfloat16(spread, world2):
    check(world2, spread, cases_of(2, ["", "accumulate"]), torch.float32, STEPS, 1e-6)
    check(world2, spread, cases_of(2, ["bf16"]), torch.float32, 3, 5e-2)


def gathers(prefetch, *around):
    """How many times params are sent for in one step."""
    made = [0]
    all_gather = unit_plan.UnitPlan.all_gather

    def counted(self, *args):
        made[0] += 1
        return all_gather(self, *args)

    wrapped = lm.compose(fsdp(prefetch=prefetch), *transforms(around))(step)
    state = wrapped.init(make_state("deep"))
    unit_plan.UnitPlan.all_gather = counted
    try:
        wrapped(state, part(batches(1, 8)[0], [5, 3], world.rank()))
    finally:
        unit_plan.UnitPlan.all_gather = all_gather
    return made[0]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_recomputed_units_are_gathered_no_oftener(prefetch, world2):
    # The root once, each of three blocks before its forward pass and before its backward pass.
    assert world2.run(gathers, prefetch) == world2.run(gathers, prefetch, "remat") == [7, 7]
    assert world2.run(gathers, prefetch, "remat save") == [7, 7]


def recomputed(stage, prefetch, pattern, save=None):
    options = {"stage": stage, "prefetch": prefetch}
    whole = batches(3, 8)
    wrapped = lm.compose(fsdp(**options), lm.remat(pattern, save=save))(step)
    losses, state = train(wrapped, make_state("deep"), [part(batch, [5, 3], world.rank()) for batch in whole])
    wanted, other = train(lm.compose()(step), make_state("deep"), whole)
    state = wrapped.export(state)
    return float((losses - wanted).abs().max()), furthest(bare(state), bare(other))[0]


@pytest.mark.parametrize(("stage", "prefetch"), [(1, 1), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_recomputation_at_every_level(stage, prefetch, world2):
    for pattern in (None, "blocks.*.up", "blocks.1"):
        for save in (None, "matmuls"):
            found = world2.run(recomputed, stage, prefetch, pattern, save)
            assert max(worst for each in found for worst in each) < 1e-10


def recomputed_around(save=None, **options):
    """The params after a step that recomputes a module with both units in it."""
    wrapped = lm.compose(fsdp(**options), lm.remat("body", save=save))(step)
    state, _ = wrapped(wrapped.init(make_state("stack")), part(batches(1, 8)[0], [5, 3], world.rank()))
    return {name: p.clone() for name, p in wrapped.export(state).params.items()}


def recomputed_as_a_unit():
    return recomputed_around(wrap="body")


def test_what_contains_units_is_recomputed_with_them(world2):
    units = world2.run(recomputed_as_a_unit)
    for save in (None, "matmuls"):
        for around, unit in zip(world2.run(recomputed_around, save), units, strict=True):
            for name, p in unit.items():
                assert torch.equal(around[name], p), name


def own_statistics(sizes):
    """Buffers after one step of ddp(buffers="local"), and after that of one process on the same rows."""
    wrapped = ddp(buffers="local")(step)
    start = make_state("stack")
    batch = part(batches(1, 8)[0], sizes, world.rank())
    found = wrapped(wrapped.init(start), batch)[0]
    wanted = lm.compose()(step)(start, batch)[0] if sizes[world.rank()] else start
    return furthest(found.buffers, wanted.buffers)[0]


@pytest.mark.parametrize("sizes", SIZES[2])
def test_local_buffers_are_those_of_a_processs_own_rows(sizes, world2):
    assert max(world2.run(own_statistics, sizes)) < 1e-12
