"""`lm.clip`: bound the gradient before the update."""

from __future__ import annotations

from typing import Any

from lumen import tree
from lumen.core import rules
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform
from lumen.errors import HyperparameterError
from lumen.optim._clip import clip_entries, clipped
from lumen.optim._hyperparams import check_scalar


class clip(Transform):
    """Scale the grads of each update down to a global L2 `norm`, or clamp every entry to [-value, value].

    The norm is taken over all leaves together, after accumulation and unscaling, except leaves that `lm.optim.freeze`
    keeps constant. Declared change: grads above the bound. With a norm, grads are multiplied by
    `min(1, norm / (global_norm + 1e-6))`, as in `torch.nn.utils.clip_grad_norm_`.

    >>> import lumen as lm
    >>> lm.clip(1.0), lm.clip(value=0.5)
    (lm.clip(1.0), lm.clip(value=0.5))
    """

    name = "clip"
    level = "clip"
    reason = "ema and donate need the update that results from clipped grads"

    def __init__(self, norm: float | None = None, *, value: float | None = None) -> None:
        if (norm is None) == (value is None):
            raise HyperparameterError(
                f"clip takes a norm or a value, got norm={norm!r}, value={value!r}."
                " Write lm.clip(1.0), or lm.clip(value=0.5)."
            )
        self.norm = norm
        self.value = value
        check_scalar(*(("norm", norm) if norm is not None else ("value", value)), schedule=False)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with clipped grads."""
        return rules.with_rules({Primitive.UPDATE: self._rule}, step)

    def _rule(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        leaves = tree.leaves(call.grads)
        if leaves and self.name in getattr(leaves[0], "does", ()):  # an engine owns these grads, and clips them itself
            return next(call)  # type: ignore[no-any-return]
        return next(call.replace(grads=self._bounded(call, leaves)))  # type: ignore[no-any-return]

    def _bounded(self, call: UpdateCall, leaves: list[Any]) -> Any:
        if self.value is not None:
            return clip_entries(call.grads, self.value)
        assert self.norm is not None
        norms = None if call.norms is None else call.norms.of(leaves)
        unused_fn = getattr(call.tx, "unused_fn", None)
        return clipped(call.grads, self.norm, norms, None if unused_fn is None else unused_fn(call.params))
