"""Which tensors a plan cuts, and how: what is found in a model, and done to a state.

A tensor is cut along one dim into equal parts, one for each process; where the dim consists of several blocks (a fused
query, key and value), each block is cut, and a process's part is its parts of all of them, in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumen import tree
from lumen.core.sharding import ShardSpec, Slice
from lumen.errors import ParamsError, PatternError, printable
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.styles import Colwise, Region, Rowwise, Style

Plan = Mapping[str, Style]


class Layout(NamedTuple):
    """How one tensor of shape `shape` is cut: along `dim`, in `groups` blocks; `dim` is -1 where it stays whole."""

    shape: tuple[int, ...]
    dim: int = -1
    groups: int = 1

    def local(self, size: int) -> tuple[int, ...]:
        """The shape of a part."""
        return tuple(n // size if d == self.dim else n for d, n in enumerate(self.shape))

    def piece(self, size: int, index: int, owner: bool) -> ShardSpec:
        """What the part of process `index` is of the whole."""
        local = self.local(size)
        if self.dim < 0:
            return ShardSpec(self.shape, (Slice((0,) * len(local), (0,) * len(local), local),), owner)
        each = local[self.dim] // self.groups
        boxes = []
        for group in range(self.groups):
            here, whole, extent = [0] * len(local), [0] * len(local), list(local)
            here[self.dim] = group * each
            whole[self.dim] = (group * size + index) * each
            extent[self.dim] = each
            boxes.append(Slice(tuple(here), tuple(whole), tuple(extent)))
        return ShardSpec(self.shape, tuple(boxes), owner)


# ------------------------------------------------------------------------------------------------ in a model


def module_styles(module: nn.Module, plan: Plan) -> dict[str, Style]:
    """The style of each module that the plan names.

    Raises `PatternError` for a pattern that matches nothing, and for a module that two patterns match.
    """
    names = [name for name, _ in module.named_modules() if name]
    found: dict[str, tuple[str, Style]] = {}
    for pattern, style in plan.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise PatternError(
                f"{pattern!r} of the plan matches no module of {type(module).__name__};"
                f" its modules are {', '.join(map(printable, names[:8])) or 'none'}{' …' if len(names) > 8 else ''}."
            )
        for name in matched:
            if name in found:
                raise PatternError(
                    f"module {name!r} is matched by {found[name][0]!r} and by {pattern!r} of the plan. Give each module"
                    " one style: narrow one of the patterns."
                )
            found[name] = pattern, style
    return {name: style for name, (_, style) in found.items()}


def param_layouts(module: nn.Module, styles: Mapping[str, Style], size: int) -> dict[str, Layout]:
    """The layout of each param of `module`, by name.

    Raises `PatternError` where tied weights would be cut in two ways, `ParamsError` for what cannot be cut evenly.
    """
    first: dict[int, str] = {}
    found: dict[str, tuple[str, Layout]] = {}
    for prefix, sub in module.named_modules():
        ways = _ways(prefix, sub, styles.get(prefix))
        for key, param in sub._parameters.items():
            if param is None:
                continue
            place = f"{prefix}.{key}" if prefix else key
            name = first.setdefault(id(param), place)
            layout = Layout(tuple(param.shape), *ways.get(key, ()))
            before, other = found.setdefault(name, (place, layout))
            if other != layout:
                raise PatternError(
                    f"one tensor stands at {before}, {_said(other)}, and at {place}, {_said(layout)}. Tied weights have"
                    " one layout: give both modules a style, such as Rowwise() to an embedding and Colwise() to the"
                    " head, or neither."
                )
    layouts = {name: layout for name, (_, layout) in found.items()}
    for name, layout in layouts.items():
        _check_even(name, layout, size)
    _check_regions(module, styles, size)
    return layouts


def is_transposed(module: nn.Module) -> bool:
    """Whether it is Hugging Face's `Conv1D`: a linear layer whose weight is [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module._parameters.get("weight") is not None


def _ways(name: str, module: nn.Module, style: Style | None) -> dict[str, tuple[int, int]]:
    """Along which dim, in how many blocks, each of the module's own params is cut."""
    if not isinstance(style, Colwise | Rowwise):
        return {}
    _check_kind(name, module, style)
    groups = style.groups if isinstance(style, Colwise) else 1
    if isinstance(module, nn.Embedding):
        return {"weight": (1, groups) if isinstance(style, Colwise) else (0, 1)}
    outputs, inputs = (1, 0) if is_transposed(module) else (0, 1)
    if isinstance(style, Rowwise):
        return {"weight": (inputs, 1)}
    return {"weight": (outputs, groups), "bias": (0, groups)}


def _check_kind(name: str, module: nn.Module, style: Style) -> None:
    if type(module) is nn.Embedding:
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise ParamsError(
                f"{name!r} is an embedding with max_norm, scale_grad_by_freq or sparse gradients, which look at all its"
                " rows. Leave it out of the plan."
            )
        return
    if type(module) is not nn.Linear and not is_transposed(module):
        raise ParamsError(
            f"{name!r} is a {type(module).__name__}, and {style!r} cuts nn.Linear, nn.Embedding and Hugging Face's"
            " Conv1D. Name the layers inside it."
        )


