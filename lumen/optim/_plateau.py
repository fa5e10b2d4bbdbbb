"""Reduce the step size when a metric stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.errors import HyperparameterError, StateError
from lumen.optim._base import GradientTransformation
from lumen.optim._clip import scaled
from lumen.optim._hyperparams import check_count, check_scalar, device_of
from lumen.optim._numerics import scalar_dtype


@dataclass(frozen=True)
class PlateauRule:
    """When and by how much to reduce: the arguments of `reduce_on_plateau`."""

    factor: float
    patience: int
    threshold: float
    threshold_mode: Literal["rel", "abs"]
    mode: Literal["min", "max"]
    cooldown: int
    min_scale: float
    eps: float
    monitor: str | None


@pytree_dataclass
class PlateauState:
    """The scale of updates, the best metric so far, and the counters of bad reports and of the cooldown."""

    scale: Tensor
    best: Tensor
    bad: Tensor
    cooldown: Tensor
    rule: PlateauRule = static()


@checked
def reduce_on_plateau(
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    mode: Literal["min", "max"] = "min",
    cooldown: int = 0,
    min_scale: float = 0.0,
    eps: float = 1e-8,
    *,
    monitor: str | None = None,
) -> GradientTransformation:
    """Scale updates down each time a metric has not improved for more than `patience` reports.

    Put it behind an optimizer in a chain. The Runner reports the metric `monitor` after each validation; without a
    Runner, report it with `plateau_step`. The scale starts at 1 and changes as in
    `torch.optim.lr_scheduler.ReduceLROnPlateau`, relative to the learning rate: torch's `min_lr` and `eps` are
    `lr · min_scale` and `lr · eps`.

    Args:
        factor: the factor of each reduction, in [0, 1).
        patience: the number of reports without improvement before a reduction.
        threshold: how much better than the best a metric must be to count.
        threshold_mode: whether `threshold` is relative to the best, or absolute.
        mode: whether the metric is to be minimized or maximized.
        cooldown: the number of reports after a reduction that do not count as bad.
        min_scale: the lower bound of the scale.
        eps: reductions of at most this size are skipped.
        monitor: the name of the metric, such as "val/loss". The Runner needs it: a run raises `StepError` without it,
            or if no validation returns that name.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.chain(lm.optim.adamw(1e-3), lm.optim.reduce_on_plateau(factor=0.5, patience=0))
    >>> opt_state = tx.init({"w": torch.ones(2)})
    >>> for loss in (1.0, 1.0):
    ...     opt_state = lm.optim.plateau_step(opt_state, loss)
    >>> lm.optim.learning_rate(opt_state).item()
    0.0005
    """
    check_scalar("factor", factor, high=1.0, open_high=True, schedule=False)
    check_scalar("threshold", threshold, schedule=False)
    check_scalar("min_scale", min_scale, high=1.0, schedule=False)
    check_scalar("eps", eps, schedule=False)
    check_count("patience", patience, low=0)
    check_count("cooldown", cooldown, low=0)
    if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
        raise HyperparameterError(
            f"mode={mode!r} must be 'min' or 'max', and threshold_mode={threshold_mode!r} 'rel' or 'abs'."
        )
    rule = PlateauRule(factor, patience, threshold, threshold_mode, mode, cooldown, min_scale, eps, monitor)

    def init(params: Any) -> PlateauState:
        device = device_of(params)
        worst = math.inf if mode == "min" else -math.inf
        scale, best = (torch.tensor(v, dtype=scalar_dtype(device), device=device) for v in (1.0, worst))
        bad, cooldown = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        return PlateauState(scale, best, bad, cooldown, rule)

    def update(grads: Any, state: PlateauState, _params: Any) -> tuple[Any, PlateauState]:
        return scaled(grads, state.scale), state

    return GradientTransformation(init, update, scale_fn=lambda state: state.scale)


def plateau_step(opt_state: Any, metric: float | Tensor, *, monitor: str | None = None) -> Any:
    """The optimizer's state after a report of `metric`; `reduce_on_plateau` may be nested at any depth.

    With `monitor`, only those that monitor this name get the report.

    It does not branch on values, so it also works under `vmap`.

    Raises:
        StateError: there is no `reduce_on_plateau` in `opt_state`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.chain(lm.optim.sgd(1.0), lm.optim.reduce_on_plateau(factor=0.5, patience=0))
    >>> opt_state = tx.init({"w": torch.ones(2)})
    >>> for loss in (1.0, 1.0):
    ...     opt_state = lm.optim.plateau_step(opt_state, loss)
    >>> lm.optim.learning_rate(opt_state).item()
    0.5
    """
    has_plateau = False

    def visit(node: Any) -> Any:
        nonlocal has_plateau
        if not isinstance(node, PlateauState) or monitor not in (None, node.rule.monitor):
            return node
        has_plateau = True
        return _reported(node, metric)

    new = tree.map(visit, opt_state, is_leaf=lambda node: isinstance(node, PlateauState))
    if not has_plateau:
        raise StateError(
            "plateau_step found no reduce_on_plateau in this opt_state. Build the optimizer as"
            " lm.optim.chain(lm.optim.adamw(1e-3), lm.optim.reduce_on_plateau())"
        )
    return new


def _reported(state: PlateauState, metric: float | Tensor) -> PlateauState:
    rule = state.rule
    value = torch.as_tensor(metric, dtype=state.best.dtype, device=state.best.device)
    better = _is_better(rule, value, state.best)
    cooling = state.cooldown > 0
    bad = torch.where(better | cooling, 0, state.bad + 1)
    cooldown = torch.where(cooling, state.cooldown - 1, state.cooldown)
    due = bad > rule.patience
    lower = torch.clamp(state.scale * rule.factor, min=rule.min_scale)
    return PlateauState(
        scale=torch.where(due & (state.scale - lower > rule.eps), lower, state.scale),
        best=torch.where(better, value, state.best),
        bad=torch.where(due, 0, bad),
        cooldown=torch.where(due, rule.cooldown, cooldown),
        rule=rule,
    )


def _is_better(rule: PlateauRule, value: Tensor, best: Tensor) -> Tensor:
    sign = -1.0 if rule.mode == "min" else 1.0
    bound = best * (1 + sign * rule.threshold) if rule.threshold_mode == "rel" else best + sign * rule.threshold
    return value < bound if rule.mode == "min" else value > bound
