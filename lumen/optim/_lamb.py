"""LAMB: Adam's direction, scaled for each leaf by the ratio of its norm to that of the update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen.core.arguments import checked
from lumen.optim._adam import scale_by_adam
from lumen.optim._base import GradientTransformation
from lumen.optim._combine import chain
from lumen.optim._full_tensors import map_full_tensors
from lumen.optim._hyperparams import ScalarOrSchedule
from lumen.optim._low_bit import StateDtype
from lumen.optim._numerics import Scalar, widened
from lumen.optim._param_names import Selector
from lumen.optim._scaling import add_decayed_weights, scale_by_learning_rate


def scale_by_trust_ratio() -> GradientTransformation:
    """Each leaf's update times `‖p‖ / ‖update‖`, or 1 if either norm is zero (You et al., 2017, LARS).

    >>> import torch, lumen as lm
    >>> tx = lm.optim.scale_by_trust_ratio()
    >>> tx.update({"w": torch.tensor([0.3, 0.4])}, (), {"w": torch.tensor([6.0, 8.0])})[0]["w"]
    tensor([6., 8.])
    """

    def leaf(p: Tensor, u: Tensor, _: None) -> tuple[Tensor, None]:
        wide, wide_p = widened(u, p)
        p_norm, u_norm = torch.linalg.vector_norm(wide_p), torch.linalg.vector_norm(wide)
        neither_zero = (p_norm > 0) & (u_norm > 0)
        ratio = torch.where(neither_zero, p_norm / torch.where(neither_zero, u_norm, 1.0), 1.0)
        return (wide * ratio.to(wide.dtype)).to(u.dtype), None

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return map_full_tensors(leaf, params, grads)[0], state

    reason = "scale_by_trust_ratio takes the norms of full tensors, also in lamb"
    return GradientTransformation(lambda _params: (), update, needs_full_tensors=reason, can_gather=True)


@checked
def lamb(
    lr: ScalarOrSchedule,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    decay_mask: Selector | None = None,
    eps_root: Scalar = 0.0,
    state_dtype: StateDtype = None,
) -> GradientTransformation:
    """LAMB (You et al., 2020, "Large Batch Optimization for Deep Learning"), as in optax.

    `r = m̂ / (√(v̂ + eps_root) + eps) + weight_decay · p`; `p <- p − lr · (‖p‖ / ‖r‖) · r` for each leaf.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the decay rates of the two moments, in [0, 1).
        eps: added to the root.
        weight_decay: the decay, added to the direction before its norm is computed.
        decay_mask: which leaves decay, as in `adamw`.
        eps_root: added under the root.
        state_dtype: how the moments are stored, as in `adamw`.

    Raises:
        HyperparameterError: a value outside its range.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.lamb(0.1)
    >>> params = {"w": torch.tensor([3.0, 4.0])}
    >>> params, opt_state = tx.apply({"w": torch.ones(2)}, tx.init(params), params)
    >>> params["w"]
    tensor([2.6464, 3.6464])
    """
    return chain(
        scale_by_adam(betas, eps, eps_root=eps_root, state_dtype=state_dtype),
        add_decayed_weights(weight_decay, decay_mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(lr),
    )
