"""Schedule-free learning: averaging in place of a decaying learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import HyperparameterError, StateError
from lumen.optim._base import GradientTransformation, check_rounds_nothing, needs, wide_clone
from lumen.optim._hyperparams import HParams, Hyper, learning_rate
from lumen.optim._numerics import Coefficients, Scalar, is_narrow, scalar_dtype, widen, zip_map


@pytree_dataclass
class ScheduleFreeState:
    """The base iterates `z`, the largest learning rate and the sum of weights so far, and the inner state.

    `x` is the average, in float32, if any param has 16 bits; otherwise it is empty and computed from params and `z`.
    """

    z: Any
    x: Any
    max_lr: Tensor
    weight_sum: Tensor
    inner: Any
    hparams: HParams


@checked
def schedule_free(
    inner: GradientTransformation, beta: Scalar = 0.9, weight_power: Scalar = 2.0
) -> GradientTransformation:
    """Schedule-free learning (Defazio et al., 2024, "The Road Less Scheduled") around an optimizer.

    The params of the training state are `y`, where gradients are computed. With `γ` the
    maximum of the inner learning rate so far: `z <- z + inner's update`, `x <- (1 − c) x + c z` with
    `c = γ^weight_power / Σ γ^weight_power`, and `y <- β x + (1 − β) z`. `x` is not stored:
    `schedule_free_eval_params` recovers it for evaluation. But if any param has 16 bits, `x` and `z` are stored in
    float32: an average recovered from a rounded `y` would not change.

    Args:
        inner: `sgd(lr)` or `adamw(lr, betas=(0.0, 0.999))`: `beta` replaces its momentum. Use a learning
            rate that warms up and then stays constant.
        beta: the share of the average in `y`, in (0, 1).
        weight_power: the power of the learning rate in the average's weights.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.schedule_free(lm.optim.sgd(0.5), beta=0.5)
    >>> params = {"w": torch.ones(1)}
    >>> opt_state = tx.init(params)
    >>> for _ in range(2):
    ...     params, opt_state = tx.apply({"w": torch.ones(1)}, opt_state, params)
    >>> params["w"], lm.optim.schedule_free_eval_params(opt_state, params)["w"]
    (tensor([0.1250]), tensor([0.2500]))
    """
    check_rounds_nothing("schedule_free", inner)
    hyper = Hyper(None, below_one=("beta",), beta=beta, weight_power=weight_power)
    if hyper.is_zero("beta"):
        raise HyperparameterError(
            "beta=0 is not allowed: give a number in (0, 1). At 0 the average cannot be recovered."
        )

    def init(params: Any) -> ScheduleFreeState:
        count, hparams = hyper.init(params)
        zero = torch.zeros((), dtype=scalar_dtype(count.device), device=count.device)
        # evaluation reads beta from the state, so it is stored even if it is a constant
        hparams.setdefault("beta", zero + hyper("beta", hparams))
        average = wide_clone(params) if is_narrow(params) else ()
        return ScheduleFreeState(wide_clone(params), average, zero, zero.clone(), inner.init_fn(params), hparams)

    def update(grads: Any, state: ScheduleFreeState, params: Any) -> tuple[Any, ScheduleFreeState]:
        updates, new_inner = inner.update_fn(grads, state.inner, params)
        lr = learning_rate(new_inner)
        max_lr = torch.maximum(state.max_lr, torch.ones_like(state.max_lr) if lr is None else lr)
        weight = max_lr ** hyper("weight_power", state.hparams)
        weight_sum = state.weight_sum + weight
        share = torch.where(weight_sum > 0, weight / weight_sum, 0.0)  # 0/0 at a learning rate of 0
        scalars = Coefficients(hyper("beta", state.hparams), share)

        def leaf(y: Tensor, z: Tensor, x: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            y = widen(y)
            beta, share = scalars.like(y)
            old_x = (y - (1 - beta) * z) / beta if x is None else x
            new_z = (z + u).to(z.dtype)
            new_x = (1 - share) * old_x + share * new_z
            return beta * new_x + (1 - beta) * new_z - y, new_z, None if x is None else new_x

        updates, z, x = zip_map(leaf, params, state.z, state.x, updates)
        return updates, ScheduleFreeState(z, x, max_lr, weight_sum, new_inner, state.hparams)

    return GradientTransformation(init, update, **needs(inner))


def schedule_free_eval_params(opt_state: Any, params: Any) -> Any:
    """The averaged params `x`, at which a model trained with `schedule_free` is to be evaluated.

    Args:
        opt_state: the optimizer's state; `schedule_free` may be nested in a chain or partition.
        params: the training state's params. Leaves that no schedule-free optimizer trains are returned
            unchanged.

    Raises:
        StateError: there is no schedule-free optimizer in `opt_state`.

    >>> import torch, lumen as lm
    >>> params = {"w": torch.ones(1)}
    >>> tx = lm.optim.schedule_free(lm.optim.sgd(0.5))
    >>> lm.optim.schedule_free_eval_params(tx.init(params), params)["w"]
    tensor([1.])
    """
    states = [s for s in tree.leaves(opt_state, is_leaf=_is_schedule_free) if _is_schedule_free(s)]
    if not states:
        raise StateError("schedule_free_eval_params found no schedule_free optimizer in this opt_state.")
    for state in states:
        scalars = Coefficients(state.hparams["beta"])
        if tree.structure(state.z) == tree.structure(params):
            (params,) = zip_map(lambda y, z, x, s=scalars: (_average(y, z, x, s),), params, state.z, state.x)
        else:  # the group of a partition: its leaves by name
            x = state.x or {}
            params = {
                name: _average(y, state.z[name], x.get(name), scalars) if name in state.z else y
                for name, y in params.items()
            }
    return params


def _average(y: Tensor, z: Tensor, x: Tensor | None, scalars: Coefficients) -> Tensor:
    if x is not None:
        return x.to(y.dtype)
    wide_y = widen(y)
    (beta,) = scalars.like(wide_y)
    return ((wide_y - (1 - beta) * z) / beta).to(y.dtype)


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, ScheduleFreeState)
