"""A snapshot of trees in host memory, which later steps cannot change."""

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
from lumen.checkpoint.leaves import ARRAYS, LeafPath, encode, kind_of, named
from lumen.checkpoint.orbax_names import array_keys, directory_of
from lumen.checkpoint.shard_specs import by_leaf_index
from lumen.core.dtypes import as_bytes
from lumen.core.sharding import ShardSpec

Key = tuple[str, tuple[str, ...]]  # the item, and the keys in it

PACK = "pack"  # the kind of a record of an array that contains many leaves
_ALIGN = 64


@dataclass(frozen=True)
class LeafRecord:
    """One leaf of the tree `item` as the header of a checkpoint lists it.

    An array has a `dtype`, a `shape` and the name of its directory, `array` (None if it has no element). It has a
    `chunk_shape` if several processes wrote it. A scalar has its encoded `value`. An array that is packed with others
    begins at entry `start` of the array of that name, which has a record of kind `PACK`.
    """

    item: str
    path: LeafPath
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    array: str | None = None
    value: Any = None
    chunk_shape: tuple[int, ...] | None = None
    start: int | None = None

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of its chunks: its own shape if it is a single chunk."""
        return self.shape if self.chunk_shape is None else self.chunk_shape

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * dtypes.itemsize(self.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return math.prod(self.chunk) * dtypes.itemsize(self.dtype)


@dataclass(frozen=True)
class Snapshot:
    """The leaves of trees as `records`; the other fields are by index among them.

    `keys` are the names in Orbax of the arrays that have elements. `specs` are the layouts of the sharded arrays.
    `data` is what this process writes: unsharded arrays, and its shards of the sharded ones.
    """

    records: list[LeafRecord]
    keys: dict[int, Key]
    data: dict[int, Array]
    specs: dict[int, ShardSpec]

    @property
    def stored(self) -> list[int]:
        """The indices of the arrays that rank 0 writes alone."""
        return [index for index in self.keys if index not in self.specs]


class HostMemory:
    """One block of host memory, reused from one snapshot to the next.

    New memory costs several times the copy itself (the system clears each page at the first write). For tensors of an
    accelerator the block is page-locked.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None

    def allocate(self, nbytes: int, pinned: bool) -> Tensor:
        """At least `nbytes` bytes, in the same memory as the previous result if that is large enough."""
        block = self._block
        if block is None or block.numel() < nbytes or (pinned and not block.is_pinned()):
            self._block = block = None  # free the old block first
            self._block = block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return block

    def release(self) -> None:
        """Free the memory."""
        self._block = None


def take_snapshot(
    items: Mapping[str, Any],
    memory: HostMemory | None = None,
    specs: Mapping[int, ShardSpec] | None = None,
    with_unsharded: bool = True,
) -> Snapshot:
    """The leaves of the trees, copied into `memory`, or uncopied if `memory` is None.

    `specs` are the layouts of the sharded leaves of the first tree, by index among `lumen.tree.leaves`. Without
    `with_unsharded`, unsharded leaves get a record but no data.

    Raises `CheckpointLeafError` for a leaf that a checkpoint cannot contain.
    """
    snap = Snapshot([], {}, {}, {})
    arrays: dict[int, Tensor] = {}
    for item, pytree in items.items():
        first = len(snap.records)
        values = _add_records(snap, item, pytree, specs or {})
        indices = [index for index in snap.keys if index >= first and (with_unsharded or index in snap.specs)]
        arrays |= {index: _as_bits(values[index - first]) for index in indices if _writes(snap.specs.get(index))}
        specs = None
    flat = _flat_bytes([*arrays.values()]) if memory is None else _copy_to_host([*arrays.values()], memory)
    for (index, array), data in zip(arrays.items(), flat, strict=True):
        snap.data[index] = _view(snap.records[index].dtype, tuple(array.shape), data)
    return snap


def _add_records(snap: Snapshot, item: str, pytree: Any, specs: Mapping[int, ShardSpec]) -> list[Any]:
    """Add the records of one tree; returns its leaves."""
    paths, values, _ = named(pytree)
    records = [_record_of(item, path, value) for path, value in zip(paths, values, strict=True)]
    specs_by_index = by_leaf_index(specs, [record.kind for record in records])
    records = [
        replace(record, shape=specs_by_index[i].shape) if i in specs_by_index else record
        for i, record in enumerate(records)
    ]
    filled = [i for i, record in enumerate(records) if record.kind in ARRAYS and record.nbytes]
    for i, key in zip(filled, array_keys([paths[i] for i in filled]), strict=True):
        records[i] = replace(records[i], array=directory_of(key))
        snap.keys[len(snap.records) + i] = (item, key)
    snap.specs.update({len(snap.records) + i: specs_by_index[i] for i in filled if i in specs_by_index})
    snap.records.extend(records)
    return values


def _writes(spec: ShardSpec | None) -> bool:
    return spec is None or (spec.owner and bool(spec.boxes))


def _record_of(item: str, path: LeafPath, value: Any) -> LeafRecord:
    kind = kind_of(value, path)
    if kind == "tensor":
        return LeafRecord(item, path, kind, dtypes.NAMES[value.dtype], tuple(value.shape))
    if kind in ARRAYS:
        return LeafRecord(item, path, kind, value.dtype.name, tuple(value.shape))
    if kind == "empty":
        return LeafRecord(item, path, kind, value="dict" if isinstance(value, dict) else "tuple")
    return LeafRecord(item, path, kind, value=encode(value))


def _as_bits(value: Any) -> Tensor:
    """The leaf as a tensor of integers of the same element size."""
    if isinstance(value, Tensor):
        return dtypes.bits(value.detach().resolve_conj().resolve_neg())
    array = np.asarray(value)
    if not array.dtype.isbuiltin or not array.flags.writeable or array.ndim == 0:
        array = np.array(array)  # torch takes no read-only arrays
    shape = array.shape
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return dtypes.bits(torch.from_numpy(flat).view(dtypes.TORCH[array.dtype.name]).view(shape))


def _flat_bytes(values: Sequence[Tensor]) -> list[Tensor]:
    return [as_bytes(value.cpu()) for value in values]


def _copy_to_host(values: Sequence[Tensor], memory: HostMemory) -> list[Tensor]:
    sizes = [value.numel() * value.element_size() for value in values]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGN) * _ALIGN)
    cuda = {value.device for value in values if value.device.type == "cuda"}
    block = memory.allocate(offsets[-1], pinned=bool(cuda))
    buffers = [block[start : start + size] for start, size in zip(offsets, sizes, strict=False)]
    for buffer, value in zip(buffers, values, strict=True):
        buffer.view(value.dtype).view(value.shape).copy_(value, non_blocking=value.is_cuda)
    for device in cuda:
        torch.cuda.current_stream(device).synchronize()
    return buffers


def _view(dtype: str, shape: tuple[int, ...], data: Tensor) -> Array:
    return data.numpy().view(dtypes.numpy_dtype(dtypes.carrier(dtype))).reshape(shape)
