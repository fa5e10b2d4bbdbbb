"""Rules that need full tensors where each rank holds rows of them: all-gathered one leaf at a time.

Every rank computes the same update of the full tensor and keeps its own rows, so the numbers are those of one process.
The cost is one all-gather per leaf, and every rank repeats the computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import sharding
from lumen.optim._numerics import zip_map
from lumen.optim._param_names import dotted_names

Leaf = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


def map_full_tensors(
    leaf: Leaf, params: Any, grads: Any, state: Any = (), blank: Callable[[Tensor], Any] = lambda p: p
) -> Any:
    """`leaf(p, g, state of p) -> (update, new state)` for each leaf, on full tensors: two trees of results.

    `blank(p)` is the initial state of a leaf. Its tensors with the shape of `p` are those that are sharded like `p`.

    >>> params = {"w": torch.tensor([3.0, 4.0])}
    >>> map_full_tensors(lambda p, g, _: (g / p.norm(), None), params, params)[0]["w"]
    tensor([0.6000, 0.8000])
    """
    gatherer = sharding.param_gatherer()
    if gatherer is None:
        return zip_map(leaf, params, grads, state)
    names = iter(dotted_names(params))

    def on_full_tensors(p: Tensor, g: Tensor, leaf_state: Any) -> tuple[Tensor, Any]:
        shape = gatherer.shape(next(names))
        if not shape:
            return leaf(p, g, leaf_state)
        tensors, spec = tree.flatten(leaf_state)
        sharded = [like.shape == shape for like in tree.leaves(blank(_meta_tensor(shape)))] if tensors else []
        shards = [x for x, is_sharded in zip(tensors, sharded, strict=True) if is_sharded]
        p, g, *full = gatherer.gather([p, g, *shards], shape)
        gathered = iter(full)
        tensors = [next(gathered) if is_sharded else x for x, is_sharded in zip(tensors, sharded, strict=True)]
        update, new_state = leaf(p, g, spec.unflatten(tensors))
        new_tensors = [
            gatherer.shard(x).clone() if is_sharded else x
            for x, is_sharded in zip(tree.leaves(new_state), sharded, strict=True)
        ]
        return gatherer.shard(update).clone(), spec.unflatten(new_tensors) if tensors else new_state

    return zip_map(on_full_tensors, params, grads, state)


def init_full_tensors(blank: Callable[[Tensor], Any], params: Any) -> Any:
    """`blank(p)` for each full leaf, of which tensors with the shape of `p` are cut to this rank's shard."""
    gatherer = sharding.param_gatherer()
    if gatherer is None:
        return tree.map(blank, params)
    names = iter(dotted_names(params))

    def init_leaf(p: Tensor) -> Any:
        shape = gatherer.shape(next(names))
        if not shape:
            return blank(p)
        # An expanded tensor needs no memory for its entries.
        full = blank(p.new_zeros(()).expand(shape))
        return tree.map(lambda x: gatherer.shard(x).clone() if x.shape == shape else x, full)

    return tree.map(init_leaf, params)


def _meta_tensor(shape: torch.Size) -> Tensor:
    return torch.empty(shape, device="meta")
