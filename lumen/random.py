"""Random numbers as pure functions of explicit keys: nothing here reads or moves a global generator.

A key is an int64 tensor of shape [2] holding two 32-bit words, high then low. A sampler hashes the numbers
0, 1, 2, … under the key, so equal keys give equal numbers in eager mode, in each lane of `torch.func.vmap`
and under `torch.compile`, and the result lies on the key's device. Use a key once: hand it to one sampler, or
`split` it, or `fold_in` data, never two of these, since all hash the same numbers: `split(key, n)[i]` is
`fold_in(key, i)`, and word `i` of `bits(key, [n])` is the exclusive or of that key's two words.

    >>> import lumen as lm
    >>> dropout_key, noise_key = lm.random.split(lm.random.key(0))
    >>> lm.random.normal(noise_key, (2,))
    tensor([-2.4425, -2.0357])

The hash is threefry2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1,
2, 3", SC11, 2011), bit for bit that of the authors' Random123. The layout of keys and counters is that of
`jax.random` under `jax_threefry_partitionable=True`, JAX's default; every function states what it shares with
JAX. Words are int64 because PyTorch has no arithmetic on uint32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import SupportsIndex, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_Drawn = TypeVar("_Drawn")  # what a sampler gives: a tensor or several
_Word = TypeVar("_Word", int, Tensor)  # one 32-bit word, or a tensor of them

_MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_FEW = 16  # so many keys are split faster as Python numbers than as a tensor
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}

# M. Giles, "Approximating the erfinv function", GPU Computing Gems, Jade edition, 2011, table 5.
_CENTRE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def key(seed: int | Tensor) -> Tensor:
    """The key of a seed: int64 of shape [2], the seed's high and low 32 bits.

    `seed` is an integer in [-2**63, 2**63), or a 0-d integer tensor whose device the key takes. Equal to
    `jax.random.key(seed)` for seeds in [0, 2**32) and, where `jax_enable_x64` is set, for all.

    Raises:
        TypeError: `seed` is no integer, or a tensor that is not of an integer dtype.
        ValueError: `seed` is out of range, or a tensor that is not 0-d.

    >>> import lumen as lm
    >>> lm.random.key(7)
    tensor([0, 7])
    """
    number = _integer(seed, "seed")
    if isinstance(number, Tensor):
        return torch.stack((number >> 32 & _MASK, number & _MASK))
    return torch.tensor((number >> 32 & _MASK, number & _MASK), dtype=torch.int64)


def split(key: Tensor, n: int = 2) -> Tensor:
    """`n` new keys, int64 of shape [n, 2]; key `i` does not depend on `n`. Equal to `jax.random.split`.

    Raises:
        TypeError: `key` is not an int64 tensor, or `n` is no integer.
        ValueError: `key` is not of shape [2], or `n` is negative.

    >>> import lumen as lm
    >>> lm.random.split(lm.random.key(7))
    tensor([[3625411723, 1954958720],
            [ 195045567, 4062205631]])
    """
    _check_key(key)
    n = _size(n, "n")
    if _is_plain(key) and n <= _FEW:
        k0, k1 = key.tolist()
        return torch.tensor([_threefry(k0, k1, 0, i) for i in range(n)], dtype=torch.int64).reshape(n, 2)
    return torch.stack(_words(key, (n,)), dim=-1)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key, int64 of shape [2], of a key and a number such as a step or a rank.

    `data` is an integer in [-2**63, 2**63) or a 0-d integer tensor; different data give different keys. Equal
    to `jax.random.fold_in(key, data)` for data in [0, 2**32).

    Raises:
        TypeError: `key` is not an int64 tensor, or `data` is no integer.
        ValueError: `key` is not of shape [2], or `data` is out of range or not 0-d.

    >>> import lumen as lm
    >>> lm.random.fold_in(lm.random.key(7), 3)
    tensor([ 276534068, 1641862660])
    """
    _check_key(key)
    number = _integer(data, "data")
    if _is_plain(key) and (not isinstance(number, Tensor) or _is_plain(number)):
        k0, k1 = key.tolist()
        plain = int(number)
        return torch.tensor(_threefry(k0, k1, plain >> 32 & _MASK, plain & _MASK), dtype=torch.int64)
    counter = number.to(key.device) if isinstance(number, Tensor) else key.new_full((), number)
    return torch.stack(_hash(key[0], key[1], counter >> 32 & _MASK, counter & _MASK))


