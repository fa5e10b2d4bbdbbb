"""`lm.sam` on two processes: the perturbation is that of all rows, whoever has them and however they are sharded."""

from __future__ import annotations

import functools

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from lumen.parallel import Colwise, Rowwise
from lumen.parallel.tensor.tensor_parallel import tensor_parallel
from tests.distributed import fsdp_models
from tests.distributed.models import bare, batches, furthest, make_state, part, step, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

assert fsdp_models  # its models are registered where it is imported

SAM, ADAPTIVE = lm.sam(0.5), lm.sam(0.8, adaptive=True)
PLAN = {"0": Colwise(), "2": Rowwise()}
# By name: the model, what stands around sam, what inside of it, and the rows of each rank.
CASES = {
    "ddp": ("mlp", [], [lm.ddp()], [5, 3]),
    "ddp, no rows": ("outside", [], [lm.ddp(reduce_dtype=None)], [8, 0]),
    "ddp accumulate": ("mlp", [lm.donate()], [lm.ddp(), lm.accumulate(2)], [5, 3]),
    "fsdp 1": ("mlp", [], [lm.fsdp(stage=1)], [5, 3]),
    "fsdp 2": ("deep", [], [lm.fsdp(stage=2)], [5, 3]),
    "fsdp 2, no rows": ("outside", [lm.donate()], [lm.fsdp(stage=2)], [8, 0]),
    "fsdp 2 accumulate": ("mlp", [], [lm.fsdp(stage=2), lm.accumulate(2)], [5, 3]),
    "fsdp 3": ("deep", [], [lm.fsdp()], [5, 3]),
    "fsdp 3, no rows": ("outside", [lm.donate()], [lm.fsdp()], [8, 0]),
    "fsdp 3 accumulate": ("mlp", [], [lm.fsdp(), lm.accumulate(2)], [5, 3]),
    "ddp compile": ("mlp", [lm.compile(backend="eager")], [lm.ddp()], [5, 3]),
    "fsdp 2 compile": ("mlp", [lm.compile(backend="eager")], [lm.fsdp(stage=2)], [5, 3]),
    "fsdp 3 compile": ("mlp", [lm.compile(backend="eager")], [lm.fsdp()], [5, 3]),
}


def differences(names):
    """How far each case is from one process with all rows: the losses, and the furthest leaf."""
    found = {}
    for name in names:
        model, around, inside, sizes = CASES[name]
        for sam in (SAM, ADAPTIVE):
            whole = batches(3, sum(sizes))
            wrapped = lm.compose(*around, sam, *inside)(step)
            shares = [part(batch, sizes, distributed.rank()) for batch in whole]
            losses, state = train(wrapped, make_state(model), shares)
            wanted, other = train(sam(step), make_state(model), whole)
            state = wrapped.export(state)
            found[name, sam.adaptive] = float((losses - wanted).abs().max()), *furthest(bare(state), bare(other))
    return found


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(1, None, 2)], ids=["even", "odd"])
def test_the_perturbation_is_that_of_the_global_batch(part, world2):
    for found in world2.run(differences, [*CASES][part]):
        for case, (losses, worst, leaf) in found.items():
            assert losses < 1e-10, (case, losses)
            assert worst < 1e-10, (case, leaf, worst)


def tensor_parallel_difference():
    """How far shards of matrices are from one process."""
    mesh = lm.mesh(tensor=2, device="cpu")
    found = []
    for sam in (SAM, ADAPTIVE):
        whole = batches(3, 8)
        make = functools.partial(make_state, "mlp", tx=lm.optim.sgd(0.1))
        wrapped = lm.compose(sam, tensor_parallel(PLAN, mesh))(step)
        _, state = train(wrapped, make(), whole)
        _, other = train(sam(step), make(), whole)
        found.append(furthest(bare(wrapped.export(state)), bare(other)))
    return found


def test_shards_of_matrices_are_perturbed_as_the_full_ones(world2):
    for found in world2.run(tensor_parallel_difference):
        for worst, leaf in found:
            assert worst < 1e-10, (leaf, worst)


class Narrow(torch.nn.Module):
    """A row of each matrix, which only one of two ranks has."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(6, 1)

    def forward(self, x):
        return self.body(x) * torch.arange(1.0, 4.0, dtype=x.dtype)


def narrow():
    """How far the params are, of which one rank has a shard as large as the full tensor and the other none."""
    found = []
    for stage in (1, 2, 3):
        wrapped = lm.compose(SAM, lm.fsdp(stage=stage))(step)
        whole = batches(2, 8)

        def make():
            torch.manual_seed(0)
            return lm.TrainState.create(Narrow().double(), lm.optim.sgd(0.1))

        _, state = train(wrapped, make(), [part(batch, [5, 3], distributed.rank()) for batch in whole])
        _, other = train(SAM(step), make(), whole)
        found.append(furthest(bare(wrapped.export(state)), bare(other)))
    return found


def test_params_that_one_rank_has(world2):
    for found in world2.run(narrow):
        for worst, leaf in found:
            assert worst < 1e-10, (leaf, worst)
