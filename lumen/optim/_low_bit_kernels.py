"""Chunks of low-bit leaves for the list kernels: read into float32, updated by the kernel, rounded and written back.

A chunk fits into the caches of a CPU, and on an accelerator bounds the memory of the float32 copies. It has full rows,
and so full blocks of scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen.core import distributed
from lumen.optim import _fused_kernels
from lumen.optim._low_bit import LeafNoise, is_rounded, loaded, stored
from lumen.optim._quantized import Quantized

_CHUNK_SIZE = {"cpu": 2**17}  # entries; elsewhere _ACCELERATOR_CHUNK
_ACCELERATOR_CHUNK = 2**24

Lists = Sequence[list[Any]]


def batches(lists: Lists, labels: Any, noises: Sequence[LeafNoise], skip: Tensor | None) -> Iterator[tuple[Any, Lists]]:
    """`_fused_kernels.batches` for lists of which some leaves are rounded by the random bits of their `noises`.

    Where `skip` is true, nothing is written back.
    """
    rounded = [_is_rounded(row, noise) for row, noise in zip(_rows(lists), noises, strict=True)]
    if not all(rounded):
        others = [i for i, is_low_bit in enumerate(rounded) if not is_low_bit]
        chosen = [labels[i] for i in others] if isinstance(labels, list) else labels
        yield from _fused_kernels.batches([[column[i] for i in others] if column else [] for column in lists], chosen)
    for i, row in enumerate(_rows(lists)):
        if rounded[i] and row[0].numel():
            label = labels[i] if isinstance(labels, list) else labels
            for chunk, noise_start in _chunks(row):
                wide = [None if leaf is None else loaded(leaf).to(torch.float32) for leaf in chunk]
                yield label, [[] if leaf is None else [leaf] for leaf in wide]
                _write_back(chunk, wide, noises[i], noise_start, skip)


def is_skipped(skip: Tensor | None) -> bool:
    """Whether the update is known to be skipped: on the CPU, where reading the flag does not synchronize."""
    return skip is not None and skip.is_cpu and not distributed.is_dry_run() and bool(skip)


def _rows(lists: Lists) -> Iterator[list[Any]]:
    """The param, gradient and moments of each leaf; None for moments that are not kept."""
    for i in range(len(lists[0])):
        yield [column[i] if column else None for column in lists]


def _is_rounded(row: list[Any], noise: LeafNoise) -> bool:
    return any(map(is_rounded, row[2:])) or (row[0].dtype == torch.bfloat16 and noise.rounds_param)


def _chunks(row: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """The leaf in chunks of full rows, views of its memory, with the flat index at which each begins."""
    p = row[0]
    rows, width = (p.shape[0], math.prod(p.shape[1:])) if p.dim() else (1, 1)
    count = max(1, _CHUNK_SIZE.get(p.device.type, _ACCELERATOR_CHUNK) // max(1, width))
    for start in range(0, rows, count):
        yield [None if leaf is None else _rows_of(leaf, rows, start, start + count) for leaf in row], start * width


def _rows_of(leaf: Any, rows: int, start: int, stop: int) -> Any:
    if isinstance(leaf, Quantized):
        return Quantized(_rows_of(leaf.codes, rows, start, stop), leaf.scales[start:stop])
    return leaf.view(rows, -1)[start:stop]


def _write_back(
    old: Sequence[Any], wide: Sequence[Tensor | None], noise: LeafNoise, start: int, skip: Tensor | None
) -> None:
    bits: list[Tensor | None] = [None] * len(old)
    if any(map(is_rounded, old[2:])):
        bits[2:4] = noise.for_moments(old[0].shape, start)
    if old[0].dtype == torch.bfloat16:
        bits[0] = noise.for_param(old[0].shape, start)
    for index, (leaf, new) in enumerate(zip(old, wide, strict=False)):
        if new is not None and new is not leaf and index != 1:
            value = stored(new, leaf, bits[index] if is_rounded(leaf) else None)
            for target, source in _tensors(leaf, value):
                target.copy_(source if skip is None else torch.where(skip, target, source))


def _tensors(old: Any, new: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(old, Quantized):
        return [(old.codes, new.codes), (old.scales, new.scales)]
    return [(old, new)]
