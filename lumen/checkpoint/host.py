"""A snapshot of trees in the memory of the host, which later steps cannot change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen.checkpoint import dtypes
from lumen.checkpoint.leaves import ARRAYS, Path, encode, kind_of, named
from lumen.checkpoint.naming import array_keys, directory_of

_ALIGN = 64


@dataclass(frozen=True)
class Row:
    """One leaf of the tree `item` as the header of a checkpoint lists it.

    An array has a `dtype`, a `shape` and the name of its directory, `array` (None if it holds no element); a scalar
    has its `value`, encoded.
    """

    item: str
    path: Path
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    array: str | None = None
    value: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        count = 1
        for size in self.shape:
            count *= size
        return count * dtypes.itemsize(self.dtype)


@dataclass(frozen=True)
class Snapshot:
    """The leaves of trees, and the arrays among them: by item, and by their keys in Orbax."""

    rows: list[Row]
    arrays: dict[tuple[str, tuple[str, ...]], np.ndarray[Any, Any]]

    @property
    def stored(self) -> list[Row]:
        """The rows of the arrays, in their order."""
        return [row for row in self.rows if row.array is not None]


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


def snapshot(items: Mapping[str, Any], memory: HostMemory | None = None) -> Snapshot:
    """The leaves of the trees by name: copied into `memory`, or as they are where no memory is given.

    Raises `CheckpointLeafError` for a leaf that no checkpoint holds.
    """
    rows: list[Row] = []
    keys: list[tuple[str, tuple[str, ...]]] = []
    arrays: list[Tensor] = []
    for item, pytree in items.items():
        paths, values, _ = named(pytree)
        described = [_described(item, path, value) for path, value in zip(paths, values, strict=True)]
        filled = [i for i, row in enumerate(described) if row.kind in ARRAYS and row.nbytes]
        arrays += [_bytes(values[i]) for i in filled]
        for i, key in zip(filled, array_keys([paths[i] for i in filled]), strict=True):
            described[i] = replace(described[i], array=directory_of(key))
            keys.append((item, key))
        rows += described
    held = _kept(arrays) if memory is None else _copied(arrays, memory)
    taken = Snapshot(rows, {})
    views = (_view(row, data) for row, data in zip(taken.stored, held, strict=True))
    taken.arrays.update(zip(keys, views, strict=True))
    return taken


def _described(item: str, path: Path, value: Any) -> Row:
    kind = kind_of(value, path)
    if kind == "tensor":
        return Row(item, path, kind, dtypes.NAMES[value.dtype], tuple(value.shape))
    if kind in ARRAYS:
        return Row(item, path, kind, value.dtype.name, tuple(value.shape))
    if kind == "empty":
        return Row(item, path, kind, value="dict" if isinstance(value, dict) else "tuple")
    return Row(item, path, kind, value=encode(value))


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


def _view(row: Row, data: Tensor) -> np.ndarray[Any, Any]:
    return data.numpy().view(dtypes.numpy_dtype(dtypes.carrier(row.dtype))).reshape(row.shape)
