"""`lm.donate`: update the state in place."""

from __future__ import annotations

from typing import Any

from lumen.core import rules
from lumen.core.donation import check_successor, check_unaliased, release, retire
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform
from lumen.optim._base import clone


class donate(Transform):
    """Reuse the memory of the old state for the new one, without copying params and optimizer state.

    In eager mode the optimizer's fused kernel updates the state's tensors in place; under `lm.compile` new values are
    written back into them. The state passed to the step becomes invalid: any further use raises `DonatedError`, and so
    does a use of its params or optimizer state inside the step after `apply_gradients`. The grads of the last update
    stay alive until the next step begins, as in a plain PyTorch loop.

    Law: `donate()(step) == step`, bitwise in eager mode for optimizers with a fused kernel.

    `init` copies the state once, so that the original module keeps its own params. Raises `DonatedError` if two leaves
    share memory, such as a target network that was set without a copy.

    >>> import lumen as lm
    >>> lm.donate()
    lm.donate()
    """

    name = "donate"
    level = "donate"
    reason = "donate replaces the update, so transforms that change grads or observe the update must be outside it"
    donates = True

    def init(self, state: Any) -> Any:
        """A copy of the state that shares no memory with other objects."""
        return clone(state)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with updates in place."""
        last_grads: list[Any] = []

        def update_in_place(next: Next, call: UpdateCall) -> tuple[Any, Any]:
            if not rules.is_tracing():
                last_grads.append(call.grads)
            # Not by `replace`, which takes longer than the rest of this rule.
            return next(UpdateCall(call.tx, call.grads, call.opt_state, call.params, call.skip, donate=True))  # type: ignore[no-any-return]

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            # Grads live until the next step begins, as in a loop that calls zero_grad there. If a step freed all memory
            # that it allocated, the C library would return it to the system, and the next step would fault every page
            # in again: 2% of a small GPT's step.
            last_grads.clear()
            with rules.rule_context({Primitive.UPDATE: update_in_place}):
                return step(state, batch)

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """Check that no two leaves share memory, and retire the old state."""
        checked = False

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal checked
            if not checked:
                check_unaliased(state)
                checked = True
            new, metrics = step(state, batch)
            metrics = release(metrics, check_successor(new) if hasattr(new, "_fields_") else check_unaliased(new))
            if new is not state:
                retire(state)
            return new, metrics

        return run
