"""Compiled blocks under ddp, fsdp and tensor parallelism: the numbers of one process on all rows."""

from __future__ import annotations

import warnings

import pytest
import torch

import lumen as lm
from lumen.core import world
from tests.distributed.models import bare, batches, furthest, make_state, part, step, train, transforms
from tests.distributed.test_compiled import EMPTY, STACK, UNEVEN, spread
from tests.distributed.test_ddp import cut

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def law(cases, backend="eager", steps=3, dtype=torch.float64):
    """For each case how far the step on parts is from one process on all rows: losses, and furthest leaf."""
    warnings.simplefilter("error", lm.GraphBreakWarning)
    found = []
    for strategy, options, model, around, sizes in cases:
        whole = batches(steps, sum(sizes), dtype)
        inside = transforms(around)
        compiled = lm.compile(backend=backend, blocks=True)
        wrapped = lm.compose(compiled, spread(strategy, options), *inside)(step)
        losses, state = train(wrapped, make_state(model, dtype), [part(batch, sizes, world.rank()) for batch in whole])
        norms = model in ("conv", "stack")  # which see the rows of one process
        wanted, other = train(lm.compose(*[cut(sizes)] * norms, *inside)(step), make_state(model, dtype), whole)
        leaves = bare(wrapped.transforms[1].export(state))
        found.append((float((losses - wanted).abs().max()), *furthest(leaves, bare(other))))
    return found


def check(world, cases, *settings, tolerance=1e-10):
    for found in world.run(law, cases, *settings):
        for case, (losses, worst, leaf) in zip(cases, found, strict=True):
            assert losses < tolerance, case
            assert worst < tolerance, (case, leaf)


@pytest.mark.parametrize("model", ["deep", "mlp"])
def test_under_ddp_on_parts_is_the_whole(model, world2):
    check(world2, [("ddp", {"bucket_mb": 2e-4}, model, around, UNEVEN) for around in ([], STACK)])
    check(world2, [("ddp", {}, model, [], EMPTY)])


@pytest.mark.parametrize("level", [1, 2, 3])
def test_under_fsdp_on_parts_is_the_whole(level, world2):
    """Also where a process has no rows, and where activations are computed anew."""
    cases = [("fsdp", {"level": level}, "deep", around, UNEVEN) for around in ([], STACK)]
    cases += [("fsdp", {"level": level}, "stack", [], UNEVEN), ("fsdp", {"level": level}, "deep", [], EMPTY)]
    check(world2, cases)


def test_by_inductor(world2):
    check(world2, [(strategy, {}, "deep", ["clip", "donate"], UNEVEN) for strategy in ("ddp", "fsdp")], "inductor")
