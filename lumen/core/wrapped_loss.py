"""A loss function with what a transform does around each call of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LossFn = Callable[..., Any]


class WrappedLoss:
    """`run`, which calls `loss_fn`; `again(other)` is the same transform around another function.

    An object and no function with attributes: `functools.wraps` would copy these to a wrapper that does more.
    """

    def __init__(self, loss_fn: LossFn, run: LossFn, again: Callable[[LossFn], LossFn]) -> None:
        self.__wrapped__ = loss_fn
        self.__qualname__ = getattr(loss_fn, "__qualname__", "loss")
        self._run = run
        self._again = again

    def __call__(self, *args: Any) -> Any:
        """What `run` returns."""
        return self._run(*args)

    def around(self, other: LossFn) -> LossFn:
        """`other` with everything around it that is around the user's loss function."""
        return self._again(rewrapped(self.__wrapped__, other))


def rewrapped(loss_fn: LossFn, other: LossFn) -> LossFn:
    """`other` in the place of the function at the core of `loss_fn`."""
    return loss_fn.around(other) if isinstance(loss_fn, WrappedLoss) else other


def unwrapped(loss_fn: LossFn) -> LossFn:
    """The function at the core of `loss_fn`, as far as it can be replaced."""
    while isinstance(loss_fn, WrappedLoss):
        loss_fn = loss_fn.__wrapped__
    return loss_fn


def user_loss(loss_fn: Any) -> Any:
    """The user's own loss function, inside of wrappers of any kind: by its code losses are told apart."""
    while hasattr(loss_fn, "__wrapped__"):
        loss_fn = loss_fn.__wrapped__
    return loss_fn
