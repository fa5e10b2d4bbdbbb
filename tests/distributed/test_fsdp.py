"""fsdp: on parts of a batch, with parts of the params, it is one process on the whole."""

from __future__ import annotations

import functools
import gc
import re

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from lumen.errors import AxisError, HyperparameterError, OrderError, ParamsError, PatternError, WorldError
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.fsdp import chunks, forward_pass, grad_reduction, sharded_update, unshard
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.parallel.fsdp.wrap import find
from lumen.parallel.optimizer_check import check_optimizer
from tests.distributed import fsdp_models, models
from tests.distributed.models import (
    AROUND,
    bare,
    batches,
    furthest,
    make_state,
    part,
    plain_step,
    step,
    train,
    transforms,
)
from tests.distributed.pool import TaskError
from tests.distributed.test_ddp import cut
from tests.tiers import in_turns, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = pick(4, 20)
EVEN, UNEVEN, EMPTY = [4, 4], [5, 3], [8, 0]
STEP = {"step": step, "plain": plain_step}
OPTIMIZERS = {
    "adam": lambda: lm.optim.adam(1e-2, eps=1e-4),
    "chain": lambda: lm.optim.chain(lm.optim.clip_by_global_norm(0.05), lm.optim.adamw(1e-2, eps=1e-4)),
    "sgd": lambda: lm.optim.sgd(0.1, momentum=0.9),
    "lion": lambda: lm.optim.lion(1e-3),
    "torch": lambda: lm.optim.from_torch(torch.optim.Adamax, lr=1e-2, eps=1e-4),
    "muon": lambda: lm.optim.partition(
        {re.compile(r"(qkv|up)\.weight"): lm.optim.muon(0.02, dtype=torch.float64)}, default=lm.optim.sgd(0.1)
    ),
    "adafactor": lambda: lm.optim.adafactor(1e-2),
    "lamb": lambda: lm.optim.lamb(1e-2, eps=1e-4),
    "finite": lambda: lm.optim.apply_if_finite(lm.optim.chain(lm.optim.scale_by_trust_ratio(), lm.optim.sgd(0.1)), 2),
    "lookahead": lambda: lm.optim.lookahead(lm.optim.adam(1e-2, eps=1e-4), period=3),
    "partition": lambda: lm.optim.partition({"*.bias": lm.optim.sgd(0.1)}, default=lm.optim.adam(1e-2, eps=1e-4)),
}


def batches_of(name, steps, size, dtype):
    whole = batches(steps, size, dtype)
    return [{k: x for k, x in batch.items() if k != "mask"} for batch in whole] if name == "plain" else whole


@functools.cache
def one_process(model, around, sizes, name, dtype, steps, tx, parts):
    """Losses and leaves of one process on all rows, the same for every stage and mesh."""
    beside = lm.compose(*[cut(sizes)] * parts, *transforms(around))(STEP[name])
    state = make_state(model, dtype, OPTIMIZERS[tx]())
    losses, state = train(beside, state, batches_of(name, steps, sum(sizes), dtype))
    return losses, bare(state)


def law(cases, options=None, dtype=torch.float64, steps=STEPS, tx="adam", parts=False):
    """For each case how far fsdp on parts is from one process on all rows: the losses, and the furthest leaf."""
    found = []
    options = dict(options or {})
    grid = mesh(**options.pop("mesh", {"shard": -1}), device="cpu")
    for model, around, sizes, name in cases:
        wrapped = lm.compose(fsdp(grid, **options), *transforms(around))(STEP[name])
        whole = batches_of(name, steps, sum(sizes), dtype)
        data = [part(batch, sizes, distributed.rank()) for batch in whole]
        losses, state = train(wrapped, make_state(model, dtype, OPTIMIZERS[tx]()), data)
        wanted, leaves = one_process(model, tuple(around), tuple(sizes), name, dtype, steps, tx, parts)
        found.append((float((losses - wanted).abs().max()), *furthest(whole_of(wrapped, state), leaves)))
    return found


def whole_of(wrapped, state):
    """The leaves of a state that was gathered, slots of the transforms inside still in place."""
    return bare(wrapped.transforms[0].export(state))


check_law = functools.partial(models.check_law, law)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["mlp", "deep", "outside", "routed"])
def test_parts_on_two_processes_are_the_whole(model, stage, world2):
    cases = [(model, *each) for each in in_turns(AROUND, (UNEVEN, EMPTY, UNEVEN, EVEN))]
    cases += [(model, ["accumulate", "clip", "donate"], EMPTY)]
    check_law(world2, cases, {"stage": stage})


