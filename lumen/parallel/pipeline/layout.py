"""States of which each process keeps the params of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import sharding
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.sharding import LeafSpec, ShardingSlot, ShardSpec, Slice, SpecTree
from lumen.parallel.pipeline.share import PipelineGroup


@pytree_dataclass
class PipelineSharding(ShardingSlot):
    """The slot of `pipeline`, all static: specs of leaves, split points, and the number of processes."""

    specs: SpecTree = static()
    split_points: tuple[str, ...] = static()
    size: int = static()


def specs_of(state: Any, owners: Mapping[str, int]) -> SpecTree:
    """The specs of a state that is about to be split: of params, of frozen ones, and of what is laid out like them."""
    tensors = {name: tensor for name, tensor in {**state.buffers, **state.params}.items() if name in owners}
    return SpecTree.of(state, {name: LeafSpec(tuple(tensor.shape), dim=0) for name, tensor in tensors.items()})


def _located(state: Any, specs: SpecTree) -> list[tuple[int, tuple[int, ...], str]]:
    """The index, full shape and param of each leaf that lives on one stage."""
    shapes = sharding.locate_all(state, {(): specs})
    names = dict(specs.locate(state))
    return [(index, shape, names[index]) for index, shape in shapes]


def keep_own(state: Any, specs: SpecTree, owners: Mapping[str, int], group: PipelineGroup) -> Any:
    """`state` with an empty tensor in place of each leaf of other processes' stages."""
    leaves, structure = tree.flatten(state)
    for index, shape, name in _located(state, specs):
        if owners[name] % group.size != group.index:
            leaves[index] = _without_rows(leaves[index], shape)
    return structure.unflatten(leaves)


def _without_rows(leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
    return leaf.new_empty((0, *shape[1:]))


def gather(state: Any, specs: SpecTree, owners: Mapping[str, int], group: PipelineGroup) -> Any:
    """The inverse of `keep_own`, on every process."""
    leaves, structure = tree.flatten(state)
    for index, shape, name in _located(state, specs):
        source, leaf = owners[name] % group.size, leaves[index]
        full = leaf.detach().contiguous() if source == group.index else leaf.new_empty(shape)
        leaves[index] = group.broadcast(full, source) if full.numel() else full
    return structure.unflatten(leaves)


def shard_specs(state: Any, specs: SpecTree, owners: Mapping[str, int], group: PipelineGroup) -> dict[int, ShardSpec]:
    """Which process has a leaf, by the leaf's index."""
    specs_of_leaves = {}
    for index, shape, name in _located(state, specs):
        is_own = owners[name] % group.size == group.index
        zeros = (0,) * len(shape)
        boxes = (Slice(zeros, zeros, shape),) if is_own else ()
        specs_of_leaves[index] = ShardSpec(shape, boxes, owner=is_own)
    return specs_of_leaves
