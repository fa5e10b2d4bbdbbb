"""Which entries of each param a rank has in a DeepSpeed engine's memory, and states sharded in the same way.

ZeRO lays params end to end and divides their entries into equal runs, one for each rank. So a rank has a span of some
params and nothing of others, and a span of a matrix can begin in the middle of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumen import tree


class Span(NamedTuple):
    """The entries of a param, from `start` of its flat form, that this rank updates: `master`, flat, in 32 bits.

    Other ranks have the other entries, or all have the same ones (`replicated`).
    """

    start: int
    master: Tensor
    shape: torch.Size
    replicated: bool

    def shaped(self, flat: Tensor) -> Tensor:
        """Some of these entries as a tensor with as many dims as the param, by which masks know a matrix."""
        return flat.view(-1, *[1] * (len(self.shape) - 1))

    def shard(self, full: Tensor) -> Tensor:
        """These entries of a full tensor, as a copy."""
        return self.shaped(full.reshape(-1)[self.start : self.start + self.master.numel()].clone())


def find_spans(
    engine: Any, params: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], stage: int
) -> dict[str, Span]:
    """Each param's span; `shapes` are those of the state's params."""
    spans = {}
    for name, param in params.items():
        if stage == 0:
            start, master = 0, param.data.view(-1)
        else:
            start, master = _span_of_stage3(engine.optimizer, param) if stage == 3 else _span_of_stage1(param)
        spans[name] = Span(start, master, shapes[name], replicated=stage == 0)
    return spans


def _span_of_stage1(param: Any) -> tuple[int, Tensor]:
    mapping = param._hp_mapping
    if mapping is None:
        return 0, torch.empty(0, device=param.device)
    return mapping.lp_fragment_address.start, mapping.hp_fragment.detach()


def _span_of_stage3(optimizer: Any, param: Any) -> tuple[int, Tensor]:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
    start = dist.get_rank() * param.partition_numel()
    size = max(0, min(param.partition_numel(), param.ds_numel - start))
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return start, flat.detach()[offset : offset + size]


def shard_tree(values: Any, param_slots: Sequence[tuple[int, str]], spans: Mapping[str, Span]) -> Any:
    """`values` with this rank's span of each leaf among `param_slots`, which has a param's shape."""
    leaves, structure = tree.flatten(values)
    for index, name in param_slots:
        leaves[index] = spans[name].shard(leaves[index])
    return structure.unflatten(leaves)


def gather_tree(values: Any, param_slots: Sequence[tuple[int, str]], spans: Mapping[str, Span]) -> Any:
    """The inverse of `shard_tree`, on every rank."""
    leaves, structure = tree.flatten(values)
    for index, name in param_slots:
        leaves[index] = gather_span(leaves[index], spans[name])
    return structure.unflatten(leaves)


def gather_span(shard: Tensor, span: Span) -> Tensor:
    """The full tensor of which this rank has these entries, bitwise."""
    shape = span.shape
    full = torch.zeros(math.prod(shape), dtype=shard.dtype, device=shard.device)
    full[span.start : span.start + shard.numel()].copy_(shard.reshape(-1))
    if not span.replicated:
        # As bytes, of which all but one rank's are zero: a sum of floats would lose the sign of a zero.
        dist.all_reduce(full.view(torch.uint8))
    return full.view(shape)