def test_what_is_used_outside_its_unit_twice_or_never(world2):
    check_law(world2, [("reaching", *each) for each in in_turns(([], ["clip"]), (EVEN, UNEVEN, EMPTY))])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parts_on_four_processes_are_the_whole(stage, world4):
    cases = [
        (model, [], sizes) for model, sizes in in_turns(("deep", "routed", "outside"), ([4, 0, 3, 1], [2, 2, 2, 2]))
    ]
    check_law(world4, cases, {"stage": stage})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_copies_of_parts_are_the_whole(stage, world4):
    cases = [
        (model, around, sizes)
        for model, around, sizes in in_turns(
            ("deep", "outside"), (["guard", "clip", "ema", "donate"], []), ([4, 0, 3, 1], [2, 2, 2, 2])
        )
    ]
    check_law(world4, cases, {"stage": stage, "mesh": {"data": 2, "shard": 2}})


def test_units_that_one_process_passes_over(world2):
    check_law(world2, [("routed", [], sizes) for sizes in (EVEN, UNEVEN, EMPTY)], {"wrap": ["one", "other"]})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_prefetch_changes_no_number(prefetch, world2):
    check_law(world2, [("deep", around, UNEVEN) for around in ([], ["accumulate"])], {"prefetch": prefetch})


@pytest.mark.parametrize("stage", [1, 3])
def test_a_plain_loss_weighs_by_its_rows(stage, world2):
    check_law(world2, [("mlp", [], sizes, "plain") for sizes in (EVEN, UNEVEN, EMPTY)], {"stage": stage})


@pytest.mark.parametrize("tx", OPTIMIZERS)
def test_optimizers_that_run_on_parts(tx, world2):
    for stage, around in in_turns((1, 2, 3), (["donate"], [])):  # stage 2 is 1 but for where gradients are kept
        check_law(world2, [("deep", around, UNEVEN)], {"stage": stage}, torch.float64, 4, tx)


def test_in_float32(world2):
    cases = [(model, around, UNEVEN) for model in ("mlp", "deep") for around in ([], ["clip", "donate"])]
    check_law(world2, cases, {}, torch.float32, tolerance=1e-5)


def test_in_16_bits(world2):
    """A gradient is rounded to the computation's dtype, on each process and once more as a sum."""
    cases = [("deep", around, sizes) for around in (["bf16"], ["accumulate", "bf16"]) for sizes in (UNEVEN, EMPTY)]
    check_law(world2, cases, {}, torch.float32, 5, "sgd", tolerance=5e-2)


def scaled(stage):
    """A loss scale that is far too large at first: sums over all rows overflow where means may not."""
    wrapped = lm.compose(fsdp(stage=stage), lm.precision("fp16"))(step)
    whole = batches(1, 8, torch.float32) * 30
    losses, state = train(
        wrapped, make_state("mlp", torch.float32), [part(each, UNEVEN, distributed.rank()) for each in whole]
    )
    return losses.tolist(), float(state.slots["precision"].scale), int(state.opt_state.count)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_processes_agree_about_the_loss_scale(stage, world2):
    first, second = world2.run(scaled, stage)
    assert first == second
    losses, scale, updates = first
    assert 2.0**10 <= scale <= 2.0**16
    assert 20 <= updates < 30 or scale == 2.0**16
    assert losses[-1] < losses[0]


