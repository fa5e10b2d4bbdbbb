"""`pmean`, `psum`, `pmax`, `pmin`, `all_gather`, `axis_index`: collectives over a named axis, identities where unbound.

An axis is bound by `ensemble` (the lanes of a `vmap`) or by a parallel transform (the processes of a mesh).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, distributed, rules
from lumen.errors import AxisError

MESH_AXES = ("data", "shard", "pipeline", "context", "tensor")  # from the outermost to the innermost
ROW_AXES = ("data", "shard")  # over which the rows of a batch are split
_NAMES = (*MESH_AXES, "lanes")  # which a step may name where they are not bound


class Axis(Protocol):
    """What can be bound to an axis name."""

    size: int
    process: bool

    def index(self) -> Tensor:
        """This member's place along the axis."""

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum, "max" or "min" (`op`) of `x` over the axis, NaN where any member has NaN; every member gets it."""


def psum(values: Any, axis: str) -> Any:
    """The sum of each tensor in `values` over the members of `axis`; `values` itself where it is unbound.

    Its transpose is psum again: the gradient of every member reaches every member.

    >>> import lumen as lm, torch
    >>> lm.psum(torch.tensor(2.0), "data")
    tensor(2.)
    """
    rules.stack.joined_axes.add(axis)
    return _reduce(values, axis, "sum")


def pmax(values: Any, axis: str) -> Any:
    """The maximum of each tensor in `values` over the members of `axis`; NaN where any member has NaN.

    >>> import lumen as lm, torch
    >>> lm.pmax(torch.tensor(2.0), "data")
    tensor(2.)
    """
    return _reduce(values, axis, "max")


def pmin(values: Any, axis: str) -> Any:
    """The minimum of each tensor in `values` over the members of `axis`; NaN where any member has NaN.

    >>> import lumen as lm, torch
    >>> lm.pmin(torch.tensor(2.0), "data")
    tensor(2.)
    """
    return _reduce(values, axis, "min")


def pmean(values: Any, axis: str) -> Any:
    """The mean of each tensor in `values` over the members of `axis`.

    >>> import lumen as lm, torch
    >>> lm.pmean({"x": torch.tensor(2.0)}, "data")
    {'x': tensor(2.)}
    """
    bound = _bound(axis)
    if bound is None:
        return values
    return tree.map(lambda x: x / bound.size, _reduce(values, axis, "sum"))


def all_gather(values: Any, axis: str) -> Any:
    """The rows of all members of `axis`, in their order, from each tensor's own; `values` itself where it is unbound.

    Each member must have equally many. Its transpose gives every member the sum of all members' gradients in its own
    rows, so a loss of each member's rows against the rows of all (negatives from the global batch) has, summed over
    members as `lm.ddp` sums, the gradient of that loss on the global batch.

    Raises `AxisError`, on every process, where processes have unequally many rows.

    >>> import lumen as lm, torch
    >>> lm.all_gather(torch.tensor([1.0, 2.0]), "data")
    tensor([1., 2.])
    """
    bound = _bound(axis)
    if bound is None:
        return values
    rules.stack.joined_axes.add(axis)
    return tree.map(lambda x: _gathered(x, bound, axis), values)


def check_joined(sizes: Mapping[str, int]) -> None:
    """Raise `AxisError` for a step that summed or gathered over an axis of rows that one rank alone is along.

    `sizes` are those of the axes of a mesh. It must have done the same over the axis with the other rows.
    """
    for axis, other in (ROW_AXES, ROW_AXES[::-1]):
        joined = rules.stack.joined_axes
        if axis in joined and other not in joined and sizes[axis] == 1 < sizes[other]:
            raise AxisError(
                f"the step called lm.all_gather or lm.psum over {axis!r}, along which there is one process; the rows of"
                f" the batch are split over the {sizes[other]} along {other!r}. Write lm.all_gather(x, {other!r}), or"
                ' for any mesh lm.all_gather(lm.all_gather(x, "shard"), "data"). lm.psum nests alike.'
            )


def _bound(axis: str) -> Axis | None:
    """What is bound to an axis; `AxisError` for a name that no mesh has, in a step on one."""
    bound: Axis | None = rules.axis(axis)
    if bound is not None or axis in _NAMES:
        return bound
    others = [name for name, other in rules.stack.axes.items() if getattr(other, "process", False)]
    if others:
        raise AxisError(
            f"the axis {axis!r} is bound nowhere; here there are {', '.join(map(repr, others))}. The rows of"
            ' a batch are along "data" under lm.ddp, and along "shard" under lm.fsdp.'
        )
    return bound


def _gathered(x: Tensor, bound: Axis, axis: str) -> Tensor:
    if not x.dim():
        raise AxisError(f"all_gather over {axis!r} joins rows, and a tensor without dims has none. Write x[None].")
    if bound.process and not rules.is_tracing() and not distributed.is_dry_run():
        size = 0 if rules.is_weightless() else len(x)  # dummy rows are no negatives
        rows = torch.tensor([size, size**2], device=x.device)
        total, squares = _reduce(rows, axis, "sum").tolist()
        if bound.size * squares != total**2:
            raise AxisError(
                f"all_gather over {axis!r} takes equally many rows of every process; here there are {size}, of"
                f" {total} on {bound.size} processes. Leave out the smaller last batch: lm.Loader(..., drop_last=True)."
            )
    own = torch.arange(bound.size, device=x.device) == bound.index().to(x.device)
    spread = torch.where(own.view(-1, *[1] * x.dim()), x, torch.zeros_like(x))
    return _reduce(spread, axis, "sum").flatten(0, 1)  # type: ignore[no-any-return]


def axis_index(axis: str) -> Tensor:
    """This member's place along `axis`, an int64 scalar; 0 where it is unbound.

    >>> import lumen as lm
    >>> lm.axis_index("data")
    tensor(0)
    """
    bound = _bound(axis)
    return torch.zeros((), dtype=torch.int64) if bound is None else bound.index()


def _reduce(values: Any, axis: str, op: str) -> Any:
    bound = _bound(axis)
    if bound is None:
        return values
    if bound.process and _torch_compat.peek_interpreter_stack() is not None:
        raise AxisError(
            f"a collective over the process axis {axis!r} was called inside a torch.func transform (vmap or grad),"
            " where torch would silently reduce the wrong tensors. Call it outside: reduce grads after"
            " lm.value_and_grad, and metrics after the step; or name the vmap's own axis."
        )
    return tree.map(lambda x: bound.reduce(x, op), values)


class LaneAxis:
    """The lanes of one `torch.func.vmap` as an axis."""

    process = False

    def __init__(self, size: int, lane: Tensor) -> None:
        self.size = size
        self._lane = lane

    def index(self) -> Tensor:
        """This lane's number."""
        return self._lane

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum, maximum or minimum over the lanes."""
        # A tensor that does not vary over the lanes never reaches the vmap rule of a Function: tie it to the lane.
        varying = x + torch.zeros_like(x) * self._lane.to(x.dtype)
        return _LaneReduce.apply(varying, op)  # type: ignore[no-any-return, no-untyped-call]


class _LaneReduce(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, op: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.op = inputs[1]
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, output = ctx.saved_tensors
        # A gradient that is the same in all lanes must be tied to them too, see `reduce`.
        total = _LaneReduce.apply(grad + torch.zeros_like(x), "sum")  # type: ignore[no-untyped-call]
        if ctx.op == "sum":
            return total, None
        winners = (x == output).to(grad.dtype)
        return total * winners / _LaneReduce.apply(winners, "sum"), None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, op: str) -> tuple[Tensor, None]:
        dim = in_dims[0]
        if dim is None:
            return (x * info.batch_size if op == "sum" else x), None
        if op == "sum":
            return x.sum(dim), None
        return (x.amax(dim) if op == "max" else x.amin(dim)), None
