"""What the samplers compute from a key: each draw is one operation in a compiled graph, with the bits of eager mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.random._arguments import MANTISSA_BITS, as_shape
from lumen.random._threefry import random_bits, random_words

# M. Giles, "Approximating the erfinv function", GPU Computing Gems, Jade edition, 2011, table 5.
_CENTER = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)

Draw = Callable[[Tensor, Sequence[int], torch.dtype, float, float], Tensor]


def _words(key: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    """Both words of each element, in a last dim: new keys."""
    return torch.stack(random_words(key, shape), dim=-1)


def _bits(key: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    high, low = random_words(key, shape)
    return high ^ low


def _long_bits(key: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    return random_bits(key, shape, 63)


def _uniform(key: Tensor, shape: Sequence[int], dtype: torch.dtype, low: float, high: float) -> Tensor:
    count = MANTISSA_BITS[dtype]
    draws = random_bits(key, shape, count).to(dtype).mul_(2.0**-count)
    if (low, high) == (0.0, 1.0):
        return draws
    draws = draws.mul_(high - low).add_(low)
    return torch.where(draws < high, draws, low)  # the sum may round up to `high`


def _normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype, *_: object) -> Tensor:
    work, count = (torch.float64, 53) if dtype == torch.float64 else (torch.float32, 23)
    # No operation rounds: in units of eps / 2 every value is an integer below 2**24 (2**53), and the last one is odd.
    # So no point is 0 or ±1, where erfinv is infinite.
    points = random_bits(key, shape, count).to(work).mul_(2.0 ** (1 - count)).add_(torch.finfo(work).eps / 2 - 1)
    roots = torch.erfinv(points) if work == torch.float64 else erfinv(points)
    return roots.mul_(math.sqrt(2.0)).to(dtype)


_DRAWS: dict[str, Draw] = {
    "words": _words,
    "bits": _bits,
    "long_bits": _long_bits,
    "uniform": _uniform,
    "normal": _normal,
}


def draw(
    kind: str,
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.int64,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """A draw of one of `_DRAWS`, as one operation where a graph is recorded.

    Inductor would compile each draw for most of a minute, fuse its products and sums, and so round otherwise.
    """
    if _torch_compat.in_graph_capture():
        drawn: Tensor = draw_op(key, as_shape(shape), kind, dtype, low, high)
        return drawn
    return _DRAWS[kind](key, shape, dtype, low, high)


@torch.library.custom_op("lumen::random_draw", mutates_args=())
def draw_op(key: Tensor, shape: Sequence[int], kind: str, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """The draws of keys [*lanes, 2], of shape [*lanes, *shape], which compilers do not look into."""
    return _DRAWS[kind](key, shape, dtype, low, high)


@draw_op.register_fake
def _(key: Tensor, shape: Sequence[int], kind: str, dtype: torch.dtype, low: float, high: float) -> Tensor:
    return key.new_empty((*key.shape[:-1], *shape, *(2,) * (kind == "words")), dtype=dtype)


@draw_op.register_vmap
def _(
    info: object,
    dims: Sequence[int],
    key: Tensor,
    shape: Sequence[int],
    kind: str,
    dtype: torch.dtype,
    low: float,
    high: float,
) -> tuple[Tensor, int]:
    return draw_op(key.movedim(dims[0], 0), shape, kind, dtype, low, high), 0


def erfinv(x: Tensor) -> Tensor:
    """The inverse error function for float32 strictly inside (-1, 1), to an absolute error of 2e-5.

    `torch.erfinv` returns different numbers in each of its kernels (MKL, Inductor, CUDA); this returns JAX's in all.
    """
    w = -torch.log1p(-x * x)
    return torch.where(w < 5, _polynomial(_CENTER, w - 2.5), _polynomial(_TAIL, w.sqrt() - 3)).mul_(x)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total.mul_(x).add_(coefficient)
    return total
