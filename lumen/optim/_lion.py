"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._numerics import Coefficients, Scalar, as_tree, widened, zeros_like, zip_map
from lumen.optim._param_names import Selector, selected


@pytree_dataclass
class LionState:
    """Lion's state: `mu` is the momentum."""

    count: Tensor
    mu: Any
    hparams: HParams


@checked
def lion(
    lr: ScalarOrSchedule,
    betas: tuple[Scalar, Scalar] = (0.9, 0.99),
    weight_decay: Scalar = 0.0,
    *,
    decay_mask: Selector | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms").

    `p <- p − lr · (sign(β₁ m + (1 − β₁) g) + weight_decay · p)`, then `m <- β₂ m + (1 − β₂) g`. Its steps
    are larger than Adam's: use a 3 to 10 times smaller learning rate and a larger decay.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the share of the momentum in the step, and its decay rate; both in [0, 1).
        weight_decay: decay by `lr · weight_decay` at each step.
        decay_mask: which leaves decay, as in `adamw`.
        moment_dtype: the dtype of the momentum. None means the params' own, and float32 for 16-bit params.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.lion(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([5.0, -0.1])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.9000, 1.1000])
    """
    hyper = Hyper(lr, below_one=("beta1", "beta2"), beta1=betas[0], beta2=betas[1], weight_decay=weight_decay)
    return _Lion(hyper, decay_mask, moment_dtype).transform()


class _Lion:
    """The update rule with its plain and its fused lowering."""

    def __init__(self, hyper: Hyper, decay_mask: Selector | None, moment_dtype: torch.dtype | None) -> None:
        self.hyper = hyper
        self.decay_mask = decay_mask
        self.moment_dtype = moment_dtype

    def transform(self) -> GradientTransformation:
        return GradientTransformation(self.init, self.update, self.fused)

    def init(self, params: Any) -> LionState:
        self._decays(params)
        count, hparams = self.hyper.init(params)
        return LionState(count, zeros_like(params, self.moment_dtype), hparams)

    def update(self, grads: Any, state: LionState, params: Any) -> tuple[Any, LionState]:
        beta1, beta2, decay = self.hyper.values(state.hparams)
        lr, hparams = self.hyper.lr(state.count, state.hparams)
        scalars = Coefficients(1 - beta1, 1 - beta2, -lr, decay)

        def leaf(p: Tensor, g: Tensor, m: Tensor, decays: bool) -> tuple[Tensor, Tensor]:
            g, wide_p, wide_m = widened(g, p, m)
            new1, new2, minus_lr, decay = scalars.like(g)
            direction = torch.sign(torch.lerp(wide_m, g, new1))
            if decays:
                direction = direction + decay * wide_p
            return minus_lr * direction, torch.lerp(wide_m, g, new2).to(m.dtype)

        updates, mu = zip_map(leaf, params, grads, state.mu, as_tree(self._decays(params), params))
        return updates, LionState(state.count + 1, mu, hparams)

    def fused(self, grads: Any, state: LionState, params: Any, skip: Tensor | None) -> Any:
        lists = _fused_kernels.columns(params, grads, state.mu)
        if not _fused_kernels.foreach_usable(self.hyper, state.hparams, lists[0], lists[2]):
            return plain_in_place(self.update, grads, state, params, skip)
        if skip is not None and bool(skip):  # on the CPU, where reading it does not synchronize
            return state
        (beta1, beta2, decay), lr, hparams = _fused_kernels.scalar_arguments(self.hyper, state)
        rate = lr.item()
        for decays, (ps, gs, mus) in _fused_kernels.batches(lists, self._decays(params)):
            directions = _torch_compat.foreach_lerp(mus, gs, 1 - beta1)
            _torch_compat.foreach_sign_(directions)
            if decays:
                _torch_compat.foreach_mul_(ps, 1 - rate * decay)
            _torch_compat.foreach_add_(ps, directions, alpha=-rate)
            _torch_compat.foreach_lerp_(mus, gs, 1 - beta2)
        _fused_kernels.advance(state.count, None)
        return LionState(state.count, state.mu, hparams)

    def _decays(self, params: Any) -> bool | list[bool]:
        if self.hyper.is_zero("weight_decay"):
            return False
        return True if self.decay_mask is None else selected(self.decay_mask, params)
