"""Layers as they were before they were adapted or quantized: on the meta device, and one weight at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lumen.bridges.lora_layer import NAMES, Lora, merge, plain_class, remove_adapter
from lumen.bridges.quantized_layer import Quantized, replace_weight
from lumen.core import _torch_compat
from lumen.core.module import skeleton_of


def is_changed(layer: nn.Module) -> bool:
    """Whether a layer has an adapter or a quantized weight."""
    return isinstance(layer, Lora | Quantized)


def own_keys(layer: Any) -> list[str]:
    """The tensors of such a layer from which its weight is made."""
    weight = layer._form.names if isinstance(layer, Quantized) else ("weight",)
    return [*weight, *(NAMES if isinstance(layer, Lora) else ())]


def merged_weight(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight of such a layer, made from `tensors` instead of its own, which may have no memory."""
    layer = copy.deepcopy(layer)
    for key, tensor in tensors.items():
        params, buffers = _torch_compat.own_params(layer), _torch_compat.own_buffers(layer)
        (params if key in params else buffers)[key] = tensor
    merge(layer)
    weight = _torch_compat.own_params(layer)["weight"]
    assert weight is not None
    detached: Tensor = weight.detach()
    return detached


def plain_skeleton(module: nn.Module) -> nn.Module:
    """`module`, on the meta device, with its layers as they were before they were adapted or quantized."""
    plain = skeleton_of(module)
    for layer in plain.modules():
        if isinstance(layer, Quantized):
            linear: Any = layer
            shape, dtype = (linear.out_features, linear.in_features), layer._form.attributes["dtype"]
            replace_weight(layer, torch.empty(shape, dtype=dtype, device="meta"))
        if isinstance(layer, Lora):
            remove_adapter(layer)
        layer.__class__ = plain_class(type(layer))
    return plain
