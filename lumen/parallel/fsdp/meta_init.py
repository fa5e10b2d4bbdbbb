"""Initializes models that were created on the meta device, one unit at a time; each rank keeps its shards.

A unit is allocated, initialized and passed to `keep` before the next one. So no rank ever has more in memory than what
it keeps and the largest unit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumen import tree
from lumen.core import _torch_compat, pending_weights, sharding
from lumen.core.device import forked_rng
from lumen.core.module import param_slots
from lumen.core.step import Transform
from lumen.errors import ParamsError, StateError, printable
from lumen.parallel.fsdp.shard import ShardedParamGatherer, ShardLayout

Initialize = Callable[[nn.Module], None]
Keep = Callable[[Any, Tensor], Tensor]
Tables = tuple[dict[str, Any], dict[str, Any]]
ParamSlot = tuple[dict[str, Any], str, str]  # a module's table, the key in it, and the name, which tied tensors share


def reset(module: nn.Module) -> None:
    """Call the `reset_parameters` of a module, as torch's own modules do when they are created."""
    for name in ("reset_parameters", _torch_compat.RESET_PARAMETERS):
        method = getattr(module, name, None)
        if callable(method):
            method()
            return


def begins_on_meta(state: Any) -> bool:
    """Whether params of `state` are on the meta device, or weights are still in files."""
    params = getattr(state, "params", None)
    if pending_weights.source_of(state) is not None:
        return True
    return type(params) is dict and any(isinstance(p, Tensor) and p.is_meta for p in params.values())


def init_from_meta(
    state: Any,
    values: Mapping[str, Tensor],
    device: torch.device | None,
    layout: ShardLayout | None,
    inside: Sequence[Transform],
) -> Any:
    """`state` with `values` for params and buffers, and with new optimizer state and slots.

    The optimizer's state is that of this rank's shards, and the transforms `inside` add their slots again. All leaves
    are moved to `device`, unless it is None.
    """
    shapes = {name: p.shape for name, p in state.params.items()}
    params = {name: values[name] for name in shapes}
    buffers = {name: values[name] for name in state.buffers}
    if layout is None:
        opt_state = state.tx.init(params)
    else:
        full = {name: p for name, p in params.items() if p.shape == shapes[name] != layout.shape(shapes[name])}
        with sharding.bound(layout, ShardedParamGatherer(layout, shapes)):
            opt_state = state.tx.init({**params, **{name: layout.shard(p) for name, p in full.items()}})
    state = state.replace(params=params, buffers=buffers, opt_state=opt_state, slots={})
    for transform in reversed(inside):
        state = transform.init(state)
    missing = [path for path, leaf in tree.named_tensors(state) if leaf.is_meta]
    if missing:
        raise StateError(
            f"state.{printable(missing[0])} is on the meta device and has no value. lm.fsdp initializes params,"
            " buffers, optimizer state and slots only. Create it outside torch.device('meta')."
        )
    return state if device is None else tree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, state)


def read_pending(
    state: Any, layout: ShardLayout | None, sharded: Collection[str], move: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The result of `move` for what this rank keeps of params and buffers that are still in files."""
    tensors = {**state.params, **state.buffers}
    names = [] if layout is None else [name for name in sharded if tensors[name].dim()]
    specs = {name: layout.spec(tensors[name].shape) for name in names if layout is not None}
    return pending_weights.read(state, specs, move)


def make_keep_fn(layout: ShardLayout | None, sharded: Collection[Any]) -> Keep:
    """A function that returns what this rank keeps of the first rank's tensor: its shard of those in `sharded`."""

    def keep(key: Any, full: Tensor) -> Tensor:
        if layout is None:
            return full
        # As bytes where Gloo may not support the dtype.
        bytes_ = full if full.is_floating_point() and full.itemsize > 1 else full.view(-1).view(torch.uint8)
        dist.broadcast(bytes_, group=layout.row_group, group_src=0)
        return layout.shard(full).clone() if key in sharded else full

    return keep


def materialize(
    module: nn.Module, units: Sequence[str], initialize: Initialize, seed: int, device: torch.device, keep: Keep
) -> dict[str, Tensor]:
    """The result of `keep(name, tensor)` for each param and buffer of `module`, by name; `module` is not changed.

    `initialize` is called for each module in the order of `module.modules()`, after `torch.manual_seed(seed)`. So the
    values are those of a full model that is initialized in this way. Tied tensors have the value written last.

    Raises `ParamsError` for tensors that have no value afterwards.
    """
    module = copy.deepcopy(module)
    names = {(id(table), key): name for table, key, name in param_slots(module)}
    values: dict[str, Tensor] = {}
    with forked_rng(device), torch.no_grad():
        torch.manual_seed(seed)
        for modules in _grouped(module, units):
            slots: list[ParamSlot] = [
                (table, key, names[id(table), key])
                for submodule in modules
                for table in cast(Tables, (_torch_compat.own_params(submodule), _torch_compat.own_buffers(submodule)))
                for key in table
                if table[key] is not None
            ]
            metas = _fill(slots, device)
            for submodule in modules:
                initialize(submodule)
            for table, key, name in slots:
                if is_written(table[key]):
                    values[name] = keep(name, table[key].detach())
                table[key] = metas[name]
    missing = [name for _, _, name in param_slots(module) if name not in values]
    if missing:
        raise ParamsError(
            f"{type(module).__name__} was created on the meta device, and nothing initialized"
            f" {', '.join(map(printable, dict.fromkeys(missing)))}: their modules have no reset_parameters() for them."
            " Write lm.fsdp(param_init_fn=fn), where fn(module) is called for each module and sets its own tensors, by"
            " torch.nn.init.normal_(module.weight), say."
        )
    return {name: values[name] for _, _, name in param_slots(module)}


def _grouped(module: nn.Module, units: Sequence[str]) -> Iterator[list[nn.Module]]:
    """The modules in order: those of a unit together, every other one by itself."""

    def group(named: tuple[str, nn.Module]) -> str:
        name = named[0]
        return next((unit for unit in units if unit and (name == unit or name.startswith(f"{unit}."))), name)

    for _, named in itertools.groupby(module.named_modules(), group):
        yield [submodule for _, submodule in named]


def _fill(slots: Sequence[ParamSlot], device: torch.device) -> dict[str, Tensor]:
    """Fill the slots with tensors of unlikely values, and return the tensors that were there."""
    metas: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for table, key, name in slots:
        meta: Tensor = table[key]
        metas[name] = meta
        if name not in filled:
            filled[name] = torch.full_like(meta, unlikely_value(meta.dtype), device=device, requires_grad=False)
            if isinstance(meta, nn.Parameter):
                filled[name] = nn.Parameter(filled[name], requires_grad=meta.requires_grad)
        table[key] = filled[name]
    return metas


def unlikely_value(dtype: torch.dtype) -> float | bool:
    """A value that no initialization is likely to leave in a tensor of this dtype."""
    if dtype == torch.bool:
        return False
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


def is_written(tensor: Tensor) -> bool:
    """Whether every entry has been written; booleans count as written."""
    if tensor.is_meta:
        return False
    if tensor.dtype == torch.bool:
        return True
    return not bool((tensor.isnan() if tensor.is_floating_point() else tensor == unlikely_value(tensor.dtype)).any())
