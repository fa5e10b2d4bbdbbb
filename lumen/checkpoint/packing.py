"""Many small arrays as few large ones.

Each array of an Orbax checkpoint is four names on disk and a millisecond of its own, whatever it holds, so that
thousands of scalars and biases take longer than gigabytes. Where there are many small arrays, those of one item and
dtype are written one after the other as a single array of one dim; the header knows which entries are whose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lumen.checkpoint import chunk_grid
from lumen.checkpoint.chunk_grid import Array
from lumen.checkpoint.orbax_names import directory_of
from lumen.checkpoint.snapshot import PACK, LeafRecord, Snapshot
from lumen.core.sharding import Slice

SMALL = 1 << 16  # bytes of an array that is packed
MANY = 1000  # small arrays up to which each stays an array that Orbax knows by its name
_NAME = "~packed"  # no leaf's: a tilde begins no name of ours


def packed(taken: Snapshot) -> Snapshot:
    """What is to be written of `taken`: its small arrays joined, behind the other rows, where there are many."""
    small = [place for place in taken.stored if taken.rows[place].nbytes <= SMALL]
    if len(small) <= MANY:
        return taken
    groups: dict[tuple[str, str], list[int]] = {}
    for place in small:
        row = taken.rows[place]
        groups.setdefault((row.item, row.dtype), []).append(place)
    rows, gone = list(taken.rows), set(small)
    keys = {place: key for place, key in taken.keys.items() if place not in gone}
    data = {place: array for place, array in taken.data.items() if place not in gone}
    for (item, dtype), places in groups.items():
        name = (_NAME, dtype)
        start = 0
        for place in places:
            rows[place] = replace(rows[place], array=directory_of(name), start=start)
            start += math.prod(rows[place].shape)
        keys[len(rows)] = (item, name)
        data[len(rows)] = np.concatenate([taken.data[place].reshape(-1) for place in places])
        rows.append(LeafRecord(item, name, PACK, dtype, (start,), directory_of(name)))
    return Snapshot(rows, keys, data, taken.cut)


def unpack(row: LeafRecord, pack: Array, into: Array, boxes: Sequence[Slice]) -> None:
    """Copy the boxes of a leaf from the array that holds it among others."""
    assert row.start is not None
    whole = pack[row.start : row.start + math.prod(row.shape)].reshape(row.shape)
    for box in boxes:
        there = [slice(low, low + size) for low, size in zip(box.whole, box.size, strict=True)]
        chunk_grid.in_box(into, box)[...] = chunk_grid.view(whole, there)
