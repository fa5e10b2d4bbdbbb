"""UPDATE: each rank updates its shards; at stages 1 and 2 all ranks gather the new params.

An optimizer state that is full on every rank, such as that of a second optimizer in a field of the state, updates full
tensors, which every rank then has.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, sharding
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next
from lumen.parallel.fsdp.chunks import byte_chunks
from lumen.parallel.fsdp.shard import Shapes, ShardLayout, gather
from lumen.parallel.fsdp.sharded_states import ShardedStates


def update_shards(states: ShardedStates, stage: int, next: Next, call: UpdateCall) -> tuple[Any, Any]:
    """Update this rank's rows of the params; at stages 1 and 2 gather those of all ranks."""
    if stage == 3:
        plans = states.of_params(call.params)
        if plans is None:
            with sharding.unbound():
                return next(call)  # type: ignore[no-any-return]
        shapes = plans.shapes
    else:
        plans, shapes = None, {name: p.shape for name, p in call.params.items()}
    states.gatherer.shapes = dict(shapes)
    sharded = states.has_shards(call.opt_state, shapes)
    if not sharded:
        with sharding.unbound():
            params, opt_state = _update_full(states.layout, stage, shapes, next, call)
    elif stage == 3:
        params, opt_state = next(call)
    else:
        params, opt_state = _update_rows(states, stage, next, call)
    states.updated(plans, params, opt_state, sharded)
    return params, opt_state


def _update_rows(states: ShardedStates, stage: int, next: Next, call: UpdateCall) -> tuple[Any, Any]:
    """An update of this rank's rows of full params."""
    layout = states.layout
    shards = {name: layout.shard(p) for name, p in call.params.items()}
    grads = {name: layout.shard(g) for name, g in call.grads.items()} if stage == 1 else call.grads
    inner = call.replace(params=shards, grads=grads)
    if stage == 1:
        with sharding.bound(layout, states.gatherer):
            new, opt_state = next(inner)
    else:
        new, opt_state = next(inner)
    donated = new is shards
    names, params = [*call.params], dict(new)
    for chunk in byte_chunks([*call.params.values()]):
        keys = names[chunk]
        full = gather(layout, [new[name] for name in keys], [call.params[name].shape for name in keys])
        if donated:  # the new state keeps the memory of the old one
            _torch_compat.foreach_copy_([call.params[name] for name in keys], full)
        else:
            params.update(zip(keys, full, strict=True))
    return (call.params if donated else params), opt_state


def _update_full(layout: ShardLayout, stage: int, shapes: Shapes, next: Next, call: UpdateCall) -> tuple[Any, Any]:
    """The same update of full tensors on every rank, by an optimizer whose state is full."""
    first = tree.first_tensor(call.opt_state)

    def full(shards: Any) -> dict[str, Tensor]:
        tensors = gather(layout, [*shards.values()], [shapes[name] for name in shards])
        device = tensors[0].device if first is None else first.device  # offloaded shards are on the host
        return {name: x.to(device) for name, x in zip(shards, tensors, strict=True)}

    grads = call.grads if stage == 1 else full(call.grads)
    if stage < 3:
        return next(call.replace(grads=grads))  # type: ignore[no-any-return]
    params = full(call.params)
    new, opt_state = next(call.replace(params=params, grads=grads))
    shards = {name: layout.shard(p).to(call.params[name].device, copy=True) for name, p in new.items()}
    return shards, opt_state
