"""The hash threefry2x32: 32-bit words from a key and a counter, on Python numbers and on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.random._arguments import as_shape

_Word = TypeVar("_Word", int, Tensor)  # one 32-bit word, or a tensor of them

MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(k0: _Word, k1: _Word, x0: _Word, x1: _Word) -> tuple[_Word, _Word]:
    """The hash of the counter (x0, x1) under the key (k0, k1), on Python numbers and on tensors alike."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    # New tensors, with every batch dim of both key and counter, can be written in place under vmap.
    x0, x1 = x0 + k0, x1 + k1
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            # Only the right shift reads the high bits, so one mask per round is enough: no value reaches 2**63.
            x1 &= MASK
            x0 += x1
            rotated = x1 << distance
            x1 >>= 32 - distance
            x1 |= rotated
            x1 ^= x0
        x0 += schedule[(block + 1) % 3]
        x1 += schedule[(block + 2) % 3] + (block + 1)
    return x0 & MASK, x1 & MASK


@torch.library.custom_op("lumen::threefry2x32", mutates_args=())
def threefry_op(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """`threefry` on tensors as one operation that compilers do not look into; returns both words, stacked.

    Inductor would inline each round twice into the next, 20 rounds deep, and compile for most of a minute.
    """
    return torch.stack(threefry(k0, k1, x0, x1))


@threefry_op.register_fake
def _(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    return x0.new_empty((2, *torch.broadcast_shapes(k0.shape, k1.shape, x0.shape, x1.shape)))


@threefry_op.register_vmap
def _(info: object, dims: Sequence[int | None], *words: Tensor) -> tuple[Tensor, int]:
    rank = max(word.ndim - (dim is not None) for word, dim in zip(words, dims, strict=True))
    lanes = []
    for word, dim in zip(words, dims, strict=True):
        if dim is not None:
            word = word.movedim(dim, 0)
            word = word.reshape(len(word), *[1] * (rank + 1 - word.ndim), *word.shape[1:])
        lanes.append(word)
    return threefry_op(*lanes), 1


def hash_counters(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The hashes of tensors of counters, eager and compiled."""
    if _torch_compat.in_graph_capture():
        words = threefry_op(k0, k1, x0, x1)
        return words[0], words[1]
    return threefry(k0, k1, x0, x1)


def random_words(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two independent words for each element of `shape`: the hash of its flat index. Keys [*lanes, 2] add `lanes`."""
    shape = as_shape(shape)
    index = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    if key.ndim > 1:
        key = key.movedim(-1, 0).reshape(2, *key.shape[:-1], *[1] * len(shape))
    return hash_counters(key[0], key[1], index >> 32, index & MASK)


def random_bits(key: Tensor, shape: Sequence[int], count: int) -> Tensor:
    """`count` random bits for each element, as a number in [0, 2**count): the top bits of one word, or of two."""
    high, low = random_words(key, shape)
    if count > 32:
        return high << count - 32 | low >> 64 - count
    return (high ^ low) >> 32 - count


def is_concrete(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read now: hashing a few words as Python numbers is 15 times as fast.

    They cannot under vmap, where they differ by lane, or in a tracer, which would record them as constants. All of
    these set a dispatch key for the thread; the two allowed here are PyTorch's defaults.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return False
    return _torch_compat.is_undispatched()
