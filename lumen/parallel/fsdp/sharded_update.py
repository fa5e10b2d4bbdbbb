"""UPDATE at stages 1 and 2: each rank updates its shards, and all ranks gather the new params."""

from __future__ import annotations

from typing import Any

from lumen.core import _torch_compat, sharding
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next
from lumen.parallel.fsdp.chunks import byte_chunks
from lumen.parallel.fsdp.shard import ShardedParamGatherer, ShardLayout, gather


def update_shards(
    layout: ShardLayout, gatherer: ShardedParamGatherer, stage: int, next: Next, call: UpdateCall
) -> tuple[Any, Any]:
    """Update this rank's rows of the params, and gather those of all ranks."""
    gatherer.shapes.update({name: p.shape for name, p in call.params.items()})
    shards = {name: layout.shard(p) for name, p in call.params.items()}
    grads = {name: layout.shard(g) for name, g in call.grads.items()} if stage == 1 else call.grads
    inner = call.replace(params=shards, grads=grads)
    if stage == 1:
        with sharding.bound(layout, gatherer):
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
