"""Checks of the arguments of `lumen.random`, with errors that say what to pass instead."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import SupportsIndex, cast

import torch
from torch import Tensor

from lumen.errors import ArgumentError, HyperparameterError

MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def check_key(key: object) -> None:
    """Raise unless `key` is an int64 tensor of shape [2]."""
    fix = "a key is an int64 tensor of shape [2]: make one with lumen.random.key(seed)"
    if not isinstance(key, Tensor):
        raise ArgumentError(f"key is {key!r:.40}, of type {type(key).__name__}; {fix}.")
    if key.dtype != torch.int64:
        raise ArgumentError(f"key is a tensor of {key.dtype}; {fix}.")
    if key.shape != (2,):
        raise HyperparameterError(f"key has shape {list(key.shape)}; {fix}, or map over rows with torch.func.vmap.")


def check_float(dtype: object, name: str) -> None:
    """Raise unless `dtype` is a floating-point one that the samplers support."""
    if dtype not in MANTISSA_BITS:
        raise ArgumentError(
            f"{name} is of {dtype!r:.40}; allowed are {', '.join(map(str, MANTISSA_BITS))}: use torch.float32."
        )


def check_number(value: object, name: str) -> None:
    """Raise unless `value` is a real number."""
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise ArgumentError(
            f"{name} is {value!r:.40} of type {type(value).__name__}; it must be a number: use float({name})."
        )


def check_bounds(low: float, high: float, dtype: torch.dtype) -> None:
    """Raise unless `low < high`, and both and their difference are in the range of `dtype`."""
    check_number(low, "low")
    check_number(high, "high")
    largest = torch.finfo(dtype).max
    if not (low < high and max(abs(low), abs(high), high - low) <= largest):
        raise HyperparameterError(
            f"low is {low}, high is {high}; low < high must hold, and both and their difference must be at "
            f"most {largest:.3g} for {dtype}: swap or narrow them, or use a wider dtype."
        )


def as_shape(shape: object) -> tuple[int, ...]:
    """`shape` as a tuple of sizes."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise ArgumentError(f"shape is {shape!r:.60}; it must be a sequence of ints, such as (3,) or (): use (size,).")
    return tuple(as_size(size, "a size in shape") for size in shape)


def as_size(value: object, name: str) -> int:
    """`value` as an int from 0 up."""
    size = as_int(value, name)
    if size < 0:
        raise HyperparameterError(f"{name} is {size}; it must be at least 0: write it out, -1 cannot be inferred here.")
    return size


def as_integer(value: object, name: str) -> int | Tensor:
    """`value` as an int or a 0-d int64 tensor."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise ArgumentError(f"{name} is a tensor of {value.dtype}; its dtype must be an integer one: use .long().")
        if value.ndim != 0:
            raise HyperparameterError(
                f"{name} has shape {list(value.shape)}; it must be 0-d: map with torch.func.vmap."
            )
        return value.to(torch.int64)
    number = as_int(value, name)
    if not -(2**63) <= number < 2**63:
        raise HyperparameterError(f"{name} is {number}; it must lie in [-2**63, 2**63): use {name} % 2**63.")
    return number


def as_int(value: object, name: str) -> int:
    """`value` as an int."""
    if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex | torch.SymInt):
        raise ArgumentError(f"{name} is {value!r} of type {type(value).__name__}; it must be an int: use int(…).")
    # `index` would turn a tracer's symbolic size, an int to Dynamo and a SymInt to make_fx, into a constant.
    return cast(int, value) if isinstance(value, int | torch.SymInt) else operator.index(value)
