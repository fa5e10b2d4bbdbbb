"""What of torch has no public way: each function says for which versions of torch it holds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_PACKAGES = ("torch.distributed.", "deepspeed.comm.")


def release_groups(mesh: DeviceMesh) -> None:
    """Have a mesh hold its process groups no longer; its sizes and names stay.

    torch 2.11 to 2.13: `_pg_registry` of the mesh that others were cut from holds the groups of all of them, for
    `torch.compile` to look them up. Elsewhere a mesh keeps their names.
    """
    getattr(mesh, "_pg_registry", {}).clear()


def release_default_groups() -> None:
    """Make None of process groups that are default arguments; it means the group of the world at the time of the call.

    torch 2.11 to 2.13: `torch.distributed.nn.functional`, `ZeroRedundancyOptimizer` and others write
    `group=dist.group.WORLD`, and so keep the world for good in which they were imported; DeepSpeed 0.19.8 does, too.
    """
    for name, module in [*sys.modules.items()]:
        if f"{name}.".startswith(_PACKAGES):
            for function in _functions(vars(module)):
                _release_defaults(function)


def _functions(names: Any) -> Iterator[FunctionType]:
    for value in [*names.values()]:
        kind = type(value)  # not isinstance, of which some objects there warn
        if issubclass(kind, type):
            yield from (inspect.unwrap(each) for each in vars(value).values() if type(each) is FunctionType)
        elif kind is FunctionType:
            yield inspect.unwrap(value)


def _release_defaults(function: FunctionType) -> None:
    defaults: tuple[Any, ...] = getattr(function, "__defaults__", None) or ()
    named: dict[str, Any] = getattr(function, "__kwdefaults__", None) or {}
    if any(map(_is_group, defaults)):
        function.__defaults__ = tuple(None if _is_group(each) else each for each in defaults)
    for key in [key for key, each in named.items() if _is_group(each)]:
        named[key] = None


def _is_group(value: Any) -> bool:
    return issubclass(type(value), dist.ProcessGroup)
