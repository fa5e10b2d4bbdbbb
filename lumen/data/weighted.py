"""`Weighted`: rows drawn with replacement in proportion to weights, and weights that balance classes.

Draw i of an epoch is a hash of (seed, epoch, i), read as a point of a line on which each row takes as much room as its
weight: any draw is found without those before it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lumen.data import permutation
from lumen.data.samplers import EachOnce, digest
from lumen.errors import BatchError

Floats = NDArray[np.float64]
_CACHED = 4  # blocks of draws, which cost a tenth of draws for one batch after the other


class Weighted(EachOnce):
    """As many draws in an epoch as there are rows; `ends` says where each row ends on the line of weights."""

    def __init__(self, ends: Floats, batch_size: int, seed: int, *, drop_last: bool) -> None:
        super().__init__(len(ends), batch_size, seed, drop_last=drop_last)
        self._ends, self._key = ends, seed
        self._last = int(ends.searchsorted(ends[-1]))  # the last row of a positive weight
        self._blocks: dict[tuple[int, int], permutation.Indices] = {}  # the last few: one for each live iterator

    def rows(self, epoch: int, start: int, stop: int) -> permutation.Indices:
        """The rows of these draws."""
        return permutation.from_blocks(partial(self._block, epoch), start, stop)

    def _block(self, epoch: int, number: int) -> permutation.Indices:
        block = self._blocks.get((epoch, number))
        if block is None:
            if len(self._blocks) >= _CACHED:
                self._blocks.pop(next(iter(self._blocks)), None)
            block = self._draw(epoch, *permutation.block_bounds(number, self._length))
            self._blocks[epoch, number] = block
        return block

    def _draw(self, epoch: int, start: int, stop: int) -> permutation.Indices:
        points = permutation.uniform(self._key, epoch, start, stop) * self._ends[-1]
        order = points.argsort()  # sorted points search neighboring weights, which halves the time
        rows = np.empty(stop - start, np.int64)
        rows[order] = self._ends.searchsorted(points[order], "right")
        return np.minimum(rows, self._last)  # a product may round up to the end of the line

    def identity(self) -> dict[str, int]:
        """A checksum of the weights."""
        return {"weights": digest(self._ends)}


def cumulative(weights: NDArray[Any]) -> Floats:
    """The sums of the weights up to each row; raises BatchError unless they are finite, none negative, one positive."""
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise BatchError(
            f"weights[{wrong[0]}] is {weights[wrong[0]]}, and {len(wrong)} are no finite number of at least 0. Set them"
            " to 0, whose rows are never drawn."
        )
    with np.errstate(over="ignore"):
        ends: Floats = np.cumsum(weights, dtype=np.float64)
    if not 0 < ends[-1] < np.inf:
        raise BatchError(f"the weights sum to {ends[-1]}, which must be above 0 and finite.")
    return ends


def balanced(labels: ArrayLike) -> Tensor:
    """Weights with which a `Loader` draws all classes equally often: `lm.Loader(..., weights=lm.data.balanced(y))`.

    Args:
        labels: the class of each row, [n]: integers, booleans or texts.

    Returns:
        float64 [n], n / (classes x rows of this row's class), whose mean is 1, as scikit-learn's
        `compute_sample_weight("balanced", y)` has it.

    Raises `BatchError` for labels that are not [n], are empty, or are floating-point numbers.

    >>> import lumen as lm
    >>> lm.data.balanced([0, 0, 0, 1])
    tensor([0.6667, 0.6667, 0.6667, 2.0000], dtype=torch.float64)
    """
    array = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "biuUS":
        raise BatchError(
            f"balanced got labels of the shape {array.shape} and {array.dtype}; labels are one integer, boolean or text"
            " for each row. Of one-hot rows write y.argmax(1)."
        )
    _, classes, counts = np.unique(array, return_inverse=True, return_counts=True)
    return torch.from_numpy(len(array) / (len(counts) * counts))[torch.from_numpy(classes)]
