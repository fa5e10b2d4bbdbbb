"""The header of a checkpoint: its table of contents as JSON, with a checksum of every file and a digest of itself.

It is the item `meta` of the Orbax checkpoint, so Orbax can read it too. Nothing in it is trusted, because the file may
come from anyone.

Format 2 adds arrays of several chunks, written by several processes; format 3 adds packed arrays. A checkpoint has the
lowest format that can describe it, so versions that know only format 1 can read those that need no more. Each version
reads all formats up to its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, cast

import torch

from lumen.checkpoint import dtypes
from lumen.checkpoint.leaves import ARRAYS, decode, name_of
from lumen.checkpoint.snapshot import PACK, LeafRecord
from lumen.errors import CheckpointError, CheckpointFormatError, CorruptCheckpointError

FORMAT = 3  # the newest
FILE = "meta/metadata"
ITEMS = ("state", "extra")  # the trees: one is restored into a `like`, the other is loaded without

_DIMS = 64  # the limit of NumPy and torch

Files = dict[str, tuple[int, int]]  # size and CRC-32 by path


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint, checked."""

    fields: dict[str, Any]  # everything in the file, unchanged
    records: list[LeafRecord]
    files: Files
    packs: list[LeafRecord]  # arrays that contain many of the leaves


def dump(records: list[LeafRecord], files: Files, **fields: Any) -> str:
    """The text of a header."""
    packs = _packs_to_json(records)
    content = {
        "format": 3 if packs else 2 if any(record.chunk_shape is not None for record in records) else 1,
        **fields,
        "leaves": [_record_to_json(record) for record in records if record.start is None and record.kind != PACK],
        "files": {path: list(entry) for path, entry in files.items()},
        **({"packs": packs} if packs else {}),
    }
    return _canonical({**content, "digest": _digest(content)})


def check_json(value: Any, name: str) -> Any:
    """`value` as it will be read back; raises `CheckpointError` if JSON cannot represent it exactly."""
    try:
        text = json.dumps(value)
        same = json.dumps(_strict(value)) == text
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} must be JSON: {error}. Put tensors into the tree.") from error
    if not same:
        raise CheckpointError(f"{name} must be JSON, whose keys are strings: {value!r}. Write {{str(key): ...}}")
    return json.loads(text)


def load(text: bytes, path: str) -> Header:
    """The header in `text`; raises `CorruptCheckpointError` for one that was not written by `dump`."""
    try:
        content = json.loads(text)
        fields = dict(content)
        digest = fields.pop("digest", None)
    except (ValueError, TypeError, RecursionError) as error:
        raise _corrupt(path, f"it is not JSON ({error})") from error
    version = fields.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointFormatError(
            f"{path} was written by format {version}, this Lumen reads up to {FORMAT}: upgrade it:"
            " git pull in the clone of Lumen, and pip install ."
        )
    if digest != _digest(fields):
        raise _corrupt(path, "its digest does not match")
    try:
        records, files = [_record_from_json(record) for record in fields["leaves"]], _files(fields["files"])
        members, packs = _packs_from_json(fields.get("packs", []))
        return Header(fields, [*records, *members], files, packs)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _corrupt(path, f"its table of leaves is malformed ({error})") from error


