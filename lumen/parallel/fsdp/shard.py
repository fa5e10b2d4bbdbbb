"""Shards tensors along their first dim, one block of rows for each rank, and gathers them.

With `W` ranks and `n` rows each rank has `⌈n / W⌉` rows, the last ones fewer or none: the layout of DTensor's
`Shard(0)`. A tensor without dims is replicated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.dtypes import NARROW
from lumen.core.sharding import ShardSpec, rows_spec
from lumen.errors import ParamsError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.collectives import WaitFn
from lumen.parallel.comm.process_groups import GroupRef
from lumen.parallel.opaque_ops import Operator


class ShardLayout:
    """How the shards of one rank, the one with this `index` among `size`, lie in the full tensors; and the ranks.

    `group` has the shards of one replica, `replicas` the same shard of each replica, and `row_group` is both together.
    They communicate on `device`, where the shards may be or not; None is where the shards are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        row_group: dist.ProcessGroup,
        device: torch.device | None = None,
    ) -> None:
        self._group, self._row_group = GroupRef(group), GroupRef(row_group)
        self._replicas = None if replicas is None else GroupRef(replicas)
        self.device = device
        self.size, self.index = self._group.size, self._group.index

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that have the shards of one replica."""
        return self._group()

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that have the same shard of each replica."""
        return None if self._replicas is None else self._replicas()

    @property
    def row_group(self) -> dist.ProcessGroup:
        """Both together: the ranks that have other rows of a batch."""
        return self._row_group()

    def rows(self, full: Sequence[int], index: int | None = None) -> tuple[int, int]:
        """The first row of a shard (by default this rank's) of a tensor of shape `full`, and the row after its last."""
        count, index = -(-full[0] // self.size), self.index if index is None else index
        return min(index * count, full[0]), min((index + 1) * count, full[0])

    def shape(self, full: torch.Size) -> torch.Size:
        """The shape of this rank's shard."""
        if not full:
            return full
        start, stop = self.rows(full)
        return torch.Size((stop - start, *full[1:]))

    def shard(self, full: Tensor) -> Tensor:
        """This rank's shard of a full tensor, a view."""
        if not full.dim():
            return full
        start, stop = self.rows(full.shape)
        return full[start:stop]

    def spec(self, full: torch.Size) -> ShardSpec:
        """Which rows of a tensor of shape `full`, which has dims, this rank's shard has."""
        start, stop = self.rows(full)
        return rows_spec(full, start, stop, owner=self._replicas is None or self._replicas.index == 0)

    def padded_size(self, full: torch.Size) -> int:
        """How many entries each rank sends of a tensor of shape `full`."""
        return -(-full[0] // self.size) * math.prod(full[1:]) if full else 1

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Whether this rank adds `leaf` to a sum over all entries: one without dims is replicated."""
        return self.index == 0 or leaf.dim() > 0

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum over the shards of one replica, or the maximum over all ranks; a new tensor."""
        sent = x.clone() if self.device is None else x.to(self.device, copy=True)
        return collectives.all_reduce(sent, op, self.group if op == "sum" else self.row_group)().to(x.device)


class AllGatherHandle:
    """An all-gather that is in flight: one message for each dtype, in `wire_dtype` of float32 where that is given.

    In a graph it does not start before the tensors `after` have been computed. Only the first `trained` shards, by
    default all, are sent in `wire_dtype`.
    """

    def __init__(
        self,
        layout: ShardLayout,
        shards: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        wire_dtype: torch.dtype | None,
        after: Sequence[Tensor] = (),
        trained: int | None = None,
    ) -> None:
        self._layout, self._shapes = layout, shapes
        self._dtypes = [shard.dtype for shard in shards]
        self._messages: list[tuple[list[int], Tensor, WaitFn]] = []
        self._gathered: list[tuple[list[int], Tensor]] = []
        count = len(shards) if trained is None or wire_dtype is None else trained
        groups = [(pair, wire_dtype) for pair in _by_dtype(shards[:count]).items()]
        frozen = {dtype: [count + i for i in indices] for dtype, indices in _by_dtype(shards[count:]).items()}
        for (dtype, indices), wire in [*groups, *((pair, None) for pair in frozen.items())]:
            narrow = wire if wire is not None and dtype == torch.float32 else dtype
            sizes = [layout.padded_size(shapes[index]) for index in indices]
            sent = [shards[index].detach() for index in indices]
            if rules.is_tracing():
                flat = _PADDED(sent, sizes, narrow, after)
            else:
                flat = _padded(sent, sizes, narrow, device=layout.device)
            self._messages.append((indices, flat, collectives.all_gather(flat, layout.group)))

    def wait(self) -> None:
        """Wait, and free what was sent."""
        self._gathered += [(indices, wait()) for indices, _, wait in self._messages]
        self._messages.clear()

    def copy_into(self, full: Sequence[Tensor]) -> None:
        """Wait, and fill the flat tensors `full`, each padded to equal shards."""
        self.wait()
        for indices, gathered in self._gathered:
            sizes = [self._layout.padded_size(self._shapes[index]) for index in indices]
            columns = gathered.view(self._layout.size, -1).split(sizes, 1)
            for index, column in zip(indices, columns, strict=True):
                if self._shapes[index]:
                    full[index].view(self._layout.size, -1).copy_(column)
                else:
                    full[index].copy_(column[0])

    def new_tensors(self) -> list[Tensor]:
        """Wait, and return new tensors, as a graph does."""
        full: dict[int, Tensor] = {}
        for indices, _, wait in self._messages:
            shapes = [self._shapes[index] for index in indices]
            sizes = [self._layout.padded_size(shape) for shape in shapes]
            flats = _UNPACKED(wait(), sizes, [math.prod(shape) for shape in shapes])
            for index, shape, flat in zip(indices, shapes, flats, strict=True):
                full[index] = flat.view(shape).to(self._dtypes[index])
        return [full[index] for index in range(len(self._shapes))]

    def allocate(self) -> list[Tensor]:
        """Flat tensors for `copy_into`, allocated once the memory of the messages is free again."""
        self.wait()
        device = self._gathered[0][1].device
        sizes = [self._layout.padded_size(shape) * (self._layout.size if shape else 1) for shape in self._shapes]
        return [torch.empty(size, dtype=dtype, device=device) for size, dtype in zip(sizes, self._dtypes, strict=True)]


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """The indices of the tensors of each dtype."""
    indices: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices.setdefault(tensor.dtype, []).append(index)
    return indices


def _padded(
    shards: Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
    after: Sequence[Tensor] = (),
    device: torch.device | None = None,
) -> Tensor:
    """One flat tensor with each shard padded by zeros to its size; on `device`, or where the shards are."""
    message = torch.zeros(sum(sizes), dtype=dtype, device=device or shards[0].device)
    for block, shard in zip(message.split(list(sizes)), shards, strict=True):
        flat = shard.reshape(-1)
        if flat.device != message.device and flat.dtype != dtype:  # rounded there: else the host would wait for a copy
            flat = flat.to(message.device, non_blocking=True)
        block[: shard.numel()].copy_(flat, non_blocking=True)
    return message


def _padded_fake(shards: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype, after: Any) -> Tensor:
    return shards[0].new_empty(sum(sizes), dtype=dtype)


def _unpacked(gathered: Tensor, sizes: Sequence[int], numels: Sequence[int]) -> list[Tensor]:
    """The flat full tensors, from each rank's padded shards."""
    columns = gathered.view(-1, sum(sizes)).split(list(sizes), 1)
    flats = [column.clone(memory_format=torch.contiguous_format).view(-1) for column in columns]
    return [flat[:numel] for flat, numel in zip(flats, numels, strict=True)]


def _unpacked_fake(gathered: Tensor, sizes: Sequence[int], numels: Sequence[int]) -> list[Tensor]:
    return [gathered.new_empty(numel) for numel in numels]


_PADDED = Operator(
    "padded(Tensor[] shards, int[] sizes, ScalarType dtype, Tensor[] after) -> Tensor", _padded, _padded_fake
)
_UNPACKED = Operator("unpacked(Tensor gathered, int[] sizes, int[] numels) -> Tensor[]", _unpacked, _unpacked_fake)


def alias(flat: Tensor, shape: torch.Size) -> Tensor:
    """The first entries of `flat` in another shape: the same memory, but no view that autograd knows of."""
    strides = torch.empty(shape, device="meta").stride()
    return flat.new_empty(0).set_(flat.untyped_storage(), 0, shape, strides)


def gather(
    layout: ShardLayout,
    shards: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    wire_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The full tensors of shapes `shapes`, from each rank's shards, on the shards' device.

    Those in float32 are sent in `wire_dtype` where that is given.
    """
    live = [index for index, shape in enumerate(shapes) if 0 not in shape]
    if len(live) < len(shards):  # params of other pipeline stages, say, of which nothing is sent
        full = gather(layout, [shards[i] for i in live], [shapes[i] for i in live], wire_dtype)
        by_index = dict(zip(live, full, strict=True))
        return [by_index.get(i, shard.new_empty(shapes[i])) for i, shard in enumerate(shards)]
    if not shards:
        return []
    handle = AllGatherHandle(layout, shards, shapes, wire_dtype)
    if rules.is_tracing():
        return handle.new_tensors()
    flats = handle.allocate()
    handle.copy_into(flats)
    full = [alias(flat, shape) for flat, shape in zip(flats, shapes, strict=True)]
    return full if layout.device is None else [x.to(shard.device) for x, shard in zip(full, shards, strict=True)]


def reduce_scatter(layout: ShardLayout, full: Sequence[Tensor], after: Sequence[Tensor] = ()) -> list[Tensor]:
    """This rank's shards of the sums of `full` over all ranks; 16-bit tensors are summed in float32.

    In a graph they are not sent before the tensors `after` have been computed.
    """
    shards = [x if x.numel() else layout.shard(x) for x in full]  # nothing is sent of an empty one
    for dtype, indices in _by_dtype(full).items():
        indices = [index for index in indices if full[index].numel()]
        if not indices:
            continue
        wide = torch.float32 if dtype in NARROW else dtype
        sums = _reduce_scatter_dtype(layout, [full[index] for index in indices], wide, after)
        for index, shard in zip(indices, sums, strict=True):
            shards[index] = shard.to(dtype)
    return shards


def _reduce_scatter_dtype(
    layout: ShardLayout, full: Sequence[Tensor], wide: torch.dtype, after: Sequence[Tensor]
) -> list[Tensor]:
    sizes = [layout.padded_size(x.shape) for x in full]
    pack: Any = _BY_RANK if rules.is_tracing() else _by_rank
    flat = collectives.reduce_scatter(pack(full, sizes, layout.size, wide, after), layout.group)()
    replicas = layout.replicas
    if replicas is not None:
        flat = collectives.all_reduce(flat, "sum", replicas)()
    shapes = [layout.shape(x.shape) for x in full]
    return [block[: math.prod(shape)].view(shape) for block, shape in zip(flat.split(sizes), shapes, strict=True)]


def _by_rank(
    full: Sequence[Tensor], sizes: Sequence[int], size: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    """One flat tensor: for each of `size` ranks, one after the other, its padded shard of each tensor of `full`."""
    flat = full[0].new_empty((size, sum(sizes)), dtype=dtype)
    for column, x in zip(flat.split(list(sizes), 1), full, strict=True):
        copy_rows(column, x)
    return flat.view(-1)


def _by_rank_fake(
    full: Sequence[Tensor], sizes: Sequence[int], size: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    return full[0].new_empty(size * sum(sizes), dtype=dtype)


_BY_RANK = Operator(
    "by_rank(Tensor[] full, int[] sizes, int size, ScalarType dtype, Tensor[] after) -> Tensor",
    _by_rank,
    _by_rank_fake,
)


def copy_rows(column: Tensor, full: Tensor) -> None:
    """Copy `full` into the rows of `column`, one for each rank, with zeros at the end."""
    if not full.dim():
        column.copy_(full)
        return
    flat, length = full.reshape(-1), column.shape[1]
    filled = flat.numel() // length if length else 0
    column[:filled].copy_(flat[: filled * length].view(filled, length))
    if filled < column.shape[0]:
        remainder = flat[filled * length :]
        column[filled:].zero_()
        column[filled, : remainder.numel()].copy_(remainder)


class ShardedParamGatherer:
    """Gathers params whose full `shapes` are known by name: a `lumen.core.sharding.ParamGatherer`."""

    def __init__(self, layout: ShardLayout, shapes: Mapping[str, torch.Size]) -> None:
        self._layout = layout
        self.shapes = dict(shapes)

    def shape(self, name: str) -> torch.Size:
        """The shape of the full param."""
        return self.shapes[name]

    def first_row(self, name: str) -> int:
        """The first row of this rank's shard of the param `name`."""
        return self._layout.rows(self.shapes[name])[0] if self.shapes[name] else 0

    def gather(self, shards: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        """Full tensors of this shape."""
        return gather(self._layout, shards, [shape] * len(shards))

    def shard(self, full: Tensor) -> Tensor:
        """This rank's rows."""
        return self._layout.shard(full)


Shapes = Mapping[str, torch.Size]
Sharded = Sequence[tuple[int, Sequence[int]]]  # indices of leaves with the shapes of the full tensors


def shard_tree(layout: ShardLayout, state: Any, sharded: Sharded) -> Any:
    """`state` with this rank's shard, in memory of its own, of each leaf that is `sharded`."""
    leaves, structure = tree.flatten(state)
    for index, _ in sharded:
        leaves[index] = layout.shard(leaves[index]).clone()
    return structure.unflatten(leaves)


def gather_tree(layout: ShardLayout, state: Any, sharded: Sharded) -> Any:
    """The inverse of `shard_tree`, on every rank."""
    leaves, structure = tree.flatten(state)
    if layout.device is not None:  # one after the other: what lies on the host may be more than fits on the device
        for index, shape in sharded:
            (leaves[index],) = gather(layout, [leaves[index]], [torch.Size(shape)])
        return structure.unflatten(leaves)
    full = gather(layout, [leaves[index] for index, _ in sharded], [torch.Size(shape) for _, shape in sharded])
    for (index, _), leaf in zip(sharded, full, strict=True):
        leaves[index] = leaf
    return structure.unflatten(leaves)


def shard_specs(layout: ShardLayout, sharded: Sharded) -> dict[int, ShardSpec]:
    """Which rows this rank holds of each sharded leaf, by its index; leaves without dims are on every rank."""
    return {index: layout.spec(torch.Size(shape)) for index, shape in sharded if shape}


def flat_params(state: Any, verb: str) -> dict[str, Tensor]:
    """The params of `state`, by name; `ParamsError` where it has others. `verb` says who does what with them."""
    params = getattr(state, "params", None)
    if type(params) is not dict or not all(isinstance(p, Tensor) for p in params.values()):
        raise ParamsError(
            f"{verb} state.params, a flat dict of tensors by name, as lm.TrainState has it;"
            f" {type(state).__name__} has {type(params).__name__}. Derive the state from lm.TrainState, or let it"
            " hold an lm.TrainState for each set of params that is trained."
        )
    return params
