"""A snapshot of trees in the memory of the host, which later steps cannot change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen.checkpoint import dtypes
from lumen.checkpoint.chunk_grid import Array
from lumen.checkpoint.leaves import ARRAYS, Path, encode, kind_of, named
from lumen.checkpoint.orbax_names import array_keys, directory_of
from lumen.checkpoint.shard_specs import by_place
from lumen.core.sharding import ShardSpec

Key = tuple[str, tuple[str, ...]]  # the item, and the keys in it

PACK = "pack"  # the kind of row of an array that holds many leaves
_ALIGN = 64


@dataclass(frozen=True)
class LeafRecord:
    """One leaf of the tree `item` as the header of a checkpoint lists it.

    An array has a `dtype`, a `shape` and the name of its directory, `array` (None if it holds no element), and where
    several processes wrote it, the shape of its chunks; a scalar has its `value`, encoded. One that is packed with
    others begins at entry `start` of the array of that name, which has a row of the kind `PACK`.
    """

    item: str
    path: Path
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    array: str | None = None
    value: Any = None
    parts: tuple[int, ...] | None = None
    start: int | None = None

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of its chunks."""
        return self.shape if self.parts is None else self.parts

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * dtypes.itemsize(self.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one of its chunks."""
        return math.prod(self.chunk) * dtypes.itemsize(self.dtype)


@dataclass(frozen=True)
class Snapshot:
    """The leaves of trees by `rows`; by a row's place its `keys` in Orbax where it is an array with elements.

    `data` is what this process writes: arrays, and of those that are `cut` among processes its parts.
    """

    rows: list[LeafRecord]
    keys: dict[int, Key]
    data: dict[int, Array]
    cut: dict[int, ShardSpec]

    @property
    def stored(self) -> list[int]:
        """The rows, by place, of the arrays that one process writes."""
        return [place for place in self.keys if place not in self.cut]


class HostMemory:
    """One block of host memory, kept from one snapshot to the next.

    Fresh memory costs several times the copy itself (the system clears each page when it is first touched). For
    tensors of an accelerator the block is page-locked.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None

    def take(self, nbytes: int, pinned: bool) -> Tensor:
        """At least `nbytes` bytes; what was taken before is overwritten."""
        block = self._block
        if block is None or block.numel() < nbytes or (pinned and not block.is_pinned()):
            self._block = block = None  # let go of the old one first
            self._block = block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return block

    def release(self) -> None:
        """Give the memory back."""
        self._block = None


def snapshot(
    items: Mapping[str, Any],
    memory: HostMemory | None = None,
    cut: Mapping[int, ShardSpec] | None = None,
    whole: bool = True,
) -> Snapshot:
    """The leaves of the trees by name: copied into `memory`, or as they are where no memory is given.

    `cut` says which leaves of the first tree, by their places among `lumen.tree.leaves`, are parts of what. Without
    `whole`, what this process does not write a part of is listed only.

    Raises `CheckpointLeafError` for a leaf that no checkpoint holds.
    """
    taken = Snapshot([], {}, {}, {})
    arrays: dict[int, Tensor] = {}
    for item, pytree in items.items():
        first = len(taken.rows)
        values = _list(taken, item, pytree, cut or {})
        held = [place for place in taken.keys if place >= first and (whole or place in taken.cut)]
        arrays |= {place: _bytes(values[place - first]) for place in held if _is_written(taken.cut.get(place))}
        cut = None
    flat = _kept([*arrays.values()]) if memory is None else _copied([*arrays.values()], memory)
    for (place, array), data in zip(arrays.items(), flat, strict=True):
        taken.data[place] = _view(taken.rows[place].dtype, tuple(array.shape), data)
    return taken


def _list(taken: Snapshot, item: str, pytree: Any, cut: Mapping[int, ShardSpec]) -> list[Any]:
    """Add the rows of one tree, and give its leaves."""
    paths, values, _ = named(pytree)
    rows = [_described(item, path, value) for path, value in zip(paths, values, strict=True)]
    pieces = by_place(cut, [row.kind for row in rows])
    rows = [replace(row, shape=pieces[i].shape) if i in pieces else row for i, row in enumerate(rows)]
    filled = [i for i, row in enumerate(rows) if row.kind in ARRAYS and row.nbytes]
    for i, key in zip(filled, array_keys([paths[i] for i in filled]), strict=True):
        rows[i] = replace(rows[i], array=directory_of(key))
        taken.keys[len(taken.rows) + i] = (item, key)
    taken.cut.update({len(taken.rows) + i: pieces[i] for i in filled if i in pieces})
    taken.rows.extend(rows)
    return values


def _is_written(piece: ShardSpec | None) -> bool:
    return piece is None or (piece.owner and bool(piece.boxes))


def _described(item: str, path: Path, value: Any) -> LeafRecord:
    kind = kind_of(value, path)
    if kind == "tensor":
        return LeafRecord(item, path, kind, dtypes.NAMES[value.dtype], tuple(value.shape))
    if kind in ARRAYS:
        return LeafRecord(item, path, kind, value.dtype.name, tuple(value.shape))
    if kind == "empty":
        return LeafRecord(item, path, kind, value="dict" if isinstance(value, dict) else "tuple")
    return LeafRecord(item, path, kind, value=encode(value))


def _bytes(value: Any) -> Tensor:
    """The leaf as a tensor of integers of its elements' size."""
    if isinstance(value, Tensor):
        return dtypes.bits(value.detach().resolve_conj().resolve_neg())
    array = np.asarray(value)
    if not array.dtype.isbuiltin or not array.flags.writeable or array.ndim == 0:
        array = np.array(array)  # torch takes no read-only arrays
    shape = array.shape
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return dtypes.bits(torch.from_numpy(flat).view(dtypes.TORCH[array.dtype.name]).view(shape))


def _kept(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.cpu().contiguous().view(-1).view(torch.uint8) for value in values]


def _copied(values: Sequence[Tensor], memory: HostMemory) -> list[Tensor]:
    sizes = [value.numel() * value.element_size() for value in values]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGN) * _ALIGN)
    cuda = {value.device for value in values if value.device.type == "cuda"}
    block = memory.take(offsets[-1], pinned=bool(cuda))
    parts = [block[start : start + size] for start, size in zip(offsets, sizes, strict=False)]
    for part, value in zip(parts, values, strict=True):
        part.view(value.dtype).view(value.shape).copy_(value, non_blocking=value.is_cuda)
    for device in cuda:
        torch.cuda.current_stream(device).synchronize()
    return parts


def _view(dtype: str, shape: tuple[int, ...], data: Tensor) -> Array:
    return data.numpy().view(dtypes.numpy_dtype(dtypes.carrier(dtype))).reshape(shape)
