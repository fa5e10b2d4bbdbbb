"""`lm.quantized_matmul`: train linear layers in int8 or fp8, or for later quantization."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.step import StepFn, Transform
from lumen.errors import HyperparameterError, StepError
from lumen.transforms._support.torchao import Layers, capability, check_kind, quantizable_layers, row_scales, torchao
from lumen.transforms._support.unapplied import with_apply_rule

KINDS = ("int8", "fp8", "qat")
_FP8_BLOCK = 16  # sizes of fp8 matrix products on GPUs are multiples of it
_FP8_CAPABILITY = (8, 9)


class quantized_matmul(Transform):
    """Compute linear layers in 8 bits while training; params, grads and optimizer state keep their dtypes.

    - `"int8"`: a layer's three matrix products (output and both gradients) in int8, with inputs scaled dynamically per
      row (torchao's int8 mixed precision). Runs on the CPU, and on CUDA devices through Triton.
    - `"fp8"`: the same in float8, with one scale per tensor (`torchao.float8`). Runs on CUDA devices of compute
      capability 8.9 and above. For experiments, `emulate=True` rounds in the same way in wider dtypes, on any device.
    - `"qat"`: quantization-aware training. The forward pass uses each weight as `lm.quantize(state, "int8")` would
      store it, and the gradient passes through unchanged, so the model adapts to quantization. Runs on any device.

    `layers` selects `nn.Linear` layers: one or several globs or regular expressions over their names, or a predicate
    `(name, module) -> bool`; by default, all that can be quantized. "fp8" needs sizes that are multiples of 16. Inside
    `lm.precision("bf16")`, inputs and outputs of the layers are bfloat16.

    The Runner validates in the params' own precision; to measure the quantized model, pass it `lm.quantize(state)`.

    Declared change: 8-bit rounding, of products ("int8", "fp8") or of weights ("qat").

    Raises:
        HyperparameterError: the kind is unknown, or the device does not support it.
        ParamsError: a selected layer cannot be quantized. `PatternError`: a pattern matches no layer.
        StepError: it runs under `torch.func`, as inside `lm.dp_sgd`, `lm.ensemble` and nested derivatives.
        ImportError: torchao is missing.

    >>> import lumen as lm
    >>> lm.quantized_matmul("int8", layers="blocks.*")
    lm.quantized_matmul('int8', layers='blocks.*')
    """

    name = "quantized_matmul"
    level = "quantized_matmul"
    reason = "quantized_matmul rounds the inputs of a layer after precision has cast them"

    def __init__(self, kind: str = "int8", *, layers: Layers | None = None, emulate: bool = False) -> None:
        check_kind("quantized_matmul", kind, KINDS)
        if emulate and kind != "fp8":
            raise HyperparameterError(
                f"quantized_matmul({kind!r}, emulate=True): only fp8 needs emulating."
                f" Write lm.quantized_matmul({kind!r})."
            )
        self.kind = kind
        self.layers = tuple(layers) if isinstance(layers, list) else layers
        self.emulate = emulate

    def _canonical(self) -> Mapping[str, Any]:
        return {"layers": self.layers}

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its linear layers computed in 8 bits."""
        return with_apply_rule(self, step, self._apply)

    def _apply(self, next: Next, call: ApplyCall) -> Any:
        for tensor in itertools.islice(itertools.chain(call.params.values(), call.buffers.values()), 1):
            check_device(self.kind, tensor.device, emulate=self.emulate)
        target = call.target.variant(("quantized_matmul", self.kind, self.layers, self.emulate), self._patch)
        return next(call.replace(target=target))

    def _patch(self, module: nn.Module) -> None:
        for layer in quantizable_layers(module, self.layers, multiple=_FP8_BLOCK if self.kind == "fp8" else 1).values():
            layer.forward = _FORWARDS[self.kind](layer, self.emulate)  # type: ignore[assignment, method-assign]


def check_device(kind: str, device: torch.device, *, emulate: bool = False) -> None:
    """Raise `HyperparameterError` unless torchao can train in `kind` on `device`.

    >>> import torch
    >>> check_device("qat", torch.device("cpu"))
    """
    if kind == "int8":
        _check_int8(device)
    if kind == "fp8" and not emulate and device.type != "meta":
        _check_fp8(device)


def _check_int8(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda", "meta"):
        raise HyperparameterError(
            f"quantized_matmul('int8') runs on the CPU and on CUDA devices, but the params are on {device.type}."
            " Write lm.quantized_matmul('qat'), or lm.precision('bf16')."
        )
    # torchao chooses its kernel at import. If there is a GPU and Triton, it is one that runs on GPUs only.
    uses_triton = _int8_module().scaled_int8_mm.__module__.endswith(".int8_mm")
    if uses_triton and device.type == "cpu":
        raise HyperparameterError(
            "quantized_matmul('int8') computes on this machine's GPU, but the params are on the CPU. Move the module to"
            " the GPU first: net.cuda(); or hide the GPU: CUDA_VISIBLE_DEVICES='' python ..."
        )
    if not uses_triton and device.type == "cuda":
        raise HyperparameterError(
            "quantized_matmul('int8') on a GPU needs Triton: pip install triton. Or write lm.quantized_matmul('qat')."
        )


def _check_fp8(device: torch.device) -> None:
    actual = capability(device)
    if actual is None or actual < _FP8_CAPABILITY:
        location = device.type if actual is None else f"a GPU of compute capability {actual[0]}.{actual[1]}"
        raise HyperparameterError(
            f"quantized_matmul('fp8') needs a CUDA GPU of compute capability 8.9 or above, but the params are on"
            f" {location}. Write lm.quantized_matmul('int8') or lm.precision('bf16'); or, to try out fp8's rounding,"
            " lm.quantized_matmul('fp8', emulate=True)."
        )


def _int8_module() -> Any:
    return torchao("prototype.quantized_training.int8_mixed_precision")


def _check_no_functorch() -> None:
    if _torch_compat.peek_interpreter_stack() is not None:
        raise StepError(
            "lm.quantized_matmul(...) does not work under torch.func, as inside lm.dp_sgd, lm.ensemble or a nested"
            " derivative: torchao's functions do not support it. Leave lm.quantized_matmul out."
        )


class _Product:
    """Replaces the forward of a linear layer by one of torchao's, whose autograd functions need contiguous tensors."""

    def __init__(self, layer: nn.Linear, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        _check_no_functorch()
        with _cast_as_autocast_does(self._layer, x.device.type) as dtype:
            output = self._forward(self._layer, x.to(dtype or x.dtype).contiguous())
        return _ContiguousGrad.apply(output)  # type: ignore[no-any-return, no-untyped-call]


@contextlib.contextmanager
def _cast_as_autocast_does(layer: nn.Linear, device: str) -> Iterator[torch.dtype | None]:
    """Cast the layer's params as autocast does, if it is on: autocast does not know torchao's functions."""
    if not torch.is_autocast_enabled(device):
        yield None
        return
    table: dict[str, Any] = _torch_compat.own_params(layer)
    dtype, originals = torch.get_autocast_dtype(device), dict(table)
    try:
        table.update({name: p if p is None else p.to(dtype) for name, p in originals.items()})
        yield dtype
    finally:
        table.update(originals)


class _ContiguousGrad(torch.autograd.Function):
    """The identity with a contiguous gradient, unlike that of a mean or of a transposed view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _int8(layer: nn.Linear, _emulate: bool) -> _Product:
    module = _int8_module()
    layer.config = module.Int8MixedPrecisionTrainingConfig()
    return _Product(layer, module.Int8MixedPrecisionTrainingLinear.forward)


def _fp8(layer: nn.Linear, emulate: bool) -> _Product:
    kind = torchao("float8.float8_linear").Float8Linear
    # Pads rows that do not fill a block in the product for the weight's gradient.
    config = torchao("float8").Float8LinearConfig(emulate=emulate, pad_inner_dim=not emulate)
    converted = kind.from_float(layer, config)
    layer.config, layer.linear_mm_config = converted.config, converted.linear_mm_config
    return _Product(layer, kind.forward)


class _FakeQuantized:
    """Replaces the forward of a linear layer by one with its weight as `lm.quantize` would store it."""

    def __init__(self, layer: nn.Linear, _emulate: bool) -> None:
        self._layer = layer
        self._kind = torchao("quantization").Int8Tensor
        self._rows = torchao("quantization").PerRow()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        _check_no_functorch()
        weight = self._layer.weight
        weight_values = weight.detach()
        scales = row_scales(weight_values)
        packed = self._kind.from_hp(weight_values.float() / scales, self._rows)
        rounded = (packed.dequantize(torch.float32) * scales).to(weight_values.dtype)
        # Adding an exact zero keeps the rounded values bit for bit and passes their gradient to the weight.
        return F.linear(x, rounded + (weight - weight_values), self._layer.bias)


_FORWARDS: dict[str, Callable[[nn.Linear, bool], Callable[[Tensor], Tensor]]] = {
    "int8": _int8,
    "fp8": _fp8,
    "qat": _FakeQuantized,
}
