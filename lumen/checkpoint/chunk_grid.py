"""The regular grid of chunks on which an array that several processes write lies on disk.

Zarr knows no other: all chunks have one shape, and those at the far edges are filled up to it. A block is given by its
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
    """A block of an array's entries."""

    low: Index
    size: Index

    @property
    def high(self) -> Index:
        """The corner behind the last entry."""
        return tuple(a + b for a, b in zip(self.low, self.size, strict=True))

    def meet(self, other: Block) -> Block | None:
        """The entries that both have, or None.

        >>> Block((0, 2), (4, 4)).meet(Block((3, 0), (9, 3)))
        Block(low=(3, 2), size=(1, 1))
        """
        low = tuple(map(max, self.low, other.low))
        size = tuple(min(a, b) - c for a, b, c in zip(self.high, other.high, low, strict=True))
        return Block(low, size) if all(each > 0 for each in size) else None

    def within(self, other: Block) -> tuple[slice, ...]:
        """Where it lies in an array of the entries of `other`."""
        starts = [a - b for a, b in zip(self.low, other.low, strict=True)]
        return tuple(slice(a, a + n) for a, n in zip(starts, self.size, strict=True))


def view(array: Array, place: Sequence[slice]) -> Array:
    """That part of an array, in the same memory also where it is a single entry."""
    index: Any = (..., *place)
    part: Array = array[index]
    return part


def in_box(array: Array, box: Slice) -> Array:
    """The entries that a box has in this process's array."""
    return view(array, [slice(a, a + n) for a, n in zip(box.here, box.size, strict=True)])


def common_chunk(shape: Index, boxes: Sequence[Slice], most: int) -> Index | None:
    """The largest chunks of which each of `boxes` consists, or None where that makes more than `most`.

    >>> halves = [Slice((0,), (0,), (3,)), Slice((0,), (3,), (2,))]
    >>> common_chunk((5,), halves, 8)
    (3,)
    """
    chunk = tuple(_common(shape[dim], dim, boxes) for dim in range(len(shape)))
    return chunk if count(shape, chunk) <= most else None


def _common(length: int, dim: int, boxes: Sequence[Slice]) -> int:
    edges = {edge for box in boxes for edge in (box.whole[dim], box.whole[dim] + box.size[dim])}
    return math.gcd(*(edges - {length})) or length


def rows_chunk(shape: Index, parts: int) -> Index:
    """Chunks of whole rows, about as many as `parts`."""
    return (-(-shape[0] // parts), *shape[1:])


def count(shape: Index, chunk: Index) -> int:
    """How many chunks there are."""
    return math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def chunks(block: Block, chunk: Index) -> Iterator[Index]:
    """The places of the chunks that `block`, which is not empty, meets.

    >>> list(chunks(Block((2, 0), (3, 1)), (2, 4)))
    [(1, 0), (2, 0)]
    """
    ranges = [range(a // c, -(-b // c)) for a, b, c in zip(block.low, block.high, chunk, strict=True)]
    return itertools.product(*ranges)


def block_of(place: Index, chunk: Index) -> Block:
    """The entries of a chunk, also those beyond the array's edges."""
    return Block(tuple(p * c for p, c in zip(place, chunk, strict=True)), chunk)


def whole(shape: Index) -> Block:
    """All entries of an array."""
    return Block((0,) * len(shape), shape)


def uncovered(shape: Index, boxes: Sequence[Slice], chunk: Index | None = None) -> str:
    """How `boxes` fail to make up an array, each entry once; nothing where they do.

    `chunk` is one of whose chunks they consist, which makes it quick.

    >>> uncovered((4,), [Slice((0,), (0,), (2,)), Slice((0,), (1,), (3,))])
    '5 entries of 4'
    """
    found, wanted = sum(math.prod(box.size) for box in boxes), math.prod(shape)
    if found != wanted:
        return f"{found} entries of {wanted}"
    blocks = [Block(box.whole, box.size) for box in boxes]
    for block in blocks:
        if block.meet(whole(shape)) != block:
            return f"entries from {block.low} on, beyond {shape}"
    if chunk is not None:
        places = [place for block in blocks for place in chunks(block, chunk)]
        return "" if len(set(places)) == len(places) else "some entries twice"
    twice = [one for one, other in itertools.combinations(blocks, 2) if one.meet(other)]
    return f"entries from {twice[0].low} on twice" if twice else ""
