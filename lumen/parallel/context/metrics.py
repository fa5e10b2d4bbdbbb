"""Typed values that each rank has computed from its own positions, as values of all positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.metrics import GlobalMean, is_value
from lumen.core.primitives import Aux
from lumen.errors import LossError, printable
from lumen.parallel.comm import collectives
from lumen.parallel.tensor.autograd_collectives import TPGroup


def merged_aux(aux: Any, group: TPGroup) -> Any:
    """The aux of a loss with each typed value merged over the ranks of `group`; the same on all of them."""
    if aux is None:
        return None
    if isinstance(aux, Aux):
        merged: Any = aux
        return merged.replace(metrics=merged_aux(aux.metrics, group)) if aux.metrics else aux
    leaves, spec = tree.flatten(aux, is_value)
    own = [index for index, leaf in enumerate(leaves) if is_value(leaf) and not isinstance(leaf, GlobalMean)]
    if not own:
        return aux
    for index, copies in zip(own, _all_gather([leaves[index] for index in own], group), strict=True):
        leaves[index] = type(leaves[index]).merge_all(copies)
    return tree.unflatten(spec, leaves)


def check_aux(aux: Any) -> None:
    """Raise `LossError` for a tensor that does not say how it merges; buffers have rules of their own."""
    values = aux.metrics if isinstance(aux, Aux) else aux
    leaves = tree.leaves(values, is_value)
    for path, leaf in zip(tree.paths(values, is_value), leaves, strict=True):
        if isinstance(leaf, Tensor):
            raise LossError(
                f"aux[{printable(path)!r}] is a tensor of shape {tuple(leaf.shape)}, computed from one rank's positions"
                " under lm.context_parallel. Declare how it merges: lm.Mean.of(x), lm.Sum.of(x) or lm.Max.of(x)."
            )


def _all_gather(values: list[Any], group: TPGroup) -> list[list[Any]]:
    """The values of all ranks, by value and then by rank, sent as bytes in one message."""
    tensors, spec = tree.flatten(values)
    sent = [x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors]
    flat = torch.cat(sent)
    _check_sizes(flat, group)
    by_rank = collectives.all_gather(flat, group.group)().view(group.size, -1)
    gathered = []
    for row in by_rank:
        blocks = row.split([len(x) for x in sent])
        copies = [b.clone().view(x.dtype).view(x.shape) for b, x in zip(blocks, tensors, strict=True)]
        gathered.append(tree.unflatten(spec, copies))
    return [list(copies) for copies in zip(*gathered, strict=True)]


def _check_sizes(flat: Tensor, group: TPGroup) -> None:
    largest, negated = group.reduce(torch.tensor([len(flat), -len(flat)], device=flat.device), "max").tolist()
    if largest != -negated:
        raise LossError(
            "a metric in the aux of a loss has a different size on each rank along context, which"
            " lm.context_parallel cannot merge. Report sums of it: lm.Mean.of(x), lm.Sum.of(x)."
        )
