"""Cutting tensors along their first dim into the rows of each process, and putting them together again.

With `W` processes and `n` rows each process has `⌈n / W⌉` rows, the last ones fewer or none: the layout of DTensor's
`Shard(0)`. A tensor without dims stays whole everywhere.
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
from lumen.core.sharding import ShardSpec, SpecTree, rows_spec
from lumen.errors import ParamsError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.collectives import WaitFn
from lumen.parallel.comm.process_groups import GroupRef
from lumen.parallel.opaque_ops import Operator


class ShardLayout:
    """How one process's parts lie in the whole: its place among `size`, and the processes themselves.

    `group` holds the parts of one copy, `replicas` the same part of other copies, and `everyone` is both together.
    They meet on `device`, where the parts may lie or not; None is where the parts lie.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        everyone: dist.ProcessGroup,
        device: torch.device | None = None,
    ) -> None:
        self._group, self._everyone = GroupRef(group), GroupRef(everyone)
        self._replicas = None if replicas is None else GroupRef(replicas)
        self.device = device
        self.size, self.index = self._group.size, self._group.index

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that hold the parts of one copy."""
        return self._group()

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """Those that hold the same part of other copies."""
        return None if self._replicas is None else self._replicas()

    @property
    def everyone(self) -> dist.ProcessGroup:
        """Both together."""
        return self._everyone()

    def rows(self, whole: Sequence[int]) -> tuple[int, int]:
        """The first row of this process's part of a tensor of shape `whole`, and the row after its last."""
        each = -(-whole[0] // self.size)
        return min(self.index * each, whole[0]), min((self.index + 1) * each, whole[0])

    def shape(self, whole: torch.Size) -> torch.Size:
        """The shape of this process's part."""
        if not whole:
            return whole
        start, stop = self.rows(whole)
        return torch.Size((stop - start, *whole[1:]))

    def part(self, tensor: Tensor) -> Tensor:
        """This process's part of a whole tensor, a view."""
        if not tensor.dim():
            return tensor
        start, stop = self.rows(tensor.shape)
        return tensor[start:stop]

    def piece(self, whole: torch.Size) -> ShardSpec:
        """What this process's part is of a tensor of shape `whole`, which has dims."""
        start, stop = self.rows(whole)
        return rows_spec(whole, start, stop, owner=self._replicas is None or self._replicas.index == 0)

    def padded(self, whole: torch.Size) -> int:
        """How many entries each process sends of a tensor of shape `whole`."""
        return -(-whole[0] // self.size) * math.prod(whole[1:]) if whole else 1

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Whether this process adds `leaf` to a sum over all entries: one without dims is whole everywhere."""
        return self.index == 0 or leaf.dim() > 0

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum over the parts of one copy, or the maximum over all processes; a new tensor."""
        sent = x.clone() if self.device is None else x.to(self.device, copy=True)
        return collectives.all_reduce(sent, op, self.group if op == "sum" else self.everyone)().to(x.device)


class AllGatherHandle:
    """Whole tensors on their way from the parts of all processes: one message for each dtype.

    In a graph they are not sent for before the tensors `after` have been computed.
    """

    def __init__(
        self,
        cut: ShardLayout,
        parts: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        wire: torch.dtype | None,
        after: Sequence[Tensor] = (),
    ) -> None:
        self._cut, self._shapes = cut, shapes
        self._dtypes = [part.dtype for part in parts]
        self._sent: list[tuple[list[int], Tensor, WaitFn]] = []
        self._here: list[tuple[list[int], Tensor]] = []
        kinds: dict[torch.dtype, list[int]] = {}
        for place, part in enumerate(parts):
            kinds.setdefault(part.dtype, []).append(place)
        for dtype, places in kinds.items():
            narrow = wire if wire is not None and dtype == torch.float32 else dtype
            sizes = [cut.padded(shapes[place]) for place in places]
            sent = [parts[place].detach() for place in places]
            if rules.is_tracing():
                flat = _PADDED(sent, sizes, narrow, after)
            else:
                flat = _padded(sent, sizes, narrow, device=cut.device)
            self._sent.append((places, flat, collectives.all_gather(flat, cut.group)))

    def arrive(self) -> None:
        """Wait, and let go of what was sent."""
        self._here += [(places, arrived()) for places, _, arrived in self._sent]
        self._sent.clear()

    def into(self, wholes: Sequence[Tensor]) -> None:
        """Wait, and fill the flat tensors `wholes`, each padded to equal parts."""
        self.arrive()
        for places, gathered in self._here:
            sizes = [self._cut.padded(self._shapes[place]) for place in places]
            columns = gathered.view(self._cut.size, -1).split(sizes, 1)
            for place, column in zip(places, columns, strict=True):
                if self._shapes[place]:
                    wholes[place].view(self._cut.size, -1).copy_(column)
                else:
                    wholes[place].copy_(column[0])

    def made(self) -> list[Tensor]:
        """Wait, and give new tensors, as a graph does."""
        wholes: dict[int, Tensor] = {}
        for places, _, arrived in self._sent:
            shapes = [self._shapes[place] for place in places]
            sizes = [self._cut.padded(shape) for shape in shapes]
            flats = _TAKEN_APART(arrived(), sizes, [math.prod(shape) for shape in shapes])
            for place, shape, flat in zip(places, shapes, flats, strict=True):
                wholes[place] = flat.view(shape).to(self._dtypes[place])
        return [wholes[place] for place in range(len(self._shapes))]

    def room(self) -> list[Tensor]:
        """Flat tensors to gather into, allocated once what was held on the way is free again."""
        self.arrive()
        device = self._here[0][1].device
        sizes = [self._cut.padded(shape) * (self._cut.size if shape else 1) for shape in self._shapes]
        return [torch.empty(size, dtype=dtype, device=device) for size, dtype in zip(sizes, self._dtypes, strict=True)]


def _padded(
    parts: Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
    after: Sequence[Tensor] = (),
    device: torch.device | None = None,
) -> Tensor:
    """One flat tensor with the entries of each part, and zeros up to its size; on `device`, or where the parts are."""
    out = torch.zeros(sum(sizes), dtype=dtype, device=device or parts[0].device)
    for piece, part in zip(out.split(list(sizes)), parts, strict=True):
        flat = part.reshape(-1)
        if flat.device != out.device and flat.dtype != dtype:  # rounded there: else the host would wait for a copy
            flat = flat.to(out.device, non_blocking=True)
        piece[: part.numel()].copy_(flat, non_blocking=True)
    return out


def _padded_shell(parts: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype, after: Any) -> Tensor:
    return parts[0].new_empty(sum(sizes), dtype=dtype)


def _taken_apart(gathered: Tensor, sizes: Sequence[int], numels: Sequence[int]) -> list[Tensor]:
    """The flat whole tensors, from each process's padded parts."""
    columns = gathered.view(-1, sum(sizes)).split(list(sizes), 1)
    flats = [column.clone(memory_format=torch.contiguous_format).view(-1) for column in columns]
    return [flat[:numel] for flat, numel in zip(flats, numels, strict=True)]


def _taken_apart_shell(gathered: Tensor, sizes: Sequence[int], numels: Sequence[int]) -> list[Tensor]:
    return [gathered.new_empty(numel) for numel in numels]


_PADDED = Operator(
    "padded(Tensor[] parts, int[] sizes, ScalarType dtype, Tensor[] after) -> Tensor", _padded, _padded_shell
)
_TAKEN_APART = Operator(
    "taken_apart(Tensor gathered, int[] sizes, int[] numels) -> Tensor[]", _taken_apart, _taken_apart_shell
)


def alias(flat: Tensor, shape: torch.Size) -> Tensor:
    """The first entries of `flat` in another shape: the same memory, but no view that autograd knows of."""
    strides = torch.empty(shape, device="meta").stride()
    return flat.new_empty(0).set_(flat.untyped_storage(), 0, shape, strides)


def gather(cut: ShardLayout, parts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The whole tensors of shapes `shapes`, from each process's parts, and where these lie."""
    if not parts:
        return []
    going = AllGatherHandle(cut, parts, shapes, None)
    if rules.is_tracing():
        return going.made()
    room = going.room()
    going.into(room)
    wholes = [alias(flat, shape) for flat, shape in zip(room, shapes, strict=True)]
    return wholes if cut.device is None else [w.to(part.device) for w, part in zip(wholes, parts, strict=True)]


def reduce_scatter(cut: ShardLayout, wholes: Sequence[Tensor], after: Sequence[Tensor] = ()) -> list[Tensor]:
    """This process's parts of the sum of `wholes` over all processes, 16-bit ones summed in float32.

    In a graph they are not sent before the tensors `after` have been computed.
    """
    out: list[Tensor] = list(wholes)
    kinds: dict[torch.dtype, list[int]] = {}
    for place, whole in enumerate(wholes):
        kinds.setdefault(whole.dtype, []).append(place)
    for dtype, places in kinds.items():
        wide = torch.float32 if dtype in NARROW else dtype
        for place, summed in zip(places, _summed(cut, [wholes[p] for p in places], wide, after), strict=True):
            out[place] = summed.to(dtype)
    return out


def _summed(cut: ShardLayout, wholes: Sequence[Tensor], wide: torch.dtype, after: Sequence[Tensor]) -> list[Tensor]:
    sizes = [cut.padded(whole.shape) for whole in wholes]
    spread: Any = _SPREAD_OUT if rules.is_tracing() else _spread_out
    mine = collectives.reduce_scatter(spread(wholes, sizes, cut.size, wide, after), cut.group)()
    replicas = cut.replicas
    if replicas is not None:
        mine = collectives.all_reduce(mine, "sum", replicas)()
    shapes = [cut.shape(whole.shape) for whole in wholes]
    pieces = mine.split(sizes)
    return [piece[: math.prod(shape)].view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _spread_out(
    wholes: Sequence[Tensor], sizes: Sequence[int], size: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    """One flat tensor: for each of `size` processes, one after the other, its padded part of each of `wholes`."""
    flat = wholes[0].new_empty((size, sum(sizes)), dtype=dtype)
    for column, whole in zip(flat.split(list(sizes), 1), wholes, strict=True):
        _spread(column, whole)
    return flat.view(-1)


def _spread_out_shell(
    wholes: Sequence[Tensor], sizes: Sequence[int], size: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    return wholes[0].new_empty(size * sum(sizes), dtype=dtype)


_SPREAD_OUT = Operator(
    "spread_out(Tensor[] wholes, int[] sizes, int size, ScalarType dtype, Tensor[] after) -> Tensor",
    _spread_out,
    _spread_out_shell,
)


def _spread(column: Tensor, whole: Tensor) -> None:
    """Write `whole` into the rows of `column`, one for each process, with zeros at the end."""
    if not whole.dim():
        column.copy_(whole)
        return
    flat, each = whole.reshape(-1), column.shape[1]
    full = flat.numel() // each if each else 0
    column[:full].copy_(flat[: full * each].view(full, each))
    if full < column.shape[0]:
        rest = flat[full * each :]
        column[full:].zero_()
        column[full, : rest.numel()].copy_(rest)


class ShardedParamGatherer:
    """Parts of params whose whole `shapes` are known by name: `lumen.core.sharding.Wholes`."""

    def __init__(self, cut: ShardLayout, shapes: Mapping[str, torch.Size]) -> None:
        self._cut = cut
        self.shapes = dict(shapes)

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole param."""
        return self.shapes[name]

    def gather(self, parts: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        """Whole tensors of this shape."""
        return gather(self._cut, parts, [shape] * len(parts))

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows."""
        return self._cut.part(whole)


def shard_tree(layout: ShardLayout, state: Any, specs: SpecTree) -> Any:
    """`state` with this rank's shard, in memory of its own, of each leaf that `specs` names."""
    leaves, structure = tree.flatten(state)
    for index, _ in specs.locate(state):
        leaves[index] = layout.part(leaves[index]).clone()
    return structure.unflatten(leaves)


def gather_tree(layout: ShardLayout, state: Any, specs: SpecTree) -> Any:
    """The inverse of `shard_tree`, on every rank."""
    leaves, structure = tree.flatten(state)
    sharded = [(index, torch.Size(specs.params[name].shape)) for index, name in specs.locate(state)]
    if layout.device is not None:  # one after the other: what lies on the host may be more than fits on the device
        for index, shape in sharded:
            (leaves[index],) = gather(layout, [leaves[index]], [shape])
        return structure.unflatten(leaves)
    full = gather(layout, [leaves[index] for index, _ in sharded], [shape for _, shape in sharded])
    for (index, _), leaf in zip(sharded, full, strict=True):
        leaves[index] = leaf
    return structure.unflatten(leaves)


def shard_specs(layout: ShardLayout, state: Any, specs: SpecTree) -> dict[int, ShardSpec]:
    """Which rows this rank holds of each sharded leaf, by its index; leaves without dims are on every rank."""
    shapes = ((index, torch.Size(specs.params[name].shape)) for index, name in specs.locate(state))
    return {index: layout.piece(shape) for index, shape in shapes if shape}


def flat_params(state: Any, said: str) -> dict[str, Tensor]:
    """The params of `state`, by name; `ParamsError` where it has others, in which `said` is what is done with them."""
    params = getattr(state, "params", None)
    if type(params) is not dict or not all(isinstance(p, Tensor) for p in params.values()):
        raise ParamsError(
            f"{said} state.params, a flat dict of tensors by name, as lm.TrainState has it;"
            f" {type(state).__name__} has {type(params).__name__}. Derive the state from lm.TrainState."
        )
    return params
