"""The two 16-bit floating dtypes, and the dtype that values of them are summed and averaged in."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are averaged and computed with: at least float32.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in order: uint8 [nbytes], a copy unless its entries are adjacent.

    >>> as_bytes(torch.tensor([1, 2, 3, 4], dtype=torch.int16)[::2][:1]).tolist()
    [1, 0]
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.stride(0) != 1:  # a single entry is contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
