"""The two 16-bit floating dtypes, and the dtype that values of them are summed and averaged in."""

from __future__ import annotations

import torch

NARROW = (torch.float16, torch.bfloat16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are averaged and computed with: at least float32.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
