"""Callbacks: few points at which a run can be watched, or asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lumen.train.clock import Clock


@dataclass(frozen=True)
class View:
    """What a callback sees: the run's `clock`, its current `state`, `metrics`, and a way to `stop` it.

    `metrics` are the step's own, on the device, in `on_step`; the merged numbers in `on_validate` and `on_end`. A view
    is for reading: what should change training is a transform. With `lm.donate()` the state is valid until the next
    step.
    """

    clock: Clock
    state: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)
    stop: Callable[[str], None] = print


class Callback:
    """Base of callbacks; override the points that matter, the others cost nothing.

    >>> import lumen as lm
    >>> class StopAt(lm.Callback):
    ...     def on_validate(self, view):
    ...         if view.metrics["val/accuracy"] > 0.99:
    ...             view.stop("accurate enough")
    """

    def on_start(self, view: View) -> None:
        """Before the first step."""

    def on_step(self, view: View) -> None:
        """After each step (after each k with `unroll(k)`)."""

    def on_validate(self, view: View) -> None:
        """After each validation."""

    def on_checkpoint(self, view: View) -> None:
        """After each checkpoint is complete."""

    def on_exception(self, view: View, error: BaseException) -> None:
        """When the run is about to end with `error`."""

    def on_end(self, view: View) -> None:
        """After the last step of a run that ended without an exception."""


POINTS = ("on_start", "on_step", "on_validate", "on_checkpoint", "on_exception", "on_end")


class Callbacks:
    """Several callbacks as one; a point that none overrides is an empty list."""

    def __init__(self, callbacks: tuple[Callback, ...]) -> None:
        self._at = {point: [getattr(c, point) for c in callbacks if _overrides(c, point)] for point in POINTS}

    def listens(self, point: str) -> bool:
        """Whether any callback has something to do at `point`."""
        return bool(self._at[point])

    def call(self, point: str, view: View, *args: Any) -> None:
        """Run all callbacks at `point`, in the order they were given."""
        for fn in self._at[point]:
            fn(view, *args)


def _overrides(callback: Any, point: str) -> bool:
    own = getattr(type(callback), point, None)
    return own is not None and own is not getattr(Callback, point)
