"""`export(init(state))` is the identity, for every transform: slots go, nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

import lumen as lm

from .models import STEADY, Job, assert_same, jobs
from .table import LANES, LAWS, PAIRS


def assert_plain_again(stack: Any, job: Job) -> None:
    state = job.state()
    step = stack(job.step)
    back = step.export(step.init(state))
    lanes = back if isinstance(back, list) else [back]
    assert len(lanes) == (LANES if any(t.level == "ensemble" for t in step.transforms) else 1)
    for lane in lanes:
        # The lanes of an ensemble differ in their seed.
        expected = state if lane is back else state.replace(seed=lane.seed)
        assert lm.tree.structure(lane) == lm.tree.structure(state)
        assert not [
            path
            for (path, a), (_, b) in zip(lm.tree.named_tensors(lane), lm.tree.named_tensors(expected), strict=True)
            if not torch.equal(a, b) or a.dtype != b.dtype
        ]


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=5)
@given(job=jobs(STEADY))
def test_one_transform(name: str, job: Job) -> None:
    assert_plain_again(LAWS[name].make(), job)


@pytest.mark.parametrize(("outer", "inner"), PAIRS, ids=[">".join(pair) for pair in PAIRS])
def test_pair(outer: str, inner: str) -> None:
    assert_plain_again(lm.compose(LAWS[outer].make(), LAWS[inner].make()), Job(model="conv_bn_train"))


def test_loss_scale_leaves_no_slot() -> None:
    job = Job()
    policy = lm.Policy(None, torch.float64, torch.float64, loss_scale=8.0)
    step = lm.precision(policy)(job.step)
    state = step.init(job.state())
    assert set(state.slots) == {"precision"}
    assert step.export(state).slots == {}


def test_donated_memory_is_its_own() -> None:
    state = Job().state()
    copied = lm.donate().init(state)
    assert_same(copied, state, exact=True)
    assert not {t.data_ptr() for t in lm.tree.leaves(copied)} & {t.data_ptr() for t in lm.tree.leaves(state)}


def test_export_keeps_foreign_slots() -> None:
    state = Job().state().replace(slots={"mine": torch.tensor(1)})
    step = lm.ema(0.9)(Job().step)
    assert set(step.export(step.init(state)).slots) == {"mine"}
