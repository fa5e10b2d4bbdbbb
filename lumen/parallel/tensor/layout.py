"""Which params a plan shards and how, and states that are sharded so.

A tensor is sharded along one dim into equal shards, one for each rank. Where the dim consists of several blocks (a
fused query, key and value), each block is sharded, and a rank's shard has its shards of all of them, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.annotations import integer_of
from lumen.core.sharding import REPLICATED, LeafSpec, ShardSpec, Slice, SpecTree
from lumen.errors import ParamsError, PatternError, printable
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.styles import Colwise, Region, Rowwise, Style

Plan = Mapping[str, Style]


def local_shape(spec: LeafSpec, size: int) -> tuple[int, ...]:
    """The shape of each rank's shard, with `size` ranks."""
    return tuple(n // size if dim == spec.dim else n for dim, n in enumerate(spec.shape))


def shard_spec(spec: LeafSpec, size: int, index: int) -> ShardSpec:
    """Which blocks of the full tensor the shard of rank `index` has; a replicated one is the first rank's to write."""
    local = local_shape(spec, size)
    if spec.dim == REPLICATED:
        return ShardSpec(spec.shape, (Slice((0,) * len(local), (0,) * len(local), local),), owner=index == 0)
    length = local[spec.dim] // spec.groups
    boxes = []
    for group in range(spec.groups):
        here, full, extent = [0] * len(local), [0] * len(local), list(local)
        here[spec.dim] = group * length
        full[spec.dim] = (group * size + index) * length
        extent[spec.dim] = length
        boxes.append(Slice(tuple(here), tuple(full), tuple(extent)))
    return ShardSpec(spec.shape, tuple(boxes), owner=True)


# ------------------------------------------------------------------------------------------------ of a model


def module_styles(module: nn.Module, plan: Plan) -> dict[str, Style]:
    """The style of each module that the plan names.

    Raises `PatternError` for a pattern that matches nothing, and for a module that two patterns match.
    """
    names = [name for name, _ in module.named_modules() if name]
    matches: dict[str, tuple[str, Style]] = {}
    for pattern, style in plan.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise PatternError(
                f"{pattern!r} of the plan matches no module of {type(module).__name__};"
                f" its modules are {', '.join(map(printable, names[:8])) or 'none'}{' …' if len(names) > 8 else ''}."
            )
        for name in matched:
            if name in matches:
                raise PatternError(
                    f"module {name!r} is matched by {matches[name][0]!r} and by {pattern!r} of the plan. Give each"
                    " module one style: narrow one of the patterns."
                )
            matches[name] = pattern, style
    return {name: style for name, (_, style) in matches.items()}


def param_layouts(module: nn.Module, styles: Mapping[str, Style], size: int) -> dict[str, LeafSpec]:
    """The spec of each param of `module`, by name.

    Raises `PatternError` where tied weights would have two layouts, `ParamsError` for what cannot be sharded evenly.
    """
    first: dict[int, str] = {}
    specs: dict[str, tuple[str, LeafSpec]] = {}
    for prefix, sub in module.named_modules():
        dims = _sharded_dims(prefix, sub, styles.get(prefix))
        for key, param in _torch_compat.own_params(sub).items():
            if param is None:
                continue
            path = f"{prefix}.{key}" if prefix else key
            name = first.setdefault(id(param), path)
            spec = LeafSpec(tuple(param.shape), *dims.get(key, ()))
            other_path, other = specs.setdefault(name, (path, spec))
            if other != spec:
                raise PatternError(
                    f"one tensor is {other_path}, {_described(other)}, and {path}, {_described(spec)}. Tied weights"
                    " have one layout: give both modules a style, such as Rowwise() to an embedding and Colwise() to"
                    " the head, or neither."
                )
    layouts = {name: spec for name, (_, spec) in specs.items()}
    for name, layout in layouts.items():
        _check_even(name, layout, size)
    _check_regions(module, styles, size)
    return layouts


def is_transposed(module: nn.Module) -> bool:
    """Whether it is Hugging Face's `Conv1D`: a linear layer whose weight is [inputs, outputs]."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and _torch_compat.own_params(module).get("weight") is not None
    )


def _sharded_dims(name: str, module: nn.Module, style: Style | None) -> dict[str, tuple[int, int]]:
    """Along which dim, and in how many blocks, each of the module's own params is sharded."""
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
                f"{name!r} is an embedding with max_norm, scale_grad_by_freq or sparse gradients, which read all its"
                " rows. Leave it out of the plan."
            )
        return
    if type(module) is not nn.Linear and not is_transposed(module):
        raise ParamsError(
            f"{name!r} is a {type(module).__name__}, and {style!r} shards nn.Linear, nn.Embedding and Hugging Face's"
            " Conv1D. Name the layers inside it."
        )