def by_row(key: Tensor, rows: Tensor, sample: Callable[[Tensor], _Drawn]) -> _Drawn:
    """`sample(fold_in(key, row))` for each number in `rows`, stacked: what a row draws depends on its number alone.

    `rows` are integers of shape [B] that travel in the batch, such as each row's place in the data set. Then any cut
    of the batch, over processes by `lm.ddp` or into microbatches, gives each row the noise that it has in the whole.
    A draw of shape [B, …] from `state.key` itself does not: it is the same in every part. `sample` may give a tensor
    or several.

    Raises:
        TypeError: `key` is not an int64 tensor, or `rows` is not a tensor of integers.
        ValueError: `key` is not of shape [2], or `rows` is not of shape [B].

    >>> import lumen as lm, torch
    >>> rows = torch.tensor([7, 3, 5])
    >>> noise = lm.random.by_row(lm.random.key(0), rows, lambda key: lm.random.normal(key, (2,)))
    >>> last = lm.random.by_row(lm.random.key(0), rows[2:], lambda key: lm.random.normal(key, (2,)))
    >>> noise.shape, torch.equal(noise[2:], last)
    (torch.Size([3, 2]), True)
    """
    _check_key(key)
    if not isinstance(rows, Tensor) or rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a tensor of integers, not {found}.")
    if rows.ndim != 1:
        raise ValueError(f"rows must be of shape [B], a number for each row, not {list(rows.shape)}.")
    if not len(rows):  # a process may have none, and `vmap` does not run over nothing: the shapes are those of a row
        drawn = by_row(key, rows.new_zeros(1), sample)
        return cast(_Drawn, tree_map(lambda leaf: leaf[:0], drawn))
    number = rows.to(key.device, torch.int64)
    keys = torch.stack(_hash(key[0], key[1], number >> 32 & _MASK, number & _MASK), dim=-1)
    return torch.vmap(sample)(keys)


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform 32-bit words in [0, 2**32): int64 of the given shape. Equal to `jax.random.bits`.

    Raises:
        TypeError: `key` is not an int64 tensor, or `shape` is not a sequence of integers.
        ValueError: `key` is not of shape [2], or a size is negative.

    >>> import lumen as lm
    >>> lm.random.bits(lm.random.key(7), (3,))
    tensor([2895194379, 4185947648, 1300703658])
    """
    _check_key(key)
    high, low = _words(key, shape)
    return high ^ low


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Uniform numbers in [low, high): of the given shape, and float16, bfloat16, float32 or float64.

    In [0, 1) they are the multiples of 2**-m, for the m bits of the dtype's mantissa (10, 7, 23, 52): all are
    exact and 1 cannot occur. Other bounds are first rounded to the dtype. Equal to `jax.random.uniform` for
    float32 and float64 in [0, 1), and to within rounding for other bounds.

    Raises:
        TypeError: `key` is not an int64 tensor; `shape`, `dtype`, `low` or `high` has the wrong type.
        ValueError: `key` is not of shape [2]; a size is negative; not low < high; or they overflow the dtype.

    >>> import lumen as lm
    >>> lm.random.uniform(lm.random.key(7), (3,))
    tensor([0.6741, 0.9746, 0.3028])
    """
    _check_key(key)
    _check_float(dtype, "dtype")
    _check_bounds(low, high, dtype)
    count = _MANTISSA[dtype]
    draws = _mantissa(key, shape, count).to(dtype).mul_(2.0**-count)
    if (low, high) == (0.0, 1.0):
        return draws
    draws = draws.mul_(high - low).add_(low)
    return torch.where(draws < high, draws, low)  # the sum may round up to `high`


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers: of the given shape, and float16, bfloat16, float32 or float64. All are finite.

    They are the inverse error function at 2**23 points for float32 and at 2**53 points, from 64 bits, for
    float64 (largest magnitudes 5.42 and 8.29); float16 and bfloat16 are rounded from float32. Equal to
    `jax.random.normal` for float32 to 1e-6; other dtypes draw from other bits than JAX does.

    Raises:
        TypeError: `key` is not an int64 tensor; `shape` or `dtype` has the wrong type.
        ValueError: `key` is not of shape [2], or a size is negative.

    >>> import lumen as lm
    >>> lm.random.normal(lm.random.key(7), (3,))
    tensor([ 0.4512,  1.9535, -0.5162])
    """
    _check_key(key)
    _check_float(dtype, "dtype")
    work, count = (torch.float64, 53) if dtype == torch.float64 else (torch.float32, 23)
    # No step rounds: in units of eps / 2 every value is an integer below 2**24 (2**53), and in the end it is
    # odd. So no point is 0 or ±1, where erfinv is infinite.
    points = _mantissa(key, shape, count).to(work).mul_(2.0 ** (1 - count)).add_(torch.finfo(work).eps / 2 - 1)
    roots = torch.erfinv(points) if work == torch.float64 else _erfinv(points)
    return roots.mul_(math.sqrt(2.0)).to(dtype)


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None) -> Tensor:
    """True with probability `p`: bool of the given shape, by default that of `p`.

    `p` is a number in [0, 1], or a floating tensor that broadcasts to `shape` and whose values are not
    checked. A probability is exact to 2**-23, for a float64 tensor to 2**-52. Equal to `jax.random.bernoulli`
    for a float32 `p`.

    Raises:
        TypeError: `key` is not an int64 tensor; `p` or `shape` has the wrong type.
        ValueError: `key` is not of shape [2]; a size is negative; `p` is out of range or does not broadcast.

    >>> import lumen as lm
    >>> lm.random.bernoulli(lm.random.key(7), 0.7, (4,))
    tensor([ True, False,  True,  True])
    """
    if isinstance(p, Tensor):
        _check_float(p.dtype, "p")
    else:
        _check_number(p, "p")
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; a probability lies in [0, 1]: rescale or clamp it.")
    of_p = tuple(p.shape) if isinstance(p, Tensor) else ()
    wide = isinstance(p, Tensor) and p.dtype == torch.float64
    draws = uniform(key, of_p if shape is None else shape, torch.float64 if wide else torch.float32)
    if len(of_p) > draws.ndim or any(a not in (1, b) for a, b in zip(of_p[::-1], draws.shape[::-1], strict=False)):
        raise ValueError(f"p has shape {list(of_p)}; it must broadcast to shape {list(draws.shape)}: expand it.")
    return draws < p


def randint(key: Tensor, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Uniform integers in [low, high): int64 of the given shape.

    A 63-bit draw modulo the range, so that a number's probability is off by less than 2**-63 at any range.
    For that reason the numbers are not those of `jax.random.randint`.

    Raises:
        TypeError: `key` is not an int64 tensor; `shape`, `low` or `high` has the wrong type.
        ValueError: `key` is not of shape [2]; a size is negative; or not 0 < high - low < 2**63.

    >>> import lumen as lm
    >>> lm.random.randint(lm.random.key(7), (5,), -3, 3)
    tensor([-3,  2,  2, -3, -1])
    """
    _check_key(key)
    first, last = _integer(low, "low"), _integer(high, "high")
    if isinstance(first, Tensor) or isinstance(last, Tensor):
        raise TypeError("low or high is a tensor; both must be ints: use int(low), int(high).")
    if not 0 < last - first < 2**63:
        raise ValueError(f"low is {low}, high is {high}; 0 < high - low < 2**63 must hold: swap or change them.")
    return _mantissa(key, shape, 63) % (last - first) + first


