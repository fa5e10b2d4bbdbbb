"""Callbacks: a few points at which user code can observe a run, or stop it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lumen.errors import InexactWarning
from lumen.train.clock import Clock


def _ignore(*_args: Any) -> None:
    """The default of `stop` and `log`, for a context that is created by hand."""


@dataclass(frozen=True)
class CallbackContext:
    """The argument of a callback: the run's `clock`, its current `state`, `metrics` and `batch`, and two functions.

    In `on_step` the `metrics` are those that the step returned, on the device; in `on_log` the numbers just published;
    elsewhere the newest number of each name. `stop(reason)` ends the run after this step, `log({"name": value})` sends
    values to the sinks. `per_epoch` has the names of the `lm.PerEpoch` metrics logged so far. A callback only reads: to
    change training, write a transform. With `lm.donate()` the state is valid until the next step.
    """

    clock: Clock
    state: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)
    batch: Any = None
    stop: Callable[[str], None] = _ignore
    log: Callable[[Mapping[str, Any]], None] = _ignore
    per_epoch: Collection[str] = ()


class Callback:
    """Base class of callbacks. Override the methods that you need; the others cost nothing.

    A callback with state returns it as plain data from `state_dict`. Checkpoints save it, and a resumed run passes it
    to `load_state_dict`.

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
        """After each checkpoint; a thread may still be writing it to disk."""

    def on_exception(self, view: CallbackContext, error: BaseException) -> None:
        """When the run is about to end with `error`; after a signal that is an `lm.Interrupted`."""

    def on_end(self, view: CallbackContext) -> None:
        """After the last step of a run that ended without an exception."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


POINTS = ("on_start", "on_step", "on_log", "on_validate", "on_checkpoint", "on_exception", "on_end")


def _warn_unknown(callbacks: Sequence[Callback]) -> None:
    """Warn of methods that are named like a point of a run, and are never called."""
    for kind in {type(callback) for callback in callbacks}:
        unknown = [name for name in dir(kind) if name.startswith("on_") and name not in POINTS]
        if unknown:
            warnings.warn(
                f"{kind.__name__}.{unknown[0]} is never called: the methods of an lm.Callback that a run calls are"
                f" {', '.join(POINTS)}. After an epoch: Validate(every=lm.Every(epochs=1)) and on_validate.",
                InexactWarning,
                stacklevel=4,
            )


class Callbacks:
    """The callbacks of a run, listed for each point that they override."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)
        _warn_unknown(self._all)
        self._at = {point: [getattr(c, point) for c in callbacks if _overrides(c, point)] for point in POINTS}

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._all)

    def listens(self, point: str) -> bool:
        """Whether any callback overrides `point`."""
        return bool(self._at[point])

    def may_publish(self) -> bool:
        """Whether any callback is the user's own: those of Lumen publish no numbers."""
        return any(not type(callback).__module__.startswith("lumen.") for callback in self._all)

    def call(self, point: str, view: CallbackContext, *args: Any) -> None:
        """Call all callbacks at `point`, in their order."""
        for fn in self._at[point]:
            fn(view, *args)

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each callback with its class, in their order."""
        return [{"kind": type(c).__name__, "state": _state_of(c)} for c in self._all]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Pass each callback the state of the same class, in their order.

        A callback that is new to the run starts without one; a state without a callback is an `InexactWarning`.
        """
        for entry, callback in match_by_class(saved, self._all):
            if not entry["state"]:
                continue
            if callback is not None:
                callback.load_state_dict(entry["state"])
            else:
                warnings.warn(
                    f"the checkpoint holds the state of a callback {entry['kind']}, which this run does not have.",
                    InexactWarning,
                    stacklevel=2,
                )


def match_by_class(saved: Sequence[Mapping[str, Any]], present: Sequence[Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """Each saved entry with the present object of the class that its `kind` names, or None.

    Objects of one class are matched in their order, since objects of other classes may have been added or removed.
    """
    unmatched = list(present)
    pairs = []
    for entry in saved:
        index = next((i for i, candidate in enumerate(unmatched) if type(candidate).__name__ == entry["kind"]), None)
        pairs.append((entry, None if index is None else unmatched.pop(index)))
    return pairs


def _state_of(callback: Any) -> dict[str, Any]:
    return callback.state_dict() if hasattr(callback, "state_dict") else {}


def _overrides(callback: Any, point: str) -> bool:
    method = getattr(type(callback), point, None)
    return method is not None and method is not getattr(Callback, point)