def test_params_gathered_in_bfloat16(world2):
    check_law(world2, [("deep", [], UNEVEN)], {"param_dtype": "bf16"}, torch.float32, 5, tolerance=5e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buffers_are_merged_as_over_microbatches(stage, world2):
    cases = [("stack", *each) for each in in_turns(([], ["guard", "clip"]), (EVEN, UNEVEN, EMPTY))]
    check_law(world2, cases, {"stage": stage}, torch.float64, STEPS, "adam", True)


def most_at_once(prefetch):
    """How many units at once have their params whole, over one step."""
    whole, most = set(), [0]
    fetch, free = unshard.EagerUnit.fetch, unshard.EagerUnit.free

    def fetched(unit, *reached):
        whole.add(id(unit))
        most[0] = max(most[0], len(whole))
        return fetch(unit, *reached)

    def freed(unit):
        free(unit)
        assert all(flat.untyped_storage().nbytes() == 0 for flat in unit._buffers)
        whole.discard(id(unit))

    wrapped = fsdp(prefetch=prefetch)(step)
    state = wrapped.init(make_state("deep"))
    unshard.EagerUnit.fetch, unshard.EagerUnit.free = fetched, freed
    try:
        wrapped(state, part(batches(1, 8)[0], UNEVEN, distributed.rank()))
    finally:
        unshard.EagerUnit.fetch, unshard.EagerUnit.free = fetch, free
    return most[0], len(whole)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_only_the_root_and_one_unit_are_whole_at_once(prefetch, world2):
    assert world2.run(most_at_once, prefetch) == [(2, 0)] * 2


def test_nothing_waits_for_the_garbage_collector(world2):
    assert world2.run(left_over) == [0, 0]


def left_over():
    wrapped = fsdp()(step)
    state = wrapped.init(make_state("deep"))
    gc.collect()
    gc.disable()
    try:
        wrapped(state, part(batches(1, 8)[0], UNEVEN, distributed.rank()))
        kinds = (unshard.EagerUnit, unshard.UnshardContext, forward_pass.ForwardPass)
        return sum(type(each) in kinds for each in gc.get_objects())
    finally:
        gc.enable()


def test_units_are_the_repeated_blocks_and_tied_params_are_the_roots():
    net = fsdp_models.DeepGPT()
    names = [name for name, _ in net.named_parameters()]
    found = find(net, None, names)
    assert found.names == ("", "blocks.0", "blocks.1", "blocks.2")
    assert {name: unit for name, unit in found.owner.items() if "blocks" not in name} == dict.fromkeys(
        ["place", "gain", "embed.weight", "mix.weight", "mix.bias"], 0
    )
    assert found.owner["blocks.1.up.weight"] == 2
    chosen = find(net, ["blocks.*", "embed", "head"], names)
    assert chosen.names == ("", "embed", "blocks.0", "blocks.1", "blocks.2", "head")
    assert chosen.owner["embed.weight"] == 0  # tied between two units
    assert find(net, ["blocks"], names).names == ("", "blocks")


def test_a_block_that_is_alone_in_its_list_is_a_unit():
    body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    net = torch.nn.Module()
    net.blocks, net.head = torch.nn.ModuleList([body]), torch.nn.Linear(4, 2)
    assert find(net, None, [name for name, _ in net.named_parameters()]).names == ("", "blocks.0")
    net.stages, net.blocks = torch.nn.ModuleList([torch.nn.ModuleList([body])]), None  # a list does not run
    assert find(net, None, [name for name, _ in net.named_parameters()]).names == ("", "stages.0.0")


def test_recomputed_units(world2):
    assert max(worst for found in world2.run(law_with_remat) for worst in found) < 1e-10


def law_with_remat():
    whole = batches(5, 8)
    wrapped = lm.compose(fsdp(), lm.remat())(step)
    losses, state = train(wrapped, make_state("deep"), [part(batch, UNEVEN, distributed.rank()) for batch in whole])
    wanted, other = train(step_of(step), make_state("deep"), whole)
    return float((losses - wanted).abs().max()), furthest(whole_of(wrapped, state), bare(other))[0]


def some_at_a_time(stage, around):
    """The law where nothing that travels fits into one message, and how many messages an update takes."""
    kept, chunks.CHUNK_BYTES = chunks.CHUNK_BYTES, 200
    made = [0]
    gather, scatter = sharded_update.gather, grad_reduction.reduce_scatter

    def counted(function):
        def run(*args):
            made[0] += 1
            return function(*args)

        return run

    sharded_update.gather, grad_reduction.reduce_scatter = counted(gather), counted(scatter)
    try:
        whole = batches(3, 8)
        wrapped = lm.compose(fsdp(stage=stage), *transforms(around))(step)
        losses, state = train(wrapped, make_state("deep"), [part(batch, UNEVEN, distributed.rank()) for batch in whole])
    finally:
        chunks.CHUNK_BYTES, sharded_update.gather, grad_reduction.reduce_scatter = kept, gather, scatter
    wanted, other = train(lm.compose(*transforms(around))(step), make_state("deep"), whole)
    return float((losses - wanted).abs().max()), furthest(whole_of(wrapped, state), bare(other))[0], made[0]


@pytest.mark.parametrize(("stage", "around"), [(1, []), (1, ["donate"]), (2, []), (2, ["donate"])])
def test_params_and_gradients_travel_some_at_a_time(stage, around, world2):
    for losses, worst, made in world2.run(some_at_a_time, stage, around):
        assert losses < 1e-10
        assert worst < 1e-10
        assert made > 3 * 5  # three steps; all at once would be one or two for each


def step_of(function):
    return lm.compose()(function)


def at_rest(stage):
    wrapped = fsdp(stage=stage)(step)
    state = wrapped.init(make_state("deep"))
    whole = make_state("deep")
    back = wrapped.export(state)
    same = all(torch.equal(a, b) for a, b in zip(lm.tree.tensors(back), lm.tree.tensors(whole), strict=True))
    plain = {type(leaf) for leaf in lm.tree.leaves(state)}
    return lm.tree.nbytes(state.params), lm.tree.nbytes(state.opt_state), lm.tree.nbytes(whole.params), same, plain


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_at_rest_a_state_is_cut_and_comes_back_bitwise(stage, world4):
    found = world4.run(at_rest, stage)
    whole = found[0][2]
    assert all(same and plain == {torch.Tensor} for *_, same, plain in found)
    params = [each[0] for each in found]
    assert max(params) < 0.35 * whole if stage == 3 else params == [whole] * 4
    assert max(each[1] for each in found) < 0.35 * 2 * whole + 64


def evaluated():
    wrapped = fsdp()(step)
    state = wrapped.init(make_state("deep"))
    x = batches(1, 4)[0]["x"]

    def evaluate(state, batch):
        with torch.no_grad():
            return state, {"out": state.eval().apply(state.params, batch)[0]}

    found = fsdp()(evaluate)(state, x)[1]["out"]
    whole = make_state("deep")
    return torch.equal(found, whole.apply(whole.params, x)[0])


def test_a_model_is_evaluated_on_parts(world2):
    assert world2.run(evaluated) == [True, True]


def penalized(stage):
    """A loss that reads params itself, by name and as a tree."""

    def penal(state, batch):
        def loss_fn(params, batch):
            losses = state.apply(params, batch["x"])[0].square().sum(-1)
            penalty = sum(p.square().sum() for p in params.values()) + params["0.weight"].T[0].abs().sum()
            doubled = {name: p * 2 for name, p in params.items()}
            losses = losses + state.apply(doubled, batch["x"])[0].square().sum(-1) + 0.1 * penalty
            return lm.Mean.of(losses)

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    whole = batches(STEPS, 8)
    wrapped = fsdp(stage=stage)(penal)
    losses, state = train(wrapped, make_state("mlp"), [part(batch, UNEVEN, distributed.rank()) for batch in whole])
    wanted, other = train(step_of(penal), make_state("mlp"), whole)
    return float((losses - wanted).abs().max()), furthest(whole_of(wrapped, state), bare(other))[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_reads_params_itself(stage, world2):
    assert max(worst for found in world2.run(penalized, stage) for worst in found) < 1e-10


def not_finite(stage):
    """A NaN in the rows of one process is left out by all of them."""
    wrapped = lm.compose(fsdp(stage=stage), lm.guard())(step)
    start = wrapped.init(make_state("deep"))
    batch = part(batches(1, 8)[0], UNEVEN, distributed.rank())
    assert int(wrapped(start, batch)[0].slots["guard"].skipped) == 0
    new, _ = lm.compose(fsdp(stage=stage), lm.guard())(nan_step)(start, batch)
    same = all(torch.equal(a, b) for a, b in zip(new.params.values(), start.params.values(), strict=True))
    return int(new.slots["guard"].skipped), same


def nan_step(state, batch):
    def loss_fn(params, batch):
        out = state.apply(params, batch["x"])[0]
        factor = torch.where(torch.arange(len(out)) == 0, torch.nan if distributed.rank() == 1 else 1.0, 1.0)
        return lm.Mean.of(out.sum(-1) * factor)

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_guard_leaves_an_update_out_everywhere(stage, world2):
    assert world2.run(not_finite, stage) == [(1, True), (1, True)]


def whole_torch():
    return lm.optim.from_torch(torch.optim.Adafactor, lr=1e-2)


def of_the_user():
    return lm.optim.GradientTransformation(
        lambda _: (), lambda grads, state, _: (grads, state), needs_full_tensors="mine takes the mean"
    )


REFUSED = {
    "from_torch": ("from_torch(Adafactor)", whole_torch),
    "chain": ("from_torch(Adafactor)", lambda: lm.optim.chain(lm.optim.clip_by_global_norm(1.0), whole_torch())),
    "partition": ("from_torch(Adafactor)", lambda: lm.optim.partition({"*.weight": lm.optim.muon(0.1)}, whole_torch())),
    "freeze": ("from_torch(Adafactor)", lambda: lm.optim.freeze("*.weight", whole_torch())),
    "apply_if_finite": ("mine takes the mean", lambda: lm.optim.apply_if_finite(of_the_user(), 3)),
    "lookahead": ("mine takes the mean", lambda: lm.optim.lookahead(of_the_user())),
    "schedule_free": ("mine takes the mean", lambda: lm.optim.schedule_free(of_the_user())),
}


@pytest.mark.parametrize("case", REFUSED)
def test_optimizers_that_need_whole_tensors_are_refused_by_name(case):
    says, make = REFUSED[case]
    with pytest.raises(HyperparameterError, match=re.escape(says)):
        check_optimizer(make())


def refuse():
    fsdp()(step).init(make_state("mlp", tx=lm.optim.chain(lm.optim.clip_by_global_norm(1.0), of_the_user())))


def moments_of_few_rows(stage):
    """Adafactor's column of a matrix with one row for each process looks like a part, and is none."""
    torch.manual_seed(0)
    wrapped = fsdp(stage=stage)(plain_step)
    net = torch.nn.Sequential(torch.nn.Linear(models.WIDTH, 2), torch.nn.Linear(2, models.CLASSES)).double()
    state = wrapped.init(lm.TrainState.create(net, lm.optim.adafactor(1e-2)))
    data = [{"x": batch["x"], "y": batch["y"]} for batch in batches(3, 8)]
    for batch in data:
        state, _ = wrapped(state, part(batch, UNEVEN, distributed.rank()))
    pieces = wrapped.transforms[0].shard_specs(state)
    cut_paths = [path for place, path in enumerate(lm.tree.paths(state)) if place in pieces]
    _, other = train(step_of(plain_step), lm.TrainState.create(net, lm.optim.adafactor(1e-2)), data)
    return furthest(whole_of(wrapped, state), bare(other))[0], [path for path in cut_paths if "nu" in path]


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_that_only_look_like_parts(stage, world2):
    for worst, cut_paths in world2.run(moments_of_few_rows, stage):
        assert worst < 1e-10
        assert cut_paths == ["opt_state.nu[0.bias][full]", "opt_state.nu[1.bias][full]"]


def bad_units():
    fsdp(wrap="layers.*")(step).init(make_state("mlp"))


def no_shard_axis():
    fsdp(mesh(data=-1, device="cpu"))(step).init(make_state("mlp"))


def other_params():
    def odd_step(state, batch):
        lm.value_and_grad(lambda params, batch: params["w"].sum())({"w": torch.ones(2)}, batch)

    wrapped = fsdp()(odd_step)
    wrapped(wrapped.init(make_state("mlp")), batches(1, 4)[0])


def other_states():
    fsdp()(step).init(make_state("mlp" if distributed.rank() else "deep"))


def with_func():
    def func_step(state, batch):
        lm.value_and_grad(lambda params, batch: params["0.bias"].sum(), engine="func")(state.params, batch)

    wrapped = fsdp()(func_step)
    wrapped(wrapped.init(make_state("mlp")), batches(1, 4)[0])


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        (bad_units, PatternError, "matches no module"),
        (refuse, HyperparameterError, "mine takes the mean"),
        (other_states, WorldError, "differ"),
        (no_shard_axis, WorldError, r"lm\.mesh\(shard=-1\)"),
        (other_params, ParamsError, r"lm\.fsdp\(stage=2\)"),
        (with_func, AxisError, "torch.func"),
    ],
)
def test_bad_input_is_told_on_every_process(task, error, says, world2):
    with pytest.raises(TaskError, match=says) as caught:
        world2.run(task, limit=20)
    assert [kind for _, kind, _ in caught.value.errors] == [error.__name__] * 2


def test_alone_it_is_the_identity():
    wrapped = fsdp()(step)
    whole = batches(3, 4)
    losses, state = train(wrapped, make_state("deep"), whole)
    wanted, other = train(step_of(step), make_state("deep"), whole)
    assert torch.equal(losses, wanted)
    assert furthest(bare(wrapped.export(state)), bare(other))[0] == 0.0
    assert "fsdp" not in state.slots


@pytest.mark.parametrize("options", [{"stage": 4}, {"param_dtype": "fp8"}, {"prefetch": -1}, {"stage": 1, "wrap": "0"}])
def test_options_that_are_not(options):
    with pytest.raises(HyperparameterError):
        fsdp(**options)


def test_what_cannot_stand_inside():
    with pytest.raises(OrderError, match="noise"):
        lm.compose(fsdp(), lm.dp_sgd(1.0, 1.0))(step)
