"""Reading one checkpoint, which may be damaged, or made to harm.

Only plain files below the checkpoint's own directory are opened, no code is run, and memory is taken only for what the
files really hold.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lumen.checkpoint import dtypes, header, zarr
from lumen.checkpoint.host import Row
from lumen.checkpoint.leaves import ARRAYS, decode, name_of
from lumen.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError

_PIECE = 1 << 22  # read and summed while it is in the cache
_ADVICE = "Restore another checkpoint, or a copy of this one."


class Reader:
    """One item of a checkpoint: its leaves by the header, checked against the files that it lists."""

    def __init__(self, path: str | os.PathLike[str], item: str = "state") -> None:
        if item not in header.ITEMS:
            raise CheckpointError(f"a checkpoint holds the items {' and '.join(header.ITEMS)}; got item={item!r}.")
        self.path = Path(path)
        self.header = read_header(self.path)
        self.rows = [row for row in self.header.rows if row.item == item]

    def read(self, rows: Sequence[Row], place: Callable[[Row, Tensor], Any] | None = None) -> list[Any]:
        """The values of these leaves; each array goes through `place` as soon as it is read.

        Raises `CorruptCheckpointError`, naming the file and the leaf, where anything is not as it was written.
        """
        self._check_files(rows)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as others:
            return list(others.map(lambda row: self._value(row, place), rows))

    def _value(self, row: Row, place: Callable[[Row, Tensor], Any] | None) -> Any:
        if row.kind == "empty":
            return {} if row.value == "dict" else ()
        if row.kind not in ARRAYS:
            return decode(row.kind, row.value)
        value = self._array(row)
        return as_kind(row.kind, value) if place is None else place(row, value)

    def _array(self, row: Row) -> Tensor:
        dtype = dtypes.TORCH[row.dtype]
        if row.array is None:
            return torch.empty(row.shape, dtype=dtype)
        name = zarr.data_file(row)
        with self._damage(name, row):
            tail_size = zarr.tail_size(self._small(zarr.description(row)), row)
            size, crc = self.header.files[name]
            if size != row.nbytes + tail_size:
                raise ValueError(f"the header gives {size} bytes, shape and dtype {row.nbytes + tail_size}")
            with open_file(self.path, name, size) as file:
                memory = torch.empty(row.nbytes, dtype=torch.uint8)
                found = _fill(file, memory.numpy().data)
                tail = file.read(tail_size + 1)
            if len(tail) != tail_size or zlib.crc32(tail, found) != crc:
                raise ValueError("its checksum does not match")
            zarr.check_tail(tail, row)
        return memory.view(dtype).view(row.shape)

    def _check_files(self, rows: Sequence[Row]) -> None:
        """Everything but the arrays: small files, which Orbax reads and we do not."""
        arrays = {zarr.data_file(row) for row in self.header.rows if row.array is not None}
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
    def _damage(self, name: str, row: Row | None = None) -> Iterator[None]:
        leaf = f", which holds {name_of(row.path)!r}," if row else ""
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
    fields = {name: value for name, value in head.fields.items() if name not in ("files", "leaves")}
    tables: dict[str, dict[str, Any]] = {item: {} for item in header.ITEMS}
    for row in head.rows:
        tables[row.item][name_of(row.path)] = _described(row)
    return {**fields, "leaves": tables["state"], "extra": tables["extra"]}


def _described(row: Row) -> dict[str, Any]:
    if row.kind in ARRAYS:
        return {"kind": row.kind, "dtype": row.dtype, "shape": row.shape}
    if row.kind == "empty":
        return {"kind": row.kind}
    return {"kind": row.kind, "value": decode(row.kind, row.value)}


def pick(reader: Reader, under: str) -> tuple[list[Row], int]:
    """The leaves below a name, and how many parts that name has; raises `CheckpointNotFoundError` if there is none."""
    if not under:
        return reader.rows, 0
    picked = [row for row in reader.rows if f"{name_of(row.path)}/".startswith(f"{under}/")]
    if not picked:
        first = sorted({name_of(row.path[:1]) for row in reader.rows})
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
        hint = "was not written by Lumen, or is damaged" if path.is_dir() else "does not exist"
        raise CheckpointNotFoundError(f"{path} is no checkpoint: it {hint} (no {header.FILE}).") from error
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path / header.FILE} cannot be read: {error}. {_ADVICE}") from error
    return header.load(text, str(path))


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
