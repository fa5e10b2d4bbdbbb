"""The order of a data set: a keyed permutation that is computed on demand and never stored.

`permute` is a Feistel network over Z_a × Z_b, a near-square with a·b >= n: a position is split into
(high, low), and each round adds to one half a keyed hash of the other, modulo that half's size. Points
outside [0, n) go through the network again until they are inside (J. Black, P. Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002). The hash is the finalizer of SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014).

Checkpoints rely on this order: if its numbers ever change, so must `loader.VERSION`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lumen.data.arguments import SEEDS, integer
from lumen.errors import BatchError

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

_ROUNDS = 16  # even; with 12, sets of 5 and 6 rows are visibly off uniform
BLOCK = 8192  # positions computed at once, which makes an index cheaper than the row it reads
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ONE = np.uint64(1)
_MASK = 2**64 - 1


def permute(n: int, seed: int, epoch: int, positions: ArrayLike) -> Indices:
    """The rows at `positions` of the order that (`seed`, `epoch`) gives to a data set of `n` rows.

    A bijection of [0, n) onto itself for each seed and epoch, in time and memory of the positions alone. The
    result is int64 of the shape of `positions`. Raises BatchError for what is not an integer, `n` outside
    [1, 2**63), a seed outside [-2**63, 2**63), a negative epoch, and positions outside [0, n).

    >>> from lumen.data import permute
    >>> permute(5, seed=0, epoch=0, positions=[0, 1, 2, 3, 4])
    array([3, 4, 0, 2, 1])
    >>> permute(10**12, seed=0, epoch=1, positions=[999_999_999_999])
    array([925645746024])
    """
    n, epoch = integer("n", n, 1, 2**63), integer("epoch", epoch, 0, 2**63)
    keys = _keys(integer("seed", seed, *SEEDS), epoch)
    checked = _check_positions(positions, n)
    points = _network(checked.astype(np.uint64).reshape(-1), n, keys)
    outside = np.flatnonzero(points >= n)
    while outside.size:
        points[outside] = _network(points[outside], n, keys)
        outside = outside[points[outside] >= n]
    return points.astype(np.int64).reshape(checked.shape)


def rows(n: int, seed: int | None, epoch: int, start: int, stop: int) -> Indices:
    """The rows at positions `start` … `stop` - 1, in their own order if `seed` is None. Do not write to them."""
    if seed is None:
        return np.arange(start, stop)
    number = start // BLOCK
    first = number * BLOCK
    if stop <= first + BLOCK:  # nearly always
        return _block(n, seed, epoch, number)[start - first : stop - first]
    return from_blocks(partial(_block, n, seed, epoch), start, stop)


def take(n: int, seed: int | None, epoch: int, positions: Indices) -> Indices:
    """The rows at `positions`, which should be close to each other; in their own order if `seed` is None."""
    if seed is None:
        return positions
    first, last = int(positions.min()), int(positions.max())
    if last - first < 2 * BLOCK:
        return rows(n, seed, epoch, first, last + 1)[positions - first]
    return permute(n, seed, epoch, positions)


@lru_cache(maxsize=256)
def shuffled(n: int, seed: int, epoch: int) -> Indices:
    """A whole order of `n` rows, sorted by a hash of each: for few rows in a fraction of the time of `permute`."""
    return np.argsort(_words(seed, epoch, 0, n), kind="stable")


def from_blocks(block: Callable[[int], Indices], start: int, stop: int) -> Indices:
    """Positions `start` … `stop` - 1 of an order that `block(number)` gives in blocks (`block_bounds`)."""
    first, offset = divmod(start, BLOCK)
    if stop <= (first + 1) * BLOCK:
        return block(first)[offset : offset + stop - start]
    blocks = [block(number) for number in range(first, (stop - 1) // BLOCK + 1)]
    return np.concatenate(blocks)[offset : offset + stop - start]


def block_bounds(number: int, n: int) -> tuple[int, int]:
    """The first position of a block, and the one after its last, of `n` positions."""
    return number * BLOCK, min((number + 1) * BLOCK, n)


def uniform(seed: int, epoch: int, start: int, stop: int) -> NDArray[np.float64]:
    """The random numbers `start` … `stop` - 1 of an epoch, independent and uniform in [0, 1): SplitMix64's outputs."""
    return (_words(seed, epoch, start, stop) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash64(*words: int) -> int:
    """A number in [0, 2**64) that depends on every word and on their order; it derives a seed from others."""
    state = 0
    for word in words:
        state = extended(state, word)
    return state


def extended(state: int, word: int) -> int:
    """`hash64(*words, word)` for the `state` that is `hash64(*words)`."""
    # `_mix` for Python integers, which are ten times as fast as arrays of one element.
    state = (state ^ word & _MASK) + _GOLDEN & _MASK
    state = (state ^ state >> 30) * _FACTORS[0] & _MASK
    state = (state ^ state >> 27) * _FACTORS[1] & _MASK
    return state ^ state >> 31


def derived_seed(seed: int, number: int) -> int:
    """The seed, in [-2**63, 2**63), of the `number`-th of several orders that follow from `seed`."""
    return hash64(seed, number) - 2**63


@lru_cache(maxsize=256)  # a pure function; blocks of 64 kB, one for each live iterator, bucket or set of a mixture
def _block(n: int, seed: int, epoch: int, number: int) -> Indices:
    return permute(n, seed, epoch, np.arange(*block_bounds(number, n)))


@lru_cache(maxsize=16)
def _keys(seed: int, epoch: int) -> _Words:
    """A key for each round, and one for the exchange at the end."""
    return _words(seed, epoch, 0, _ROUNDS + 1)


def _words(seed: int, epoch: int, start: int, stop: int) -> _Words:
    counters = np.arange(start + 1, stop + 1, dtype=np.uint64)
    return _mix(np.uint64(hash64(seed, epoch)) + np.uint64(_GOLDEN) * counters)


def _network(points: _Words, n: int, keys: _Words) -> _Words:
    a = math.isqrt(n - 1) + 1
    sizes = np.uint64(a), np.uint64(-(-n // a))
    moved, fixed = points // sizes[1], _modulo(points.copy(), sizes[1])
    for i, key in enumerate(keys[:-1]):
        word = _mix(fixed + key)
        word >>= _ONE  # keeps the sum below 2**64
        word += moved
        moved, fixed = fixed, _modulo(word, sizes[i % 2])  # the halves are swapped
    points = moved * sizes[1] + fixed
    # Rounds over odd sizes are even permutations: half of the time, exchange 0 and 1 to reach the others.
    exchange = keys[-1] & np.uint64(n > 1)
    return np.where(points <= _ONE, points ^ (exchange & _ONE), points)


def _mix(words: _Words) -> _Words:
    """A hash of each word, computed in place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(_FACTORS[0])
    words ^= words >> np.uint64(27)
    words *= np.uint64(_FACTORS[1])
    words ^= words >> np.uint64(31)
    return words


def _modulo(words: _Words, size: np.uint64) -> _Words:
    """`words % size`, computed in place; NumPy divides by a scalar several times as fast as it takes a remainder."""
    multiples = words // size
    multiples *= size
    words -= multiples
    return words


def _check_positions(positions: ArrayLike, n: int) -> Indices:
    array = np.asarray(positions)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise BatchError(f"positions are {array.dtype}; they must be integers: convert with .astype(int).")
    if array.min() < 0 or array.max() >= n:
        raise BatchError(f"positions are in [{array.min()}, {array.max()}]; allowed is [0, {n}).")
    return array
