"""Compiled ddp and fsdp: one graph with its collectives inside, and the numbers of one process on all rows."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lumen as lm
from lumen.core import distributed as world
from lumen.errors import OrderError
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed import fsdp_models
from tests.distributed.models import assert_within, bare, batches, furthest, make_state, part, step, train, transforms
from tests.distributed.pool import TaskError
from tests.distributed.test_ddp import cut
from tests.tiers import in_turns, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

UNEVEN, EMPTY = [5, 3], [8, 0]
STACK = ["guard", "clip", "ema", "donate"]
BLOCKS = len(fsdp_models.DeepGPT().blocks)
STRATEGIES = {"ddp": ddp, "fsdp": fsdp}


def spread(strategy, options):
    options = dict(options)
    grid = mesh(**options.pop("mesh"), device="cpu") if "mesh" in options else None
    return STRATEGIES[strategy](grid, **options)


@functools.cache
def one_process(model, around, sizes, dtype, steps):
    """Losses and leaves of one process on all rows, the same for every strategy and stage."""
    norms = model in ("conv", "stack")  # which see the rows of one process
    beside = lm.compose(*[cut(sizes)] * norms, *transforms(around))(step)
    losses, state = train(beside, make_state(model, dtype), batches(steps, sum(sizes), dtype))
    return losses, bare(state)


def law(cases, backend="eager", steps=3, dtype=torch.float64, blocks=None):
    """For each case how far the compiled step on parts is from one process on all rows: losses, and furthest leaf."""
    warnings.simplefilter("error", lm.GraphBreakWarning)
    found = []
    for strategy, options, model, around, sizes in cases:
        whole = batches(steps, sum(sizes), dtype)
        compiled = lm.compile(backend=backend, blocks=blocks)
        wrapped = lm.compose(compiled, spread(strategy, options), *transforms(around))(step)
        losses, state = train(wrapped, make_state(model, dtype), [part(batch, sizes, world.rank()) for batch in whole])
        wanted, other = one_process(model, tuple(around), tuple(sizes), dtype, steps)
        leaves = bare(wrapped.transforms[1].export(state))
        found.append((float((losses - wanted).abs().max()), *furthest(leaves, other)))
    return found


def check(world, cases, *settings, tolerance=1e-10):
    assert_within(tolerance, cases, world.run(law, cases, *settings))


@pytest.mark.parametrize("model", ["mlp", "deep", "conv"])
def test_compiled_ddp_on_parts_is_the_whole(model, world2):
    cases = [("ddp", {"bucket_mb": 2e-4}, model, around, UNEVEN) for around in pick([STACK], [[], STACK])]
    cases += [("ddp", {}, model, [] if model == "conv" else ["accumulate"], EMPTY)]
    check(world2, cases)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["mlp", "deep", "stack"])
def test_compiled_fsdp_on_parts_is_the_whole(model, stage, world2):
    cases = [("fsdp", {"stage": stage}, model, around, UNEVEN) for around in pick([STACK], [[], STACK])]
    cases += [("fsdp", {"stage": stage}, model, [] if model == "stack" else ["accumulate"], EMPTY)]
    turn = (stage + ["mlp", "deep", "stack"].index(model)) % 2  # each stage and each model has both
    check(world2, pick(cases[turn : turn + 1], cases))


def test_params_outside_their_unit_twice_or_never(world2):
    check(world2, [("fsdp", {}, model, [], UNEVEN) for model in ("reaching", "outside")])


@pytest.mark.parametrize(("strategy", "sizes"), in_turns(["ddp", "fsdp"], [UNEVEN, EMPTY]))
def test_by_inductor(strategy, sizes, world2):
    """Also where a process computes what its graph does not need, but for the collectives in it."""
    options = {"bucket_mb": 2e-4} if strategy == "ddp" else {"wrap": ["0", "2"]}
    check(world2, [(strategy, options, "mlp", ["clip", "donate"], sizes)], "inductor")


def test_copies_of_parts_on_four_processes(world4):
    grid = {"data": 2, "shard": 2}
    check(
        world4,
        [("fsdp", {"mesh": grid, "stage": stage}, "deep", ["clip"], [4, 0, 3, 1]) for stage in pick([3], [1, 3])],
    )


def test_in_bfloat16(world2):
    cases = [
        ("ddp", {"reduce_dtype": "bf16"}, "mlp", ["bf16"], UNEVEN),
        ("fsdp", {"param_dtype": "bf16"}, "deep", [], UNEVEN),
    ]
    check(world2, cases, "eager", 3, torch.float32, tolerance=5e-2)


class Watch(TorchDispatchMode):
    """The operators that ran, and how many sets of whole params were alive at once."""

    def __init__(self):
        super().__init__()
        self.ran, self.alive, self.most = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        self.ran.append(name)
        if name == "lumen.taken_apart":
            self.alive.append(weakref.ref(max(out, key=torch.numel)))
            self.most = max(self.most, sum(each() is not None for each in self.alive))
        return out


def watched(strategy, options, model, sizes=UNEVEN):
    wrapped = lm.compose(lm.compile(backend="eager"), spread(strategy, options))(step)
    state = wrapped.init(make_state(model))
    first, second = (part(batch, sizes, world.rank()) for batch in batches(2, 8))
    state, _ = wrapped(state, first)
    with Watch() as seen:
        wrapped(state, second)
    return seen.ran, seen.most


def collectives(ran):
    return Counter(name.partition(".")[2] for name in ran if name.startswith("_c10d_functional."))


def test_buckets_are_launched_while_the_gradient_is_computed(world2):
    (ran, _), (other, _) = world2.run(watched, "ddp", {"bucket_mb": 2e-4}, "mlp")
    assert ran == other  # with other numbers of rows
    assert not [name for name in ran if name.startswith("c10d.")]
    assert collectives(ran) == {"all_reduce": 4, "wait_tensor": 4}  # two weights, two biases, by size
    assert ran.index("_c10d_functional.all_reduce") < len(ran) - 1 - ran[::-1].index("aten.mm")
    assert ran.index("_c10d_functional.wait_tensor") > len(ran) - 1 - ran[::-1].index("_c10d_functional.all_reduce")


@pytest.mark.parametrize(("strategy", "model"), [("ddp", "mlp"), ("ddp", "conv"), ("fsdp", "deep"), ("fsdp", "stack")])
def test_a_process_without_rows_takes_part_in_every_collective(strategy, model, world2):
    (ran, _), (other, _) = world2.run(watched, strategy, {}, model, EMPTY)
    wanted, found = ([name for name in names if name.startswith("_c10d_functional.")] for names in (ran, other))
    assert wanted == found
    assert wanted


def test_params_travel_in_a_few_buckets(world2):
    ran, _ = world2.run(watched, "ddp", {}, "deep")[0]
    assert collectives(ran) == {"all_reduce": 1, "wait_tensor": 1}


def test_units_are_gathered_twice_and_few_at_once(world2):
    """The root once, each block before its forward and before its backward pass."""
    for ran, most in world2.run(watched, "fsdp", {}, "deep"):
        assert not [name for name in ran if name.startswith("c10d.")]
        found = collectives(ran)
        assert found["all_gather_into_tensor"] == 1 + 2 * BLOCKS
        assert found["reduce_scatter_tensor"] == 1 + BLOCKS
        assert most <= 3  # the root, and a unit beside the one that goes


def traced():
    """How often the Python of a step runs."""
    runs = []

    def counted(state, batch):
        runs.append(1)
        return step(state, batch)

    wrapped = lm.compose(lm.compile(backend="eager"), ddp())(counted)
    state, seen = wrapped.init(make_state("mlp")), []
    for sizes in (UNEVEN, UNEVEN, [4, 3], UNEVEN, EMPTY, EMPTY):  # a smaller batch, and one that a process gets none of
        batch = part(batches(1, sum(sizes))[0], sizes, world.rank())
        state, _ = wrapped(state, batch)
        seen.append(len(runs))
    return seen


def test_a_shape_is_traced_once(world2):
    first, second = world2.run(traced)
    assert first == [1, 1, 2, 2, 3, 3]
    assert second == [1, 1, 1, 1, 2, 2]  # three rows are three rows


def summed(strategy):
    """A step that asks for a sum by the axis's name."""
    axis = {"ddp": "data", "fsdp": "shard"}[strategy]

    def asking(state, batch):
        new, metrics = step(state, batch)
        return new, {"rows": lm.psum(batch["x"].new_tensor(float(len(batch["x"]))), axis), **metrics}

    wrapped = lm.compose(lm.compile(backend="eager"), STRATEGIES[strategy]())(asking)
    state = wrapped.init(make_state("mlp"))
    batch = part(batches(1, 8)[0], UNEVEN, world.rank())
    return wrapped(state, batch)[1]["rows"].item()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sums_by_the_name_of_an_axis(strategy, world2):
    assert world2.run(summed, strategy) == [8.0] * 2


