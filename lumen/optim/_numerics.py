"""Scalars and leaves: the arithmetic that every rule here shares.

A rule computes in its leaf's dtype, 16-bit types in float32; only what it keeps is rounded. What a rule averages over
steps (moments, momentum) it keeps in float32 for 16-bit params: there, a change of less than 1/256 of an entry would
be rounded away, at each step anew. Scalars (learning rates, bias corrections) are 0-d float64 tensors until they meet
a leaf.
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

NO_FLOAT64 = {"mps"}  # types of devices


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def time(count: Tensor) -> Tensor:
    """A count as a floating scalar: an integer tensor times a Python float would be float32."""
    return count.to(scalar_dtype(count.device))


def widen(leaf: Tensor) -> Tensor:
    """`leaf` in at least float32."""
    return leaf.to(wide_dtype(leaf.dtype))


def is_narrow(params: Any) -> bool:
    """Whether a leaf is of 16 bits."""
    return any(leaf.dtype in NARROW for leaf in tree.leaves(params))


def widened(*leaves: Tensor | None) -> Any:
    """The leaves in the dtype that their update is computed in: their common one, and at least float32."""
    dtype = torch.float32
    for leaf in leaves:
        if leaf is not None:
            dtype = torch.promote_types(dtype, leaf.dtype)
    return [None if leaf is None else leaf.to(dtype) for leaf in leaves]


class Coefficients:
    """Scalars of one update, cast once for each dtype and device that asks for them."""

    def __init__(self, *scalars: Scalar) -> None:
        self._scalars = scalars
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Scalar, ...]] = {}

    def like(self, leaf: Tensor) -> tuple[Scalar, ...]:
        """The scalars in the dtype and on the device of `leaf`: a 0-d leaf would be promoted otherwise."""
        key = (leaf.dtype, leaf.device)
        if key not in self._cast:
            cast = [s.to(device=leaf.device, dtype=leaf.dtype) if isinstance(s, Tensor) else s for s in self._scalars]
            self._cast[key] = tuple(_in_one_buffer(cast) if rules.is_tracing() else cast)
        return self._cast[key]


def _in_one_buffer(scalars: list[Scalar]) -> list[Scalar]:
    """The same scalars, the tensors among them computed once and kept.

    Inductor would fuse their computation into the loop over every leaf: the exponentials of a bias correction, once for
    each few elements, took two thirds of a compiled Adam update.
    """
    at = [i for i, scalar in enumerate(scalars) if isinstance(scalar, Tensor)]
    if len(at) < 2:
        return scalars
    kept = list(scalars)
    for i, scalar in zip(at, torch.stack([scalars[i] for i in at]).unbind(), strict=True):  # type: ignore[misc]
        kept[i] = scalar
    return kept


def one_minus_power(base: Scalar, count: Tensor) -> Tensor:
    """`1 - base**count` as `-expm1(count * log(base))`, which keeps its digits when `base` is close to 1."""
    t = time(count)
    if isinstance(base, Tensor):
        return -torch.expm1(t * torch.log(base))
    return -torch.expm1(t * (math.log(base) if base > 0 else -math.inf))


def zeros_like(params: Any, dtype: torch.dtype | None = None) -> Any:
    """Zeros in the shapes of `params`, in `dtype` or else in the params' dtypes, and at least float32."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype or wide_dtype(p.dtype)), params)


def as_tree(values: Any, params: Any) -> Any:
    """A list of one value for each leaf, or one value for all, in the structure of `params`."""
    spec = tree.structure(params)
    return tree.unflatten(spec, values if isinstance(values, list) else [values] * spec.num_leaves)


def absent(values: Any) -> bool:
    """Whether `values` is the empty tuple, which stands for a tree that a configuration does without."""
    return type(values) is tuple and not values


def zip_map(fn: Callable[..., tuple[Any, ...]], first: Any, *rest: Any) -> tuple[Any, ...]:
    """Like `tree.map`, for a function of several results: one tree for each of them.

    An empty tuple among `rest` stands for a tree that this configuration does without: `fn` gets None for it.
    """
    leaves, spec = tree.flatten(first)
    columns = [[None] * len(leaves) if absent(other) else spec.flatten_up_to(other) for other in rest]
    rows = [fn(*each) for each in zip(leaves, *columns, strict=True)]
    return tuple(
        () if column and column[0] is None else tree.unflatten(spec, column) for column in zip(*rows, strict=True)
    )
