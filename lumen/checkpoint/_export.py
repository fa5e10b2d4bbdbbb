"""Export of a checkpoint to a file that other programs can read."""

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
from lumen.core.arguments import checked_first
from lumen.core.urls import local_path
from lumen.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, printable

_PREFIXES = {"params": ("params",), "buffers": ("buffers",), "ema": ("slots", "ema", "params")}
_FORMATS = ("safetensors", "torch")


@checked_first
def export(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    format: str = "safetensors",  # noqa: A002 (as `format` everywhere)
    what: str = "params",
) -> Path:
    """Write tensors of the checkpoint at `path` to the file `to`, as one flat dict by name; returns its path.

    `what` is "params", "buffers" or "ema" (the averaged params, in the params' dtypes), by their names in the module.
    "state" exports all arrays, by their names in the checkpoint (`params/fc.weight`). The state is the checkpoint's
    tree or its entry `state`. `format` is "safetensors" or "torch", which `torch.load(to, weights_only=True)` reads.

    Raises `CheckpointExistsError` if `to` exists, and `CheckpointNotFoundError` if the checkpoint has no such tensors.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> lm.checkpoint.save(path, state)
    >>> exported = lm.checkpoint.export(path, path + ".pt", format="torch")
    >>> sorted(torch.load(exported, weights_only=True))
    ['bias', 'weight']
    """
    if format not in _FORMATS or what not in (*_PREFIXES, "state"):
        raise CheckpointError(
            f"export takes format= one of {', '.join(_FORMATS)}, what= one of {', '.join(_PREFIXES)}, state; got"
            f" format={format!r}, what={what!r}."
        )
    final = local_path(to, "the file that lm.checkpoint.export writes")
    if os.path.lexists(final):
        raise CheckpointExistsError(f"{final} exists. Remove it, or export to another name.")
    reader = Reader(path)
    records = _select(reader, what)
    values = reader.read(list(records.values()), lambda _, value: value)
    tensors = dict(zip(records, values, strict=True))
    if what == "ema":
        tensors = _in_param_dtypes(tensors, reader)
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


def _select(reader: Reader, what: str) -> dict[str, LeafRecord]:
    arrays = [record for record in reader.records if record.kind in ARRAYS]
    if what == "state":
        return {name_of(record.path): record for record in arrays}
    for prefix in (_PREFIXES[what], ("state", *_PREFIXES[what])):
        matches = {
            _dotted_name(record, len(prefix)): record for record in arrays if record.path[: len(prefix)] == prefix
        }
        if matches:
            return matches
    tops = sorted({printable(name_of(record.path[:1])) for record in arrays})
    raise CheckpointNotFoundError(
        f"{reader.path} has no {what} to export: nothing under {'/'.join(_PREFIXES[what])!r}, itself or in 'state'. It"
        f" has {', '.join(tops) or 'no arrays'}; what='state' exports all of it."
    )


def _in_param_dtypes(averaged: dict[str, Tensor], reader: Reader) -> dict[str, Tensor]:
    """The averages in the params' dtypes, like `lm.ema.params`; those of 16-bit params are saved in float32."""
    try:
        records = _select(reader, "params")
    except CheckpointNotFoundError:
        return averaged
    return {n: a.to(dtypes.TORCH[records[n].dtype]) if n in records else a for n, a in averaged.items()}


def _dotted_name(record: LeafRecord, depth: int) -> str:
    return ".".join(str(key) for key in record.path[depth:])


def _write(tensors: dict[str, Tensor], path: Path, format: str) -> None:  # noqa: A002
    if format == "torch":
        torch.save(tensors, path)
        return
    from safetensors.torch import save_file

    save_file(tensors, path)
