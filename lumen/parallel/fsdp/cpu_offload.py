"""Keeps the shards of `fsdp(offload=True)` on the host, and copies them to and from the device.

On a GPU, copies from the host do not block, and the host's memory is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.param_leaves import Path, key_paths
from lumen.parallel.fsdp.meta_init import make_keep_fn
from lumen.parallel.fsdp.shard import Sharded, ShardLayout

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


def shard_to_host(state: Any, layout: ShardLayout, sharded: Sharded, device: torch.device) -> Any:
    """This rank's shards of the first rank's state, on the host; leaves that are not sharded are on `device`.

    Leaves are sharded one by one, so that no more than one is on the device.
    """
    leaves, structure = tree.flatten(state)
    indices = {index for index, _ in sharded}
    keep = make_keep_fn(layout, indices)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            value = keep(index, leaf.detach().to(device, copy=True))
            leaves[index] = to_host(value) if index in indices else value
    return structure.unflatten(leaves)


def place_state(state: Any, sharded: Sharded, holders: Sequence[Path], device: torch.device) -> Any:
    """`state` with shards, optimizer state and slots that have shards on the host, and other leaves on `device`.

    `holders` are the paths of the training states in it.
    """
    leaves, structure = tree.flatten(state)
    paths = key_paths(state)
    groups = {_device_group(paths[index], holders) for index, _ in sharded}
    groups |= {(*holder, "opt_state") for holder in holders}
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, Tensor):
            leaves[index] = to_host(leaf) if _device_group(path, holders) in groups else leaf.to(device)
    return structure.unflatten(leaves)


def _device_group(path: Path, holders: Sequence[Path]) -> Path:
    """The leaves that are kept on one device: an optimizer's state, or one slot; each leaf of other fields alone."""
    start = max((len(holder) for holder in holders if path[: len(holder)] == holder), default=0)
    field = path[start]
    return path[: start + 1] if field == "opt_state" else path[: start + 2] if field == "slots" else path
