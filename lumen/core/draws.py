"""Random draws from torch's generators in a step that is recorded: detected, saved, and replayed in a second pass.

Setting a generator back does nothing for a graph, in which each draw is an operation of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.errors import OrderError


def is_draw(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operation may draw from a generator; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    index, default = _dropout_argument(func)
    rate = args[index] if -1 < index < len(args) else kwargs.get("dropout_p", default)
    return rate != 0.0  # type: ignore[no-any-return]


@functools.cache
def _dropout_argument(func: Any) -> tuple[int, Any]:
    """The position and the default of an operation's dropout rate; -1 if it has none."""
    for index, argument in enumerate(_torch_compat.schema_of(func).arguments):
        if argument.name == "dropout_p":
            return index, argument.default_value
    return -1, None


def _copied(drawn: Any) -> Any:
    return _torch_compat.torch_pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, drawn)


class refusing_draws(_torch_compat.TorchDispatchMode):  # noqa: N801
    """`with refusing_draws(message):` raises `OrderError` for an operation that draws from torch's generators.

    >>> with refusing_draws("No noise here."):
    ...     torch.rand(2)
    Traceback (most recent call last):
        ...
    lumen.errors.OrderError: No noise here.
    """

    def __init__(self, message: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._message = message

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let everything else through."""
        if is_draw(func, args, kwargs or {}):
            raise OrderError(self._message)
        return func(*args, **(kwargs or {}))


class keeping_draws(_torch_compat.TorchDispatchMode):  # noqa: N801
    """`with keeping_draws(draws):` appends copies of all random draws to the list `draws`.

    >>> draws = []
    >>> with keeping_draws(draws):
    ...     first = torch.rand(2)
    >>> with repeating_draws(draws):
    ...     second = torch.rand(2)
    >>> torch.equal(first, second)
    True
    """

    def __init__(self, draws: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Save the result of a draw."""
        out = func(*args, **(kwargs or {}))
        if is_draw(func, args, kwargs or {}):
            self._draws.append(_copied(out))
        return out


class repeating_draws(_torch_compat.TorchDispatchMode):  # noqa: N801
    """`with repeating_draws(draws):` replays what `keeping_draws` saved, in order."""

    def __init__(self, draws: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = iter(draws)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the saved draw."""
        if not is_draw(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        drawn = next(self._draws)
        if _torch_compat.schema_of(func).is_mutable:
            return args[0].copy_(drawn)
        return _copied(drawn)
