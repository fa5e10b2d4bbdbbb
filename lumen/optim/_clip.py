"""Clip gradients by their global norm, or entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, sharding
from lumen.core.arguments import checked
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation
from lumen.optim._hyperparams import Hyper
from lumen.optim._norms import leaf_norms
from lumen.optim._numerics import Coefficients, Scalar, widen


def global_norm(grads: Any) -> Tensor:
    """The L2 norm over all leaves, in float32 (float64 if a leaf is); under `fsdp`, over the shards of all ranks.

    >>> import torch, lumen as lm
    >>> lm.optim.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return total_norm(grads, None)


def clipped(grads: Any, bound: Scalar, norms: Tensor | None = None, unused: Sequence[bool] | None = None) -> Any:
    """Grads scaled to a global norm of at most `bound`; `norms` are the norms of the leaves, if already computed.

    Leaves that are `unused` do not count towards the norm.
    """
    return scaled(grads, torch.clamp(bound / (total_norm(grads, norms, unused) + 1e-6), max=1.0))


def total_norm(grads: Any, norms: Tensor | None, unused: Sequence[bool] | None = None) -> Tensor:
    """The L2 norm over all leaves that are not `unused`, from those of the leaves, if these are known."""
    leaves = tree.leaves(grads)
    if not leaves:
        return torch.zeros(())
    norms = leaf_norms(leaves) if norms is None else norms
    if unused is not None and any(unused):
        norms = torch.where(torch.tensor(unused, device=norms.device), 0.0, norms)
    return sharding.norm(norms, grads)


@checked
def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Scale all grads by `min(1, max_norm / (global_norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does.

    Raises:
        HyperparameterError: `max_norm` is negative or not finite.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.clip_by_global_norm(1.0)
    >>> grads = {"w": torch.tensor([3.0, 4.0])}
    >>> tx.update(grads, tx.init(grads), grads)[0]["w"]
    tensor([0.6000, 0.8000])
    """
    hyper = Hyper(None, max_norm=max_norm)

    def update(grads: Any, state: Any, _params: Any) -> tuple[Any, Any]:
        return clipped(grads, hyper("max_norm", hyper.unpack(state))), state

    return GradientTransformation(hyper.pack, update)


@checked
def clip_by_value(max_value: Scalar) -> GradientTransformation:
    """Clamp every entry of the grads to [−max_value, max_value], as `torch.nn.utils.clip_grad_value_` does.

    Raises:
        HyperparameterError: `max_value` is negative or not finite.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.clip_by_value(1.0)
    >>> grads = {"w": torch.tensor([3.0, -0.5])}
    >>> tx.update(grads, tx.init(grads), grads)[0]["w"]
    tensor([ 1.0000, -0.5000])
    """
    hyper = Hyper(None, max_value=max_value)

    def update(grads: Any, state: Any, _params: Any) -> tuple[Any, Any]:
        return clip_entries(grads, hyper("max_value", hyper.unpack(state))), state

    return GradientTransformation(hyper.pack, update)


def clip_entries(grads: Any, bound: Scalar) -> Any:
    """Grads with every entry clamped to [−bound, bound]."""
    if isinstance(bound, Tensor):
        return tree.map(lambda g: torch.clamp(g, -bound.to(g.dtype), bound.to(g.dtype)), grads)
    return tree.map(lambda g: torch.clamp(g, -bound, bound), grads)


def scaled(values: Any, factor: Tensor) -> Any:
    """Every leaf times a 0-d tensor, in the leaf's dtype; the product is rounded once."""
    leaves, spec = tree.flatten(values)
    if _fused_kernels.allowed(leaves) and {(t.dtype, t.device) for t in leaves} == {(factor.dtype, factor.device)}:
        return tree.unflatten(spec, list(_torch_compat.foreach_mul(leaves, factor)))
    by = Coefficients(factor)
    wide = [widen(leaf) for leaf in leaves]
    return tree.unflatten(spec, [(w * by.like(w)[0]).to(t.dtype) for w, t in zip(wide, leaves, strict=True)])
