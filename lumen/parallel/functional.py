"""Collectives that give new tensors: while a step is traced they become nodes of its graph, else they run at once.

`torch.distributed`'s own write into tensors that they are given, through objects that a graph cannot hold. Its wrappers
around functional ones wait where they launch; here a launch and its wait are two nodes, so that what stands between
them in the graph runs meanwhile. Inductor keeps a graph's collectives in their order, which is what lets processes run
graphs that differ (they have other numbers of rows) and still meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core import rules
from lumen.parallel.opaque import Operator

Arrived = Callable[[], Tensor]  # waits, and gives the result

# Their names before torch 2.13, which warns of these.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_flatten: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors


def all_reduce(parts: Tensor | Sequence[Tensor], op: str, group: dist.ProcessGroup) -> Arrived:
    """The sum (`op="sum"`) or maximum (`op="max"`) over `group` of a tensor, or of several of one dtype as a flat one.

    It may lie in the memory of the one tensor.
    """
    if rules.is_tracing():
        shape = parts.shape if isinstance(parts, Tensor) else (-1,)
        flat = _JOINED([parts] if isinstance(parts, Tensor) else list(parts))
        return _waiting(_graph().all_reduce(flat, op, group.group_name), shape)
    flat = parts if isinstance(parts, Tensor) else _flatten(list(parts))
    reduce = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
    return _Pending(dist.all_reduce(flat, reduce, group, async_op=True), flat)


def all_gather(flat: Tensor, group: dist.ProcessGroup) -> Arrived:
    """The tensors of all processes, one after the other, as a new flat tensor."""
    size = dist.get_world_size(group)
    if rules.is_tracing():
        return _waiting(_graph().all_gather_into_tensor(flat, size, group.group_name), (-1,))
    out = flat.new_empty(size * flat.numel())
    return _Pending(_all_gather(out, flat, group=group, async_op=True), out)


def reduce_scatter(flat: Tensor, group: dist.ProcessGroup) -> Arrived:
    """The sum over `group` of this process's slice of `flat`, as a new tensor."""
    size = dist.get_world_size(group)
    if rules.is_tracing():
        return _waiting(_graph().reduce_scatter_tensor(flat, "sum", size, group.group_name), (-1,))
    out = flat.new_empty(flat.numel() // size)
    return _Pending(_reduce_scatter(out, flat, group=group, async_op=True), out)


def all_to_all(flat: Tensor, group: dist.ProcessGroup) -> Arrived:
    """From each process the slice of its tensor that is meant for this one, in their order."""
    if rules.is_tracing():
        size = dist.get_world_size(group)
        each = [flat.numel() // size] * size
        return _waiting(_graph().all_to_all_single(flat, each, each, group.group_name), (-1,))
    out = torch.empty_like(flat)
    return _Pending(dist.all_to_all_single(out, flat, group=group, async_op=True), out)


def _graph() -> Any:
    """The operators, whose shapes are known once this module has been imported."""
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def _waiting(pending: Tensor, shape: Sequence[int]) -> Arrived:
    return lambda: torch.ops._c10d_functional.wait_tensor(pending).view(shape)


class _Pending:
    """What waits for `work`, which holds on to the threads of its group and so is let go of: not kept by a closure, of
    which the frames of an error's traceback could not be cleared."""

    __slots__ = ("_out", "_work")

    def __init__(self, work: Any, out: Tensor) -> None:
        self._work, self._out = work, out

    def __call__(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._out


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])  # a copy, also of one tensor


def _joined_shell(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(sum(part.numel() for part in parts))


_JOINED = Operator("joined(Tensor[] parts) -> Tensor", _joined, _joined_shell)
