"""Arrays that several processes write: one file for each chunk of a regular grid, each written by one process.

If the shards of an array lie on a regular grid, each process writes its shards directly as chunks. Otherwise (uneven
rows and columns) each process first writes its shards as fragments beside the checkpoint. Then the processes assemble
the chunks from all fragments, each chunk by one process.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lumen.checkpoint import chunk_grid, dtypes, header, zarr
from lumen.checkpoint.chunk_grid import Array, Block, Index
from lumen.checkpoint.coordinator import SaveSession
from lumen.checkpoint.fsync import sync_files
from lumen.checkpoint.leaves import name_of
from lumen.checkpoint.snapshot import LeafRecord, Snapshot
from lumen.checkpoint.upload import Upload
from lumen.core.sharding import Slice
from lumen.errors import CheckpointError

_IO_BYTES = 1 << 22  # small enough to be still in the CPU cache when its checksum is computed
_MAX_CHUNKS_PER_BOX = 8  # an array that needs more is assembled from fragments

Boxes = dict[int, list[Slice]]  # by index among the records


@dataclass(frozen=True)
class WritePlan:
    """How to write the sharded arrays, by index among the records.

    `folder` is where all processes write. `chunks` are the chunk shapes, and `fragmented` the boxes, with the rank that
    writes each, of the arrays that are assembled from fragments.
    """

    folder: Path
    chunks: dict[int, Index]
    fragmented: dict[int, list[tuple[int, Slice]]]

    def to_json(self) -> Any:
        """As JSON, for a `SaveSession`."""
        return [str(self.folder), [*self.chunks.items()], [*self.fragmented.items()]]

    @classmethod
    def from_json(cls, value: Any) -> WritePlan:
        """The inverse of `to_json`."""
        folder, chunks, fragmented = value
        return cls(
            Path(folder),
            {index: tuple(chunk) for index, chunk in chunks},
            {index: [(rank, _box(box)) for rank, box in boxes] for index, boxes in fragmented},
        )

    def at(self, folder: Path) -> WritePlan:
        """The same with another folder."""
        return replace(self, folder=folder)

    def records(self, records: Sequence[LeafRecord]) -> list[LeafRecord]:
        """The records, those of sharded arrays with their chunk shape."""
        return [
            replace(record, chunk_shape=self.chunks[i]) if i in self.chunks else record
            for i, record in enumerate(records)
        ]


def layout(snap: Snapshot) -> Any:
    """What rank 0 must know of each process: a digest of its tree, and the boxes that it writes."""
    state_records = [record for record in snap.records if record.item == "state"]
    text = repr([(record.item, record.path, record.kind, record.dtype, record.shape) for record in state_records])
    return [hashlib.sha256(text.encode()).hexdigest(), [*_boxes(snap).items()]]


def plan(snap: Snapshot, layouts: Sequence[Any], folder: Path) -> WritePlan:
    """Plan the save from the layouts of all processes; raises `CheckpointError` if the shards do not fit together."""
    own_layout = layout(snap)
    for rank, (digest, _) in enumerate(layouts, 1):
        if digest != own_layout[0]:
            raise CheckpointError(
                f"rank {rank} saves a tree of another structure than rank 0: all ranks must save the same state in the"
                " same call."
            )
    boxes_by_index: dict[int, list[tuple[int, Slice]]] = {index: [] for index in snap.specs}
    for rank, (_, boxes) in enumerate([own_layout, *layouts]):
        for index, box_list in boxes:
            boxes_by_index[index] += [(rank, _box(box)) for box in box_list]
    chunks, fragmented = {}, {}
    for index, rank_boxes in boxes_by_index.items():
        shape, boxes = snap.records[index].shape, [box for _, box in rank_boxes]
        chunk = chunk_grid.common_chunk(shape, boxes, _MAX_CHUNKS_PER_BOX * len(boxes))
        problem = chunk_grid.uncovered(shape, boxes, chunk)
        if problem:
            raise CheckpointError(
                f"the shards of {name_of(snap.records[index].path)!r} do not cover its shape {shape} exactly once:"
                f" {problem}."
            )
        if chunk is None:
            fragmented[index] = rank_boxes
            chunk = chunk_grid.rows_chunk(shape, len({rank for rank, _ in rank_boxes}))
        chunks[index] = chunk
    return WritePlan(folder, chunks, fragmented)


def write(session: SaveSession, snap: Snapshot, plan: WritePlan, upload: Upload | None = None) -> header.Files:
    """Write this process's share of the sharded arrays; returns the size and checksum of each file.

    With `upload` the plan's folder is this process's alone, and fragments are exchanged through the object store.
    """
    writer = _Writer(session, plan, plan.records(snap.records))
    for index, boxes in _boxes(snap).items():
        if index in plan.fragmented:
            writer.write_fragments(index, snap.data[index], boxes)
        else:
            writer.write_chunks(index, snap.data[index], boxes)
    if plan.fragmented:
        if upload is not None:
            upload.put(plan.folder, writer.fragments)
        _barrier(session, "fragments")
        for index in plan.fragmented:
            writer.assemble(index, upload)
    writer.sync()
    return writer.files


def _barrier(session: SaveSession, event: str) -> None:
    """Return when all processes have reached this call."""
    if session.is_main:
        session.await_all(event)
        session.publish(f"all {event}")
    else:
        session.publish(event)
        session.await_(f"all {event}")


def placeholders(snap: Snapshot) -> dict[int, Array]:
    """For Orbax: a scalar in place of each sharded array."""
    return {i: np.zeros((), dtypes.numpy_dtype(dtypes.carrier(snap.records[i].dtype))) for i in snap.specs}


def write_descriptions(plan: WritePlan, records: Sequence[LeafRecord], directory: Path) -> None:
    """Write the description of each sharded array beside its chunks, and remove the placeholder that Orbax wrote.

    The description is Orbax's own, with the real shape and chunks.
    """
    for index in plan.chunks:
        record = records[index]
        path = plan.folder / zarr.description(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(zarr.chunked_description((directory / zarr.description(record)).read_bytes(), record))
        shutil.rmtree(directory / zarr.folder(record))


def collect(plan: WritePlan, records: Sequence[LeafRecord], files: header.Files, directory: Path) -> None:
    """Move the sharded arrays into the checkpoint's `directory`; raises `CheckpointError` if a file is missing."""
    for name, (size, _) in files.items():
        path = plan.folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"{path} is missing or differs from what another process wrote. The directory must be on a file system"
                " that all processes of the run share."
            )
    for index in plan.chunks:
        os.rename(plan.folder / zarr.folder(records[index]), directory / zarr.folder(records[index]))


