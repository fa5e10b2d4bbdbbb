"""BatchNorm by the statistics of all ranks' rows: a rule for APPLY.

C is the number of channels, in dim 1; statistics are over all other dims.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.dtypes import NARROW
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.errors import AxisError
from lumen.parallel.comm.buckets import GradComm


def synchronized(next: Next, call: ApplyCall, comm: GradComm, counts: bool) -> Any:
    """Apply the module with its BatchNorms synchronized; the rows of a dummy batch do not count (`counts`)."""
    change = functools.partial(_synchronize, comm=comm, counts=counts)
    return next(call.replace(target=call.target.variant(("synchronized", id(comm), counts), change)))


def _synchronize(module: nn.Module, comm: GradComm, counts: bool) -> None:
    for norm in module.modules():
        if isinstance(norm, _torch_compat.BatchNorm):
            norm.forward = functools.partial(_normalize, norm, comm, counts)  # type: ignore[method-assign]


class _Sum(torch.autograd.Function):
    """The sum over ranks; its transpose is the sum again, as every rank's loss depends on every rank's terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: GradComm) -> Tensor:
        ctx.comm = comm
        return comm.launch(x.detach().clone(), exact=True)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.launch(grad.clone(), exact=True)(), None


def _normalize(norm: _torch_compat.BatchNorm, comm: GradComm, counts: bool, x: Tensor) -> Tensor:
    if not norm.training and norm.running_mean is not None:
        return type(norm).forward(norm, x)
    values = x.float() if x.dtype in NARROW else x
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    counted = values if counts else values[:0]
    size = values.new_full((1,), counted.numel() // counted.shape[1])
    if _torch_compat.peek_interpreter_stack() is not None:
        raise AxisError(
            'lm.ddp(buffers="sync") sums the statistics of BatchNorm over ranks, which torch cannot do inside'
            ' torch.func. Leave engine="func" out, or write lm.ddp(buffers="merge").'
        )
    sums, total = _sum(torch.cat([counted.sum(dims), size]), comm).split([x.shape[1], 1])
    mean = sums / total  # C
    var = _sum((counted - mean.view(shape)).square().sum(dims), comm) / total  # C
    with torch.no_grad():
        _track(norm, mean, var * total / (total - 1).clamp(min=1))
    normalized = (values - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normalized = normalized * norm.weight.view(shape) + norm.bias.view(shape)
    normal: Tensor = normalized.to(x.dtype)
    return normal


def _sum(x: Tensor, comm: GradComm) -> Tensor:
    summed: Tensor = _Sum.apply(x, comm)  # type: ignore[no-untyped-call]
    return summed


def _track(norm: _torch_compat.BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Update the running statistics in place; the tensors in the module are this call's own copies."""
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if norm.momentum is None:
            running.add_((new.to(running.dtype) - running) / norm.num_batches_tracked)
        else:
            running.lerp_(new.to(running.dtype), norm.momentum)