def _said(layout: Layout) -> str:
    if layout.dim < 0:
        return "whole"
    return f"cut along dim {layout.dim}" + (f" in {layout.groups} groups" if layout.groups > 1 else "")


def _check_even(name: str, layout: Layout, size: int) -> None:
    if layout.dim >= 0 and layout.shape[layout.dim] % (layout.groups * size):
        parts = f"{layout.groups} groups of {size}" if layout.groups > 1 else f"{size}"
        raise ParamsError(
            f"{printable(name)} of shape {layout.shape} cannot be cut along dim {layout.dim} into {parts} equal parts,"
            f" one for each process along tensor. Choose a size that {layout.groups * size} divides, a smaller tensor"
            " axis, or leave the module out of the plan."
        )


def _check_regions(module: nn.Module, styles: Mapping[str, Style], size: int) -> None:
    for name, style in styles.items():
        if not isinstance(style, Region):
            continue
        region = module.get_submodule(name)
        for attribute in style.divided:
            value = getattr(region, attribute, None)
            if type(value) is not int or value % size:
                raise ParamsError(
                    f"{name}.{attribute} is {value!r}, which {size} processes along tensor do not divide. Name in"
                    f" Region(divide=...) integers of {type(region).__name__} that they divide."
                )
        if style.unit is not None:
            _check_unit(name, region, style.unit, styles, size)


def _check_unit(name: str, region: nn.Module, unit: str, styles: Mapping[str, Style], size: int) -> None:
    value = getattr(region, unit, None)
    if type(value) is not int or value < 1:
        raise ParamsError(f"{name}.{unit} is {value!r}; Region(unit=...) names an integer of {type(region).__name__}.")
    for key, child in region.named_modules():
        style = styles.get(f"{name}.{key}")
        if isinstance(style, Colwise):
            weight = child.get_parameter("weight")
            outputs = weight.shape[1 if is_transposed(child) else 0] // style.groups
            if outputs % (size * value):
                raise ParamsError(
                    f"{name}.{key} has {outputs // value} blocks of {unit}={value} (heads, say), which {size} processes"
                    " along tensor do not divide. Use a smaller tensor axis."
                )


# ------------------------------------------------------------------------------------------------ in a state


def name_in(path: str, names: Mapping[str, Any]) -> str | None:
    """The param that the leaf at `path` belongs to, None for a leaf that stands under no param's name."""
    return next((key for key in reversed(re.findall(r"[^\[\]]+", path)) if key in names), None)


def cut_tree(team: TPGroup, values: Any, layouts: Mapping[str, Layout]) -> Any:
    """`values` with this process's part of each leaf that stands under a cut param's name and has its shape."""
    leaves, spec = tree.flatten(values)
    for place, layout in _places(values, {name: each.shape for name, each in layouts.items()}, layouts):
        leaves[place] = team.slice(leaves[place].detach(), layout.dim, layout.groups)
    return spec.unflatten(leaves)


def whole_tree(team: TPGroup, values: Any, layouts: Mapping[str, Layout]) -> Any:
    """The inverse of `cut_tree`."""
    leaves, spec = tree.flatten(values)
    for place, layout in _places(values, {name: each.local(team.size) for name, each in layouts.items()}, layouts):
        leaves[place] = team.gather(leaves[place].detach(), layout.dim, layout.groups).contiguous()
    return spec.unflatten(leaves)


def _places(
    values: Any, shapes: Mapping[str, Sequence[int]], layouts: Mapping[str, Layout]
) -> list[tuple[int, Layout]]:
    found = []
    for place, (path, leaf) in enumerate(zip(tree.paths(values), tree.leaves(values), strict=True)):
        name = name_in(path, layouts)
        if name is None or layouts[name].dim < 0 or not isinstance(leaf, Tensor):
            continue
        if leaf.shape == torch.Size(shapes[name]):
            found.append((place, layouts[name]))
    return found


def pieces_of(values: Any, layouts: Mapping[str, Layout], size: int, index: int) -> dict[int, ShardSpec]:
    """What each leaf of `values` is of a whole one, by place, if it stands under a param's name and is not a scalar.

    A leaf may have been cut along its first dim once more.
    """
    found = {}
    for place, (path, leaf) in enumerate(zip(tree.paths(values), tree.leaves(values), strict=True)):
        name = name_in(path, layouts)
        if name is None or not isinstance(leaf, Tensor):
            continue
        layout = layouts[name]
        if layout.shape and leaf.shape[1:] == torch.Size(layout.local(size)[1:]) and leaf.dim() == len(layout.shape):
            found[place] = layout.piece(size, index, owner=layout.dim >= 0 or index == 0)
    return found
