"""Stochastic gradient descent, with momentum in torch's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import HyperparameterError
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._numerics import Coefficients, Scalar, as_tree, widened, zeros_like, zip_map
from lumen.optim._param_names import Selector, selected


@pytree_dataclass
class SGDState:
    """SGD's state: `trace` is the momentum buffer (empty without momentum)."""

    count: Tensor
    trace: Any
    hparams: HParams


@checked
def sgd(
    lr: ScalarOrSchedule,
    momentum: Scalar = 0.0,
    *,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    decay_mask: Selector | None = None,
) -> GradientTransformation:
    """Gradient descent with optional momentum (Sutskever et al., 2013, in torch's form).

    `b <- momentum · b + (1 − dampening) · g`, with `b = g` at the first step; `p <- p − lr · b`, or with
    `nesterov` `p <- p − lr · (g + momentum · b)`. `weight_decay · p` is added to `g` first.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        momentum: the decay rate of the buffer, in [0, 1).
        nesterov: look ahead along the momentum; needs momentum, and no dampening.
        dampening: the fraction of a gradient that is not added to the buffer.
        weight_decay: L2 regularization.
        decay_mask: which leaves decay, as in `adamw`.

    Raises:
        HyperparameterError: a value outside its range, or nesterov without momentum or with dampening.

    The fused lowering is bitwise `torch.optim.SGD(fused=True)`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.sgd(0.5, momentum=0.9)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([1.0, 2.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.5000, 0.0000])
    """
    hyper = Hyper(
        lr,
        below_one=("momentum",),
        at_most_one=("dampening",),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
    )
    if nesterov and (hyper.is_zero("momentum") or not hyper.is_zero("dampening")):
        raise HyperparameterError("nesterov needs momentum > 0 and dampening = 0: sgd(lr, momentum=0.9, nesterov=True)")
    return _SGD(hyper, nesterov, decay_mask).transform()


class _SGD:
    """The update rule with its plain and its fused lowering."""

    def __init__(self, hyper: Hyper, nesterov: bool, decay_mask: Selector | None) -> None:
        self.hyper = hyper
        self.nesterov = nesterov
        self.decay_mask = decay_mask
        self.has_momentum = not hyper.is_zero("momentum")
        self.dampened = self.has_momentum and not hyper.is_zero("dampening")

    def transform(self) -> GradientTransformation:
        return GradientTransformation(self.init, self.update, self.fused)

    def init(self, params: Any) -> SGDState:
        self._decays(params)
        count, hparams = self.hyper.init(params)
        return SGDState(count, zeros_like(params) if self.has_momentum else (), hparams)

    def update(self, grads: Any, state: SGDState, params: Any) -> tuple[Any, SGDState]:
        momentum, dampening, decay = self.hyper.values(state.hparams)
        lr, hparams = self.hyper.lr(state.count, state.hparams)
        share: Scalar = 1 - dampening
        if self.dampened:  # the first gradient is not dampened
            one = torch.ones_like(lr)
            share = torch.where(state.count == 0, one, share * one)
        scalars = Coefficients(-lr, momentum, share, decay)

        def leaf(p: Tensor, g: Tensor, b: Tensor | None, decays: bool) -> tuple[Any, ...]:
            g, wide_p, wide_b = widened(g, p, b)
            minus_lr, momentum, share, decay = scalars.like(g)
            if decays:
                g = g + decay * wide_p
            if b is None:
                return minus_lr * g, None
            wide_b = momentum * wide_b + (share * g if self.dampened else g)
            direction = g + momentum * wide_b if self.nesterov else wide_b
            return minus_lr * direction, wide_b.to(b.dtype)

        updates, trace = zip_map(leaf, params, grads, state.trace, as_tree(self._decays(params), params))
        return updates, SGDState(state.count + 1, trace, hparams)

    def fused(self, grads: Any, state: SGDState, params: Any, skip: Tensor | None) -> Any:
        hyper = self.hyper
        lists = _fused_kernels.columns(params, grads, state.trace)
        # With dampening the first step differs, and the kernel takes `is_first_step` as a Python flag.
        syncs = self.dampened and not state.count.is_cpu
        if syncs or not _fused_kernels.usable(hyper, state.hparams, lists[0], lists[2], trial=_TRIAL):
            return plain_in_place(self.update, grads, state, params, skip)
        (momentum, dampening, decay), lr, hparams = _fused_kernels.scalar_arguments(hyper, state)
        is_first_step = self.dampened and int(state.count) == 0
        _fused_kernels.advance(state.count, skip)
        for decays, (ps, gs, traces) in _fused_kernels.batches(lists, self._decays(params)):
            kernel_lr, found_inf = _fused_kernels.scalars(ps[0], lr, skip)
            _torch_compat.fused_sgd_(
                ps,
                _fused_kernels.contiguous(gs),
                traces,
                weight_decay=decay if decays else 0.0,
                momentum=momentum,
                lr=kernel_lr,
                dampening=dampening,
                nesterov=self.nesterov,
                maximize=False,
                is_first_step=is_first_step,
                found_inf=found_inf,
            )
        if hparams is state.hparams:
            return state
        return SGDState(state.count, state.trace, _fused_kernels.select_hparams(state.hparams, hparams, skip))

    def _decays(self, params: Any) -> bool | list[bool]:
        if self.hyper.is_zero("weight_decay"):
            return False
        return True if self.decay_mask is None else selected(self.decay_mask, params)


def _examples() -> list[_SGD]:
    return [
        _SGD(Hyper(0.5, momentum=momentum, dampening=0.0, weight_decay=0.25), nesterov=False, decay_mask=None)
        for momentum in (0.0, 0.5)
    ]


_TRIAL = _fused_kernels.Trial(_examples)
