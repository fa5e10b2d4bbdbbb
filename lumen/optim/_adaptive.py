"""RMSprop and Adagrad: gradients divided by the root of the mean, or of the sum, of their squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.dtypes import wide_dtype
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule, check_scalar
from lumen.optim._numerics import Coefficients, Scalar, time, widened, zeros_like, zip_map


@pytree_dataclass
class RMSpropState:
    """RMSprop's state: means of g² and (if centered) of g, and the momentum buffer; empty if not in use."""

    count: Tensor
    nu: Any
    mu: Any
    trace: Any
    hparams: HParams


@pytree_dataclass
class AdagradState:
    """Adagrad's state: the sum of squared gradients."""

    count: Tensor
    total: Any
    hparams: HParams


@checked
def rmsprop(
    lr: ScalarOrSchedule,
    alpha: Scalar = 0.99,
    eps: Scalar = 1e-8,
    *,
    momentum: Scalar = 0.0,
    centered: bool = False,
    weight_decay: Scalar = 0.0,
) -> GradientTransformation:
    """RMSprop (Tieleman & Hinton, 2012; centered: Graves, 2013), in torch's form.

    `v <- α v + (1 − α) g²`; `p <- p − lr · g / (√v + eps)`. With `centered`, `v − m²` replaces `v`,
    where `m` is the mean of `g`. With `momentum`, the steps `g / (√v + eps)` are accumulated in a buffer
    first.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        alpha: the decay rate of the means, in [0, 1).
        eps: added to the root.
        momentum: the decay rate of the buffer, in [0, 1).
        centered: divide by the standard deviation.
        weight_decay: L2 regularization.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.rmsprop(0.1, alpha=0.75)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([4.0, -1.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.8000, 1.2000])
    """
    hyper = Hyper(
        lr,
        below_one=("alpha", "momentum"),
        alpha=alpha,
        eps=eps,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return _RMSprop(hyper, centered).transform()


class _RMSprop:
    """The update rule with its plain and its fused lowering."""

    def __init__(self, hyper: Hyper, centered: bool) -> None:
        self.hyper = hyper
        self.centered = centered
        self.has_momentum = not hyper.is_zero("momentum")

    def transform(self) -> GradientTransformation:
        return GradientTransformation(self.init, self.update, self.fused)

    def init(self, params: Any) -> RMSpropState:
        count, hparams = self.hyper.init(params)
        mu = zeros_like(params) if self.centered else ()
        return RMSpropState(count, zeros_like(params), mu, zeros_like(params) if self.has_momentum else (), hparams)

    def update(self, grads: Any, state: RMSpropState, params: Any) -> tuple[Any, RMSpropState]:
        alpha, eps, momentum, decay = self.hyper.values(state.hparams)
        lr, hparams = self.hyper.lr(state.count, state.hparams)
        scalars = Coefficients(alpha, 1 - alpha, eps, momentum, decay, -lr)
        decays = not self.hyper.is_zero("weight_decay")

        def leaf(p: Tensor, g: Tensor, v: Tensor, m: Tensor | None, b: Tensor | None) -> tuple[Any, ...]:
            g, wide_p, wide_v, wide_m, wide_b = widened(g, p, v, m, b)
            alpha, new, eps, momentum, decay, minus_lr = scalars.like(g)
            if decays:
                g = g + decay * wide_p
            wide_v = alpha * wide_v + new * g * g
            variance = wide_v
            if m is not None:
                wide_m = torch.lerp(wide_m, g, new)
                variance = wide_v - wide_m * wide_m
            direction = g / (torch.sqrt(variance) + eps)
            if b is not None:
                direction = momentum * wide_b + direction
            new_mean = None if m is None else wide_m.to(m.dtype)
            return (
                minus_lr * direction,
                wide_v.to(v.dtype),
                new_mean,
                None if b is None else direction.to(b.dtype),
            )

        updates, nu, mu, trace = zip_map(leaf, params, grads, state.nu, state.mu, state.trace)
        return updates, RMSpropState(state.count + 1, nu, mu, trace, hparams)

    def fused(self, grads: Any, state: RMSpropState, params: Any, skip: Tensor | None) -> Any:
        lists = _fused_kernels.columns(params, grads, state.nu, state.mu, state.trace)
        if not _fused_kernels.foreach_usable(self.hyper, state.hparams, lists[0], *lists[2:]):
            return plain_in_place(self.update, grads, state, params, skip)
        if skip is not None and bool(skip):  # on the CPU, where reading it does not synchronize
            return state
        (alpha, eps, momentum, decay), lr, hparams = _fused_kernels.scalar_arguments(self.hyper, state)
        minus_lr = -lr.item()
        for _, (ps, gs, nus, mus, traces) in _fused_kernels.batches(lists):
            if decay:
                gs = list(_torch_compat.foreach_add(gs, ps, alpha=decay))
            _torch_compat.foreach_mul_(nus, alpha)
            _torch_compat.foreach_addcmul_(nus, gs, gs, 1 - alpha)
            if mus:
                _torch_compat.foreach_lerp_(mus, gs, 1 - alpha)
                roots = _torch_compat.foreach_addcmul(nus, mus, mus, -1)
                _torch_compat.foreach_sqrt_(roots)
            else:
                roots = _torch_compat.foreach_sqrt(nus)
            _torch_compat.foreach_add_(roots, eps)
            if traces:
                _torch_compat.foreach_mul_(traces, momentum)
                _torch_compat.foreach_addcdiv_(traces, gs, roots)
                _torch_compat.foreach_add_(ps, traces, alpha=minus_lr)
            else:
                _torch_compat.foreach_addcdiv_(ps, gs, roots, minus_lr)
        _fused_kernels.advance(state.count, None)
        return RMSpropState(state.count, state.nu, state.mu, state.trace, hparams)


@checked
def adagrad(
    lr: ScalarOrSchedule,
    eps: Scalar = 1e-10,
    *,
    lr_decay: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    initial_accumulator: float = 0.0,
) -> GradientTransformation:
    """Adagrad (Duchi et al., 2011), in torch's form.

    `s <- s + g²`; `p <- p − lr / (1 + (t − 1) · lr_decay) · g / (√s + eps)`.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        eps: added to the root.
        lr_decay: how fast the learning rate falls with the number of updates.
        weight_decay: L2 regularization.
        initial_accumulator: the initial value of the sums.

    Raises:
        HyperparameterError: a value outside its range.

    The fused lowering is bitwise `torch.optim.Adagrad(fused=True)`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adagrad(0.5)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([4.0, -1.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.5000, 1.5000])
    """
    check_scalar("initial_accumulator", initial_accumulator, schedule=False)
    hyper = Hyper(lr, eps=eps, lr_decay=lr_decay, weight_decay=weight_decay)
    return _Adagrad(hyper, initial_accumulator).transform()


class _Adagrad:
    """The update rule with its plain and its fused lowering."""

    def __init__(self, hyper: Hyper, initial: float) -> None:
        self.hyper = hyper
        self.initial = initial

    def transform(self) -> GradientTransformation:
        return GradientTransformation(self.init, self.update, self.fused)

    def init(self, params: Any) -> AdagradState:
        count, hparams = self.hyper.init(params)
        total = tree.map(lambda p: torch.full_like(p, self.initial, dtype=wide_dtype(p.dtype)), params)
        return AdagradState(count, total, hparams)

    def update(self, grads: Any, state: AdagradState, params: Any) -> tuple[Any, AdagradState]:
        eps, lr_decay, decay = self.hyper.values(state.hparams)
        lr, hparams = self.hyper.lr(state.count, state.hparams)
        scalars = Coefficients(eps, decay, -lr / (1 + time(state.count) * lr_decay))
        decays = not self.hyper.is_zero("weight_decay")

        def leaf(p: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            g, wide_p, total = widened(g, p, s)
            eps, decay, step_size = scalars.like(g)
            if decays:
                g = g + decay * wide_p
            total = total + g * g
            return step_size * g / (torch.sqrt(total) + eps), total.to(s.dtype)

        updates, total = zip_map(leaf, params, grads, state.total)
        return updates, AdagradState(state.count + 1, total, hparams)

    def fused(self, grads: Any, state: AdagradState, params: Any, skip: Tensor | None) -> Any:
        lists = _fused_kernels.columns(params, grads, state.total)
        if not _fused_kernels.usable(self.hyper, state.hparams, lists[0], lists[2], trial=_TRIAL):
            return plain_in_place(self.update, grads, state, params, skip)
        (eps, lr_decay, decay), lr, hparams = _fused_kernels.scalar_arguments(self.hyper, state)
        count = _fused_kernels.advance(state.count, skip)
        for _, (ps, gs, totals) in _fused_kernels.batches(lists):
            kernel_lr, found_inf = _fused_kernels.scalars(ps[0], lr, skip)
            _torch_compat.fused_adagrad_(
                ps,
                _fused_kernels.contiguous(gs),
                totals,
                _fused_kernels.steps(ps, count),
                lr=kernel_lr,
                lr_decay=lr_decay,
                weight_decay=decay,
                eps=eps,
                maximize=False,
                found_inf=found_inf,
            )
        return AdagradState(state.count, state.total, _fused_kernels.select_hparams(state.hparams, hparams, skip))


def _examples() -> list[_Adagrad]:
    return [_Adagrad(Hyper(0.5, eps=0.25, lr_decay=0.5, weight_decay=0.25), 0.25)]


_TRIAL = _fused_kernels.Trial(_examples)
