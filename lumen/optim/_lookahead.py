"""Lookahead: slow params that move towards the fast ones at intervals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.core.dtypes import wide_dtype
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import StateError
from lumen.optim._base import GradientTransformation, check_rounds_nothing, needs, plain_in_place, wide_clone
from lumen.optim._hyperparams import HParams, Hyper, check_count
from lumen.optim._numerics import Coefficients, Scalar, is_narrow, widen, zip_map


@pytree_dataclass
class LookaheadState:
    """The slow params, the number of updates, and the state of the fast optimizer."""

    count: Tensor
    slow: Any
    inner: Any
    hparams: HParams


@checked
def lookahead(inner: GradientTransformation, period: int = 6, slow_step: Scalar = 0.5) -> GradientTransformation:
    """Every `period` updates `slow <- slow + slow_step · (fast − slow)`, `fast <- slow` (Zhang et al., 2019).

    The params of the training state are the fast ones; evaluate with `lookahead_slow_params`, or at a
    multiple of `period`, where both are equal. For 16-bit params, the slow ones are stored in float32.

    Args:
        inner: the fast optimizer.
        period: updates from one synchronization to the next.
        slow_step: how far the slow params go towards the fast ones, in [0, 1].

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.lookahead(lm.optim.sgd(1.0), period=2, slow_step=0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> opt_state = tx.init(params)
    >>> for _ in range(2):
    ...     params, opt_state = tx.apply({"w": torch.ones(1)}, opt_state, params)
    >>> params["w"]
    tensor([-1.])
    """
    period = check_count("period", period, low=1)
    check_rounds_nothing("lookahead", inner)
    hyper = Hyper(None, at_most_one=("slow_step",), slow_step=slow_step)

    def init(params: Any) -> LookaheadState:
        count, hparams = hyper.init(params)
        return LookaheadState(count, wide_clone(params), inner.init_fn(params), hparams)

    def synchronized(count: Tensor, slow: Any, fast: Any, hparams: HParams) -> tuple[Any, Any]:
        due = count % period == 0
        share = Coefficients(hyper("slow_step", hparams))

        def leaf(fast: Tensor, slow: Tensor) -> tuple[Tensor, Tensor]:
            wide = widen(slow)
            merged = wide + share.like(wide)[0] * (widen(fast) - wide)
            return torch.where(due, merged.to(fast.dtype), fast), torch.where(due, merged.to(slow.dtype), slow)

        fast, slow = zip_map(leaf, fast, slow)
        return fast, slow

    def update(grads: Any, state: LookaheadState, params: Any) -> tuple[Any, LookaheadState]:
        updates, new_inner = inner.update_fn(grads, state.inner, params)
        count = state.count + 1
        fast = tree.map(lambda p, u: (p + u).to(wide_dtype(p.dtype)), params, updates)
        fast, slow = synchronized(count, state.slow, fast, state.hparams)
        due = count % period == 0
        updates = tree.map(lambda f, p, u: torch.where(due, widen(f) - widen(p), widen(u)), fast, params, updates)
        return updates, LookaheadState(count, slow, new_inner, state.hparams)

    def fused(grads: Any, state: LookaheadState, params: Any, skip: Tensor | None) -> LookaheadState:
        if is_narrow(params):  # the slow params move towards the fast ones before these are rounded
            return plain_in_place(update, grads, state, params, skip)  # type: ignore[no-any-return]
        new_inner = inner.in_place(grads, state.inner, params, skip)
        count = state.count + (1 if skip is None else ~skip)
        fast, slow = synchronized(count, state.slow, params, state.hparams)
        if skip is not None:  # a skipped update at a multiple of the period must not move the slow params again
            fast, slow = tree.select(skip, (params, state.slow), (fast, slow))
        tree.map(lambda p, f: p.copy_(f), params, fast)
        tree.map(lambda p, s: p.copy_(s), state.slow, slow)
        return LookaheadState(count, state.slow, new_inner, state.hparams)

    return GradientTransformation(init, update, fused if inner.fused_fn is not None else None, **needs(inner))


def lookahead_slow_params(opt_state: Any, params: Any = None) -> Any:
    """The slow params, for evaluation, of the `lookahead` optimizer in `opt_state`, which may be nested in a chain.

    Args:
        opt_state: the optimizer's state.
        params: the training state's params; the slow ones are cast to their dtypes. Without them, those of 16-bit
            params are returned in float32.

    Raises:
        StateError: there is no `lookahead` in `opt_state`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.lookahead(lm.optim.sgd(1.0))
    >>> lm.optim.lookahead_slow_params(tx.init({"w": torch.zeros(1)}))
    {'w': tensor([0.])}
    """
    states = [s for s in tree.leaves(opt_state, is_leaf=_is_lookahead) if _is_lookahead(s)]
    if not states:
        raise StateError("lookahead_slow_params found no lookahead optimizer in this opt_state.")
    slow = states[0].slow
    return slow if params is None else tree.map(lambda s, p: s.to(p.dtype), slow, params)


def _is_lookahead(node: Any) -> bool:
    return isinstance(node, LookaheadState)
