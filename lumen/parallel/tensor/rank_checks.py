"""What all ranks along an axis must have in common: the rows of a batch, buffers, and random numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumen import tree
from lumen.core import _torch_compat, distributed
from lumen.core.device import module_of
from lumen.errors import BatchError, WorldError, printable
from lumen.parallel.comm import consistency
from lumen.parallel.tensor.autograd_collectives import TPGroup


def check_rows(tp_group: TPGroup, batch: Any, device: torch.device, axis: str = "tensor") -> None:
    """Raise `BatchError`, on every rank, unless all have received the same tensors."""
    sums = [consistency.checksum(leaf).cpu() for leaf in tree.tensors(batch)]
    checksum = torch.stack([torch.zeros(2, dtype=torch.int64), *sums]).sum(0).to(device)
    checksums = _all_gather(tp_group, checksum)
    if any(not torch.equal(checksums[0], other) for other in checksums):
        raise BatchError(
            f"the ranks along {axis} received different rows, and must compute the same ones together. Make batches"
            " with lm.Loader, created after the mesh, or divide them by lm.parallel.rows(), which returns the share of"
            " this rank and the number of shares."
        )


def check_buffers(tp_group: TPGroup, state: Any) -> None:
    """Raise `WorldError`, on every rank, unless all have computed the same buffers, which nothing reduces."""
    buffers = {name: b for name, b in state.buffers.items() if name not in state.apply_fn.frozen}
    if not buffers or distributed.is_dry_run():
        return
    checksums = _all_gather(tp_group, torch.stack([consistency.checksum(buffer) for buffer in buffers.values()]))
    differs = torch.stack([(other != checksums[0]).any(1) for other in checksums]).any(0).tolist()
    names = [name for name, bad in zip(buffers, differs, strict=True) if bad]
    if names:
        raise WorldError(
            "the ranks along tensor compute the same rows, but have different buffers:"
            f" {', '.join(map(printable, names))}. Were they computed from a shard of the features, or at random?"
            " Compute them from full activations, outside the layers that lm.tensor_parallel shards, or leave these"
            " layers out of the plan."
        )


def has_dropout(module: nn.Module) -> bool:
    """Whether a module in training mode has dropout: a layer, or a number of that name that it passes on."""
    if not module.training:
        return False
    for child in module.modules():
        if isinstance(child, _torch_compat.DropoutNd) and child.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(child).items()):
            return True
    return False


def share_generator(tp_group: TPGroup, device: torch.device) -> None:
    """Set the default generator of every rank, on the device that draws, to the state of the first rank's."""
    module = module_of(device)
    own = torch.get_rng_state() if module is None else module.get_rng_state(device)
    first = own.to(device)
    dist.broadcast(first, group=tp_group.group, group_src=0)
    if tp_group.index:
        torch.set_rng_state(first) if module is None else module.set_rng_state(first.cpu(), device)


def _all_gather(tp_group: TPGroup, x: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(x) for _ in range(tp_group.size)]
    dist.all_gather(gathered, x, group=tp_group.group)
    return gathered
