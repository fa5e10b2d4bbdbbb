"""`with_learning_rate`: another learning rate in the state of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.errors import HyperparameterError


def with_learning_rate(state: Any, lr: float | Tensor) -> Any:
    """An optimizer's state, or a whole training state, with `lr` as its learning rate.

    Several learning rates (of a `partition`, or of two optimizers in one state) are all set. The given state stays as
    it is. A `reduce_on_plateau` in the chain still scales updates down.

    Raises:
        HyperparameterError: the learning rate is a schedule, a function of the step that a state does not hold, or
            there is none.

    >>> import torch, lumen as lm
    >>> opt_state = lm.optim.adamw(1e-3).init({"w": torch.ones(2)})
    >>> lm.optim.learning_rate(lm.optim.with_learning_rate(opt_state, 0.5)).item()
    0.5
    """
    leaves, spec = tree.flatten(state)
    paths = tree.paths(state)
    scheduled = next((path for path in paths if _is(path, "scheduled_lr")), None)
    if scheduled is not None:
        raise HyperparameterError(
            f"the learning rate is a schedule ({scheduled} only records it), so it cannot be set in the state. Build"
            " the optimizer with a constant one: lm.optim.adamw(1e-3)."
        )
    places = [i for i, path in enumerate(paths) if _is(path, "lr")]
    if not places:
        raise HyperparameterError(
            "there is no learning rate in this state. Give the optimizer one: lm.optim.adamw(1e-3), or"
            " lm.optim.chain(..., lm.optim.scale_by_learning_rate(1e-3))."
        )
    for i in places:
        old = leaves[i]
        # Memory of its own: a donated step updates its state in place, and refuses two leaves that share it.
        leaves[i] = torch.as_tensor(lr, dtype=old.dtype, device=old.device).expand(old.shape).clone()
    return tree.unflatten(spec, leaves)


def _is(path: str, name: str) -> bool:
    return path == f"hparams[{name}]" or path.endswith(f".hparams[{name}]")
