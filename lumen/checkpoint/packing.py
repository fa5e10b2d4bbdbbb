"""Packing of many small arrays into few large ones.

Each array of an Orbax checkpoint costs four names on disk and a millisecond, whatever its size. Thousands of scalars
and biases would take longer than gigabytes. So if there are many small arrays, those of one item and dtype are
concatenated into a single array of one dim. The header lists which entries belong to which leaf.
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

SMALL = 1 << 16  # arrays of up to so many bytes are packed
MANY = 1000  # up to so many small arrays, none is packed: Orbax then knows each by its name
_NAME = "~packed"  # no leaf has this name: escaped names do not begin with a tilde


def packed(snap: Snapshot) -> Snapshot:
    """The snapshot to write: if `snap` has many small arrays, they are packed, and the packs are the last records."""
    small = [index for index in snap.stored if snap.records[index].nbytes <= SMALL]
    if len(small) <= MANY:
        return snap
    groups: dict[tuple[str, str], list[int]] = {}
    for index in small:
        record = snap.records[index]
        groups.setdefault((record.item, record.dtype), []).append(index)
    records, packed_indices = list(snap.records), set(small)
    keys = {index: key for index, key in snap.keys.items() if index not in packed_indices}
    data = {index: array for index, array in snap.data.items() if index not in packed_indices}
    for (item, dtype), indices in groups.items():
        name = (_NAME, dtype)
        start = 0
        for index in indices:
            records[index] = replace(records[index], array=directory_of(name), start=start)
            start += math.prod(records[index].shape)
        keys[len(records)] = (item, name)
        data[len(records)] = np.concatenate([snap.data[index].reshape(-1) for index in indices])
        records.append(LeafRecord(item, name, PACK, dtype, (start,), directory_of(name)))
    return Snapshot(records, keys, data, snap.specs)


def unpack(record: LeafRecord, pack: Array, target: Array, boxes: Sequence[Slice]) -> None:
    """Copy the boxes of a leaf from the array in which it is packed."""
    assert record.start is not None
    leaf = pack[record.start : record.start + math.prod(record.shape)].reshape(record.shape)
    for box in boxes:
        source = [slice(low, low + size) for low, size in zip(box.full, box.size, strict=True)]
        chunk_grid.box_view(target, box)[...] = chunk_grid.view(leaf, source)
