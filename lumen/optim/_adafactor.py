"""Adafactor: the second moments of a matrix, stored as one row and one column."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lumen.core.arguments import checked
from lumen.core.dtypes import wide_dtype
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.optim._base import GradientTransformation
from lumen.optim._full_tensors import init_full_tensors, map_full_tensors
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule, check_scalar
from lumen.optim._numerics import Coefficients, Scalar, time, widen, widened


@pytree_dataclass
class AdafactorState:
    """Adafactor's state: the second moments of each leaf, as `row` and `col` (two or more dims) or `full`."""

    count: Tensor
    nu: Any
    hparams: HParams


@checked
def adafactor(
    lr: ScalarOrSchedule = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, Scalar] = (None, 1e-3),
    clip_threshold: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
) -> GradientTransformation:
    """Adafactor (Shazeer & Stern, 2018), with torch's defaults and details.

    With `1 − β₂ = t^beta2_decay`: `R <- lerp(R, mean(g², cols), 1 − β₂)`, `C <- lerp(C, mean(g², rows), 1 −
    β₂)`, `v = R C / mean(R)`, `u = g / √v`, and `p <- p − lr · weight_decay · p − α · u / max(1, rms(u) /
    clip_threshold)`, where `α = max(eps₂, rms(p)) · min(lr, 1/√t)`. The last two dims form the matrix; for
    a vector, `v` is stored in full.

    Args:
        lr: the largest relative step size: a number, a 0-d tensor, or a schedule.
        beta2_decay: the (negative) power of the update's number in `1 − β₂`.
        eps: the lower bound of the root of `v` (None: the dtype's resolution), and that of a leaf's scale.
        clip_threshold: the upper bound of an update's root mean square, at least 1.
        weight_decay: decay by `lr · weight_decay` at each step.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adafactor(0.1)
    >>> opt_state = tx.init({"w": torch.ones(30, 20), "b": torch.ones(20)})
    >>> lm.tree.map(lambda leaf: tuple(leaf.shape), opt_state.nu)
    {'w': {'row': (30, 1), 'col': (1, 20)}, 'b': {'full': (20,)}}
    """
    eps1, eps2 = eps
    check_scalar("beta2_decay", beta2_decay, low=-float("inf"), high=0.0, schedule=False)
    check_scalar("clip_threshold", clip_threshold, low=1.0, schedule=False)
    if eps1 is not None:
        check_scalar("eps[0]", eps1, schedule=False)
    hyper = Hyper(lr, eps2=eps2, clip_threshold=clip_threshold, weight_decay=weight_decay)
    decays = not hyper.is_zero("weight_decay")

    def init(params: Any) -> AdafactorState:
        count, hparams = hyper.init(params)
        return AdafactorState(count, init_full_tensors(_zeros, params), hparams)

    def update(grads: Any, state: AdafactorState, params: Any) -> tuple[Any, AdafactorState]:
        eps2, threshold, decay = hyper.values(state.hparams)
        rate, hparams = hyper.lr(state.count, state.hparams)
        count = state.count + 1
        t = time(count)
        scalars = Coefficients(t**beta2_decay, torch.minimum(rate, t**-0.5), rate, eps2, threshold, decay)

        def leaf(p: Tensor, g: Tensor, v: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            g, wide_p = widened(g, p)
            new, rho, rate, eps2, threshold, decay = scalars.like(g)
            least = torch.finfo(p.dtype).eps if eps1 is None else eps1
            scale = rho * _at_least(_rms(wide_p), eps2)
            variance, new_moments = _second_moment(g, v, new, least)
            u = g * torch.rsqrt(torch.clamp(variance, min=least * least))
            u = -scale * u / torch.clamp(_rms(u) / threshold, min=1.0)
            return u - rate * decay * wide_p if decays else u, new_moments

        updates, nu = map_full_tensors(leaf, params, grads, state.nu, _zeros)
        return updates, AdafactorState(count, nu, hparams)

    return GradientTransformation(
        init,
        update,
        needs_full_tensors="adafactor averages over the rows and columns of full matrices",
        can_gather=True,
    )


def _zeros(p: Tensor) -> dict[str, Tensor]:
    dtype = wide_dtype(p.dtype)
    if p.dim() < 2:
        return {"full": torch.zeros_like(p, dtype=dtype)}
    return {"row": torch.zeros_like(p[..., :1], dtype=dtype), "col": torch.zeros_like(p[..., :1, :], dtype=dtype)}


def _second_moment(g: Tensor, v: dict[str, Tensor], new: Any, least: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The estimate of g², and the new moments in their own dtypes."""
    square = g * g
    if "full" in v:
        wide = widen(v["full"])
        wide = wide + new * (square - wide)
        return wide, {"full": wide.to(v["full"].dtype)}
    row, col = widen(v["row"]), widen(v["col"])
    row = row + new * (square.mean(-1, keepdim=True) - row)
    col = col + new * (square.mean(-2, keepdim=True) - col)
    estimate = row * col / torch.clamp(row.mean(-2, keepdim=True), min=least)
    return estimate, {"row": row.to(v["row"].dtype), "col": col.to(v["col"].dtype)}


def _rms(leaf: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(leaf)
    return norm / math.sqrt(leaf.numel())


def _at_least(value: Tensor, least: Scalar) -> Tensor:
    floor = least if isinstance(least, Tensor) else value.new_tensor(least)
    return torch.maximum(value, floor)
