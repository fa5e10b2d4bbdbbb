"""`lm.donate`: update in place, in the memory of the state that is handed in."""

from __future__ import annotations

from typing import Any

from lumen.core import rules
from lumen.core.donation import check_successor, check_unaliased, is_retired, release, retire
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform
from lumen.optim._base import clone


class donate(Transform):
    """Hand the state's memory over to its successor: no copy of params and optimizer state is made.

    In eager mode the optimizer's fused kernel works on the state's own tensors; under `lm.compile` the new values are
    written back into them. The state that was handed in is dead: any further use raises `DonatedError`, inside the
    step too, once `apply_gradients` has run.

    Law: `donate()(step) == step`; bitwise in eager mode for optimizers with a fused kernel.

    The grads of the last update are kept until the next step begins, as they are in a plain PyTorch loop.

    `init` copies the state once, so that the module it came from keeps its own params. Raises `DonatedError` where two
    leaves share memory (a target network set without a copy, say).

    >>> import lumen as lm
    >>> lm.donate()
    lm.donate()
    """

    name = "donate"
    level = "donate"
    reason = "donate replaces the update itself, so whatever changes grads or watches the update must be outside it"
    donates = True

    def init(self, state: Any) -> Any:
        """A copy of the state that owns its memory."""
        return clone(state)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its updates in place."""

        last_grads: list[Any] = []

        def update_in_place(next: Next, call: UpdateCall) -> tuple[Any, Any]:
            if not rules.is_tracing():
                last_grads.append(call.grads)
            # Built anew rather than by `replace`, which costs more than the rule itself.
            return next(UpdateCall(call.tx, call.grads, call.opt_state, call.params, call.skip, donate=True))  # type: ignore[no-any-return]

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            # Grads live until the next step begins, as in a loop that calls zero_grad there. Were all that a step
            # allocates free when it ends, the C library would give the memory back to the system, and the next step
            # would fault every page in again: 2% of a small GPT's step.
            last_grads.clear()
            with rules.rule_context({Primitive.UPDATE: update_in_place}):
                return step(state, batch)

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """Check that memory is shared by no two leaves, and retire the old state."""
        checked = False

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal checked
            if not checked:
                check_unaliased(state)
                checked = True
            new, metrics = step(state, batch)
            metrics = release(metrics, check_successor(new) if hasattr(new, "_fields_") else check_unaliased(new))
            if new is not state and not is_retired(state):
                retire(state)
            return new, metrics

        return run
