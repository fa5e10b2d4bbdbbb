"""Collectives with gradients, between the ranks that compute one model together.

A tensor is *replicated* (the same on every rank), *sharded* (each rank has a shard along one dim), or *partial* (each
has a term of its sum). Each collective is the transpose of another: the backward pass of one is the other, also where a
gradient is differentiated again. A region is the layers that compute on shards.

    copy                    replicated -> replicated, read inside a region
    sum                     partial    -> replicated
    slice                   replicated -> sharded
    gather                  sharded    -> replicated, read outside regions
    scatter                 partial    -> sharded
    all_gather_reduce_grad  sharded    -> replicated, read inside a region
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.errors import ParamsError
from lumen.parallel.comm.collectives import _all_gather, _reduce_scatter
from lumen.parallel.comm.process_groups import GroupRef

Op = Literal["copy", "sum", "slice", "gather", "scatter", "all_gather_reduce_grad"]

_TRANSPOSE: dict[Op, Op] = {
    "copy": "sum",
    "sum": "copy",
    "slice": "gather",
    "gather": "slice",
    "scatter": "all_gather_reduce_grad",
    "all_gather_reduce_grad": "scatter",
}


class TPGroup:
    """The ranks along a mesh's `tensor` axis, and the index of this one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = GroupRef(group)
        self.size, self.index = self._group.size, self._group.index

    @property
    def group(self) -> dist.ProcessGroup:
        """Torch's process group of the ranks."""
        return self._group()

    def __deepcopy__(self, _memo: Any) -> TPGroup:
        return self  # a module that refers to it may be copied, a process group may not

    def collective(self, op: Op, x: Tensor, dim: int = 0, result: Tensor | None = None) -> Tensor:
        """The collective `op` on `x`, along `dim`; `result` is given where another has computed it already."""
        output: Tensor = _Collective.apply(x, self, op, dim % x.dim(), result)  # type: ignore[no-untyped-call]
        return output

    def gather(self, x: Tensor, dim: int, groups: int = 1) -> Tensor:
        """The full tensor, to be read outside regions, from shards along `dim` in `groups` blocks."""
        return _regrouped(self.collective("gather", x, dim), dim, self.size, groups)

    def slice(self, x: Tensor, dim: int, groups: int = 1) -> Tensor:
        """This rank's shard of a full tensor; each of the `groups` blocks along `dim` is sharded."""
        return self.collective("slice", _regrouped(x, dim, groups, self.size), dim)

    # ------------------------------------------------------------------------------------- on plain tensors

    def forward(self, op: Op, x: Tensor, dim: int) -> Tensor:
        """The result of `op` on `x`, a new tensor except after "copy"."""
        if op == "copy":
            return x.view_as(x)
        if op == "sum":
            return self.reduce(x, "sum")
        if op == "slice":
            length = self._shard_length(x, dim)
            return x.narrow(dim, self.index * length, length).clone(memory_format=torch.contiguous_format)
        if op == "scatter":
            return self._reduce_scatter(x, dim)
        return self._all_gather(x, dim)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum or the maximum over the ranks; a new tensor."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return total

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        shard = x.movedim(dim, 0).contiguous()
        full = shard.new_empty((self.size * shard.shape[0], *shard.shape[1:]))
        _all_gather(full, shard, group=self.group)
        return full.movedim(0, dim)

    def _reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        length = self._shard_length(x, dim)
        terms = x.movedim(dim, 0).contiguous()
        shard = terms.new_empty((length, *terms.shape[1:]))
        _reduce_scatter(shard, terms, group=self.group)
        return shard.movedim(0, dim)

    def _shard_length(self, x: Tensor, dim: int) -> int:
        """The size of a shard along `dim`."""
        if x.shape[dim] % self.size:
            raise ParamsError(
                f"a tensor of shape {tuple(x.shape)} cannot be sharded along its dim {dim} over {self.size} ranks,"
                " which do not divide it. Give sequences of a length that they divide, or a plan without sequence=True."
            )
        return x.shape[dim] // self.size


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, tp_group: TPGroup, op: Op, dim: int, result: Tensor | None) -> Tensor:
        return tp_group.forward(op, x, dim) if result is None else result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, TPGroup, Op, int, Tensor | None], output: Tensor) -> None:
        _, ctx.tp_group, ctx.op, ctx.dim, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.tp_group.collective(_TRANSPOSE[ctx.op], grad, ctx.dim), None, None, None, None

    @staticmethod
    def vmap(
        _info: Any, in_dims: Any, x: Tensor, tp_group: TPGroup, op: Op, dim: int, _result: Any
    ) -> tuple[Tensor, Any]:
        if in_dims[0] is None:
            return tp_group.collective(op, x, dim), None
        return tp_group.collective(op, x.movedim(in_dims[0], 0), dim + 1), 0


def _regrouped(x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
    """`x` whose `outer` blocks of `inner` blocks along `dim` become `inner` blocks of `outer` blocks."""
    if outer == 1 or inner == 1:
        return x
    dim %= x.dim()
    shape = (*x.shape[:dim], outer, inner, x.shape[dim] // (outer * inner), *x.shape[dim + 1 :])
    return x.reshape(shape).transpose(dim, dim + 1).reshape(x.shape)
