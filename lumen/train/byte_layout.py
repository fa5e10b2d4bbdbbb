"""Packs tensors into one tensor of bytes, and unpacks them by their names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from lumen.core.dtypes import as_bytes

Entry = Mapping[str, Mapping[str, Tensor]]
Layout = list[tuple[str, str, tuple[int, ...], torch.dtype]]


def layout_of(entry: Entry) -> Layout:
    """The names, shapes and dtypes of an entry's tensors."""
    return [
        (name, key, tuple(tensor.shape), tensor.dtype)
        for name, tensors in entry.items()
        for key, tensor in tensors.items()
    ]


def total_bytes(layout: Layout) -> int:
    """The size in bytes of an entry of this layout."""
    return sum(_byte_sizes(layout))


def to_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a tensor of bytes."""
    return as_bytes(tensor)


def from_bytes(layout: Layout, row: Tensor) -> dict[str, dict[str, Tensor]]:
    """Unpack the entry whose tensors are in `row`."""
    entry: dict[str, dict[str, Tensor]] = {}
    for (name, key, shape, dtype), data in zip(layout, row.split(_byte_sizes(layout)), strict=True):
        entry.setdefault(name, {})[key] = data.clone().view(dtype).reshape(shape)  # a copy is aligned for its dtype
    return entry


def _byte_sizes(layout: Layout) -> list[int]:
    return [prod(shape) * dtype.itemsize for _, _, shape, dtype in layout]
