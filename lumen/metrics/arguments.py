"""The arguments of a metric's update: detached from autograd, counted in rows, and tied to the lanes of vmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat, rules


def detach(node: Any, tensors: list[Tensor]) -> Any:
    """The same arguments detached from autograd; appends their tensors to `tensors`."""
    kind = type(node)
    if isinstance(node, Tensor):
        tensors.append(node)
        return node.detach()
    if kind is tuple or kind is list:
        return kind([detach(child, tensors) for child in node])
    if kind is dict:
        return {key: detach(child, tensors) for key, child in node.items()}
    return node


def have_no_rows(args: Sequence[Any]) -> bool:
    """Whether all arguments of an update that can have rows have none."""
    counts = [count for arg in args if (count := _row_count(arg)) is not None]
    return bool(counts) and not any(counts)


def _row_count(arg: Any) -> int | None:
    """The number of rows of an argument: the first dim of a tensor, or the length of a list; None for other values."""
    if isinstance(arg, Tensor):
        return arg.shape[0] if arg.dim() else None
    if isinstance(arg, Mapping):
        return max((count for item in arg.values() if (count := _row_count(item)) is not None), default=None)
    return len(arg) if isinstance(arg, list | tuple) else None


def in_transform() -> bool:
    """Whether a torch.func transform such as vmap is active, under which tensors have no single concrete value."""
    return _torch_compat.peek_interpreter_stack() is not None


def lane_zero_of(tensors: list[Tensor]) -> Tensor | None:
    """Under a torch.func transform, a zero that varies over lanes like the arguments.

    Metrics add to their states in place, which vmap allows only if the state varies over the lanes too.
    """
    if not in_transform():
        return None
    zero = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        zero = zero + tensor.detach().new_zeros((), dtype=torch.int64)
    return zero


def concrete_count(updates: Tensor) -> int:
    """The number of updates, or 1 if it is not concrete; torchmetrics warns if compute precedes any update."""
    if rules.is_tracing() or in_transform():
        return 1
    return int(updates)
