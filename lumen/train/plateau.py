"""Feeding a validation metric to `lm.optim.reduce_on_plateau`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lumen import tree
from lumen.errors import StepError, printable
from lumen.optim import plateau_step
from lumen.optim._plateau import PlateauState


def update_plateau(state: Any, name: str, values: Mapping[str, float]) -> Any:
    """The state after its optimizer was told the metric `name`; in an ensemble, that of each lane."""
    lanes = [key for key in values if key.startswith(f"{name}/")]
    metric = values[name] if name in values else torch.tensor([values[f"{name}/{i}"] for i in range(len(lanes))])
    return state.replace(opt_state=plateau_step(state.opt_state, metric))


def check_plateau(state: Any, name: str | None, validations: list[str]) -> None:
    """Raise `StepError` where an optimizer waits for a metric that it will never be told, or the other way round."""
    waits = any(isinstance(n, PlateauState) for n in tree.leaves(getattr(state, "opt_state", ()), is_leaf=_is_plateau))
    if waits and name is None:
        raise StepError(
            "the optimizer has reduce_on_plateau, and the Runner does not know which metric it watches. Write"
            ' lm.Runner(step, plateau="val/loss"), with a validation that gives it.'
        )
    if name is not None and not waits:
        raise StepError(
            f"plateau={name!r} has no reduce_on_plateau to feed. Build the optimizer as"
            " lm.optim.chain(lm.optim.adamw(1e-3), lm.optim.reduce_on_plateau())"
        )
    if name is not None and not any(name.startswith(f"{each}/") for each in validations):
        raise StepError(
            f"plateau={name!r} is no metric of a validation; those of this run are called"
            f" {', '.join(map(printable, validations)) or 'nothing, as there are none'}."
            " Write fit(…, validate=lm.Validate(…, name='val'))."
        )


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)
