"""Callbacks: few points at which a run can be watched, or asked to stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lumen.errors import InexactWarning
from lumen.train.clock import Clock


def _ignore(*_args: Any) -> None:
    """What a view made by hand does where nobody listens."""


@dataclass(frozen=True)
class CallbackContext:
    """What a callback sees: the run's `clock`, its current `state`, `metrics` and `batch`, and what it may ask for.

    `metrics` are the step's own, on the device, in `on_step`; the numbers just published in `on_log`; the newest of
    all numbers elsewhere. `stop(reason)` ends the run after this step, `log({"name": value})` sends values to the
    sinks. A view is for reading: what should change training is a transform. With `lm.donate()` the state is valid
    until the next step.
    """

    clock: Clock
    state: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)
    batch: Any = None
    stop: Callable[[str], None] = _ignore
    log: Callable[[Mapping[str, Any]], None] = _ignore


class Callback:
    """Base of callbacks; override the points that matter, the others cost nothing.

    A callback with memory gives it as plain data in `state_dict`: it is kept in checkpoints, and handed to
    `load_state_dict` when a run goes on.

    >>> import lumen as lm
    >>> class StopAt(lm.Callback):
    ...     def on_validate(self, view):
    ...         if view.metrics["val/accuracy"] > 0.99:
    ...             view.stop("accurate enough")
    """

    def on_start(self, view: CallbackContext) -> None:
        """Before the first step."""

    def on_step(self, view: CallbackContext) -> None:
        """After each step (after each k with `unroll(k)`)."""

    def on_log(self, view: CallbackContext) -> None:
        """After numbers were published: those of training, or of a validation."""

    def on_validate(self, view: CallbackContext) -> None:
        """After each validation."""

    def on_checkpoint(self, view: CallbackContext) -> None:
        """After each checkpoint was taken; it may still be on its way to the disk."""

    def on_exception(self, view: CallbackContext, error: BaseException) -> None:
        """When the run is about to end with `error`, which is an `lm.Interrupted` where a signal asked it to."""

    def on_end(self, view: CallbackContext) -> None:
        """After the last step of a run that ended without an exception."""

    def state_dict(self) -> dict[str, Any]:
        """What it must remember when the run goes on from a checkpoint: numbers, strings, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""


POINTS = ("on_start", "on_step", "on_log", "on_validate", "on_checkpoint", "on_exception", "on_end")


class Callbacks:
    """Several callbacks as one; a point that none overrides is an empty list."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)
        self._at = {point: [getattr(c, point) for c in callbacks if _overrides(c, point)] for point in POINTS}

    def listens(self, point: str) -> bool:
        """Whether any callback has something to do at `point`."""
        return bool(self._at[point])

    def may_publish(self) -> bool:
        """Whether any is of the user's own: those of Lumen publish no numbers."""
        return any(not type(each).__module__.startswith("lumen.") for each in self._all)

    def call(self, point: str, view: CallbackContext, *args: Any) -> None:
        """Run all callbacks at `point`, in the order they were given."""
        for fn in self._at[point]:
            fn(view, *args)

    def state_dict(self) -> list[dict[str, Any]]:
        """The memory of each, with its class, in their order."""
        return [{"kind": type(c).__name__, "state": _memory(c)} for c in self._all]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Hand each its memory: that of the same class, in their order.

        One that is new to the run begins without; memory that nobody takes is lost, with an `InexactWarning`.
        """
        for each, found in by_class(saved, self._all):
            if not each["state"]:
                continue
            if found is not None:
                found.load_state_dict(each["state"])
            else:
                warnings.warn(
                    f"the checkpoint holds the memory of a callback {each['kind']}, which this run does not have.",
                    InexactWarning,
                    stacklevel=2,
                )


def by_class(saved: Sequence[Mapping[str, Any]], present: Sequence[Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """What was saved of each object, by its `kind`, with the object of that class now; None where there is none.

    Those of a class go by their order, as others may have come or gone.
    """
    waiting = list(present)
    pairs = []
    for each in saved:
        found = next((i for i, one in enumerate(waiting) if type(one).__name__ == each["kind"]), None)
        pairs.append((each, None if found is None else waiting.pop(found)))
    return pairs


def _memory(callback: Any) -> dict[str, Any]:
    return callback.state_dict() if hasattr(callback, "state_dict") else {}


def _overrides(callback: Any, point: str) -> bool:
    own = getattr(type(callback), point, None)
    return own is not None and own is not getattr(Callback, point)
