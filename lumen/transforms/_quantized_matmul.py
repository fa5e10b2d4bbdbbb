"""`lm.quantized_matmul`: train with linear layers in int8 or fp8, or with their weights as they will be quantized."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.step import StepFn, Transform
from lumen.errors import HyperparameterError, StepError
from lumen.transforms._support.torchao import Layers, capability, check_kind, chosen, row_scales, torchao
from lumen.transforms._support.unapplied import applying

KINDS = ("int8", "fp8", "qat")
_FP8_BLOCK = 16  # the sizes that a GPU's fp8 products come in
_FP8_CAPABILITY = (8, 9)


class quantized_matmul(Transform):
    """Compute the linear layers in eight bits while training; params, grads and optimizer state stay as they are.

    - `"int8"`: the three matrix products of a layer (its output and both gradients) in int8, inputs scaled by rows
      when they arrive (torchao's int8 mixed precision). On the CPU, and on CUDA devices through Triton.
    - `"fp8"`: the same in float8 with a scale for each tensor (`torchao.float8`). On CUDA devices of capability 8.9 and
      above; `emulate=True` computes the same roundings in wider types, on any device, for trying it out.
    - `"qat"`: quantization-aware training. The forward pass sees each weight as `lm.quantize(state, "int8")` would keep
      it, the gradient passes through unchanged, so the model learns what survives quantizing. On any device.

    `layers` chooses among the `nn.Linear` of the model: globs or regular expressions over their names, one or several,
    or a predicate `(name, module) -> bool`; by default all that can be. Under "fp8" those whose sizes are not multiples
    of 16 cannot. Inside `lm.precision("bf16")` the layers are given bfloat16, and answer in it.

    The Runner validates in the params' own precision; to measure the quantized model, give it `lm.quantize(state)`.

    Declared change: the rounding of eight bits, in products ("int8", "fp8") or weights ("qat").

    Raises:
        HyperparameterError: another kind; a device that cannot compute it, with what can.
        ParamsError: a layer that cannot be quantized was named. `PatternError`: a pattern that matches none.
        StepError: under `torch.func`: `lm.dp_sgd`, `lm.ensemble`, nested derivatives.
        ImportError: torchao is missing.

    >>> import lumen as lm
    >>> lm.quantized_matmul("int8", layers="blocks.*")
    lm.quantized_matmul('int8', layers='blocks.*')
    """

    name = "quantized_matmul"
    level = "quantized_matmul"
    reason = "what it rounds is what a layer is given, in the dtype that precision gives it"

    def __init__(self, kind: str = "int8", *, layers: Layers | None = None, emulate: bool = False) -> None:
        check_kind("quantized_matmul", kind, KINDS)
        if emulate and kind != "fp8":
            raise HyperparameterError(
                f"quantized({kind!r}, emulate=True): only fp8 needs emulating. Write lm.quantized_matmul({kind!r})."
            )
        self.kind = kind
        self.layers = tuple(layers) if isinstance(layers, list) else layers
        self.emulate = emulate

    def _canonical(self) -> Mapping[str, Any]:
        return {"layers": self.layers}

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its linear layers computed so."""
        return applying(self, step, self._apply)

    def _apply(self, next: Next, call: ApplyCall) -> Any:
        for tensor in itertools.islice(itertools.chain(call.params.values(), call.buffers.values()), 1):
            check_device(self.kind, tensor.device, emulate=self.emulate)
        target = call.target.variant(("quantized_matmul", self.kind, self.layers, self.emulate), self._patch)
        return next(call.replace(target=target))

    def _patch(self, module: nn.Module) -> None:
        for layer in chosen(module, self.layers, multiple=_FP8_BLOCK if self.kind == "fp8" else 1).values():
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
            f"quantized_matmul('int8') runs on the CPU and on CUDA devices, and the params are on {device.type}."
            " Write lm.quantized_matmul('qat'), or lm.precision('bf16')."
        )
    # torchao decides at import: where there is a GPU with Triton, its kernel, which knows GPUs alone.
    triton = _int8_module().scaled_int8_mm.__module__.endswith(".int8_mm")
    if triton and device.type == "cpu":
        raise HyperparameterError(
            "quantized_matmul('int8') computes on this machine's GPU, and the params are on the CPU. Move the module"
            " before: net.cuda(); or hide the GPU: CUDA_VISIBLE_DEVICES='' python ..."
        )
    if not triton and device.type == "cuda":
        raise HyperparameterError(
            "quantized_matmul('int8') on a GPU needs Triton: pip install triton. Or write lm.quantized_matmul('qat')."
        )


