"""Reports validation metrics to the optimizer's `lm.optim.reduce_on_plateau`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lumen import tree
from lumen.errors import StepError, printable
from lumen.optim import plateau_step
from lumen.optim._plateau import PlateauState


def update_plateau(state: Any, monitor: str, values: Mapping[str, float]) -> Any:
    """The state after `reduce_on_plateau(monitor=…)` got its metric; in an ensemble each lane gets its own."""
    lanes = [key for key in values if key.startswith(f"{monitor}/")]
    metric = (
        values[monitor] if monitor in values else torch.tensor([values[f"{monitor}/{i}"] for i in range(len(lanes))])
    )
    return state.replace(opt_state=plateau_step(state.opt_state, metric, monitor=monitor))


def plateau_monitors(state: Any, validations: Sequence[str]) -> list[str]:
    """The metrics that `reduce_on_plateau` monitors; raises `StepError` for one that no validation could return."""
    nodes = tree.leaves(getattr(state, "opt_state", ()), is_leaf=_is_plateau)
    monitors = dict.fromkeys(node.rule.monitor for node in nodes if _is_plateau(node))
    for monitor in monitors:
        if monitor is None:
            raise StepError(
                "the optimizer's reduce_on_plateau does not say which metric it monitors. Write"
                ' lm.optim.reduce_on_plateau(monitor="val/loss"), with a validation that returns this metric.'
            )
        if not any(monitor.startswith(f"{name}/") for name in validations):
            raise StepError(
                f"reduce_on_plateau(monitor={monitor!r}) needs the metric of a validation, and the validations of this"
                f" run are named {', '.join(map(printable, validations)) or 'nothing, as there are none'}."
                " Write fit(…, validate=lm.Validate(…, name='val'))."
            )
    return list(monitors)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)
