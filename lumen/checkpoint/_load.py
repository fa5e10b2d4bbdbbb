"""Reading one checkpoint, which may be damaged, or made to harm.

Only plain files below the checkpoint's own directory are opened, no code is run, and memory is taken only for what the
files really hold.
"""

from __future__ import annotations

import math
import os
import stat
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
from lumen.checkpoint.chunk_grid import Array, Block, Index
from lumen.checkpoint.leaves import ARRAYS, decode, name_of
from lumen.checkpoint.leaves import Path as LeafPath
from lumen.checkpoint.packing import unpack
from lumen.checkpoint.snapshot import LeafRecord
from lumen.core.sharding import Slice
from lumen.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, printable

_ORBAX = "_CHECKPOINT_METADATA"  # its own file in each checkpoint
_PIECE = 1 << 22  # read and summed while it is in the cache
_ADVICE = "Restore another checkpoint, or a copy of this one."


class Wanted(NamedTuple):
    """What is to be read of an array: the tensor's `shape`, and which of its boxes come from where."""

    shape: tuple[int, ...]
    boxes: tuple[Slice, ...]


class Reader:
    """One item of a checkpoint: its leaves by the header, checked against the files that it lists."""

    def __init__(self, path: str | os.PathLike[str], item: str = "state") -> None:
        if item not in header.ITEMS:
            raise CheckpointError(f"a checkpoint holds the items {' and '.join(header.ITEMS)}; got item={item!r}.")
        self.path = Path(path)
        self.header = read_header(self.path)
        self.rows = [row for row in self.header.rows if row.item == item]

    def read(
        self,
        rows: Sequence[LeafRecord],
        place: Callable[[LeafRecord, Tensor], Any] | None = None,
        wanted: Mapping[LeafPath, Wanted] | None = None,
    ) -> list[Any]:
        """The values of these leaves; each array goes through `place` as soon as it is read.

        `wanted` says, by the ways to leaves, of which only a part is to be read; files that hold nothing of it are not
        opened.

        Raises `CorruptCheckpointError`, naming the file and the leaf, where anything is not as it was written.
        """
        self._check_files(rows)
        parts = wanted or {}
        packs = self._packs(rows)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as others:
            return list(others.map(lambda row: self._value(row, place, parts.get(row.path), packs), rows))

    def _packs(self, rows: Sequence[LeafRecord]) -> dict[tuple[str, str | None], Array]:
        """The arrays that hold these leaves among others."""
        names = {(row.item, row.array) for row in rows if row.start is not None}
        found = [row for row in self.header.packs if (row.item, row.array) in names]
        return {
            (row.item, row.array): dtypes.bits(self._array(row, _all_of(row))).numpy().view(_carrier(row))
            for row in found
        }

    def _value(
        self,
        row: LeafRecord,
        place: Callable[[LeafRecord, Tensor], Any] | None,
        part: Wanted | None,
        packs: Mapping[tuple[str, str | None], Array],
    ) -> Any:
        if row.kind == "empty":
            return {} if row.value == "dict" else ()
        if row.kind not in ARRAYS:
            return decode(row.kind, row.value)
        part = part or _all_of(row)
        value = self._array(row, part) if row.start is None else _of_pack(row, part, packs[row.item, row.array])
        return as_kind(row.kind, value) if place is None else place(row, value)

    def _array(self, row: LeafRecord, part: Wanted) -> Tensor:
        dtype = dtypes.TORCH[row.dtype]
        if row.array is None:
            return torch.empty(part.shape, dtype=dtype)
        with self._damage(zarr.description(row), row):
            tail_size = zarr.tail_size(self._small(zarr.description(row)), row)
        blocks = [Block(box.whole, box.size) for box in part.boxes]
        places = sorted({place for block in blocks for place in chunk_grid.chunks(block, row.chunk)})
        for place in places:  # before any memory is taken
            with self._chunk(row, place, tail_size):
                pass
        filled = sum(math.prod(block.size) for block in blocks) == math.prod(part.shape)
        memory = (torch.empty if filled else torch.zeros)(math.prod(part.shape) * dtype.itemsize, dtype=torch.uint8)
        array = memory.numpy().view(_carrier(row)).reshape(part.shape)
        into = [(block, chunk_grid.in_box(array, box)) for block, box in zip(blocks, part.boxes, strict=True)]
        for place in places:
            with self._chunk(row, place, tail_size) as file:
                self._read_chunk(row, place, file, into)
        return memory.view(dtype).view(part.shape)

    @contextmanager
    def _chunk(self, row: LeafRecord, place: Index, tail_size: int) -> Iterator[IO[bytes]]:
        """The file of a chunk, of the size that it should have."""
        name = zarr.data_file(row, place)
        with self._damage(name, row):
            size, _ = self.header.files[name]
            if size != row.chunk_bytes + tail_size:
                raise ValueError(f"the header gives {size} bytes, shape and dtype {row.chunk_bytes + tail_size}")
            with open_file(self.path, name, size) as file:
                yield file

    def _read_chunk(self, row: LeafRecord, place: Index, file: IO[bytes], into: Sequence[tuple[Block, Array]]) -> None:
        """Copy of a chunk what belongs into each of the blocks, and check all of it."""
        size, crc = self.header.files[zarr.data_file(row, place)]
        block = chunk_grid.block_of(place, row.chunk)
        direct = _direct(block, into)
        if direct is not None:
            found = _fill(file, direct)
        else:
            found = 0
            for slab, values in _slabs(file, block, _carrier(row)):
                found = zlib.crc32(values.reshape(-1).view(np.uint8).data, found)
                for target, array in into:
                    shared = target.meet(slab)
                    if shared is not None:
                        array[shared.within(target)] = values[shared.within(slab)]
        tail = file.read(size - row.chunk_bytes + 1)
        if len(tail) != size - row.chunk_bytes or zlib.crc32(tail, found) != crc:
            raise ValueError("its checksum does not match")
        zarr.check_tail(tail, row)

    def _check_files(self, rows: Sequence[LeafRecord]) -> None:
        """Everything but the arrays: small files, which Orbax reads and we do not."""
        alone = [row for row in self.header.rows if row.array is not None and row.start is None]
        stored = [*alone, *self.header.packs]
        for row in stored:
            with self._damage(zarr.description(row), row):
                if chunk_grid.count(row.shape, row.chunk) > len(self.header.files):
                    raise ValueError("the header does not list all of its files")
        arrays = {name for row in stored for name in zarr.data_files(row)}
        wanted = {zarr.description(row) for row in rows if row.array is not None}
        for name in self.header.files:
            described = not name.startswith("meta/") and name.endswith("/zarr.json")
            if name not in arrays and (name in wanted or not described):
                with self._damage(name):
                    self._small(name)

    def _small(self, name: str) -> bytes:
        if name not in self.header.files:
            raise ValueError("the header does not list it")
        size, crc = self.header.files[name]
        with open_file(self.path, name, size) as file:
            content = file.read(size + 1)
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError("its checksum does not match")
        return content

    @contextmanager
    def _damage(self, name: str, row: LeafRecord | None = None) -> Iterator[None]:
        what = "" if row is None else f"{'a part of ' if row.parts else ''}{name_of(row.path)!r}"
        leaf = f", which holds {what}," if what else ""
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            raise CorruptCheckpointError(f"{self.path / name}{leaf} is damaged: {error}. {_ADVICE}") from error


