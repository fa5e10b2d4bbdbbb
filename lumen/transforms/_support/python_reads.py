"""The Python values that a step reads from outside its arguments, which a compiled graph keeps as constants."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from typing import Any

from lumen.core.step import Transform

Reader = Callable[[], Any]

_LIBRARIES = ("torch", "lumen", "numpy", "optree")


def key_readers(transforms: tuple[Transform, ...]) -> list[Reader]:
    """Readers of `Transform.key`, for the transforms that define one."""
    return [_key_reader(t) for t in transforms if type(t).key is not Transform.key]


def _key_reader(transform: Transform) -> Reader:
    return lambda: transform.key


def value_readers(fn: Any) -> list[Reader]:
    """Readers of what a function takes from its closure and globals: scalars by value, other objects by identity.

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
            pending.append(_cell_value(cell))
        for name in _global_names(function.__code__):
            if name in function.__globals__:
                readers.append(_global_reader(function.__globals__, name))
                pending.append(function.__globals__[name])
    return readers


def _is_library(fn: types.FunctionType) -> bool:
    return (fn.__module__ or "").partition(".")[0] in _LIBRARIES


def _global_names(code: types.CodeType) -> set[str]:
    """The globals read by a function and by functions defined in it; `co_names` also lists names of attributes."""
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _cell_value(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _cell_reader(cell: types.CellType) -> Reader:
    return lambda: _comparable(_cell_value(cell))


def _global_reader(table: dict[str, Any], name: str) -> Reader:
    return lambda: _comparable(table.get(name))


def _comparable(value: Any) -> Any:
    return (type(value), value) if isinstance(value, bool | int | float | str) else id(value)
