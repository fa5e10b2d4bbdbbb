"""How the params of one unit travel in an eager step: sizes and layouts, worked out once and used by every step.

A unit's shards of one dtype are sent in one message: flat, each padded to the size of the longest rank's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core.dtypes import NARROW
from lumen.core.tensor_proxy import empty_meta
from lumen.parallel.comm import collectives
from lumen.parallel.comm.process_groups import GroupRef
from lumen.parallel.comm.wait_time import WAIT_TIME
from lumen.parallel.fsdp.shard import ShardLayout, copy_rows


class Message(NamedTuple):
    """Params of one `dtype`, sent in `wire_dtype`: their indices, and how many entries each rank sends of each."""

    indices: tuple[int, ...]
    sizes: list[int]
    numel: int
    dtype: torch.dtype
    wire_dtype: torch.dtype


InFlight = list[tuple[Message, Tensor, Tensor, Any]]  # what is sent, what arrives, and what waits for that


class UnitPlan:
    """The messages of the params of full shapes `shapes`, whose shards have these `dtypes`.

    The first `trained` of them have gradients, by default all. The others are frozen, and are sent as they are.
    """

    def __init__(
        self,
        layout: ShardLayout,
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype],
        param_dtype: torch.dtype | None,
        trained: int | None = None,
    ) -> None:
        self._device, self._size = layout.device, layout.size
        self._group = GroupRef(layout.group)
        self._replicas = None if layout.replicas is None else GroupRef(layout.replicas)
        self._dtypes = dtypes
        self._padded = [layout.padded_size(shape) for shape in shapes]
        self._full = [(shape, torch.empty(shape, device="meta").stride()) for shape in shapes]
        self._is_even = [bool(shape) and shape[0] % self._size == 0 and math.prod(shape) > 0 for shape in shapes]
        self._shards = [(shape, math.prod(shape)) for shape in map(layout.shape, shapes)]
        live = dtypes[:trained]
        narrow = [param_dtype if param_dtype is not None and dtype == torch.float32 else dtype for dtype in live]
        self._gathers = self._messages([*narrow, *dtypes[len(live) :]])
        self._reductions = self._messages([torch.float32 if dtype in NARROW else dtype for dtype in live])

    def _messages(self, wire_dtypes: Sequence[torch.dtype]) -> list[Message]:
        """A message for the params of each dtype, of those that come first."""
        kinds = list(zip(self._dtypes, wire_dtypes, strict=False))
        messages = []
        for kind in dict.fromkeys(kinds):
            indices = tuple(index for index, other in enumerate(kinds) if other == kind)
            sizes = [self._padded[index] for index in indices]
            messages.append(Message(indices, sizes, sum(sizes), *kind))
        return messages

    def all_gather(self, shards: Sequence[Tensor]) -> InFlight:
        """Start the all-gather of a unit's params; `receive` waits for it."""
        in_flight = []
        for message in self._gathers:
            device = self._device or shards[message.indices[0]].device
            flat = torch.zeros(message.numel, dtype=message.wire_dtype, device=device)
            for index, block in zip(message.indices, flat.split(message.sizes), strict=True):
                shard = shards[index].reshape(-1)
                if shard.device != device and shard.dtype != flat.dtype:  # else the host would round, and wait
                    shard = shard.to(device, non_blocking=True)
                block[: shard.numel()].copy_(shard, non_blocking=True)
            gathered, work = collectives.start_all_gather(flat, self._size, self._group())
            in_flight.append((message, flat, gathered, work))
        return in_flight

    def receive(self, in_flight: InFlight, buffers: list[Tensor]) -> list[Tensor]:
        """Wait for the full params, in `buffers`, which are allocated when they are needed first.

        What was sent is freed before that. The params alias their buffers without being views to autograd.
        """
        received = []
        while in_flight:
            sent = in_flight.pop(0)
            WAIT_TIME.wait(sent[-1])
            received.append((sent[0], sent[2]))
            del sent
        if buffers:
            for buffer in buffers:
                buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
        else:
            self._allocate(buffers, received[0][1].device)
        size, full = self._size, self._full
        for message, gathered in received:
            columns = gathered.view(size, -1).split(message.sizes, 1)
            for index, column in zip(message.indices, columns, strict=True):
                if full[index][0]:
                    buffers[index].view(size, -1).copy_(column)
                else:
                    buffers[index].copy_(column[0])
        return self.aliases(buffers)

    def aliases(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The full params in `buffers`."""
        params = []
        for buffer, (shape, stride) in zip(buffers, self._full, strict=True):
            params.append(buffer.new_empty(0).set_(buffer.untyped_storage(), 0, shape, stride))
        return params

    def _allocate(self, buffers: list[Tensor], device: torch.device) -> None:
        for padded, dtype, (shape, _) in zip(self._padded, self._dtypes, self._full, strict=True):
            buffers.append(torch.empty(padded * (self._size if shape else 1), dtype=dtype, device=device))

    def reduce_scatter(self, grads: Sequence[Tensor], after: Sequence[Tensor] = ()) -> list[Tensor]:
        """This rank's shards of the sums of `grads` over all ranks; 16-bit gradients are summed in float32."""
        shards = list(grads)
        for message in self._reductions:
            summed = collectives.reduce_scatter_eager(self._packed(message, grads), self._size, self._group())
            if self._replicas is not None:
                summed = collectives.all_reduce(summed, "sum", self._replicas())()
            for index, block in zip(message.indices, summed.split(message.sizes), strict=True):
                shape, numel = self._shards[index]
                shards[index] = block[:numel].view(shape).to(message.dtype)
        return shards

    def _packed(self, message: Message, grads: Sequence[Tensor]) -> Tensor:
        """One flat tensor: for each rank, in order, its padded shards of `grads`."""
        size = self._size
        flat = grads[message.indices[0]].new_empty((size, message.numel), dtype=message.wire_dtype)
        for index, column in zip(message.indices, flat.split(message.sizes, 1), strict=True):
            if self._is_even[index]:
                column.copy_(grads[index].reshape(size, -1))
            else:
                copy_rows(column, grads[index])
        return flat.view(-1)


class UnitPlans:
    """The full `shapes` of the params of a sharded state, and the plans that were made for its units.

    `frozen` are the shapes of its sharded frozen params, which are among the state's buffers. In a unit they follow the
    others.
    """

    def __init__(
        self,
        layout: ShardLayout,
        shapes: Mapping[str, torch.Size],
        param_dtype: torch.dtype | None,
        frozen: Mapping[str, torch.Size] | None = None,
    ) -> None:
        self.layout, self.shapes, self.param_dtype = layout, shapes, param_dtype
        self.frozen: Mapping[str, torch.Size] = frozen or {}
        self.full_shapes = {**shapes, **self.frozen}
        self._plans: dict[tuple[tuple[str, ...], tuple[torch.dtype, ...]], UnitPlan] = {}
        self._metas: dict[tuple[str, torch.dtype], Tensor] = {}

    def plan(self, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> UnitPlan:
        """The plan for these params, whose shards have these dtypes."""
        key = names, dtypes
        if key not in self._plans:
            shapes = [self.full_shapes[name] for name in names]
            self._plans[key] = UnitPlan(self.layout, shapes, dtypes, self.param_dtype, self.trained(names))
        return self._plans[key]

    def trained(self, names: Sequence[str]) -> int:
        """How many of these params, of which the frozen ones are the last, have gradients."""
        return sum(name not in self.frozen for name in names) if self.frozen else len(names)

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory, the same tensor at every call."""
        meta = self._metas.get((name, dtype))
        if meta is None:
            meta = self._metas[name, dtype] = empty_meta(self.full_shapes[name], dtype)
        return meta
