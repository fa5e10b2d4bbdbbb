"""Sums of gradients: in float32 for 16-bit params, in place where the memory is owned, in groups elsewhere."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.dtypes import NARROW
from lumen.core.primitives import Gradient

Dtypes = list[torch.dtype] | None
_GROUP = 16 * 2**20  # bytes of sums to compute at once


def widened(grads: list[Tensor]) -> list[Tensor]:
    """Gradients of 16-bit params in float32."""
    return [g.float() if g.dtype in NARROW else g for g in grads]


def add(sums: list[Tensor], grads: list[Tensor], own: bool) -> None:
    """Replace `sums` by `sums + grads`, and empty `grads`.

    Adds in place once this module owns the memory of `sums` (autograd may return one tensor twice). Before that it adds
    a group of leaves at a time and frees their summands, so that three copies of all gradients never exist.
    """
    if _torch_compat.peek_interpreter_stack() is not None or any(map(attrgetter("requires_grad"), grads)):
        sums[:] = [a + b for a, b in zip(sums, grads, strict=True)]
    elif own:
        _torch_compat.foreach_add_(sums, grads)
    else:
        sums_so_far: list[Tensor] = []
        while sums:
            count = _leading(sums)
            sums_so_far += _torch_compat.foreach_add(sums[:count], grads[:count])
            del sums[:count], grads[:count]
        sums[:] = sums_so_far
    grads.clear()


def _leading(leaves: list[Tensor]) -> int:
    """How many of the first leaves to add at once."""
    size = 0
    for index, leaf in enumerate(leaves):
        size += leaf.nbytes
        if size > _GROUP:
            return max(index, 1)
    return len(leaves)


def rounded(total: Gradient, dtypes: Dtypes) -> Gradient:
    """`total` with grads in these dtypes; as it is for None."""
    if dtypes is None:
        return total
    grads, spec = tree.flatten(total.grads)
    return total.replace(grads=spec.unflatten([g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]))
