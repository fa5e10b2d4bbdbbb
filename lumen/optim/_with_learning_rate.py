"""`with_learning_rate`: set the learning rate in the state of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.errors import HyperparameterError


@checked
def with_learning_rate(state: Any, lr: float | Tensor) -> Any:
    """An optimizer's state, or a training state, with `lr` as its learning rate.

    If there are several learning rates (of a `partition`, or of two optimizers in one state), all are set. The old
    state does not change. A `reduce_on_plateau` in the chain still scales updates down.

    Raises:
        HyperparameterError: the learning rate is a schedule, which is not part of the state, or there is none.

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
    indices = [i for i, path in enumerate(paths) if _is(path, "lr")]
    if not indices:
        raise HyperparameterError(
            "there is no learning rate in this state. Pass one to the optimizer: lm.optim.adamw(1e-3), or"
            " lm.optim.chain(..., lm.optim.scale_by_learning_rate(1e-3))."
        )
    for i in indices:
        old = leaves[i]
        # A copy, because a donated step updates its state in place and rejects two leaves that share memory.
        leaves[i] = torch.as_tensor(lr, dtype=old.dtype, device=old.device).expand(old.shape).clone()
    return tree.unflatten(spec, leaves)


def _is(path: str, name: str) -> bool:
    return path == f"hparams[{name}]" or path.endswith(f".hparams[{name}]")
