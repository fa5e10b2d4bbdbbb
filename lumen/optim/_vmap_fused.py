"""Updates under `vmap`: lane by lane with the kernels for plain tensors, where that is faster.

Under `vmap`, an update is about fifteen operations, each of which reads and writes all its operands. A fused kernel
reads and writes params and moments once: an eager step of 32 lanes of 10⁵ params takes a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, distributed
from lumen.core._torch_compat import in_make_fx

_MIN_LANE_SIZE = 2**14  # params; in smaller lanes, calling the kernels takes longer than the memory traffic they save

InPlace = Callable[[Any, Any, Any, Tensor | None], Any]


def should_fuse_under_vmap(params: Any, *others: Any) -> bool:
    """Whether this is a single eager `vmap` over large enough lanes, outside differentiation."""
    if torch.compiler.is_compiling() or in_make_fx():
        return False
    if distributed.is_dry_run():  # the kernels read values, which fake tensors do not have
        return False
    level = _torch_compat.peek_interpreter_stack()
    if level is None or level.key() != _torch_compat.TransformType.Vmap or level.level() != 1:
        return False
    leaves = tree.tensors(params)
    if sum(leaf.numel() for leaf in leaves) < _MIN_LANE_SIZE:
        return False
    return not any(leaf.requires_grad for leaf in (*leaves, *tree.tensors(others)))


def update(in_place: InPlace, grads: Any, state: Any, params: Any, skip: Tensor | None, donate: bool) -> Any:
    """The next `(params, state)`; with `donate`, in the memory of the old ones."""
    targets, target_spec = tree.flatten((params, state))
    inputs, input_spec = tree.flatten((grads, skip))

    def update_lane(targets: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        params, state = target_spec.unflatten(targets)
        grads, skip = tree.unflatten(input_spec, inputs)
        return tree.leaves((params, in_place(grads, state, params, skip)))

    tensors = _ByLane.apply(update_lane, len(targets), donate, *targets, *inputs)  # type: ignore[no-untyped-call]
    return target_spec.unflatten(tensors)


class _ByLane(torch.autograd.Function):
    """`update_lane(targets, inputs)` for each lane; it updates targets in place or returns new tensors for them."""

    @staticmethod
    def forward(update_lane: Any, count: int, donate: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        targets = tensors[:count] if donate else [leaf.clone() for leaf in tensors[:count]]
        return tuple(update_lane(targets, tensors[count:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], update_lane: Any, count: int, donate: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        stacked = [_lanes_first(leaf, dim, info.batch_size) for leaf, dim in zip(tensors, in_dims[3:], strict=True)]
        # Updated in place, so copied if lanes share their memory or nothing is donated.
        targets = [
            leaf if donate and dim is not None else leaf.clone(memory_format=torch.contiguous_format)
            for leaf, dim in zip(stacked[:count], in_dims[3:], strict=False)
        ]
        lane_targets = list(zip(*(leaf.unbind() for leaf in targets), strict=True))
        lane_inputs = list(zip(*(leaf.unbind() for leaf in stacked[count:]), strict=True))
        results = [update_lane(*lane) for lane in zip(lane_targets, lane_inputs, strict=True)]
        updated = []
        for i, leaf in enumerate(targets):
            same = all(after[i] is before[i] for after, before in zip(results, lane_targets, strict=True))
            updated.append(leaf if same else torch.stack([after[i] for after in results]))
        return tuple(updated), 0


def _lanes_first(leaf: Tensor, dim: int | None, lanes: int) -> Tensor:
    """`leaf` with the lanes as its first dimension."""
    if dim is None:
        return leaf.expand(lanes, *leaf.shape)
    return leaf if dim == 0 else leaf.movedim(dim, 0)
