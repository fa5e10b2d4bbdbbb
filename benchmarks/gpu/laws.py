"""A sample of the laws of tests/laws, on the device: for each transform, some jobs in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lumen as lm
from benchmarks.gpu.check import Checks, Setting
from benchmarks.gpu.jobs import deterministic
from tests.laws.models import Job
from tests.laws.table import LAWS, PAIRS
from tests.laws.test_transforms import check as holds

checks = Checks()


@dataclass(frozen=True)
class DeviceJob(Job):
    """A job with its model and its batches on a device."""

    device: str = "cpu"

    def module(self) -> nn.Module:
        """The module, on the device."""
        return super().module().to(self.device)

    def batch(self, number: int = 0, rows: int | None = None) -> Any:
        """The batch, on the device."""
        return lm.tree.map(lambda x: x.to(self.device), super().batch(number, rows))


def sample(setting: Setting) -> list[Job]:
    """Jobs of every model, form, loss and optimizer."""
    device = str(setting.device)
    jobs: list[Job] = [
        DeviceJob("attention", "nested", "masked", device=device),
        DeviceJob("mlp", device=device),
        DeviceJob("conv_bn_train", "tuple", "scalar", "sgd", device=device),
        DeviceJob("conv_bn_eval", rows=6, seed=4, device=device),
        DeviceJob("tied", "tuple", rows=7, optimizer="sgd", seed=3, device=device),
    ]
    return setting.pick(jobs, jobs[:1])


def _add(name: str) -> None:
    @checks(name, seconds=40)
    def law(setting: Setting) -> dict[str, Any]:
        deterministic()
        rule = LAWS[name]
        jobs = [job for job in sample(setting) if rule.suits(job)]
        for job in jobs:
            holds(lm.compose(rule.make()), job, rule.exact)
        return {"jobs": len(jobs)}


for _name in LAWS:
    _add(_name)


@checks("pairs", seconds=90)
def pairs(setting: Setting) -> dict[str, Any]:
    """Every third lawful pair of transforms, on one job."""
    deterministic()
    job = sample(setting)[0]
    tried = PAIRS[:: setting.pick(3, 40)]
    failures = []
    for outer, inner in tried:
        a, b = LAWS[outer], LAWS[inner]
        if a.suits(job) and b.suits(job):
            try:
                holds(lm.compose(a.make(), b.make()), job, a.exact and b.exact)
            except (AssertionError, RuntimeError) as error:
                torch.zeros((), device=setting.device)  # raises if the device is gone
                failures.append(f"{outer}>{inner}: {str(error)[:200]}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(tried)} pairs: {'; '.join(failures)}")
    return {"pairs": len(tried)}
