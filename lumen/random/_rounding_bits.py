"""Bits for stochastic rounding: many of them, cheaply, for any range of the entries of a leaf.

Threefry takes 250 operations for each word; these bits take 13. A key for each leaf and update comes from threefry, and
the index of an entry is hashed under it by the 32-bit mixer lowbias32 (Chris Wellons, "Prospecting for Hash Functions",
2018). So a rank that has some rows of a leaf draws for them the bits that one process draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.random._arguments import as_shape
from lumen.random._threefry import MASK, hash_counters, is_concrete, threefry

_MAX_CONCRETE_KEYS = 16  # up to so many keys are hashed faster as Python numbers than as a tensor


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return ((word & MASK) ^ 1 << 31) - (1 << 31)


_FIRST, _SECOND = _signed(0x7FEB352D), _signed(0x846CA68B)


def counted_keys(key: Tensor, count: Tensor, n: int) -> Tensor:
    """`n` keys for update `count`, int64 of shape [n, 2]: key `i` is `fold_in(key, count * 2**32 + i)`."""
    if is_concrete(key) and is_concrete(count) and n <= _MAX_CONCRETE_KEYS:
        k0, k1 = key.tolist()
        words = [threefry(k0, k1, int(count) & MASK, i) for i in range(n)]
        return torch.tensor(words, dtype=torch.int64).reshape(n, 2)
    index = torch.arange(n, device=key.device)
    return torch.stack(hash_counters(key[0], key[1], (count & MASK).expand(n), index), dim=-1)


def rounding_bits(key: Tensor, shape: Sequence[int], start: int = 0) -> Tensor:
    """32 random bits for each entry of `shape`, as int32; the flat index of the first entry is `start`.

    >>> from lumen.random import key
    >>> bits = rounding_bits(key(0), (5,))
    >>> torch.equal(bits[2:], rounding_bits(key(0), (3,), start=2))
    True
    """
    if _torch_compat.in_graph_capture():
        drawn: Tensor = rounding_bits_op(key, as_shape(shape), start)
        return drawn
    return _hashed(key, shape, start)


def _hashed(key: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """The bits of keys [*lanes, 2], of shape [*lanes, *shape]."""
    size = math.prod(shape)
    narrow = torch.int32 if size < 2**31 else torch.int64  # an arange of int32 cannot wrap
    index = torch.arange(size, dtype=narrow, device=key.device).to(torch.int32).reshape(tuple(shape))
    words = ((key ^ 1 << 31) - (1 << 31)).to(torch.int32)
    if words.ndim > 1:
        words = words.movedim(-1, 0).reshape(2, *words.shape[:-1], *[1] * len(shape))
    x = index + (words[0] + _signed(start))
    # A shift of int32 copies the sign, which the masks remove. Products wrap around.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x ^= words[1]
    x *= _SECOND
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


@torch.library.custom_op("lumen::rounding_bits", mutates_args=())
def rounding_bits_op(key: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """`rounding_bits` as one operation that compilers do not look into: signed products that wrap are undefined in C++.

    Its bits are therefore those of eager mode.
    """
    return _hashed(key, shape, start)


@rounding_bits_op.register_fake
def _(key: Tensor, shape: Sequence[int], start: int) -> Tensor:
    return key.new_empty((*key.shape[:-1], *shape), dtype=torch.int32)


@rounding_bits_op.register_vmap
def _(info: object, dims: Sequence[int | None], key: Tensor, shape: Sequence[int], start: int) -> tuple[Tensor, int]:
    assert dims[0] is not None
    return rounding_bits_op(key.movedim(dims[0], 0), shape, start), 0
