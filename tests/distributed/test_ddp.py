"""ddp: on parts of a batch it is one process on the whole, whatever the parts and whatever stands around it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.core import batching as rows
from lumen.core import distributed as world
from lumen.core import gradient, rules
from lumen.core.rules import Primitive
from lumen.core.step import Transform
from lumen.errors import AxisError, HyperparameterError, LossError, OrderError, WorldError
from lumen.parallel.comm import consistency
from lumen.parallel.comm.buckets import BucketPlanCache, Buckets, GradComm, assign_buckets
from lumen.parallel.comm.consistency import check_equal
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.ddp.ddp import ddp
from tests.distributed import models
from tests.distributed.models import (
    AROUND,
    CLASSES,
    WIDTH,
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
from tests.tiers import in_turns, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = pick(4, 20)  # the first one records the order of the buckets
EVEN, UNEVEN, EMPTY = [4, 4], [5, 3], [8, 0]
STEP = {"step": step, "plain": plain_step}


class cut(Transform):  # noqa: N801
    """One process that takes the parts of a batch one after the other, as the processes of a world do."""

    name = "cut"
    level = "accumulate"

    def __init__(self, sizes):
        self.sizes = sizes

    def wrap(self, step):
        def rule(next, call):
            parts = [part(call.batch, self.sizes, place) for place in range(len(self.sizes)) if self.sizes[place]]
            answers = [next(call.replace(batch=each, summed=True)) for each in parts]
            total = rows.add_gradients(answers)
            grads = lm.tree.map(lambda *each: sum(each), *(answer.grads for answer in answers))
            return gradient.normalized(total.replace(grads=grads))

        return rules.with_rules({Primitive.GRADIENT: rule}, step)


def law(cases, options=None, dtype=torch.float64, steps=STEPS, parts=False):
    """For each case how far ddp on parts is from one process on all rows: the losses, and the furthest leaf."""
    found = []
    for model, around, sizes, name in cases:
        around = transforms(around)
        wrapped = lm.compose(ddp(**options or {}), *around)(STEP[name])
        whole = batches(steps, sum(sizes), dtype)
        if name == "plain":
            whole = [{key: leaf for key, leaf in batch.items() if key != "mask"} for batch in whole]
        losses, state = train(wrapped, make_state(model, dtype), [part(batch, sizes, world.rank()) for batch in whole])
        check_equal(state)
        beside = lm.compose(*[cut(sizes)] * parts, *around)(STEP[name])
        wanted, other = train(beside, make_state(model, dtype), whole)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(state), bare(other))))
    return found


check_law = functools.partial(models.check_law, law)


@pytest.mark.parametrize("model", ["mlp", "gpt", "outside", "routed"])
def test_parts_on_two_processes_are_the_whole(model, world2):
    check_law(world2, [(model, *each) for each in in_turns(AROUND, (UNEVEN, EMPTY, EVEN))])


def test_parts_on_four_processes_in_many_buckets_are_the_whole(world4):
    cases = [(model, [], sizes) for model in ("gpt", "routed", "outside") for sizes in ([2, 2, 2, 2], [4, 0, 3, 1])]
    check_law(world4, cases, {"bucket_mb": 2e-4})


def test_a_plain_loss_weighs_by_its_rows(world2):
    check_law(world2, [("mlp", [], sizes, "plain") for sizes in (EVEN, UNEVEN, EMPTY)])


def test_in_float32(world2):
    cases = [
        (model, around, UNEVEN) for model in ("mlp", "gpt", "outside") for around in ([], ["donate", "clip"][::-1])
    ]
    check_law(world2, cases, None, torch.float32, tolerance=1e-6)


def test_in_bfloat16(world2):
    """The parts of a batch are rounded as the whole is, except where sums over rows are taken in bfloat16."""
    cases = [(model, ["bf16"], sizes) for model in ("mlp", "gpt", "outside") for sizes in (UNEVEN, EMPTY)]
    check_law(world2, cases, None, torch.float32, 5, tolerance=3e-2)


def contrastive(gathers):
    def contrasting(state, batch):
        def loss_fn(params, batch):
            own = F.normalize(state.apply(params, batch["x"])[0])
            other = F.normalize(batch["x"][:, :CLASSES] + own)
            rows, columns = (lm.all_gather(x, "data") if gathers else x for x in (own, other))
            labels = lm.axis_index("data") * len(own) * gathers + torch.arange(len(own))
            return F.cross_entropy(own @ columns.T / 0.1, labels) + F.cross_entropy(other @ rows.T / 0.1, labels)

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    return contrasting


def gathered_negatives():
    whole = [{"x": batch["x"]} for batch in batches(3, 8)]
    parts = [part(batch, EVEN, world.rank()) for batch in whole]
    losses, state = train(ddp()(contrastive(True)), make_state("mlp"), parts)
    wanted, other = train(lm.compose()(contrastive(False)), make_state("mlp"), whole)
    apart, _ = train(ddp()(contrastive(False)), make_state("mlp"), parts)
    uneven = part(whole[0], UNEVEN, world.rank())
    try:
        ddp()(contrastive(True))(make_state("mlp"), uneven)
    except AxisError as error:
        said = str(error)
    far = float((losses - wanted).abs().max()), furthest(bare(state), bare(other))[0]
    return *far, float((apart - wanted).abs().max()), said


def test_gathered_negatives_are_those_of_the_global_batch(world2):
    for losses, worst, without, said in world2.run(gathered_negatives):
        assert losses < 1e-10
        assert worst < 1e-10
        assert without > 0.1  # each process among its own rows, as an ungathered loss is
        assert "equally many rows of every process" in said


def scalars_of_microbatches():
    """A plain scalar beside the loss, where the first microbatches of the ranks have other shares of their rows."""
    rows = torch.arange(9, dtype=torch.float64).square().view(9, 1)

    def averaging(state, batch):
        def loss_fn(params, batch):
            return state.apply(params, batch)[0].square().mean(), {"mean": batch.mean()}

        (_, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), aux

    state = lm.TrainState.create(torch.nn.Linear(1, 1).double(), lm.optim.sgd(0.0))
    wrapped = lm.compose(ddp(), lm.accumulate(2))(averaging)
    _, metrics = wrapped(wrapped.init(state), rows.split([5, 4])[world.rank()])
    return float(metrics["mean"] - rows.mean())


def test_plain_scalars_are_averaged_by_rows_over_microbatches_and_ranks(world2):
    assert world2.run(scalars_of_microbatches) == pytest.approx([0.0, 0.0], abs=1e-12)


def test_buffers_are_merged_as_over_microbatches(world2):
    cases = [
        ("conv", around, sizes)
        for around, sizes in in_turns(([], ["guard", "clip", "ema", "donate"]), (EVEN, UNEVEN, EMPTY))
    ]
    check_law(world2, cases, None, torch.float64, STEPS, True)


def test_synchronised_batchnorm_is_that_of_the_whole_batch(world2):
    check_law(world2, [("conv", [], sizes) for sizes in (EVEN, UNEVEN, EMPTY)], {"buffers": "sync"})


def test_gradients_sent_in_bfloat16(world2):
    cases = [(model, [], sizes) for model in ("mlp", "outside") for sizes in (UNEVEN, EMPTY)]
    check_law(world2, cases, {"reduce_dtype": "bf16"}, torch.float32, 5, tolerance=2e-2)


def compiled(cases):
    found = []
    for model, around, sizes, backend, options in cases:
        dtype = torch.float32 if "reduce_dtype" in options else torch.float64
        wrapped = lm.compose(lm.compile(backend=backend), ddp(bucket_mb=2e-4, **options), *transforms(around))(step)
        data = [part(batch, sizes, world.rank()) for batch in batches(5, sum(sizes), dtype)]
        losses, state = train(wrapped, make_state(model, dtype), data)
        eager = lm.compose(ddp(bucket_mb=2e-4, **options), *transforms(around))(step)
        wanted, other = train(eager, make_state(model, dtype), data)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(state), bare(other))))
    return found


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_is_eager(backend, world2):
    """By Inductor one case, another than in test_compiled, in which the processes share their kernels."""
    cases = [
        ("mlp", ["donate"], UNEVEN, backend, {}),
        ("conv", [], UNEVEN, backend, {}),
        ("outside", ["accumulate"], EMPTY, backend, {}),
        ("mlp", [], UNEVEN, backend, {"reduce_dtype": "bf16"}),
        ("conv", [], UNEVEN if backend == "eager" else EVEN, backend, {"buffers": "sync"}),
    ]
    cases = cases if backend == "eager" else cases[-1:]
    for found in world2.run(compiled, cases):
        for case, (losses, worst, leaf) in zip(cases, found, strict=True):
            tolerance = 1e-3 if "reduce_dtype" in case[-1] else 1e-10
            assert losses < tolerance, case
            assert worst < tolerance, (case, leaf)


def reduced_by_name(backend):
    def reducing(state, batch):
        loss, grads = lm.value_and_grad(lambda p, b: state.apply(p, b["x"])[0].square().mean())(state.params, batch)
        of_this = batch["x"].max()
        metrics = {"most": lm.pmax(of_this, "data"), "sum": lm.psum(of_this, "data"), "loss": loss}
        return state.apply_gradients(grads), metrics

    batch = part(batches(1, 8)[0], UNEVEN, world.rank())
    wrapped = lm.compose(lm.compile(backend=backend), ddp())(reducing)
    _, found = wrapped(wrapped.init(make_state("mlp")), batch)
    _, wanted = ddp()(reducing)(make_state("mlp"), batch)
    return furthest(found, wanted)[0]


@pytest.mark.parametrize("backend", pick(["eager"], ["eager", "inductor"]))
def test_collectives_by_name_are_compiled(backend, world2):
    assert max(world2.run(reduced_by_name, backend)) < 1e-10


def first_loss(compress, sizes):
    data = [part(b, sizes, world.rank()) for b in batches(1, 8, torch.float32)]
    losses, _ = train(ddp(reduce_dtype=compress)(step), make_state("mlp", torch.float32), data)
    return float(losses[0])


@pytest.mark.parametrize("sizes", [UNEVEN, EMPTY])
def test_compression_leaves_the_loss_exact(sizes, world2):
    found = {loss for compress in (None, "bf16") for loss in world2.run(first_loss, compress, sizes)}
    assert len(found) == 1


def bytes_sent(compress):
    wrapped = ddp(reduce_dtype=compress)(step)
    train(
        wrapped, make_state("mlp", torch.float32), [part(b, EVEN, world.rank()) for b in batches(2, 8, torch.float32)]
    )
    return wrapped.memory.comm.bytes_sent


def test_compression_halves_the_bytes(world2):
    plain, small = (world2.run(bytes_sent, compress)[0] for compress in (None, "bf16"))
    numbers = 2 * sum(p.numel() for p in make_state("mlp").params.values())
    assert plain == 4 * (numbers + 2 * 4)  # the loss's total and weight, rows, and a mark
    assert small == pytest.approx(plain - 2 * numbers, abs=8)


def launched_while_computing():
    """What was on its way when the gradient of the first layer, the last to be computed, was ready."""
    seen = []

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            out = self.layer(x)
            if out.requires_grad:
                out.register_hook(lambda _: seen.append(wrapped.memory.comm.bytes_sent))
            return out

    torch.manual_seed(0)
    state = lm.TrainState.create(nn.Sequential(First(), *mlp_layers()), lm.optim.sgd(0.1))
    wrapped = ddp(bucket_mb=1e-4)(step)
    train(wrapped, state, [part(b, EVEN, world.rank()) for b in batches(3, 8, torch.float32)])
    return seen, wrapped.memory.comm.bytes_sent


def mlp_layers():
    return [nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)]


def test_buckets_are_launched_while_the_gradient_is_computed(world2):
    for seen, sent in world2.run(launched_while_computing):
        assert seen[0] == 0  # the first step records the order
        per_step = sent / 3
        assert seen[1] > per_step + 0.4 * per_step
        assert seen[2] > 2 * per_step + 0.4 * per_step


def launch_order():
    """Two processes whose gradients are ready in opposite orders."""
    wire = GradComm(mesh(device="cpu").group("data"))
    layouts, sums = BucketPlanCache(wire, 1), []
    for _ in range(3):
        leaves = [
            torch.zeros(3, requires_grad=True),
            torch.zeros(2, requires_grad=True),
            torch.zeros(4, requires_grad=True),
        ]
        buckets = Buckets(wire, layouts, overlap=True)
        buckets.register_hooks(leaves)
        order = [0, 1] if world.rank() else [2, 1]  # each leaves one out
        for place in order:
            (leaves[place].sum() * (place + 1)).backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        out, stats = buckets.finish(grads, [torch.ones(1)])
        sums.append([float(each.mean()) for each in out] + [float(stats)])
    return sums, layouts.get(leaves).buckets


def test_collectives_keep_one_order_whatever_is_ready_first(world2):
    for sums, buckets in world2.run(launch_order):
        assert sums == [[1.0, 4.0, 3.0, 2.0]] * 3
        assert buckets == [[2], [1], [0]]  # as rank 0's were ready


def test_a_layout_by_dtype_and_size():
    leaves = [torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(2), torch.zeros(100)]
    found = assign_buckets(leaves, [3, 2, 1, 0], 16)
    assert found.buckets == [[3], [2, 0], [1]]
    assert found.owner == [1, 2, 1, 0]


def test_the_first_bucket_of_a_dtype_is_small():
    leaves = [torch.empty(2**17, dtype=dtype) for dtype in 6 * [torch.float32, torch.float64]]
    found = assign_buckets(leaves, range(12), 3 * 2**20)
    assert found.buckets == [[0, 2], [1], [3, 5, 7], [4, 6, 8, 10], [9, 11]]


def test_alone_it_is_the_step_itself():
    losses, state = train(ddp()(step), make_state("conv"), batches(3, 8))
    wanted, other = train(lm.compose()(step), make_state("conv"), batches(3, 8))
    assert torch.equal(losses, wanted)
    assert furthest(bare(state), bare(other))[0] == 0.0


def first_state():
    torch.manual_seed(world.rank())
    state = lm.TrainState.create(models_of_all_kinds(), lm.optim.adam(0.1))
    given = bare(state)
    out = ddp()(step).init(state)
    assert lm.tree.structure(out) == lm.tree.structure(state)
    return given, bare(out), furthest(bare(state), given)[0]


def models_of_all_kinds():
    net = nn.Sequential(nn.Linear(2, 2).double(), nn.BatchNorm1d(2), nn.Linear(2, 2).bfloat16())
    net.register_buffer("flags", torch.rand(5) > 0.5)
    net.register_buffer("one", torch.rand(()))
    net.register_buffer("none", torch.rand(0, 3))
    return net


def test_all_begin_with_the_first_processs_state(world2):
    (given, first, _), (other, second, changed) = world2.run(first_state)
    assert furthest_of_any(other, given)
    assert not furthest_of_any(first, given)
    assert not furthest_of_any(second, given)
    assert changed == 0.0  # what was handed in stays as it was


def furthest_of_any(found, wanted):
    return any(not torch.equal(found[name], wanted[name]) for name in wanted)


def edited(factor):
    """A model whose source has `factor` in it."""
    source = f"class Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x) * {factor}\n"
    names = {"nn": nn, "__name__": "edited"}
    exec(source, names)
    return names["Net"](2, 3)


def begin_differently(what):
    rank = world.rank()
    state = make_state("mlp")
    if what == "shape":
        state = lm.TrainState.create(nn.Linear(2, 3 + rank), lm.optim.sgd(0.1))
    elif what == "dtype":
        state = make_state("mlp", torch.float64 if rank else torch.float32)
    elif what == "tree":
        state = make_state("outside" if rank else "mlp")
    elif what == "seed":
        state = state.replace(seed=state.seed + rank)
    elif what == "step":
        state = state.replace(step=state.step + rank)
    elif what == "model":
        state = lm.TrainState.create(edited(2.0 + rank), lm.optim.sgd(0.1))
    user = plain_step if what == "code" and rank else step
    around = [lm.clip(1.0)] if what == "transforms" and rank else []
    with pytest.MonkeyPatch.context() as patch:
        if what == "versions" and rank:
            patch.setattr(consistency, "own_version", lambda: "0.0.1")
        lm.compose(ddp(), *around)(user).init(state)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shape", r"rank 0 has params\[weight\] of shape \(3, 2\).*rank 1 has params\[weight\] of shape \(4, 2\)"),
        ("dtype", r"rank 0 has params.*float32; rank 1 has.*float64"),
        ("tree", "rank 1 has params"),
        ("seed", "rank 0 has seed = 0; rank 1 has seed = 1"),
        ("step", "rank 0 has step = 0; rank 1 has step = 1"),
        ("code", "rank 1 has the step"),
        ("model", "rank 0 has the code of Net .*; rank 1 has the code of Net"),
        ("versions", "rank 1 has lumen 0.0.1"),
        ("transforms", r"lm\.clip\(1\.0\)"),
    ],
)
def test_processes_that_begin_differently_are_told_so(what, says, world2):
    errors = refused(world2, begin_differently, what)
    assert {kind for _, kind, _ in errors} == {WorldError.__name__}
    assert len({message for _, _, message in errors}) == 1
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(errors[0][2].replace("\n", " "))


def refused(world, *task):
    with pytest.raises(TaskError) as caught:
        world.run(*task)
    assert len(caught.value.errors) == world.size
    return caught.value.errors


def come_apart():
    wrapped = ddp(check_every=2)(step)
    state = wrapped.init(make_state("mlp"))
    for number, batch in enumerate(batches(6, 8)):
        if number == 2 and world.rank() == 1:
            params = {name: p + 1e-12 * (name == "2.bias") for name, p in state.params.items()}
            state = state.replace(params=params)
        try:
            state, _ = wrapped(state, part(batch, EVEN, world.rank()))
        except WorldError as error:
            return number, str(error)
    return None


def test_params_that_come_apart_are_noticed(world2):
    found = world2.run(come_apart)
    assert [number for number, _ in found] == [3, 3]
    assert all("params have diverged: " in text and "on rank 1" in text for _, text in found)


def overflow(around):
    """A batch in which one row of the last process is not finite."""
    wrapped = lm.compose(*transforms(around[0]), ddp(), *transforms(around[1]))(step)
    state = wrapped.init(make_state("mlp", torch.float32))
    whole = batches(4, 8, torch.float32)
    whole[1]["x"][7] = float("inf")
    whole[1]["mask"][7] = True
    for batch in whole:
        state, _ = wrapped(state, part(batch, UNEVEN, world.rank()))
    check_equal(state)
    slots = state.slots
    return (
        int(slots["guard"].skipped) if "guard" in slots else None,
        float(slots["precision"].scale) if "precision" in slots else None,
        all(bool(p.isfinite().all()) for p in state.params.values()),
    )


def test_all_processes_decide_alike_about_an_update(world2):
    assert world2.run(overflow, ([], ["guard", "clip"])) == [(1, None, True)] * 2
    assert world2.run(overflow, (["guard"], [])) == [(1, None, True)] * 2
    first, second = world2.run(overflow, ([], ["fp16"]))
    assert first == second
    assert first[1:] == (first[1], True)
    assert first[1] < 2.0**16


def metrics_of_no_rows():
    values = lm.metrics.from_torchmetrics(accuracy())

    def with_metrics(state, batch):
        def loss_fn(params, batch):
            logits, _ = state.apply(params, batch["x"])
            losses = F.cross_entropy(logits, batch["y"], reduction="none")
            shown = {
                "sum": lm.Sum.of(losses.detach()),
                "max": lm.Max.of(losses.detach()),
                "min": lm.Min.of(losses.detach()),
                "mean": losses.detach().mean(),
                "rows": losses.detach(),
                "torchmetrics": values.of(logits.detach(), batch["y"]),
            }
            return lm.Mean.of(losses), lm.Aux(metrics=shown)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss, **aux.metrics}

    (whole,) = batches(1, 8)
    state = make_state("mlp")
    _, mine = ddp()(with_metrics)(state, part(whole, EMPTY, world.rank()))
    _, wanted = with_metrics(state, whole)
    mine["torchmetrics"] = values.pack(mine["torchmetrics"])
    wanted["torchmetrics"] = float(wanted["torchmetrics"].compute())
    return mine, wanted


def accuracy():
    import torchmetrics

    return torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")


def test_metrics_of_a_process_without_rows_count_nothing(world2):
    (first, wanted), (second, _) = world2.run(metrics_of_no_rows)
    values = lm.metrics.from_torchmetrics(accuracy())
    seen = [values.unpack(each["torchmetrics"]) for each in (first, second)]
    assert float(values.merge(*seen).compute()) == pytest.approx(wanted["torchmetrics"])
    for name in ("sum", "max", "min"):
        assert float(first[name].merge(second[name]).compute()) == pytest.approx(float(wanted[name].compute())), name
    assert float(first["mean"]) == float(second["mean"]) == pytest.approx(float(wanted["mean"]))
    assert [len(each["rows"]) for each in (first, second)] == [8, 0]


def unclear():
    def bad(state, batch):
        def loss_fn(params, batch):
            logits, _ = state.apply(params, batch["x"])
            return logits.square().mean(), {"what": torch.zeros(3, 3)}

        (loss, _), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    ddp()(bad)(make_state("mlp"), part(batches(1, 8)[0], EVEN, world.rank()))


def test_an_aux_that_is_not_clear_is_refused(world2):
    errors = refused(world2, unclear)
    assert {kind for _, kind, _ in errors} == {LossError.__name__}
    assert "lm.Aux(buffers=...)" in errors[0][2]


def independent(everywhere):
    def stray(state, batch):
        def loss_fn(params, batch):
            if everywhere or world.rank() == 1:
                return (batch["x"] * 2).mean()
            return state.apply(params, batch["x"])[0].square().mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.replace(params=grads), {"loss": loss}

    state, _ = ddp()(stray)(make_state("mlp"), part(batches(1, 8)[0], EVEN, world.rank()))
    check_equal(state)
    return float(state.params["2.bias"].abs().max())


def test_a_loss_that_depends_on_params_on_one_process_only(world2):
    first, second = world2.run(independent, False)
    assert first == second > 0
    errors = refused(world2, independent, True)
    assert {kind for _, kind, _ in errors} == {LossError.__name__}


def other_gradients():
    """A step that differentiates more params on one process than on the other."""

    def uneven(state, batch):
        chosen = {name: p for name, p in state.params.items() if world.rank() or name != "0.bias"}

        def loss_fn(params, batch):
            return state.apply({**state.params, **params}, batch["x"])[0].square().mean()

        loss, _ = lm.value_and_grad(loss_fn)(chosen, batch)
        return state, {"loss": loss}

    ddp()(uneven)(make_state("mlp"), part(batches(1, 8)[0], EVEN, world.rank()))


def test_different_gradients_are_told_apart(world2):
    errors = refused(world2, other_gradients)
    assert {kind for _, kind, _ in errors} == {WorldError.__name__}
    assert "the gradients of this step differ" in errors[0][2]


def by_func():
    def twice(state, batch):
        def inner(params, rows):
            return state.apply(params, rows["x"])[0].square().mean()

        def loss_fn(params, batch):
            return inner(params, batch)

        loss, grads = lm.value_and_grad(loss_fn, engine="func")(state.params, batch)
        second, more = lm.value_and_grad(inner)(state.params, batch)
        grads = lm.tree.map(lambda a, b: a + b, grads, more)
        return state.apply_gradients(grads), {"loss": loss, "second": second}

    whole = batches(4, 8)
    losses, state = train(ddp()(twice), make_state("mlp"), [part(b, UNEVEN, world.rank()) for b in whole])
    wanted, other = train(lm.compose()(twice), make_state("mlp"), whole)
    return float((losses - wanted).abs().max()), furthest(bare(state), bare(other))[0]


def test_under_torch_func_and_with_two_gradients_in_a_step(world2):
    for losses, worst in world2.run(by_func):
        assert losses < 1e-12
        assert worst < 1e-10


def test_what_cannot_stand_inside_is_refused():
    with pytest.raises(OrderError, match="noise"):
        lm.compose(ddp(), lm.dp_sgd(1.0, 1.0))(step)
    with pytest.raises(OrderError, match='buffers="merge"'):
        lm.compose(ddp(buffers="sync"), lm.accumulate(2))(step)


@pytest.mark.parametrize(
    "options",
    [{"buffers": "none"}, {"reduce_dtype": "fp8"}, {"bucket_mb": 0}, {"check_every": 0}, {"check_every": True}],
)
def test_settings_out_of_range(options):
    with pytest.raises(HyperparameterError, match=next(iter(options))):
        ddp(**options)


def test_it_is_written_as_it_was_called():
    assert repr(ddp()) == "lm.ddp()"
    assert repr(ddp(buffers="sync", check_every=10)) == "lm.ddp(buffers='sync', check_every=10)"
