"""Whether two states that were made separately run the same program: modules, optimizers and functions alike."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.closures import cell_value
from lumen.core.module import Apply
from lumen.errors import StateError
from lumen.optim._hyperparams import Hyper

_APPLY = ("module", "frozen", "merges")  # the rest of an Apply follows from these
_SCALARS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def with_statics_of(first: Any, other: Any, where: str) -> Any:
    """`other` with the static fields of `first`, at any depth, if both are alike; else as it is, for its caller.

    Raises `StateError`, which names the difference, for static fields that compute something else. `where` says in the
    message whose states these are.
    """
    if type(first) is not type(other):
        return other
    if hasattr(type(first), "_dynamic_fields_"):
        changes = {}
        for field in dataclasses.fields(first):
            one, two = getattr(first, field.name), getattr(other, field.name)
            if field.name in type(first)._dynamic_fields_:
                changes[field.name] = with_statics_of(one, two, where)
            else:
                _check_alike(one, two, field.name, where)
                changes[field.name] = one
        return other.replace(**changes)
    if type(first) is dict and first.keys() == other.keys():
        return {key: with_statics_of(first[key], other[key], where) for key in other}
    if type(first) in (list, tuple) and len(first) == len(other):
        return type(first)(with_statics_of(a, b, where) for a, b in zip(first, other, strict=True))
    return other


def _check_alike(first: Any, other: Any, name: str, where: str) -> None:
    path = difference(first, other, name)
    if path is not None:
        raise StateError(
            f"the states of {where} differ in {path}. They run as one program, that of the first, so only what is in"
            " the leaves of a state may differ: params, buffers, seed and opt_state. Make a tensor in a module a"
            " buffer (register_buffer), and run what differs otherwise as runs of their own."
        )


def difference(first: Any, other: Any, path: str = "", seen: set[tuple[int, int]] | None = None) -> str | None:
    """The path at which two objects differ in what they compute, with both values; None if they do not.

    Modules are compared without the values of their params and buffers, which a state has, and hyperparameters without
    those that are in the optimizer's state.

    >>> import torch
    >>> difference(torch.nn.Dropout(0.1), torch.nn.Dropout(0.1)), difference(lambda x: x + 1, lambda x: x + 2, "fn")
    (None, 'fn (<lambda> and <lambda>)')
    >>> difference(torch.nn.Sequential(torch.nn.Dropout(0.1)), torch.nn.Sequential(torch.nn.Dropout(0.5)), "net")
    'net.0.p (0.1 and 0.5)'
    """
    seen = set() if seen is None else seen
    if first is other or (id(first), id(other)) in seen:
        return None
    seen.add((id(first), id(other)))
    if not _same_class(type(first), type(other)):
        return f"{path} ({type(first).__name__} and {type(other).__name__})"
    if isinstance(first, _SCALARS):
        return None if first == other or first != first else f"{path} ({first!r:.60} and {other!r:.60})"
    if isinstance(first, Tensor):
        return None if _same_tensor(first, other) else f"{path} (two tensors)"
    if isinstance(first, types.FunctionType) and first.__code__ != other.__code__:
        return f"{path} ({first.__qualname__.rpartition('.')[2]} and {other.__qualname__.rpartition('.')[2]})"
    contents = [_contents(value) for value in (first, other)]
    if contents[0] is None or contents[1] is None:
        return None if first == other else f"{path} ({first!r:.60} and {other!r:.60})"
    if contents[0].keys() != contents[1].keys():
        names = ", ".join(sorted(map(str, contents[0].keys() ^ contents[1].keys())))
        return f"{path} ({names} on one side only)"
    differences = (difference(contents[0][key], contents[1][key], _join(path, key), seen) for key in contents[0])
    return next((path for path in differences if path is not None), None)


def _contents(value: Any) -> Mapping[Any, Any] | None:
    """What an object consists of, by name; None for an object that is compared by `==`."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        defaults: dict[str, Any] = {"defaults": value.__defaults__, "kwdefaults": value.__kwdefaults__}
        return defaults | {name: cell_value(c) for name, c in zip(value.__code__.co_freevars, cells, strict=True)}
    if isinstance(value, types.MethodType):
        return {"": value.__self__, "__func__": value.__func__}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, Apply):
        return {name: getattr(value, name) for name in _APPLY}
    if isinstance(value, Hyper):  # the rest is in the optimizer's state
        return {**vars(value), "_stored": tuple(value._stored)}
    if isinstance(value, nn.Module):
        return _contents_of_module(value)
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType) or not hasattr(value, "__dict__"):
        return None
    contents: Mapping[Any, Any] = vars(value)
    return contents


def _contents_of_module(module: nn.Module) -> Mapping[Any, Any]:
    leaves = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    contents: dict[Any, Any] = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves}
    contents |= _torch_compat.own_modules(module)
    for name, value in vars(module).items():
        if name not in _torch_compat.MODULE_TABLES:  # hooks by counters
            contents[name] = list(value.values()) if isinstance(value, Mapping) and "hooks" in name else value
    return contents


def _same_class(first: type, other: type) -> bool:
    """Whether two types are one, or both made on the fly from the same bases, as parametrized modules are."""
    if first is other:
        return True
    return first.__qualname__ == other.__qualname__ and first.__bases__ == other.__bases__ != (object,)


def _same_tensor(first: Tensor, other: Tensor) -> bool:
    if (first.shape, first.dtype, first.device) != (other.shape, other.dtype, other.device):
        return False
    return first.is_meta or torch.equal(first, other)


def _join(path: str, key: Any) -> str:
    return ".".join(filter(None, (path, str(key))))


def alike_states(states: Iterable[Any]) -> list[Any]:
    """States of the same program, each with the static fields of the first, as one structure needs them."""
    first, *others = states
    return [first, *(with_statics_of(first, other, f"lanes 0 and {i}") for i, other in enumerate(others, 1))]
