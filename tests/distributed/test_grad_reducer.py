"""Every `GradReducer` sums the same gradients, and a unit's plan sends what the layout of shards says."""

from __future__ import annotations

import pytest
import torch

from lumen.core import distributed
from lumen.parallel.comm.buckets import BucketPlanCache, Buckets, GradComm
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.deepspeed.grad_reduction import EngineReducer
from lumen.parallel.fsdp.grad_reduction import ShardReducer, UnitReducer
from lumen.parallel.fsdp.shard import ShardLayout, gather, reduce_scatter
from lumen.parallel.fsdp.unit_plan import UnitPlan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SHAPES = [(), (3,), (4, 2), (1, 3), (5, 0), (2, 2), (7,)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float32, torch.bfloat16]


def layout_and_grads():
    group = mesh(shard=2, device="cpu").group("shard")
    generator = torch.Generator().manual_seed(distributed.rank())
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    return ShardLayout(group, None, group), grads


def planned_and_plain():
    """The collectives of a plan, beside those that work out each message anew."""
    layout, tensors = layout_and_grads()
    shapes = [tensor.shape for tensor in tensors]
    shards = [layout.shard(tensor) for tensor in tensors]
    plan, buffers = UnitPlan(layout, shapes, DTYPES, None), []
    found = [*plan.reduce_scatter(tensors), *plan.receive(plan.all_gather(shards), buffers)]
    for buffer in buffers:
        buffer.untyped_storage().resize_(0)
    again = plan.receive(plan.all_gather(shards), buffers)
    wanted = [*reduce_scatter(layout, tensors), *gather(layout, shards, shapes)]
    pairs = [*zip(found, wanted, strict=True), *zip(again, wanted[len(tensors) :], strict=True)]
    return [(a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a, b) for a, b in pairs]


def test_a_plan_sends_what_the_layout_says(world2):
    assert world2.run(planned_and_plain) == [[True] * 3 * len(SHAPES)] * 2


def sums_of_all():
    """What each reducer makes of the same gradients and the same stats."""
    layout, grads = layout_and_grads()
    comm = GradComm(layout.row_group)
    stats = [torch.ones(2) * (distributed.rank() + 1), torch.tensor(5.0)]
    buckets = Buckets(comm, BucketPlanCache(comm, 2**20), overlap=False)
    sums, all_stats = zip(
        *[r.finish([g.clone() for g in grads], stats) for r in (buckets, ShardReducer(layout))], strict=True
    )
    shards = UnitPlan(layout, [g.shape for g in grads], DTYPES, None).reduce_scatter(grads)
    units, unit_stats = UnitReducer(layout).finish(shards, stats)
    none, engine_stats = EngineReducer(comm).finish(grads, stats)
    close = [torch.allclose(layout.shard(a).float(), b.float(), atol=0.05) for a, b in zip(*sums, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(sums[1], units, strict=True)]
    return close + same, [t.tolist() for t in (*all_stats, unit_stats, engine_stats)], none


def test_all_reducers_sum_the_same(world2):
    for agrees, all_stats, none in world2.run(sums_of_all):
        assert agrees == [True] * 2 * len(SHAPES)
        assert all_stats == [[3.0, 3.0, 10.0]] * 4
        assert none == []
