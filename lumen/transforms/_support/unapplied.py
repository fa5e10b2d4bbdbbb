"""Saying so where a transform that acts on the model's application found none in a step."""

from __future__ import annotations

import warnings
from typing import Any

from lumen.core import rules
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform
from lumen.errors import InexactWarning


class Unapplied:
    """Warns once for a step that never calls `state.apply`, on whose calls `transform` acts.

    >>> import lumen as lm, torch
    >>> said = Unapplied(lm.remat(), lambda state, batch: (state, {}))
    """

    def __init__(self, transform: Transform, step: StepFn, does: str = "changed nothing") -> None:
        self._transform, self._does = transform, does
        self._name = getattr(step, "__name__", type(step).__name__)
        self._warned = False

    def warn(self) -> None:
        """Say it, once."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self._transform!r} {self._does} in the step {self._name}, which never calls state.apply: it acts on the"
            " model where that is applied. Write: out, buffers = state.apply(params, x) in place of"
            " torch.func.functional_call(net, params, x), net(x), or a function of params.",
            InexactWarning,
            stacklevel=3,
        )


def applying(transform: Transform, step: StepFn, rule: Rule) -> StepFn:
    """`step` with `rule` for the model's application, and one warning where it never comes to that."""
    unapplied = Unapplied(transform, step)

    def run(state: Any, batch: Any) -> Any:
        applied = False

        def noted(next: Next, call: Any) -> Any:
            nonlocal applied
            applied = True
            return rule(next, call)

        with rules.rule_context({Primitive.APPLY: noted}):
            answer = step(state, batch)
        if not applied:
            unapplied.warn()
        return answer

    return run
