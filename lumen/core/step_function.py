"""What a user's function must be to serve as a step, and what its first error may mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lumen.errors import StepError


def check_takes_state_and_batch(step: Callable[..., Any]) -> None:
    """Raise `StepError` for a step whose signature cannot be called as `step(state, batch)`."""
    try:
        parameters = inspect.signature(step).parameters
    except (TypeError, ValueError):  # a builtin
        return
    name, names = getattr(step, "__name__", type(step).__name__), [*parameters]
    try:
        inspect.Signature([*parameters.values()]).bind(None, None)
    except TypeError:
        pass
    else:
        if names[:2] != ["batch", "state"]:
            return
    raise StepError(
        f"the step {name} takes ({', '.join(names)}); it is called with a state and a batch, in this order."
        f" Write: def {name}(state, batch):"
    )


@contextmanager
def explained() -> Iterator[None]:
    """Add a note to torch's error about a step that calls `loss.backward()`."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" in str(error) and not getattr(error, "__notes__", ()):
            error.add_note(
                "the params of a state are constants outside of lm.value_and_grad. In place of loss.backward() write"
                " loss, grads = lm.value_and_grad(loss_fn)(state.params, batch). A derivative in an input needs"
                " x = x.detach().requires_grad_() and create_graph=True, or torch.func.grad"
            )
        raise


def not_a_pair(name: str, out: Any) -> StepError:
    """What is raised for a step that did not return a state and metrics."""
    got = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"one value, {type(out).__name__}"
    return StepError(
        f"the step {name} must return (state, metrics), but returned {got}."
        " Write: return state, {} where there is nothing to report."
    )