def _check_fp8(device: torch.device) -> None:
    able = capability(device)
    if able is None or able < _FP8_CAPABILITY:
        where = device.type if able is None else f"a GPU of compute capability {able[0]}.{able[1]}"
        raise HyperparameterError(
            f"quantized_matmul('fp8') needs a CUDA GPU of compute capability 8.9 or above, and the params are on"
            f" {where}. Write lm.quantized_matmul('int8') or lm.precision('bf16'); or, to see what fp8's rounding does,"
            " lm.quantized_matmul('fp8', emulate=True)."
        )


def _int8_module() -> Any:
    return torchao("prototype.quantized_training.int8_mixed_precision")


def _check_plain() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise StepError(
            "a layer under lm.quantized_matmul(...) cannot run under torch.func, as within lm.dp_sgd, lm.ensemble or a"
            " nested derivative: torchao's functions have no rule for it. Leave lm.quantized_matmul out there."
        )


class _Product:
    """The forward of a linear layer by one of torchao's, whose autograd functions reshape by views alone."""

    def __init__(self, layer: nn.Linear, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        _check_plain()
        with _cast_as_autocast_does(self._layer, x.device.type) as dtype:
            output = self._forward(self._layer, x.to(dtype or x.dtype).contiguous())
        return _ContiguousGrad.apply(output)  # type: ignore[no-any-return, no-untyped-call]


@contextlib.contextmanager
def _cast_as_autocast_does(layer: nn.Linear, device: str) -> Iterator[torch.dtype | None]:
    """The layer's params in the dtype that autocast gives a product, where it is on: torchao's function has no rule."""
    if not torch.is_autocast_enabled(device):
        yield None
        return
    table: dict[str, Any] = layer._parameters
    dtype, before = torch.get_autocast_dtype(device), dict(table)
    try:
        table.update({name: p if p is None else p.to(dtype) for name, p in before.items()})
        yield dtype
    finally:
        table.update(before)


class _ContiguousGrad(torch.autograd.Function):
    """The identity, whose gradient comes in rows: that of a mean or a transposed view does not."""

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
    # Rows that do not fill a block, in the product that gives the weight's gradient, are padded.
    config = torchao("float8").Float8LinearConfig(emulate=emulate, pad_inner_dim=not emulate)
    converted = kind.from_float(layer, config)
    layer.config, layer.linear_mm_config = converted.config, converted.linear_mm_config
    return _Product(layer, kind.forward)


class _FakeQuantized:
    """The forward of a linear layer with its weight as `lm.quantize` would keep it."""

    def __init__(self, layer: nn.Linear, _emulate: bool) -> None:
        self._layer = layer
        self._kind = torchao("quantization").Int8Tensor
        self._rows = torchao("quantization").PerRow()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        _check_plain()
        weight = self._layer.weight
        weight_values = weight.detach()
        scales = row_scales(weight_values)
        packed = self._kind.from_hp(weight_values.float() / scales, self._rows)
        rounded = (packed.dequantize(torch.float32) * scales).to(weight_values.dtype)
        # Adding an exact zero keeps the rounded numbers bit for bit, and gives the weight their gradient.
        return F.linear(x, rounded + (weight - weight_values), self._layer.bias)


_FORWARDS: dict[str, Callable[[nn.Linear, bool], Callable[[Tensor], Tensor]]] = {
    "int8": _int8,
    "fp8": _fp8,
    "qat": _FakeQuantized,
}
