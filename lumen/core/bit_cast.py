"""The bits of a tensor as numbers of another dtype, under `vmap` too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bit_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.view(dtype)` for a dtype of the same size.

    Before torch 2.13, `vmap` has no rule for that view.

    >>> bit_cast(torch.tensor([1.0, -0.0]), torch.int32)
    tensor([ 1065353216, -2147483648], dtype=torch.int32)
    """
    return x.view(dtype) if _HAS_RULE else _View.apply(x, dtype)  # type: ignore[no-untyped-call]


_HAS_RULE = torch.__version__ >= "2.13"


class _View(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.view(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int | None, None], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int | None]:
        return x.view(dtype), in_dims[0]
