"""Collectives that give new tensors: while a step is traced they become nodes of its graph, else they run at once.

`torch.distributed`'s own write into tensors that they are given, through objects that a graph cannot hold. Its wrappers
around functional ones wait where they launch; here a launch and its wait are two nodes, so that what stands between
them in the graph runs meanwhile. Inductor keeps a graph's collectives in their order, which is what lets processes run
graphs that differ (they have other numbers of rows) and still meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core import rules
from lumen.errors import AxisError
from lumen.parallel.opaque_ops import Operator

WaitFn = Callable[[], Tensor]  # waits, and gives the result

# Their names before torch 2.13, which warns of these.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_flatten: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_UNSUMMED = (torch.int16, torch.uint16, torch.uint32, torch.uint64)  # by Gloo
_WIDE = (torch.int64, torch.uint32)  # integers that need all of int64


def all_reduce(parts: Tensor | Sequence[Tensor], op: str, group: dist.ProcessGroup) -> WaitFn:
    """The sum, "max" or "min" (`op`) over `group` of a tensor, or of several of one dtype as a flat one.

    It may lie in the memory of the one tensor. A maximum or minimum is NaN where any process has NaN, on any backend.
    """
    if op == "sum":
        return _summed(parts, group)
    flat = parts if isinstance(parts, Tensor) else _joined(parts)
    reduced = _reduced(_to_ordered_ints(flat, op), op, group)
    return lambda: _from_ordered_ints(reduced(), flat.dtype)


def _summed(parts: Tensor | Sequence[Tensor], group: dist.ProcessGroup) -> WaitFn:
    dtype = parts.dtype if isinstance(parts, Tensor) else parts[0].dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise AxisError(f"{dtype} values are rounded codes, which cannot be summed. Sum x.float(), and scale it first.")
    if dtype not in _UNSUMMED:
        return _reduced(parts, "sum", group)
    flat = parts if isinstance(parts, Tensor) else _joined(parts)
    reduced = _reduced(flat.to(torch.int64), "sum", group)
    return lambda: reduced().to(dtype)


def _reduced(parts: Tensor | Sequence[Tensor], op: str, group: dist.ProcessGroup) -> WaitFn:
    if rules.is_tracing():
        shape = parts.shape if isinstance(parts, Tensor) else (-1,)
        flat = _JOINED([parts] if isinstance(parts, Tensor) else list(parts))
        return _waiting(_graph().all_reduce(flat, op, group.group_name), shape)
    flat = parts if isinstance(parts, Tensor) else _flatten(list(parts))
    return _Pending(dist.all_reduce(flat, _OPS[op], group, async_op=True), flat)


def _to_ordered_ints(values: Tensor, op: str) -> Tensor:
    """`values` as a new tensor of int32 or int64 in the same order, with NaN above (`op="max"`) or below all numbers.

    Gloo compares floats by `<`, so its result depends on which rank has the NaN; and it reduces neither int16 nor
    unsigned integers wider than 8 bits.
    """
    if values.is_complex():
        raise AxisError(
            "complex numbers have no order, so no maximum or minimum. Reduce x.abs(), or x.real and x.imag."
        )
    if values.dtype == torch.uint64:
        return values.view(torch.int64) ^ torch.iinfo(torch.int64).min
    if not values.is_floating_point():
        return values.to(torch.int64 if values.dtype in _WIDE else torch.int32, copy=True)
    bits = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    bits = bits.view(torch.int64 if bits.dtype == torch.float64 else torch.int32)
    limits = torch.iinfo(bits.dtype)
    order = torch.where(bits < 0, bits ^ limits.max, bits)
    return torch.where(values.isnan(), limits.max if op == "max" else limits.min, order)


def _from_ordered_ints(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `_to_ordered_ints` was given, in their dtype; the largest and the least integer are NaN."""
    if dtype == torch.uint64:
        return (order ^ torch.iinfo(torch.int64).min).view(dtype)
    if not dtype.is_floating_point:
        return order.to(dtype)
    bits = torch.where(order < 0, order ^ torch.iinfo(order.dtype).max, order)
    return bits.view(torch.float64 if order.dtype == torch.int64 else torch.float32).to(dtype)


def all_gather(flat: Tensor, group: dist.ProcessGroup) -> WaitFn:
    """The tensors of all processes, one after the other, as a new flat tensor."""
    size = dist.get_world_size(group)
    if rules.is_tracing():
        return _waiting(_graph().all_gather_into_tensor(flat, size, group.group_name), (-1,))
    out = flat.new_empty(size * flat.numel())
    return _Pending(_all_gather(out, flat, group=group, async_op=True), out)


def start_all_gather(flat: Tensor, size: int, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """The same outside of a trace: the tensor that is filled, and the `Work` to wait for."""
    gathered = flat.new_empty(size * flat.numel())
    return gathered, _all_gather(gathered, flat, group=group, async_op=True)


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> WaitFn:
    """The rows of all ranks in rank order, of which rank i has `counts[i]`, as a new tensor.

    They travel as bytes, padded to the longest: Gloo does not know all dtypes, nor shards of unequal size.
    """
    row_bytes = math.prod(rows.shape[1:]) * rows.itemsize
    longest = max(counts) * row_bytes
    shape = (sum(counts), *rows.shape[1:])
    if not longest:
        return lambda: rows.new_empty(shape)
    padded = torch.zeros(longest, dtype=torch.uint8, device=rows.device)
    padded[: rows.nbytes] = rows.contiguous().view(-1).view(torch.uint8)
    arrived = all_gather(padded, group)

    def finish() -> Tensor:
        shards = zip(arrived().split(longest), counts, strict=True)
        return torch.cat([shard[: count * row_bytes] for shard, count in shards]).view(rows.dtype).view(shape)

    return finish


def reduce_scatter(flat: Tensor, group: dist.ProcessGroup) -> WaitFn:
    """The sum over `group` of this process's slice of `flat`, as a new tensor."""
    size = dist.get_world_size(group)
    if rules.is_tracing():
        return _waiting(_graph().reduce_scatter_tensor(flat, "sum", size, group.group_name), (-1,))
    out = flat.new_empty(flat.numel() // size)
    return _Pending(_reduce_scatter(out, flat, group=group, async_op=True), out)


def reduce_scatter_eager(flat: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """The same outside of a trace, once it has arrived."""
    out = flat.new_empty(flat.numel() // size)
    _reduce_scatter(out, flat, group=group, async_op=True).wait()
    return out


def all_to_all(flat: Tensor, group: dist.ProcessGroup) -> WaitFn:
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


def _waiting(pending: Tensor, shape: Sequence[int]) -> WaitFn:
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
