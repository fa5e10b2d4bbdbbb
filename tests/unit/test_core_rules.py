"""The rule stack: order, nesting, and what holds inside a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lumen as lm
from benchmarks import calls
from lumen.core import rules
from lumen.core.rules import Primitive


def said(name: str, log: list[str]) -> Any:
    def rule(next: Any, call: Any) -> Any:
        log.append(name)
        return next(call)

    return rule


def test_the_outermost_rule_sees_a_call_first() -> None:
    log: list[str] = []
    with (
        rules.rule_context({Primitive.UPDATE: said("outer", log)}),
        rules.rule_context({Primitive.UPDATE: said("inner", log)}),
    ):
        assert rules.bind(Primitive.UPDATE, lambda call: call + 1, 1) == 2
    assert log == ["outer", "inner"]


def test_a_rule_may_call_on_several_times_or_never() -> None:
    with rules.rule_context({Primitive.APPLY: lambda next, call: next(call) + next(call)}):
        assert rules.bind(Primitive.APPLY, lambda call: call, 3) == 6
    with rules.rule_context({Primitive.APPLY: lambda next, call: "mine"}):
        assert rules.bind(Primitive.APPLY, lambda call: call, 3) == "mine"


def test_rules_leave_with_an_exception() -> None:
    def fails() -> None:
        with rules.rule_context({p: lambda next, call: next(call) for p in Primitive}):
            assert set(rules.depth().values()) == {1}
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert set(rules.depth().values()) == {0}


def test_inside_a_loss_only_apply_rules_hold() -> None:
    log: list[str] = []
    with (
        rules.rule_context({p: said(p.name, log) for p in Primitive}),
        rules.inside_loss,
    ):
        for primitive in Primitive:
            rules.bind(primitive, lambda call: call, None)
    assert log == ["APPLY"]


def test_a_failing_loss_leaves_no_marker() -> None:
    def loss_fn(params: Any, batch: Any) -> Any:
        assert rules.is_inside_loss()
        raise KeyError

    for engine in ("autograd", "func"):
        with pytest.raises(KeyError):
            lm.value_and_grad(loss_fn, engine=engine)({"w": torch.ones(1)}, torch.ones(1))
        assert not rules.is_inside_loss()


def test_a_failing_step_leaves_no_rules() -> None:
    def step(state: Any, batch: Any) -> Any:
        raise KeyError

    stack = lm.compose(lm.guard(), lm.clip(1.0), lm.donate(), lm.accumulate(2), lm.precision("bf16"))(step)
    state = stack.init(lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1)))
    with pytest.raises(KeyError):
        stack(state, torch.ones(2, 1))
    assert set(rules.depth().values()) == {0}
    assert rules.current_step() is None


def test_a_plain_step_makes_few_calls() -> None:
    copies = "core/_torch_compat.py"  # torch 2.11's, of one tensor after the other
    files = [name for name in calls.counted(lm.compose()) if name != copies]
    assert len(files) <= 60, "python -m benchmarks.calls"
    assert len(set(files)) <= 9  # one of them for the user's own lm.Mean
    assert len({*calls.counted(lm.compose(), calls.scalar_step)} - {copies}) <= 8
