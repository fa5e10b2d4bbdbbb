"""Limits how many full tensors are in memory at once where params and gradients travel outside of units."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of full params or gradients that travel at once at stages 1 and 2


def byte_chunks(tensors: Sequence[Tensor]) -> list[slice]:
    """Slices of `tensors`, in order, of at most `CHUNK_BYTES` or one tensor, which travel together."""
    chunks, start, size = [], 0, 0
    for index, tensor in enumerate(tensors):
        if index > start and size + tensor.nbytes > CHUNK_BYTES:
            chunks.append(slice(start, index))
            start, size = index, 0
        size += tensor.nbytes
    return [*chunks, slice(start, len(tensors))]
