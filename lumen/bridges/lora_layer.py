"""Layers with an adapter, whose weight may be quantized: their classes, with and without it.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.bridges.quantized_layer import Quantized, restore
from lumen.core import _torch_compat

NAMES = ("lora_a", "lora_b")


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

    def reset_parameters(self) -> None:
        """Reset the layer as its class does, and its adapter to a zero update."""
        reset = getattr(super(), "reset_parameters", None)
        if reset is not None:
            reset()
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Reset the adapter to a zero update: `lora_a` uniform from torch's generator, `lora_b` 0."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

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


def merge(layer: nn.Module) -> None:
    """Give a layer that was adapted or quantized its plain weight and class."""
    kind: Any = type(layer)
    if isinstance(layer, Quantized):
        restore(layer)
    if isinstance(layer, Lora):
        _add_delta(layer)
    layer.__class__ = plain_class(kind)


def _add_delta(layer: Lora) -> None:
    weight = _torch_compat.own_params(layer)["weight"]
    assert weight is not None
    merged_weight = (weight + layer.delta().to(torch.promote_types(weight.dtype, layer.lora_a.dtype))).to(weight.dtype)
    _torch_compat.own_params(layer)["weight"] = nn.Parameter(merged_weight, requires_grad=False)
    remove_adapter(layer)


def remove_adapter(layer: Lora) -> None:
    """Remove the adapter of a layer, whose class is left to the caller."""
    for name in NAMES:
        del _torch_compat.own_params(layer)[name]
    del layer.scale
