"""What the modules of a plan do in place of their own forward, on this process's parts of their params.

Shapes: B batch, T time, C width, V rows of an embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.core.sharding import REPLICATED, LeafSpec
from lumen.parallel.lazy_param import LazyParam, empty_meta
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.layout import is_transposed
from lumen.parallel.tensor.styles import SEQUENCE, Colwise, Region, Rowwise, SequenceParallel, Style


class Run:
    """What the modules of one model share while it runs.

    Layers that read the same tensor (query, key and value; gate and up) take it into the cut region together: then its
    gradient is summed once, and a sequence gathered once.
    """

    def __init__(self, team: TPGroup) -> None:
        self.team = team
        self._entered: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, _memo: Any) -> Run:
        return self

    def copy_to_region(self, x: Tensor, given: str) -> Tensor:
        """`x` as cut layers read it."""
        if self._entered is None or self._entered[0] is not x:
            self._entered = x, self.team.move("copy" if given == "whole" else "spread", x, SEQUENCE)
        return self._entered[1]

    def gather_sequence(self, x: Tensor) -> Tensor:
        """A part of a sequence as the whole one; cut layers that are given it read it past its gradient's slicing."""
        whole = self.team.move("gather", x, SEQUENCE)
        self._entered = whole, self.team.move("spread", x, SEQUENCE, whole.detach())
        return whole

    def leave(self) -> None:
        """Let go of what was entered."""
        self._entered = None


class FullParamView:
    """Params as those see them who read them outside of the layer that they are cut for: whole."""

    def __init__(self, team: TPGroup, layouts: Mapping[str, LeafSpec]) -> None:
        self.team = team
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
        return self.team.gather(shard, self.layouts[name].dim, self.layouts[name].groups)


def cut_modules(run: Run, outside: FullParamView, styles: Mapping[str, Style]) -> Callable[[nn.Module], None]:
    """What makes a skeleton run on this process's parts."""

    def change(module: nn.Module) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        for name, style in styles.items():
            each = module.get_submodule(name)
            forward = functools.partial(_forward(each, style), each, each.forward, run, style)
            each.forward = forward
            if isinstance(style, Region):
                for attribute in style.divided:
                    setattr(each, attribute, getattr(each, attribute) // run.team.size)
            if isinstance(style, Colwise | Rowwise):
                _narrow(each, style, run.team.size)
                own = {key: names[id(p)] for key, p in each._parameters.items() if p is not None}
                cut = {key: name for key, name in own.items() if name in outside.layouts}
                each.__class__ = _seen_whole(type(each), outside, cut)

    return change


def _seen_whole(kind: type[nn.Module], outside: FullParamView, cut: Mapping[str, str]) -> type[nn.Module]:
    """`kind` whose params are whole to those who read them as attributes; the layer itself finds parts in its table."""

    def reading(key: str, name: str) -> property:
        return property(lambda module: LazyParam.of(outside, name, module._parameters[key]))

    return type(kind.__name__, (kind,), {key: reading(key, name) for key, name in cut.items()})


def _narrow(module: nn.Module, style: Style, size: int) -> None:
    """Let the layer's own attributes say how many features it has here."""
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
    if isinstance(style, SequenceParallel):
        return _each_position
    if isinstance(module, nn.Embedding):
        return _columns if isinstance(style, Colwise) else _rows
    return _colwise if isinstance(style, Colwise) else _rowwise


def _colwise(module: nn.Module, _own: Any, run: Run, style: Colwise, x: Tensor) -> Tensor:
    out = _linear(module, run.copy_to_region(x, style.input), module._parameters["bias"])
    if style.output == "cut":
        return out
    run.leave()
    return run.team.gather(out, -1, style.groups)


def _rowwise(module: nn.Module, _own: Any, run: Run, style: Rowwise, x: Tensor) -> Tensor:
    run.leave()
    if style.input == "whole":
        x = run.team.slice(x, -1)
    out = _summed(run, style, _linear(module, x, None))
    bias = module._parameters["bias"]
    if bias is None:
        return out
    # What is added to a part of the sequence sees a part of the gradient.
    return out + (bias if style.output == "whole" else run.team.move("copy", bias))


def _linear(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    weight = _weight(module)
    return F.linear(x, weight.T if is_transposed(module) else weight, bias)


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _summed(run: Run, style: Rowwise, terms: Tensor) -> Tensor:
    return run.team.move("sum", terms) if style.output == "whole" else run.team.move("scatter", terms, SEQUENCE)


def _columns(module: nn.Embedding, _own: Any, run: Run, style: Colwise, x: Tensor) -> Tensor:
    out = F.embedding(x, _weight(module), module.padding_idx)
    return out if style.output == "cut" else run.team.gather(out, -1, style.groups)


def _rows(module: nn.Embedding, _own: Any, run: Run, style: Rowwise, x: Tensor) -> Tensor:
    weight = _weight(module)
    each = weight.shape[0]
    place = x - run.team.index * each
    mine = (place >= 0) & (place < each)
    padding = None if module.padding_idx is None else module.padding_idx - run.team.index * each
    if padding is not None and not 0 <= padding < each:
        padding = None
    found = F.embedding(torch.where(mine, place, 0), weight, padding)
    return _summed(run, style, torch.where(mine.unsqueeze(-1), found, 0.0))


def _each_position(
    module: nn.Module, own: Callable[..., Any], run: Run, style: SequenceParallel, *args: Any, **kwargs: Any
) -> Any:
    if style.input == "whole":
        args, kwargs = _with_first(lambda x: run.team.move("slice", x, SEQUENCE), args, kwargs)
    before = dict(module._parameters)
    try:
        for key, param in before.items():
            if param is not None:
                module._parameters[key] = run.team.move("copy", param)  # type: ignore[assignment]
        out = own(*args, **kwargs)
    finally:
        module._parameters.update(before)
    if style.output == "sequence":
        return out
    (out,), _ = _with_first(lambda x: run.team.move("gather", x, SEQUENCE), (out,), {})
    return out


def _region(_module: nn.Module, own: Callable[..., Any], run: Run, style: Region, *args: Any, **kwargs: Any) -> Any:
    if style.input == "sequence":
        args, kwargs = _with_first(run.gather_sequence, args, kwargs)
    return own(*args, **kwargs)


def _with_first(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with the first floating tensor among them changed, or that of a tuple that comes first."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:place], change(value), *args[place + 1 :]), kwargs
        if isinstance(value, tuple) and value:
            return (*args[:place], _with_first(change, value, {})[0], *args[place + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: change(value)}
    return args, kwargs
