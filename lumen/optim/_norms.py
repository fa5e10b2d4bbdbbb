"""The L2 norm of each leaf: one pass over the gradients gives their size and whether they are finite."""

from __future__ import annotations

import functools
from operator import attrgetter, is_

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.optim import _fused_kernels


def leaf_norms(leaves: list[Tensor]) -> Tensor:
    """The L2 norm of each tensor, in float32 (float64 if one is), as a vector on the device of the first.

    A norm is finite if every entry and the sum of their squares are. Entries of 1e19 and more overflow; clipping and
    optimizers that square gradients could not use them either.
    """
    dtypes = {*map(attrgetter("dtype"), leaves)}
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    if _fused_kernels.allowed(leaves) and len(dtypes) == len({*map(attrgetter("device"), leaves)}) == 1:
        return torch.stack(_torch_compat.foreach_norm(leaves, 2, dtype))
    return torch.stack([torch.linalg.vector_norm(leaf, dtype=dtype).to(leaves[0].device) for leaf in leaves])


class LeafNorms:
    """The norms of `leaves`, shared between transforms that need them."""

    __slots__ = ("_leaves", "_versions", "values")

    def __init__(self, leaves: list[Tensor]) -> None:
        self.values = leaf_norms(leaves)
        self._leaves = leaves
        self._versions = _versions(leaves)

    def of(self, leaves: list[Tensor]) -> Tensor | None:
        """The norms, if `leaves` are the same tensors and have not been written to since."""
        same = len(leaves) == len(self._leaves) and all(map(is_, leaves, self._leaves))
        return self.values if same and self._versions is not None and _versions(leaves) == self._versions else None


def _versions(leaves: list[Tensor]) -> list[int] | None:
    """The version counters of the leaves; None if they are not counted, or if a step is traced."""
    if not _fused_kernels.eager() or any(map(Tensor.is_inference, leaves)):
        return None
    return [*map(_torch_compat.version_of, leaves)]
