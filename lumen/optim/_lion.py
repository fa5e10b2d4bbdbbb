"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim import _fused_kernels, _low_bit_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._low_bit import LeafNoise, StateDtype, Storage, loaded, moment_bits, rounded_update, stored
from lumen.optim._numerics import Coefficients, Scalar, as_tree, widened, zip_map
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
    state_dtype: StateDtype = None,
    stochastic_rounding: bool = False,
) -> GradientTransformation:
    """Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms").

    `p <- p − lr · (sign(β₁ m + (1 − β₁) g) + weight_decay · p)`, then `m <- β₂ m + (1 − β₂) g`. Its steps
    are larger than Adam's: use a 3 to 10 times smaller learning rate and a larger decay.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the share of the momentum in the step, and its decay rate; both in [0, 1).
        weight_decay: decay by `lr · weight_decay` at each step.
        decay_mask: which leaves decay, as in `adamw`.
        state_dtype: how the momentum is stored, as the first moment in `adamw`.
        stochastic_rounding: how bfloat16 params are rounded, as in `adamw`.

    Raises:
        HyperparameterError: a value outside its range, or a `state_dtype` that is unknown.
        ParamsError: at init, `stochastic_rounding` for params of which none is bfloat16, or one is float16.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.lion(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([5.0, -0.1])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.9000, 1.1000])
    """
    hyper = Hyper(lr, below_one=("beta1", "beta2"), beta1=betas[0], beta2=betas[1], weight_decay=weight_decay)
    return _Lion(hyper, decay_mask, Storage("lion", state_dtype, stochastic_rounding)).transform()


class _Lion:
    """The update rule with its plain and its fused lowering."""

    def __init__(self, hyper: Hyper, decay_mask: Selector | None, storage: Storage) -> None:
        self.hyper = hyper
        self.decay_mask = decay_mask
        self.storage = storage

    def transform(self) -> GradientTransformation:
        return GradientTransformation(self.init, self.update, self.fused, **self.storage.fields())

    def init(self, params: Any) -> LionState:
        self._decays(params)
        count, hparams = self.hyper.init(params)
        return LionState(count, self.storage.zeros(params), self.storage.with_key(hparams, params))

    def update(self, grads: Any, state: LionState, params: Any) -> tuple[Any, LionState]:
        beta1, beta2, decay = self.hyper.values(state.hparams)
        lr, hparams = self.hyper.lr(state.count, state.hparams)
        scalars = Coefficients(1 - beta1, 1 - beta2, -lr, decay)

        def leaf(p: Tensor, g: Tensor, m: Any, decays: bool, noise: LeafNoise) -> tuple[Tensor, Any]:
            g, wide_p, wide_m = widened(g, p, loaded(m))
            new1, new2, minus_lr, decay = scalars.like(g)
            direction = torch.sign(torch.lerp(wide_m, g, new1))
            if decays:
                direction = direction + decay * wide_p
            bits, _ = moment_bits(noise, m)
            update = rounded_update(minus_lr * direction, wide_p, p, noise)
            return update, stored(torch.lerp(wide_m, g, new2), m, bits)

        noises = self.storage.noise_tree(state.hparams, state.count, params)
        updates, mu = zip_map(leaf, params, grads, state.mu, as_tree(self._decays(params), params), noises)
        return updates, LionState(state.count + 1, mu, hparams)

    def fused(self, grads: Any, state: LionState, params: Any, skip: Tensor | None) -> Any:
        lists = _fused_kernels.columns(params, grads, state.mu)
        low_bit = self.storage.is_low_bit
        if not _fused_kernels.foreach_usable(self.hyper, state.hparams, lists[0], lists[2], low_bit=low_bit):
            return plain_in_place(self.update, grads, state, params, skip)
        if skip is not None and bool(skip):  # on the CPU, where reading it does not synchronize
            return state
        (beta1, beta2, decay), lr, hparams = _fused_kernels.scalar_arguments(self.hyper, state)
        rate = lr.item()
        decaying = self._decays(params)
        batches = _fused_kernels.batches(lists, decaying)
        if self.storage.is_rounding:
            lists[1] = _fused_kernels.contiguous(lists[1])
            noises = self.storage.noises(state.hparams, state.count, params)
            batches = _low_bit_kernels.batches(lists, decaying, noises, None)
        for decays, (ps, gs, mus) in batches:
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
