"""Adam and AdamW: bias-corrected moments of the gradient and of its square."""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._numerics import Coefficients, Scalar, as_tree, one_minus_power, widened, zeros_like, zip_map
from lumen.optim._param_names import Selector, selected


@pytree_dataclass
class AdamState:
    """Adam's state: `mu` and `nu` are the moments; `nu_max` is for amsgrad, and otherwise empty."""

    count: Tensor
    mu: Any
    nu: Any
    nu_max: Any
    hparams: HParams


@checked
def adamw(
    lr: ScalarOrSchedule,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    *,
    decay_mask: Selector | None = None,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization").

    `p <- p − lr · (m̂ / (√(v̂ + eps_root) + eps) + weight_decay · p)`, with the moments of `adam`.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the decay rates of the two moments, in [0, 1).
        eps: added to the root.
        weight_decay: decay by `lr · weight_decay` at each step.
        decay_mask: which leaves decay: a glob or compiled regex on the dotted name, several of them, or a
            predicate `(name, leaf) -> bool`. None means all. `lm.optim.matrices` leaves out norms and biases.
        eps_root: added under the root; keeps meta-gradients finite where a gradient is zero.
        amsgrad: divide by the root of the largest second moment so far (Reddi et al., 2018).
        moment_dtype: the dtype of the moments. None means the params' own, and float32 for 16-bit params: in 16 bits
            a mean whose decay rate is above 0.996 never falls, because each change is rounded away.

    Raises:
        HyperparameterError: a value outside its range, NaN included.
        PatternError: at init, a pattern in `decay_mask` that matches nothing.

    The fused lowering is bitwise `torch.optim.AdamW(fused=True)`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adamw(0.1, weight_decay=0.0)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([3.0, -3.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.9000, 1.1000])
    """
    hyper = _hyper(lr, betas, eps, weight_decay, eps_root)
    return _Adam(hyper, decay_mask, decoupled=True, amsgrad=amsgrad, moment_dtype=moment_dtype).transform()


@checked
def adam(
    lr: ScalarOrSchedule,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    decay_mask: Selector | None = None,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam (Kingma & Ba, 2015), with L2 regularization if `weight_decay` is not zero.

    `m <- β₁ m + (1 − β₁) g`, `v <- β₂ v + (1 − β₂) g²`, `p <- p − lr · m̂ / (√(v̂ + eps_root) + eps)`, where
    `m̂ = m / (1 − β₁ᵗ)`, `v̂ = v / (1 − β₂ᵗ)` and `weight_decay · p` is added to `g` first. The arguments are
    as in `adamw`.

    The fused lowering is bitwise `torch.optim.Adam(fused=True)`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adam(0.1)
    >>> opt_state = tx.init({"w": torch.ones(2)})
    >>> lm.optim.learning_rate(opt_state).item()
    0.1
    """
    hyper = _hyper(lr, betas, eps, weight_decay, eps_root)
    return _Adam(hyper, decay_mask, decoupled=False, amsgrad=amsgrad, moment_dtype=moment_dtype).transform()


@checked
def scale_by_adam(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam's direction, `m̂ / (√(v̂ + eps_root) + eps)`, without a learning rate: add one behind it in a chain.

    >>> import lumen as lm
    >>> tx = lm.optim.chain(lm.optim.scale_by_adam(), lm.optim.scale_by_learning_rate(1e-3))
    """
    hyper = _hyper(None, betas, eps, 0.0, eps_root)
    return _Adam(hyper, None, decoupled=True, amsgrad=amsgrad, moment_dtype=moment_dtype).transform()


def _hyper(
    lr: ScalarOrSchedule | None,
    betas: tuple[Scalar, Scalar],
    eps: Scalar,
    weight_decay: Scalar,
    eps_root: Scalar,
) -> Hyper:
    return Hyper(
        lr,
        below_one=("beta1", "beta2"),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        eps_root=eps_root,
    )


class _Adam:
    """The update rule with its plain and its fused lowering, for `adam`, `adamw` and `scale_by_adam`."""

    def __init__(
        self,
        hyper: Hyper,
        decay_mask: Selector | None,
        *,
        decoupled: bool,
        amsgrad: bool,
        moment_dtype: torch.dtype | None,
    ) -> None:
        self.hyper = hyper
        self.decay_mask = decay_mask
        self.has_decay = not hyper.is_zero("weight_decay")
        self.decoupled = decoupled
        self.amsgrad = amsgrad
        self.moment_dtype = moment_dtype
        self.kernel = _torch_compat.fused_adamw_ if decoupled else _torch_compat.fused_adam_

    def transform(self) -> GradientTransformation:
        fusable = self.hyper.has_lr and self.hyper.is_zero("eps_root")  # the kernels need a rate and have no eps_root
        return GradientTransformation(self.init, self.update, self.fused if fusable else None)

    def init(self, params: Any) -> AdamState:
        self._decays(params)  # a pattern without a match fails here, not at the first step
        count, hparams = self.hyper.init(params)
        mu, nu = (zeros_like(params, self.moment_dtype) for _ in range(2))
        return AdamState(count, mu, nu, zeros_like(params, self.moment_dtype) if self.amsgrad else (), hparams)

    def update(self, grads: Any, state: AdamState, params: Any) -> tuple[Any, AdamState]:
        beta1, beta2, eps, decay, eps_root = self.hyper.values(state.hparams)
        minus_lr, hparams = self.hyper.minus_lr(state.count, state.hparams)
        count = state.count + 1
        step_size = minus_lr / one_minus_power(beta1, count)
        unbias2 = 1 / one_minus_power(beta2, count)
        scalars = Coefficients(1 - beta1, beta2, 1 - beta2, step_size, unbias2, eps_root, eps, decay, minus_lr)

        def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, decays: bool) -> tuple[Any, ...]:
            g, wide_p, wide_m, wide_v, wide_max = widened(g, p, m, v, v_max)
            new1, keep2, new2, step_size, unbias2, eps_root, eps, decay, minus_lr = scalars.like(g)
            if decays and not self.decoupled:
                g = g + decay * wide_p
            wide_m = torch.lerp(wide_m, g, new1)
            wide_v = keep2 * wide_v + new2 * g * g
            largest = wide_v if v_max is None else torch.maximum(wide_max, wide_v)
            update = step_size * wide_m / (torch.sqrt(largest * unbias2 + eps_root) + eps)
            if decays and self.decoupled:
                update = update + minus_lr * decay * wide_p
            return (
                update,
                wide_m.to(m.dtype),
                wide_v.to(v.dtype),
                None if v_max is None else largest.to(v.dtype),
            )

        decays = as_tree(self._decays(params), params)
        updates, mu, nu, nu_max = zip_map(leaf, params, grads, state.mu, state.nu, state.nu_max, decays)
        return updates, AdamState(count, mu, nu, nu_max, hparams)

    def fused(self, grads: Any, state: AdamState, params: Any, skip: Tensor | None) -> Any:
        hyper = self.hyper
        cached = _fused_kernels.FusedArgsCache.of(
            _TRIALS[self.decoupled], hyper, state, params, state.mu, state.nu, state.nu_max
        )
        if cached is None or any(map(attrgetter("requires_grad"), state.hparams.values())):
            return plain_in_place(self.update, grads, state, params, skip)
        ps, *moments = cached.lists
        lists = [ps, _fused_kernels.aligned(params, grads), *moments]
        (beta1, beta2, eps, decay, _), lr, hparams = _fused_kernels.scalar_arguments(hyper, state)
        count = _fused_kernels.advance(state.count, skip)
        for decays, (ps, gs, mus, nus, maxima) in _fused_kernels.batches(lists, self._decays(params)):
            kernel_lr, found_inf = _fused_kernels.scalars(ps[0], lr, skip)
            self.kernel(
                ps,
                gs,
                mus,
                nus,
                maxima,
                _fused_kernels.steps(ps, count),
                lr=kernel_lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay if decays else 0.0,
                eps=eps,
                amsgrad=self.amsgrad,
                maximize=False,
                found_inf=found_inf,
            )
        if hparams is state.hparams:
            return state
        hparams = _fused_kernels.select_hparams(state.hparams, hparams, skip)
        return AdamState(state.count, state.mu, state.nu, state.nu_max, hparams)

    def _decays(self, params: Any) -> bool | list[bool]:
        """Whether leaves decay: one flag for all, or one for each leaf."""
        if not self.has_decay:
            return False
        return True if self.decay_mask is None else selected(self.decay_mask, params)


def _examples(decoupled: bool) -> list[_Adam]:
    hyper = _hyper(0.5, (0.5, 0.75), 0.25, 0.25, 0.0)
    return [_Adam(hyper, None, decoupled=decoupled, amsgrad=amsgrad, moment_dtype=None) for amsgrad in (False, True)]


_TRIALS = {decoupled: _fused_kernels.Trial(functools.partial(_examples, decoupled)) for decoupled in (False, True)}
