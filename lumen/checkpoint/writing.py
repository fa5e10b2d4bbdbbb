"""Writing one checkpoint: complete on disk, or invisible."""

from __future__ import annotations

import datetime as dt
import glob
import importlib.metadata
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lumen.checkpoint import _orbax, header, zarr
from lumen.checkpoint.host import Snapshot, snapshot
from lumen.errors import CheckpointError, CheckpointExistsError

TEMPORARY = ".lumen-tmp"
DELETED = ".lumen-deleted"
REPLACED = ".lumen-replaced"
_COMMITTED = "commit_success.txt"


def save(path: str | os.PathLike[str], tree: Any, *, extra: Any = None, meta: Mapping[str, Any] | None = None) -> None:
    """Write `tree` to the new directory `path`, as an Orbax checkpoint.

    A tree holds tensors, numpy arrays, Python scalars, strings and None, in any pytree. `extra` is a second one, for
    what is read without a `like`: `load(path, item="extra")`. `meta` is any JSON; see `metadata`. The checkpoint
    appears under its name when it is complete and on disk.

    Raises `CheckpointExistsError` where there is something already, `CheckpointLeafError` for a leaf of another kind,
    and `CheckpointError` where the disk does not take it.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"weight": torch.ones(2), "epoch": 3})
    >>> lm.checkpoint.restore(path, {"weight": torch.zeros(2), "epoch": 0})
    {'weight': tensor([1., 1.]), 'epoch': 3}
    """
    final = Path(path)
    if os.path.lexists(final):
        raise CheckpointExistsError(f"{final} is there already; a checkpoint is written to a new directory.")
    fields = {"meta": header.check_json(dict(meta or {}), "meta"), "metrics": {}}
    taken = snapshot({"state": tree, "extra": {} if extra is None else extra})
    temporary = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        write(final, temporary, taken, fields)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint {final} could not be written: {error}") from error


def write(final: Path, temporary: Path, taken: Snapshot, fields: dict[str, Any], replace: bool = False) -> None:
    """Write a snapshot to `temporary`, beside `final`, and rename it when all is on disk.

    With `replace`, a checkpoint that has that name goes. What was written is removed where it fails.
    """
    try:
        with ThreadPoolExecutor(1) as other:
            sums = other.submit(_sums, taken)
            _orbax.write(temporary, taken.arrays)
            _forget_places(temporary)
            files = _inspected(temporary, taken, sums.result())
        text = header.dump(taken.rows, files, **_versions(), **fields)
        (temporary / header.FILE).write_text(text)
        sync(temporary)
        _commit(temporary, final, replace)
    except BaseException:
        for left in (temporary, *final.parent.glob(f"{glob.escape(temporary.name)}.*")):
            shutil.rmtree(left, ignore_errors=True)
        raise


def _commit(temporary: Path, final: Path, replace: bool) -> None:
    """Give the checkpoint its name; one that has it already goes out of the way, and back if that fails.

    A process that dies between the two renames leaves the old one under its other name, which `Store.open` gives back.
    """
    replaced = final.with_name(f".{final.name}{REPLACED}")
    replace = replace and final.is_dir()
    if replace:
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except BaseException:
        if replace:
            os.rename(replaced, final)
        raise
    sync_directory(final.parent)
    if replace:
        shutil.rmtree(replaced)


def delete(path: Path) -> None:
    """Remove a checkpoint: at once from sight, then from disk."""
    doomed = path.with_name(f".{path.name}{DELETED}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sync(directory: Path) -> None:
    """Return when every file below `directory` is on disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync_file(os.path.join(parent, name))
        sync_directory(parent)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Return when the names in `directory` are on disk."""
    sync_file(directory)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Return when the file is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sums(taken: Snapshot) -> list[int]:
    return [zlib.crc32(array.reshape(-1).view(np.uint8).data) for array in taken.arrays.values()]


def _forget_places(directory: Path) -> None:
    """Orbax writes the path of the directory into its commit marks, which a rename makes untrue."""
    for mark in directory.rglob(_COMMITTED):
        mark.write_text("Checkpoint commit was successful")


def _inspected(directory: Path, taken: Snapshot, sums: list[int]) -> header.Files:
    """Size and checksum of each file but the header; raises where an array is not in the form that we read."""
    files: header.Files = {}
    for row, crc in zip(taken.stored, sums, strict=True):
        tail_size = zarr.tail_size((directory / zarr.description(row)).read_bytes(), row)
        data = directory / zarr.data_file(row)
        with open(data, "rb") as file:
            file.seek(row.nbytes)
            tail = file.read()
        if len(tail) != tail_size:
            raise CheckpointError(f"{data} has {len(tail)} bytes after its array, expected {tail_size}")
        zarr.check_tail(tail, row)
        files[zarr.data_file(row)] = (row.nbytes + len(tail), zlib.crc32(tail, crc))
    for name in _names(directory):
        if name not in files and name != header.FILE:
            content = (directory / name).read_bytes()
            files[name] = (len(content), zlib.crc32(content))
    return files


def _names(directory: Path) -> Iterator[str]:
    for parent, _, names in os.walk(directory):
        yield from ((Path(parent) / name).relative_to(directory).as_posix() for name in names)


def _versions() -> dict[str, str]:
    packages = {"lumen": "lumen-torch", "torch": "torch", "orbax": "orbax-checkpoint"}
    return {
        **{name: _version(package) for name, package in packages.items()},
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a source tree that was not installed
        return "unknown"
