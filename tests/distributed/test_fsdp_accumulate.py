"""Microbatches under ddp and fsdp: as many as each process's rows make, and decisions that all processes share."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from benchmarks import calls
from lumen.core import distributed as world
from lumen.errors import OrderError
from lumen.parallel.comm.consistency import check_equal
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed import fsdp_models, models
from tests.distributed.models import assert_within, bare, batches, furthest, make_state, part, step, train
from tests.distributed.pool import TaskError
from tests.tiers import in_turns, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

assert fsdp_models  # its models are registered where it is imported

UNEVEN, EMPTY, LONE = [5, 3], [8, 0], [7, 1]
STEPS = pick(3, 8)
SPREAD = {
    "ddp": ddp,
    "fsdp1": functools.partial(fsdp, stage=1),
    "fsdp2": functools.partial(fsdp, stage=2),
    "fsdp3": fsdp,
    "hsdp": lambda: fsdp(mesh(data=2, shard=2, device="cpu")),
}
SPLIT = {
    "three": lambda: lm.accumulate(3),
    "many": lambda: lm.accumulate(7),
    "single": lambda: lm.accumulate(microbatch=1),
    "pairs": lambda: lm.accumulate(microbatch=2),
    "auto": lambda: lm.accumulate("auto"),
}


def law(spread, cases, dtype=torch.float64, steps=20):
    """How far each split on parts of a batch is from one process on all of it: the losses, and the furthest leaf."""
    found = []
    for model, split, sizes, *around in cases:
        around = models.transforms(around)
        wrapped = lm.compose(SPREAD[spread](), SPLIT[split](), *around)(step)
        whole = batches(steps, sum(sizes), dtype)
        losses, state = train(wrapped, make_state(model, dtype), [part(each, sizes, world.rank()) for each in whole])
        wanted, other = train(lm.compose(*around)(step), make_state(model, dtype), whole)
        if split == "auto":
            assert int(state.slots["accumulate"].microbatches) == 1
            state = state.replace(slots={k: v for k, v in state.slots.items() if k != "accumulate"})
        check_equal(wrapped.transforms[0].export(state))
        found.append((float((losses - wanted).abs().max()), *furthest(whole_of(wrapped, state), bare(other))))
    return found


def whole_of(wrapped, state):
    """The leaves of a state that was gathered."""
    return bare(wrapped.transforms[0].export(state))


def check_law(world, spread, cases, *settings, tolerance=1e-10):
    assert_within(tolerance, cases, world.run(law, spread, cases, *settings))


@pytest.mark.parametrize("spread", ["ddp", "fsdp1", "fsdp2", "fsdp3"])
def test_uneven_microbatches_are_the_whole_batch(spread, world2):
    splits = [name for name in SPLIT if spread != "fsdp3" or name != "auto"]
    cases = [("deep", *each) for each in in_turns(splits, (UNEVEN, LONE, EMPTY))]
    check_law(world2, spread, cases, torch.float64, STEPS)


@pytest.mark.parametrize("spread", ["ddp", "fsdp3", "hsdp"])
def test_uneven_microbatches_on_four_processes(spread, world4):
    cases = [(*each, [4, 0, 3, 1]) for each in in_turns(("deep", "routed"), ("three", "pairs"))]
    check_law(world4, spread, cases, torch.float64, STEPS)


def sums_of_a_step(spread, split):
    """How many sums of gradients one step takes, after those that are taken once only."""
    wrapped = lm.compose(SPREAD[spread](), SPLIT[split]())(step)
    state = wrapped.init(make_state("deep"))
    first, second = (part(each, LONE, world.rank()) for each in batches(2, 8))
    state, _ = wrapped(state, first)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        wrapped(state, second)
    names = [event.name for event in seen.events() if event.name.startswith("gloo:")]
    return sum("reduce" in name for name in names)


@pytest.mark.parametrize(
    ("spread", "sums"),
    [
        ("ddp", 1),
        ("fsdp1", 1),
        ("fsdp2", 2),  # the loss, its weight and buffers travel by themselves
        ("fsdp3", 1 + 3 * 4),  # four units for each of three microbatches, though one process has a single row
    ],
)
def test_gradients_are_summed_once_for_an_update(spread, sums, world2):
    assert world2.run(sums_of_a_step, spread, "three") == [sums] * 2


def normalized(state, batch):
    """A loss whose gradient is not finite for rows of zeros, with metrics of each row."""

    def loss_fn(params, batch):
        x = batch["x"] / batch["x"].std(-1, keepdim=True)
        losses = F.cross_entropy(state.apply(params, x)[0], batch["y"], reduction="none")
        return lm.Mean.of(losses), lm.Aux(metrics={"rows": losses.detach()})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, **aux.metrics}


def of_no_rows(spread, sizes):
    whole = batches(4, 8)
    wrapped = lm.compose(SPREAD[spread](), lm.accumulate(3))(normalized)
    losses, state = train(wrapped, make_state("mlp"), [part(each, sizes, world.rank()) for each in whole])
    wanted, other = train(lm.compose()(normalized), make_state("mlp"), whole)
    _, metrics = wrapped(state, part(whole[0], sizes, world.rank()))
    worst = furthest(whole_of(wrapped, state), bare(other))[0]
    return float((losses - wanted).abs().max()), worst, len(metrics["rows"])


@pytest.mark.parametrize("spread", ["ddp", "fsdp2", "fsdp3"])
@pytest.mark.parametrize("sizes", [EMPTY, LONE])
def test_what_stands_in_for_rows_weighs_nothing_whatever_it_gives(spread, sizes, world2):
    for size, (losses, worst, seen) in zip(sizes, world2.run(of_no_rows, spread, sizes), strict=True):
        assert max(losses, worst) < 1e-10
        assert seen == size


def batchnorm_of_no_rows(spread):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(models.WIDTH, 4, bias=False), torch.nn.BatchNorm1d(4), models.mlp()[2])
    net[2] = torch.nn.Linear(4, models.CLASSES)
    wrapped = lm.compose(SPREAD[spread](), lm.accumulate(2))(step)
    data = [part(each, EMPTY, world.rank()) for each in batches(3, 8)]
    losses, _ = train(wrapped, lm.TrainState.create(net.double(), lm.optim.sgd(0.1)), data)
    return losses.tolist()


@pytest.mark.parametrize("spread", ["ddp", "fsdp3"])
def test_batchnorm_on_a_process_without_rows(spread, world2):
    first, second = world2.run(batchnorm_of_no_rows, spread)
    assert first == second
    assert len(first) == 3


def overflowing(spread, around):
    """Batches, the second with a row of one process that is not finite; what the slots say after each."""
    fp16 = lm.Policy(torch.float32, torch.float16, torch.float32, loss_scale=2.0**8)
    inner = lm.precision(fp16) if around == "fp16" else lm.guard()
    wrapped = lm.compose(SPREAD[spread](), lm.accumulate(3), inner)(step)
    state = wrapped.init(make_state("mlp", torch.float32))
    whole, seen = batches(4, 8, torch.float32), []
    whole[1]["x"][7] = float("inf")
    whole[1]["mask"][7] = True
    for batch in whole:
        before = state.params
        state, _ = wrapped(state, part(batch, LONE, world.rank()))
        same = all(torch.equal(a, b) for a, b in zip(before.values(), state.params.values(), strict=True))
        scale = float(state.slots["precision"].scale) if "precision" in state.slots else None
        seen.append((same, scale, int(state.slots["guard"].skipped) if "guard" in state.slots else None))
    check_equal(wrapped.transforms[0].export(state))
    return seen


@pytest.mark.parametrize("spread", ["ddp", "fsdp1", "fsdp2", "fsdp3"])
def test_all_agree_about_an_update_that_one_microbatch_spoils(spread, world2):
    scaled = world2.run(overflowing, spread, "fp16")
    assert scaled[0] == scaled[1]
    assert [same for same, *_ in scaled[0]] == [False, True, False, False]
    assert [scale for _, scale, _ in scaled[0]] == [2.0**8, 2.0**7, 2.0**7, 2.0**7]
    guarded = world2.run(overflowing, spread, "guard")
    assert guarded[0] == guarded[1] == [(False, None, 0), (True, None, 1), (False, None, 1), (False, None, 1)]


def short_of_memory(spread, most):
    """A step that asks for more memory than there is where the last process has more than `most` rows at once."""

    def hungry(state, batch):
        def loss_fn(params, batch):
            logits, _ = state.apply(params, batch["x"])
            if world.rank() == 1 and len(logits) > most:
                torch.empty(2**60, dtype=torch.uint8)
            return lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"), batch["mask"])

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    whole = batches(3, 11)
    wrapped = lm.compose(SPREAD[spread](), lm.accumulate("auto"))(hungry)
    with pytest.warns(lm.errors.InexactWarning, match="out of memory"):
        losses, state = train(wrapped, make_state("mlp"), [part(each, [3, 8], world.rank()) for each in whole])
    parts = int(state.slots["accumulate"].microbatches)
    state = wrapped.export(state)
    alone, other = train(lm.compose()(plain), make_state("mlp"), whole)
    return parts, float((losses - alone).abs().max()), furthest(bare(state), bare(other))[0]


def plain(state, batch):
    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"), batch["mask"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("spread", ["ddp", "fsdp1", "fsdp2"])
def test_out_of_memory_on_one_process_makes_all_cut_finer(spread, world2):
    for parts, losses, worst in world2.run(short_of_memory, spread, 2):
        assert parts == 4
        assert max(losses, worst) < 1e-10


def test_single_rows_that_do_not_fit_end_all_processes(world2):
    with pytest.raises(TaskError) as caught:
        world2.run(short_of_memory, "ddp", 0, limit=60)
    assert [kind for _, kind, _ in caught.value.errors] == ["OutOfMemoryError"] * 2


def test_where_auto_cannot_stand():
    with pytest.raises(OrderError, match=r"lm\.fsdp\(stage=2\)"):
        lm.compose(fsdp(), lm.accumulate("auto"))(step)
    lm.compose(fsdp(stage=2), lm.accumulate("auto"))(step)


def compiled_auto():
    wrapped = lm.compose(lm.compile(backend="eager"), ddp(), lm.accumulate("auto"))(step)
    state = wrapped.init(make_state("mlp"))
    wrapped(state, part(batches(1, 8)[0], UNEVEN, world.rank()))


def compiled_fp16():
    """Loss scaling inside of microbatches, compiled."""
    wrapped = lm.compose(lm.compile(backend="eager"), ddp(), lm.accumulate(2), lm.precision("fp16"))(step)
    data = [part(each, UNEVEN, world.rank()) for each in batches(3, 8, torch.float32)]
    losses, state = train(wrapped, make_state("mlp", torch.float32), data)
    check_equal(state)
    eager = lm.compose(ddp(), lm.accumulate(2), lm.precision("fp16"))(step)
    wanted, other = train(eager, make_state("mlp", torch.float32), data)
    return float((losses - wanted).abs().max()), furthest(bare(state), bare(other))[0]


def test_compiled(world2):
    for losses, worst in world2.run(compiled_fp16):
        assert losses < 1e-5
        assert worst < 1e-4
    with pytest.raises(TaskError, match=r"lm\.accumulate\(2\)"):
        world2.run(compiled_auto, limit=60)


def calls_of_a_step():
    """How many Python calls into Lumen a step makes, and in how many files."""
    files = calls.counted(lm.compose(lm.donate(), fsdp(mesh(shard=2, device="cpu")), lm.accumulate(2)))
    return len(files), len(set(files))


def test_a_step_makes_few_calls(world2):
    for count, files in world2.run(calls_of_a_step):
        assert count <= 660, "python -m benchmarks.calls --files"
        assert files <= 39
