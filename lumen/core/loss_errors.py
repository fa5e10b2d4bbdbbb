"""What is raised for a loss, or for params, that cannot be differentiated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core.primitives import GradientCall
from lumen.errors import LossError, ParamsError


def not_a_scalar(loss: Any, call: GradientCall) -> LossError:
    """For a loss function that returned something else than a loss."""
    if isinstance(loss, tuple) and not call.has_aux:
        hint = "It returned several values: write lm.value_and_grad(loss_fn, has_aux=True)."
    elif isinstance(loss, Tensor) and loss.dim() > 0:
        hint = "For one loss per row write: lm.Mean.of(losses), or losses.mean()."
    elif loss is None:
        hint = "Is a return missing? A model of transformers computes a loss only for a batch with 'labels'."
    elif isinstance(getattr(loss, "loss", None), Tensor):
        hint = "Write: return out.loss"
    else:
        hint = "Return a floating scalar tensor, or lm.Mean.of(losses)."
    return LossError(f"the loss must be a scalar tensor or an lm.Mean, not {described(loss)}. {hint}")


def check_params(leaves: list[Any], params: Any) -> None:
    """Raise `ParamsError` where there is no leaf, or one that is no floating tensor."""
    if not leaves:
        raise ParamsError("there is nothing to differentiate: params is an empty tree.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            path = next(path for path, other in zip(tree.paths(params), leaves, strict=True) if other is leaf)
            raise ParamsError(
                f"params[{path!r}] is {described(leaf)}; only floating tensors can be differentiated."
                " Keep integers among the buffers, or pass them as a further argument."
            )


def independent_of(call: GradientCall) -> LossError:
    """What is raised where a loss has no gradient."""
    name = getattr(call.loss_fn, "__qualname__", repr(call.loss_fn))
    return LossError(
        f"the loss of {name} does not depend on params, so it has no gradient. Compute it from the params that"
        " the function is given: out, buffers = state.apply(params, x), not net(x), and no .detach() or torch.no_grad()"
        " on the way."
    )


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"an object of type {type(value).__name__}" if hasattr(value, "loss") else f"{value!r:.60}"
