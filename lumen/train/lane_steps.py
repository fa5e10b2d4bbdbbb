"""`LaneSteps`: a step of many lanes, as steps of fewer lanes and of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core.step import Step, StepFn, as_step, compose
from lumen.errors import StepError
from lumen.transforms._ensemble import ensemble, stack_states, sweep


class LaneSteps:
    """The steps that `step`, which has an `lm.sweep` or `lm.ensemble`, becomes with other numbers of lanes.

    `alone` is the step of one run, with the same other transforms.
    """

    def __init__(self, step: StepFn) -> None:
        step = as_step(step)
        index = next((i for i, transform in enumerate(step.transforms) if isinstance(transform, ensemble)), None)
        if index is None:
            raise StepError(
                f"{step!r} has no lanes to search over. Put the values to try into an lm.sweep:"
                " lm.successive_halving(lm.sweep(lr=[1e-3, 1e-2, 1e-1])(step), state, data, …)"
            )
        self.transforms = step.transforms
        self.lanes: ensemble = step.transforms[index]  # type: ignore[assignment]
        self.alone = compose(*step.transforms[:index], *step.transforms[index + 1 :])(step.user)
        self._outside, self._inside = step.transforms[:index], step.transforms[index + 1 :]
        self._steps: dict[int, Step] = {}

    def of(self, count: int) -> Step:
        """The step of `count` lanes, the same each time, so that it is compiled once."""
        if count not in self._steps:
            lanes = ensemble(count, axis=self.lanes.axis)
            self._steps[count] = compose(*self._outside, lanes, *self._inside)(self.alone.user)
        return self._steps[count]

    def values(self, index: int) -> dict[str, Any]:
        """The values that a lane of the `lm.sweep` gets, by name; none for an `lm.ensemble`."""
        swept = self.lanes.values if isinstance(self.lanes, sweep) else {}
        return {name: values[index] for name, values in swept.items()}

    def start(self, state: Any, index: int) -> Any:
        """The state with which a lane begins, with the slots of the transforms inside."""
        return self.alone.init(self.lanes.start_lane(state, index))


def join_lanes(states: Sequence[Any], device: Any) -> Any:
    """The states of several lanes as one state on a device, in memory of its own."""
    return stack_states([tree.map(lambda leaf: leaf.to(device), state) for state in states])


def copy_lane(state: Any, index: int, device: Any) -> Any:
    """The state of one lane on a device, in memory of its own: a view would keep that of all lanes."""

    def copy(leaf: Tensor) -> Tensor:
        return leaf[index].to(device, copy=True)

    return tree.map(copy, state)
