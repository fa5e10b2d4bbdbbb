"""Which documents share a row: best fit by decreasing length, over the histogram of lengths.

Best fit places the longest documents first, each into the fullest row that has room for it. Documents of one length are
interchangeable, so the algorithm works on lengths and their counts, and rows with equal contents are kept as one group:
its time depends on the number of different lengths, not on that of documents (M. Krell et al. 2021, "Efficient Sequence
Packing without Cross-contamination").
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Group(NamedTuple):
    """`rows` rows with the same contents: how many documents of each length."""

    contents: tuple[tuple[int, int], ...]  # (length, count), by decreasing length
    rows: int


def best_fit(lengths: Ints, counts: Ints, size: int) -> list[Group]:
    """Groups of rows of at most `size` that hold `counts` documents of each of the distinct `lengths`."""
    room: dict[int, list[Group]] = {}  # by the space that is left
    spaces: list[int] = []  # its keys, in order

    def add(space: int, group: Group) -> None:
        if space not in room:
            room[space] = []
            insort(spaces, space)
        room[space].append(group)

    for length, count in sorted(zip(lengths.tolist(), counts.tolist(), strict=True), reverse=True):
        left = count
        while left:
            index = bisect_left(spaces, length)
            if index == len(spaces):
                space, group = size, Group((), -(-left // (size // length)))
            else:
                space = spaces[index]
                group = room[space].pop()
                if not room[space]:
                    del room[space], spaces[index]
            for rows, copies in _shares(left, group.rows, space // length):
                left -= rows * copies
                contents = (*group.contents, (length, copies)) if copies else group.contents
                add(space - copies * length, Group(contents, rows))
    return [group for space in spaces for group in room[space]]


def _shares(documents: int, rows: int, fit: int) -> list[tuple[int, int]]:
    """How many of the rows are given how many documents: as many as fit, the rest of them, none."""
    full = min(documents // fit, rows)
    rest = documents - full * fit if full < rows else 0
    shares = [(full, fit), (1 if rest else 0, rest), (rows - full - (1 if rest else 0), 0)]
    return [(count, copies) for count, copies in shares if count]


class RowPlan(NamedTuple):
    """The documents of each row: `documents[offsets[i]:offsets[i + 1]]` share row i."""

    documents: Ints
    offsets: Ints


def assign(groups: list[Group], lengths: Ints, order: Ints) -> RowPlan:
    """Deal the documents with these `lengths` to the rows, those of equal length in `order`, a permutation of them."""
    ordered = order[np.argsort(lengths[order], kind="stable")]  # by length, then in the order
    distinct, starts = np.unique(lengths[ordered], return_index=True)
    next_of = dict(zip(distinct.tolist(), starts.tolist(), strict=True))  # in `ordered`, for each length
    rows: list[Ints] = []
    sizes: list[Ints] = []
    for contents, count in groups:
        columns = []
        for length, copies in contents:
            start = next_of[length]
            next_of[length] = start + count * copies
            columns.append(ordered[start : start + count * copies].reshape(count, copies))
        block = np.concatenate(columns, 1)
        rows.append(block.reshape(-1))
        sizes.append(np.full(count, block.shape[1]))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
    return RowPlan(np.concatenate(rows), offsets)
