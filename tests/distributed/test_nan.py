"""NaN on any one process: what is joined over processes is NaN, and all decide alike, whichever process holds it."""

from __future__ import annotations

import math

import pytest
import torch

import lumen as lm
from lumen import ddp, fsdp, mesh
from lumen.core import distributed
from tests.distributed.models import batches, make_state, part

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
VALUES = (0.0, -0.0, 1.5, -2.0, math.inf, -math.inf)


def extremes():
    """Each collective over all pairs of values, 0 on rank 0 and 1 on rank 1, in every dtype."""
    wrong = []
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    with mesh(device="cpu").bound():
        for dtype in (*FLOATS, *INTEGERS, torch.bool):
            table = torch.tensor([*VALUES, math.nan]) if dtype in FLOATS else torch.tensor([0, 1, 2, 3, 5, 8, 100])
            if dtype == torch.uint64:
                table = table.to(torch.uint64).view(torch.int64).bitwise_xor(-(2**63)).view(torch.uint64)  # > 2⁶³
            both = table.to(dtype)[pairs]
            wide = both if dtype in (torch.uint64, torch.int64) else both.double()
            mine = both[:, distributed.rank()].clone()
            for collective, reduce in ((lm.pmax, torch.amax), (lm.pmin, torch.amin)):
                found = collective(mine, "data")
                signed = wide.view(torch.int64) ^ -(2**63) if dtype == torch.uint64 else wide
                wanted = reduce(signed, 1)
                got = found.view(torch.int64) ^ -(2**63) if dtype == torch.uint64 else found.to(wide.dtype)
                if found.dtype != dtype or not torch.equal(got.nan_to_num(12345), wanted.nan_to_num(12345)):
                    wrong.append((str(dtype), collective.__name__))
        merged = [
            float(
                kind.of(torch.tensor([1.0, math.nan if distributed.rank() == holder else 2.0])).psum("data").compute()
            )
            for kind in (lm.Max, lm.Min)
            for holder in (0, 1)
        ]
        flags = torch.tensor([distributed.rank() == 1])
        smallest = lm.Min(flags).psum("data").compute()
        total = lm.psum(torch.tensor([300, -7], dtype=torch.int16), "data").tolist()
    return wrong, merged, smallest.tolist(), total


def test_the_maximum_and_minimum_are_nan_whichever_process_has_it(world2):
    for wrong, merged, smallest, total in world2.run(extremes):
        assert not wrong
        assert all(map(math.isnan, merged))
        assert (smallest, total) == ([False], [600, -14])


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of(out.square().sum(1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, "most": lm.Max.of(batch["x"]), "least": lm.Min.of(batch["x"])}


STACKS = {
    "guard": (lm.guard("skip"), "parallel"),
    "fp16": ("parallel", lm.precision("fp16")),
    "accumulate": ("parallel", lm.guard("skip"), lm.accumulate(2)),
    "apply_if_finite": ("parallel",),
}


def decisions():
    """For each transform that decides about an update, and each process with a NaN in its rows: what is kept."""
    found = {}
    for parallel in (ddp, fsdp):
        for stack in ("guard", "fp16", "accumulate", "apply_if_finite"):
            for holder in (0, 1):
                outer = parallel()
                tx = lm.optim.sgd(0.1)
                tx = lm.optim.apply_if_finite(tx, 3) if stack == "apply_if_finite" else tx
                wrapped = lm.compose(*(outer if each == "parallel" else each for each in STACKS[stack]))(step)
                state = wrapped.init(make_state("mlp", torch.float32, tx=tx))
                batch = part(batches(1, 8, torch.float32)[0], (4, 4), distributed.rank())
                if distributed.rank() == holder:
                    batch["x"][0, 0] = math.nan
                before = lm.tree.map(torch.clone, wrapped.export(state).params)
                new, metrics = wrapped(state, batch)
                after = wrapped.export(new).params
                kept = all(torch.equal(before[name], after[name]) for name in before)
                name = f"{outer!r} {stack} {holder}"
                numbers = (metrics["loss"].compute(), new.slots["precision"].scale if "precision" in new.slots else 0.0)
                found[name] = (kept, *map(float, numbers))
    return found


def test_decisions_about_an_update_are_those_of_all(world2):
    first, second = world2.run(decisions)
    assert first.keys() == second.keys()
    for name, (kept, loss, scale) in first.items():
        assert kept, name
        assert second[name][0], name
        assert math.isnan(loss), name
        assert scale == second[name][2] == (2.0**15 if "fp16" in name else 0.0)


def published():
    """What the Runner publishes of a run whose rows have a NaN on one process."""
    found = []
    for holder in (0, 1):
        batch = part(batches(1, 8, torch.float32)[0], (4, 4), distributed.rank())
        if distributed.rank() == holder:
            batch["x"][1, 1] = math.nan
        rows = lm.data.per_rank([batch])
        runner = lm.Runner(step, transforms=[lm.guard("skip"), ddp()], progress=False, log_every=1)
        numbers = runner.fit(make_state("mlp", torch.float32), rows, until=lm.Steps(1)).metrics
        checked = lm.evaluate(lambda state, batch: step(state, batch)[1], make_state("mlp", torch.float32), rows)
        found += [numbers["train/most"], numbers["train/least"], checked["most"], checked["least"]]
    return found


def test_published_numbers_are_nan(world2):
    for found in world2.run(published):
        assert all(map(math.isnan, found))
