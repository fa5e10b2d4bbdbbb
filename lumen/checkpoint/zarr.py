"""The format of arrays on disk: uncompressed Zarr arrays, of one chunk written by Orbax or of several by Lumen.

Reading needs no library: a file contains the bytes of a chunk, followed, from Orbax, by the index of the shard. Any
other format, such as a compressed chunk that would expand to a terabyte, is rejected.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from lumen.checkpoint import chunk_grid, dtypes
from lumen.checkpoint.snapshot import LeafRecord

_INDEX = struct.Struct("<QQ")  # offset and length of the only chunk of a shard
_CHECKSUM = 4
_ENDIAN = {"configuration": {"endian": "little"}, "name": "bytes"}
_NESTED_KEYS = {"name": "default"}  # chunk files in nested directories, as Orbax writes them
_FLAT_KEYS = {"configuration": {"separator": "."}, "name": "default"}  # in one directory: fewer names to sync
_BYTES = [[_ENDIAN], [{"name": "bytes"}]]  # dtypes of one byte have no byte order


def description(record: LeafRecord) -> str:
    """The file that describes the array of `record`."""
    return f"{record.item}/{record.array}/zarr.json"


def data_file(record: LeafRecord, position: tuple[int, ...] | None = None) -> str:
    """The file of the chunk at `position`; by default, of the only chunk."""
    numbers = map(str, position or (0,) * len(record.shape))
    if record.chunk_shape is not None:
        return f"{folder(record)}/{'.'.join(('c', *numbers))}"
    return "/".join((folder(record), "c", *numbers))


def folder(record: LeafRecord) -> str:
    """The directory of the array's files."""
    return f"{record.item}/{record.array}"


def data_files(record: LeafRecord) -> Iterator[str]:
    """The files of all chunks."""
    return (
        data_file(record, position) for position in chunk_grid.chunks(chunk_grid.full_block(record.shape), record.chunk)
    )


def chunked_description(text: bytes, record: LeafRecord) -> str:
    """The description of a chunked array: `text`, which describes a scalar of its dtype, with its shape and chunks."""
    description = json.loads(text)
    description["shape"] = list(record.shape)
    description["chunk_grid"]["configuration"]["chunk_shape"] = list(record.chunk)
    description["chunk_key_encoding"] = _FLAT_KEYS
    description["codecs"] = _BYTES[dtypes.itemsize(record.dtype) == 1]
    return json.dumps(description, separators=(",", ":"))


def tail_size(text: bytes, record: LeafRecord) -> int:
    """How many bytes follow the chunk in its file; raises ValueError for a format that Lumen does not write."""
    try:
        described = json.loads(text)
        expected = {
            "data_type": dtypes.carrier(record.dtype),
            "shape": list(record.shape),
            "node_type": "array",
            "zarr_format": 3,
            "chunk_grid": {"configuration": {"chunk_shape": list(record.chunk)}, "name": "regular"},
            "chunk_key_encoding": _NESTED_KEYS if record.chunk_shape is None else _FLAT_KEYS,
        }
        for name, value in expected.items():
            if described[name] != value:
                raise ValueError(f"{name} is {described[name]!r}, expected {value!r}")
        return _tail(described["codecs"], record)
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"the description is malformed: {error!r}") from error


def _tail(codecs: list[Any], record: LeafRecord) -> int:
    if codecs in _BYTES:
        return 0
    shard = codecs[0]["configuration"]
    expected = {"chunk_shape": list(record.chunk), "index_codecs": [_ENDIAN, {"name": "crc32c"}]}
    plain = shard["codecs"] in _BYTES and shard.get("index_location", "end") == "end"
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed" or not plain:
        raise ValueError(f"the codecs are {codecs}")
    for name, value in expected.items():
        if shard[name] != value:
            raise ValueError(f"{name} of the shard is {shard[name]!r}, expected {value!r}")
    return _INDEX.size + _CHECKSUM


def check_tail(tail: bytes, record: LeafRecord) -> None:
    """Raise ValueError if the index locates the chunk anywhere but at the start of the file."""
    if tail and _INDEX.unpack_from(tail) != (0, record.chunk_bytes):
        raise ValueError(f"the index of the shard is {_INDEX.unpack_from(tail)}, expected {(0, record.chunk_bytes)}")
