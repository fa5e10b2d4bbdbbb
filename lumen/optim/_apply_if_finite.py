"""Skip updates whose gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import sharding
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim._base import GradientTransformation, needs
from lumen.optim._hyperparams import check_count, device_of
from lumen.optim._norms import leaf_norms


@pytree_dataclass
class FiniteState:
    """The number of consecutive and of all updates with non-finite gradients, and the inner state."""

    consecutive: Tensor
    total: Tensor
    inner: Any


@checked
def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int) -> GradientTransformation:
    """`inner`, except that an update with a NaN or infinite gradient changes nothing but the counters.

    A leaf whose L2 norm is too large for float32 (1e19 and more) counts as infinite.

    After more than `max_consecutive_errors` such updates in a row it lets them through, so that a diverged run
    becomes visible. Compare `lm.guard`, which also checks the loss.

    Raises:
        HyperparameterError: `max_consecutive_errors` is not a whole number from 0.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.apply_if_finite(lm.optim.sgd(1.0), max_consecutive_errors=3)
    >>> params = {"w": torch.ones(1)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([float("nan")])}, tx.init(params), params)
    >>> params["w"], int(opt_state.total)
    (tensor([1.]), 1)
    """
    check_count("max_consecutive_errors", max_consecutive_errors, low=0)

    def init(params: Any) -> FiniteState:
        zero = torch.zeros((), dtype=torch.int64, device=device_of(params))
        return FiniteState(zero, zero.clone(), inner.init_fn(params))

    def check_finite(grads: Any, state: FiniteState) -> tuple[Tensor, Tensor, Tensor]:
        """Whether to reject, and the new counters."""
        bad = ~sharding.all_ranks(all_finite(grads, state.total.device))
        consecutive = torch.where(bad, state.consecutive + 1, 0)
        return bad & (consecutive <= max_consecutive_errors), consecutive, state.total + bad

    def update(grads: Any, state: FiniteState, params: Any) -> tuple[Any, FiniteState]:
        reject, consecutive, total = check_finite(grads, state)
        updates, after = inner.update_fn(grads, state.inner, params)
        updates = tree.map(lambda u: torch.where(reject, torch.zeros_like(u), u), updates)
        return updates, FiniteState(consecutive, total, tree.select(reject, state.inner, after))

    def fused(grads: Any, state: FiniteState, params: Any, skip: Tensor | None) -> FiniteState:
        reject, consecutive, total = check_finite(grads, state)
        if skip is not None:
            consecutive, total = tree.select(skip, (state.consecutive, state.total), (consecutive, total))
            reject = reject | skip
        return FiniteState(consecutive, total, inner.in_place(grads, state.inner, params, reject))

    return GradientTransformation(init, update, fused if inner.fused_fn is not None else None, **needs(inner))


def all_finite(grads: Any, device: torch.device) -> Tensor:
    """Whether the norm of every leaf is finite, as a boolean scalar on `device`."""
    leaves = tree.leaves(grads)
    if not leaves:
        return torch.ones((), dtype=torch.bool, device=device)
    return leaf_norms(leaves).isfinite().all().to(device)
