"""The states of a torchmetrics metric outside the metric: how an update begins from them, and how they merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumen.core.collectives import pmax, pmean, pmin, psum
from lumen.errors import AxisError
from lumen.metrics.template import StateSpec

_FOLD_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
_FOLD_MANY: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
}


def initial_state(spec: StateSpec, content: Any, device: torch.device, lane_zero: Tensor | None) -> Any:
    """The initial state of an update: a copy, because metrics add in place, that varies over lanes like `lane_zero`."""
    if spec.join == "list":
        return list(content or ())
    if not spec.folds:
        content = content[0] if content else None
    start = _default_tensor(spec, device) if content is None else content.to(device, copy=True)
    return start if lane_zero is None else start + lane_zero.to(start)


def _default_tensor(spec: StateSpec, device: torch.device) -> Tensor:
    assert spec.default is not None
    return spec.default.detach().to(device, copy=True)


def stored_state(spec: StateSpec, state: Any) -> Any:
    """The state after an update as a value contains it: a tensor, or a tuple of collected ones."""
    if spec.join == "list":
        return tuple(state) if isinstance(state, list) else (state,)
    return state if spec.folds else (state,)


def merge_states(spec: StateSpec, contents: list[Any]) -> Any:
    """Merge the states of several values."""
    if spec.folds:
        return fold(spec.join, contents)
    return tuple([tensor for content in contents for tensor in content])


def fold(join: str, tensors: list[Tensor]) -> Tensor:
    """Reduce tensors to one by "sum", "max" or "min"."""
    if len(tensors) == 2:
        return _FOLD_TWO[join](*tensors)
    return _FOLD_MANY[join](torch.stack(tensors))


def compute_input(spec: StateSpec, content: Any, device: torch.device) -> Any:
    """The state that the metric's own `compute` reads: a list, or one tensor that it may change."""
    if spec.join == "list":
        return list(content)
    return content.clone() if spec.folds else spec.reduce_collected(content, device)


def psum_state(spec: StateSpec, content: Any, axis: str, metric: object) -> Any:
    """Reduce a state over all members of `axis`; raises `AxisError` for one that would need a gather."""
    if spec.join == "sum":
        return psum(content, axis)
    if spec.join == "max":
        return pmax(content, axis)
    if spec.join == "min":
        return pmin(content, axis)
    if spec.join == "mean":
        return (pmean(spec.reduce_collected(content, content[0].device), axis),) if content else ()
    # Support for a gather over the axis would go here.
    raise AxisError(
        f"the state {spec.key!r} of {metric!r} is not a sum, mean, maximum or minimum, so it cannot be reduced over the"
        f" axis {axis!r} without a gather. Return the value from the step unreduced, to be merged outside, or use a"
        " metric with states of fixed size, such as thresholds=100."
    )
