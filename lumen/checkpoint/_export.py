"""A checkpoint as a file that other programs read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

from lumen.checkpoint import dtypes
from lumen.checkpoint._load import Reader
from lumen.checkpoint._save import TEMPORARY
from lumen.checkpoint.fsync import sync_directory, sync_file
from lumen.checkpoint.leaves import ARRAYS, name_of
from lumen.checkpoint.snapshot import LeafRecord
from lumen.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, printable

_PARTS = {"params": ("params",), "buffers": ("buffers",), "ema": ("slots", "ema", "params")}
_FORMATS = ("safetensors", "torch")


def export(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    format: str = "safetensors",  # noqa: A002 (as `format` everywhere)
    what: str = "params",
) -> Path:
    """Write tensors of the checkpoint at `path` to the file `to`, as one flat dict by name; returns its path.

    `what` is "params", "buffers", "ema" (the averaged params, in the params' dtypes), which have the names of the
    module, or "state": all arrays, by their names in the checkpoint (`params/fc.weight`). The state may be the
    checkpoint's tree, or its entry `state`. `format` is "safetensors" or "torch", which
    `torch.load(to, weights_only=True)` reads.

    Raises `CheckpointExistsError` where `to` exists, and `CheckpointNotFoundError` where there is no such part.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> lm.checkpoint.save(path, state)
    >>> exported = lm.checkpoint.export(path, path + ".pt", format="torch")
    >>> sorted(torch.load(exported, weights_only=True))
    ['bias', 'weight']
    """
    if format not in _FORMATS or what not in (*_PARTS, "state"):
        raise CheckpointError(
            f"export takes format= one of {', '.join(_FORMATS)}, what= one of {', '.join(_PARTS)}, state; got"
            f" format={format!r}, what={what!r}."
        )
    final = Path(to)
    if os.path.lexists(final):
        raise CheckpointExistsError(f"{final} is there already. Remove it, or export to another name.")
    reader = Reader(path)
    rows = _picked(reader, what)
    values = reader.read(list(rows.values()), lambda _, value: value)
    tensors = dict(zip(rows, values, strict=True))
    if what == "ema":
        tensors = _in_dtypes_of_params(tensors, reader)
    temporary = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _write(tensors, temporary, format)
        sync_file(temporary)
        os.rename(temporary, final)
        sync_directory(final.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | ValueError | RuntimeError | KeyError):
            raise CheckpointError(f"{final} could not be written: {error}") from error
        raise
    return final


def _picked(reader: Reader, what: str) -> dict[str, LeafRecord]:
    arrays = [row for row in reader.rows if row.kind in ARRAYS]
    if what == "state":
        return {name_of(row.path): row for row in arrays}
    for prefix in (_PARTS[what], ("state", *_PARTS[what])):
        found = {_flat(row, len(prefix)): row for row in arrays if row.path[: len(prefix)] == prefix}
        if found:
            return found
    tops = sorted({printable(name_of(row.path[:1])) for row in arrays})
    raise CheckpointNotFoundError(
        f"{reader.path} has no {what} to export: nothing under {'/'.join(_PARTS[what])!r}, itself or in 'state'. It"
        f" holds {', '.join(tops) or 'no arrays'}; what='state' exports all of it."
    )


def _in_dtypes_of_params(averaged: dict[str, Tensor], reader: Reader) -> dict[str, Tensor]:
    """The averages of 16-bit params, which are kept in float32, as `lm.ema.params` gives them."""
    try:
        rows = _picked(reader, "params")
    except CheckpointNotFoundError:
        return averaged
    return {n: a.to(dtypes.TORCH[rows[n].dtype]) if n in rows else a for n, a in averaged.items()}


def _flat(row: LeafRecord, depth: int) -> str:
    return ".".join(str(part) for part in row.path[depth:])


def _write(tensors: dict[str, Tensor], path: Path, format: str) -> None:  # noqa: A002
    if format == "torch":
        torch.save(tensors, path)
        return
    from safetensors.torch import save_file

    save_file(tensors, path)
