"""lm.pipeline: stages on several processes are one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.pipeline.stages import split_points_of, stage_of_params
from tests.distributed.models import CLASSES, WIDTH, assert_within, bare, batches, furthest, make_state, step, train
from tests.distributed.pipeline_models import law, stack
from tests.tiers import LONG, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

GPIPE = {"microbatches": 2, "schedule": "gpipe"}
ONE_F_ONE_B = {"microbatches": 4, "schedule": "1f1b"}
BF16 = {"param_dtype": "bf16"}
INTERLEAVED = {"microbatches": 4, "stages": 4, "schedule": "interleaved"}


def check(world, cases, *args, tolerance=1e-12):
    assert_within(tolerance, cases, world.run(law, cases, *args))


@pytest.mark.parametrize("cut", [GPIPE, ONE_F_ONE_B, INTERLEAVED], ids=lambda cut: cut["schedule"])
def test_two_processes_compute_as_one(cut, world2):
    check(
        world2,
        [
            ("pipeline_stack", [], [8], cut),
            *([] if "stages" in cut else [("scaled", ["clip"], [8], cut)]),
            ("pipeline_blocks", ["guard", "clip", "ema", "donate"], [8], cut),
            ("pipeline_blocks", ["accumulate"], [24], cut),
        ],
    )


def test_names_cut_a_model_anywhere(world2):
    check(
        world2,
        [
            ("pipeline_blocks", ["clip"], [8], {**GPIPE, "stages": ["blocks.3"]}),
            ("pipeline_blocks", [], [8], {**ONE_F_ONE_B, "stages": ["norm"]}),
            ("pipeline_blocks", [], [4], {**INTERLEAVED, "stages": ["blocks.0", "blocks.1", "head"]}),
            ("mlp", [], [6], {**GPIPE, "stages": ["1"]} | {"stages": ["2"]}),
        ],
    )


def test_rows_are_divided_over_the_other_axis(world4):
    axes = {"data": 2, "pipeline": 2}
    check(
        world4,
        [
            ("pipeline_blocks", ["clip", "ema", "donate"], [8, 4], GPIPE),
            ("pipeline_blocks", ["accumulate"], [12, 12], ONE_F_ONE_B),
            ("pipeline_stack", [], [4, 0], GPIPE),
        ],
        axes,
        2,
        "ddp",
    )


@pytest.mark.parametrize("stage", pick([3], [1, 2, 3]))
def test_stages_are_sharded_over_the_other_axis(stage, world4):
    cases = [
        ("pipeline_blocks", ["guard", "clip", "ema", "donate"], [8, 4], GPIPE),
        ("pipeline_stack", [], [4, 0], INTERLEAVED),
        ("pipeline_blocks", ["accumulate"], [12, 12], ONE_F_ONE_B),
        ("scaled", ["clip"], [4, 4], GPIPE),
    ]
    check(world4, pick(cases[:2], cases), {"shard": 2, "pipeline": 2}, 2, f"fsdp{stage}")


# ------------------------------------------------------------------------------------------- random models


def random_stacks(seeds):
    """How far each random model of random widths, cut at random, is from one process."""
    grid = mesh(pipeline=-1, device="cpu")
    found = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)

        def number(low, high, draw=draw):
            return int(torch.randint(low, high + 1, (), generator=draw))

        net = stack(*(number(1, 5) for _ in range(number(1, 4)))).double()
        schedule, linears = (
            ("gpipe", "1f1b", "interleaved")[number(0, 2)],
            [n for n, m in net.named_children() if len([*m.parameters()])],
        )
        count = 4 if schedule == "interleaved" and len(linears) >= 4 else 2
        schedule = schedule if count == 4 else ("gpipe", "1f1b")[seed % 2]
        chosen = torch.randperm(len(linears) - 1, generator=draw)[: count - 1].add(1).sort().values
        microbatches = number(1, 2) * count
        cut = lm.pipeline(grid, microbatches=microbatches, stages=[linears[int(i)] for i in chosen], schedule=schedule)
        batch = batches(1, microbatches * number(1, 3))[0]
        state = lm.TrainState.create(net, lm.optim.sgd(0.1))
        wrapped = cut(step)
        new, metrics = wrapped(wrapped.init(state), batch)
        wanted, numbers = step(state, batch)
        losses = [float(m[name].compute() - numbers[name].compute()) for m in [metrics] for name in ("loss", "hits")]
        found.append((max(map(abs, losses)), *furthest(bare(cut.export(new)), bare(wanted))))
    return found


def test_random_stacks_cut_at_random(world2):
    seeds = [*range(6)]
    assert_within(1e-12, seeds, world2.run(random_stacks, seeds))


@settings(max_examples=30)
@given(widths=st.lists(st.integers(1, 4), min_size=1, max_size=8), stages=st.integers(1, 9))
def test_each_param_lives_on_one_stage_and_stages_are_even(widths, stages):
    net = stack(*widths)
    blocks = len(widths) + 1
    if stages > blocks:
        with pytest.raises(lm.LumenError, match="too few"):
            split_points_of(net, stages, 1)
        return
    owners = stage_of_params(net, split_points_of(net, stages, 1))
    assert owners.keys() == dict(net.named_parameters()).keys()
    counts = [len({name.split(".")[0] for name, owner in owners.items() if owner == s}) for s in range(stages)]
    assert sum(counts) == blocks
    assert max(counts) - min(counts) <= 1
    assert [*owners.values()] == sorted(owners.values())


# ------------------------------------------------------------------------------------------------ the state


def at_rest(cut):
    """Bytes here and in all of params, optimizer and averages; whether the state comes back bitwise."""
    wrapped = lm.compose(lm.ema(0.9), lm.pipeline(mesh(pipeline=-1, device="cpu"), **cut))(step)
    _, plain = train(lm.ema(0.9)(step), make_state("pipeline_blocks"), batches(1, 8))
    held = wrapped.transforms[1].init(plain)
    seen = []

    def watch(next, call):
        seen.append(lm.tree.nbytes(call.grads))
        return next(call)

    with lm.extend.rule_context({lm.extend.Primitive.UPDATE: watch}):
        wrapped(held, batches(1, 8)[0])
    back = bare(wrapped.transforms[1].export(held))
    same = [name for name, leaf in bare(plain).items() if not torch.equal(leaf, back[name])]
    pairs = [
        (held.params, plain.params),
        (held.opt_state.mu, plain.opt_state.mu),
        (held.slots["ema"].params, plain.params),
    ]
    return same, [lm.tree.nbytes(a) / lm.tree.nbytes(b) for a, b in pairs], seen[0] / lm.tree.nbytes(plain.params)


@pytest.mark.parametrize("cut", [ONE_F_ONE_B, INTERLEAVED], ids=["1f1b", "interleaved"])
def test_params_gradients_and_optimizer_state_are_on_one_process_and_come_back_bitwise(cut, world2):
    (moved, first, grads), (other_moved, second, other_grads) = world2.run(at_rest, cut)
    assert not moved
    assert not other_moved
    for a, b in zip((*first, grads), (*second, other_grads), strict=True):
        assert a + b == pytest.approx(1)
        assert max(a, b) < 0.75


def save_in_stages(path, one, model):
    cut = lm.pipeline(mesh(pipeline=-1, device="cpu"), **ONE_F_ONE_B)
    wrapped = lm.compose(lm.ema(0.9), cut)(step)
    _, state = train(wrapped, make_state(model), batches(2, 8))
    lm.checkpoint.save(path, state, step=wrapped)
    again = lm.checkpoint.restore(path, wrapped.init(make_state(model)), step=wrapped)
    moved = [name for name, leaf in bare(state).items() if not torch.equal(leaf, bare(again)[name])]
    of_one = lm.checkpoint.restore(one, wrapped.init(make_state(model)), step=wrapped)
    return moved, bare(wrapped.export(state)), bare(wrapped.export(of_one))


@pytest.mark.parametrize("model", ["pipeline_blocks", "scaled"])
def test_a_checkpoint_is_restored_in_stages_and_by_one_process(model, world2, tmp_path):
    path, of_one = str(tmp_path / "saved"), str(tmp_path / "one")
    one = lm.ema(0.9)(step)
    _, state = train(one, make_state(model), batches(1, 8))
    lm.checkpoint.save(of_one, state, step=one)
    answers = world2.run(save_in_stages, path, of_one, model)
    restored = bare(one.export(lm.checkpoint.restore(path, one.init(make_state(model)), step=one)))
    for moved, full, found in answers:
        assert not moved
        assert all(torch.equal(leaf, restored[name]) for name, leaf in full.items())
        assert all(torch.equal(leaf, found[name]) for name, leaf in bare(one.export(state)).items())


def save_sharded_stages(path, one):
    """Stages whose params are sharded over rows: bytes at rest, and what comes back from checkpoints."""
    grid = mesh(shard=2, pipeline=2, device="cpu")
    wrapped = lm.compose(lm.ema(0.9), lm.fsdp(grid), lm.pipeline(grid, **ONE_F_ONE_B))(step)
    _, state = train(wrapped, make_state("pipeline_blocks"), batches(2, 8))
    lm.checkpoint.save(path, state, step=wrapped)
    again = lm.checkpoint.restore(path, wrapped.init(make_state("pipeline_blocks")), step=wrapped)
    moved = [name for name, leaf in bare(state).items() if not torch.equal(leaf, bare(again)[name])]
    of_one = lm.checkpoint.restore(one, wrapped.init(make_state("pipeline_blocks")), step=wrapped)
    rest = [lm.tree.nbytes(held) for held in (state.params, state.opt_state.mu, state.slots["ema"].params)]
    _, shown = wrapped_evaluation(grid)(state.eval(), batches(1, 8)[0])
    return moved, bare(wrapped.export(state)), bare(wrapped.export(of_one)), rest, shown["out"]


def wrapped_evaluation(grid):
    return lm.compose(lm.ema(0.9), lm.fsdp(grid), lm.pipeline(grid, **ONE_F_ONE_B))(_evaluate)


@pytest.mark.skipif(not LONG, reason="four processes: make test-all")
def test_sharded_stages_rest_on_their_processes_and_come_back_from_a_checkpoint(world4, tmp_path):
    path, of_one = str(tmp_path / "saved"), str(tmp_path / "one")
    one = lm.ema(0.9)(step)
    _, state = train(one, make_state("pipeline_blocks"), batches(1, 8))
    lm.checkpoint.save(of_one, state, step=one)
    answers = world4.run(save_sharded_stages, path, of_one)
    saved = lm.checkpoint.restore(path, one.init(make_state("pipeline_blocks")), step=one)
    restored, kept = bare(one.export(saved)), bare(one.export(state))
    for moved, full, found, rest, out in answers:
        assert not moved
        assert all(torch.equal(leaf, restored[name]) for name, leaf in full.items())
        assert all(torch.equal(leaf, found[name]) for name, leaf in kept.items())
        assert max(rest) < 0.4 * lm.tree.nbytes(state.params)
        assert torch.equal(out, _evaluate(saved.eval(), batches(1, 8)[0])[1]["out"])
    assert sum(rest[0] for _, _, _, rest, _ in answers) == lm.tree.nbytes(state.params)


def sharded_features():
    """Frozen params, whose stage keeps them full, and params that are sent in bfloat16: how far from one process."""
    grid, found = mesh(shard=2, pipeline=2, device="cpu"), []
    for frozen, dtype, options in ((["0.weight", "4.bias"], torch.float64, {}), ([], torch.float32, BF16)):
        net = stack(8, 5, 7).to(dtype)
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
        state = lm.TrainState.create(net, lm.optim.sgd(0.1))
        batch = batches(1, 8, dtype)[0]
        around, cut = lm.fsdp(grid, **options), lm.pipeline(grid, **GPIPE)
        wrapped = around(cut(step))
        held, metrics = wrapped(
            wrapped.init(state), {name: x[4 * grid.index("shard") :][:4] for name, x in batch.items()}
        )
        rounded = {name: p.bfloat16().to(dtype) if options else p for name, p in state.params.items()}
        start = state.replace(params=rounded)
        new, numbers = step(start, batch)
        moved = {name: p - rounded[name] + state.params[name] for name, p in new.params.items()}
        loss = float((metrics["loss"].compute() - numbers["loss"].compute()).abs())
        full = cut.export(around.export(held))
        found.append((loss, *furthest(full.params, moved)))
    return found


@pytest.mark.skipif(not LONG, reason="four processes: make test-all")
def test_sharded_stages_with_frozen_params_and_params_in_bfloat16(world4):
    assert_within(1e-6, ["frozen", "bf16"], world4.run(sharded_features))


# -------------------------------------------------------------------------------------- with other features


def in_turn(cut):
    """The output and its metrics outside of a gradient, here and in one process."""
    wrapped = lm.pipeline(mesh(pipeline=-1, device="cpu"), **cut)(_evaluate)
    state, batch = make_state("pipeline_blocks").eval(), batches(1, 7)[0]
    with torch.no_grad():
        _, found = wrapped(wrapped.init(state), batch)
        _, wanted = _evaluate(state, batch)
    return [torch.equal(found[name], wanted[name]) for name in wanted]


def _evaluate(state, batch):
    out, buffers = state.apply(state.params, batch["x"])
    return state, {"out": out, "mask": buffers["mask"], "loss": F.cross_entropy(out, batch["y"])}


@pytest.mark.parametrize("cut", [ONE_F_ONE_B, INTERLEAVED], ids=["1f1b", "interleaved"])
def test_outside_of_a_gradient_all_processes_get_the_output(cut, world2):
    assert world2.run(in_turn, cut) == [[True] * 3] * 2


class Dropping(nn.Sequential):
    """Two blocks with dropout."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.Dropout(0.5)),
            nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)),
            nn.Linear(64, CLASSES),
        )


