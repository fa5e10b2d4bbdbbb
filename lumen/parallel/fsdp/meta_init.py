"""Models made on the meta device: values for their params one unit at a time, of which each process keeps its part.

A whole unit is made, initialized and given to `keep`, before the next one is begun. So no process ever holds more than
what it keeps and the largest unit.
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
from lumen.core import sharding
from lumen.core.device import forked_rng
from lumen.core.module import param_slots
from lumen.core.step import Transform
from lumen.errors import ParamsError, StateError, printable
from lumen.parallel.fsdp.shard import ShardedParamGatherer, ShardLayout

Initialize = Callable[[nn.Module], None]
Keep = Callable[[str, Tensor], Tensor]
Tables = tuple[dict[str, Any], dict[str, Any]]
Place = tuple[dict[str, Any], str, str]  # a module's table, the key in it, and the name that tied tensors share


def reset(module: nn.Module) -> None:
    """What torch's own modules do when they are made, and whatever follows their example."""
    for name in ("reset_parameters", "_reset_parameters"):
        found = getattr(module, name, None)
        if callable(found):
            found()
            return


def begins_on_meta(state: Any) -> bool:
    """Whether the params of `state` have shapes only."""
    params = getattr(state, "params", None)
    return type(params) is dict and any(isinstance(p, Tensor) and p.is_meta for p in params.values())


def init_from_meta(
    state: Any,
    values: Mapping[str, Tensor],
    device: torch.device | None,
    cut: ShardLayout | None,
    inside: Sequence[Transform],
) -> Any:
    """`state` with `values` for params and buffers, and with what is made from them made again.

    The optimizer's state is that of this process's parts; the transforms `inside` add their slots once more. All of it
    is on `device`, or with None where it was made.
    """
    shapes = {name: p.shape for name, p in state.params.items()}
    params = {name: values[name] for name in shapes}
    buffers = {name: values[name] for name in state.buffers}
    if cut is None:
        opt_state = state.tx.init(params)
    else:
        whole = {name: p for name, p in params.items() if p.shape == shapes[name] != cut.shape(shapes[name])}
        with sharding.bound(cut, ShardedParamGatherer(cut, shapes)):
            opt_state = state.tx.init({**params, **{name: cut.part(p) for name, p in whole.items()}})
    state = state.replace(params=params, buffers=buffers, opt_state=opt_state, slots={})
    for transform in reversed(inside):
        state = transform.init(state)
    left = [path for path, leaf in tree.named_tensors(state) if leaf.is_meta]
    if left:
        raise StateError(
            f"state.{printable(left[0])} is on the meta device, where it has no value, and lm.fsdp makes params,"
            " buffers, optimizer state and slots only. Make it outside of torch.device('meta')."
        )
    return state if device is None else tree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, state)


def make_keep_fn(cut: ShardLayout | None, parted: Collection[str]) -> Keep:
    """What a process keeps of a tensor, whose values are the first process's: its part of those in `parted`."""

    def keep(name: str, whole: Tensor) -> Tensor:
        if cut is None:
            return whole
        # As bytes where Gloo may not know the dtype.
        sent = whole if whole.is_floating_point() and whole.itemsize > 1 else whole.view(-1).view(torch.uint8)
        dist.broadcast(sent, group=cut.everyone, group_src=0)
        return cut.part(whole).clone() if name in parted else whole

    return keep


def materialise(
    module: nn.Module, units: Sequence[str], initialize: Initialize, seed: int, device: torch.device, keep: Keep
) -> dict[str, Tensor]:
    """What `keep(name, whole)` gives for each param and buffer of `module`, by name, leaving the module as it is.

    `initialize` is called for each module in the order of `module.modules()`, after `torch.manual_seed(seed)`: the
    values are those of a whole model that is initialized so. Tied tensors take what was written last.

    Raises `ParamsError` for what nothing has given a value.
    """
    module = copy.deepcopy(module)
    names = {(id(table), key): name for table, key, name in param_slots(module)}
    kept: dict[str, Tensor] = {}
    with forked_rng(device), torch.no_grad():
        torch.manual_seed(seed)
        for modules in _grouped(module, units):
            places: list[Place] = [
                (table, key, names[id(table), key])
                for each in modules
                for table in cast(Tables, (each._parameters, each._buffers))
                for key in table
                if table[key] is not None
            ]
            shells = _fill(places, device)
            for each in modules:
                initialize(each)
            for table, key, name in places:
                if _written(table[key]):
                    kept[name] = keep(name, table[key].detach())
                table[key] = shells[name]
    missing = [name for _, _, name in param_slots(module) if name not in kept]
    if missing:
        raise ParamsError(
            f"{type(module).__name__} was made on the meta device, and nothing gave a value to"
            f" {', '.join(map(printable, dict.fromkeys(missing)))}: their modules have no reset_parameters() that does."
            " Write lm.fsdp(param_init_fn=fn), where fn(module) is called for each module and sets what it holds"
            " itself, by torch.nn.init.normal_(module.weight), say."
        )
    return {name: kept[name] for _, _, name in param_slots(module)}


def _grouped(module: nn.Module, units: Sequence[str]) -> Iterator[list[nn.Module]]:
    """The modules in order: those of a unit together, others each alone."""

    def group(named: tuple[str, nn.Module]) -> str:
        name = named[0]
        return next((unit for unit in units if unit and (name == unit or name.startswith(f"{unit}."))), name)

    for _, named in itertools.groupby(module.named_modules(), group):
        yield [each for _, each in named]


def _fill(places: Sequence[Place], device: torch.device) -> dict[str, Tensor]:
    """Put tensors of unlikely values in their places; what stood there."""
    shells: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for table, key, name in places:
        empty_meta: Tensor = table[key]
        shells[name] = empty_meta
        if name not in made:
            made[name] = torch.full_like(empty_meta, _unlikely(empty_meta.dtype), device=device, requires_grad=False)
            if isinstance(empty_meta, nn.Parameter):
                made[name] = nn.Parameter(made[name], requires_grad=empty_meta.requires_grad)
        table[key] = made[name]
    return shells


def _unlikely(dtype: torch.dtype) -> float | bool:
    if dtype == torch.bool:
        return False
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


def _written(tensor: Tensor) -> bool:
    """Whether every entry has a value; for booleans that cannot be told."""
    if tensor.is_meta:
        return False
    if tensor.dtype == torch.bool:
        return True
    return not bool((tensor.isnan() if tensor.is_floating_point() else tensor == _unlikely(tensor.dtype)).any())
