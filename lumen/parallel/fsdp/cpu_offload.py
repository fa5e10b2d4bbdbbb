"""Keeps the shards of `fsdp(offload=True)` on the host, and copies them to and from the device.

On a GPU, copies from the host do not block, and the host's memory is pinned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.parallel.fsdp.meta_init import make_keep_fn
from lumen.parallel.fsdp.shard import ShardLayout, places_of

HOST = torch.device("cpu")


def to_host(shard: Tensor, non_blocking: bool = False) -> Tensor:
    """`shard` in the host's memory, pinned where it comes from a GPU.

    With `non_blocking` it must not be read there before `wait`.
    """
    if shard.device == HOST:
        return shard
    pinned = shard.device.type == "cuda" and torch.cuda.is_initialized()
    host = torch.empty(shard.shape, dtype=shard.dtype, device=HOST, pin_memory=pinned)
    # Some devices would copy to unpinned memory asynchronously, and `wait` supports CUDA's streams alone.
    return host.copy_(shard, non_blocking=non_blocking and pinned)


def wait(device: torch.device) -> None:
    """Wait for the copies from `device`."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # a dry run copies nothing
        torch.cuda.current_stream(device).synchronize()


def shard_to_host(
    state: Any, layout: ShardLayout, shapes: Mapping[str, torch.Size], unsharded: Sequence[str], device: torch.device
) -> Any:
    """This rank's shards of the first rank's state, on the host; leaves that are not sharded are on `device`.

    Leaves are sharded one by one, so that no more than one is on the device.
    """
    leaves, spec = tree.flatten(state)
    paths = tree.paths(state)
    sharded = {paths[index] for index, _ in places_of(state, shapes, kept=unsharded)}
    keep = make_keep_fn(layout, sharded)
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, Tensor):
            value = keep(path, leaf.detach().to(device, copy=True))
            leaves[index] = to_host(value) if path in sharded else value
    return spec.unflatten(leaves)


def place_state(
    state: Any, layout: ShardLayout, shapes: Mapping[str, torch.Size], unsharded: Sequence[str], device: torch.device
) -> Any:
    """`state` with shards, optimizer state and slots that have shards on the host, and other leaves on `device`."""
    leaves, spec = tree.flatten(state)
    paths = tree.paths(state)
    sharded = {index for index, _ in places_of(state, shapes, layout, unsharded)}
    groups = {_rest_group(paths[index]) for index in sharded} | {"opt_state"}
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, Tensor):
            leaves[index] = to_host(leaf) if index in sharded or _rest_group(path) in groups else leaf.to(device)
    return spec.unflatten(leaves)


def _rest_group(path: str) -> str:
    """The leaves that are kept on one device: the optimizer's state, or one slot; each leaf of other fields alone."""
    slot = re.match(r"slots\[[^\]]*\]", path)
    return slot.group() if slot else "opt_state" if path.startswith("opt_state") else path
