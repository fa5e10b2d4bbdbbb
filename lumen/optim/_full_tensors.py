"""Rules that look at whole tensors, where each process holds rows of them: gathered leaf by leaf, as they are needed.

Every process computes the same update of the whole tensor and keeps its own rows of it, so the numbers are those of one
process, at the cost of one gather for each leaf and of everybody's doing all the work.
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


def whole_map(
    leaf: Leaf, params: Any, grads: Any, state: Any = (), blank: Callable[[Tensor], Any] = lambda p: p
) -> Any:
    """`leaf(p, g, state of p) -> (update, new state)` for each leaf, on whole tensors: two trees of what it returns.

    `blank(p)` is the state of a leaf to begin with: which of its tensors are cut as `p` is can be told by their shapes.

    >>> params = {"w": torch.tensor([3.0, 4.0])}
    >>> whole_map(lambda p, g, _: (g / p.norm(), None), params, params)[0]["w"]
    tensor([0.6000, 0.8000])
    """
    wholes = sharding.wholes()
    if wholes is None:
        return zip_map(leaf, params, grads, state)
    names = iter(dotted_names(params))

    def on_whole(p: Tensor, g: Tensor, kept: Any) -> tuple[Tensor, Any]:
        shape = wholes.shape(next(names))
        if not shape:
            return leaf(p, g, kept)
        held, spec = tree.flatten(kept)
        cut = [like.shape == shape for like in tree.leaves(blank(_shell(shape)))] if held else []
        p, g, *rows = wholes.gather([p, g, *(x for x, is_cut in zip(held, cut, strict=True) if is_cut)], shape)
        gathered = iter(rows)
        held = [next(gathered) if is_cut else x for x, is_cut in zip(held, cut, strict=True)]
        update, new = leaf(p, g, spec.unflatten(held))
        after = [wholes.part(x).clone() if is_cut else x for x, is_cut in zip(tree.leaves(new), cut, strict=True)]
        return wholes.part(update).clone(), spec.unflatten(after) if held else new

    return zip_map(on_whole, params, grads, state)


def whole_init(blank: Callable[[Tensor], Any], params: Any) -> Any:
    """`blank(p)` for each leaf, made for whole tensors; of what has their shape, this process's part."""
    wholes = sharding.wholes()
    if wholes is None:
        return tree.map(blank, params)
    names = iter(dotted_names(params))

    def of_whole(p: Tensor) -> Any:
        shape = wholes.shape(next(names))
        if not shape:
            return blank(p)
        # Expanded, a whole tensor takes no memory.
        made = blank(p.new_zeros(()).expand(shape))
        return tree.map(lambda x: wholes.part(x).clone() if x.shape == shape else x, made)

    return tree.map(of_whole, params)


def _shell(shape: torch.Size) -> Tensor:
    return torch.empty(shape, device="meta")