def _corrupt(path: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the header {path}/{FILE} is damaged: {why}. Restore another checkpoint.")


def _strict(value: Any) -> Any:
    """`value` with other text for keys that are not strings, so that it differs after JSON has converted them."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else f"<{key!r}>": _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _digest(content: Any) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ records


def _record_to_json(record: LeafRecord) -> dict[str, Any]:
    entry: dict[str, Any] = {"item": record.item, "path": list(record.path), "kind": record.kind}
    if record.kind in ARRAYS:
        chunk_shape = {} if record.chunk_shape is None else {"parts": list(record.chunk_shape)}
        return {**entry, "dtype": record.dtype, "shape": list(record.shape), "array": record.array, **chunk_shape}
    return {**entry, "value": record.value}


def _record_from_json(entry: dict[str, Any]) -> LeafRecord:
    path = tuple(entry["path"])
    _require(all(type(key) in (str, int) for key in path), "a path")
    item, kind = entry["item"], entry["kind"]
    _require(item in ITEMS, f"the item {item!r}")
    if kind not in ARRAYS:
        value = entry["value"]
        if kind == "empty":
            _require(value in ("dict", "tuple"), "a container")
        else:
            decode(kind, value)
        return LeafRecord(item, path, kind, value=value)
    shape = tuple(entry["shape"])
    _require(all(type(size) is int and size >= 0 for size in shape) and len(shape) <= _DIMS, "a shape")
    chunk_shape = tuple(entry["parts"]) if "parts" in entry else None
    record = LeafRecord(item, path, kind, entry["dtype"], shape, entry["array"], chunk_shape=chunk_shape)
    if record.dtype in dtypes.SINCE.keys() - dtypes.TORCH.keys():
        raise CheckpointFormatError(
            f"the checkpoint's leaf {name_of(path)!r} has dtype {record.dtype}, which torch {torch.__version__} lacks:"
            f" read it with torch {dtypes.SINCE[record.dtype]} or newer, pip install"
            f" 'torch>={dtypes.SINCE[record.dtype]}'."
        )
    _require(record.dtype in dtypes.TORCH, f"the dtype {record.dtype!r}")
    # A size of zero does not make the others safe: torch computes strides from them.
    _require(math.prod(max(1, size) for size in shape) * dtypes.itemsize(record.dtype) < 2**63, "a shape")
    if kind != "tensor":
        dtypes.numpy_dtype(record.dtype)
    _require((record.array is None) == (record.nbytes == 0), "an array")
    if chunk_shape is not None:
        _require(record.array is not None and len(chunk_shape) == len(shape), "a number of dims")
        _require(all(type(c) is int and 1 <= c <= n for c, n in zip(chunk_shape, shape, strict=True)), "a chunk")
    if record.array is not None:
        _require(len(PurePosixPath(record.array).parts) == 1, f"the name {record.array!r}")
        check_path(record.array)
    return record


def _packs_to_json(records: list[LeafRecord]) -> list[dict[str, Any]]:
    """The packs, each with its leaves in order; of a leaf only its path and shape, and its kind if it is no tensor."""
    packs: dict[tuple[str, str | None], list[Any]] = {
        (record.item, record.array): [] for record in records if record.kind == PACK
    }
    for record in records:
        if record.start is not None:
            kind = [] if record.kind == "tensor" else [record.kind]
            packs[record.item, record.array].append([list(record.path), list(record.shape), *kind])
    return [
        {"item": record.item, "array": record.array, "dtype": record.dtype, "leaves": packs[record.item, record.array]}
        for record in records
        if record.kind == PACK
    ]


def _packs_from_json(table: Any) -> tuple[list[LeafRecord], list[LeafRecord]]:
    """The packed leaves, and the arrays that contain them."""
    members: list[LeafRecord] = []
    packs: list[LeafRecord] = []
    for entry in table:
        shared_fields = {name: entry[name] for name in ("item", "array", "dtype")}
        start = 0
        for path, shape, *kind in entry["leaves"]:
            record = _record_from_json(
                {**shared_fields, "path": path, "shape": shape, "kind": kind[0] if kind else "tensor"}
            )
            _require(record.kind in ARRAYS and record.array is not None, "a packed leaf")
            members.append(replace(record, start=start))
            start += math.prod(record.shape)
        pack = _record_from_json({**shared_fields, "path": [entry["array"]], "shape": [start], "kind": "tensor"})
        packs.append(replace(pack, kind=PACK))
    return members, packs


def _files(table: Any) -> Files:
    for path, (size, crc) in table.items():
        check_path(path)
        _require(type(size) is int and type(crc) is int, "a file")
    return {path: (entry[0], entry[1]) for path, entry in cast("dict[str, list[int]]", table).items()}


def check_path(path: str) -> None:
    """Raise ValueError for a path that leads out of the checkpoint, or is not a path."""
    segments = path.split("/")
    sound = path.isprintable() and not any(segment in ("", ".", "..") or "\\" in segment for segment in segments)
    _require(sound, f"the path {path!r}")


def _require(condition: bool, label: str) -> None:
    if not condition:
        raise ValueError(f"{label} is not allowed")
