"""`lm.plan` against real runs: the same tracker over tensors with values, in processes that really send."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.planner.dry_run import trace_dry_run, trace_real_run
from lumen.planner.plan import plan_loaded
from tests import zygote
from tests.distributed import fsdp_models, models, plan_job  # noqa: F401
from tests.tiers import LONG, in_turns, pick

pytestmark = pytest.mark.distributed

STRATEGIES = {
    "ddp": lambda: lm.ddp(bucket_mb=0.002),
    "zero1": lambda: lm.fsdp(stage=1),
    "zero2": lambda: lm.fsdp(stage=2),
    "zero3": lambda: lm.fsdp(),
    "bf16": lambda: lm.fsdp(param_dtype="bf16"),
    "hsdp": lambda: lm.fsdp(lm.mesh(shard=2, data=-1)),
}


def staged(around=None, **settings):
    """A pipeline of two processes, maybe inside of a strategy over the others."""

    def make():
        axes = {} if around is None else {"data" if around is lm.ddp else "shard": -1}
        grid = lm.mesh(pipeline=2, **axes)
        rows = [] if around is None else [around(grid)]
        return lm.compose(*rows, lm.pipeline(grid, microbatches=4, **settings))(models.step).transforms

    return make


STAGED = {
    "1f1b": staged(),
    "interleaved": staged(stages=4, schedule="interleaved"),
    "ddp, 1f1b": staged(lm.ddp),
    "fsdp, 1f1b": staged(lm.fsdp),
}


def rows_of_layers():
    same = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(models.WIDTH, 64), *same, nn.Linear(64, 3))


models.register(planned=rows_of_layers)
INSIDE = [[], ["donate"], ["accumulate", "clip", "donate"]]
CASES = in_turns(["ddp", "zero1", "zero2", "zero3"], ["planned", "deep"], INSIDE)
CASES += [("bf16", "deep", []), ("hsdp", "deep", ["accumulate"])]


def made(strategy, model, inside, rows=32):
    def make():
        state = models.make_state(model, torch.float32, lm.optim.adamw(1e-3))
        stack = STAGED[strategy]() if strategy in STAGED else [STRATEGIES[strategy]()]
        stack = [*stack, *models.transforms(inside)]
        return lm.compose(*stack)(models.step), state, models.batches(1, rows, torch.float32)[0]

    return make


def facts(trace):
    """Peaks by stage, the collectives of a step, and its floating point operations."""
    sent = Counter((each.kind, each.nbytes, each.ranks) for each in trace.tracker.collectives if each.stage == "step")
    peaks = {stage: trace.tracker.memory.peak(stage).nbytes for stage in ("init", "first step", "step")}
    flops = sum(each.flops for each in trace.tracker.work if each.stage == "step")
    return peaks, sent, flops


def measured(cases):
    """What each case holds and sends on this process: real tensors, over Gloo.

    Of two looks the lower peak: Gloo's thread may let go of what it has sent a little late.
    """
    found = []
    for case in cases:
        (peaks, *rest), (again, *_) = (
            facts(trace_real_run(made(*case), distributed.world_size(), distributed.rank())) for _ in range(2)
        )
        found.append(({stage: min(peak, again[stage]) for stage, peak in peaks.items()}, *rest))
    return found


def check(size, rank, answers, cases):
    for case, (peaks, sent, flops) in zip(cases, answers, strict=True):
        plan_peaks, plan_sent, plan_flops = facts(
            trace_dry_run(functools.partial(made, *case), size, None, rank, gloo=size > 1)
        )
        for stage, peak in peaks.items():
            assert plan_peaks[stage] == pytest.approx(peak, rel=0.1), (case, stage, rank)
        if case[0] in STAGED:  # the last process also describes loss and aux, in a few bytes that a plan leaves out
            sent = Counter({key: times for key, times in sent.items() if key[0] != "broadcast" or key in plan_sent})
        assert plan_sent == sent, (case, rank)
        assert plan_flops == flops, (case, rank)


def test_a_plan_of_one_process_holds_what_it_does():
    cases = [case for case in CASES if case[0] in ("ddp", "zero3") and "clip" not in case[2]]
    check(1, 0, measured(cases), cases)


def test_a_plan_of_two_holds_and_sends_what_they_do(world2):
    for rank, answers in enumerate(world2.run(measured, CASES)):
        check(2, rank, answers, CASES)


def test_a_plan_of_four_holds_and_sends_what_they_do(world4):
    cases = pick([case for case in CASES if case[0] in ("ddp", "zero3", "hsdp")], CASES)
    found = world4.run(measured, cases)
    for rank in (0, 3):  # the last has the shorter parts
        check(4, rank, found[rank], cases)


def test_a_plan_of_each_stage_holds_and_sends_what_its_process_does(world2):
    cases = [("1f1b", "planned", ["donate"]), ("interleaved", "planned", ["clip"])]
    for rank, answers in enumerate(world2.run(measured, cases)):
        check(2, rank, answers, cases)


@pytest.mark.skipif(not LONG, reason="four processes: make test-all")
def test_a_plan_of_stages_and_rows_holds_and_sends_what_their_processes_do(world4):
    cases = [("ddp, 1f1b", "planned", ["clip"]), ("fsdp, 1f1b", "planned", ["donate"])]
    for rank, answers in enumerate(world4.run(measured, cases)):
        check(4, rank, answers, cases)


def grown(strategy, size):
    """How much the resident set of each process of a fresh world grows in its second step."""
    command = [sys.executable, plan_job.__file__, strategy]
    alone = {**os.environ, "PYTHONPATH": os.getcwd()}
    if size > 1:
        started = zygote.launch(command, size, env=alone, stdout=subprocess.PIPE)
    else:
        started = [zygote.start(command, env=alone, stdout=subprocess.PIPE)]
    try:
        return [int(each.communicate(timeout=200)[0]) for each in started]
    finally:
        for each in started:
            each.kill()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="looks at the resident set as Linux tells it")
@pytest.mark.parametrize(("strategy", "size"), [("alone", 1), ("ddp", 2), ("zero1", 2), ("ddp", 4)])
def test_the_resident_set_of_fresh_processes_grows_by_what_is_planned(strategy, size):
    found = plan_loaded(lambda: functools.partial(plan_job.make, strategy), world_size=size, device="cpu")
    for nbytes in grown(strategy, size):
        assert found.trace.tracker.memory.peak("step").nbytes == pytest.approx(nbytes, rel=0.1)
