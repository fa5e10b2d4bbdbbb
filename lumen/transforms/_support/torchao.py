"""torchao, imported when it is first needed, and the linear layers that it is to work on."""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core.module import param_slots
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._param_names import Pattern, matching

Layers = Pattern | Sequence[Pattern] | Callable[[str, nn.Module], bool]

# What importing torchao logs on a machine that works: kernels for GPUs that are not there, and a note to its authors.
_CHATTER = ("Failed to load ", "%s is an Enum subclass", "Warning: Detected no triton")
_LOGGERS = ("torchao", "torchao.kernel.intmm", "torch.utils._pytree")


@functools.cache
def torchao(module: str) -> Any:
    """A module of torchao, by its name inside it, imported without what torchao logs meanwhile.

    Raises `ImportError` with the line to install it, where it is not there.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_not_chatter)
    try:
        return importlib.import_module(f"torchao.{module}")
    except ModuleNotFoundError as error:
        if error.name == "torchao":
            raise ImportError("quantizing needs torchao: pip install 'lumen-torch[quant]'") from error
        if error.name is not None and error.name.startswith("torchao."):
            raise ImportError(
                f"this torchao has no {error.name}, which Lumen uses: pip install 'torchao==0.18.0'"
            ) from error
        raise
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_chatter)


def _is_not_chatter(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CHATTER)


def row_scales(weight: Tensor) -> Tensor:
    """For each row of `weight` [outputs, inputs] a power of two near its largest entry: float32, [outputs, 1].

    torchao's int8 scales are no smaller than 1.2e-7, its float8 scale of a row of zeros is 0, by which it divides, and
    it computes scales in the dtype of the weight, where those of float16 underflow. Rows divided by these powers, which
    is exact, are quantized alike at every size.
    """
    largest = weight.detach().float().abs().amax(1, keepdim=True)
    exponent = largest.view(torch.int32) & 0xFF << 23  # its field in a float32, the fraction being 0
    return exponent.clamp(1 << 23, 253 << 23).view(torch.float32)  # a normal number, and so is its inverse


def check_kind(what: str, kind: object, kinds: Sequence[str]) -> None:
    """Raise `HyperparameterError` for a kind that there is not."""
    if kind not in kinds:
        raise HyperparameterError(f"{what}({kind!r}) is unknown; give one of {', '.join(map(repr, kinds))}.")


def chosen(
    module: nn.Module, layers: Layers | None, *, multiple: int = 1, untied: bool = False
) -> dict[str, nn.Linear]:
    """The linear layers of `module` that `layers` names, or all that can be quantized, by their names.

    Globs and regular expressions are asked about the names of linear layers alone, and each must match one; a predicate
    may choose none. A layer that is chosen and cannot be quantized is an error; where `layers` is None it stays as it
    is. Sizes that are not multiples of `multiple` cannot be, nor where the answer is to be `untied` weights that stand
    in several places.
    """
    linear = {name: module_in for name, module_in in module.named_modules() if isinstance(module_in, nn.Linear)}
    if not linear and not callable(layers):
        raise ParamsError(
            f"{type(module).__name__} has no nn.Linear, the layers that can be quantized. Leave its params as they are."
        )
    picked = _picked(linear, layers)
    tied = _tied(module) if untied else set()
    refused = {name: _refusal(layer, id(layer) in tied, multiple) for name, layer in picked.items()}
    quantizable = {name: layer for name, layer in picked.items() if refused[name] is None}
    reasons = [f"{_layer_text(name)} {why}" for name, why in refused.items() if why is not None]
    if reasons and layers is not None:
        raise ParamsError(f"{'; '.join(reasons[:4])}. Leave such layers out: name the others in layers=[...].")
    if not quantizable and layers is None:
        raise ParamsError(f"no layer of {type(module).__name__} can be quantized: {'; '.join(reasons[:4])}.")
    return quantizable


def _picked(linear: dict[str, nn.Linear], layers: Layers | None) -> dict[str, nn.Linear]:
    if layers is None:
        return linear
    if callable(layers):
        return {name: layer for name, layer in linear.items() if layers(name, layer)}
    patterns = layers if isinstance(layers, list | tuple) else (layers,)
    rows = [matching(pattern, list(linear), "linear layer") for pattern in patterns]
    return {name: layer for (name, layer), *hits in zip(linear.items(), *rows, strict=True) if any(hits)}


def _refusal(layer: nn.Linear, tied: bool, multiple: int) -> str | None:
    """Why a layer cannot be quantized; None where it can."""
    kind = type(layer)
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to an nn.MultiheadAttention, which multiplies with its weight by itself"
    if layer._parameters.get("weight") is None:
        return "keeps its weight elsewhere than under the name 'weight'"
    if kind.forward is not nn.Linear.forward:
        return f"is a {kind.__name__}, with a forward of its own"
    if "forward" in layer.__dict__:
        return "is run by another transform in its own way (a part under tensor_parallel, say)"
    if tied:
        return "shares its weight with another layer"
    if layer.in_features < 2:
        return "has a single input, which leaves nothing to gain"
    if layer.in_features % multiple or layer.out_features % multiple:
        return f"is {layer.in_features} by {layer.out_features}, which are not both multiples of {multiple}"
    return None


def _tied(module: nn.Module) -> set[int]:
    """The ids of layers whose weight stands elsewhere too."""
    slots = param_slots(module)
    times = Counter(name for _, _, name in slots)
    tables = {id(table) for table, key, name in slots if key == "weight" and times[name] > 1}
    return {id(submodule) for submodule in module.modules() if id(submodule._parameters) in tables}


def _layer_text(name: str) -> str:
    return f"the layer {name!r}" if name else "the model itself"


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
