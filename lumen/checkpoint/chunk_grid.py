"""The regular grid of chunks in which an array is stored.

In Zarr all chunks of an array have one shape, and those at the far edges are padded to it. A block is described by its
low corner and its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lumen.core.sharding import Slice

Index = tuple[int, ...]
Array = np.ndarray[Any, Any]


class Block(NamedTuple):
    """A rectangular block of an array's entries."""

    low: Index
    size: Index

    @property
    def high(self) -> Index:
        """The corner after the last entry."""
        return tuple(a + b for a, b in zip(self.low, self.size, strict=True))

    def intersection(self, other: Block) -> Block | None:
        """The entries that both blocks contain, or None.

        >>> Block((0, 2), (4, 4)).intersection(Block((3, 0), (9, 3)))
        Block(low=(3, 2), size=(1, 1))
        """
        low = tuple(map(max, self.low, other.low))
        size = tuple(min(a, b) - c for a, b, c in zip(self.high, other.high, low, strict=True))
        return Block(low, size) if all(n > 0 for n in size) else None

    def slices_in(self, other: Block) -> tuple[slice, ...]:
        """The slices that select this block in an array of the entries of `other`."""
        starts = [a - b for a, b in zip(self.low, other.low, strict=True)]
        return tuple(slice(a, a + n) for a, n in zip(starts, self.size, strict=True))


def view(array: Array, slices: Sequence[slice]) -> Array:
    """These slices of an array, as a view even if they select a single entry."""
    index: Any = (..., *slices)
    result: Array = array[index]
    return result


def box_view(array: Array, box: Slice) -> Array:
    """The entries of a box in this process's array."""
    return view(array, [slice(a, a + n) for a, n in zip(box.local, box.size, strict=True)])


def common_chunk(shape: Index, boxes: Sequence[Slice], most: int) -> Index | None:
    """The largest chunk shape that divides each of `boxes`, or None if that gives more than `most` chunks.

    >>> halves = [Slice((0,), (0,), (3,)), Slice((0,), (3,), (2,))]
    >>> common_chunk((5,), halves, 8)
    (3,)
    """
    chunk = tuple(_common_size(shape[dim], dim, boxes) for dim in range(len(shape)))
    return chunk if count(shape, chunk) <= most else None


def _common_size(length: int, dim: int, boxes: Sequence[Slice]) -> int:
    edges = {edge for box in boxes for edge in (box.full[dim], box.full[dim] + box.size[dim])}
    return math.gcd(*(edges - {length})) or length


def rows_chunk(shape: Index, n_chunks: int) -> Index:
    """A chunk shape of complete rows, for about `n_chunks` chunks."""
    return (-(-shape[0] // n_chunks), *shape[1:])


def count(shape: Index, chunk: Index) -> int:
    """The number of chunks of an array."""
    return math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def chunks(block: Block, chunk: Index) -> Iterator[Index]:
    """The grid positions of the chunks that overlap `block`, which must not be empty.

    >>> list(chunks(Block((2, 0), (3, 1)), (2, 4)))
    [(1, 0), (2, 0)]
    """
    ranges = [range(a // c, -(-b // c)) for a, b, c in zip(block.low, block.high, chunk, strict=True)]
    return itertools.product(*ranges)


def block_of(position: Index, chunk: Index) -> Block:
    """The entries of a chunk, including those beyond the array's edges."""
    return Block(tuple(p * c for p, c in zip(position, chunk, strict=True)), chunk)


def full_block(shape: Index) -> Block:
    """All entries of an array."""
    return Block((0,) * len(shape), shape)


def uncovered(shape: Index, boxes: Sequence[Slice], chunk: Index | None = None) -> str:
    """How `boxes` fail to cover an array with each entry once; empty if they do not fail.

    With `chunk`, a chunk shape that divides all boxes, the check is fast.

    >>> uncovered((4,), [Slice((0,), (0,), (2,)), Slice((0,), (1,), (3,))])
    '5 entries of 4'
    """
    covered, total = sum(math.prod(box.size) for box in boxes), math.prod(shape)
    if covered != total:
        return f"{covered} entries of {total}"
    blocks = [Block(box.full, box.size) for box in boxes]
    for block in blocks:
        if block.intersection(full_block(shape)) != block:
            return f"entries from {block.low} on, beyond {shape}"
    if chunk is not None:
        positions = [position for block in blocks for position in chunks(block, chunk)]
        return "" if len(set(positions)) == len(positions) else "some entries twice"
    overlapping = [first for first, second in itertools.combinations(blocks, 2) if first.intersection(second)]
    return f"entries from {overlapping[0].low} on twice" if overlapping else ""
