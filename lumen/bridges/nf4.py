"""NF4: weights in 4 bits, whose 16 levels are quantiles of a normal distribution (Dettmers et al. 2023, QLoRA).

A block of 64 entries has the level nearest to each of them, relative to the block's largest magnitude. The magnitudes
are quantized once more, to int8 relative to their mean, in blocks of up to 256 ("double quantization"). The tensors
are those of torchao's `NF4Tensor` of a float32 weight, and have its names. With N entries:

    quantized_data       uint8   [N / 2]          two levels each, the first in the high bits
    quantized_scalers    int8    [N / 64]         the blocks' magnitudes
    quantization_factor  float32 [N / 64 / 256]   of the magnitudes' blocks
    scaler_mean          float32 []               of the magnitudes
    nf4                  float32 [16]             the levels
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen.errors import ParamsError
from lumen.transforms._support.torchao import torchao

BLOCK = 64
_SCALE_BLOCK = 256
_ZERO = 7 << 4 | 7  # the code of two zeros


def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The codes and scales of `weight`, whose entries are finite.

    Raises `ParamsError` for a number of entries that blocks of 64 do not divide.
    """
    if weight.numel() % BLOCK:
        raise ParamsError(
            f"{name!r} has {tuple(weight.shape)} = {weight.numel()} entries, and NF4 packs blocks of {BLOCK}. Leave its"
            " layer out: lm.quantize(state, 'nf4', layers=[...]), or write lm.quantize(state, 'int8')."
        )
    blocks = weight.detach().float().reshape(-1, BLOCK)
    zeros = (blocks == 0).all(1, keepdim=True)  # torchao divides a block by its magnitude
    blocks = blocks.masked_fill(zeros, 1.0)
    kind = torchao("quantization").NF4Tensor
    packed = kind.from_tensor(blocks.view(weight.shape), BLOCK, math.gcd(len(blocks), _SCALE_BLOCK))
    factors = packed.quantization_factor
    equal = factors.isinf()  # where all magnitudes are the mean, of which torchao computes 0 / 0
    return {
        "quantized_data": packed.quantized_data.view(len(blocks), -1).masked_fill(zeros, _ZERO).flatten(),
        "quantized_scalers": packed.quantized_scalers.view(len(factors), -1).masked_fill(equal[:, None], 0).flatten(),
        "quantization_factor": factors.masked_fill(equal, 1.0),
        "scaler_mean": packed.scaler_mean,
        "nf4": packed.nf4,
    }


def unpack(tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of this shape and dtype, computed in float32.

    >>> packed = pack("weight", torch.linspace(-1, 1, 64).view(8, 8))
    >>> unpack(packed, (8, 8), torch.float32)[0, :2]
    tensor([-1., -1.])
    """
    factors, levels = tensors["quantization_factor"].float(), tensors["nf4"].float()
    scales = tensors["quantized_scalers"].view(len(factors), -1)
    magnitudes = (scales / factors[:, None]).view(-1, 1) + tensors["scaler_mean"].float()
    pairs = torch.cartesian_prod(levels, levels)
    entries = F.embedding(tensors["quantized_data"].int(), pairs).view(len(magnitudes), BLOCK)
    return (entries * magnitudes).to(dtype).view(*shape)
