"""Collectives that return new tensors: nodes of the graph while a step is traced, launched at once otherwise.

Those of `torch.distributed` write into their arguments, through objects that a graph cannot hold. Its functional
wrappers wait where they launch. Here a launch and its wait are two nodes, and the nodes between them run meanwhile.
Inductor keeps the order of a graph's collectives. So ranks may run different graphs, for different numbers of rows,
and their collectives still match.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core import _torch_compat, rules
from lumen.core.dtypes import as_bytes
from lumen.errors import AxisError
from lumen.parallel.comm.wait_time import WAIT_TIME
from lumen.parallel.opaque_ops import Operator

BROADCAST_BYTES = 2**16
"""The size of a shard from which broadcasts are faster than Gloo's all-gather."""

WaitFn = Callable[[], Tensor]  # waits, and returns the result

# Their names before torch 2.13, which warns of these.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_flatten: Callable[[list[Tensor]], Tensor] = _torch_compat.flatten_dense_tensors

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_GATHERED = frozenset({  # as they are, by every backend; others are sent as bytes
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
})  # fmt: skip
_UNSUMMED = (torch.int16, torch.uint16, torch.uint32, torch.uint64)  # by Gloo
_WIDE = (torch.int64, torch.uint32)  # integers that need all of int64


def all_reduce(tensors: Tensor | Sequence[Tensor], op: str, group: dist.ProcessGroup) -> WaitFn:
    """The sum, "max" or "min" (`op`) over `group` of a tensor, or of several of one dtype as a flat one.

    It may be in the memory of the one tensor. A maximum or minimum is NaN where any rank has NaN, on any backend.
    """
    if op == "sum":
        return _summed(tensors, group)
    flat = tensors if isinstance(tensors, Tensor) else _joined(tensors)
    reduced = _reduced(_to_ordered_ints(flat, op), op, group)
    return lambda: _from_ordered_ints(reduced(), flat.dtype)


def _summed(tensors: Tensor | Sequence[Tensor], group: dist.ProcessGroup) -> WaitFn:
    dtype = tensors.dtype if isinstance(tensors, Tensor) else tensors[0].dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise AxisError(f"{dtype} values are rounded codes, which cannot be summed. Sum x.float(), and scale it first.")
    if dtype not in _UNSUMMED:
        return _reduced(tensors, "sum", group)
    flat = tensors if isinstance(tensors, Tensor) else _joined(tensors)
    reduced = _reduced(flat.to(torch.int64), "sum", group)
    return lambda: reduced().to(dtype)


def _reduced(tensors: Tensor | Sequence[Tensor], op: str, group: dist.ProcessGroup) -> WaitFn:
    if rules.is_tracing():
        shape = tensors.shape if isinstance(tensors, Tensor) else (-1,)
        flat = _JOINED([tensors] if isinstance(tensors, Tensor) else list(tensors))
        return _waiting(_graph().all_reduce(flat, op, group.group_name), shape)
    flat = tensors if isinstance(tensors, Tensor) else _flatten(list(tensors))
    return _Handle(dist.all_reduce(flat, _OPS[op], group, async_op=True), flat)


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
    """The inverse of `_to_ordered_ints`, in `dtype`; the largest and the least integer become NaN."""
    if dtype == torch.uint64:
        return (order ^ torch.iinfo(torch.int64).min).view(dtype)
    if not dtype.is_floating_point:
        return order.to(dtype)
    bits = torch.where(order < 0, order ^ torch.iinfo(order.dtype).max, order)
    return bits.view(torch.float64 if order.dtype == torch.int64 else torch.float32).to(dtype)


def all_gather(flat: Tensor, group: dist.ProcessGroup) -> WaitFn:
    """The tensors of all ranks in rank order, as a new flat tensor."""
    size = dist.get_world_size(group)
    if not rules.is_tracing():
        gathered, work = start_all_gather(flat, size, group)
        return _Handle(work, gathered)
    if flat.dtype not in _GATHERED:
        wait = all_gather(flat.view(torch.uint8), group)
        return lambda: wait().view(flat.dtype)
    return _waiting(_graph().all_gather_into_tensor(flat, size, group.group_name), (-1,))


