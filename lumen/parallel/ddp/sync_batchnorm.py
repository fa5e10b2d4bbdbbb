"""BatchNorm by the statistics of all processes' rows: a rule for P0.

C is the number of channels, in dim 1; statistics are over all other dims.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lumen.core.dtypes import NARROW
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.errors import AxisError
from lumen.parallel.comm.buckets import GradComm


def synchronized(next: Next, call: ApplyCall, wire: GradComm, counts: bool) -> Any:
    """Apply the module with its BatchNorms synchronized; where rows only stand in for none, they do not count."""
    change = functools.partial(_synchronise, wire=wire, counts=counts)
    return next(call.replace(target=call.target.variant(("synchronized", id(wire), counts), change)))


def _synchronise(module: nn.Module, wire: GradComm, counts: bool) -> None:
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = functools.partial(_normalise, norm, wire, counts)  # type: ignore[method-assign]


class _Sum(torch.autograd.Function):
    """The sum over processes; its transpose is the sum again, as every process's loss depends on every part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: GradComm) -> Tensor:
        ctx.wire = wire
        return wire.launch(x.detach().clone(), exact=True)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.launch(grad.clone(), exact=True)(), None


def _normalise(norm: _BatchNorm, wire: GradComm, counts: bool, x: Tensor) -> Tensor:
    if not norm.training and norm.running_mean is not None:
        return type(norm).forward(norm, x)
    values = x.float() if x.dtype in NARROW else x
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    seen = values if counts else values[:0]
    size = values.new_full((1,), seen.numel() // seen.shape[1])
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise AxisError(
            'lm.ddp(buffers="sync") sums the statistics of BatchNorm over processes, which torch cannot do inside'
            ' torch.func. Leave engine="func" out, or write lm.ddp(buffers="merge").'
        )
    sums, total = _sum(torch.cat([seen.sum(dims), size]), wire).split([x.shape[1], 1])
    mean = sums / total  # C
    var = _sum((seen - mean.view(shape)).square().sum(dims), wire) / total  # C
    with torch.no_grad():
        _track(norm, mean, var * total / (total - 1).clamp(min=1))
    out = (values - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    normal: Tensor = out.to(x.dtype)
    return normal


def _sum(x: Tensor, wire: GradComm) -> Tensor:
    summed: Tensor = _Sum.apply(x, wire)  # type: ignore[no-untyped-call]
    return summed


def _track(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics; the tensors in the module's tables are copies of this call's own."""
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if norm.momentum is None:
            running.add_((new.to(running.dtype) - running) / norm.num_batches_tracked)
        else:
            running.lerp_(new.to(running.dtype), norm.momentum)