def _noisy(state, batch):
    """Noise by key and row goes into the model and into the loss; one microbatch has its own rows of it."""

    def loss_fn(params, batch):
        keys = lm.random.fold_in(state.key, 1)
        noise = lm.random.normal(keys, (1, WIDTH)).double() * batch["x"]
        out, _ = state.apply(params, batch["x"] + noise)
        return (out - noise[:, :CLASSES]).square().mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def features():
    """How far the step with some features is from one process with the same."""
    grid, found = mesh(pipeline=-1, device="cpu"), {}

    def compare(name, made, around=(), inside=(), model="pipeline_blocks", cut=GPIPE, rows=8, dtype=torch.float64):
        data = batches(2, rows, dtype)
        pipe = lm.pipeline(grid, **cut)
        losses, state = train(lm.compose(*around, pipe, *inside)(made), make_state(model, dtype), data)
        # In microbatches, too, as bfloat16 rounds their gradients.
        one = lm.compose(*around, lm.accumulate(cut["microbatches"]), *inside)(made)
        wanted, other = train(one, make_state(model, dtype), data)
        found[name] = float((losses - wanted).abs().max()), *furthest(bare(pipe.export(state)), bare(other))

    compare("noise by key", _noisy)
    compare("remat", step, inside=[lm.remat()])
    compare("bf16", step, inside=[lm.precision("bf16")], dtype=torch.float32)
    compare("bf16 interleaved", step, inside=[lm.precision("bf16"), lm.remat()], dtype=torch.float32, cut=INTERLEAVED)
    compare("bf16 params", step, dtype=torch.bfloat16, model="pipeline_stack")
    compare("seeded", step, around=[lm.seeded()])
    compare("sam", step, around=[lm.sam(0.05)], model="scaled")
    return found


