"""Values that a torch optimizer keeps for a param, as leaves of a state.

Tensors and numbers are leaves as they are. Containers of them, and tensors that wrap others, such as the quantized
moments of torchao's optimizers, are kept as the tensors that they are made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static

_CONSTANTS = (str, bytes, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """What makes a tensor of a wrapper subclass from its inner tensors: what its class has for `torch.compile` too."""

    kind: type
    names: tuple[str, ...]
    context: Any = dataclasses.field(hash=False)
    size: torch.Size
    stride: tuple[int, ...]
    inner: tuple[Any, ...]


@pytree_dataclass
class StoredValue:
    """A container, or a tensor that wraps others, as its tensors.

    `spec` is the structure of the container. `entries` says of each leaf of it how it is made: "tensor", "number", a
    `Wrapper`, or a tuple with a constant.
    """

    tensors: tuple[Tensor, ...]
    spec: tree.Spec = static()
    entries: tuple[Any, ...] = static()


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def is_value(value: Any) -> bool:
    return isinstance(value, Tensor) or is_number(value)


def as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def can_store(value: Any) -> bool:
    """Whether `value` is made of tensors, numbers and constants alone."""
    return all(is_value(leaf) or isinstance(leaf, _CONSTANTS) for leaf in tree.leaves(value))


def store(value: Any) -> Any:
    """`value` as a tensor, or as a `StoredValue`.

    >>> store(3), store({"sums": [torch.ones(2)], "mode": "max"}).tensors
    (tensor(3), (tensor([1., 1.]),))
    """
    if is_number(value) or (isinstance(value, Tensor) and not _wraps(value)):
        return as_tensor(value)
    leaves, spec = tree.flatten(value)
    tensors: list[Tensor] = []
    entries = tuple(_take(leaf, tensors) for leaf in leaves)
    return StoredValue(tuple(tensors), spec, entries)


def restore(stored: Any) -> Any:
    """The inverse of `store`; numbers that are not in a container stay tensors.

    >>> restore(store({"sums": [2.0, None], "mode": "max"}))
    {'sums': [2.0, None], 'mode': 'max'}
    """
    if not isinstance(stored, StoredValue):
        return stored
    tensors = iter(stored.tensors)
    return tree.unflatten(stored.spec, [_give(entry, tensors) for entry in stored.entries])


def layout(value: Any) -> Any:
    """What must stay the same from step to step for a state to have one structure."""
    if not can_store(value):
        return type(value)
    stored = store(value)
    return (stored.spec, stored.entries) if isinstance(stored, StoredValue) else "value"


def _wraps(value: Tensor) -> bool:
    return type(value) is not Tensor and hasattr(value, "__tensor_flatten__")


def _take(leaf: Any, tensors: list[Tensor]) -> Any:
    """How `leaf` is made of tensors, which are added to `tensors`."""
    if isinstance(leaf, Tensor) and _wraps(leaf):
        wrapped: Any = leaf
        names, context = wrapped.__tensor_flatten__()
        inner = tuple(_take(getattr(leaf, name), tensors) for name in names)
        return Wrapper(type(leaf), tuple(names), context, leaf.size(), leaf.stride(), inner)
    if not is_value(leaf):
        return (leaf,)
    tensors.append(as_tensor(leaf))
    return "tensor" if isinstance(leaf, Tensor) else "number"


def _give(entry: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(entry, Wrapper):
        inner = {name: _give(nested, tensors) for name, nested in zip(entry.names, entry.inner, strict=True)}
        kind: Any = entry.kind
        return kind.__tensor_unflatten__(inner, entry.context, entry.size, entry.stride)
    if isinstance(entry, tuple):
        return entry[0]
    value = next(tensors)
    return value if entry == "tensor" else value.item()
