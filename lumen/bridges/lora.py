"""LoRA (Hu et al. 2021): freeze a layer's weight, and train a low-rank update of it.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lumen.bridges.bound import module as bound
from lumen.bridges.lora_layer import Lora, lora_class, merge
from lumen.bridges.quantized_layer import Quantized
from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.module import param_slots
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._param_names import Pattern, matching_any
from lumen.parallel.tensor.layout import is_transposed


@checked
def adapt(
    module: nn.Module,
    *,
    targets: Pattern | Sequence[Pattern],
    rank: int = 8,
    alpha: float = 16.0,
    also: Pattern | Sequence[Pattern] = (),
) -> nn.Module:
    """`module` with adapters in the layers that match `targets`, and everything else frozen.

    The result shares its weights with `module`, which is unchanged. Its adapters start as a zero update (`lora_b` is 0,
    `lora_a` uniform from torch's generator), in the weight's dtype, or in float32 for half-precision weights; their
    product is scaled by `alpha / rank`. A state of the result has the adapters as `state.params`, and the frozen
    weights under their own names in `state.buffers`, which `lm.Checkpointer(..., frozen=False)` omits.

    Args:
        module: any module; layers that can be adapted are `nn.Linear` and Hugging Face's `Conv1D`.
        targets: names of layers: globs that match the full name (`"*.q_proj"`) or compiled regular expressions.
        rank: the rank of the update, at least 1.
        alpha: the scale of the update, times rank.
        also: names of parameters to train fully, such as those of a new head, in the same form.

    Raises:
        PatternError: a pattern matches nothing.
        ParamsError: a layer cannot be adapted, or its weight is tied to another layer's.
        HyperparameterError: rank or alpha is out of range.

    Law: before the first update the result equals `module`, and at any time it equals `merged`, up to rounding.

    >>> import lumen as lm, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> adapted = lm.bridges.lora.adapt(net, targets="0", rank=2)
    >>> state = lm.TrainState.create(adapted, lm.optim.adam(1e-3))
    >>> {name: tuple(p.shape) for name, p in state.params.items()}
    {'0.lora_a': (2, 8), '0.lora_b': (8, 2)}
    """
    if rank < 1 or not math.isfinite(alpha) or alpha <= 0:
        raise HyperparameterError(
            f"adapt takes a rank of at least 1 and alpha > 0; got rank={rank!r}, alpha={alpha!r}."
        )
    model = _copy_frozen(module)
    names = [name for name, _ in model.named_modules() if name]
    layers = {name: model.get_submodule(name) for name in matching_any(targets, names, "layer")}
    _check(model, layers)
    parameters = dict(model.named_parameters())
    for name in matching_any(also, list(parameters), "parameter"):
        parameters[name].requires_grad_(True)
    for layer in layers.values():
        _adapt(layer, rank, alpha)
    return model


def merged(state: Any) -> nn.Module:
    """The model of `state` with its adapters merged into the weights: a module of the original class.

    It is in evaluation mode and for reading, like that of `lm.bridges.module`; weights without an adapter share the
    state's memory. Weights that `lm.quantize` rounded are rebuilt. A model without adapters is returned unchanged.

    >>> import lumen as lm, torch
    >>> net = lm.bridges.lora.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), targets="0", rank=2)
    >>> state = lm.TrainState.create(net, lm.optim.adam(1e-3))
    >>> sorted(dict(lm.bridges.lora.merged(state).named_parameters()))
    ['0.bias', '0.weight']
    """
    module = bound(state)
    layers = [*module.modules()]
    if any(isinstance(layer, Lora) for layer in layers):
        for layer in layers:
            merge(layer)
    return module


def _adapt(layer: nn.Module, rank: int, alpha: float) -> None:
    weight: Any = _torch_compat.own_params(layer)["weight"]
    outputs, inputs = reversed(weight.shape) if is_transposed(layer) else weight.shape
    dtype = torch.float32 if weight.dtype.itemsize < torch.float32.itemsize else weight.dtype
    layer.lora_a = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=weight.device))
    layer.lora_b = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device=weight.device))
    layer.scale = alpha / rank  # type: ignore[assignment]
    kind: Any = type(layer)
    layer.__class__ = lora_class(kind)
    layer.reset_adapter()  # type: ignore[operator]


def _copy_frozen(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares its memory, with frozen parameters."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


def _check(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    slots = param_slots(module)
    shared = {name for name, count in Counter(name for _, _, name in slots).items() if count > 1}
    owners = {id(_torch_compat.own_params(sub)): prefix for prefix, sub in module.named_modules()}
    tied = {owners[id(table)] for table, _, name in slots if name in shared and id(table) in owners}
    for name, layer in layers.items():
        if isinstance(layer, Quantized):
            raise ParamsError(
                f"the weight of {name!r} is quantized already. Adapt the model first, and quantize its state:"
                " state = lm.quantize(lm.TrainState.create(lora.adapt(net, targets=...), tx), 'nf4')"
            )
        if isinstance(layer, Lora) or not (isinstance(layer, nn.Linear) or is_transposed(layer)):
            raise ParamsError(
                f"{name!r} is a {type(layer).__name__}; adapters support nn.Linear and transformers' Conv1D,"
                " once per layer. Narrow targets, or train the layer fully: adapt(..., also='"
                f"{name}.*')"
            )
        if name in tied:
            raise ParamsError(
                f"the weight of {name!r} is tied to another layer's, so an adapter could not be merged into it without"
                " changing both. Remove it from targets."
            )