def test_it_works_with_the_rest_of_the_house(world2):
    for found in world2.run(features):
        for name, (losses, worst, leaf) in found.items():
            tolerance = 1e-5 if "bf16" in name else 1e-12
            assert losses < tolerance, name
            assert worst < tolerance, (name, leaf)


def frozen_and_sizes():
    """Frozen params are on one stage, and batches of other sizes and a step twice on one state are taken."""
    grid, found = mesh(pipeline=-1, device="cpu"), []
    net = stack(8, 5, 7).double()
    net[0].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    state = lm.TrainState.create(net, lm.optim.adam(1e-2, eps=1e-4))
    pipe = lm.pipeline(grid, **GPIPE)
    wrapped = pipe(step)
    held = wrapped.init(state)
    sizes = {name: b.numel() for name, b in held.buffers.items()}
    wanted = state
    for rows in (8, 4, 8):
        batch = batches(1, rows)[0]
        held, metrics = wrapped(held, batch)
        wanted, numbers = step(wanted, batch)
        found.append(float((metrics["loss"].compute() - numbers["loss"].compute()).abs()))
    return sizes, max(found), furthest(bare(pipe.export(held)), bare(wanted))


def test_frozen_params_are_on_one_stage_and_batches_may_change_size(world2):
    (first, *differences), (second, *others) = world2.run(frozen_and_sizes)
    assert first == {"0.weight": 48, "4.bias": 0}
    assert second == {"0.weight": 0, "4.bias": 7}
    for losses, (worst, leaf) in (differences, others):
        assert losses < 1e-12
        assert worst < 1e-12, leaf


def draws():
    """Two losses of a step with dropout, on this process, and one without."""
    torch.manual_seed(mesh(pipeline=-1, device="cpu").index("pipeline"))
    wrapped = lm.pipeline(mesh(pipeline=-1, device="cpu"), **GPIPE)(step)
    state = wrapped.init(lm.TrainState.create(Dropping().double(), lm.optim.sgd(0.0)))
    losses = [wrapped(state, batches(1, 8)[0])[1]["loss"].compute() for _ in range(2)]
    still = wrapped(state.eval(), batches(1, 8)[0])[1]["loss"].compute()
    return [float(loss) for loss in (*losses, still)]


def test_dropout_draws_on_its_own_stage(world2):
    first, second = world2.run(draws)
    assert first == second
    assert len(set(first)) == 3
