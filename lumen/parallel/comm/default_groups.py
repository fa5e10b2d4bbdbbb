"""Process groups that functions of torch and DeepSpeed keep as default arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch.distributed as dist

_PACKAGES = ("torch.distributed.", "deepspeed.comm.")


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
            yield from (inspect.unwrap(member) for member in vars(value).values() if type(member) is FunctionType)
        elif kind is FunctionType:
            yield inspect.unwrap(value)


def _release_defaults(function: FunctionType) -> None:
    defaults: tuple[Any, ...] = getattr(function, "__defaults__", None) or ()
    named: dict[str, Any] = getattr(function, "__kwdefaults__", None) or {}
    if any(map(_is_group, defaults)):
        function.__defaults__ = tuple(None if _is_group(default) else default for default in defaults)
    for key in [key for key, default in named.items() if _is_group(default)]:
        named[key] = None


def _is_group(value: Any) -> bool:
    return issubclass(type(value), dist.ProcessGroup)
