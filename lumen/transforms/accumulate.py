"""`lm.accumulate`: one update from several microbatches, exactly."""

from __future__ import annotations

import math
from typing import Any

import torch

from lumen import tree
from lumen.core import gradient, rows, rules
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform
from lumen.errors import BatchError

_NARROW = (torch.float16, torch.bfloat16)


class accumulate(Transform):
    """Compute the gradient of a batch in `k` parts, or in parts of `microbatch` rows, and update once.

    The batch handed to the step stays the full batch of one optimizer step; only the memory for activations shrinks.

    Law: `accumulate(k)(step) == step`, up to the order of floating sums, for uneven parts and masked losses too
    (losses travel as totals and weights). BatchNorm in training mode sees one microbatch at a time, as it must:
    its running statistics are the mean of the parts' by rows, its counter advances once. Gradients of 16-bit params
    are summed in float32.

    Raises `BatchError` where the batch has fewer rows than `k`, or leaves with different leading sizes.

    >>> import lumen as lm
    >>> lm.accumulate(4), lm.accumulate(microbatch=8)
    (lm.accumulate(4), lm.accumulate(microbatch=8))
    """

    name = "accumulate"
    level = "accumulate"
    reason = "each microbatch must meet the transforms inside it, and those outside must see the whole batch once"

    def __init__(self, k: int | None = None, *, microbatch: int | None = None) -> None:
        given = [n for n in (k, microbatch) if n is not None]
        if len(given) != 1 or not isinstance(given[0], int) or isinstance(given[0], bool) or given[0] < 1:
            raise BatchError(
                f"accumulate takes one positive number, got k={k!r}, microbatch={microbatch!r}."
                " Write lm.accumulate(4) for four parts, or lm.accumulate(microbatch=8) for parts of 8 rows."
            )
        self.k = k
        self.microbatch = microbatch

    def __repr__(self) -> str:
        return f"lm.accumulate({self.k})" if self.k else f"lm.accumulate(microbatch={self.microbatch})"

    def wrap(self, step: StepFn) -> StepFn:
        """The step with gradients taken part by part."""
        return rules.under({Primitive.GRADIENT: self._rule}, step)

    def _rule(self, next: Next, call: GradientCall) -> Gradient:
        parts = []
        sums = None
        for microbatch in self._split(call.batch):
            part: Gradient = next(call.replace(batch=microbatch, summed=True))
            sums = _widen(part.grads) if sums is None else _add(sums, part.grads, own=len(parts) > 1)
            parts.append(part.replace(grads=None))
        total = rows.add_gradients(parts).replace(grads=_like(sums, call.params))
        return total if call.summed else gradient.normalized(total)

    def _split(self, batch: Any) -> list[Any]:
        size = rows.count(batch)
        if self.k is None:
            assert self.microbatch is not None
            leaves, spec = tree.flatten(batch)
            if size == 0:
                return [batch]
            cut = [x.split(self.microbatch) if isinstance(x, torch.Tensor) else None for x in leaves]
            if None not in cut:
                return [tree.unflatten(spec, piece) for piece in zip(*cut, strict=True)]
            return rows.split(batch, math.ceil(size / self.microbatch))
        if self.k > size:
            raise BatchError(
                f"accumulate({self.k}) cannot cut a batch of {size} rows into {self.k} parts of at least one row."
                f" Use lm.accumulate({max(size, 1)}) or fewer parts, lm.accumulate(microbatch=1), or a larger batch."
            )
        return rows.split(batch, self.k)


def _widen(grads: Any) -> Any:
    return tree.map(lambda g: g.float() if g.dtype in _NARROW else g, grads)


def _add(sums: Any, grads: Any, own: bool) -> Any:
    """`sums + grads`; in place once `sums` is a tensor of our own (autograd may hand out one tensor twice)."""
    held, spec = tree.flatten(sums)
    added = tree.leaves(grads)
    if torch._C._functorch.peek_interpreter_stack() is not None or any(g.requires_grad for g in added):
        return tree.unflatten(spec, [a + b for a, b in zip(held, added, strict=True)])
    if own:
        torch._foreach_add_(held, added)
        return sums
    return tree.unflatten(spec, torch._foreach_add(held, added))


def _like(grads: Any, params: Any) -> Any:
    return tree.map(lambda g, p: g.to(p.dtype), grads, params)
