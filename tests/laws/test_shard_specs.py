"""Leaves that are laid out like a param are sharded with it, and no others, whatever their names and shapes are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen.core.param_leaves import key_paths, param_leaves
from lumen.extend import add_slot, param_field, slot
from lumen.parallel import Colwise, Rowwise
from lumen.planner.fake_world import fake_world
from tests.tiers import pick

NAMES = ("weight", "lr", "mu", "nu", "count", "a][b")
SHAPES = ((4, 2), (2, 2), (1, 2), (2,), (4,), (3, 2), ())
PLAN = {"up": Colwise(), "down": Rowwise()}


class Net(nn.Module):
    """Two layers that a plan can shard, one of them with a frozen param, and params of any name beside them."""

    def __init__(self, shapes):
        super().__init__()
        self.up, self.down, self.deep = nn.Linear(2, 4), nn.Linear(4, 2, bias=False), nn.Module()
        self.up.bias.requires_grad_(False)
        for name, shape in shapes.items():
            for module in (self, self.deep):
                module.register_parameter(name, nn.Parameter(torch.randn(shape)))


@lm.dataclass
class State(lm.TrainState):
    """Fields that look like params: one is declared, one is not, and one has rows."""

    teacher: Any = param_field(kw_only=True)
    baseline: Any = dataclasses.field(kw_only=True)
    rows: Any = lm.row_field()


@lm.dataclass
class Memory:
    """A slot with two fields that look like params, of which one is declared."""

    declared: Any = param_field()
    undeclared: Any = None


class Noting(lm.Transform):
    """Adds slots that look like params, one of them under the name of the optimizer's state."""

    name = "noting"

    def init(self, state):
        state = add_slot(state, "noting", lambda: Memory(like(state.params), like(state.params)))
        return add_slot(state, "opt_state", lambda: {"mu": like(state.params)})


def like(params):
    return {name: torch.randn(p.shape) for name, p in params.items()}


def custom():
    """A user's optimizer: it keeps things in the params' shapes, in other shapes, and for all params together."""

    def init(params):
        odd = {name: torch.randn(p.shape[:1] or (2,)) for name, p in params.items()}
        return {"kept": like(params), "odd": odd, "lr": torch.ones(4, 2), "all": (torch.ones(2, 2), torch.ones(4))}

    return lm.optim.GradientTransformation(init, lambda grads, state, params: (grads, state))


OPTIMIZERS = {  # and what each keeps by the params' names
    "adam": (lambda: lm.optim.adam(0.1), lambda s: [s.mu, s.nu]),
    "adafactor": (lambda: lm.optim.adafactor(0.1), lambda s: [s.nu]),
    "lookahead": (lambda: lm.optim.lookahead(lm.optim.adam(0.1)), lambda s: [s.slow, s.inner.mu, s.inner.nu]),
    "torch": (lambda: lm.optim.from_torch(torch.optim.Adamax), lambda s: [s.memory]),
    "custom": (custom, lambda s: [s["kept"], s["odd"]]),
    "partition": (
        lambda: lm.optim.partition({"up.*": lm.optim.sgd(0.1, momentum=0.9)}, default=lm.optim.adam(0.1)),
        lambda s: [s.groups[0].trace, s.groups[1].mu, s.groups[1].nu],
    ),
}

PURE = sorted({*OPTIMIZERS} - {"torch"})  # without torch's own, which it takes seconds to import


def make_state(shapes, optimizer):
    """A plain state with the slots of `Noting`, in which no two leaves of one shape hold the same values."""
    torch.manual_seed(0)
    net = Net(shapes)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    rows = {name: torch.randn(4, 2) for name in ("weight", "mu")}
    fields = {"teacher": like(params), "baseline": like(params), "rows": rows}
    state = State.create(net, OPTIMIZERS[optimizer][0](), **fields)
    state = state.replace(opt_state=lm.tree.map(lambda x: torch.randn(x.shape), state.opt_state))
    return Noting().init(state)


def like_params(state, optimizer, field=None):
    """The leaves that are laid out like params, by their ids, with the params' names: written down by hand."""
    trees = {
        "params": [state.params],
        "buffers": [{name: state.buffers[name] for name in state.apply_fn.frozen}],
        "opt_state": OPTIMIZERS[optimizer][1](state.opt_state),
        "slots": [slot(state, "noting").declared, slot(state, "ema").params],
        "teacher": [state.teacher],
    }
    shapes = {name: x.shape for values in (state.params, state.buffers) for name, x in values.items()}
    return {
        id(leaf): name
        for key in (trees if field is None else [field])
        for values in trees[key]
        for name, subtree in values.items()
        for leaf in lm.tree.leaves(subtree)
        if leaf.shape == shapes[name] and leaf.dim()
    }


def ranks(build, plain, size):
    """The state of each rank of a world of `size`, and the specs of its leaves, by path."""
    for rank in range(size):
        with fake_world(size, rank):
            step = build()
            state = step.init(plain)
            specs = step.shard_specs(state)
            paths = key_paths(state)
            yield dict(zip(paths, lm.tree.leaves(state), strict=True)), {paths[i]: spec for i, spec in specs.items()}


