"""Casts of a model's inputs and outputs, in any container of tensors."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform as Bijection

from lumen.core import _torch_compat
from lumen.errors import PatternError


def cast_all(values: Any, dtype: torch.dtype) -> Any:
    """`values` with every floating tensor in `dtype`, in any pytree, dataclass or distribution.

    >>> cast_all({"x": torch.ones(2), "n": torch.tensor(1)}, torch.bfloat16)["x"].dtype
    torch.bfloat16
    """
    return map_tensors(lambda x: cast(x, dtype), values)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in `dtype`; 8-bit floats are quantized values with a scale (`lm.quantize`), and stay."""
    return x.to(dtype) if x.is_floating_point() and x.itemsize > 1 else x


def cast_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype, keep: str | Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for `module` in `dtype`, except those whose names match a pattern in `keep`.

    Raises `PatternError` for a pattern that matches no argument.

    >>> cast_inputs(nn.Linear(1, 1), (torch.ones(1),), {}, torch.float16, "in*")
    ((tensor([1.]),), {})
    """
    if not keep:
        return map_tensors(lambda x: cast(x, dtype), (args, dict(kwargs)))  # type: ignore[no-any-return]
    patterns = _KeepPatterns([keep] if isinstance(keep, str) else list(keep), dtype)
    names = _positional(module, len(args))
    positional = tuple([patterns.cast(name, value) for name, value in zip(names, args, strict=True)])
    named = {name: patterns.cast(name, value) for name, value in kwargs.items()}
    patterns.check(type(module).__name__)
    return positional, named


def _positional(module: nn.Module, count: int) -> list[str]:
    """The names of the first `count` arguments of a module's forward; all of `*args` share one name."""
    names: list[str] = []
    variadic = "args"
    for name, parameter in list(inspect.signature(type(module).forward).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            variadic = name
        elif parameter.kind is not parameter.KEYWORD_ONLY and parameter.kind is not parameter.VAR_KEYWORD:
            names.append(name)
    return [*names, *[variadic] * count][:count]


class _KeepPatterns:
    """Casts arguments, except those whose names match a pattern."""

    def __init__(self, patterns: list[str], dtype: torch.dtype) -> None:
        self._unmatched, self._patterns, self._dtype = set(patterns), patterns, dtype
        self._names: list[str] = []

    def cast(self, name: str, value: Any) -> Any:
        self._names.append(name)
        matches = {pattern for pattern in self._patterns if fnmatch.fnmatchcase(name, pattern)}
        self._unmatched -= matches
        if matches:
            return value
        if isinstance(value, dict) and any(pattern.startswith(f"{name}.") for pattern in self._patterns):
            copied = copy.copy(value)
            copied.update({key: self.cast(f"{name}.{key}", item) for key, item in value.items()})
            return copied
        return cast_all(value, self._dtype)

    def check(self, module: str) -> None:
        if self._unmatched:
            raise PatternError(
                f"precision(keep=...): no argument of {module}'s forward matches {min(self._unmatched)!r}; it was"
                f" called with {', '.join(map(repr, self._names)) or 'none'}."
            )


def map_tensors(change: Callable[[Tensor], Tensor], values: Any) -> Any:
    """`values` with each tensor `x` replaced by `change(x)`; objects in which nothing changes are returned unchanged.

    It descends into torch's pytrees, dataclasses, `torch.distributions`, subclasses of dict, and named tuples. Objects
    are copied before they are changed.

    >>> from torch.distributions import Independent, Normal
    >>> policy = Independent(Normal(torch.zeros(2).half(), torch.ones(2).half()), 1)
    >>> map_tensors(Tensor.float, policy).base_dist.loc.dtype
    torch.float32
    """
    return _TensorMap(change)(values)


class _TensorMap:
    """One traversal, which maps each object once, so that shared objects stay shared."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        self._results: dict[int, tuple[Any, Any]] = {}  # by identity; the first keeps its identity from being reused

    def __call__(self, values: Any) -> Any:
        if isinstance(values, Tensor):
            return self._leaf(values)
        return _torch_compat.torch_pytree.tree_map(self._leaf, values)

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, Tensor) and not _holds_tensors(value):
            return value
        if id(value) not in self._results:
            self._results[id(value)] = (value, value)  # ends the recursion for an object that refers to itself
            self._results[id(value)] = (value, self._changed(value))
        return self._results[id(value)][1]

    def _changed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._change(value)
        if isinstance(value, tuple):
            changes = self._changes(value._asdict().items())  # type: ignore[attr-defined]
            return value._replace(**changes) if changes else value  # type: ignore[attr-defined]
        if isinstance(value, dict):
            changes = self._changes(value.items())
            copied = copy.copy(value) if changes else value
            copied.update(changes)
            return copied
        if dataclasses.is_dataclass(value):
            return self._with(value, [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)])
        return self._with(value, vars(value).items())

    def _with(self, value: Any, attributes: Iterable[tuple[str, Any]]) -> Any:
        changes = self._changes(attributes)
        if not changes:
            return value
        copied = copy.copy(value)
        for name, new in changes.items():
            object.__setattr__(copied, name, new)  # works for frozen dataclasses too
        return copied

    def _changes(self, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        new = [(key, old, self(old)) for key, old in items]
        return {key: result for key, old, result in new if result is not old and not _same_leaves(old, result)}


def _holds_tensors(value: Any) -> bool:
    """Whether to descend into an object that torch treats as a leaf."""
    if isinstance(value, Distribution | Bijection | dict):
        return True
    is_named_tuple = isinstance(value, tuple) and hasattr(value, "_replace")  # a subclass, such as PackedSequence
    return is_named_tuple or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _same_leaves(old: Any, new: Any) -> bool:
    """Whether a rebuilt container has exactly the same leaves."""
    if isinstance(old, Tensor) or type(old) is not type(new):
        return False
    before, after = _torch_compat.torch_pytree.tree_leaves(old), _torch_compat.torch_pytree.tree_leaves(new)
    return len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
