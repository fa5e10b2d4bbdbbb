"""Which rows a batch has: a pure function of (seed, epoch, position), the same on all ranks.

A sampler gives each batch a range of positions of the epoch, and each position a row. A rank reads a part of the
range, so nothing here depends on the number of ranks, and no batch depends on those before it.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lumen.data import permutation
from lumen.errors import BatchError


class Sampler(Protocol):
    """The batches of an epoch as positions, and the rows at positions."""

    batches: int  # in an epoch, the same in each
    fixed_size: int | None  # rows of each batch but a smaller last one; None if the sizes differ

    def bounds(self, epoch: int, batch: int) -> tuple[int, int]:
        """The first position of a batch, and the one after its last."""

    def rows(self, epoch: int, start: int, stop: int) -> permutation.Indices:
        """The rows at positions `start` … `stop` - 1 of one batch."""

    def identity(self) -> dict[str, int]:
        """What the order depends on besides the arguments of a Loader, for its `state_dict`."""


class EachOnce:
    """Each row once an epoch, in the order of (seed, epoch), or in their own if `seed` is None."""

    def __init__(self, length: int, batch_size: int, seed: int | None, *, drop_last: bool) -> None:
        self._length, self._batch_size, self._seed = length, batch_size, seed
        self.fixed_size: int | None = batch_size
        self.batches = _batches_per_epoch(length, batch_size, drop_last)

    def bounds(self, epoch: int, batch: int) -> tuple[int, int]:
        """Consecutive positions, `batch_size` of them or those that remain."""
        start = batch * self._batch_size
        return start, min(start + self._batch_size, self._length)

    def rows(self, epoch: int, start: int, stop: int) -> permutation.Indices:
        """Positions are permuted."""
        return permutation.rows(self._length, self._seed, epoch, start, stop)

    def identity(self) -> dict[str, int]:
        """Nothing else."""
        return {}


def _batches_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    batches = rows // batch_size if drop_last else -(-rows // batch_size)
    if not batches:
        raise BatchError(
            f"batch_size is {batch_size} and the data set has {rows} rows, so drop_last leaves no batch; use a"
            f" batch_size of at most {rows}, or drop_last=False."
        )
    return batches


def one_a_row(name: str, values: ArrayLike, count: int) -> NDArray[Any]:
    """`values` as an array; raises BatchError unless there is one number for each of `count` rows."""
    array = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "biuf":
        raise BatchError(
            f"{name} has the shape {array.shape} and {array.dtype}; it is one number for each of the {count} rows of"
            " the data set, in its order."
        )
    return array


def digest(array: NDArray[Any]) -> int:
    """A checksum of the values."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
