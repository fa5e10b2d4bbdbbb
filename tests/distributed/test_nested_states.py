"""States with several models and optimizers, spread over processes: one process on all rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.core.nested_states import train_states
from lumen.errors import StateError
from tests.distributed.models import bare, batches, furthest, part, train, transforms
from tests.distributed.pool import TaskError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

UNEVEN, EMPTY = [5, 3], [8, 0]
STRATEGIES = {
    "ddp": lm.ddp,
    "fsdp1": functools.partial(lm.fsdp, stage=1),
    "fsdp2": functools.partial(lm.fsdp, stage=2),
    "fsdp3": lm.fsdp,
    "offload": functools.partial(lm.fsdp, offload=True),
}
SHARDED = [name for name in STRATEGIES if name != "ddp"]


@lm.dataclass
class Game:
    """Two players, and a number that neither trains."""

    players: dict[str, lm.TrainState]
    rounds: torch.Tensor


def blocks(*widths):
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)))


def game(_name="game"):
    torch.manual_seed(0)
    # Params of the same names, and of shapes that look alike in parts: 5 rows and 6 over two processes are 3 and 3.
    generator, judge = blocks(6, 5, 6).double(), blocks(6, 6, 1).double()
    return Game(
        {
            "generator": lm.TrainState.create(generator, lm.optim.adam(1e-2, eps=1e-4), seed=1),
            "judge": lm.TrainState.create(judge, lm.optim.sgd(0.1, momentum=0.9)),
        },
        torch.zeros(()),
    )


def play(state, batch):
    generator, judge = state.players["generator"], state.players["judge"]

    def judge_loss(params, batch):
        made, _ = generator.apply(generator.params, batch["x"])
        on_real, on_made = (judge.apply(params, rows)[0].squeeze(-1) for rows in (batch["x"], made))
        return lm.Mean.of(F.softplus(-on_real) + F.softplus(on_made))

    loss, grads = lm.value_and_grad(judge_loss)(judge.params, batch)
    judge = judge.apply_gradients(grads)

    def generator_loss(params, batch):
        made, _ = generator.apply(params, batch["x"])
        return lm.Mean.of(F.softplus(-judge.apply(judge.params, made)[0].squeeze(-1)))

    fooled, grads = lm.value_and_grad(generator_loss)(generator.params, batch)
    players = {"generator": generator.apply_gradients(grads), "judge": judge}
    return state.replace(players=players, rounds=state.rounds + 1), {"loss": fooled, "judged": loss}


@lm.dataclass
class Twice(lm.TrainState):
    """A second optimizer of the same params, in a field of its own."""

    second: object = dataclasses.field(kw_only=True)


def twice(_name="twice"):
    torch.manual_seed(0)
    net, second = blocks(6, 5, 3).double(), lm.optim.sgd(0.05, momentum=0.9)
    params = lm.pure(net).params
    return Twice.create(net, lm.optim.adam(1e-2, eps=1e-4), second=second.init(params))


def step_twice(state, batch):
    def loss_fn(params, batch):
        return lm.Mean.of(state.apply(params, batch["x"])[0].square().mean(-1))

    _, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    tx = lm.optim.sgd(0.05, momentum=0.9)
    params, second = lm.apply_gradients(tx, grads, state.second, state.params)
    loss, grads = lm.value_and_grad(loss_fn)(params, batch)
    return state.replace(params=params, second=second).apply_gradients(grads), {"loss": loss}


@lm.dataclass
class Taught(lm.TrainState):
    """Params, and others that follow them slowly."""

    teacher: dict = lm.extend.param_field(kw_only=True)


def taught(_name="taught"):
    torch.manual_seed(0)
    net = blocks(6, 5, 3).double()
    return Taught.create(net, lm.optim.adam(1e-2, eps=1e-4), teacher=lm.tree.map(torch.clone, lm.pure(net).params))


def distill(state, batch):
    def loss_fn(params, batch):
        (out, _), (target, _) = (state.apply(p, batch["x"]) for p in (params, state.teacher))
        return lm.Mean.of((out - target - 1).square().mean(-1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    new = state.apply_gradients(grads)
    teacher = lm.tree.map(lambda old, p: torch.lerp(old, p, 0.1), state.teacher, new.params)
    return new.replace(teacher=teacher), {"loss": loss}


CASES = {"game": (game, play), "twice": (twice, step_twice), "taught": (taught, distill)}


def law(strategy, cases):
    """For each case how far the strategy is from one process on all rows: the losses, and the furthest leaf."""
    found = []
    for name, around, sizes in cases:
        create, step = CASES[name]
        inner = transforms([each for each in around if each != "compile"])
        outer = [lm.compile(backend="eager")] if "compile" in around else []
        wrapped = lm.compose(*outer, STRATEGIES[strategy](), *inner)(step)
        whole = [{"x": batch["x"]} for batch in batches(3, sum(sizes))]
        losses, state = train(wrapped, create(), [part(batch, sizes, distributed.rank()) for batch in whole])
        wanted, other = train(lm.compose(*inner)(step), create(), whole)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(wrapped.export(state)), bare(other))))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_they_train_as_in_one_process(strategy, name, world2):
    cases = [(name, [], UNEVEN), (name, ["clip"], EMPTY), (name, ["donate"], UNEVEN), (name, ["accumulate"], UNEVEN)]
    for found in world2.run(law, strategy, cases):
        for case, (losses, worst, leaf) in zip(cases, found, strict=True):
            assert losses < 1e-10, case
            assert worst < 1e-10, (case, leaf)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp3"])
def test_compiled_they_train_as_in_one_process(strategy, world2):
    cases = [("game", ["compile"], UNEVEN), ("twice", ["compile"], UNEVEN)]
    for found in world2.run(law, strategy, cases):
        assert max(max(losses, worst) for losses, worst, _ in found) < 1e-10


def kept(strategy):
    """Of each player, the entries of its params and of its optimizer's state on this rank, and of the full ones."""
    wrapped = STRATEGIES[strategy]()(play)
    full, shards = game(), wrapped.init(game())
    again = wrapped.init(shards)
    assert all(a is b for a, b in zip(lm.tree.leaves(again), lm.tree.leaves(shards), strict=True))
    return [
        [sum(x.numel() for x in lm.tree.tensors(values)) for values in (inner.params, inner.opt_state)]
        for state in (shards, full)
        for _, inner in train_states(state)
    ]


