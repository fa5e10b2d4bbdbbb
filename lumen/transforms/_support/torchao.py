"""torchao, imported on first use, and the linear layers to quantize."""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.bit_cast import bit_cast
from lumen.core.module import param_slots
from lumen.core.versions import install_extra
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._param_names import Pattern, matching

Layers = Pattern | Sequence[Pattern] | Callable[[str, nn.Module], bool]

# Harmless messages that importing torchao logs: about kernels for other GPUs, and a note to its developers.
_HARMLESS = ("Failed to load ", "%s is an Enum subclass", "Warning: Detected no triton")
_LOGGERS = ("torchao", "torchao.kernel.intmm", "torch.utils._pytree")


@functools.cache
def torchao(module: str) -> Any:
    """The module `torchao.<module>`, imported without torchao's log messages.

    Raises `ImportError`, with the command that installs torchao, if it is missing.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_not_harmless)
    try:
        return importlib.import_module(f"torchao.{module}")
    except ModuleNotFoundError as error:
        if error.name == "torchao":
            raise ImportError(f"quantizing needs torchao: {install_extra('quant')}") from error
        if error.name is not None and error.name.startswith("torchao."):
            raise ImportError(
                f"this torchao has no {error.name}, which Lumen uses: pip install 'torchao==0.18.0'"
            ) from error
        raise
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_harmless)


def _is_not_harmless(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_HARMLESS)


def row_scales(weight: Tensor) -> Tensor:
    """For each row of `weight` [outputs, inputs], a power of two near its largest entry: float32, [outputs, 1].

    Rows divided by these powers, which is exact, quantize equally well at any magnitude. Without them, torchao clamps
    int8 scales at 1.2e-7, divides by a float8 scale of 0 for a row of zeros, and underflows in float16, because it
    computes scales in the dtype of the weight.
    """
    largest = weight.detach().float().abs().amax(1, keepdim=True)
    exponent = bit_cast(largest, torch.int32) & 0xFF << 23  # the exponent field of a float32, with a fraction of 0
    # A normal number, whose inverse is normal too.
    return bit_cast(exponent.clamp(1 << 23, 253 << 23), torch.float32)


def check_kind(function: str, kind: object, kinds: Sequence[str]) -> None:
    """Raise `HyperparameterError` for an unknown kind."""
    if kind not in kinds:
        raise HyperparameterError(f"{function}({kind!r}) is unknown; give one of {', '.join(map(repr, kinds))}.")


def quantizable_layers(
    module: nn.Module,
    layers: Layers | None,
    *,
    multiple: int = 1,
    untied: bool = False,
    forwards: Collection[Any] = (nn.Linear.forward,),
) -> dict[str, nn.Linear]:
    """The linear layers of `module` that `layers` selects, by name; by default, all that can be quantized.

    Globs and regular expressions are matched against the names of linear layers, and each must match at least one; a
    predicate may select none. Selecting a layer that cannot be quantized is an error; by default such layers are
    skipped. Among other things, sizes that are not multiples of `multiple` rule a layer out, as does a shared weight
    with `untied`, and a class whose forward is none of `forwards`.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if not linear and not callable(layers):
        raise ParamsError(
            f"{type(module).__name__} has no nn.Linear layers, and only those can be quantized. Leave quantization out"
            " for this model."
        )
    selected = _select(linear, layers)
    tied = _tied(module) if untied else set()
    obstacles = {name: _obstacle(layer, id(layer) in tied, multiple, forwards) for name, layer in selected.items()}
    quantizable = {name: layer for name, layer in selected.items() if obstacles[name] is None}
    reasons = [f"{_layer_text(name)} {why}" for name, why in obstacles.items() if why is not None]
    if reasons and layers is not None:
        raise ParamsError(f"{'; '.join(reasons[:4])}. Exclude such layers: list only the others in layers=[...].")
    if not quantizable and layers is None:
        raise ParamsError(f"no layer of {type(module).__name__} can be quantized: {'; '.join(reasons[:4])}.")
    return quantizable


def _select(linear: dict[str, nn.Linear], layers: Layers | None) -> dict[str, nn.Linear]:
    if layers is None:
        return linear
    if callable(layers):
        return {name: layer for name, layer in linear.items() if layers(name, layer)}
    patterns = layers if isinstance(layers, list | tuple) else (layers,)
    matches = [matching(pattern, list(linear), "linear layer") for pattern in patterns]
    return {name: layer for (name, layer), *hits in zip(linear.items(), *matches, strict=True) if any(hits)}


def _obstacle(layer: nn.Linear, tied: bool, multiple: int, forwards: Collection[Any]) -> str | None:
    """Why a layer cannot be quantized; None if it can."""
    kind = type(layer)
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to an nn.MultiheadAttention, which uses its weight without calling it"
    if _torch_compat.own_params(layer).get("weight") is None:
        return "has no param named 'weight'"
    if kind.forward not in forwards:
        return f"is a {kind.__name__}, which overrides forward"
    if "forward" in layer.__dict__:
        return "has its forward replaced by another transform (such as tensor_parallel)"
    if tied:
        return "shares its weight with another layer"
    if layer.in_features < 2:
        return "has a single input feature, so quantizing it would save nothing"
    if layer.in_features % multiple or layer.out_features % multiple:
        return f"is {layer.in_features} by {layer.out_features}, but both sizes must be multiples of {multiple}"
    return None


def _tied(module: nn.Module) -> set[int]:
    """The ids of layers that share their weight."""
    slots = param_slots(module)
    uses = Counter(name for _, _, name in slots)
    tables = {id(table) for table, key, name in slots if key == "weight" and uses[name] > 1}
    return {id(submodule) for submodule in module.modules() if id(_torch_compat.own_params(submodule)) in tables}


def _layer_text(name: str) -> str:
    return f"the layer {name!r}" if name else "the model itself"


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
