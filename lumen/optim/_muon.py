"""Muon: momentum matrices, each replaced by the nearest orthogonal matrix."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._base import GradientTransformation
from lumen.optim._full_tensors import map_full_tensors
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._numerics import Coefficients, Scalar, widened, zeros_like
from lumen.optim._param_names import dotted_names

Adjustment = Literal["original", "match_rms_adamw"]


@pytree_dataclass
class MuonState:
    """Muon's state: `mu` is the momentum."""

    count: Tensor
    mu: Any
    hparams: HParams


@checked
def muon(
    lr: ScalarOrSchedule,
    momentum: Scalar = 0.95,
    weight_decay: Scalar = 0.1,
    *,
    nesterov: bool = True,
    adjust_lr: Adjustment = "original",
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> GradientTransformation:
    """Muon (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks"), as in torch.

    `m <- μ m + (1 − μ) g`; `u = m`, or `(1 − μ) g + μ m` with `nesterov`; `p <- p − lr · weight_decay · p −
    lr · c · O`, where `O` is `u` with its singular values brought near 1 by a Newton–Schulz iteration, and
    `c` depends on the shape of `p`: `√max(1, rows/cols)` ("original") or `0.2 · √max(rows, cols)`
    ("match_rms_adamw", Moonshot).

    It is for the matrices of hidden layers only. Use another rule for embeddings, output layers, norms and
    biases: `partition({"*layers*.weight": muon(0.02)}, default=adamw(3e-4))`.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        momentum: the decay rate of the momentum, in [0, 1).
        weight_decay: decay by `lr · weight_decay` at each step.
        nesterov: look ahead along the momentum.
        adjust_lr: how `c` depends on the shape.
        coefficients: of the Newton–Schulz polynomial.
        steps: the number of Newton–Schulz iterations.
        eps: the lower bound of the norm that `u` is divided by.
        dtype: the dtype of the iteration.

    Raises:
        HyperparameterError: a value outside its range.
        ParamsError: at init, a leaf that is not a matrix.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.muon(0.02)
    >>> params = {"w": torch.ones(4, 3)}
    >>> params, opt_state = tx.apply({"w": torch.ones(4, 3)}, tx.init(params), params)
    >>> params["w"].shape
    torch.Size([4, 3])
    """
    hyper = Hyper(lr, below_one=("momentum",), momentum=momentum, weight_decay=weight_decay)
    if adjust_lr not in ("original", "match_rms_adamw"):
        raise HyperparameterError(f"adjust_lr={adjust_lr!r} is not allowed: give 'original' or 'match_rms_adamw'.")

    def init(params: Any) -> MuonState:
        for name, leaf in zip(dotted_names(params), tree.leaves(params), strict=True):
            if leaf.dim() != 2:
                raise ParamsError(
                    f"muon is for matrices, and {name!r} has shape {tuple(leaf.shape)}. Apply it to matrices only:"
                    " lm.optim.partition({'*layers*.weight': lm.optim.muon(0.02)}, default=lm.optim.adamw(3e-4))"
                )
        count, hparams = hyper.init(params)
        return MuonState(count, zeros_like(params), hparams)

    def update(grads: Any, state: MuonState, params: Any) -> tuple[Any, MuonState]:
        momentum, decay = hyper.values(state.hparams)
        rate, hparams = hyper.lr(state.count, state.hparams)
        scalars = Coefficients(momentum, 1 - momentum, -rate, rate * decay)

        def leaf(p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            if not p.numel():
                return torch.zeros_like(widened(p)[0]), m
            g, wide_p, wide_m = widened(g, p, m)
            keep, new, minus_rate, shrink = scalars.like(g)
            wide_m = torch.lerp(wide_m, g, new)
            direction = torch.lerp(g, wide_m, keep) if nesterov else wide_m
            orthogonal = orthogonalize(direction, coefficients, steps, eps, dtype).to(g.dtype)
            adjusted = minus_rate * _adjustment(p.shape, adjust_lr)
            return adjusted * orthogonal - shrink * wide_p, wide_m.to(m.dtype)

        updates, mu = map_full_tensors(leaf, params, grads, state.mu)
        return updates, MuonState(state.count + 1, mu, hparams)

    return GradientTransformation(init, update, needs_full_tensors="muon orthogonalizes full matrices", can_gather=True)


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Approximately `U V^T` of a matrix `U S V^T`: the singular values end between 0.5 and 1.5.

    This is a quintic Newton–Schulz iteration with the steepest slope at zero, which needs few steps.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype).mT if tall else matrix.to(dtype)
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)  # the spectral norm is now at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _adjustment(shape: torch.Size, how: Adjustment) -> float:
    rows, cols = shape
    return math.sqrt(max(1.0, rows / cols)) if how == "original" else 0.2 * math.sqrt(max(rows, cols))
