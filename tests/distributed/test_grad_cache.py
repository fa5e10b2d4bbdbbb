"""`lm.grad_cache` in microbatches of several processes: contrastive losses of the global batch, and of each rank's."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.errors import AxisError, OrderError
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed.models import WIDTH, assert_within, bare, batches, furthest, part, train
from tests.tiers import pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 2
SPREAD = {
    "ddp": ddp,
    "fsdp1": functools.partial(fsdp, stage=1),
    "fsdp2": functools.partial(fsdp, stage=2),
    "fsdp3": fsdp,
}
EVEN, UNEVEN, EMPTY = [4, 4], [5, 3], [8, 0]


class Towers(nn.Module):
    """Two encoders, a temperature, and a count of the rows that were encoded."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4))
        self.right = nn.Linear(WIDTH, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += len(x)
        return self.left(x), self.right(x.flip(1))


def make_state():
    torch.manual_seed(0)
    tx = lm.optim.adam(1e-2, eps=1e-4)
    return lm.TrainState.create(Towers().double(), tx, merge={"count": "sum"})


def contrastive(gathers):
    """CLIP's loss, of each row against the rows of all processes or of its own."""

    def step(state, batch):
        def encode(params, batch):
            (left, right), buffers = state.apply(params, batch["x"])
            return (left, right), lm.Aux(buffers=buffers, metrics={"norm": left.square().mean()})

        def loss(params, embeddings, batch):
            own = [F.normalize(x, dim=-1) for x in embeddings]
            left, right = [lm.all_gather(lm.all_gather(x, "shard"), "data") for x in own] if gathers else own
            first = (lm.axis_index("data") + lm.axis_index("shard")) * len(own[0]) * gathers
            labels = first + torch.arange(len(own[0]))
            scale = params["scale"].exp()
            losses = [
                F.cross_entropy(a @ b.T * scale, labels, reduction="none") for a, b in ((own[0], right), (own[1], left))
            ]
            return lm.Mean.of(sum(losses)), lm.Aux(metrics={"best": lm.Max.of(losses[0].detach())})

        loss_fn = lm.grad_cache(encode, loss)
        (value, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": value, **aux.metrics}

    return step


def law(spread, cases):
    """How far microbatches on each process are from one process on all rows, or from processes that do not split."""
    found = []
    for gathers, split, sizes, *around in cases:
        outer = [lm.compile(backend="eager")] if "compile" in around else []
        inner = [lm.remat("left.*")] if "remat" in around else []
        wrapped = lm.compose(*outer, SPREAD[spread](), lm.accumulate(**split), *inner)(contrastive(gathers))
        data = [{"x": batch["x"]} for batch in batches(STEPS, sum(sizes))]
        mine = [part(batch, sizes, distributed.rank()) for batch in data]
        losses, state = train(wrapped, make_state(), mine)
        if gathers:
            wanted, other = train(lm.compose()(contrastive(False)), make_state(), data)
        else:
            whole = SPREAD[spread]()(contrastive(False))
            wanted, other = train(whole, make_state(), mine)
            other = whole.export(other)
        assert int(wrapped.export(state).buffers["count"]) == STEPS * sum(sizes)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(wrapped.export(state)), bare(other))))
    return found


@pytest.mark.parametrize("spread", SPREAD)
def test_microbatches_of_each_process_are_the_global_batch(spread, world2):
    cases = [
        (True, {"k": 2}, EVEN),
        (True, {"microbatch": 3}, EVEN, *(["remat"] if spread == "fsdp3" else [])),
        (False, {"k": 3}, UNEVEN),
        (False, {"microbatch": 2}, EMPTY),
    ]
    cases += pick([], [(True, {"k": 2}, EVEN, "compile")]) if spread in ("ddp", "fsdp3") else []
    assert_within(1e-10, cases, world2.run(law, spread, cases))


def others():
    """The same under tensor parallelism, and what cannot be right."""
    plan = {"left.0": lm.parallel.Colwise(), "left.2": lm.parallel.Rowwise()}
    data = [{"x": batch["x"]} for batch in batches(STEPS, 8)]
    wrapped = lm.compose(lm.tensor_parallel(plan, mesh(tensor=2, device="cpu")), lm.accumulate(3))(contrastive(False))
    losses, state = train(wrapped, make_state(), data)
    wanted, other = train(lm.compose()(contrastive(False)), make_state(), data)
    far = float((losses - wanted).abs().max()), *furthest(bare(wrapped.export(state)), bare(other))
    refused = []
    for transforms, rows, sizes in (
        ([lm.accumulate("auto")], 8, EVEN),
        ([], 2, [2, 0]),
        ([lm.accumulate(2)], 8, UNEVEN),
    ):
        mine = {"x": data[0]["x"][:rows].split(sizes)[distributed.rank()]}
        try:
            train(lm.compose(ddp(), *transforms)(contrastive(True)), make_state(), [mine])
        except (OrderError, AxisError) as error:
            refused.append(str(error))
    return far, refused


def test_under_tensor_parallel_and_what_is_refused(world2):
    answers = world2.run(others)
    assert_within(1e-10, ["tensor"], [[far] for far, _ in answers])
    for rank, (_, (auto, empty, uneven)) in enumerate(answers):
        assert "Give a number: lm.accumulate(2)" in auto
        assert f"takes equally many rows of every process; here there are {[2, 0][rank]}, of 2 on 2" in empty
        assert f"takes equally many rows of every process; here there are {UNEVEN[rank]}, of 8 on 2" in uneven
