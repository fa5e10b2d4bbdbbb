"""Annotations read at run time: whether a value may be of a type, and how the type is called in a message."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import operator
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

UNKNOWN: Any = object()  # the type of an annotation that only a type checker can read
# The packages in which a reader finds names, by what stands before a name there.
_NAMESPACES = (
    *("", "optim.", "random.", "tree.", "data.", "metrics.", "losses.", "sinks.", "checkpoint.", "parallel."),
    *("parallel.plans.", "bridges.", "bridges.huggingface.", "bridges.lora.", "planner.", "extend."),
)
_LISTS = (collections.abc.Sequence, collections.abc.Iterable, list, tuple)
_SEVERAL = (
    *(collections.abc.Sequence, collections.abc.Set, collections.abc.ValuesView, collections.abc.Iterator),
    *(np.ndarray, Tensor),
)


@functools.cache
def signature_of(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """The signature of a function, and the types of those parameters whose annotations can be read at run time."""
    function = inspect.unwrap(function)
    signature = inspect.signature(function)
    names = getattr(function, "__globals__", {})
    hints = {name: _resolved(parameter.annotation, names) for name, parameter in signature.parameters.items()}
    return signature, hints


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return UNKNOWN
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except (NameError, AttributeError):  # imported for type checkers alone, or from a package that is imported late
        return UNKNOWN


def choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself.

    >>> choices(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def allows(hint: Any, value: Any) -> bool:
    """Whether a value may be of this type; True where only a type checker could tell.

    Numbers of NumPy are numbers, floats without a fraction are whole numbers, and lists are tuples.

    >>> allows(int | None, 1e3), allows(int | None, 0.5), allows(tuple[float, float], [1, 2])
    (True, False, True)
    """
    return any(_allows(choice, value) for choice in choices(hint))


def _allows(hint: Any, value: Any) -> bool:
    if hint is UNKNOWN or hint is Any or isinstance(hint, TypeVar | typing.ForwardRef):
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint in _SIMPLE:
        return _SIMPLE[hint](value)
    if len(choices(hint)) > 1:
        return allows(hint, value)
    kind, type_args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return any(_allows(type(literal), value) for literal in type_args)
    return not inspect.isclass(kind) or _is_of_class(kind, type_args, value)


def _is_of_class(kind: Any, type_args: tuple[Any, ...], value: Any) -> bool:
    if kind is collections.abc.Callable:
        return callable(value)
    if kind is type and type_args and inspect.isclass(type_args[0]):
        return inspect.isclass(value) and issubclass(value, type_args[0])
    if kind in _LISTS:
        return _is_several(kind, type_args, value)
    if getattr(kind, "_is_protocol", False):
        return not inspect.isclass(value) and all(hasattr(value, name) for name in vars(kind) if name[0] != "_")
    return isinstance(value, kind)


def _is_several(kind: Any, type_args: tuple[Any, ...], value: Any) -> bool:
    if isinstance(value, str | bytes) or inspect.isclass(value):
        return False
    if kind is collections.abc.Iterable:
        return hasattr(value, "__iter__") or (hasattr(value, "__getitem__") and not isinstance(value, nn.Module))
    if not isinstance(value, list | tuple):
        return isinstance(value, _SEVERAL)
    if kind is tuple and type_args and type_args[-1] is not ...:
        return len(value) == len(type_args) and all(map(allows, type_args, value))
    return not type_args or all(allows(type_args[0], item) for item in value)


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    return isinstance(value, int | np.integer | torch.SymInt) or (isinstance(value, float) and value.is_integer())


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool | np.bool_) and isinstance(value, int | float | np.number | torch.SymFloat)


def integer_of(value: Any, low: int | None = None) -> int | None:
    """`value` as an int if it is a whole number of Python or NumPy, from `low` if that is given, else None.

    >>> import numpy as np
    >>> integer_of(np.int64(2)), integer_of(2.0), integer_of(True), integer_of(2, low=3)
    (2, None, None, None)
    """
    if not isinstance(value, SupportsIndex) or isinstance(value, bool | np.ndarray | Tensor):
        return None
    number = operator.index(value)
    return None if low is not None and number < low else number


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    int: _is_integer,
    float: _is_number,
    bool: lambda value: isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)),
    torch.device: lambda value: isinstance(value, torch.device | int),
    os.PathLike[str]: lambda value: isinstance(value, os.PathLike),
    typing.TextIO: lambda value: hasattr(value, "write"),
}


def is_function(hint: Any) -> bool:
    """Whether functions are of this type."""
    return any(typing.get_origin(choice) is collections.abc.Callable for choice in choices(hint))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
    os.PathLike: "a path",
    typing.TextIO: "a file",
    collections.abc.Callable: "a function",
    nn.Module: "a module",
    Tensor: "a tensor",
    collections.abc.Mapping: "a dict",
    dict: "a dict",
    type: "a class",
    collections.abc.Iterable: "an iterable",
    collections.abc.Sequence: "a list",
    list: "a list",
    tuple: "a tuple",
}


def words(hint: Any) -> str:
    """A type as a message names it.

    >>> words(int | str | None), words(list[torch.nn.Module])
    ('a whole number, a text or None', 'a list, each entry a module')
    """
    several = list(dict.fromkeys(map(_words, choices(hint))))
    return f"{', '.join(several[:-1])} or {several[-1]}" if len(several) > 1 else several[0]


def _words(hint: Any) -> str:
    if len(choices(hint)) > 1:
        return words(hint)
    kind, type_args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return " or ".join(map(repr, type_args))
    if kind is type and type_args:
        return f"a class of {public_name(type_args[0])}"
    if kind in _WORDS:
        item = words(type_args[0]) if kind in _LISTS and type_args and type_args[0] is not Any else ""
        return f"{_WORDS[kind]}, each entry {item}" if item else _WORDS[kind]
    return f"an object of {public_name(kind)}" if inspect.isclass(kind) else str(kind)


def public_name(thing: Any) -> str:
    """The name by which a reader has a function or class.

    >>> import lumen as lm
    >>> public_name(lm.Every), public_name(lm.optim.adamw), public_name(lm.bridges.lora.adapt), public_name(torch.dtype)
    ('lm.Every', 'lm.optim.adamw', 'lm.bridges.lora.adapt', 'torch.dtype')
    """
    module, name = getattr(thing, "__module__", ""), str(getattr(thing, "__qualname__", thing))
    if module.startswith("lumen."):
        return f"lm.{_namespace(thing, name)}{name}"
    return f"torch.{name}" if module == "torch" else name


def _namespace(thing: Any, name: str) -> str:
    """Where below `lm` a reader finds a function or class of Lumen: "" or such as "optim."."""
    first = name.partition(".")[0]
    for namespace in _NAMESPACES:
        package: Any = sys.modules["lumen"]
        for inner in namespace.split(".")[:-1]:  # not imported yet, as long as nothing of it has been used
            package = vars(package).get(inner, package)
        if first in vars(package) and _owner(vars(package)[first]) == _owner(thing):
            return namespace
    return ""


def _owner(thing: Any) -> tuple[str, str]:
    """The module that defines a function, or the class of a method, and its name there."""
    return getattr(thing, "__module__", ""), str(getattr(thing, "__qualname__", "")).partition(".")[0]