def load(path: str | os.PathLike[str], *, item: str = "state", under: str = "") -> Any:
    """The tree in the checkpoint at `path` as nested dicts of CPU tensors, numpy arrays and Python scalars.

    Positions in tuples and lists are int keys. `item="extra"` gives what was saved as `extra`. `under` picks a part
    by its name, such as "params" or "opt_state/0"; what lies outside it is not read.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"params": {"weight": torch.ones(2)}, "sizes": (3, 4)})
    >>> lm.checkpoint.load(path)
    {'params': {'weight': tensor([1., 1.])}, 'sizes': {0: 3, 1: 4}}
    >>> lm.checkpoint.load(path, under="sizes/1")
    4
    """
    reader = Reader(path, item)
    picked, depth = pick(reader, under)
    result: Any = {}
    for row, value in zip(picked, reader.read(picked), strict=True):
        way = row.path[depth:]
        if not way:
            return value
        node = result
        for part in way[:-1]:
            node = node.setdefault(part, {})
        node[way[-1]] = value
    return result


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of a checkpoint, without reading its arrays.

    `meta` and `metrics` are the user's; `format`, `lumen`, `torch`, `orbax` and `time` say what wrote it and when;
    `leaves` has a dict for each leaf by its name: its `kind`, and `dtype` and `shape`, or `value`; `extra` has the same
    for the leaves of that tree.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"weight": torch.ones(2)}, meta={"lr": 0.1})
    >>> found = lm.checkpoint.metadata(path)
    >>> found["meta"], found["leaves"]["weight"]
    ({'lr': 0.1}, {'kind': 'tensor', 'dtype': 'float32', 'shape': (2,)})
    """
    head = read_header(Path(path))
    fields = {name: value for name, value in head.fields.items() if name not in ("files", "leaves", "packs")}
    tables: dict[str, dict[str, Any]] = {item: {} for item in header.ITEMS}
    for row in head.rows:
        tables[row.item][name_of(row.path)] = _described(row)
    return {**fields, "leaves": tables["state"], "extra": tables["extra"]}


def _described(row: LeafRecord) -> dict[str, Any]:
    if row.kind in ARRAYS:
        return {"kind": row.kind, "dtype": row.dtype, "shape": row.shape}
    if row.kind == "empty":
        return {"kind": row.kind}
    return {"kind": row.kind, "value": decode(row.kind, row.value)}


def pick(reader: Reader, under: str) -> tuple[list[LeafRecord], int]:
    """The leaves below a name, and how many parts that name has; raises `CheckpointNotFoundError` if there is none."""
    if not under:
        return reader.rows, 0
    picked = [row for row in reader.rows if f"{name_of(row.path)}/".startswith(f"{under}/")]
    if not picked:
        first = sorted({printable(name_of(row.path[:1])) for row in reader.rows})
        raise CheckpointNotFoundError(f"{reader.path} holds nothing under {under!r}; it holds {', '.join(first)}.")
    return picked, len(under.split("/"))


def as_kind(kind: str, value: Tensor) -> Any:
    """A tensor as the kind of leaf that was asked for: itself, a numpy array, or a numpy scalar."""
    if kind == "tensor":
        return value
    dtype = dtypes.numpy_dtype(dtypes.NAMES[value.dtype])
    array = dtypes.bits(value).numpy().view(dtype)
    return array[()] if kind == "generic" else array


def read_header(path: Path) -> header.Header:
    """The header of the checkpoint at `path`; raises `CheckpointNotFoundError` where there is none."""
    try:
        with open_file(path, header.FILE) as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if lost_header(path):
            raise CorruptCheckpointError(f"{path} has lost its header (no {header.FILE}). {_ADVICE}") from error
        hint = "was not written by Lumen" if path.is_dir() else "does not exist"
        raise CheckpointNotFoundError(f"{path} is no checkpoint: it {hint} (no {header.FILE}).") from error
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path / header.FILE} cannot be read: {error}. {_ADVICE}") from error
    return header.load(text, str(path))


def lost_header(path: Path) -> bool:
    """Whether `path` is what is left of a checkpoint whose header is gone."""
    if not path.is_dir() or path.is_symlink() or os.path.lexists(path / header.FILE):
        return False
    return any(os.path.lexists(path / name) for name in (*header.ITEMS, _ORBAX))


@contextmanager
def open_file(root: Path, name: str, size: int | None = None) -> Iterator[IO[bytes]]:
    """A plain file below `root`, reached without a link; raises ValueError for anything else, or another size."""
    parts = name.split("/")
    for end in range(1, len(parts)):
        if not stat.S_ISDIR(os.lstat(root.joinpath(*parts[:end])).st_mode):
            raise ValueError("the way to it leads through something that is no directory")
    # A named pipe would block until somebody writes.
    number = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb", buffering=0) as file:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        if size is not None and found.st_size != size:
            raise ValueError(f"it has {found.st_size} bytes, expected {size}")
        yield file


def _all_of(row: LeafRecord) -> Wanted:
    zeros = (0,) * len(row.shape)
    return Wanted(row.shape, (Slice(zeros, zeros, row.shape),) if row.nbytes else ())


def _of_pack(row: LeafRecord, part: Wanted, pack: Array) -> Tensor:
    """A leaf, or what is wanted of it, in memory of its own."""
    dtype = dtypes.TORCH[row.dtype]
    memory = torch.zeros(math.prod(part.shape) * dtype.itemsize, dtype=torch.uint8)
    unpack(row, pack, memory.numpy().view(_carrier(row)).reshape(part.shape), part.boxes)
    return memory.view(dtype).view(part.shape)


def _carrier(row: LeafRecord) -> np.dtype[Any]:
    return dtypes.numpy_dtype(dtypes.carrier(row.dtype))


def _direct(block: Block, into: Sequence[tuple[Block, Array]]) -> memoryview | None:
    """The memory where all of a chunk belongs, if it is one piece."""
    for target, array in into:
        if target.meet(block) == block:
            room = chunk_grid.view(array, block.within(target))
            return room.reshape(-1).view(np.uint8).data if room.flags.c_contiguous else None
    return None


def _slabs(file: IO[bytes], block: Block, dtype: np.dtype[Any]) -> Iterator[tuple[Block, Array]]:
    """The rows of a chunk, a few at a time, so that a part of a large one takes little memory."""
    rows, rest = (block.size[0], block.size[1:]) if block.size else (1, ())
    few = max(1, min(rows, _PIECE // max(1, math.prod(rest) * dtype.itemsize)))
    for start in range(0, rows, few):
        size = (min(few, rows - start), *rest) if block.size else ()
        values = np.empty(size, dtype)
        _fill(file, values.reshape(-1).view(np.uint8).data)
        yield Block((block.low[0] + start, *block.low[1:]) if block.low else (), size), values


def _fill(file: IO[bytes], memory: memoryview) -> int:
    """Read until `memory` is full; its CRC-32."""
    crc = 0
    start = 0
    while start < len(memory):
        piece = memory[start : start + _PIECE]
        count = file.readinto(piece)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"it ends after {start} bytes")
        crc = zlib.crc32(piece[:count], crc)
        start += count
    return crc


def listed(node: Any) -> list[Any]:
    """A list or tuple, also as `load` gives it back: a dict with its positions as keys.

    >>> from lumen.checkpoint import listed
    >>> listed({0: "a", 1: "b"}), listed(())
    (['a', 'b'], [])
    """
    return [node[i] for i in sorted(node)] if isinstance(node, Mapping) else list(node)
