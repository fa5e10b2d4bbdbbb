"""`lm.row_field()` in one process, where it is a field like any other, and what may not be one."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import row_fields
from lumen.core.sharding import SpecTree
from lumen.core.step import with_slot
from lumen.errors import StateError
from lumen.parallel.fsdp.fsdp import Sharding
from lumen.parallel.row_shards import RowShards
from tests.tiers import pick

ROWS = 4


@lm.dataclass
class Recurrent(lm.TrainState):
    hidden: torch.Tensor = lm.row_field()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = torch.nn.RNNCell(3, 2, dtype=torch.float64)

    def forward(self, x, hidden):
        return self.cell(x, hidden)


def make_state():
    torch.manual_seed(0)
    return Recurrent.create(Net(), lm.optim.adam(0.1), hidden=torch.zeros(ROWS, 2, dtype=torch.float64))


def step(state, x):
    def loss_fn(params, batch):
        hidden, _ = state.apply(params, batch["x"], batch["hidden"])
        return (hidden - batch["x"][:, :2]).square().mean(), {"hidden": hidden}

    batch = {"x": x, "hidden": state.hidden}
    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, hidden=aux["hidden"]), {"loss": loss}


def batches():
    return torch.randn(3, ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(*transforms):
    wrapped = lm.compose(*transforms)(step)
    state = wrapped.init(make_state())
    for x in batches():
        state, _ = wrapped(state, x)
    return wrapped.export(state)


TRANSFORMS = {
    "accumulate": [lm.accumulate(2)],
    "donate": [lm.donate(), lm.accumulate(microbatch=3)],
    "remat": [lm.remat("cell")],
    "ddp": [lm.ddp(), lm.accumulate(4)],
    "fsdp": [lm.fsdp(), lm.ema(0.5)],
    "guard": [lm.seeded(), lm.guard("raise"), lm.clip(1e9)],
    **pick({}, {"compile": [lm.compile(), lm.donate(), lm.accumulate(2)]}),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_is_an_ordinary_field(name):
    plain, other = train(), train(*TRANSFORMS[name])
    assert not torch.equal(plain.hidden, make_state().hidden)
    torch.testing.assert_close(other.hidden, plain.hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.params["cell.weight_hh"], plain.params["cell.weight_hh"], rtol=0, atol=1e-12)


def test_lanes_and_unrolled_steps():
    plain = train()
    lanes = lm.ensemble(2)(step)
    states = lanes.init([make_state()] * 2)
    for x in batches():
        states, _ = lanes(states, x)
    unrolled = lm.unroll(3)(step)
    scanned, _ = unrolled(unrolled.init(make_state()), batches())
    for state in [*lanes.export(states), scanned]:
        torch.testing.assert_close(state.hidden, plain.hidden, rtol=0, atol=1e-12)


def test_a_loss_over_rows_of_the_state_is_known_as_a_mean():
    lm.check_purity(step, make_state(), batches()[0], rows=True)


@lm.dataclass
class Cells:
    count: torch.Tensor
    cell: tuple = lm.row_field()


@lm.dataclass
class Nested(lm.TrainState):
    first: torch.Tensor
    cells: dict
    hidden: dict = lm.row_field(default_factory=dict)


def test_row_leaves_are_found_wherever_they_are():
    x = torch.zeros(2)
    cells = {"a": Cells(count=x, cell=(x, (x,))), "b": [Cells(x, cell=())]}
    state = Nested.create(torch.nn.Linear(2, 2), lm.optim.sgd(0.1), first=x, cells=cells, hidden={"h": x})
    state = state.replace(slots={"one": Recurrent.create(torch.nn.Linear(2, 2), lm.optim.sgd(0.1), hidden=x)})
    paths = ["slots[one].hidden", "cells[a].cell[0]", "cells[a].cell[1][0]", "hidden[h]"]
    assert [path for path, _ in row_fields.named(state)] == paths
    assert [lm.tree.paths(state)[index] for index in row_fields.indices(state)] == paths
    rest, rows = row_fields.split_off(state)
    assert len(rows) == len(paths)
    assert len(lm.tree.tensors(rest)) == len(lm.tree.tensors(state)) - len(paths)
    back = row_fields.joined(rest, rows)
    assert all(a is b for a, b in zip(lm.tree.leaves(back), lm.tree.leaves(state), strict=True))
    assert row_fields.indices({"plain": [x]}) == []


@pytest.mark.parametrize("transform", [lm.ddp(), lm.fsdp(), lm.tensor_parallel({"": lm.parallel.Colwise()})])
@pytest.mark.parametrize(("value", "said"), [(torch.zeros(()), "a tensor without dims"), (3, "3, a int")])
def test_a_leaf_without_rows_is_refused_before_the_first_step(transform, value, said):
    state = Nested.create(
        torch.nn.Linear(2, 2), lm.optim.sgd(0.1), first=torch.zeros(()), cells={}, hidden={"n": value}
    )
    with pytest.raises(StateError, match=rf"state.hidden\[n\] is {said}, and an lm.row_field\(\) holds tensors"):
        transform(step).init(state)


@pytest.mark.parametrize(
    ("slot", "record", "owner"),
    [
        ("fsdp", Sharding(specs=SpecTree({}, {}), size=2, stage=3), "fsdp"),
        ("row_field", RowShards(rows=(("hidden", 8),), size=2, owner="ddp"), "ddp"),
    ],
)
def test_one_rank_s_shard_is_refused_by_a_step_that_does_not_know_of_it(slot, record, owner):
    shard = with_slot(make_state(), slot, record)
    with pytest.raises(StateError, match=f"one rank's shard under lm.{owner}, which is not a transform of lm.donate"):
        lm.donate()(step).init(shard)
    with pytest.raises(StateError, match="over 2"):
        getattr(lm, owner)()(step).init(shard)
    with pytest.raises(lm.LumenError, match="this process has only a shard of the state"):
        lm.checkpoint.save("nowhere", shard)
