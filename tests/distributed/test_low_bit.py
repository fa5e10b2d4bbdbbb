"""Low-bit states and stochastic rounding on shards: bit for bit those of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lumen as lm
from lumen import optim
from lumen.core import distributed
from lumen.errors import HyperparameterError
from lumen.optim._quantized import Quantized
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.parallel.optimizer_check import check_optimizer
from lumen.parallel.tensor.styles import Colwise
from tests.distributed.models import part

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WIDTH = 48
ROWS = 8
RULES = {
    "int8": (torch.float32, lambda: optim.adamw(1e-2, state_dtype="int8")),
    "bf16": (torch.float32, lambda: optim.adamw(1e-2, state_dtype="bf16")),
    "both": (torch.bfloat16, lambda: optim.adamw(1e-2, state_dtype="int8", stochastic_rounding=True)),
    "lion": (torch.bfloat16, lambda: optim.lion(1e-2, state_dtype="int8", stochastic_rounding=True)),
    "groups": (
        torch.bfloat16,
        lambda: optim.partition(
            {"wide": optim.sgd(0.1, 0.9, state_dtype="int8", stochastic_rounding=True)},
            optim.adamw(1e-2, state_dtype="int8", stochastic_rounding=True),
        ),
    ),
}


class Sums(nn.Module):
    """Params with an odd number of rows, with one row, and with no dims; gradients are sums of small integers."""

    def __init__(self):
        super().__init__()
        self.tall = nn.Linear(WIDTH, 129)
        self.wide = nn.Parameter(torch.linspace(-1, 1, 100 * WIDTH).reshape(1, -1).clone())
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        weights = torch.arange(129, device=x.device).remainder(5).sub(2).to(x.dtype)
        by_row = (self.wide.reshape(100, WIDTH) * x.unsqueeze(1)).sum((1, 2))
        return (self.tall(x) * weights).sum(1) + by_row + self.gain * x[:, 0]


def make_state(rule):
    torch.manual_seed(0)
    dtype, make = RULES[rule]
    return lm.TrainState.create(Sums().to(dtype), make())


def batches(rule, count):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randint(-2, 3, (ROWS, WIDTH), generator=generator).to(RULES[rule][0])} for _ in range(count)]


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, batch["x"])[0].float().mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def trained(stepper, state, data):
    for batch in data:
        state, _ = stepper(state, batch)
    return state


def shares(data):
    return [part(batch, [ROWS // 2] * 2, distributed.rank()) for batch in data]


def differing(found, wanted):
    """The leaves of two states that differ in any bit."""
    pairs = zip(lm.tree.paths(wanted), lm.tree.leaves(found), lm.tree.leaves(wanted), strict=True)
    return [path for path, a, b in pairs if isinstance(a, torch.Tensor) and not torch.equal(a, b)]


def sharded(rule, options, others=()):
    data = batches(rule, 3)
    wrapped = lm.compose(*others, fsdp(**options))(step)
    state = trained(wrapped, wrapped.init(make_state(rule)), shares(data))
    leaves = lm.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, Quantized))
    shapes = {(*x.codes.shape, *x.scales.shape) for x in leaves if isinstance(x, Quantized)}
    wanted = trained(step, make_state(rule), data)
    return differing(wrapped.export(state), wanted), shapes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3, "offload": True}], ids=str)
def test_shards_have_the_bits_of_one_process(rule, options, world2):
    found = world2.run(sharded, rule, options)
    assert [leaves for leaves, _ in found] == [[], []]
    if rule != "bf16":  # each rank keeps its own codes and scales, and none of a leaf with one row
        assert found[0][1] == {(65, 48, 65, 1), (1, 4800, 1, 19)}
        assert found[1][1] == {(64, 48, 64, 1), (0, 4800, 0, 19)}


def donated(rule):
    return sharded(rule, {"stage": 3}, [lm.donate()])[0], sharded(rule, {"stage": 3}, [lm.compile(backend="eager")])[0]


def test_donated_and_compiled_shards(world2):
    for by_donate, by_compile in world2.run(donated, "both"):
        assert by_donate == []
        assert by_compile == []


def from_meta(rule):
    """A model that is created on the meta device, whose optimizer state is made of shards."""
    data = batches(rule, 2)
    torch.manual_seed(0)
    dtype, make = RULES[rule]

    def fill(module):
        for name, p in module.named_parameters(recurse=False):
            p.data.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) if name != "gain" else torch.tensor(1.0))

    with torch.device("meta"):
        meta = lm.TrainState.create(Sums().to(dtype), make())
    wrapped = fsdp(param_init_fn=fill)(step)
    state = trained(wrapped, wrapped.init(meta), shares(data))
    net = Sums().to(dtype)
    net.apply(fill)
    wanted = trained(step, lm.TrainState.create(net, make()), data)
    return differing(wrapped.export(state).params, wanted.params)


def test_a_state_that_begins_as_shards(world2):
    assert world2.run(from_meta, "both") == [[], []]


def saved(rule, path):
    """Saved by two ranks after two steps; each rank then continues by itself, and both under fsdp again."""
    data = batches(rule, 4)
    wrapped = fsdp()(step)
    state = trained(wrapped, wrapped.init(make_state(rule)), shares(data[:2]))
    lm.checkpoint.save(path, state, step=wrapped)
    alone = trained(step, lm.checkpoint.restore(path, make_state(rule)), data[2:])
    again = lm.checkpoint.restore(path, wrapped.init(make_state(rule)), step=wrapped)
    again = wrapped.export(trained(wrapped, again, shares(data[2:])))
    wanted = trained(step, make_state(rule), data)
    return differing(alone, wanted), differing(again, wanted)


@pytest.mark.parametrize("rule", ["both", "groups"])
def test_a_checkpoint_of_shards_continues_anywhere(rule, world2, tmp_path):
    assert world2.run(saved, rule, str(tmp_path / "a")) == [([], []), ([], [])]


def split_rows():
    wrapped = lm.tensor_parallel({"0": Colwise()}, lm.mesh(tensor=2, device="cpu"))(step)
    try:
        wrapped.init(lm.TrainState.create(nn.Sequential(nn.Linear(WIDTH, 128)), RULES["int8"][1]()))
    except HyperparameterError as error:
        return str(error)
    return ""


def test_tensor_parallel_refuses_them(world2):
    for message in world2.run(split_rows):
        assert "cannot run under lm.tensor_parallel" in message
        assert "adamw(state_dtype='int8')" in message


@pytest.mark.parametrize("rule", RULES)
def test_deepspeed_refuses_them(rule):
    with pytest.raises(HyperparameterError, match="cannot run under lm.deepspeed.*or shard by rows: lm.fsdp"):
        check_optimizer(RULES[rule][1](), "lm.deepspeed", can_gather=False)
    check_optimizer(RULES[rule][1]())
