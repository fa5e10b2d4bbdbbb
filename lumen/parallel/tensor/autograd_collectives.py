"""What travels between the processes that compute one model together, so that gradients come out right.

A tensor is *whole* (the same on every process), *cut* (each has a part along one dim), or *partial* (each has a term of
its sum). Each move is the transpose of another: what goes one way in the forward pass goes the other in the backward
pass, and once more where a gradient is differentiated again.

    copy     whole   -> whole, read by what is cut      sum      partial -> whole
    slice    whole   -> cut                             gather   cut     -> whole, read by what is whole
    scatter  partial -> cut                             spread   cut     -> whole, read by what is cut
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.errors import ParamsError
from lumen.parallel.comm.collectives import _all_gather, _reduce_scatter
from lumen.parallel.comm.process_groups import GroupRef

Op = Literal["copy", "sum", "slice", "gather", "scatter", "spread"]

_TRANSPOSE: dict[Op, Op] = {
    "copy": "sum",
    "sum": "copy",
    "slice": "gather",
    "gather": "slice",
    "scatter": "spread",
    "spread": "scatter",
}


class TPGroup:
    """The processes along a mesh's `tensor` axis, as this one sees them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = GroupRef(group)
        self.size, self.index = self._group.size, self._group.index

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes."""
        return self._group()

    def __deepcopy__(self, _memo: Any) -> TPGroup:
        return self  # a module that moves tensors over it may be copied, the processes may not

    def move(self, op: Op, x: Tensor, dim: int = 0, known: Tensor | None = None) -> Tensor:
        """`x` after `op`, along `dim`; `known` is what another move has made of it already."""
        moved: Tensor = _Move.apply(x, self, op, dim % x.dim(), known)  # type: ignore[no-untyped-call]
        return moved

    def gather(self, x: Tensor, dim: int, groups: int = 1) -> Tensor:
        """The whole tensor, for what is whole, of parts along `dim` that were cut in `groups`."""
        return _regrouped(self.move("gather", x, dim), dim, self.size, groups)

    def slice(self, x: Tensor, dim: int, groups: int = 1) -> Tensor:
        """This process's part of a whole tensor; each of the `groups` along `dim` is cut."""
        return self.move("slice", _regrouped(x, dim, groups, self.size), dim)

    # ------------------------------------------------------------------------------------- on plain tensors

    def forward(self, op: Op, x: Tensor, dim: int) -> Tensor:
        """What `op` makes of `x`, in memory of its own but for "copy"."""
        if op == "copy":
            return x.view_as(x)
        if op == "sum":
            return self.reduce(x, "sum")
        if op == "slice":
            each = self._each(x, dim)
            return x.narrow(dim, self.index * each, each).clone(memory_format=torch.contiguous_format)
        if op == "scatter":
            return self._scattered(x, dim)
        return self._joined(x, dim)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum or the maximum over the processes; a new tensor."""
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return out

    def _joined(self, x: Tensor, dim: int) -> Tensor:
        mine = x.movedim(dim, 0).contiguous()
        out = mine.new_empty((self.size * mine.shape[0], *mine.shape[1:]))
        _all_gather(out, mine, group=self.group)
        return out.movedim(0, dim)

    def _scattered(self, x: Tensor, dim: int) -> Tensor:
        each = self._each(x, dim)
        terms = x.movedim(dim, 0).contiguous()
        out = terms.new_empty((each, *terms.shape[1:]))
        _reduce_scatter(out, terms, group=self.group)
        return out.movedim(0, dim)

    def _each(self, x: Tensor, dim: int) -> int:
        """The size of a part along `dim`."""
        if x.shape[dim] % self.size:
            raise ParamsError(
                f"a tensor of shape {tuple(x.shape)} was to be cut along its dim {dim} over {self.size} processes,"
                " which do not divide it. Give sequences of a length that they divide, or a plan without sequence=True."
            )
        return x.shape[dim] // self.size


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, team: TPGroup, op: Op, dim: int, known: Tensor | None) -> Tensor:
        return team.forward(op, x, dim) if known is None else known.view_as(known)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, TPGroup, Op, int, Tensor | None], output: Tensor) -> None:
        _, ctx.team, ctx.op, ctx.dim, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.team.move(_TRANSPOSE[ctx.op], grad, ctx.dim), None, None, None, None

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor, team: TPGroup, op: Op, dim: int, _known: Any) -> tuple[Tensor, Any]:
        if in_dims[0] is None:
            return team.move(op, x, dim), None
        return team.move(op, x.movedim(in_dims[0], 0), dim + 1), 0


def _regrouped(x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
    """`x` with what lies along `dim` as `outer` blocks of `inner` blocks turned into `inner` blocks of `outer`."""
    if outer == 1 or inner == 1:
        return x
    dim %= x.dim()
    shape = (*x.shape[:dim], outer, inner, x.shape[dim] // (outer * inner), *x.shape[dim + 1 :])
    return x.reshape(shape).transpose(dim, dim + 1).reshape(x.shape)