def start_all_gather(flat: Tensor, size: int, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """The same outside a trace: the tensor that receives the data, and the `Work` to wait for."""
    gathered = flat.new_empty(size * flat.numel())
    if flat.nbytes >= BROADCAST_BYTES and flat.device.type == "cpu" and dist.get_backend(group) == "gloo":
        return gathered, _start_broadcasts(as_bytes(gathered), as_bytes(flat), size, group)
    if flat.dtype in _GATHERED:
        return gathered, _all_gather(gathered, flat, group=group, async_op=True)
    return gathered, _all_gather(gathered.view(torch.uint8), flat.view(torch.uint8), group=group, async_op=True)


def _start_broadcasts(gathered: Tensor, flat: Tensor, size: int, group: dist.ProcessGroup) -> _Works:
    """An all-gather over Gloo, whose own receives into memory of its own and copies that."""
    shards = gathered.view(size, -1).unbind()
    shards[dist.get_rank(group)].copy_(flat)
    return _Works([dist.broadcast(shard, group=group, group_src=i, async_op=True) for i, shard in enumerate(shards)])


class _Works:
    """The `Work` of several collectives."""

    __slots__ = ("_works",)

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait for all."""
        for work in self._works:
            work.wait()


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> WaitFn:
    """The rows of all ranks in rank order, of which rank i has `counts[i]`, as a new tensor.

    They are sent as bytes, padded to the longest: Gloo supports neither all dtypes nor shards of unequal size.
    """
    row_bytes = math.prod(rows.shape[1:]) * rows.itemsize
    longest = max(counts) * row_bytes
    shape = (sum(counts), *rows.shape[1:])
    if not longest:
        return lambda: rows.new_empty(shape)
    padded = torch.zeros(longest, dtype=torch.uint8, device=rows.device)
    padded[: rows.nbytes] = as_bytes(rows)
    wait = all_gather(padded, group)

    def finish() -> Tensor:
        shards = zip(wait().split(longest), counts, strict=True)
        return torch.cat([shard[: count * row_bytes] for shard, count in shards]).view(rows.dtype).view(shape)

    return finish


def reduce_scatter(flat: Tensor, group: dist.ProcessGroup) -> WaitFn:
    """The sum over `group` of this rank's slice of `flat`, as a new tensor."""
    size = dist.get_world_size(group)
    if rules.is_tracing():
        return _waiting(_graph().reduce_scatter_tensor(flat, "sum", size, group.group_name), (-1,))
    shard = flat.new_empty(flat.numel() // size)
    return _Handle(_reduce_scatter(shard, flat, group=group, async_op=True), shard)


def reduce_scatter_eager(flat: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """The same outside a trace; waits for the result."""
    shard = flat.new_empty(flat.numel() // size)
    WAIT_TIME.wait(_reduce_scatter(shard, flat, group=group, async_op=True))
    return shard


def all_to_all(flat: Tensor, group: dist.ProcessGroup) -> WaitFn:
    """The slices of all ranks' tensors that are meant for this rank, in rank order."""
    if rules.is_tracing():
        size = dist.get_world_size(group)
        counts = [flat.numel() // size] * size
        return _waiting(_graph().all_to_all_single(flat, counts, counts, group.group_name), (-1,))
    received = torch.empty_like(flat)
    return _Handle(dist.all_to_all_single(received, flat, group=group, async_op=True), received)


def _graph() -> Any:
    """The operators, whose shapes are known once this module has been imported."""
    return _torch_compat.graph_collectives()


def _waiting(pending: Tensor, shape: Sequence[int]) -> WaitFn:
    return lambda: _torch_compat.c10d_functional.wait_tensor(pending).view(shape)


class _Handle:
    """Waits for `work`, and then drops it, since it keeps the threads of its group alive.

    A closure would not do: clearing the frames of an error's traceback does not clear closures.
    """

    __slots__ = ("_result", "_work")

    def __init__(self, work: Any, result: Tensor) -> None:
        self._work, self._result = work, result

    def __call__(self) -> Tensor:
        if self._work is not None:
            WAIT_TIME.wait(self._work)
            self._work = None
        return self._result


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])  # a copy, also of one tensor


def _joined_fake(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(sum(x.numel() for x in tensors))


_JOINED = Operator("joined(Tensor[] parts) -> Tensor", _joined, _joined_fake)


def all_to_all_bytes(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Block j of what this rank returns is block `rank` of what rank j gave; the blocks lie along the first dim.

    `blocks` is contiguous, of any dtype; it is sent as bytes.
    """
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received.view(-1).view(torch.uint8), blocks.view(-1).view(torch.uint8), group=group)
    return received