def check(build, plain, full, sharded, size):
    """Shards of all ranks make up the leaves of `full`, each entry once, and those at `sharded` alone are sharded."""
    wanted = dict(zip(key_paths(full), lm.tree.leaves(full), strict=True))
    written = {path: torch.zeros_like(leaf) for path, leaf in wanted.items()}
    times = {path: torch.zeros(leaf.shape) for path, leaf in wanted.items()}
    found = set()
    for rank, (leaves, specs) in enumerate(ranks(build, plain, size)):
        assert leaves.keys() == wanted.keys()
        for path, leaf in leaves.items():
            if path not in specs:
                assert torch.equal(leaf, wanted[path]), path
                continue
            assert specs[path].shape == wanted[path].shape
            if leaf.shape != wanted[path].shape:
                found.add(path)
            for here, there, extent in specs[path].boxes if specs[path].owner else ():
                target = tuple(slice(a, a + n) for a, n in zip(there, extent, strict=True))
                written[path][target] = leaf[tuple(slice(a, a + n) for a, n in zip(here, extent, strict=True))]
                times[path][target] += 1
        replicated = {path for path in wanted if path not in specs}
        for path in replicated if rank == 0 else ():  # which the first rank writes
            written[path], times[path] = leaves[path], torch.ones(leaves[path].shape)
    assert all(bool((count == 1).all()) for count in times.values())
    assert all(torch.equal(leaf, wanted[path]) for path, leaf in written.items())
    assert found == sharded


def stack(parallel, outside):
    """A step with the transforms of `parallel`, a transform that adds slots inside, and ema inside or outside."""
    inner = [Noting()] if outside else [Noting(), lm.ema(0.9)]
    return lm.compose(*([lm.ema(0.9)] if outside else []), *parallel, *inner)(lambda state, batch: (state, {}))


shapes_by_name = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(SHAPES), max_size=4)


@settings(max_examples=pick(12, 200), deadline=None)
@given(
    shapes=shapes_by_name,
    optimizer=st.sampled_from(PURE),
    stage=st.sampled_from([1, 2, 3]),
    size=st.sampled_from([2, 3]),
    outside=st.booleans(),
)
def test_fsdp_shards_what_is_like_params(shapes, optimizer, stage, size, outside):
    plain = make_state(shapes, optimizer)
    full = stack([], outside).init(plain)
    names = like_params(full, optimizer, None if stage == 3 else "opt_state")
    sharded = paths_of(full, {leaf for leaf, name in names.items() if name in sharded_by_fsdp(plain, stage)})
    rows = {path for path in key_paths(full) if path[0] == "rows"}
    check(lambda: stack([lm.fsdp(stage=stage)], outside), plain, full, sharded | rows, size)


@settings(max_examples=pick(12, 200), deadline=None)
@given(
    shapes=shapes_by_name,
    optimizer=st.sampled_from(sorted({*PURE} - {"adafactor"})),
    stage=st.sampled_from([None, 1, 3]),
    outside=st.booleans(),
)
def test_tensor_parallel_shards_what_is_like_params_and_fsdp_outside_does_once_more(shapes, optimizer, stage, outside):
    plain = make_state(shapes, optimizer)
    full = stack([], outside).init(plain)

    def build():
        grid = lm.mesh(tensor=2) if stage is None else lm.mesh(shard=2, tensor=2)
        outer = [] if stage is None else [lm.fsdp(grid, stage=stage)]
        return stack([*outer, lm.tensor_parallel(PLAN, grid)], outside)

    in_plan = ("up.weight", "up.bias", "down.weight")
    sharded = {leaf for leaf, name in like_params(full, optimizer).items() if name in in_plan}
    if stage is not None:
        rows = like_params(full, optimizer, None if stage == 3 else "opt_state")
        sharded |= {leaf for leaf, name in rows.items() if name in sharded_by_fsdp(plain, stage)}
    paths = paths_of(full, sharded) | {path for path in key_paths(full) if stage and path[0] == "rows"}
    check(build, plain, full, paths, 2 if stage is None else 4)


def sharded_by_fsdp(state, stage):
    """The names of the params that are sharded: at stage 3 also the frozen ones."""
    return {*state.params, *(state.apply_fn.frozen if stage == 3 else ())}


def paths_of(state, leaves):
    return {path for path, leaf in zip(key_paths(state), lm.tree.leaves(state), strict=True) if id(leaf) in leaves}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_deepspeed_finds_what_the_optimizer_keeps_for_params(optimizer):
    state = stack([], False).init(make_state({"mu": (4, 2), "nu": (2,), "lr": (1, 2)}, optimizer))
    found = param_leaves(state, {name: p.shape for name, p in state.params.items()})
    of_optimizer = {path: name for path, name in found.items() if path[0] == "opt_state"}
    wanted = like_params(state, optimizer, "opt_state")
    assert of_optimizer.keys() == paths_of(state, wanted)
    leaves = dict(zip(key_paths(state), lm.tree.leaves(state), strict=True))
    assert all(wanted[id(leaves[path])] == name for path, name in of_optimizer.items())
