"""The law, `T(step)(state, batch) == step(state, batch)`: for every transform and every lawful pair."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
import lumen.transforms
from lumen.core import order
from tests.tiers import pick

from .models import STEADY, Job, assert_same, jobs, learned, some_jobs, train
from .table import LAWS, MAIN, PAIRS, STEPS, run


def all_transforms() -> set[type[lm.Transform]]:
    for module in pkgutil.iter_modules(lumen.transforms.__path__):
        importlib.import_module(f"lumen.transforms.{module.name}")
    found: set[type[lm.Transform]] = set()
    todo = [lm.Transform]
    while todo:
        for cls in todo.pop().__subclasses__():
            if cls.__module__.startswith("lumen.transforms."):
                found.add(cls)
            todo.append(cls)
    return found


def check(stack: Any, job: Job, exact: bool) -> None:
    """Each lane's state and the metrics under `stack` are those of the bare step."""
    expected, numbers = train(job.step, job.state(), job.batches(STEPS))
    lanes, metrics = run(stack, job)
    for lane in lanes:
        assert_same(learned(lane), learned(expected), exact=exact)
        assert lane.slots == {}
    for name, number in numbers.items():
        for value in metrics[name].reshape(-1):
            torch.testing.assert_close(value, number, rtol=1e-10, atol=1e-10)


ELSEWHERE = {
    lm.chunked_logits
}  # needs a model with a head, and a loss of its logits: tests/laws/test_chunked_logits.py


def test_every_transform_has_a_law() -> None:
    assert {type(law.make()) for law in LAWS.values()} | ELSEWHERE == all_transforms()


def test_every_level_has_a_law() -> None:
    apart = {"parallel", "context", "tensor", "pipeline"}  # theirs need worlds of processes: tests/distributed
    apart |= {kind.level for kind in ELSEWHERE}
    levels = {level for chain in order.CHAINS for level in chain} - apart
    assert {law.make().level for law in LAWS.values()} == levels


def test_every_level_stands_in_some_pair() -> None:
    assert {name for pair in PAIRS for name in pair} == set(MAIN)


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=15)
@given(data=st.data())
def test_one_transform(name: str, data: st.DataObject) -> None:
    law = LAWS[name]
    job = data.draw(jobs(STEADY).filter(law.suits))
    check(lm.compose(law.make()), job, law.exact)


@pytest.mark.parametrize(("outer", "inner"), PAIRS, ids=[">".join(pair) for pair in PAIRS])
def test_pair(outer: str, inner: str) -> None:
    """Each pair on jobs of its own: hypothesis would begin with the same simplest job for all."""
    a, b = LAWS[outer], LAWS[inner]
    for job in some_jobs(PAIRS.index((outer, inner)), pick(2, 20), lambda job: a.suits(job) and b.suits(job)):
        check(lm.compose(a.make(), b.make()), job, a.exact and b.exact)


TRACED = [pair for pair in PAIRS if "compile" not in pair]


@pytest.mark.parametrize(("outer", "inner"), TRACED, ids=[">".join(pair) for pair in TRACED])
def test_pair_traced(outer: str, inner: str) -> None:
    a, b = LAWS[outer], LAWS[inner]
    turn = TRACED.index((outer, inner)) % 2
    for optimizer in pick(["adamw", "sgd"][turn : turn + 1], ["adamw", "sgd"]):
        check(lm.compose(lm.compile(backend="eager"), a.make(), b.make()), Job(optimizer=optimizer), exact=False)
