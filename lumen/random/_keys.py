"""Keys: from a seed, from other keys, and one for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.errors import ArgumentError, HyperparameterError
from lumen.random._arguments import as_integer, as_size, check_key
from lumen.random._draws import draw
from lumen.random._threefry import MASK, hash_counters, is_concrete, threefry

_Sample = TypeVar("_Sample")  # the result of a sampler: a tensor or several

_MAX_CONCRETE_KEYS = 16  # up to so many keys are hashed faster as Python numbers than as a tensor


def key(seed: int | Tensor) -> Tensor:
    """The key of a seed: int64 of shape [2], the seed's high and low 32 bits.

    `seed` is an integer in [-2**63, 2**63), or a 0-d integer tensor; the key is on its device. Equal to
    `jax.random.key(seed)` for seeds in [0, 2**32), and for all seeds if `jax_enable_x64` is set.

    Raises:
        ArgumentError: `seed` is not an integer, or a tensor of a dtype that is not an integer one.
        HyperparameterError: `seed` is out of range, or a tensor that is not 0-d.

    >>> import lumen as lm
    >>> lm.random.key(7)
    tensor([0, 7])
    """
    number = as_integer(seed, "seed")
    if isinstance(number, Tensor):
        return torch.stack((number >> 32 & MASK, number & MASK))
    return torch.tensor((number >> 32 & MASK, number & MASK), dtype=torch.int64)


def split(key: Tensor, n: int = 2) -> Tensor:
    """`n` new keys, int64 of shape [n, 2]; key `i` does not depend on `n`. Equal to `jax.random.split`.

    Raises:
        ArgumentError: `key` is not an int64 tensor, or `n` is not an integer.
        HyperparameterError: `key` is not of shape [2], or `n` is negative.

    >>> import lumen as lm
    >>> lm.random.split(lm.random.key(7))
    tensor([[3625411723, 1954958720],
            [ 195045567, 4062205631]])
    """
    check_key(key)
    n = as_size(n, "n")
    if is_concrete(key) and n <= _MAX_CONCRETE_KEYS:
        k0, k1 = key.tolist()
        return torch.tensor([threefry(k0, k1, 0, i) for i in range(n)], dtype=torch.int64).reshape(n, 2)
    return draw("words", key, (n,))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key, int64 of shape [2], from a key and a number such as a step or a rank.

    `data` is an integer in [-2**63, 2**63) or a 0-d integer tensor; different data give different keys. Equal
    to `jax.random.fold_in(key, data)` for data in [0, 2**32).

    Raises:
        ArgumentError: `key` is not an int64 tensor, or `data` is not an integer.
        HyperparameterError: `key` is not of shape [2], or `data` is out of range or not 0-d.

    >>> import lumen as lm
    >>> lm.random.fold_in(lm.random.key(7), 3)
    tensor([ 276534068, 1641862660])
    """
    check_key(key)
    number = as_integer(data, "data")
    if is_concrete(key) and (not isinstance(number, Tensor) or is_concrete(number)):
        k0, k1 = key.tolist()
        concrete = int(number)
        return torch.tensor(threefry(k0, k1, concrete >> 32 & MASK, concrete & MASK), dtype=torch.int64)
    counter = number.to(key.device) if isinstance(number, Tensor) else key.new_full((), number)
    return torch.stack(hash_counters(key[0], key[1], counter >> 32 & MASK, counter & MASK))


def by_row(key: Tensor, rows: Tensor, sample: Callable[[Tensor], _Sample]) -> _Sample:
    """`sample(fold_in(key, row))` for each number in `rows`, stacked: a row's sample depends only on its number.

    `rows` are integers of shape [B] that belong to the batch, such as each row's index in the data set. Then each row
    gets the same noise however the batch is split, over processes by `lm.ddp` or into microbatches. A sample of shape
    [B, …] from `state.key` itself does not have this property: it is the same in every microbatch. `sample` may return
    a tensor or several.

    Raises:
        ArgumentError: `key` is not an int64 tensor, or `rows` is not a tensor of integers.
        HyperparameterError: `key` is not of shape [2], or `rows` is not of shape [B].

    >>> import lumen as lm, torch
    >>> rows = torch.tensor([7, 3, 5])
    >>> noise = lm.random.by_row(lm.random.key(0), rows, lambda key: lm.random.normal(key, (2,)))
    >>> last = lm.random.by_row(lm.random.key(0), rows[2:], lambda key: lm.random.normal(key, (2,)))
    >>> noise.shape, torch.equal(noise[2:], last)
    (torch.Size([3, 2]), True)
    """
    check_key(key)
    if not isinstance(rows, Tensor) or rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        actual = rows.dtype if isinstance(rows, Tensor) else f"{rows!r:.60}, of type {type(rows).__name__}"
        raise ArgumentError(f"rows must be a tensor of integers, not {actual}.")
    if rows.ndim != 1:
        raise HyperparameterError(f"rows must be of shape [B], a number for each row, not {list(rows.shape)}.")
    if not callable(sample):
        raise ArgumentError(
            f"sample is {sample!r:.60} of type {type(sample).__name__}; it must be a function of a row's key:"
            " lm.random.by_row(key, rows, lambda key: lm.random.normal(key, (3,)))"
        )
    if not len(rows):  # a process may have no rows, and `vmap` rejects a size of 0: one row gives the shapes
        samples = by_row(key, rows.new_zeros(1), sample)
        return cast(_Sample, _torch_compat.torch_pytree.tree_map(lambda leaf: leaf[:0], samples))
    numbers = rows.to(key.device, torch.int64)
    keys = torch.stack(hash_counters(key[0], key[1], numbers >> 32 & MASK, numbers & MASK), dim=-1)
    return torch.vmap(sample)(keys)
