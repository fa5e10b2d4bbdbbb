"""The one form in which Orbax writes our arrays: a Zarr array of one chunk, uncompressed.

Reading it needs no library: the file is the array's bytes, and after them the index of the shard. Anything else, such
as a compressed chunk that would unfold to a terabyte, is refused.
"""

from __future__ import annotations

import json
import struct
from pathlib import PurePosixPath
from typing import Any

from lumen.checkpoint import dtypes
from lumen.checkpoint.host import Row

_INDEX = struct.Struct("<QQ")  # where the only chunk of a shard begins, and its length
_CHECKSUM = 4
_ENDIAN = {"configuration": {"endian": "little"}, "name": "bytes"}
_BYTES = [[_ENDIAN], [{"name": "bytes"}]]  # types of one byte have no order


def description(row: Row) -> str:
    """The file that describes the array of `row`."""
    return f"{row.item}/{row.array}/zarr.json"


def data_file(row: Row) -> str:
    """The file that holds its bytes."""
    return str(PurePosixPath(row.item, str(row.array), "c", *("0" for _ in row.shape)))


def tail_size(text: bytes, row: Row) -> int:
    """How many bytes follow the array's own in its file; raises ValueError where it is not in the form we write."""
    try:
        found = json.loads(text)
        wanted = {
            "data_type": dtypes.carrier(row.dtype),
            "shape": list(row.shape),
            "node_type": "array",
            "zarr_format": 3,
            "chunk_grid": {"configuration": {"chunk_shape": list(row.shape)}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
        }
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(f"{name} is {found[name]}, expected {value}")
        return _tail(found["codecs"], row)
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"the description is not sound: {error!r}") from error


def _tail(codecs: list[Any], row: Row) -> int:
    if codecs in _BYTES:
        return 0
    shard = codecs[0]["configuration"]
    wanted = {"chunk_shape": list(row.shape), "index_codecs": [_ENDIAN, {"name": "crc32c"}]}
    plain = shard["codecs"] in _BYTES and shard.get("index_location", "end") == "end"
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed" or not plain:
        raise ValueError(f"the codecs are {codecs}")
    for name, value in wanted.items():
        if shard[name] != value:
            raise ValueError(f"{name} of the shard is {shard[name]}, expected {value}")
    return _INDEX.size + _CHECKSUM


def check_tail(tail: bytes, row: Row) -> None:
    """Raise ValueError where the index says that the array is elsewhere than before it."""
    if tail and _INDEX.unpack_from(tail) != (0, row.nbytes):
        raise ValueError(f"the index of the shard is {_INDEX.unpack_from(tail)}, expected {(0, row.nbytes)}")
