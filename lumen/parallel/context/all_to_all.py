"""The all-to-all that exchanges one sharded dim of a tensor for another, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.parallel.comm.collectives import all_to_all_bytes
from lumen.parallel.tensor.autograd_collectives import TPGroup


def all_to_all(x: Tensor, group: TPGroup, split: int, concat: int) -> Tensor:
    """`x` of which every rank has a shard along `concat`, as one of which every rank has a shard along `split`.

    The ranks of `group` divide `x.shape[split]`. The backward pass is the exchange in the other direction.
    """
    exchanged: Tensor = _AllToAll.apply(x, group, split % x.dim(), concat % x.dim())  # type: ignore[no-untyped-call]
    return exchanged


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: TPGroup, split: int, concat: int) -> Tensor:
        blocks = x.unflatten(split, (group.size, -1)).movedim(split, 0).contiguous()  # by the rank that receives it
        received = all_to_all_bytes(blocks, group.group)  # by the rank that sent it
        return received.movedim(0, concat).flatten(concat, concat + 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, TPGroup, int, int], output: Tensor) -> None:
        _, ctx.group, ctx.split, ctx.concat = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grad, ctx.group, ctx.concat, ctx.split), None, None, None
