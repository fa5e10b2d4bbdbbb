"""Frozen params under fsdp: each process has its shards, and trains bitwise as where each has all of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen.bridges import lora
from lumen.core import distributed
from lumen.parallel.fsdp import fsdp as fsdp_module
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed import models
from tests.distributed.fsdp_models import DeepGPT
from tests.distributed.models import WIDTH, bare, batches, part, step, transforms
from tests.distributed.pool import TaskError
from tests.tiers import in_turns, pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SIZES = [8, 6]  # of which no third is a single row, which BatchNorm refuses


class Coded(nn.Module):
    """A layer with frozen codes of 8 bits and scales of 16, beside one that may be trained, and a mask of booleans."""

    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.codes = nn.Parameter(torch.randint(-3, 3, (width, width), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(width, 1, dtype=torch.float16), requires_grad=False)
        self.keep = nn.Parameter(torch.rand(width) > 0.2, requires_grad=False)
        self.gain = nn.Parameter(torch.tensor(0.3, dtype=torch.float64), requires_grad=False)

    def forward(self, h):
        weight = self.codes.to(h.dtype) * self.scale.to(h.dtype)
        return h + self.gain.to(h.dtype) * self.keep * torch.tanh(F.linear(self.dense(h), weight))


class Stack(nn.Module):
    """Blocks of which the first and the last share a weight, and another one is read by their parent."""

    def __init__(self, width=5, depth=3):
        super().__init__()
        self.inward = nn.Linear(WIDTH, width)
        self.blocks = nn.ModuleList([Coded(width) for _ in range(depth)])
        self.blocks[-1].dense.weight = self.blocks[0].dense.weight
        self.norm = nn.BatchNorm1d(width)
        self.outward = nn.Linear(width, models.CLASSES)

    def forward(self, x):
        h = self.inward(x)
        for block in self.blocks:
            h = block(h)
        return self.outward(self.norm(h) + self.blocks[1].dense.bias)


def frozen_stack(names):
    torch.manual_seed(0)
    net = Stack()
    for name, p in net.named_parameters():
        if name in names:
            p.requires_grad_(False)
    return net


def adapted_gpt():
    torch.manual_seed(0)
    return lora.adapt(DeepGPT().double(), targets=["blocks.*.up", "blocks.*.qkv"], rank=2)


@contextlib.contextmanager
def kept_whole():
    """Frozen params are no business of fsdp here: each process has all of them."""
    plain_frozen, fsdp_module.plain_frozen = fsdp_module.plain_frozen, lambda state: {}
    try:
        yield
    finally:
        fsdp_module.plain_frozen = plain_frozen


def trained(net, around=(), options=None, steps=3, take=step, tx=None, mesh=None):
    """The exported state after some steps, the losses, and how many numbers of frozen params this process had."""
    wrapped = lm.compose(fsdp(mesh, **(options or {})), *transforms(around))(take)
    dtype = next(p.dtype for p in net.parameters() if p.requires_grad)
    state = wrapped.init(lm.TrainState.create(net, tx or lm.optim.adam(1e-2, eps=1e-4)))
    held = sum(state.buffers[name].numel() for name in state.apply_fn.frozen)
    losses = []
    for batch in batches(steps, sum(SIZES), dtype):
        state, metrics = wrapped(state, part(batch, SIZES, distributed.rank()))
        losses.append(metrics["loss"])
    assert all(type(b) is torch.Tensor for b in state.buffers.values())
    assert held == sum(state.buffers[name].numel() for name in state.apply_fn.frozen)
    losses = torch.stack([loss.compute() if isinstance(loss, lm.Mean) else loss for loss in losses])
    return {**bare(wrapped.export(state)), "losses": losses}, held


def different(make, *args, **kwargs):
    """The leaves that differ from those of a run with whole frozen params, and the numbers held in both."""
    found, held = trained(make(), *args, **kwargs)
    with kept_whole():
        wanted, total = trained(make(), *args, **kwargs)
    assert found.keys() == wanted.keys()
    return [name for name, leaf in wanted.items() if not torch.equal(leaf, found[name])], held, total


def adapters(around, options):
    return different(adapted_gpt, around, options)


AROUND = [[], ["accumulate"], ["clip", "ema", "donate"], ["guard"], ["remat"], ["bf16"], ["accumulate", "remat"]]
OPTIONS = [{}, {"prefetch": 0}, {"wrap": "blocks.1"}, {"offload": True}, {"wrap": ["blocks.*.up", "embed"]}]


@pytest.mark.parametrize(("around", "options"), in_turns(AROUND, OPTIONS))
def test_adapters_are_trained_to_the_same_bits(around, options, world2):
    found = world2.run(adapters, around, options)
    for names, _, _ in found:
        assert not names
    total = found[0][2]
    assert all(held < 0.6 * total for _, held, _ in found)
    assert sum(held for _, held, _ in found) < 1.02 * total  # tensors without dims are on both


def adapters_by(stage):
    _, held = trained(adapted_gpt(), options={"stage": stage})
    return held


@pytest.mark.parametrize("stage", [1, 2])
def test_lower_stages_keep_frozen_params_whole(stage, world2):
    total = sum(p.numel() for p in adapted_gpt().parameters() if not p.requires_grad)
    assert world2.run(adapters_by, stage) == [total, total]


def of_names(names, around, options):
    return different(lambda: frozen_stack(names), around, options)


TRAINABLE = [name for name, p in Stack().named_parameters() if p.requires_grad]


@settings(max_examples=pick(8, 150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(st.sampled_from(TRAINABLE), max_size=len(TRAINABLE) - 1),
    around=st.sampled_from([[], ["accumulate"], ["remat"], ["guard"]]),
    options=st.sampled_from(OPTIONS[:4]),
)
@example(names={name for name in TRAINABLE if name.startswith("blocks.")}, around=[], options={})
@example(names={name for name in TRAINABLE if not name.startswith("blocks.2.dense.bias")}, around=[], options={})
@example(names=set(TRAINABLE) - {"outward.bias"}, around=["remat"], options={})
def test_any_params_may_be_frozen(names, around, options, world2):
    for found, held, total in world2.run(of_names, names, around, options):
        assert not found
        assert held < total


def narrow():
    """Sent in half the bytes are those that are trained."""
    return different(lambda: adapted_gpt().float(), (), {"param_dtype": "bf16"})


def test_frozen_params_are_sent_as_they_are(world2):
    assert [names for names, _, _ in world2.run(narrow)] == [[], []]


def hybrid():
    mesh = lm.mesh(data=2, shard=2, device="cpu")
    global SIZES
    before, SIZES = SIZES, [5, 3, 0, 6]
    try:
        return different(adapted_gpt, mesh=mesh)
    finally:
        SIZES = before


def test_replicated_shards(world4):
    assert [names for names, _, _ in world4.run(hybrid)] == [[]] * 4


# ------------------------------------------------------------------------------------------ read and written by a step


def reading_step(state, batch):
    """A loss that reads a frozen head itself, and a step that reads and scales one."""
    head = state.buffers["head.weight"]

    def loss_fn(params, batch):
        out, buffers = state.apply(params, batch["x"])
        hidden = F.linear(out, head[:3, :3]) + head.sum()
        return lm.Mean.of(F.cross_entropy(hidden, batch["y"], reduction="none")), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    norm = head.norm()
    buffers = {**aux.buffers, "head.weight": aux.buffers["head.weight"] * 0.5}
    return state.apply_gradients(grads, buffers=buffers), {"loss": loss, "norm": lm.Last(norm)}


class Headed(nn.Module):
    """Two blocks, and a head that only a loss function uses."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.last = nn.Linear(WIDTH, models.CLASSES)
        self.head = nn.Linear(WIDTH, 7, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.blocks[1](torch.tanh(self.blocks[0](x)))))