def recomputed(save):
    whole = batches(3, 8)
    wrapped = lm.compose(lm.compile(backend="eager"), fsdp(), lm.remat(save=save))(step)
    losses, state = train(wrapped, make_state("deep"), [part(batch, UNEVEN, world.rank()) for batch in whole])
    wanted, other = train(lm.compose()(step), make_state("deep"), whole)
    return float((losses - wanted).abs().max()), furthest(bare(wrapped.transforms[1].export(state)), bare(other))[0]


@pytest.mark.parametrize("save", [None, "matmuls"])
def test_recomputed_units(save, world2):
    assert max(worst for found in world2.run(recomputed, save) for worst in found) < 1e-10


def split_unequally(inside):
    whole = batches(3, 8)
    wrapped = lm.compose(lm.compile(backend="eager"), fsdp(), inside)(step)
    losses, state = train(wrapped, make_state("mlp"), [part(batch, [7, 1], world.rank()) for batch in whole])
    wanted, other = train(lm.compose()(step), make_state("mlp"), whole)
    return float((losses - wanted).abs().max()), furthest(bare(wrapped.transforms[1].export(state)), bare(other))[0]


def test_processes_with_fewer_microbatches(world2):
    assert max(worst for found in world2.run(split_unequally, lm.accumulate(2)) for worst in found) < 1e-10


def test_microbatches_that_a_graph_cannot_count(world2):
    with pytest.raises(TaskError) as caught:
        world2.run(split_unequally, lm.accumulate(microbatch=2))
    assert len(caught.value.errors) == 2
    for _, kind, message in caught.value.errors:
        assert kind == OrderError.__name__
        assert "lm.accumulate(2)" in message
