"""Keeps the shards of `fsdp(offload=True)` on the host, and copies them to and from the device.

On a GPU, copies from the host do not block, and the host's memory is pinned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.param_leaves import Path, key_paths
from lumen.core.sharding import SpecTree
from lumen.parallel.fsdp.meta_init import make_keep_fn
from lumen.parallel.fsdp.shard import ShardLayout

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


def shard_to_host(state: Any, layout: ShardLayout, specs: SpecTree, device: torch.device) -> Any:
    """This rank's shards of the first rank's state, on the host; leaves that are not sharded are on `device`.

    Leaves are sharded one by one, so that no more than one is on the device.
    """
    leaves, structure = tree.flatten(state)
    sharded = {index for index, _ in specs.locate(state)}
    keep = make_keep_fn(layout, sharded)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            value = keep(index, leaf.detach().to(device, copy=True))
            leaves[index] = to_host(value) if index in sharded else value
    return structure.unflatten(leaves)


def place_state(state: Any, specs: SpecTree, device: torch.device) -> Any:
    """`state` with shards, optimizer state and slots that have shards on the host, and other leaves on `device`."""
    leaves, structure = tree.flatten(state)
    paths = key_paths(state)
    sharded = {index for index, _ in specs.locate(state)}
    groups = {_device_group(paths[index]) for index in sharded} | {("opt_state",)}
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, Tensor):
            leaves[index] = to_host(leaf) if _device_group(path) in groups else leaf.to(device)
    return structure.unflatten(leaves)


def _device_group(path: Path) -> Path:
    """The leaves that are kept on one device: the optimizer's state, or one slot; each leaf of other fields alone."""
    return path[:1] if path[0] == "opt_state" else path[:2] if path[0] == "slots" else path