def permutation(key: Tensor, n: int) -> Tensor:
    """The numbers 0 … n-1 in random order: int64 of shape [n]. Equal to `jax.random.permutation(key, n)`.

    Raises:
        TypeError: `key` is not an int64 tensor, or `n` is no integer.
        ValueError: `key` is not of shape [2], or `n` is negative.

    >>> import lumen as lm
    >>> lm.random.permutation(lm.random.key(7), 5)
    tensor([4, 2, 3, 0, 1])
    """
    _check_key(key)
    n = _size(n, "n")
    order = torch.arange(n, device=key.device)
    # 32-bit words collide. JAX sorts again by fresh words, so often that a pair that ties every time is rare.
    for _ in range(math.ceil(3 * math.log(max(1, n)) / math.log(_MASK))):
        key, used = split(key)
        order = order[torch.argsort(bits(used, (n,)), stable=True)]
    return order


def _threefry(k0: _Word, k1: _Word, x0: _Word, x1: _Word) -> tuple[_Word, _Word]:
    """The hash of the counter (x0, x1) under the key (k0, k1), on Python numbers and on tensors alike."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    # New tensors with every batch dim of both key and counter, so that writing into them is safe under vmap.
    x0, x1 = x0 + k0, x1 + k1
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            # Only the right shift looks at high bits, so one mask a round is enough: nothing reaches 2**63.
            x1 &= _MASK
            x0 += x1
            left = x1 << distance
            x1 >>= 32 - distance
            x1 |= left
            x1 ^= x0
        x0 += schedule[(block + 1) % 3]
        x1 += schedule[(block + 2) % 3] + (block + 1)
    return x0 & _MASK, x1 & _MASK


@torch.library.custom_op("lumen::threefry2x32", mutates_args=())
def _opaque(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    return torch.stack(_threefry(k0, k1, x0, x1))


@_opaque.register_fake
def _(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    return x0.new_empty((2, *torch.broadcast_shapes(k0.shape, k1.shape, x0.shape, x1.shape)))


@_opaque.register_vmap
def _(info: object, dims: Sequence[int | None], *words: Tensor) -> tuple[Tensor, int]:
    rank = max(word.ndim - (dim is not None) for word, dim in zip(words, dims, strict=True))
    lanes = []
    for word, dim in zip(words, dims, strict=True):
        if dim is not None:
            word = word.movedim(dim, 0)
            word = word.reshape(len(word), *[1] * (rank + 1 - word.ndim), *word.shape[1:])
        lanes.append(word)
    return _opaque(*lanes), 1


def _hash(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    # Inductor writes each word out in terms of the last round's twice, 20 rounds deep: a compile of minutes.
    if torch.compiler.is_compiling():
        words = _opaque(k0, k1, x0, x1)
        return words[0], words[1]
    return _threefry(k0, k1, x0, x1)


def _words(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two independent words for each place of `shape`: the hash of the place's number."""
    shape = _shape(shape)
    index = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    return _hash(key[0], key[1], index >> 32, index & _MASK)


