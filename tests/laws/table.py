"""Each transform with settings under which it must change nothing, and what its law promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lumen as lm
from lumen.core import order

from .models import Job

LANES = 2
STEPS = 2


@dataclass(frozen=True)
class Law:
    """`T(step) == step` for one transform.

    `make` gives it with settings that change nothing, `exact` says that its docstring promises equality bit
    for bit in eager mode, `suits` which jobs it can be asked about.
    """

    make: Callable[[], Any]
    exact: bool = False
    suits: Callable[[Job], bool] = lambda job: True


def _one_by_one(job: Job) -> bool:
    return not job.kind.mixes_rows


LAWS = {
    "compile": Law(lambda: lm.compile(backend="eager")),
    "unroll": Law(lambda: lm.unroll(STEPS), exact=True),
    "seeded": Law(lm.seeded, exact=True),
    "ensemble": Law(lambda: lm.ensemble(LANES)),
    "sweep": Law(lambda: lm.sweep(seed=list(range(LANES)))),
    "accumulate": Law(lambda: lm.accumulate(3), suits=lambda job: _one_by_one(job) and job.rows >= 3),
    "accumulate(microbatch)": Law(lambda: lm.accumulate(microbatch=2), suits=_one_by_one),
    "dp_sgd": Law(lambda: lm.dp_sgd(clip=1e9, noise=0.0), suits=lambda job: _one_by_one(job) and job.loss != "masked"),
    "sam": Law(lambda: lm.sam(0.0), exact=True),
    "precision": Law(lambda: lm.precision("fp64")),
    "quantized_matmul": Law(lambda: lm.quantized_matmul("qat", layers=lambda name, module: False), exact=True),
    "remat": Law(
        lambda: lm.remat(lambda name, module: not list(module.children())),
        exact=True,
        suits=lambda job: job.model != "linear",  # which has no parts
    ),
    "remat(save)": Law(
        lambda: lm.remat(lambda name, module: not list(module.children()), save=lambda operator: True),
        exact=True,
        suits=lambda job: job.model != "linear",
    ),
    "guard": Law(lm.guard, exact=True),
    "guard(raise)": Law(lambda: lm.guard("raise"), exact=True),
    "guard(spike)": Law(lambda: lm.guard(spike=math.inf), exact=True),
    "clip": Law(lambda: lm.clip(1e9)),
    "ema": Law(lambda: lm.ema(0.9), exact=True),
    "donate": Law(lm.donate, exact=True),
}


def _composes(outer: str, inner: str) -> bool:
    try:
        order.check((LAWS[outer].make(), LAWS[inner].make()))
    except lm.LumenError:
        return False
    return True


# Variants of one transform are tried alone; pairs are made of one form each, and of every level's transform.
MAIN = tuple(name for name in LAWS if "(" not in name)
PAIRS = [pair for pair in itertools.permutations(MAIN, 2) if _composes(*pair)]


def run(stack: Any, job: Job) -> tuple[list[Any], Any]:
    """`STEPS` steps of `job` under `stack`: the exported state of each lane, and the metrics."""
    from .models import train

    step = stack(job.step)
    names = {t.name for t in step.transforms}
    batches = job.batches(STEPS)
    if "unroll" in names:
        batches = [lm.stack(batches)]
    state, metrics = train(step, step.init(job.state()), batches)
    state = step.export(state)
    return (state if "ensemble" in names else [state]), metrics
