"""Models that begin on the meta device: the values of one process, and on each no more than its part and a unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lumen as lm
from lumen.core import distributed
from lumen.errors import ParamsError, StateError
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.parallel.fsdp.meta_init import materialize, reset
from tests.distributed.models import CLASSES, WIDTH, bare, batches, part, step, train
from tests.distributed.pool import TaskError
from tests.tiers import in_turns

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


class Tower(nn.Module):
    """An embedding of rows, blocks with a norm each, a BatchNorm with its buffers, and a frozen layer."""

    def __init__(self, width=8, depth=3):
        super().__init__()
        self.first = nn.Linear(WIDTH, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth)])
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.last(self.frozen(self.norm(h)))


class Tied(nn.Module):
    """A scale that nothing resets, and two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.other(torch.tanh(self.one(x * self.scale))))


def own_weights(module):
    """As in the wild: by `.data`, and for some kinds of modules only."""
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0.0, 0.1)
        module.bias.data.zero_()
    if isinstance(module, Tied):
        nn.init.uniform_(module.scale)


OPTIMIZERS = {
    "adam": lambda: lm.optim.adam(1e-2, eps=1e-4),
    "adafactor": lambda: lm.optim.adafactor(1e-2),
    "lookahead": lambda: lm.optim.lookahead(lm.optim.sgd(0.1, momentum=0.9), period=2),
}


def on_meta(kind, tx, seed=3):
    with torch.device("meta"):
        net = kind()
    return lm.TrainState.create(net, OPTIMIZERS[tx](), seed=seed)


def whole(kind, tx, initialize=None, seed=3):
    torch.manual_seed(seed)
    net = kind()
    if initialize is not None:
        torch.manual_seed(seed)
        for module in net.modules():
            initialize(module)
    return lm.TrainState.create(net, OPTIMIZERS[tx](), seed=seed)


def bits(found, wanted):
    found, wanted = bare(found), bare(wanted)
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


def made(stage, tx):
    around = [lm.accumulate(2), lm.precision("bf16"), lm.ema(0.9), lm.donate()]
    wrapped = lm.compose(fsdp(stage=stage), *around[2:3], *around[:2])(step)
    found = wrapped.init(on_meta(Tower, tx))
    beside = lm.compose(fsdp(stage=stage), *around[2:3], *around[:2])(step)
    wanted = beside.init(whole(Tower, tx))
    assert vars(found.slots["fsdp"]) == vars(wanted.slots["fsdp"])
    different = bits(found, wanted) + bits(wrapped.export(found), beside.export(wanted))
    data = [part(batch, [4, 4], distributed.rank()) for batch in batches(3, 8, torch.float32)]
    losses = [
        train(each, state, data)[0] for each, state in ((wrapped, on_meta(Tower, tx)), (beside, whole(Tower, tx)))
    ]
    return different, torch.equal(*losses)


@pytest.mark.parametrize(("tx", "stage"), in_turns(list(OPTIMIZERS), [3, 1, 2]))
def test_values_are_those_of_a_model_made_whole(stage, tx, world2):
    assert world2.run(made, stage, tx) == [([], True)] * 2


def made_by(initialize):
    wrapped = fsdp(param_init_fn=initialize, wrap=["one", "other"])(step)
    return bits(wrapped.export(wrapped.init(on_meta(Tied, "adam"))), whole(Tied, "adam", initialize))


def test_a_users_own_initialization_and_tied_weights(world2):
    assert world2.run(made_by, own_weights) == [[], []]


def without_values():
    fsdp()(step).init(on_meta(Tied, "adam"))


def test_what_has_no_value_is_named(world2):
    with pytest.raises(TaskError, match=r"nothing initialized scale.*lm\.fsdp\(param_init_fn=fn\)") as caught:
        world2.run(without_values)
    assert [kind for _, kind, _ in caught.value.errors] == [ParamsError.__name__] * 2


@lm.dataclass
class More(lm.TrainState):
    more: torch.Tensor = None


def test_alone_and_what_else_is_on_the_meta_device():
    state = fsdp().init(on_meta(Tower, "adam"))
    assert bits(state, whole(Tower, "adam")) == []
    with torch.device("meta"):
        net, more = Tower(), torch.ones(2)
    with pytest.raises(StateError, match="more"):
        fsdp().init(More.create(net, lm.optim.sgd(0.1), more=more))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in lm.tree.leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                self.held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: each for key, each in self.held.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(12)])


def at_its_peak():
    with torch.device("meta"):
        net = Blocks()
    wrapped = fsdp()(step)
    state = lm.TrainState.create(net, lm.optim.adam(1e-3))
    with Peak() as peak:
        state = wrapped.init(state)
    everything = sum(p.numel() * 4 for p in net.parameters())
    return peak.most, everything, lm.tree.nbytes(state)


def test_no_process_holds_more_than_its_part_and_a_unit(world4):
    for most, everything, stays in world4.run(at_its_peak):
        assert stays < 0.27 * 3 * everything  # params and two moments
        assert most < stays + 1.1 * everything / 12
        assert most < everything


def test_the_skeleton_stays_as_it_is():
    with torch.device("meta"):
        net = Tower()
    given = lm.pure(net).apply.module
    materialize(given, ["", "blocks.0"], reset, 0, torch.device("cpu"), lambda name, tensor: tensor)
    assert all(each.is_meta for each in [*given.parameters(), *given.buffers()])
