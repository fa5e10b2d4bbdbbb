"""The Python values that a step reads from outside its arguments, which a compiled graph keeps as constants."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from typing import Any

from lumen.core.closures import cell_value, codes_of
from lumen.core.step import Transform

_LIBRARIES = ("torch", "lumen", "numpy", "optree")
_CONTAINERS = (list, dict, set)
_LONGEST = 64  # of the containers that are compared by what is in them


class Reader:
    """What a step reads from outside: calling it gives something that differs when that has changed.

    `is_log` says that it is a container which the step itself changes while it is traced.
    """

    __slots__ = ("_read", "is_log")

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self.is_log = False

    def __call__(self) -> Any:
        """Scalars by value, containers by what is in them, other objects by identity."""
        value = self._read()
        return id(value) if self.is_log else _comparable(value)

    @property
    def is_container(self) -> bool:
        """Whether it is a list, a dict or a set."""
        return type(self._read()) in _CONTAINERS


def mark_logs(readers: list[Reader], before: tuple[Any, ...]) -> bool:
    """Compare containers by identity from now on if a trace has changed them since `before`; returns whether it has."""
    logs = [reader for reader, old in zip(readers, before, strict=True) if reader.is_container and reader() != old]
    for reader in logs:
        reader.is_log = True
    return bool(logs)


def key_readers(transforms: tuple[Transform, ...]) -> list[Reader]:
    """Readers of `Transform.key`, for the transforms that define one."""
    return [_key_reader(t) for t in transforms if type(t).key is not Transform.key]


def _key_reader(transform: Transform) -> Reader:
    return Reader(lambda: transform.key)


def value_readers(fn: Any) -> list[Reader]:
    """Readers of what a function takes from its closure and globals.

    Functions that it reads in this way are searched too, except those of libraries.
    """
    readers: list[Reader] = []
    visited: set[int] = set()
    pending = [fn]
    while pending:
        function = pending.pop()
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or id(function) in visited or _is_library(function):
            continue
        visited.add(id(function))
        for cell in function.__closure__ or ():
            readers.append(_cell_reader(cell))
            pending.append(cell_value(cell))
        for name in _global_names(function.__code__):
            if name in function.__globals__:
                readers.append(_global_reader(function.__globals__, name))
                pending.append(function.__globals__[name])
    return readers


def _is_library(fn: types.FunctionType) -> bool:
    return (fn.__module__ or "").partition(".")[0] in _LIBRARIES


def _global_names(code: types.CodeType) -> set[str]:
    """The globals read by a function and by functions defined in it; `co_names` also lists names of attributes."""
    return {
        instruction.argval
        for inner in codes_of(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _cell_reader(cell: types.CellType) -> Reader:
    return Reader(lambda: cell_value(cell))


def _global_reader(table: dict[str, Any], name: str) -> Reader:
    return Reader(lambda: table.get(name))


def _comparable(value: Any, depth: int = 2) -> Any:
    if isinstance(value, bool | int | float | str):
        return type(value), value
    if depth and type(value) in _CONTAINERS and len(value) <= _LONGEST:
        items = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
        inside = [(_comparable(key, 0), _comparable(item, depth - 1)) for key, item in items]
        return id(value), frozenset(map(id, value)) if type(value) is set else tuple(inside)
    return id(value)
