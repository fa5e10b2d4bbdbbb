"""Scalars and leaves: arithmetic shared by all update rules.

A rule computes in the dtype of its leaf, or in float32 for 16-bit leaves; only results are rounded. Averages over steps
(moments, momentum) of 16-bit params are stored in float32: in 16 bits, changes below 1/256 of an entry would be
rounded away at each step. Scalars (learning rates, bias corrections) are 0-d float64 tensors until they are combined
with a leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.dtypes import NARROW, wide_dtype

Scalar = float | Tensor

NO_FLOAT64 = {"mps"}  # device types


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def time(count: Tensor) -> Tensor:
    """A count as a floating scalar: an integer tensor times a Python float gives float32."""
    return count.to(scalar_dtype(count.device))


def widen(leaf: Tensor) -> Tensor:
    """`leaf` in at least float32."""
    return leaf.to(wide_dtype(leaf.dtype))


def is_narrow(params: Any) -> bool:
    """Whether any leaf has a 16-bit dtype."""
    return any(leaf.dtype in NARROW for leaf in tree.leaves(params))


def widened(*leaves: Tensor | None) -> Any:
    """The leaves in the dtype of their update: their common dtype, and at least float32."""
    dtype = torch.float32
    for leaf in leaves:
        if leaf is not None:
            dtype = torch.promote_types(dtype, leaf.dtype)
    return [None if leaf is None else leaf.to(dtype) for leaf in leaves]


class Coefficients:
    """Scalars of one update, cast once for each dtype and device."""

    def __init__(self, *scalars: Scalar) -> None:
        self._scalars = scalars
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Scalar, ...]] = {}

    def like(self, leaf: Tensor) -> tuple[Scalar, ...]:
        """The scalars in the dtype and on the device of `leaf`; otherwise a 0-d leaf would be promoted."""
        key = (leaf.dtype, leaf.device)
        if key not in self._cast:
            cast = [s.to(device=leaf.device, dtype=leaf.dtype) if isinstance(s, Tensor) else s for s in self._scalars]
            self._cast[key] = tuple(_in_one_buffer(cast) if rules.is_tracing() else cast)
        return self._cast[key]


def _in_one_buffer(scalars: list[Scalar]) -> list[Scalar]:
    """The same scalars, with the tensors among them stacked in one buffer.

    Otherwise Inductor fuses their computation into the loop over each leaf: the exponentials of a bias correction,
    repeated every few elements, took two thirds of a compiled Adam update.
    """
    indices = [i for i, scalar in enumerate(scalars) if isinstance(scalar, Tensor)]
    if len(indices) < 2:
        return scalars
    result = list(scalars)
    for i, scalar in zip(indices, torch.stack([scalars[i] for i in indices]).unbind(), strict=True):  # type: ignore[misc]
        result[i] = scalar
    return result


def one_minus_power(base: Scalar, count: Tensor) -> Tensor:
    """`1 - base**count` as `-expm1(count * log(base))`, which is accurate for `base` close to 1."""
    t = time(count)
    if isinstance(base, Tensor):
        return -torch.expm1(t * torch.log(base))
    return -torch.expm1(t * (math.log(base) if base > 0 else -math.inf))


def zeros_like(params: Any, dtype: torch.dtype | None = None) -> Any:
    """Zeros with the shapes of `params`, in `dtype`, or by default in the params' dtypes and at least float32."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype or wide_dtype(p.dtype)), params)


def as_tree(values: Any, params: Any) -> Any:
    """A list with one value per leaf, or one value for all, in the structure of `params`."""
    spec = tree.structure(params)
    return tree.unflatten(spec, values if isinstance(values, list) else [values] * spec.num_leaves)


def absent(values: Any) -> bool:
    """Whether `values` is the empty tuple, which marks a tree that a configuration does not use."""
    return type(values) is tuple and not values


def zip_map(fn: Callable[..., tuple[Any, ...]], first: Any, *others: Any) -> tuple[Any, ...]:
    """Like `tree.map`, for a function with several results: one tree for each of them.

    An empty tuple among `others` marks a tree that this configuration does not use: `fn` gets None for it.
    """
    leaves, spec = tree.flatten(first)
    columns = [[None] * len(leaves) if absent(other) else spec.flatten_up_to(other) for other in others]
    rows = [fn(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(
        () if column and column[0] is None else tree.unflatten(spec, column) for column in zip(*rows, strict=True)
    )
