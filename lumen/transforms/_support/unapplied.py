"""A warning for steps that never apply the model, for transforms that act where it is applied."""

from __future__ import annotations

import warnings
from typing import Any

from lumen.core import rules
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform
from lumen.errors import InexactWarning


class Unapplied:
    """Warns once about a step that never calls `state.apply`, where `transform` acts.

    >>> import lumen as lm, torch
    >>> unapplied = Unapplied(lm.remat(), lambda state, batch: (state, {}))
    """

    def __init__(self, transform: Transform, step: StepFn, effect: str = "changed nothing") -> None:
        self._transform, self._effect = transform, effect
        self._name = getattr(step, "__name__", type(step).__name__)
        self._warned = False

    def warn(self) -> None:
        """Warn, unless it has warned before."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self._transform!r} {self._effect} in the step {self._name}, which never calls state.apply: the transform"
            " acts where the model is applied. Write: out, buffers = state.apply(params, x) instead of"
            " torch.func.functional_call(net, params, x), net(x), or a function of params.",
            InexactWarning,
            stacklevel=3,
        )


def with_apply_rule(transform: Transform, step: StepFn, rule: Rule) -> StepFn:
    """`step` with `rule` wherever the model is applied, and one warning if it never is."""
    unapplied = Unapplied(transform, step)

    def run(state: Any, batch: Any) -> Any:
        applied = False

        def recording(next: Next, call: Any) -> Any:
            nonlocal applied
            applied = True
            return rule(next, call)

        with rules.rule_context({Primitive.APPLY: recording}):
            result = step(state, batch)
        if not applied:
            unapplied.warn()
        return result

    return run
