"""Eight-bit and bfloat16 formats of an average over steps, rounded stochastically.

A mean with decay rate 0.999 changes by a thousandth per step. Rounded to the nearest of the few values that eight bits
or bfloat16 can hold, it would keep its first value for ever (Xu et al., 2025, "Pushing the Limits of Low-Bit
Optimizers: A Focus on EMA Dynamics", call it signal swamping). Rounded up or down with the probabilities that make the
expectation exact, it follows.

Block-wise scales are those of Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization". Blocks lie within
rows, so that shards of rows have whole blocks. The levels are dense near zero, as theirs are, but by a formula and not
a table: those of a signed mean are `± (c / 127)²` of the largest magnitude in the block, those of a mean of squares
`(c / 255)⁴`. Square roots are rounded correctly on every device, so that the same numbers get the same codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen.core.bit_cast import bit_cast
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import row_of_param_field

BLOCK = 256  # the most entries that share a scale
_SIGNED, _UNSIGNED = 127, 255
_LEAST = 2  # the code of a positive entry of a mean of squares that is smaller: its root is the least level of a mean
_TINY = torch.finfo(torch.float32).tiny


@pytree_dataclass
class Quantized:
    """Eight bits for each entry: int8 codes of a mean, or uint8 codes of a mean of squares, in the param's shape.

    `scales` are float32 [rows, blocks in a row]: the largest magnitude in each block.
    """

    codes: Tensor
    scales: Tensor = row_of_param_field()


def blocks(row: int) -> tuple[int, int]:
    """The number of blocks in a row of `row` entries, and the size of each but the last, which may be smaller.

    >>> blocks(256), blocks(300)
    ((1, 256), (2, 150))
    """
    count = max(1, -(-row // BLOCK))
    return count, -(-row // count)


def quantized_zeros(p: Tensor, signed: bool) -> Quantized:
    """Zeros in the shape of `p`, which has dims."""
    codes = torch.zeros(p.shape, dtype=torch.int8 if signed else torch.uint8, device=p.device)
    return Quantized(codes, torch.zeros(p.shape[0], blocks(_width(p))[0], device=p.device))


def dequantize(leaf: Quantized) -> Tensor:
    """The entries in float32."""
    if leaf.codes.dtype == torch.int8:
        levels = leaf.codes.to(torch.float32).mul_(1 / _SIGNED)
        levels = levels * levels.abs()
    else:
        levels = _fourth_power(leaf.codes.to(torch.float32).mul_(1 / _UNSIGNED))
    return _in_shape(_in_blocks(levels) * leaf.scales.unsqueeze(-1), levels)


def quantize(x: Tensor, noise: Tensor, signed: bool) -> Quantized:
    """`x` rounded to one of the two levels next to it, by the 16 bits of `noise` for each entry."""
    x = x.to(torch.float32)
    rows = _in_blocks(x)
    scales = rows.abs().amax(-1) if signed else rows.amax(-1)
    ratios = _in_shape(rows / scales.clamp(min=_TINY).unsqueeze(-1), x)
    share = noise.to(torch.float32).add_(0.5).mul_(2.0**-16)
    return Quantized(_signed_codes(ratios, share) if signed else _unsigned_codes(ratios, share), scales)


def _signed_codes(ratios: Tensor, share: Tensor) -> Tensor:
    exact = ratios.abs().mul_(_SIGNED**2)
    low = exact.sqrt().floor_()
    above = exact.sub_(low * low).div_(low * 2 + 1)  # where between the two levels: in [0, 1), up to rounding
    codes = (above + share).floor_() + low
    return torch.copysign(codes.clamp(max=_SIGNED), ratios).to(torch.int8)


def _unsigned_codes(ratios: Tensor, share: Tensor) -> Tensor:
    low = ratios.sqrt().sqrt_().mul_(_UNSIGNED).floor_()
    level = _fourth_power(low)
    above = (ratios * float(_UNSIGNED**4)).sub_(level).div_(_fourth_power(low + 1).sub_(level))
    codes = (above + share).floor_() + low
    # An entry that has never had a gradient stays zero.
    return (codes.clamp(_LEAST, _UNSIGNED) * ratios.sign()).to(torch.uint8)


def _fourth_power(x: Tensor) -> Tensor:
    square = x * x
    return square * square


def _width(x: Tensor) -> int:
    """The number of entries in a row."""
    return math.prod(x.shape[1:])


def _in_blocks(x: Tensor) -> Tensor:
    """`x` as [rows, blocks, entries of a block], with zeros at the end of each row."""
    width = _width(x)
    count, size = blocks(width)
    rows = x.reshape(x.shape[0], width)
    if count * size > width:
        rows = F.pad(rows, (0, count * size - width))
    return rows.reshape(x.shape[0], count, size)


def _in_shape(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_in_blocks`."""
    width = _width(like)
    flat = rows.flatten(1)
    return (flat if flat.shape[1] == width else flat[:, :width]).reshape(like.shape)


def round_to_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """`x` rounded to one of the two bfloat16 numbers next to it, by the 16 bits of `noise` for each entry.

    These are the upper half of a float32, so adding the noise to the lower half carries with the right probability.
    """
    x = x.to(torch.float32)
    carried = bit_cast((bit_cast(x, torch.int32) + noise).bitwise_and_(-(1 << 16)), torch.float32)
    return torch.where(x.isnan(), x, carried).to(torch.bfloat16)
