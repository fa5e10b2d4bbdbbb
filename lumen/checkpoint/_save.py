"""Writing one checkpoint, which appears under its name only when it is complete on disk."""

from __future__ import annotations

import datetime as dt
import glob
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumen.checkpoint import _orbax, header, shard_specs, sharded, zarr
from lumen.checkpoint.coordinator import TIMEOUT, SaveCoordinator, SaveSession
from lumen.checkpoint.fsync import relative_files, sync, sync_directory
from lumen.checkpoint.packing import packed
from lumen.checkpoint.snapshot import LeafRecord, Snapshot, take_snapshot
from lumen.checkpoint.upload import Upload, exists
from lumen.core import distributed
from lumen.core.arguments import checked_first
from lumen.core.step import StepFn
from lumen.core.urls import basename, path_or_url
from lumen.core.versions import own_version, version_of
from lumen.errors import CheckpointError, CheckpointExistsError

TEMPORARY = ".lumen-tmp"
DELETED = ".lumen-deleted"
REPLACED = ".lumen-replaced"
_COMMITTED = "commit_success.txt"

Written = tuple[list[LeafRecord], header.Files, header.Files]  # records, all files, and those already synced


@checked_first
def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    extra: Any = None,
    meta: Mapping[str, Any] | None = None,
    step: StepFn | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Write `tree` to the new directory `path`, as an Orbax checkpoint.

    `tree` is any pytree of tensors, numpy arrays, Python scalars, strings and None. `extra` is a second tree, which is
    read without a `like`: `load(path, item="extra")`. `meta` is any JSON; see `metadata`. The checkpoint appears under
    its name when it is complete and on disk.

    With `step`, the step whose state `tree` is, all processes of its world call this together. Each writes its own
    shards of the state under transforms such as `lm.fsdp`. Rank 0 writes everything else, from its own `tree`, `extra`
    and `meta`, to its own `path`, which must be on a file system that all processes share. A process that gives no sign
    of life for `timeout` seconds counts as hung. If one process fails, all raise its error.

    `path` may be the URL of a place in an object store: `s3://bucket/name`, `gs://bucket/name` or `memory://name`. Then
    each process writes to its local disk and uploads what it wrote, rank 0 the header last.

    Raises `CheckpointExistsError` if `path` exists, and `CheckpointLeafError` for a leaf of another kind. Raises
    `PathError` for a URL of another kind, or one whose package is not installed. Raises `CheckpointError` if writing
    fails, if a process hangs, or if the state is sharded and `step` is missing.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"weight": torch.ones(2), "epoch": 3})
    >>> lm.checkpoint.restore(path, {"weight": torch.zeros(2), "epoch": 0})
    {'weight': tensor([1., 1.]), 'epoch': 3}
    """
    location = path_or_url(path, "the path of lm.checkpoint.save")
    shard_specs.check(step, tree, "lm.checkpoint.save(path, state, step=step)")
    session = SaveCoordinator(timeout).next() if step is not None and distributed.world_size() > 1 else None
    with nullcontext() if session is None else session.sharing_failures():
        is_main = session is None or session.is_main
        if is_main and exists(location):
            raise CheckpointExistsError(f"{location} exists; a checkpoint is written to a new directory.")
        fields = {"meta": header.check_json(dict(meta or {}), "meta"), "metrics": {}}
        items = {"state": shard_specs.strip_sharding(step, tree), "extra": {} if extra is None else extra}
        snap = take_snapshot(items, specs=shard_specs.leaf_specs(step, tree), with_unsharded=is_main)
        try:
            if isinstance(location, str):
                _save_to_url(location, snap, fields, session)
            elif session is not None and not is_main:
                write_shard(session, snap)
            else:
                _save_to_path(location, snap, fields, session)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"the checkpoint {location} could not be written: {error}") from error


def _save_to_path(final: Path, snap: Snapshot, fields: dict[str, Any], session: SaveSession | None) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    write(final, final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}"), snap, fields, session=session)
    if session is not None:
        session.finish()


def _save_to_url(url: str, snap: Snapshot, fields: dict[str, Any], session: SaveSession | None) -> None:
    """Write to a local directory, and upload from there; the directory is kept if the upload fails."""
    staging = Path(tempfile.mkdtemp(prefix="lumen-checkpoint-"))
    if session is not None and not session.is_main:
        write_shard(session, snap, staging)
        return
    upload = Upload(url, session)
    staged = staging / basename(url)
    try:
        write(staged, staging / TEMPORARY, snap, fields, session=session, upload=upload)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    upload.publish(staged)
    if session is not None:
        session.finish()
    shutil.rmtree(staging, ignore_errors=True)


def write(
    final: Path,
    temporary: Path,
    snap: Snapshot,
    fields: dict[str, Any],
    replace: bool = False,
    session: SaveSession | None = None,
    upload: Upload | None = None,
) -> None:
    """Write a snapshot to `temporary`, beside `final`, and rename it when everything is on disk.

    With `replace`, an existing checkpoint of that name is replaced. With `session`, this process is rank 0 of several;
    the others call `write_shard`, which returns after this. If writing fails, the written files are removed.

    With `upload`, each process writes to a local disk, and `final` has what this one wrote.
    """
    try:
        if session is None:
            records, files, synced = _write_single(temporary, snap)
        else:
            records, files, synced = _write_main(temporary, snap, session, upload)
        text = header.dump(records, files, **_versions(), **fields)
        (temporary / header.FILE).write_text(text)
        sync(temporary, synced)
        if session is not None:
            session.check()
        _commit(temporary, final, replace)
    except BaseException as error:
        if session is not None:
            session.abort(error)
        for leftover in (temporary, *final.parent.glob(f"{glob.escape(temporary.name)}.*")):
            shutil.rmtree(leftover, ignore_errors=True)
        raise


def write_shard(session: SaveSession, snap: Snapshot, staging: Path | None = None) -> None:
    """On ranks other than 0: write this process's shards; returns when the checkpoint is complete.

    If it is written to an object store, `staging` is the directory for these shards until they are uploaded.
    """
    session.publish("layout", sharded.layout(snap))
    plan_json, url = session.await_("plan")
    plan = sharded.WritePlan.from_json(plan_json)
    if url is None:
        session.publish("shards", sharded.write(session, snap, plan))
        session.finish()
        return
    assert staging is not None
    _write_shard_to_url(session, snap, plan.at(staging), Upload(url, session))


def _write_shard_to_url(session: SaveSession, snap: Snapshot, plan: sharded.WritePlan, upload: Upload) -> None:
    shutil.rmtree(plan.folder, ignore_errors=True)  # of an earlier save that failed
    try:
        files = sharded.write(session, snap, plan, upload)
    except BaseException:
        shutil.rmtree(plan.folder, ignore_errors=True)
        raise
    session.publish("shards", files)
    upload.add(plan.folder, files)
    session.finish()
    shutil.rmtree(plan.folder, ignore_errors=True)


def _write_single(temporary: Path, snap: Snapshot) -> Written:
    snap = packed(snap)
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(_checksums, snap)
        _orbax.write(temporary, {snap.keys[index]: snap.data[index] for index in snap.stored})
        _strip_paths(temporary)
        return snap.records, _checked_files(temporary, snap, checksums.result()), {}


def _write_main(temporary: Path, snap: Snapshot, session: SaveSession, upload: Upload | None) -> Written:
    """Write on rank 0 of several: all write the sharded arrays beside `temporary`, and rank 0 moves them into it."""
    directory = temporary.with_name(f"{temporary.name}.parts").absolute()
    layouts = session.await_all("layout")  # from now on no process writes for an earlier save
    shutil.rmtree(directory, ignore_errors=True)
    plan = sharded.plan(snap, layouts, directory)
    directory.mkdir()
    session.publish("plan", [plan.to_json(), None if upload is None else upload.url])
    written = packed(snap)
    records = plan.records(written.records)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(sharded.write, session, snap, plan, upload)
        checksums = pool.submit(_checksums, written)
        arrays = written.data | sharded.placeholders(written)
        _orbax.write(temporary, {written.keys[index]: array for index, array in arrays.items()})
        _strip_paths(temporary)
        sharded.write_descriptions(plan, records, temporary)
        files = dict(own_files := writing.result())
        for shard_files in session.await_all("shards"):
            files |= {name: (size, crc) for name, (size, crc) in shard_files.items()}
        sharded.collect(plan, records, files if upload is None else own_files, temporary)
        shutil.rmtree(directory)
        return records, _checked_files(temporary, written, checksums.result(), files), files


def _commit(temporary: Path, final: Path, replace: bool) -> None:
    """Rename the checkpoint to `final`; an existing one is renamed first, and renamed back if that fails.

    If the process dies between the two renames, `Store.open` restores the old checkpoint.
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
    """Delete a checkpoint: hide it by a rename, then remove its files."""
    doomed = path.with_name(f".{path.name}{DELETED}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _checksums(snap: Snapshot) -> list[int]:
    return [zlib.crc32(snap.data[index].reshape(-1).view(np.uint8).data) for index in snap.stored]


def _strip_paths(directory: Path) -> None:
    """Remove the directory's path from Orbax's commit marks, of the whole and of each item: a rename makes it wrong."""
    for mark in (*directory.glob(_COMMITTED), *directory.glob(f"*/{_COMMITTED}")):
        mark.write_text("Checkpoint commit was successful")


def _checked_files(
    directory: Path, snap: Snapshot, checksums: list[int], sharded_files: header.Files | None = None
) -> header.Files:
    """Size and checksum of each file but the header; raises if an array is not in the format that Lumen reads."""
    files: header.Files = dict(sharded_files or {})
    root = os.fspath(directory)  # strings: a save of many leaves would spend a third of its time in making Paths
    for index, crc in zip(snap.stored, checksums, strict=True):
        record = snap.records[index]
        tail_size = zarr.tail_size(_read(f"{root}/{zarr.description(record)}"), record)
        name = zarr.data_file(record)
        tail = _read(f"{root}/{name}", record.nbytes)
        if len(tail) != tail_size:
            raise CheckpointError(f"{root}/{name} has {len(tail)} bytes after its array, expected {tail_size}")
        zarr.check_tail(tail, record)
        files[name] = (record.nbytes + len(tail), zlib.crc32(tail, crc))
    for name in relative_files(directory):
        if name not in files and name != header.FILE:
            content = _read(f"{root}/{name}")
            files[name] = (len(content), zlib.crc32(content))
    return files


def _read(path: str, start: int = 0) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read()


def _versions() -> dict[str, str]:
    return _installed_versions() | {"time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}


@cache
def _installed_versions() -> dict[str, str]:
    return {
        "lumen": own_version() or "unknown",  # in a source tree that was not installed
        "torch": str(torch.__version__),  # with its build, which the version of its package may leave out
        "orbax": version_of("orbax-checkpoint") or "unknown",
    }
