"""NAdam and RAdam: Adam with Nesterov momentum, and with a rectified warm-up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim._base import GradientTransformation
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._numerics import (
    Coefficients,
    Scalar,
    one_minus_power,
    scalar_dtype,
    time,
    widened,
    zeros_like,
    zip_map,
)


@pytree_dataclass
class NAdamState:
    """NAdam's state: the moments, and the product of all momentum coefficients so far."""

    count: Tensor
    mu: Any
    nu: Any
    mu_product: Tensor
    hparams: HParams


@pytree_dataclass
class RAdamState:
    """RAdam's state: the moments."""

    count: Tensor
    mu: Any
    nu: Any
    hparams: HParams


@checked
def nadam(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    momentum_decay: Scalar = 4e-3,
    decoupled: bool = False,
) -> GradientTransformation:
    """NAdam (Dozat, 2016), in torch's form.

    With `μ_t = β₁ (1 − ½ · 0.96^(t · momentum_decay))` and `M_t` the product of `μ_1 … μ_t`:
    `p <- p − lr · ((1 − μ_t) / (1 − M_t) · g + μ_{t+1} / (1 − M_{t+1}) · m) / (√v̂ + eps)`.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the decay rates of the two moments, in [0, 1).
        eps: added to the root.
        weight_decay: L2 regularization, or decay by `lr · weight_decay` if `decoupled`.
        momentum_decay: how fast the momentum coefficients reach β₁.
        decoupled: decay as in AdamW.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.nadam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> params, opt_state = tx.apply({"w": torch.ones(1)}, tx.init(params), params)
    >>> params["w"] < 1
    tensor([True])
    """
    hyper = Hyper(
        lr,
        below_one=("beta1", "beta2"),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
    )
    decays = not hyper.is_zero("weight_decay")

    def init(params: Any) -> NAdamState:
        count, hparams = hyper.init(params)
        one = torch.ones((), dtype=scalar_dtype(count.device), device=count.device)
        return NAdamState(count, zeros_like(params), zeros_like(params), one, hparams)

    def update(grads: Any, state: NAdamState, params: Any) -> tuple[Any, NAdamState]:
        beta1, beta2, eps, decay, momentum_decay = hyper.values(state.hparams)
        rate, hparams = hyper.lr(state.count, state.hparams)
        count = state.count + 1
        t = time(count)
        mu_t = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        product = state.mu_product * mu_t
        scalars = Coefficients(
            1 - beta1,
            beta2,
            1 - beta2,
            1 / one_minus_power(beta2, count),
            eps,
            decay,
            -rate,
            -rate * (1 - mu_t) / (1 - product),
            -rate * mu_next / (1 - product * mu_next),
        )

        def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g, wide_p, wide_m, wide_v = widened(g, p, m, v)
            new1, keep2, new2, unbias2, eps, decay, minus_rate, g_size, m_size = scalars.like(g)
            if decays and not decoupled:
                g = g + decay * wide_p
            wide_m = torch.lerp(wide_m, g, new1)
            wide_v = keep2 * wide_v + new2 * g * g
            update = (g_size * g + m_size * wide_m) / (torch.sqrt(wide_v * unbias2) + eps)
            if decays and decoupled:
                update = update + minus_rate * decay * wide_p
            return update, wide_m.to(m.dtype), wide_v.to(v.dtype)

        updates, mu, nu = zip_map(leaf, params, grads, state.mu, state.nu)
        return updates, NAdamState(count, mu, nu, product, hparams)

    return GradientTransformation(init, update)


@checked
def radam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    decoupled: bool = False,
) -> GradientTransformation:
    """RAdam (Liu et al., 2020, "On the Variance of the Adaptive Learning Rate and Beyond"), in torch's form.

    While the approximated length `ρ_t` of the second moment's average is at most 5, `p <- p − lr · m̂`; then
    `p <- p − lr · r_t · m̂ · √(1 − β₂ᵗ) / (√v + eps)` with the rectification `r_t` of the paper.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the decay rates of the two moments, in [0, 1).
        eps: added to the root.
        weight_decay: L2 regularization, or decay by `lr · weight_decay` if `decoupled`.
        decoupled: decay as in AdamW.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.radam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> params, opt_state = tx.apply({"w": torch.full((1,), 2.0)}, tx.init(params), params)
    >>> params["w"]
    tensor([0.8000])
    """
    hyper = Hyper(lr, below_one=("beta1", "beta2"), beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    decays = not hyper.is_zero("weight_decay")

    def init(params: Any) -> RAdamState:
        count, hparams = hyper.init(params)
        return RAdamState(count, zeros_like(params), zeros_like(params), hparams)

    def update(grads: Any, state: RAdamState, params: Any) -> tuple[Any, RAdamState]:
        beta1, beta2, eps, decay = hyper.values(state.hparams)
        rate, hparams = hyper.lr(state.count, state.hparams)
        count = state.count + 1
        correction2 = one_minus_power(beta2, count)
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * time(count) * (1 - correction2) / correction2
        rectified = length > 5
        # Values that keep the unused branch and its gradients finite.
        safe = torch.where(rectified, length, 6.0)
        divisor = torch.where(rectified, (limit - 4) * (limit - 2) * safe, 1.0)
        ratio = torch.where(rectified, (safe - 4) * (safe - 2) * limit / divisor, 1.0)
        scalars = Coefficients(
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            decay,
            -rate,
            -rate / one_minus_power(beta1, count),
            torch.sqrt(ratio * correction2),
        )

        def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g, wide_p, wide_m, wide_v = widened(g, p, m, v)
            new1, keep2, new2, eps, decay, minus_rate, step_size, rectify = scalars.like(g)
            if decays and not decoupled:
                g = g + decay * wide_p
            wide_m = torch.lerp(wide_m, g, new1)
            wide_v = keep2 * wide_v + new2 * g * g
            update = step_size * wide_m * torch.where(rectified, rectify / (torch.sqrt(wide_v) + eps), 1.0)
            if decays and decoupled:
                update = update + minus_rate * decay * wide_p
            return update, wide_m.to(m.dtype), wide_v.to(v.dtype)

        updates, mu, nu = zip_map(leaf, params, grads, state.mu, state.nu)
        return updates, RAdamState(count, mu, nu, hparams)

    return GradientTransformation(init, update)
