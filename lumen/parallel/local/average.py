"""Averages trees of tensors over ranks that have trained apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core.dtypes import NARROW
from lumen.errors import StateError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.collectives import WaitFn


def average_trees(values: Any, group: dist.ProcessGroup) -> Any:
    """The mean over ranks of each floating-point tensor, summed in float32 at least, and the largest of each other."""
    leaves, spec = tree.flatten(values)
    size = dist.get_world_size(group)
    in_flight: list[WaitFn] = [_launch(leaf, group) for leaf in leaves]
    results = [wait().reshape(leaf.shape) for wait, leaf in zip(in_flight, leaves, strict=True)]
    return tree.unflatten(
        spec,
        [
            (result / size if leaf.is_floating_point() else result).to(leaf.dtype)
            for result, leaf in zip(results, leaves, strict=True)
        ],
    )


def _launch(leaf: Tensor, group: dist.ProcessGroup) -> WaitFn:
    wide = leaf.float() if leaf.dtype in NARROW else leaf
    own = wide.detach().clone(memory_format=torch.contiguous_format)
    return collectives.all_reduce(own, "sum" if leaf.is_floating_point() else "max", group)


def check_equal_scalars(state: Any, group: dist.ProcessGroup) -> None:
    """Raise `StateError`, on every rank, where a scalar of the optimizer's state or of a slot differs between ranks.

    Checkpoints have one value of it.
    """
    named = [(path, leaf) for path, leaf in tree.named_tensors(state) if not leaf.dim()]
    numbers = torch.stack([leaf.detach().double().cpu() for _, leaf in named])
    numbers = numbers.to(next(leaf.device for _, leaf in tree.named_tensors(state)))
    rows = collectives.all_gather(numbers, group)().view(-1, len(named))
    differs = ((rows != rows[0]) & ~(rows.isnan() & rows[0].isnan())).any(0).tolist()
    names = [path for (path, _), bad in zip(named, differs, strict=True) if bad]
    if names:
        raise StateError(
            f"state.{names[0]} differs between the ranks of lm.local, and must be the same: the number of updates, or"
            " a rate. Do not let a rank skip updates by itself (lm.optim.apply_if_finite)."
        )
