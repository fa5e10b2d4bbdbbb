"""Reading one checkpoint, which may be damaged or malicious.

Only regular files below the checkpoint's directory are opened, no code is run, and no more memory is allocated than the
files on disk justify.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumen.checkpoint import chunk_grid, dtypes, header, zarr
from lumen.checkpoint.checkpoint_files import LocalFiles, files_at
from lumen.checkpoint.chunk_grid import Array, Block, Index
from lumen.checkpoint.leaves import ARRAYS, LeafPath, decode, name_of
from lumen.checkpoint.packing import unpack
from lumen.checkpoint.snapshot import LeafRecord
from lumen.core.arguments import checked_first
from lumen.core.sharding import Slice
from lumen.core.urls import join
from lumen.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, printable

_IO_BYTES = 1 << 22  # small enough to be still in the CPU cache when its checksum is computed
_ADVICE = "Restore another checkpoint, or a copy of this one."


class ReadRequest(NamedTuple):
    """Which entries of an array to read: the `shape` of the resulting tensor, and the `boxes` to fill in it."""

    shape: tuple[int, ...]
    boxes: tuple[Slice, ...]


class Reader:
    """One item of a checkpoint: the leaves that the header lists, read from files that are checked against it."""

    def __init__(self, path: str | os.PathLike[str], item: str = "state") -> None:
        if item not in header.ITEMS:
            raise CheckpointError(f"a checkpoint has the items {' and '.join(header.ITEMS)}; got item={item!r}.")
        self.files = files_at(path)
        self.path = self.files.location
        self.header = read_header(path)
        self.records = [record for record in self.header.records if record.item == item]

    def read(
        self,
        records: Sequence[LeafRecord],
        convert: Callable[[LeafRecord, Tensor], Any] | None = None,
        requests: Mapping[LeafPath, ReadRequest] | None = None,
    ) -> list[Any]:
        """The values of these leaves; `convert` is called with each array as soon as it is read.

        `requests` are the leaves, by path, of which only some entries are read; files that contain none of them are not
        opened.

        Raises `CorruptCheckpointError`, with the file and the leaf, if anything differs from what was written.
        """
        self._check_files(records)
        by_path = requests or {}
        packs = self._packs(records)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda record: self._value(record, convert, by_path.get(record.path), packs), records))

    def _packs(self, records: Sequence[LeafRecord]) -> dict[tuple[str, str | None], Array]:
        """The arrays in which these leaves are packed."""
        pack_keys = {(record.item, record.array) for record in records if record.start is not None}
        arrays = {}
        for pack in self.header.packs:
            if (pack.item, pack.array) in pack_keys:
                bits = dtypes.bits(self._array(pack, _full_request(pack)))
                arrays[pack.item, pack.array] = bits.numpy().view(_carrier(pack))
        return arrays

    def _value(
        self,
        record: LeafRecord,
        convert: Callable[[LeafRecord, Tensor], Any] | None,
        request: ReadRequest | None,
        packs: Mapping[tuple[str, str | None], Array],
    ) -> Any:
        if record.kind == "empty":
            return {} if record.value == "dict" else ()
        if record.kind not in ARRAYS:
            return decode(record.kind, record.value)
        request = request or _full_request(record)
        if record.start is None:
            value = self._array(record, request)
        else:
            value = _unpack_leaf(record, request, packs[record.item, record.array])
        return as_kind(record.kind, value) if convert is None else convert(record, value)

    def _array(self, record: LeafRecord, request: ReadRequest) -> Tensor:
        dtype = dtypes.TORCH[record.dtype]
        if record.array is None:
            return torch.empty(request.shape, dtype=dtype)
        with self._as_corrupt(zarr.description(record), record):
            tail_size = zarr.tail_size(self._read_small_file(zarr.description(record)), record)
        blocks = [Block(box.full, box.size) for box in request.boxes]
        positions = sorted({position for block in blocks for position in chunk_grid.chunks(block, record.chunk)})
        for position in positions:  # before any memory is allocated
            self._check_chunk(record, position, tail_size)
        filled = sum(math.prod(block.size) for block in blocks) == math.prod(request.shape)
        memory = (torch.empty if filled else torch.zeros)(math.prod(request.shape) * dtype.itemsize, dtype=torch.uint8)
        array = memory.numpy().view(_carrier(record)).reshape(request.shape)
        targets = [(block, chunk_grid.box_view(array, box)) for block, box in zip(blocks, request.boxes, strict=True)]
        for position in positions:
            with self._chunk(record, position, tail_size) as file:
                self._read_chunk(record, position, file, targets)
        return memory.view(dtype).view(request.shape)

    def _check_chunk(self, record: LeafRecord, position: Index, tail_size: int) -> None:
        """Check the size of the file of a chunk."""
        name = zarr.data_file(record, position)
        with self._as_corrupt(name, record):
            self.files.check(name, self._chunk_size(record, name, tail_size))

    @contextmanager
    def _chunk(self, record: LeafRecord, position: Index, tail_size: int) -> Iterator[IO[bytes]]:
        """Open the file of a chunk, after a check of its size."""
        name = zarr.data_file(record, position)
        with (
            self._as_corrupt(name, record),
            self.files.open(name, self._chunk_size(record, name, tail_size)) as file,
        ):
            yield file

    def _chunk_size(self, record: LeafRecord, name: str, tail_size: int) -> int:
        size, _ = self.header.files[name]
        if size != record.chunk_bytes + tail_size:
            raise ValueError(f"the header gives {size} bytes, shape and dtype {record.chunk_bytes + tail_size}")
        return size

    def _read_chunk(
        self, record: LeafRecord, position: Index, file: IO[bytes], targets: Sequence[tuple[Block, Array]]
    ) -> None:
        """Check a chunk, and copy into each target array the entries of its block."""
        size, crc = self.header.files[zarr.data_file(record, position)]
        block = chunk_grid.block_of(position, record.chunk)
        direct = _direct_target(block, targets)
        if direct is not None:
            computed_crc = _fill(file, direct)
        else:
            computed_crc = 0
            for slab, values in _row_slabs(file, block, _carrier(record)):
                computed_crc = zlib.crc32(values.reshape(-1).view(np.uint8).data, computed_crc)
                for target, array in targets:
                    shared = target.intersection(slab)
                    if shared is not None:
                        array[shared.slices_in(target)] = values[shared.slices_in(slab)]
        tail = file.read(size - record.chunk_bytes + 1)
        if len(tail) != size - record.chunk_bytes or zlib.crc32(tail, computed_crc) != crc:
            raise ValueError("its checksum does not match")
        zarr.check_tail(tail, record)

    def _check_files(self, records: Sequence[LeafRecord]) -> None:
        """Check all files but the arrays: small files, which Orbax reads and Lumen does not."""
        unpacked = [record for record in self.header.records if record.array is not None and record.start is None]
        stored = [*unpacked, *self.header.packs]
        for record in stored:
            with self._as_corrupt(zarr.description(record), record):
                if chunk_grid.count(record.shape, record.chunk) > len(self.header.files):
                    raise ValueError("the header does not list all of its files")
        arrays = {name for record in stored for name in zarr.data_files(record)}
        descriptions = {zarr.description(record) for record in records if record.array is not None}
        small = [
            name
            for name in self.header.files
            if name not in arrays and (name in descriptions or not _is_description(name))
        ]
        self.files.prefetch(small)
        for name in small:
            with self._as_corrupt(name):
                self._read_small_file(name)

    def _read_small_file(self, name: str) -> bytes:
        if name not in self.header.files:
            raise ValueError("the header does not list it")
        size, crc = self.header.files[name]
        with self.files.open(name, size) as file:
            content = file.read(size + 1)
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError("its checksum does not match")
        return content

    @contextmanager
    def _as_corrupt(self, name: str, record: LeafRecord | None = None) -> Iterator[None]:
        leaf_name = "" if record is None else f"{'a shard of ' if record.chunk_shape else ''}{name_of(record.path)!r}"
        leaf = f", which contains {leaf_name}," if leaf_name else ""
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            raise CorruptCheckpointError(f"{join(self.path, name)}{leaf} is damaged: {error}. {_ADVICE}") from error


@checked_first
def load(path: str | os.PathLike[str], *, item: str = "state", under: str = "") -> Any:
    """The tree in the checkpoint at `path` as nested dicts of CPU tensors, numpy arrays and Python scalars.

    Positions in tuples and lists are int keys. `item="extra"` loads what was saved as `extra`. `under` is the name of a
    subtree, such as "params" or "opt_state/0"; nothing else is read.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"params": {"weight": torch.ones(2)}, "sizes": (3, 4)})
    >>> lm.checkpoint.load(path)
    {'params': {'weight': tensor([1., 1.])}, 'sizes': {0: 3, 1: 4}}
    >>> lm.checkpoint.load(path, under="sizes/1")
    4
    """
    reader = Reader(path, item)
    records, depth = pick(reader, under)
    result: Any = {}
    for record, value in zip(records, reader.read(records), strict=True):
        keys = record.path[depth:]
        if not keys:
            return value
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return result


@checked_first
def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a checkpoint; its arrays are not read.

    `meta` and `metrics` are the user's. `format`, `lumen`, `torch` and `orbax` are the versions that wrote the
    checkpoint, and `time` is when. `leaves` has a dict for each leaf by name, with its `kind`, and its `dtype` and
    `shape`, or its `value`. `extra` has the same for the leaves of that tree.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"weight": torch.ones(2)}, meta={"lr": 0.1})
    >>> found = lm.checkpoint.metadata(path)
    >>> found["meta"], found["leaves"]["weight"]
    ({'lr': 0.1}, {'kind': 'tensor', 'dtype': 'float32', 'shape': (2,)})
    """
    head = read_header(path)
    fields = {name: value for name, value in head.fields.items() if name not in ("files", "leaves", "packs")}
    tables: dict[str, dict[str, Any]] = {item: {} for item in header.ITEMS}
    for record in head.records:
        tables[record.item][name_of(record.path)] = _summary(record)
    return {**fields, "leaves": tables["state"], "extra": tables["extra"]}


