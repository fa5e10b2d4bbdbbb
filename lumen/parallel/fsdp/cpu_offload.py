"""Parts that rest on the host: what `fsdp(offload=True)` keeps there, and the ways to it.

On a device, what comes from the host is sent without waiting for it, and lies in pinned memory where it can.
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


def to_host(part: Tensor, non_blocking: bool = False) -> Tensor:
    """`part` in the host's memory, pinned where it came from a GPU.

    With `non_blocking` it is on its way: nobody may read it there before `wait`.
    """
    if part.device == HOST:
        return part
    pinned = part.device.type == "cuda" and torch.cuda.is_initialized()
    room = torch.empty(part.shape, dtype=part.dtype, device=HOST, pin_memory=pinned)
    # Into memory that is not pinned some devices would copy behind our back, and `wait` knows CUDA's streams alone.
    return room.copy_(part, non_blocking=non_blocking and pinned)


def wait(device: torch.device) -> None:
    """Until what was sent from `device` has arrived."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # tensors of a plan are never on their way
        torch.cuda.current_stream(device).synchronize()


def shard_to_host(
    state: Any, cut: ShardLayout, shapes: Mapping[str, torch.Size], kept: Sequence[str], device: torch.device
) -> Any:
    """This process's parts, on the host, of the first process's state, wherever that lies; the rest on `device`.

    Leaf by leaf, so that the device never holds more than one.
    """
    leaves, spec = tree.flatten(state)
    paths = tree.paths(state)
    parted = {paths[place] for place, _ in places_of(state, shapes, kept=kept)}
    keep = make_keep_fn(cut, parted)
    for place, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, Tensor):
            own = keep(path, leaf.detach().to(device, copy=True))
            leaves[place] = to_host(own) if path in parted else own
    return spec.unflatten(leaves)


def place_state(
    state: Any, cut: ShardLayout, shapes: Mapping[str, torch.Size], kept: Sequence[str], device: torch.device
) -> Any:
    """`state` with every leaf where it rests: on the host its parts, what the optimizer keeps, and slots with parts."""
    leaves, spec = tree.flatten(state)
    paths = tree.paths(state)
    parted = {place for place, _ in places_of(state, shapes, cut, kept)}
    homes = {_home(paths[place]) for place in parted} | {"opt_state"}
    for place, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, Tensor):
            leaves[place] = to_host(leaf) if place in parted or _home(path) in homes else leaf.to(device)
    return spec.unflatten(leaves)


def _home(path: str) -> str:
    """What rests in one place: the optimizer's state, or one slot; of other fields each leaf by itself."""
    slot = re.match(r"slots\[[^\]]*\]", path)
    return slot.group() if slot else "opt_state" if path.startswith("opt_state") else path
