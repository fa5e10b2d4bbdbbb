"""`LengthBuckets`: batches of rows of similar length, bounded by their number of tokens.

Rows are sorted by length and divided into buckets, whose lengths differ by at most a tenth, as in tensor2tensor
(`length_bucket_step=1.1`). The size of a bucket's batches follows from its longest row, and its last batch is filled
with the longest rows that remain. In each epoch the rows of a bucket are shuffled, and so are the batches. So the
number of batches depends on the lengths only, and a batch is found by its number without a plan of the epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lumen.core.distributed import shard_bounds
from lumen.data import permutation
from lumen.data.samplers import digest
from lumen.errors import BatchError

_STEP = 11, 10  # the longest row of a bucket to its shortest, and the rows that a batch could have to those it has
_CACHED = 2**20  # rows whose order stays in memory, since batches read here and there of it


class LengthBuckets:
    """Each row once an epoch, in batches of at most `tokens` = rows x longest row, and of at most `batch_size` rows.

    Without a seed, batches run from the longest rows to the shortest.
    """

    fixed_size: int | None = None

    def __init__(self, lengths: NDArray[Any], tokens: int, batch_size: int | None, seed: int | None) -> None:
        self._identity = {"tokens": tokens, "lengths": digest(lengths.astype(np.int64, copy=False))}
        self._seed = seed
        self._sorted = _longest_first(lengths)
        starts, sizes = _buckets(lengths[self._sorted], tokens, batch_size)
        ends = np.append(starts, len(lengths))
        counts = -(-np.diff(ends) // sizes)  # of the batches of each bucket
        # Lists, in which bisect finds a bucket several times as fast as searchsorted does.
        self._starts: list[int] = ends.tolist()  # of each bucket, in the sorted rows
        self._firsts: list[int] = np.append(0, np.cumsum(counts)).tolist()
        self._seeds = [0 if seed is None else permutation.derived_seed(seed, i) for i in range(len(starts))]
        self.batches = self._firsts[-1]

    def bounds(self, epoch: int, batch: int) -> tuple[int, int]:
        """The positions are those of the sorted rows; a bucket's are dealt evenly to its batches."""
        number = int(permutation.rows(self.batches, self._seed, epoch, batch, batch + 1)[0])
        bucket = bisect_right(self._firsts, number) - 1
        start, stop = self._starts[bucket : bucket + 2]
        first, last = self._firsts[bucket : bucket + 2]
        low, high = shard_bounds(stop - start, number - first, last - first)
        return start + low, start + high

    def rows(self, epoch: int, start: int, stop: int) -> permutation.Indices:
        """The rows of a bucket are permuted within it."""
        if self._seed is None or start == stop:
            return self._sorted[start:stop].astype(np.int64)
        bucket = bisect_right(self._starts, start) - 1
        first, last = self._starts[bucket : bucket + 2]
        order = last - first, self._seeds[bucket], epoch
        if last - first <= permutation.BLOCK:
            positions = permutation.shuffled(*order)[start - first : stop - first]
        elif len(self._sorted) <= _CACHED:
            positions = permutation.rows(*order, start - first, stop - first)
        else:
            positions = permutation.permute(*order, np.arange(start - first, stop - first))
        return self._sorted[first + positions].astype(np.int64)

    def identity(self) -> dict[str, int]:
        """The budget, and a checksum of the lengths."""
        return self._identity


def checked_lengths(lengths: NDArray[Any], tokens: int) -> NDArray[Any]:
    """`lengths`; raises BatchError unless they are integers in [0, tokens]."""
    if lengths.dtype.kind not in "iu":
        raise BatchError(
            f"lengths are {lengths.dtype}; they must be integers, in the unit of tokens=: count tokens, samples or"
            " frames, and convert with .astype(int)."
        )
    outside = np.flatnonzero((lengths < 0) | (lengths > tokens))
    if not len(outside):
        return lengths
    row = int(outside[0])
    if lengths[row] < 0:
        raise BatchError(f"lengths[{row}] is {lengths[row]}; a length is at least 0.")
    raise BatchError(
        f"{len(outside)} rows are longer than a batch may be: row {row} has {lengths[row]} tokens, and tokens is"
        f" {tokens}. Write tokens={lengths.max()} or more, or truncate or leave out these rows."
    )


def _longest_first(lengths: NDArray[Any]) -> NDArray[Any]:
    """The rows by decreasing length, those of equal length in their order."""
    longest = int(lengths.max())
    shortness = (longest - lengths).astype(np.min_scalar_type(longest))  # small types are sorted in linear time
    order = np.argsort(shortness, kind="stable")
    return order.astype(np.int32) if len(order) < 2**31 else order


def _buckets(lengths: NDArray[Any], tokens: int, batch_size: int | None) -> tuple[permutation.Indices, Any]:
    """The first row of each bucket, and the size of its batches, for `lengths` from the longest to the shortest."""
    shortness = -lengths.astype(np.int64)
    starts, sizes = [], []
    start = 0
    while start < len(lengths):
        longest = max(1, int(lengths[start]))
        fitting = tokens // longest
        size = fitting if batch_size is None else min(fitting, batch_size)
        shortest = max(-(-longest * _STEP[1] // _STEP[0]), tokens // (fitting * _STEP[0] // _STEP[1] + 1) + 1)
        count = max(1, int(shortness.searchsorted(-shortest, "right")) - start)
        starts.append(start)
        sizes.append(size)
        start = min(start + -(-count // size) * size, len(lengths))
    return np.array(starts), np.array(sizes)