def _summary(record: LeafRecord) -> dict[str, Any]:
    if record.kind in ARRAYS:
        return {"kind": record.kind, "dtype": record.dtype, "shape": record.shape}
    if record.kind == "empty":
        return {"kind": record.kind}
    return {"kind": record.kind, "value": decode(record.kind, record.value)}


def pick(reader: Reader, under: str) -> tuple[list[LeafRecord], int]:
    """The leaves below a name, and the number of keys in that name; raises `CheckpointNotFoundError` if none match."""
    if not under:
        return reader.records, 0
    matches = [record for record in reader.records if f"{name_of(record.path)}/".startswith(f"{under}/")]
    if not matches:
        first = sorted({printable(name_of(record.path[:1])) for record in reader.records})
        raise CheckpointNotFoundError(f"{reader.path} has nothing under {under!r}; it has {', '.join(first)}.")
    return matches, len(under.split("/"))


def as_kind(kind: str, value: Tensor) -> Any:
    """A tensor as a leaf of this kind: the tensor itself, a numpy array, or a numpy scalar."""
    if kind == "tensor":
        return value
    dtype = dtypes.numpy_dtype(dtypes.NAMES[value.dtype])
    array = dtypes.bits(value).numpy().view(dtype)
    return array[()] if kind == "generic" else array


