"""Arrays that several processes write: one file for each chunk of a regular grid, and each file by one process.

Where the grid is that of the parts themselves, a process writes its chunks at once. Parts that have no such grid in
common (rows of columns that do not come out even) are written as they are, beside the checkpoint, and put together to
chunks when all have come, each chunk by one process.
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
from lumen.core.sharding import Slice
from lumen.errors import CheckpointError

_PIECE = 1 << 22  # written and summed while it is in the cache
_FEW = 8  # chunks for each part: with more, parts are put together

Boxes = dict[int, list[Slice]]  # by place among the rows


@dataclass(frozen=True)
class Plan:
    """Where parts go: the folder, the chunks of each array that is cut, and whose boxes are to be put together."""

    folder: Path
    chunks: dict[int, Index]
    loose: dict[int, list[tuple[int, Slice]]]

    def to_json(self) -> Any:
        """For a `SaveSession`."""
        return [str(self.folder), [*self.chunks.items()], [*self.loose.items()]]

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse."""
        folder, chunks, loose = value
        return cls(
            Path(folder),
            {place: tuple(chunk) for place, chunk in chunks},
            {place: [(rank, _box(box)) for rank, box in each] for place, each in loose},
        )

    def rows(self, rows: Sequence[LeafRecord]) -> list[LeafRecord]:
        """The rows, where those that are cut know their chunks."""
        return [replace(row, parts=self.chunks[i]) if i in self.chunks else row for i, row in enumerate(rows)]


def layout(taken: Snapshot) -> Any:
    """What the first process must know of another: a digest of the tree, and the boxes that it writes."""
    text = repr([(row.item, row.path, row.kind, row.dtype, row.shape) for row in taken.rows if row.item == "state"])
    return [hashlib.sha256(text.encode()).hexdigest(), [*_boxes(taken).items()]]


def plan(taken: Snapshot, others: Sequence[Any], folder: Path) -> Plan:
    """How all write, from what each has; raises `CheckpointError` where the parts do not make up the wholes."""
    mine = layout(taken)
    for rank, (digest, _) in enumerate(others, 1):
        if digest != mine[0]:
            raise CheckpointError(
                f"rank {rank} saves a tree of another form than rank 0: all must save the same state, at the same time."
            )
    holders: dict[int, list[tuple[int, Slice]]] = {place: [] for place in taken.cut}
    for rank, (_, boxes) in enumerate([mine, *others]):
        for place, each in boxes:
            holders[place] += [(rank, _box(box)) for box in each]
    chunks, loose = {}, {}
    for place, held in holders.items():
        shape, boxes = taken.rows[place].shape, [box for _, box in held]
        common = chunk_grid.common_chunk(shape, boxes, _FEW * len(boxes))
        wrong = chunk_grid.uncovered(shape, boxes, common)
        if wrong:
            raise CheckpointError(
                f"the parts of {name_of(taken.rows[place].path)!r} do not make up the whole of shape {shape}: {wrong}."
            )
        if common is None:
            loose[place] = held
            common = chunk_grid.rows_chunk(shape, len({rank for rank, _ in held}))
        chunks[place] = common
    return Plan(folder, chunks, loose)


def write(talk: SaveSession, taken: Snapshot, plan: Plan) -> header.Files:
    """Write this process's share of the arrays that are cut; size and checksum of each file."""
    writer = _Writer(talk, plan, plan.rows(taken.rows))
    for place, boxes in _boxes(taken).items():
        if place in plan.loose:
            writer.write_pieces(place, taken.data[place], boxes)
        else:
            writer.write_chunks(place, taken.data[place], boxes)
    if plan.loose:
        _all_say(talk, "pieces")
        for place in plan.loose:
            writer.assemble(place)
    writer.sync()
    return writer.files


def _all_say(talk: SaveSession, what: str) -> None:
    """Go on when all are here."""
    if talk.first:
        talk.hear_all(what)
        talk.publish(f"all {what}")
    else:
        talk.publish(what)
        talk.await_(f"all {what}")


def stand_ins(taken: Snapshot) -> dict[int, Array]:
    """For Orbax, a single number in place of each array that is cut."""
    return {i: np.zeros((), dtypes.numpy_dtype(dtypes.carrier(taken.rows[i].dtype))) for i in taken.cut}


