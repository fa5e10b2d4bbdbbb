"""Single-purpose members of a chain: scale updates, add decay, add momentum, or change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim._base import GradientTransformation
from lumen.optim._clip import scaled
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule, Schedule, device_of
from lumen.optim._numerics import Coefficients, Scalar, as_tree, widened, zeros_like, zip_map
from lumen.optim._param_names import Selector, selected


@pytree_dataclass
class CountState:
    """The number of updates."""

    count: Tensor


@pytree_dataclass
class RateState:
    """The number of updates, and the learning rate."""

    count: Tensor
    hparams: HParams


@pytree_dataclass
class TraceState:
    """The decaying sum of past gradients."""

    trace: Any
    hparams: HParams


def identity() -> GradientTransformation:
    """Return updates unchanged.

    >>> import lumen as lm
    >>> tx = lm.optim.chain(lm.optim.identity(), lm.optim.sgd(0.1))
    """
    return GradientTransformation(lambda _params: (), lambda grads, state, _params: (grads, state))


@checked
def scale(factor: float | Tensor) -> GradientTransformation:
    """Multiply updates by `factor`, which may be negative.

    Raises:
        HyperparameterError: `factor` is not finite.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.scale(-0.5)
    >>> tx.update({"w": torch.ones(2)}, (), {"w": torch.zeros(2)})[0]["w"]
    tensor([-0.5000, -0.5000])
    """
    hyper = Hyper(None, low=float("-inf"), factor=factor)

    def update(grads: Any, state: Any, _params: Any) -> tuple[Any, Any]:
        by = hyper("factor", hyper.unpack(state))
        if isinstance(by, Tensor):
            return scaled(grads, by), state
        return tree.map(lambda g: g * by, grads), state

    return GradientTransformation(hyper.pack, update)


@checked
def scale_by_schedule(schedule: Schedule) -> GradientTransformation:
    """Multiply updates by `schedule(count)`; the sign does not change.

    >>> import lumen as lm
    >>> tx = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.scale_by_schedule(lm.optim.linear(0.0, 100, 1.0)))
    """

    def init(params: Any) -> CountState:
        return CountState(torch.zeros((), dtype=torch.int64, device=device_of(params)))

    def update(grads: Any, state: CountState, _params: Any) -> tuple[Any, CountState]:
        return scaled(grads, schedule(state.count)), CountState(state.count + 1)

    return GradientTransformation(init, update)


@checked
def scale_by_learning_rate(lr: ScalarOrSchedule) -> GradientTransformation:
    """Multiply updates by minus the learning rate: the last member of a chain that minimizes.

    Raises:
        HyperparameterError: `lr` is negative or not finite.

    >>> import lumen as lm
    >>> tx = lm.optim.chain(lm.optim.scale_by_adam(), lm.optim.scale_by_learning_rate(1e-3))
    """
    hyper = Hyper(lr)

    def init(params: Any) -> RateState:
        return RateState(*hyper.init(params))

    def update(grads: Any, state: RateState, _params: Any) -> tuple[Any, RateState]:
        rate, hparams = hyper.lr(state.count, state.hparams)
        return scaled(grads, -rate), RateState(state.count + 1, hparams)

    return GradientTransformation(init, update)


@checked
def add_decayed_weights(weight_decay: Scalar, mask: Selector | None = None) -> GradientTransformation:
    """Add `weight_decay · p` to updates: L2 regularization in front of an optimizer, decoupled decay behind it.

    Args:
        weight_decay: the factor of the leaf that is added.
        mask: which leaves decay, as `decay_mask` in `adamw`; all when None.

    Raises:
        HyperparameterError: `weight_decay` is negative or not finite.
        PatternError: at init, a pattern that matches nothing.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.add_decayed_weights(0.1, "*.weight")
    >>> params = {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    >>> updates, _ = tx.update(lm.tree.map(torch.zeros_like, params), tx.init(params), params)
    >>> updates
    {'fc.weight': tensor([0.1000]), 'fc.bias': tensor([0.])}
    """
    hyper = Hyper(None, weight_decay=weight_decay)

    def init(params: Any) -> Any:
        selected(mask, params)
        return hyper.pack(params)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        decay = Coefficients(hyper("weight_decay", hyper.unpack(state)))

        def leaf(g: Tensor, p: Tensor, decays: bool) -> Any:
            if not decays:
                return g
            wide, wide_p = widened(g, p)
            return (wide + decay.like(wide)[0] * wide_p).to(g.dtype)

        return tree.map(leaf, grads, params, as_tree(selected(mask, params), params)), state

    return GradientTransformation(init, update)


@checked
def trace(decay: Scalar, *, nesterov: bool = False) -> GradientTransformation:
    """Momentum: `t <- decay · t + g`; the updates are `t`, or `decay · t + g` with `nesterov`.

    Raises:
        HyperparameterError: `decay` is not in [0, 1).

    >>> import lumen as lm
    >>> tx = lm.optim.chain(lm.optim.trace(0.9), lm.optim.scale_by_learning_rate(0.1))
    """
    hyper = Hyper(None, below_one=("decay",), decay=decay)

    def init(params: Any) -> TraceState:
        return TraceState(zeros_like(params), hyper.init(params)[1])

    def update(grads: Any, state: TraceState, _params: Any) -> tuple[Any, TraceState]:
        scalars = Coefficients(hyper("decay", state.hparams))

        def leaf(g: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            wide, wide_t = widened(g, t)
            (decay,) = scalars.like(wide)
            new = decay * wide_t + wide
            return (decay * new + wide if nesterov else new).to(g.dtype), new.to(t.dtype)

        updates, new = zip_map(leaf, grads, state.trace)
        return updates, TraceState(new, state.hparams)

    return GradientTransformation(init, update)
