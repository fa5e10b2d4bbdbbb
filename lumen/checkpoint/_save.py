"""Writing one checkpoint: complete on disk, or invisible."""

from __future__ import annotations

import datetime as dt
import glob
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumen.checkpoint import _orbax, header, shard_specs, sharded, zarr
from lumen.checkpoint.coordinator import TIMEOUT, SaveCoordinator, SaveSession
from lumen.checkpoint.fsync import sync, sync_directory
from lumen.checkpoint.packing import packed
from lumen.checkpoint.snapshot import LeafRecord, Snapshot, snapshot
from lumen.core import distributed
from lumen.core.step import StepFn
from lumen.core.versions import own_version, version_of
from lumen.errors import CheckpointError, CheckpointExistsError

TEMPORARY = ".lumen-tmp"
DELETED = ".lumen-deleted"
REPLACED = ".lumen-replaced"
_COMMITTED = "commit_success.txt"

Written = tuple[list[LeafRecord], header.Files, header.Files]  # all files, and those that are on disk already


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

    A tree holds tensors, numpy arrays, Python scalars, strings and None, in any pytree. `extra` is a second one, for
    what is read without a `like`: `load(path, item="extra")`. `meta` is any JSON; see `metadata`. The checkpoint
    appears under its name when it is complete and on disk.

    With `step`, the step whose state `tree` is, all processes of its world call this together: each writes the parts
    that it holds under transforms such as `lm.fsdp`, and the first one the rest, from its own `tree`, `extra` and
    `meta`. The directory is the first one's, on a file system that all share. A process from which nothing is heard
    for `timeout` seconds counts as hung. If one fails, all raise its error.

    Raises `CheckpointExistsError` where there is something already, `CheckpointLeafError` for a leaf of another kind,
    and `CheckpointError` where the disk does not take it, a process hangs, or the tree is one process's part of a state
    and there is no `step`.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"weight": torch.ones(2), "epoch": 3})
    >>> lm.checkpoint.restore(path, {"weight": torch.zeros(2), "epoch": 0})
    {'weight': tensor([1., 1.]), 'epoch': 3}
    """
    final = Path(path)
    shard_specs.check(step, tree, "lm.checkpoint.save(path, state, step=step)")
    talk = SaveCoordinator(timeout).next() if step is not None and distributed.world_size() > 1 else None
    with nullcontext() if talk is None else talk.failing_together():
        first = talk is None or talk.first
        if first and os.path.lexists(final):
            raise CheckpointExistsError(f"{final} is there already; a checkpoint is written to a new directory.")
        fields = {"meta": header.check_json(dict(meta or {}), "meta"), "metrics": {}}
        items = {"state": shard_specs.strip_sharding(step, tree), "extra": {} if extra is None else extra}
        taken = snapshot(items, cut=shard_specs.shard_specs(step, tree), whole=first)
        temporary = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
        try:
            if talk is not None and not first:
                write_shard(talk, taken)
                return
            final.parent.mkdir(parents=True, exist_ok=True)
            write(final, temporary, taken, fields, talk=talk)
            if talk is not None:
                talk.finish()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"the checkpoint {final} could not be written: {error}") from error


def write(
    final: Path,
    temporary: Path,
    taken: Snapshot,
    fields: dict[str, Any],
    replace: bool = False,
    talk: SaveSession | None = None,
) -> None:
    """Write a snapshot to `temporary`, beside `final`, and rename it when all is on disk.

    With `replace`, a checkpoint that has that name goes. With `talk`, this is the first of several processes, of which
    the others `write_shard`, and stay until it leaves. What was written is removed where it fails.
    """
    try:
        rows, files, synced = _write_alone(temporary, taken) if talk is None else _write_first(temporary, taken, talk)
        text = header.dump(rows, files, **_versions(), **fields)
        (temporary / header.FILE).write_text(text)
        sync(temporary, synced)
        if talk is not None:
            talk.check()
        _commit(temporary, final, replace)
    except BaseException as error:
        if talk is not None:
            talk.break_up(error)
        for left in (temporary, *final.parent.glob(f"{glob.escape(temporary.name)}.*")):
            shutil.rmtree(left, ignore_errors=True)
        raise


def write_shard(talk: SaveSession, taken: Snapshot) -> None:
    """Write this process's share of a checkpoint that the first process makes; returns when it is complete."""
    talk.publish("layout", sharded.layout(taken))
    plan = sharded.Plan.from_json(talk.await_("plan"))
    talk.publish("parts", sharded.write(talk, taken, plan))
    talk.finish()


def _write_alone(temporary: Path, taken: Snapshot) -> Written:
    taken = packed(taken)
    with ThreadPoolExecutor(1) as other:
        sums = other.submit(_sums, taken)
        _orbax.write(temporary, {taken.keys[place]: taken.data[place] for place in taken.stored})
        _strip_paths(temporary)
        return taken.rows, _inspected(temporary, taken, sums.result()), {}


def _write_first(temporary: Path, taken: Snapshot, talk: SaveSession) -> Written:
    """The same, with the parts that all write in a folder beside it, and move into it."""
    folder = temporary.with_name(f"{temporary.name}.parts").absolute()
    others = talk.hear_all("layout")  # nobody is writing for an earlier save any more
    shutil.rmtree(folder, ignore_errors=True)
    plan = sharded.plan(taken, others, folder)
    folder.mkdir()
    talk.publish("plan", plan.to_json())
    written = packed(taken)
    rows = plan.rows(written.rows)
    with ThreadPoolExecutor(1) as other:
        writing = other.submit(sharded.write, talk, taken, plan)
        sums = other.submit(_sums, written)
        arrays = written.data | sharded.stand_ins(written)
        _orbax.write(temporary, {written.keys[place]: array for place, array in arrays.items()})
        _strip_paths(temporary)
        sharded.describe(plan, rows, temporary)
        files = writing.result()
        for found in talk.hear_all("parts"):
            files |= {name: (size, crc) for name, (size, crc) in found.items()}
        sharded.collect(plan, rows, files, temporary)
        shutil.rmtree(folder)
        return rows, _inspected(temporary, written, sums.result(), files), files


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


def _sums(taken: Snapshot) -> list[int]:
    return [zlib.crc32(taken.data[place].reshape(-1).view(np.uint8).data) for place in taken.stored]


def _strip_paths(directory: Path) -> None:
    """Orbax writes the path of the directory into its commit marks, which a rename makes untrue."""
    for mark in directory.rglob(_COMMITTED):
        mark.write_text("Checkpoint commit was successful")


def _inspected(directory: Path, taken: Snapshot, sums: list[int], known: header.Files | None = None) -> header.Files:
    """Size and checksum of each file but the header; raises where an array is not in the form that we read."""
    files: header.Files = dict(known or {})
    for place, crc in zip(taken.stored, sums, strict=True):
        row = taken.rows[place]
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
    return {
        "lumen": own_version() or "unknown",  # in a source tree that was not installed
        "torch": str(torch.__version__),  # with its build, which the version of its package may leave out
        "orbax": version_of("orbax-checkpoint") or "unknown",
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