def describe(plan: Plan, rows: Sequence[LeafRecord], written: Path) -> None:
    """Beside the chunks, what Orbax has written of each array, for its shape and chunks; the stand-in goes."""
    for place in plan.chunks:
        row = rows[place]
        path = plan.folder / zarr.description(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(zarr.of_parts((written / zarr.description(row)).read_bytes(), row))
        shutil.rmtree(written / zarr.folder(row))


def collect(plan: Plan, rows: Sequence[LeafRecord], files: header.Files, into: Path) -> None:
    """Move the arrays that all have written to where the checkpoint is being made; raises where a file is missing."""
    for name, (size, _) in files.items():
        path = plan.folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"{path} is not as another process wrote it. The directory must be on a file system that all processes"
                " of the run share."
            )
    for place in plan.chunks:
        os.rename(plan.folder / zarr.folder(rows[place]), into / zarr.folder(rows[place]))


class _Writer:
    """Writes files below the plan's folder."""

    def __init__(self, talk: SaveSession, plan: Plan, rows: Sequence[LeafRecord]) -> None:
        self.files: header.Files = {}
        self._talk, self._plan, self._rows = talk, plan, rows
        self._made: list[Path] = []

    def write_chunks(self, place: int, data: Array, boxes: Sequence[Slice]) -> None:
        """The chunks of which these boxes consist."""
        row = self._rows[place]
        for box in boxes:
            block = Block(box.whole, box.size)
            values = chunk_grid.in_box(data, box)
            for chunk in chunk_grid.chunks(block, row.chunk):
                self._write_chunk(row, chunk, [(block, values)])

    def write_pieces(self, place: int, data: Array, boxes: Sequence[Slice]) -> None:
        """The boxes, each as a file of its own."""
        for number, box in enumerate(boxes):
            self._write(self._piece(place, self._talk.rank, number), chunk_grid.in_box(data, box))

    def assemble(self, place: int) -> None:
        """This process's share of the chunks, from the pieces of all."""
        row, held = self._rows[place], self._plan.loose[place]
        dtype = dtypes.numpy_dtype(dtypes.carrier(row.dtype))
        pieces, counts = [], dict.fromkeys(range(self._talk.size), 0)
        for rank, box in held:
            pieces.append((Block(box.whole, box.size), self._piece(place, rank, counts[rank])))
            counts[rank] += 1
        for number, chunk in enumerate(chunk_grid.chunks(chunk_grid.whole(row.shape), row.chunk)):
            if number % self._talk.size == self._talk.rank:
                near = [(b, p) for b, p in pieces if b.meet(chunk_grid.block_of(chunk, row.chunk))]
                self._write_chunk(row, chunk, [(b, np.memmap(p, dtype, "r", shape=b.size)) for b, p in near])

    def sync(self) -> None:
        """Return when what was written is on disk; its names are the first process's affair."""
        sync_files(self._made, self._talk.beat)

    def _write_chunk(self, row: LeafRecord, place: Index, blocks: Sequence[tuple[Block, Array]]) -> None:
        chunk = chunk_grid.block_of(place, row.chunk)
        block, values = blocks[0]
        if block.meet(chunk) == chunk:
            content = chunk_grid.view(values, chunk.within(block))
        else:  # several, or beyond the edge, where zeros stand
            content = np.zeros(chunk.size, values.dtype)
            for block, values in blocks:
                shared = block.meet(chunk)
                if shared is not None:
                    content[shared.within(chunk)] = values[shared.within(block)]
        name = zarr.data_file(row, place)
        self.files[name] = self._write(self._plan.folder / name, content)

    def _write(self, path: Path, content: Array) -> tuple[int, int]:
        """Size and CRC-32 of a new file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
        crc = 0
        with open(path, "xb", buffering=0) as file:
            for start in range(0, len(flat), _PIECE):
                piece = flat[start : start + _PIECE]
                crc = zlib.crc32(piece, crc)
                while piece:
                    piece = piece[file.write(piece) :]
                self._talk.beat()
        self._made.append(path)
        self._talk.beat()
        return len(flat), crc

    def _piece(self, place: int, rank: int, number: int) -> Path:
        return self._plan.folder / "pieces" / f"{place}.{rank}.{number}"


def _boxes(taken: Snapshot) -> Boxes:
    """What this process writes."""
    return {place: list(piece.boxes) for place, piece in taken.cut.items() if place in taken.data}


def _box(value: Sequence[Sequence[int]]) -> Slice:
    here, whole, size = (tuple(each) for each in value)
    return Slice(here, whole, size)
