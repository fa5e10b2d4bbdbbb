"""The header of a checkpoint: what is in it, as JSON, with a digest of every file and of itself.

It is the item `meta` of the Orbax checkpoint, so that Orbax reads it too. Nothing in it is trusted: it may come from a
stranger.

Format 2 adds arrays in parts, written by several processes, format 3 many small arrays in one. A checkpoint is of the
lowest format that can say what it holds, so that one without either is read by versions that know format 1 alone; each
version reads all formats before its own.
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
ITEMS = ("state", "extra")  # trees: what `like` describes, and what is read as it is

_DIMS = 64  # that NumPy and torch know

Files = dict[str, tuple[int, int]]  # size and CRC-32 by path


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint, checked."""

    fields: dict[str, Any]  # everything as it stands in the file
    rows: list[LeafRecord]
    files: Files
    packs: list[LeafRecord]  # arrays that hold many of the rows


def dump(rows: list[LeafRecord], files: Files, **fields: Any) -> str:
    """The text of a header."""
    packs = _packs_to_json(rows)
    content = {
        "format": 3 if packs else 2 if any(row.parts is not None for row in rows) else 1,
        **fields,
        "leaves": [_row_to_json(row) for row in rows if row.start is None and row.kind != PACK],
        "files": {path: list(entry) for path, entry in files.items()},
        **({"packs": packs} if packs else {}),
    }
    return _canonical({**content, "digest": _digest(content)})


def check_json(value: Any, what: str) -> Any:
    """`value` as it will be read back; raises `CheckpointError` where JSON would lose something of it."""
    try:
        text = json.dumps(value)
        same = json.dumps(_strict(value)) == text
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} must be JSON: {error}. Tensors belong into the tree.") from error
    if not same:
        raise CheckpointError(f"{what} must be JSON, whose keys are strings: {value!r}. Write {{str(key): ...}}")
    return json.loads(text)


def load(text: bytes, where: str) -> Header:
    """The header in `text`; raises `CorruptCheckpointError` for one that was not written by `dump`."""
    try:
        content = json.loads(text)
        fields = dict(content)
        digest = fields.pop("digest", None)
    except (ValueError, TypeError, RecursionError) as error:
        raise _corrupt(where, f"it is not JSON ({error})") from error
    version = fields.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointFormatError(
            f"{where} was written by format {version}, this Lumen reads up to {FORMAT}: upgrade with"
            " pip install --upgrade lumen-torch."
        )
    if digest != _digest(fields):
        raise _corrupt(where, "its digest does not match")
    try:
        rows, files = [_row_from_json(row) for row in fields["leaves"]], _files(fields["files"])
        members, packs = _packs_from_json(fields.get("packs", []))
        return Header(fields, [*rows, *members], files, packs)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _corrupt(where, f"its table of leaves is not sound ({error})") from error


def _corrupt(where: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the header {where}/{FILE} is damaged: {why}. Restore another checkpoint.")


def _strict(value: Any) -> Any:
    """`value`, where a key that is no string, which JSON would make one, is made something else."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else f"<{key!r}>": _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _digest(content: Any) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- rows


def _row_to_json(row: LeafRecord) -> dict[str, Any]:
    entry: dict[str, Any] = {"item": row.item, "path": list(row.path), "kind": row.kind}
    if row.kind in ARRAYS:
        parts = {} if row.parts is None else {"parts": list(row.parts)}
        return {**entry, "dtype": row.dtype, "shape": list(row.shape), "array": row.array, **parts}
    return {**entry, "value": row.value}


def _row_from_json(entry: dict[str, Any]) -> LeafRecord:
    path = tuple(entry["path"])
    _demand(all(type(part) in (str, int) for part in path), "a path")
    item, kind = entry["item"], entry["kind"]
    _demand(item in ITEMS, f"the item {item!r}")
    if kind not in ARRAYS:
        value = entry["value"]
        if kind == "empty":
            _demand(value in ("dict", "tuple"), "a container")
        else:
            decode(kind, value)
        return LeafRecord(item, path, kind, value=value)
    shape = tuple(entry["shape"])
    _demand(all(type(size) is int and size >= 0 for size in shape) and len(shape) <= _DIMS, "a shape")
    parts = tuple(entry["parts"]) if "parts" in entry else None
    row = LeafRecord(item, path, kind, entry["dtype"], shape, entry["array"], parts=parts)
    if row.dtype in dtypes.SINCE.keys() - dtypes.TORCH.keys():
        raise CheckpointFormatError(
            f"the checkpoint's leaf {name_of(path)!r} is of dtype {row.dtype}, which torch {torch.__version__} does not"
            f" have: read it with torch {dtypes.SINCE[row.dtype]} or newer, pip install"
            f" 'torch>={dtypes.SINCE[row.dtype]}'."
        )
    _demand(row.dtype in dtypes.TORCH, f"the dtype {row.dtype!r}")
    # Sizes of zero do not help: torch computes strides from the others.
    _demand(math.prod(max(1, size) for size in shape) * dtypes.itemsize(row.dtype) < 2**63, "a shape")
    if kind != "tensor":
        dtypes.numpy_dtype(row.dtype)
    _demand((row.array is None) == (row.nbytes == 0), "an array")
    if parts is not None:
        _demand(row.array is not None and len(parts) == len(shape), "a number of dims")
        _demand(all(type(c) is int and 1 <= c <= n for c, n in zip(parts, shape, strict=True)), "a chunk")
    if row.array is not None:
        _demand(len(PurePosixPath(row.array).parts) == 1, f"the name {row.array!r}")
        check_path(row.array)
    return row


def _packs_to_json(rows: list[LeafRecord]) -> list[dict[str, Any]]:
    """The arrays that hold many leaves, and these in their order: as little of each as can be."""
    packs: dict[tuple[str, str | None], list[Any]] = {(row.item, row.array): [] for row in rows if row.kind == PACK}
    for row in rows:
        if row.start is not None:
            kind = [] if row.kind == "tensor" else [row.kind]
            packs[row.item, row.array].append([list(row.path), list(row.shape), *kind])
    return [
        {"item": row.item, "array": row.array, "dtype": row.dtype, "leaves": packs[row.item, row.array]}
        for row in rows
        if row.kind == PACK
    ]


def _packs_from_json(table: Any) -> tuple[list[LeafRecord], list[LeafRecord]]:
    """The leaves, and the arrays that hold them."""
    members: list[LeafRecord] = []
    packs: list[LeafRecord] = []
    for entry in table:
        common = {name: entry[name] for name in ("item", "array", "dtype")}
        start = 0
        for path, shape, *kind in entry["leaves"]:
            row = _row_from_json({**common, "path": path, "shape": shape, "kind": kind[0] if kind else "tensor"})
            _demand(row.kind in ARRAYS and row.array is not None, "a packed leaf")
            members.append(replace(row, start=start))
            start += math.prod(row.shape)
        whole = _row_from_json({**common, "path": [entry["array"]], "shape": [start], "kind": "tensor"})
        packs.append(replace(whole, kind=PACK))
    return members, packs


def _files(table: Any) -> Files:
    for path, (size, crc) in table.items():
        check_path(path)
        _demand(type(size) is int and type(crc) is int, "a file")
    return {path: (entry[0], entry[1]) for path, entry in cast("dict[str, list[int]]", table).items()}


def check_path(path: str) -> None:
    """Raise ValueError for a path that is not one below the checkpoint."""
    parts = path.split("/")
    sound = path.isprintable() and not any(part in ("", ".", "..") or "\\" in part for part in parts)
    _demand(sound, f"the path {path!r}")


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is not allowed")
