"""Layers with an adapter, whose weight may be quantized: their classes, with and without it.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lumen.bridges.quantized_layer import Quantized


class Lora(nn.Module):
    """The forward of an adapted layer: it adds `scale * B A x` to the output of the layer.

    The layer keeps its name, params and attributes, and gains `lora_a` [R, I] and `lora_b` [O, R].
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        output: Tensor = super().forward(x)
        update = F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return output + (self.scale * update).to(output.dtype)

    def delta(self) -> Tensor:
        """The update that merging adds to the weight, in the weight's own layout."""
        product = self.scale * (self.lora_b @ self.lora_a)
        return product if isinstance(self, nn.Linear) else product.T


@functools.cache
def lora_class(kind: Any) -> type[nn.Module]:
    """The class `kind` of a layer, with an adapter."""
    return type(f"Lora{kind.__name__}", (Lora, kind), {"__doc__": f"An adapted {kind.__name__}."})


def plain_class(kind: Any) -> Any:
    """The class of a layer before it was adapted or quantized."""
    return next(base for base in kind.__mro__ if not issubclass(base, Lora | Quantized))
