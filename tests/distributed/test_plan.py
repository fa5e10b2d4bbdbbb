"""`lm.plan` against real runs: the same watch over tensors with values, in processes that really send."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import lumen as lm
from lumen.core import world
from lumen.parallel.plan_run import observed, planned
from tests.distributed import fsdp_models, models  # noqa: F401

pytestmark = pytest.mark.distributed

STRATEGIES = {
    "ddp": lambda: lm.ddp(bucket_mb=0.002),
    "zero1": lambda: lm.fsdp(level=1),
    "zero2": lambda: lm.fsdp(level=2),
    "zero3": lambda: lm.fsdp(),
    "bf16": lambda: lm.fsdp(gather="bf16"),
    "hsdp": lambda: lm.fsdp(lm.mesh(shard=2, data=-1)),
}
models.MODELS["wide"] = lambda: nn.Sequential(
    nn.Linear(models.WIDTH, 64), *[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)], nn.Linear(64, 3)
)
INSIDE = [[], ["donate"], ["accumulate", "clip", "donate"]]


def made(strategy, model, inside, rows=32):
    def make():
        state = models.make_state(model, torch.float32, lm.optim.adamw(1e-3))
        stack = [STRATEGIES[strategy](), *models.transforms(inside)]
        return lm.compose(*stack)(models.step), state, models.batches(1, rows, torch.float32)[0]

    return make


def facts(seen):
    sent = Counter((each.kind, each.nbytes, each.ranks) for each in seen.watch.sent if each.stage == "step")
    peaks = {stage: seen.watch.memory.peak(stage).nbytes for stage in ("init", "first step", "step")}
    flops = sum(each.flops for each in seen.watch.work if each.stage == "step")
    return peaks, sent, flops


def measured(cases):
    """What each case holds and sends on this process."""
    return [facts(observed(made(*case), world.world_size(), world.rank())) for case in cases]


CASES = [*itertools.product(["ddp", "zero1", "zero2", "zero3"], ["wide", "deep"], INSIDE)]
CASES += [("bf16", "deep", []), ("hsdp", "deep", ["accumulate"])]


def check(size, found):
    for rank in {0, size - 1}:
        answers = found[rank]
        for case, (peaks, sent, flops) in zip(CASES, answers, strict=True):
            plan_peaks, plan_sent, plan_flops = facts(
                planned(functools.partial(made, *case), size, None, rank, gloo=True)
            )
            for stage, peak in peaks.items():
                assert plan_peaks[stage] == pytest.approx(peak, rel=0.1), (case, stage, rank)
            assert plan_sent == sent, (case, rank)
            assert plan_flops == flops, (case, rank)


@pytest.mark.parametrize("size", [2, 4])
def test_a_plan_holds_and_sends_what_a_run_does(worlds, size):
    check(size, worlds(size).run(measured, CASES))
