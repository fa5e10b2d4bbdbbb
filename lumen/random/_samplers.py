"""Samplers: random tensors of a given shape from one key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lumen.errors import ArgumentError, HyperparameterError
from lumen.random._arguments import (
    as_integer,
    as_size,
    check_bounds,
    check_float,
    check_key,
    check_number,
)
from lumen.random._draws import draw
from lumen.random._keys import split
from lumen.random._threefry import MASK


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform 32-bit words in [0, 2**32), int64 of the given shape. Equal to `jax.random.bits`.

    Raises:
        ArgumentError: `key` is not an int64 tensor, or `shape` is not a sequence of integers.
        HyperparameterError: `key` is not of shape [2], or a size is negative.

    >>> import lumen as lm
    >>> lm.random.bits(lm.random.key(7), (3,))
    tensor([2895194379, 4185947648, 1300703658])
    """
    check_key(key)
    return draw("bits", key, shape)


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Uniform numbers in [low, high) of the given shape, in float16, bfloat16, float32 or float64.

    In [0, 1) they are multiples of 2**-m, where m is the number of mantissa bits of the dtype (10, 7, 23, 52): all are
    exact, and 1 cannot occur. Other bounds are first rounded to the dtype. Equal to `jax.random.uniform` for float32
    and float64 in [0, 1), and to within rounding for other bounds.

    Raises:
        ArgumentError: `key` is not an int64 tensor; `shape`, `dtype`, `low` or `high` has the wrong type.
        HyperparameterError: `key` is not of shape [2]; a size is negative; not low < high; or they overflow the dtype.

    >>> import lumen as lm
    >>> lm.random.uniform(lm.random.key(7), (3,))
    tensor([0.6741, 0.9746, 0.3028])
    """
    check_key(key)
    check_float(dtype, "dtype")
    check_bounds(low, high, dtype)
    return draw("uniform", key, shape, dtype, low, high)


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of the given shape, in float16, bfloat16, float32 or float64. All are finite.

    They are the inverse error function at 2**23 points for float32, and at 2**53 points, from 64 bits, for float64
    (largest magnitudes 5.42 and 8.29). float16 and bfloat16 are rounded from float32. Equal to `jax.random.normal` to
    1e-6 for float32; for other dtypes JAX uses other bits.

    Raises:
        ArgumentError: `key` is not an int64 tensor; `shape` or `dtype` has the wrong type.
        HyperparameterError: `key` is not of shape [2], or a size is negative.

    >>> import lumen as lm
    >>> lm.random.normal(lm.random.key(7), (3,))
    tensor([ 0.4512,  1.9535, -0.5162])
    """
    check_key(key)
    check_float(dtype, "dtype")
    return draw("normal", key, shape, dtype)


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None) -> Tensor:
    """True with probability `p`, bool of the given shape; by default the shape of `p`.

    `p` is a number in [0, 1], or a floating-point tensor that broadcasts to `shape` and whose values are not checked.
    A probability is exact to 2**-23, for a float64 tensor to 2**-52. Equal to `jax.random.bernoulli` for a float32 `p`.

    Raises:
        ArgumentError: `key` is not an int64 tensor; `p` or `shape` has the wrong type.
        HyperparameterError: `key` is not of shape [2]; a size is negative; `p` is out of range or does not broadcast.

    >>> import lumen as lm
    >>> lm.random.bernoulli(lm.random.key(7), 0.7, (4,))
    tensor([ True, False,  True,  True])
    """
    if isinstance(p, Tensor):
        check_float(p.dtype, "p")
    else:
        check_number(p, "p")
        if not 0 <= p <= 1:
            raise HyperparameterError(f"p is {p}; a probability lies in [0, 1]: rescale or clamp it.")
    p_shape = tuple(p.shape) if isinstance(p, Tensor) else ()
    is_double = isinstance(p, Tensor) and p.dtype == torch.float64
    draws = uniform(key, p_shape if shape is None else shape, torch.float64 if is_double else torch.float32)
    if len(p_shape) > draws.ndim or any(
        a not in (1, b) for a, b in zip(p_shape[::-1], draws.shape[::-1], strict=False)
    ):
        raise HyperparameterError(
            f"p has shape {list(p_shape)}; it must broadcast to shape {list(draws.shape)}: expand it."
        )
    return draws < p


def randint(key: Tensor, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Uniform integers in [low, high), int64 of the given shape.

    They are 63 random bits modulo the range, so the error of a number's probability is less than 2**-63 for any range.
    Therefore the numbers differ from those of `jax.random.randint`.

    Raises:
        ArgumentError: `key` is not an int64 tensor; `shape`, `low` or `high` has the wrong type.
        HyperparameterError: `key` is not of shape [2]; a size is negative; or not 0 < high - low < 2**63.

    >>> import lumen as lm
    >>> lm.random.randint(lm.random.key(7), (5,), -3, 3)
    tensor([-3,  2,  2, -3, -1])
    """
    check_key(key)
    first, last = as_integer(low, "low"), as_integer(high, "high")
    if isinstance(first, Tensor) or isinstance(last, Tensor):
        raise ArgumentError("low or high is a tensor; both must be ints: use int(low), int(high).")
    if not 0 < last - first < 2**63:
        raise HyperparameterError(
            f"low is {low}, high is {high}; 0 < high - low < 2**63 must hold: swap or change them."
        )
    return draw("long_bits", key, shape) % (last - first) + first


def permutation(key: Tensor, n: int) -> Tensor:
    """The numbers 0 … n-1 in random order, int64 of shape [n]. Equal to `jax.random.permutation(key, n)`.

    Raises:
        ArgumentError: `key` is not an int64 tensor, or `n` is not an integer.
        HyperparameterError: `key` is not of shape [2], or `n` is negative.

    >>> import lumen as lm
    >>> lm.random.permutation(lm.random.key(7), 5)
    tensor([4, 2, 3, 0, 1])
    """
    check_key(key)
    n = as_size(n, "n")
    order = torch.arange(n, device=key.device)
    # 32-bit words collide. Like JAX, sort again by new words, so often that a pair rarely ties every time.
    for _ in range(math.ceil(3 * math.log(max(1, n)) / math.log(MASK))):
        key, sort_key = split(key)
        order = order[torch.argsort(bits(sort_key, (n,)), stable=True)]
    return order
