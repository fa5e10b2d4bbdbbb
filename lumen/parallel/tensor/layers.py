"""The forward functions of a plan's modules, which compute on this rank's shards of their params.

Shapes: B batch, T time, C width, V rows of an embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.sharding import REPLICATED, LeafSpec
from lumen.core.tensor_proxy import empty_meta
from lumen.parallel.lazy_param import LazyParam
from lumen.parallel.tensor import vocabulary
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.layout import is_transposed
from lumen.parallel.tensor.styles import SEQUENCE, Colwise, Region, ReplicatedParams, Rowwise, SequenceParallel, Style


class TPForwardContext:
    """What the modules of one model share while it runs.

    Layers that read the same tensor (query, key and value; gate and up) enter the region together: then its gradient
    is summed once, and a sequence is gathered once.
    """

    def __init__(self, tp_group: TPGroup) -> None:
        self.tp_group = tp_group
        self._entered: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, _memo: Any) -> TPForwardContext:
        return self

    def copy_to_region(self, x: Tensor, layout: str) -> Tensor:
        """`x`, which has this layout, as the layers of a region read it."""
        if self._entered is None or self._entered[0] is not x:
            self._entered = (
                x,
                self.tp_group.collective("copy" if layout == "replicate" else "all_gather_reduce_grad", x, SEQUENCE),
            )
        return self._entered[1]

    def gather_sequence(self, x: Tensor) -> Tensor:
        """The full sequence of a shard of it. The layers of a region that read it reduce its gradient once, at `x`."""
        full = self.tp_group.collective("gather", x, SEQUENCE)
        self._entered = full, self.tp_group.collective("all_gather_reduce_grad", x, SEQUENCE, full.detach())
        return full

    def leave(self) -> None:
        """Forget the tensor that has entered."""
        self._entered = None


class FullParamView:
    """Gathers params where they are read outside the layer that computes on their shards."""

    def __init__(self, tp_group: TPGroup, layouts: Mapping[str, LeafSpec]) -> None:
        self.tp_group = tp_group
        self.layouts = {name: layout for name, layout in layouts.items() if layout.dim != REPLICATED}

    def __deepcopy__(self, _memo: Any) -> FullParamView:
        return self

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory."""
        return empty_meta(torch.Size(self.layouts[name].shape), dtype)

    def unshard(self, name: str, shard: Tensor) -> Tensor:
        """The param `name`, gathered; what is computed from it is the same on every process."""
        if isinstance(shard, LazyParam):
            shard = shard.source.unshard(shard.key, shard.shard)
        return self.tp_group.gather(shard, self.layouts[name].dim, self.layouts[name].groups)

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The result of a function that knows how to compute on shards; NotImplemented for all others."""
        return vocabulary.answer(self.tp_group, self.layouts, func, args)


def shard_modules(
    context: TPForwardContext, view: FullParamView, styles: Mapping[str, Style]
) -> Callable[[nn.Module], None]:
    """A function that makes a copy of a module compute on this rank's shards."""

    def change(module: nn.Module) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        for name, style in styles.items():
            child = module.get_submodule(name)
            forward = functools.partial(_forward(child, style), child, child.forward, context, style)
            if isinstance(style, Colwise) and style.output == "replicate":
                vars(forward)["full_input"] = functools.partial(_full_input, context, style)
            child.forward = forward
            if isinstance(style, Region):
                for attribute in style.divided:
                    setattr(child, attribute, getattr(child, attribute) // context.tp_group.size)
            if isinstance(style, Colwise | Rowwise):
                _narrow(child, style, context.tp_group.size)
                own = {key: names[id(p)] for key, p in _torch_compat.own_params(child).items() if p is not None}
                sharded = {key: name for key, name in own.items() if name in view.layouts}
                child.__class__ = _with_full_params(type(child), view, sharded)

    return change


def _with_full_params(kind: type[nn.Module], view: FullParamView, names: Mapping[str, str]) -> type[nn.Module]:
    """A subclass of `kind` whose attributes are full params; the layer itself reads the shards in `_parameters`."""

    def reading(key: str, name: str) -> property:
        return property(lambda module: LazyParam.of(view, name, _torch_compat.own_params(module)[key]))

    return type(kind.__name__, (kind,), {key: reading(key, name) for key, name in names.items()})


def _narrow(module: nn.Module, style: Style, size: int) -> None:
    """Set the layer's number of features to that of its shard."""
    if isinstance(module, nn.Embedding):
        names = "embedding_dim" if isinstance(style, Colwise) else ""
    elif isinstance(style, Colwise):
        names = "nf" if is_transposed(module) else "out_features"
    else:
        names = "nx" if is_transposed(module) else "in_features"
    if names and hasattr(module, names):
        setattr(module, names, getattr(module, names) // size)


def _forward(module: nn.Module, style: Style) -> Callable[..., Any]:
    if isinstance(style, Region):
        return _region
    if isinstance(style, ReplicatedParams):
        return _replicated_params
    if isinstance(style, SequenceParallel):
        return _sequence_parallel
    if isinstance(module, nn.Embedding):
        return _columns if isinstance(style, Colwise) else _rows
    return _colwise if isinstance(style, Colwise) else _rowwise


def _colwise(module: nn.Module, _own: Any, context: TPForwardContext, style: Colwise, x: Tensor) -> Tensor:
    y = _linear(module, context.copy_to_region(x, style.input), _torch_compat.own_params(module)["bias"])
    if style.output == "shard":
        return y
    context.leave()
    return context.tp_group.gather(y, -1, style.groups)


def _full_input(context: TPForwardContext, style: Colwise, x: Tensor) -> Tensor:
    """The full input of a layer with full outputs, for `lm.chunked_logits`, which computes them later."""
    context.leave()
    return x if style.input == "replicate" else context.tp_group.collective("gather", x, SEQUENCE)


def _rowwise(module: nn.Module, _own: Any, context: TPForwardContext, style: Rowwise, x: Tensor) -> Tensor:
    context.leave()
    if style.input == "replicate":
        x = context.tp_group.slice(x, -1)
    y = _summed(context, style, _linear(module, x, None))
    bias = _torch_compat.own_params(module)["bias"]
    if bias is None:
        return y
    # A bias that is added to a shard of the sequence gets the gradient of that shard alone.
    return y + (bias if style.output == "replicate" else context.tp_group.collective("copy", bias))


def _linear(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    weight = _weight(module)
    return F.linear(x, weight.T if is_transposed(module) else weight, bias)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor | None = _torch_compat.own_params(module)["weight"]
    assert weight is not None
    return weight


def _summed(context: TPForwardContext, style: Rowwise, terms: Tensor) -> Tensor:
    return (
        context.tp_group.collective("sum", terms)
        if style.output == "replicate"
        else context.tp_group.collective("scatter", terms, SEQUENCE)
    )


def _columns(module: nn.Embedding, _own: Any, context: TPForwardContext, style: Colwise, x: Tensor) -> Tensor:
    y = F.embedding(x, _weight(module), module.padding_idx)
    return y if style.output == "shard" else context.tp_group.gather(y, -1, style.groups)


def _rows(module: nn.Embedding, _own: Any, context: TPForwardContext, style: Rowwise, x: Tensor) -> Tensor:
    weight = _weight(module)
    rows = weight.shape[0]
    index = x - context.tp_group.index * rows
    is_here = (index >= 0) & (index < rows)
    padding = None if module.padding_idx is None else module.padding_idx - context.tp_group.index * rows
    if padding is not None and not 0 <= padding < rows:
        padding = None
    vectors = F.embedding(torch.where(is_here, index, 0), weight, padding)
    return _summed(context, style, torch.where(is_here.unsqueeze(-1), vectors, 0.0))


def _replicated_params(
    module: nn.Module, own: Callable[..., Any], context: TPForwardContext, _style: Style, *args: Any, **kwargs: Any
) -> Any:
    """The module's own forward, whose params' gradients are summed over the ranks."""
    before = dict(_torch_compat.own_params(module))
    try:
        for key, param in before.items():
            if param is not None:
                _torch_compat.own_params(module)[key] = context.tp_group.collective("copy", param)
        return own(*args, **kwargs)
    finally:
        _torch_compat.own_params(module).update(before)


def _sequence_parallel(
    module: nn.Module,
    own: Callable[..., Any],
    context: TPForwardContext,
    style: SequenceParallel,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if style.input == "replicate":
        args, kwargs = _with_first(lambda x: context.tp_group.collective("slice", x, SEQUENCE), args, kwargs)
    y = _replicated_params(module, own, context, style, *args, **kwargs)
    if style.output == "sequence":
        return y
    (y,), _ = _with_first(lambda x: context.tp_group.collective("gather", x, SEQUENCE), (y,), {})
    return y


def _region(
    _module: nn.Module, own: Callable[..., Any], context: TPForwardContext, style: Region, *args: Any, **kwargs: Any
) -> Any:
    if style.input == "sequence":
        args, kwargs = _with_first(context.gather_sequence, args, kwargs)
    return own(*args, **kwargs)


def _with_first(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with the first floating tensor among them changed, or that of a tuple that comes first."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:i], change(value), *args[i + 1 :]), kwargs
        if isinstance(value, tuple) and value:
            return (*args[:i], _with_first(change, value, {})[0], *args[i + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: change(value)}
    return args, kwargs
