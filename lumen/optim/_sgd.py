"""Stochastic gradient descent, with momentum in torch's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import HyperparameterError
from lumen.optim import _fused_kernels, _low_bit_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._low_bit import LeafNoise, StateDtype, Storage, loaded, moment_bits, rounded_update, stored
from lumen.optim._numerics import Coefficients, Scalar, as_tree, widened, zip_map
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
    state_dtype: StateDtype = None,
    stochastic_rounding: bool = False,
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
        state_dtype: how the momentum buffer is stored, as the first moment in `adamw`; needs momentum.
        stochastic_rounding: how bfloat16 params are rounded, as in `adamw`.

    Raises:
        HyperparameterError: a value outside its range; nesterov without momentum or with dampening; or a `state_dtype`
            that is unknown, or without momentum.
        ParamsError: at init, `stochastic_rounding` for params of which none is bfloat16, or one is float16.

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
    if state_dtype is not None and hyper.is_zero("momentum"):
        raise HyperparameterError(
            f"state_dtype={state_dtype!r} is the dtype of the momentum buffer, and there is none: sgd(lr, momentum=0.9,"
            " state_dtype=…)"
        )
    return _SGD(hyper, nesterov, decay_mask, Storage("sgd", state_dtype, stochastic_rounding)).transform()


class _SGD:
    """The update rule with its plain and its fused lowering."""

    def __init__(self, hyper: Hyper, nesterov: bool, decay_mask: Selector | None, storage: Storage) -> None:
        self.hyper = hyper
        self.nesterov = nesterov
        self.decay_mask = decay_mask
        self.storage = storage
        self.has_momentum = not hyper.is_zero("momentum")
        self.dampened = self.has_momentum and not hyper.is_zero("dampening")

    def transform(self) -> GradientTransformation:
        return GradientTransformation(self.init, self.update, self.fused, **self.storage.fields())

    def init(self, params: Any) -> SGDState:
        self._decays(params)
        count, hparams = self.hyper.init(params)
        trace = self.storage.zeros(params) if self.has_momentum else ()
        return SGDState(count, trace, self.storage.with_key(hparams, params))

    def update(self, grads: Any, state: SGDState, params: Any) -> tuple[Any, SGDState]:
        momentum, dampening, decay = self.hyper.values(state.hparams)
        lr, hparams = self.hyper.lr(state.count, state.hparams)
        share: Scalar = 1 - dampening
        if self.dampened:  # the first gradient is not dampened
            one = torch.ones_like(lr)
            share = torch.where(state.count == 0, one, share * one)
        scalars = Coefficients(-lr, momentum, share, decay)

        def leaf(p: Tensor, g: Tensor, b: Any, decays: bool, noise: LeafNoise) -> tuple[Any, ...]:
            g, wide_p, wide_b = widened(g, p, loaded(b))
            minus_lr, momentum, share, decay = scalars.like(g)
            if decays:
                g = g + decay * wide_p
            if b is None:
                return rounded_update(minus_lr * g, wide_p, p, noise), None
            wide_b = momentum * wide_b + (share * g if self.dampened else g)
            direction = g + momentum * wide_b if self.nesterov else wide_b
            bits, _ = moment_bits(noise, b)
            return rounded_update(minus_lr * direction, wide_p, p, noise), stored(wide_b, b, bits)

        noises = self.storage.noise_tree(state.hparams, state.count, params)
        updates, trace = zip_map(leaf, params, grads, state.trace, as_tree(self._decays(params), params), noises)
        return updates, SGDState(state.count + 1, trace, hparams)

    def fused(self, grads: Any, state: SGDState, params: Any, skip: Tensor | None) -> Any:
        hyper = self.hyper
        lists = _fused_kernels.columns(params, grads, state.trace)
        # With dampening the first step differs, and the kernel takes `is_first_step` as a Python flag.
        syncs = self.dampened and not state.count.is_cpu
        low_bit = self.storage.is_low_bit
        if syncs or not _fused_kernels.usable(hyper, state.hparams, lists[0], lists[2], trial=_TRIAL, low_bit=low_bit):
            return plain_in_place(self.update, grads, state, params, skip)
        noises = self.storage.noises(state.hparams, state.count, params) if self.storage.is_rounding else []
        if noises and _low_bit_kernels.is_skipped(skip):
            return state
        (momentum, dampening, decay), lr, hparams = _fused_kernels.scalar_arguments(hyper, state)
        is_first_step = self.dampened and int(state.count) == 0
        _fused_kernels.advance(state.count, skip)
        lists[1] = _fused_kernels.contiguous(lists[1])
        decaying = self._decays(params)
        batches = _fused_kernels.batches(lists, decaying)
        if noises:
            batches = _low_bit_kernels.batches(lists, decaying, noises, skip)
        for decays, (ps, gs, traces) in batches:
            kernel_lr, found_inf = _fused_kernels.scalars(ps[0], lr, skip)
            _torch_compat.fused_sgd_(
                ps,
                gs,
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
        _SGD(Hyper(0.5, momentum=momentum, dampening=0.0, weight_decay=0.25), False, None, Storage("sgd", None))
        for momentum in (0.0, 0.5)
    ]


_TRIAL = _fused_kernels.Trial(_examples)