def headed():
    torch.manual_seed(0)
    net = Headed().double()
    net.blocks[0].requires_grad_(False)
    return net


def read(around):
    return different(headed, around, take=reading_step)


@pytest.mark.parametrize("around", [[], ["accumulate"], ["guard"]])
def test_a_step_reads_full_frozen_params_and_may_replace_them(around, world2):
    assert [names for names, _, _ in world2.run(read, around)] == [[], []]


def resized():
    wrapped = fsdp()(lambda state, batch: (state.replace(buffers={k: b[:2] for k, b in state.buffers.items()}), {}))
    wrapped(wrapped.init(lm.TrainState.create(headed(), lm.optim.sgd(0.1))), torch.ones(2, 1))


def test_a_frozen_param_keeps_its_shape(world2):
    with pytest.raises(TaskError, match=r"returned the frozen param 'blocks.0.weight' in the shape \(2, 6\)"):
        world2.run(resized)


def passed_on_step(state, batch):
    """The old buffers are returned in the aux, and the model is applied outside of a gradient, with its own output."""

    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["x"])
        return F.cross_entropy(out, batch["y"]), lm.Aux(buffers=state.buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    _, buffers = state.apply(state.params, batch["x"])
    out, _ = state.apply_fn(state.params, buffers, batch["x"])
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, "out": lm.Mean.of(out)}