@pytest.mark.parametrize("strategy", SHARDED)
def test_each_of_them_is_sharded(strategy, world2):
    first, second = world2.run(kept, strategy)
    for mine, other, full in zip(first[:2], second[:2], first[2:], strict=True):
        assert mine[0] + other[0] == full[0] if strategy in ("fsdp3", "offload") else mine[0] == other[0] == full[0]
        assert full[1] <= mine[1] + other[1] <= full[1] + 3  # a count and rates are on both


def saved(directory):
    """A state saved from both processes and restored into both."""
    wrapped = lm.fsdp()(play)
    batch = {"x": batches(1, 8)[0]["x"].split(4)[distributed.rank()]}
    state, _ = wrapped(wrapped.init(game()), batch)
    with lm.checkpoint.Store(directory).open(wrapped) as store:
        store.save(1, state)
        store.wait()
        restored = store.restore(1, wrapped.init(game()))
    return furthest(bare(wrapped.export(restored)), bare(wrapped.export(state)))[0]


def test_a_checkpoint_has_both(world2, tmp_path):
    assert world2.run(saved, tmp_path) == [0.0, 0.0]
    alone = lm.checkpoint.restore(tmp_path / "1", game())
    assert alone.players["judge"].params["0.0.weight"].shape == (6, 6)


def on_meta():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    state = game()
    players = {**state.players, "judge": lm.TrainState.create(net, lm.optim.sgd(0.1))}
    lm.fsdp()(play).init(state.replace(players=players))


def foreign():
    wrapped = lm.fsdp()(play)
    lm.ddp()(play).init(wrapped.init(game()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(on_meta, r"params of state\.players\.judge are on the meta device"), (foreign, "one rank's shard under lm.fsdp")],
)
def test_what_cannot_be_is_refused_by_name(wrong, message, world2):
    with pytest.raises(TaskError, match=message) as caught:
        world2.run(wrong, limit=60)
    assert [kind for _, kind, _ in caught.value.errors] == [StateError.__name__] * 2
