"""The one form in which our arrays lie on disk: a Zarr array, uncompressed, of one chunk from Orbax or several of ours.

Reading it needs no library: a file is the bytes of a chunk, and after them, from Orbax, the index of the shard.
Anything else, such as a compressed chunk that would unfold to a terabyte, is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from lumen.checkpoint import chunk_grid, dtypes
from lumen.checkpoint.snapshot import LeafRecord

_INDEX = struct.Struct("<QQ")  # where the only chunk of a shard begins, and its length
_CHECKSUM = 4
_ENDIAN = {"configuration": {"endian": "little"}, "name": "bytes"}
_DEEP = {"name": "default"}  # chunks in directories, as Orbax has them
_FLAT = {"configuration": {"separator": "."}, "name": "default"}  # side by side: fewer names to be synced
_BYTES = [[_ENDIAN], [{"name": "bytes"}]]  # types of one byte have no order


def description(row: LeafRecord) -> str:
    """The file that describes the array of `row`."""
    return f"{row.item}/{row.array}/zarr.json"


def data_file(row: LeafRecord, place: tuple[int, ...] | None = None) -> str:
    """The file that holds its bytes, or those of the chunk at `place`."""
    numbers = map(str, place or (0,) * len(row.shape))
    if row.parts is not None:
        return f"{folder(row)}/{'.'.join(('c', *numbers))}"
    return str(PurePosixPath(folder(row), "c", *numbers))


def folder(row: LeafRecord) -> str:
    """Where the files of the array are."""
    return f"{row.item}/{row.array}"


def data_files(row: LeafRecord) -> Iterator[str]:
    """All of them."""
    return (data_file(row, place) for place in chunk_grid.chunks(chunk_grid.whole(row.shape), row.chunk))


def of_parts(text: bytes, row: LeafRecord) -> str:
    """What describes the array of `row`, in parts, where `text` describes a single number of its dtype."""
    description = json.loads(text)
    description["shape"] = list(row.shape)
    description["chunk_grid"]["configuration"]["chunk_shape"] = list(row.chunk)
    description["chunk_key_encoding"] = _FLAT
    description["codecs"] = _BYTES[dtypes.itemsize(row.dtype) == 1]
    return json.dumps(description, separators=(",", ":"))


def tail_size(text: bytes, row: LeafRecord) -> int:
    """How many bytes follow a chunk's own in its file; raises ValueError where it is not in the form we write."""
    try:
        found = json.loads(text)
        wanted = {
            "data_type": dtypes.carrier(row.dtype),
            "shape": list(row.shape),
            "node_type": "array",
            "zarr_format": 3,
            "chunk_grid": {"configuration": {"chunk_shape": list(row.chunk)}, "name": "regular"},
            "chunk_key_encoding": _DEEP if row.parts is None else _FLAT,
        }
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(f"{name} is {found[name]!r}, expected {value!r}")
        return _tail(found["codecs"], row)
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"the description is not sound: {error!r}") from error


def _tail(codecs: list[Any], row: LeafRecord) -> int:
    if codecs in _BYTES:
        return 0
    shard = codecs[0]["configuration"]
    wanted = {"chunk_shape": list(row.chunk), "index_codecs": [_ENDIAN, {"name": "crc32c"}]}
    plain = shard["codecs"] in _BYTES and shard.get("index_location", "end") == "end"
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed" or not plain:
        raise ValueError(f"the codecs are {codecs}")
    for name, value in wanted.items():
        if shard[name] != value:
            raise ValueError(f"{name} of the shard is {shard[name]!r}, expected {value!r}")
    return _INDEX.size + _CHECKSUM


def check_tail(tail: bytes, row: LeafRecord) -> None:
    """Raise ValueError where the index says that the array is elsewhere than before it."""
    if tail and _INDEX.unpack_from(tail) != (0, row.chunk_bytes):
        raise ValueError(f"the index of the shard is {_INDEX.unpack_from(tail)}, expected {(0, row.chunk_bytes)}")