class _Writer:
    """Writes files below the plan's folder."""

    def __init__(self, session: SaveSession, plan: WritePlan, records: Sequence[LeafRecord]) -> None:
        self.files: header.Files = {}
        self._session, self._plan, self._records = session, plan, records
        self.fragments: list[str] = []  # paths relative to the folder
        self._created: list[Path] = []

    def write_chunks(self, index: int, data: Array, boxes: Sequence[Slice]) -> None:
        """Write the chunks of these boxes."""
        record = self._records[index]
        for box in boxes:
            block = Block(box.full, box.size)
            values = chunk_grid.box_view(data, box)
            for chunk in chunk_grid.chunks(block, record.chunk):
                self._write_chunk(record, chunk, [(block, values)])

    def write_fragments(self, index: int, data: Array, boxes: Sequence[Slice]) -> None:
        """Write each box to its own file."""
        for number, box in enumerate(boxes):
            name = _fragment(index, self._session.rank, number)
            self._write(self._plan.folder / name, chunk_grid.box_view(data, box))
            self.fragments.append(name)

    def assemble(self, index: int, upload: Upload | None) -> None:
        """Write this process's share of the chunks from the fragments of all processes."""
        record, rank_boxes = self._records[index], self._plan.fragmented[index]
        dtype = dtypes.numpy_dtype(dtypes.carrier(record.dtype))
        fragments, counts = [], dict.fromkeys(range(self._session.size), 0)
        for rank, box in rank_boxes:
            fragments.append((Block(box.full, box.size), _fragment(index, rank, counts[rank])))
            counts[rank] += 1
        for number, chunk in enumerate(chunk_grid.chunks(chunk_grid.full_block(record.shape), record.chunk)):
            if number % self._session.size == self._session.rank:
                overlapping = [(b, n) for b, n in fragments if b.intersection(chunk_grid.block_of(chunk, record.chunk))]
                if upload is not None:
                    upload.fetch(self._plan.folder, [name for _, name in overlapping])
                paths = [(block, self._plan.folder / name) for block, name in overlapping]
                self._write_chunk(record, chunk, [(b, np.memmap(p, dtype, "r", shape=b.size)) for b, p in paths])

    def sync(self) -> None:
        """Return when the content of the files is on disk; rank 0 syncs their directories."""
        sync_files(self._created, self._session.heartbeat)

    def _write_chunk(self, record: LeafRecord, position: Index, blocks: Sequence[tuple[Block, Array]]) -> None:
        chunk = chunk_grid.block_of(position, record.chunk)
        block, values = blocks[0]
        if block.intersection(chunk) == chunk:
            content = chunk_grid.view(values, chunk.slices_in(block))
        else:  # several blocks, or a chunk beyond the array's edge, which is padded with zeros
            content = np.zeros(chunk.size, values.dtype)
            for block, values in blocks:
                shared = block.intersection(chunk)
                if shared is not None:
                    content[shared.slices_in(chunk)] = values[shared.slices_in(block)]
        name = zarr.data_file(record, position)
        self.files[name] = self._write(self._plan.folder / name, content)

    def _write(self, path: Path, content: Array) -> tuple[int, int]:
        """Write a new file; returns its size and CRC-32."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
        crc = 0
        with open(path, "xb", buffering=0) as file:
            for start in range(0, len(flat), _IO_BYTES):
                buffer = flat[start : start + _IO_BYTES]
                crc = zlib.crc32(buffer, crc)
                while buffer:
                    buffer = buffer[file.write(buffer) :]
                self._session.heartbeat()
        self._created.append(path)
        self._session.heartbeat()
        return len(flat), crc


def _fragment(index: int, rank: int, number: int) -> str:
    return f"pieces/{index}.{rank}.{number}"


def _boxes(snap: Snapshot) -> Boxes:
    """The boxes that this process writes."""
    return {index: list(spec.boxes) for index, spec in snap.specs.items() if index in snap.data}


def _box(value: Sequence[Sequence[int]]) -> Slice:
    local_start, global_start, size = (tuple(corner) for corner in value)
    return Slice(local_start, global_start, size)