def passed_on(around):
    return different(headed, around, take=passed_on_step)


@pytest.mark.parametrize("around", [[], ["accumulate"]])
def test_buffers_that_are_passed_on(around, world2):
    assert [names for names, _, _ in world2.run(passed_on, around)] == [[], []]


def penalty_step(state, batch):
    """A loss with a derivative of its own, in its inputs, through frozen units and others."""

    def loss_fn(params, batch):
        x = batch["x"].clone().requires_grad_()
        out, _ = state.apply(params, x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return lm.Mean.of(F.cross_entropy(out, batch["y"], reduction="none") + slope.square().sum(1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def penalty():
    return different(headed, take=penalty_step)


def test_derivatives_in_inputs_go_through_frozen_params(world2):
    assert [names for names, _, _ in world2.run(penalty)] == [[], []]


def functional_step(state, batch):
    """The same by torch.func, in which params are constants."""

    def loss_fn(params, batch):
        def total(x):
            return state.apply(params, x)[0].sum()

        slope = torch.func.grad(total)(batch["x"])
        return lm.Mean.of(slope.square().sum(1) + state.apply(params, batch["x"])[0].sum(1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def functional():
    return different(headed, take=functional_step)


def test_transforms_of_torch_func_see_full_frozen_params(world2):
    assert [names for names, _, _ in world2.run(functional)] == [[], []]


def compiled():
    found, held = {}, {}
    for sharded in (True, False):
        with contextlib.nullcontext() if sharded else kept_whole():
            wrapped = lm.compose(lm.compile(backend="eager"), fsdp())(step)
            state = wrapped.init(lm.TrainState.create(adapted_gpt(), lm.optim.adam(1e-2, eps=1e-4)))
            held[sharded] = sum(state.buffers[name].numel() for name in state.apply_fn.frozen)
            for batch in batches(2, sum(SIZES)):
                state, _ = wrapped(state, part(batch, SIZES, distributed.rank()))
            found[sharded] = bare(wrapped.export(state))
    return [name for name, leaf in found[False].items() if not torch.equal(leaf, found[True][name])], held


def test_a_traced_step(world2):
    for names, held in world2.run(compiled):
        assert not names
        assert held[True] < 0.6 * held[False]


# ---------------------------------------------------------------------------------------------- memory and messages


def calls():
    """What is sent in a step of a model with two frozen blocks before one that is trained, and nothing in the root."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)], nn.Linear(WIDTH, 3))
    net[:2].requires_grad_(False)
    counts = {}
    for name in ("all_gather", "reduce_scatter"):
        counts[name] = []
    from lumen.parallel.fsdp import unit_plan

    plan = unit_plan.UnitPlan
    originals = plan.all_gather, plan.reduce_scatter
    plan.all_gather = lambda self, *args: counts["all_gather"].append(len(args[0])) or originals[0](self, *args)
    plan.reduce_scatter = lambda self, *args: counts["reduce_scatter"].append(len(args[0])) or originals[1](self, *args)
    try:
        trained(net.double(), steps=1, options={"wrap": ["0", "1", "2", "3"]})
    finally:
        plan.all_gather, plan.reduce_scatter = originals
    return counts


def test_frozen_blocks_before_the_first_trained_one_are_gathered_once_and_never_reduced(world2):
    for counts in world2.run(calls):
        # Four blocks forward, and the two that are trained backward.
        assert counts == {"all_gather": [2] * 6, "reduce_scatter": [2, 2]}


# ------------------------------------------------------------------------------------------------------- checkpoints


def data():
    whole = batches(6, 8, torch.float32)
    return lm.Loader({key: torch.cat([batch[key] for batch in whole]) for key in whole[0]}, batch_size=8, shuffle=False)


def run_on(directory, steps, frozen, size):
    """A run of adapters, gone on with from where it was left."""
    strategy = fsdp(lm.mesh(shard=size, device="cpu")) if size > 1 else lm.ddp(lm.mesh(data=1, device="cpu"))
    runner = lm.Runner(
        step,
        transforms=[strategy, lm.donate()],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=2), frozen=frozen),
        progress=False,
    )
    state = lm.TrainState.create(adapted_gpt().float(), lm.optim.adam(1e-2, eps=1e-4))
    result = runner.fit(state, data(), until=lm.Steps(steps), resume="auto")
    return bare(result.export())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_stops_and_resumes_on_other_numbers_of_processes(frozen, worlds, tmp_path):
    for steps, size in ((2, 2), (4, 1), (6, 2)):
        found = worlds(size).run(run_on, tmp_path / "parts", steps, frozen, size)[0]
    wanted = worlds(2).run(run_on, tmp_path / "whole", 6, frozen, 2)[0]
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-5, atol=1e-6, msg=name)
    for name in adapted_gpt().float().state_dict().keys() & found.keys():
        if "lora" not in name:
            assert torch.equal(found[f"buffers[{name}]"], wanted[f"buffers[{name}]"])


def other_base(directory):
    """The same run on another base."""
    strategy = fsdp(lm.mesh(shard=2, device="cpu"))
    runner = lm.Runner(step, transforms=[strategy], checkpoint=lm.Checkpointer(directory, frozen=False), progress=False)
    net = adapted_gpt().float()
    with torch.no_grad():
        net.mix.weight.add_(1.0)
    runner.fit(lm.TrainState.create(net, lm.optim.adam(1e-2)), data(), until=lm.Steps(4), resume="auto")


def test_a_run_without_its_frozen_params_resumes_on_the_same_ones_alone(worlds, tmp_path):
    worlds(2).run(run_on, tmp_path, 2, False, 2)
    with pytest.raises(TaskError, match="saved without its frozen params, and those of this run are different"):
        worlds(2).run(other_base, tmp_path)


# ------------------------------------------------------------------------------------------------------ other states


def on_meta():
    """Values of a model that begins on the meta device, and the same model made whole."""

    def make():
        net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
        net[:3].requires_grad_(False)
        return net

    with torch.device("meta"):
        net = make()
    wrapped = fsdp()(step)
    state = wrapped.init(lm.TrainState.create(net, lm.optim.adam(1e-2), seed=3))
    torch.manual_seed(3)
    wanted = bare(lm.TrainState.create(make(), lm.optim.adam(1e-2), seed=3))
    found = bare(wrapped.export(state))
    held = sum(b.numel() for b in state.buffers.values())
    return [name for name, leaf in wanted.items() if not torch.equal(leaf, found[name])], held


def test_a_model_that_begins_on_the_meta_device(world2):
    assert world2.run(on_meta) == [([], WIDTH * (WIDTH + 1))] * 2


class Subclass(torch.Tensor):
    """A tensor that may be quantized, say."""


def of_a_subclass():
    net = headed()
    net.head.weight = nn.Parameter(net.head.weight.detach().as_subclass(Subclass), requires_grad=False)
    fsdp()(step).init(lm.TrainState.create(net, lm.optim.sgd(0.1)))


def test_other_kinds_of_tensors_are_refused_by_name(world2):
    with pytest.raises(TaskError, match=r"frozen param 'head.weight' is a Subclass.*lm.quantize"):
        world2.run(of_a_subclass)


@lm.dataclass
class Players:
    """Two models, trained in turns; one of them has frozen params."""

    first: lm.TrainState
    second: lm.TrainState


def played():
    def play(state, batch):
        first, one = step(state.first, batch)
        second, _ = step(state.second, batch)
        return state.replace(first=first, second=second), one

    found = []
    for sharded in (True, False):
        with contextlib.nullcontext() if sharded else kept_whole():
            wrapped = fsdp()(play)
            torch.manual_seed(0)
            other = models.mlp().double()
            players = [lm.TrainState.create(net, lm.optim.adam(1e-2)) for net in (adapted_gpt(), other)]
            state = wrapped.init(Players(*players))
            held = sum(b.numel() for b in state.first.buffers.values())
            for batch in batches(2, sum(SIZES)):
                state, _ = wrapped(state, part(batch, SIZES, distributed.rank()))
            found.append((bare(wrapped.export(state)), held))
    (one, held), (other, total) = found
    return [name for name, leaf in other.items() if not torch.equal(leaf, one[name])], held < 0.6 * total


def test_states_inside_a_state(world2):
    assert world2.run(played) == [([], True)] * 2


def evaluated_on_shards():
    wrapped = fsdp()
    run = wrapped(step)
    state = run.init(lm.TrainState.create(adapted_gpt(), lm.optim.adam(1e-2)))

    def look(state, batch):
        return {"out": lm.Mean.of(state.apply(state.params, batch["x"])[0])}

    rows = lm.data.per_rank([part(batch, SIZES, distributed.rank()) for batch in batches(2, sum(SIZES))])
    found = lm.evaluate(look, state, rows, (wrapped,))
    with kept_whole():
        wanted = lm.evaluate(look, lm.TrainState.create(adapted_gpt(), lm.optim.adam(1e-2)), rows)
    return found == wanted


def test_validation(world2):
    assert world2.run(evaluated_on_shards) == [True, True]
