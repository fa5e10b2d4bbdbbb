"""LoRA (Hu et al. 2021): a layer's weight stays, and a product of two thin matrices is trained beside it.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.bridges.bound import module as bound
from lumen.core.module import param_slots
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._param_names import Pattern, matching
from lumen.parallel.tensor.layout import is_transposed

_NAMES = ("lora_a", "lora_b")


class Lora(nn.Module):
    """What an adapted layer does besides its own forward: it adds `scale * B A x`.

    The layer keeps its name, its params and its attributes; beside them it has `lora_a` [R, I] and `lora_b` [O, R].
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        out: Tensor = super().forward(x)
        added = F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return out + (self.scale * added).to(out.dtype)

    def delta(self) -> Tensor:
        """What merging adds to the weight, in the weight's own layout."""
        product = self.scale * (self.lora_b @ self.lora_a)
        return product if isinstance(self, nn.Linear) else product.T


def adapt(
    module: nn.Module,
    *,
    targets: Pattern | Sequence[Pattern],
    rank: int = 8,
    alpha: float = 16.0,
    also: Pattern | Sequence[Pattern] = (),
) -> nn.Module:
    """`module` with adapters in the layers that `targets` match, and everything else frozen.

    The answer shares its weights with `module`, which is left as it is. Its adapters start as a change of zero
    (`lora_b` is 0, `lora_a` uniform from torch's generator), in the weight's dtype, or float32 beside half precision;
    their product counts `alpha / rank`. `state.params` of it are the adapters, `state.buffers` the frozen weights under
    their own names, which `lm.Checkpointer(..., frozen=False)` leaves out.

    Args:
        module: any module; layers that can be adapted are `nn.Linear` and Hugging Face's `Conv1D`.
        targets: names of layers: globs over the whole name (`"*.q_proj"`) or compiled regular expressions.
        rank: columns of one and rows of the other thin matrix, at least 1.
        alpha: the weight of their product, times rank.
        also: names of parameters to train whole, a new head's say, in the same manner.

    Raises:
        PatternError: a pattern that matches nothing.
        ParamsError: a layer that cannot be adapted, or whose weight is tied to another's.
        HyperparameterError: a rank or alpha out of range.

    Law: before the first update it computes what `module` does, and at any time what `merged` gives, up to rounding.

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
    made = _sharing(module)
    names = [name for name, _ in made.named_modules() if name]
    chosen = {name: made.get_submodule(name) for name in _picked(targets, names, "layer")}
    _check(made, chosen)
    parameters = dict(made.named_parameters())
    for name in _picked(also, list(parameters), "parameter"):
        parameters[name].requires_grad_(True)
    for layer in chosen.values():
        _adapt(layer, rank, alpha)
    return made


def merged(state: Any) -> nn.Module:
    """The model of `state` without adapters, their products added to the weights: a module of its first class.

    In evaluation mode, for reading, as `lm.bridges.module` gives it; weights that had no adapter share the state's
    memory. A model without adapters is given as it is.

    >>> import lumen as lm, torch
    >>> net = lm.bridges.lora.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), targets="0", rank=2)
    >>> state = lm.TrainState.create(net, lm.optim.adam(1e-3))
    >>> sorted(dict(lm.bridges.lora.merged(state).named_parameters()))
    ['0.bias', '0.weight']
    """
    module = bound(state)
    for layer in module.modules():
        if isinstance(layer, Lora):
            _merge(layer)
    return module


def _merge(layer: Lora) -> None:
    weight = layer._parameters["weight"]
    assert weight is not None
    whole = (weight + layer.delta().to(torch.promote_types(weight.dtype, layer.lora_a.dtype))).to(weight.dtype)
    layer._parameters["weight"] = nn.Parameter(whole, requires_grad=False)
    for name in _NAMES:
        del layer._parameters[name]
    del layer.scale
    layer.__class__ = type(layer).__mro__[2]


def _adapt(layer: nn.Module, rank: int, alpha: float) -> None:
    weight: Any = layer._parameters["weight"]
    outputs, inputs = reversed(weight.shape) if is_transposed(layer) else weight.shape
    dtype = torch.float32 if weight.dtype.itemsize < torch.float32.itemsize else weight.dtype
    layer.lora_a = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=weight.device))
    layer.lora_b = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=weight.device))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    layer.scale = alpha / rank  # type: ignore[assignment]
    kind: Any = type(layer)
    layer.__class__ = _kind(kind)


@functools.cache
def _kind(kind: Any) -> type[nn.Module]:
    return type(f"Lora{kind.__name__}", (Lora, kind), {"__doc__": f"An adapted {kind.__name__}."})


def _sharing(module: nn.Module) -> nn.Module:
    """A copy of the module tree over the same memory, its parameters frozen."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


def _picked(patterns: Pattern | Sequence[Pattern], names: list[str], what: str) -> list[str]:
    each = patterns if isinstance(patterns, list | tuple) else (patterns,)
    rows = [matching(pattern, names, what) for pattern in each]
    return [name for name, *found in zip(names, *rows, strict=True) if any(found)]


def _check(module: nn.Module, chosen: dict[str, nn.Module]) -> None:
    places = param_slots(module)
    shared = {name for name, count in Counter(name for _, _, name in places).items() if count > 1}
    owners = {id(sub._parameters): prefix for prefix, sub in module.named_modules()}
    tied = {owners[id(table)] for table, _, name in places if name in shared and id(table) in owners}
    for name, layer in chosen.items():
        if isinstance(layer, Lora) or not (isinstance(layer, nn.Linear) or is_transposed(layer)):
            raise ParamsError(
                f"{name!r} is a {type(layer).__name__}; layers that take adapters are nn.Linear and transformers'"
                " Conv1D, each once. Narrow targets, or train it whole: adapt(..., also='"
                f"{name}.*')"
            )
        if name in tied:
            raise ParamsError(
                f"the weight of {name!r} is tied to another layer's, so an adapter could not be merged into it without"
                " changing both. Leave it out of targets."
            )