def read_header(path: str | os.PathLike[str]) -> header.Header:
    """The header of the checkpoint at `path`; raises `CheckpointNotFoundError` if there is none."""
    files = files_at(path)
    location = files.location
    try:
        with files.open(header.FILE) as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if files.lost_header():
            raise CorruptCheckpointError(f"{location} has lost its header (no {header.FILE}). {_ADVICE}") from error
        hint = "was not written by Lumen" if files.exists() else "does not exist"
        raise CheckpointNotFoundError(f"{location} is no checkpoint: it {hint} (no {header.FILE}).") from error
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{join(location, header.FILE)} cannot be read: {error}. {_ADVICE}") from error
    return header.load(text, str(location))


def lost_header(path: Path) -> bool:
    """Whether `path` is a checkpoint whose header is missing."""
    return LocalFiles(path).lost_header()


def _is_description(name: str) -> bool:
    return not name.startswith("meta/") and name.endswith("/zarr.json")


def _full_request(record: LeafRecord) -> ReadRequest:
    zeros = (0,) * len(record.shape)
    return ReadRequest(record.shape, (Slice(zeros, zeros, record.shape),) if record.nbytes else ())


def _unpack_leaf(record: LeafRecord, request: ReadRequest, pack: Array) -> Tensor:
    """The requested entries of a packed leaf, as a new tensor."""
    dtype = dtypes.TORCH[record.dtype]
    memory = torch.zeros(math.prod(request.shape) * dtype.itemsize, dtype=torch.uint8)
    unpack(record, pack, memory.numpy().view(_carrier(record)).reshape(request.shape), request.boxes)
    return memory.view(dtype).view(request.shape)


def _carrier(record: LeafRecord) -> np.dtype[Any]:
    return dtypes.numpy_dtype(dtypes.carrier(record.dtype))


def _direct_target(block: Block, targets: Sequence[tuple[Block, Array]]) -> memoryview | None:
    """The memory to read a chunk into directly, if all of it belongs to one contiguous target."""
    for target, array in targets:
        if target.intersection(block) == block:
            memory = chunk_grid.view(array, block.slices_in(target))
            return memory.reshape(-1).view(np.uint8).data if memory.flags.c_contiguous else None
    return None


def _row_slabs(file: IO[bytes], block: Block, dtype: np.dtype[Any]) -> Iterator[tuple[Block, Array]]:
    """The rows of a chunk, a few at a time, so that reading few entries of a large chunk needs little memory."""
    rows, row_shape = (block.size[0], block.size[1:]) if block.size else (1, ())
    rows_per_slab = max(1, min(rows, _IO_BYTES // max(1, math.prod(row_shape) * dtype.itemsize)))
    for start in range(0, rows, rows_per_slab):
        size = (min(rows_per_slab, rows - start), *row_shape) if block.size else ()
        values = np.empty(size, dtype)
        _fill(file, values.reshape(-1).view(np.uint8).data)
        yield Block((block.low[0] + start, *block.low[1:]) if block.low else (), size), values


def _fill(file: IO[bytes], memory: memoryview) -> int:
    """Read until `memory` is full; returns its CRC-32."""
    crc = 0
    start = 0
    while start < len(memory):
        buffer = memory[start : start + _IO_BYTES]
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"it ends after {start} bytes")
        crc = zlib.crc32(buffer[:count], crc)
        start += count
    return crc


def listed(node: Any) -> list[Any]:
    """The entries of a list or tuple, or of the dict with positions as keys that `load` returns for one.

    >>> from lumen.checkpoint import listed
    >>> listed({0: "a", 1: "b"}), listed(())
    (['a', 'b'], [])
    """
    return [node[i] for i in sorted(node)] if isinstance(node, Mapping) else list(node)
