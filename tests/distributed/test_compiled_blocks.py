"""Compiled blocks under ddp and fsdp: the numbers of one process on all rows."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import test_compiled
from tests.distributed.test_compiled import EMPTY, STACK, UNEVEN
from tests.tiers import pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def check(world, cases, backend="eager"):
    test_compiled.check(world, cases, backend, 3, torch.float64, True)


@pytest.mark.parametrize("model", ["deep", "mlp"])
def test_under_ddp_on_parts_is_the_whole(model, world2):
    check(world2, [("ddp", {"bucket_mb": 2e-4}, model, around, UNEVEN) for around in pick([STACK], [[], STACK])])
    check(world2, [("ddp", {}, model, [], EMPTY)])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_fsdp_on_parts_is_the_whole(stage, world2):
    """Also where a process has no rows, and where activations are computed anew."""
    cases = [("fsdp", {"stage": stage}, "deep", around, UNEVEN) for around in pick([STACK], [[], STACK])]
    cases += [("fsdp", {"stage": stage}, "stack", [], UNEVEN), ("fsdp", {"stage": stage}, "deep", [], EMPTY)]
    check(world2, cases)


def test_by_inductor(world2):
    strategies = pick(["fsdp"], ["ddp", "fsdp"])
    check(world2, [(strategy, {}, "deep", ["clip", "donate"], UNEVEN) for strategy in strategies], "inductor")