def _described(spec: LeafSpec) -> str:
    if spec.dim == REPLICATED:
        return "replicated"
    return f"sharded along dim {spec.dim}" + (f" in {spec.groups} groups" if spec.groups > 1 else "")


def _check_even(name: str, layout: LeafSpec, size: int) -> None:
    if layout.dim >= 0 and layout.shape[layout.dim] % (layout.groups * size):
        shards = f"{layout.groups} groups of {size}" if layout.groups > 1 else f"{size}"
        raise ParamsError(
            f"{printable(name)} of shape {layout.shape} cannot be sharded along dim {layout.dim} into {shards} equal"
            f" shards, one for each rank along tensor. Choose a size that {layout.groups * size} divides, a smaller"
            " tensor axis, or leave the module out of the plan."
        )


def _check_regions(module: nn.Module, styles: Mapping[str, Style], size: int) -> None:
    for name, style in styles.items():
        if not isinstance(style, Region):
            continue
        region = module.get_submodule(name)
        for attribute in style.divided:
            value = getattr(region, attribute, None)
            count = integer_of(value)
            if count is None or count % size:
                raise ParamsError(
                    f"{name}.{attribute} is {value!r}, which {size} ranks along tensor do not divide. Name in"
                    f" Region(divide=...) integers of {type(region).__name__} that they divide."
                )
        if style.unit is not None:
            _check_unit(name, region, style.unit, styles, size)


def _check_unit(name: str, region: nn.Module, unit: str, styles: Mapping[str, Style], size: int) -> None:
    size_of_unit = getattr(region, unit, None)
    value = integer_of(size_of_unit, low=1)
    if value is None:
        kind = type(region).__name__
        raise ParamsError(f"{name}.{unit} is {size_of_unit!r}; Region(unit=...) names an integer of {kind}.")
    for key, child in region.named_modules():
        style = styles.get(f"{name}.{key}")
        if isinstance(style, Colwise):
            weight = child.get_parameter("weight")
            outputs = weight.shape[1 if is_transposed(child) else 0] // style.groups
            if outputs % (size * value):
                raise ParamsError(
                    f"{name}.{key} has {outputs // value} blocks of {unit}={value} (heads, say), which {size} ranks"
                    " along tensor do not divide. Use a smaller tensor axis."
                )


# ------------------------------------------------------------------------------------------------ of a state


def shard_tree(tp_group: TPGroup, state: Any, specs: SpecTree) -> Any:
    """`state` with this rank's shard of each leaf that is laid out like a sharded param."""
    leaves, structure = tree.flatten(state)
    for index, spec in _sharded(state, specs):
        leaves[index] = tp_group.slice(leaves[index].detach(), spec.dim, spec.groups)
    return structure.unflatten(leaves)


def gather_tree(tp_group: TPGroup, state: Any, specs: SpecTree) -> Any:
    """The inverse of `shard_tree`, on every rank."""
    leaves, structure = tree.flatten(state)
    for index, spec in _sharded(state, specs):
        leaves[index] = tp_group.gather(leaves[index].detach(), spec.dim, spec.groups).contiguous()
    return structure.unflatten(leaves)


def shard_specs(state: Any, specs: SpecTree, size: int, index: int) -> dict[int, ShardSpec]:
    """What rank `index` holds of each leaf that is laid out like a param, by the leaf's index, scalars left out."""
    layouts = ((position, specs.params[name]) for position, name in specs.locate(state))
    return {position: shard_spec(spec, size, index) for position, spec in layouts if spec.shape}


def _sharded(state: Any, specs: SpecTree) -> list[tuple[int, LeafSpec]]:
    layouts = [(index, specs.params[name]) for index, name in specs.locate(state)]
    return [(index, spec) for index, spec in layouts if spec.dim != REPLICATED]
