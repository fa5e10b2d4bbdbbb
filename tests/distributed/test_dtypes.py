"""Buffers of every dtype travel, and are merged by every rule that suits it: also those that Gloo does not know."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import lumen as lm
from lumen import ddp, fsdp
from lumen.core import distributed
from lumen.errors import HyperparameterError
from lumen.parallel.comm import collectives

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
)


class Buffered(nn.Module):
    """A linear layer beside a buffer of each dtype, with other bytes on each process."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        for i, dtype in enumerate(DTYPES):
            self.register_buffer(f"b{i}", (torch.arange(5) + distributed.rank() + i).to(dtype))
            self.register_buffer(f"one{i}", torch.tensor(1 + distributed.rank()).to(dtype))
            self.register_buffer(f"none{i}", torch.zeros(0, 2, dtype=dtype))

    def forward(self, x):
        return self.linear(x)


def beginning():
    """The bytes of all buffers as they were given, and after `init` under each transform."""
    found = []
    for parallel in (ddp(), fsdp(), fsdp(offload=True)):
        state = lm.TrainState.create(Buffered(), lm.optim.sgd(0.1))
        given = as_bytes(state)
        found.append((given, as_bytes(parallel.export(parallel.init(state)))))
    return found


def as_bytes(state):
    return {name: b.contiguous().view(-1).view(torch.uint8).tolist() for name, b in state.buffers.items()}


def test_all_hold_the_first_processs_buffers(world2):
    first, second = world2.run(beginning)
    for (given, mine), (other, theirs) in zip(first, second, strict=True):
        assert other != given
        assert mine == given
        assert theirs == given


# ---------------------------------------------------------------------------------------------- merged by rules

ROWS = torch.tensor([[3.0, 1.0], [0.0, 7.0], [5.0, 2.0], [1.0, 6.0]])
TOP = torch.iinfo(torch.int64).min  # the bits of 2**63, from where an unsigned integer has those of a negative one


def rules_of(dtype):
    """The rules that a buffer of `dtype` may have."""
    if dtype.is_complex:
        return ["gather", "sync"]
    if dtype == torch.bool:
        return ["max", "min", "any", "first", "gather", "sync"]
    mean = ["mean"] if dtype.is_floating_point else []
    return ["sum", *mean, "max", "min", "first", "gather", "sync"]


PAIRS = {f"{rule}_{str(dtype)[6:]}": (rule, dtype) for dtype in DTYPES for rule in rules_of(dtype)}


def changed(rule, old, x):
    """What a forward pass over the rows `x` makes of a buffer."""
    dtype, top = old.dtype, TOP if old.dtype == torch.uint64 else 0
    wide = torch.complex64 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    if dtype == torch.bool:
        x = x > 4
    found = {
        "sum": lambda: old.to(wide) + len(x),
        "mean": lambda: x.mean(0),
        "max": lambda: x.amax(0),
        "min": lambda: x.amin(0),
        "any": lambda: x.any(0),
        "first": lambda: x[0],
        "gather": lambda: x,
        "sync": lambda: torch.ones(2),
    }[rule]()
    found = found.to(wide)
    if top and rule != "sum":
        found = torch.where(found > 2, found + top, found)  # the bits of the largest ones
    return found.to(dtype)


class Merged(nn.Module):
    """A linear layer beside a buffer of each dtype under each rule."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        for name, (_, dtype) in PAIRS.items():
            self.register_buffer(name, (torch.arange(2) + TOP * (dtype == torch.uint64)).to(dtype))
            self.register_buffer(f"fixed_{name}", torch.ones(2).to(dtype))

    def forward(self, x):
        for name, (rule, _) in PAIRS.items():
            setattr(self, name, changed(rule, getattr(self, name), x.detach()))
        return self.linear(x)


def step(state, batch):
    def loss_fn(params, batch):
        out, buffers = state.apply(params, batch)
        return out.square().mean(), lm.Aux(buffers=buffers)

    (_, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {}


def merged_state():
    torch.manual_seed(0)
    return lm.TrainState.create(Merged(), lm.optim.sgd(0.1), merge={name: rule for name, (rule, _) in PAIRS.items()})


def stepped(sizes):
    """The buffers after a step of two processes with `sizes` rows, under each transform."""
    found = []
    for parallel in (ddp(), fsdp()):
        wrapped = parallel(step)
        state, _ = wrapped(wrapped.init(merged_state()), ROWS.split(sizes)[distributed.rank()])
        found.append(as_bytes(wrapped.export(state)))
    return found


@pytest.mark.parametrize("sizes", [[1, 3], [0, 4]])
def test_a_step_merges_them_as_one_process_has_them(sizes, world2):
    wanted = as_bytes(step(merged_state(), ROWS)[0])
    for found in world2.run(stepped, sizes):
        for buffers in found:
            assert {name for name in wanted if buffers[name] != wanted[name]} == set()


def test_rules_that_no_dtype_of_that_kind_can_have_are_refused():
    net = Merged()
    for rule, dtype in (
        ("sum", "complex64"),
        ("max", "complex64"),
        ("mean", "int16"),
        ("mean", "uint64"),
        ("sum", "bool"),
    ):
        with pytest.raises(HyperparameterError, match=f"torch.{dtype}, the rule '{rule}'"):
            lm.pure(net, merge={f"gather_{dtype}": rule})


# ------------------------------------------------------------------------------------------------- all-gathered


def large_all_gathers():
    """Per dtype, whether shards launched together arrive in rank order, and how many broadcasts ran."""
    group, rank = torch.distributed.group.WORLD, distributed.rank()
    results = []
    for dtype in DTYPES:
        shards = [(torch.arange(2**17) % 5 + other).to(dtype) for other in (0, 1)]
        with torch.profiler.profile(acc_events=True) as profiler:
            flights = [collectives.start_all_gather(shard, 2, group) for shard in (shards[rank], shards[rank][:5])]
            waited = collectives.all_gather(shards[rank], group)()
            for _, work in flights:
                work.wait()
        expected = [torch.cat(shards), torch.cat([shard[:5] for shard in shards]), torch.cat(shards)]
        arrived = [flights[0][0], flights[1][0], waited]
        same = [same_bytes(one, other) for one, other in zip(arrived, expected, strict=True)]
        ran = Counter(event.name for event in profiler.events() if event.name.startswith("gloo:"))
        results.append((str(dtype), same, ran["gloo:broadcast"]))
    return results


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def test_large_shards_are_broadcast_into_their_place(world2):
    for results in world2.run(large_all_gathers):
        for dtype, same, broadcasts in results:
            assert all(same), dtype
            assert broadcasts == 4, dtype