def _mantissa(key: Tensor, shape: Sequence[int], count: int) -> Tensor:
    """`count` random bits for each place, as a number in [0, 2**count): the top of one word, or of two."""
    high, low = _words(key, shape)
    if count > 32:
        return high << count - 32 | low >> 64 - count
    return (high ^ low) >> 32 - count


def _erfinv(x: Tensor) -> Tensor:
    """The inverse error function for float32 strictly inside (-1, 1), to an absolute error of 2e-5.

    `torch.erfinv` gives other numbers in each of its kernels (MKL, inductor, CUDA); this gives JAX's in all.
    """
    w = -torch.log1p(-x * x)
    return torch.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, w.sqrt() - 3)).mul_(x)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total.mul_(x).add_(coefficient)
    return total


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values may be read at once: hashing a few words as numbers is 15 times as fast.

    Not so under vmap, where they differ by lane, nor in a tracer, which would record them as constants. All
    of these set a dispatch key for the thread; the two allowed here are PyTorch's own defaults.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return False
    keys = torch._C._dispatch_tls_local_include_set()
    defaults = torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView
    return bool(keys.remove(defaults[0]).remove(defaults[1]).raw_repr() == 0)


def _check_key(key: object) -> None:
    fix = "a key is an int64 tensor of shape [2]: make one with lumen.random.key(seed)"
    if not isinstance(key, Tensor):
        raise TypeError(f"key is of type {type(key).__name__}; {fix}.")
    if key.dtype != torch.int64:
        raise TypeError(f"key is a tensor of {key.dtype}; {fix}.")
    if key.shape != (2,):
        raise ValueError(f"key has shape {list(key.shape)}; {fix}, or map over rows with torch.func.vmap.")


def _check_float(dtype: object, name: str) -> None:
    if dtype not in _MANTISSA:
        raise TypeError(f"{name} is of {dtype}; allowed are {', '.join(map(str, _MANTISSA))}: use torch.float32.")


def _check_number(value: object, name: str) -> None:
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a number: use float({name}).")


def _check_bounds(low: float, high: float, dtype: torch.dtype) -> None:
    _check_number(low, "low")
    _check_number(high, "high")
    largest = torch.finfo(dtype).max
    if not (low < high and max(abs(low), abs(high), high - low) <= largest):
        raise ValueError(
            f"low is {low}, high is {high}; low < high must hold, and both and their difference must be at "
            f"most {largest:.3g} for {dtype}: swap or narrow them, or use a wider dtype."
        )


def _shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape is {shape!r}; it must be a sequence of ints, such as (3,) or (): use (size,).")
    return tuple(_size(size, "a size in shape") for size in shape)


def _size(value: object, name: str) -> int:
    size = _int(value, name)
    if size < 0:
        raise ValueError(f"{name} is {size}; it must be at least 0: write it out, -1 cannot be inferred here.")
    return size


def _integer(value: object, name: str) -> int | Tensor:
    """`value` as an int, or as a 0-d int64 tensor."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} is a tensor of {value.dtype}; its dtype must be an integer one: use .long().")
        if value.ndim != 0:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be 0-d: map with torch.func.vmap.")
        return value.to(torch.int64)
    number = _int(value, name)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} is {number}; it must lie in [-2**63, 2**63): use {name} % 2**63.")
    return number


def _int(value: object, name: str) -> int:
    if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex | torch.SymInt):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be an int: use int(…).")
    # `index` would make a tracer's symbolic size, an int to Dynamo and a SymInt to make_fx, a constant.
    return cast(int, value) if isinstance(value, int | torch.SymInt) else operator.index(value)
