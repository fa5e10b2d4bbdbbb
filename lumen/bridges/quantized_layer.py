"""Linear layers with a quantized weight, which is kept as plain tensors and rebuilt where it is used."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.bridges import nf4
from lumen.core import _torch_compat


class Form(NamedTuple):
    """How a weight is rebuilt: the `names` of its tensors, and the `kind` of torchao's tensor with its `attributes`.

    The kind of NF4 is None: its attributes are the weight's shape and dtype.
    """

    kind: Any
    names: tuple[str, ...]
    attributes: Mapping[str, Any]

    def tensor(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] as torchao multiplies with it, for inputs of this dtype."""
        named = dict(zip((name.removeprefix("weight_") for name in self.names), tensors, strict=True))
        if self.kind is None:
            return nf4.unpack(named, self.attributes["shape"], dtype)
        weight: Any = self.kind.__tensor_unflatten__(named, {**self.attributes, "dtype": dtype}, None, None)
        if dtype == torch.float16:  # torchao's int8 product would overflow, and its scales underflow
            return weight.dequantize(torch.float32).to(dtype)  # type: ignore[no-any-return]
        return weight  # type: ignore[no-any-return]

    def dequantized(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight as a plain tensor."""
        weight: Any = self.tensor(tensors, dtype)
        return weight if type(weight) is Tensor else weight.dequantize().to(dtype)


class _Product(torch.autograd.Function):
    """`x @ weight.T`, which saves the quantized weight for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, form: Form, *tensors: Tensor) -> Tensor:
        return F.linear(x, form.tensor(tensors, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.form, *tensors = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        x_grad = grad @ ctx.form.dequantized(
            tensors, grad.dtype
        )  # autocast may have computed in another dtype than x's
        return x_grad.to(ctx.dtype), None, *[None] * len(tensors)


class Quantized(nn.Module):
    """The forward of a layer with a quantized weight, which has no gradient."""

    _form: Form
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs]: a torchao tensor, or of NF4 the rebuilt weight."""
        return self._form.tensor(self._tensors(), self._form.attributes["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        tensors = self._tensors()
        if not (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self._form.tensor(tensors, x.dtype), self.bias)
        output: Tensor = _Product.apply(x, self._form, *tensors)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._form.names]


@functools.cache
def quantized_class(kind: Any) -> type[nn.Module]:
    """The class `kind` of a linear layer, with a quantized weight."""
    return type(f"Quantized{kind.__name__}", (Quantized, kind), {"__doc__": f"A quantized {kind.__name__}."})


def restore(layer: Quantized) -> None:
    """Give a layer its weight back, as its codes have it, in the dtype that it had; its class is left to the caller."""
    form = layer._form
    replace_weight(layer, form.dequantized(layer._tensors(), form.attributes["dtype"]))


def replace_weight(layer: Quantized, weight: Tensor) -> None:
    """Give a layer a plain weight in place of its codes; its class is left to the caller."""
    for name in layer._form.names:
        del _torch_compat.own_buffers(layer)[name]
    del layer._form
    _torch_compat.own_params(layer)["weight"] = nn.Parameter(weight, requires_grad=False)
