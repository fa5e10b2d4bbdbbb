"""Where in a DeepSpeed engine's memory this process's part of each param lies, and what is made of such parts.

ZeRO lays params end to end and cuts the whole into equal runs of entries, one for each process. So a process has a
span of some params, nothing of others, and of a matrix not whole rows.
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
    """The entries of a param, from `start` of its flat form, that this process updates: `master`, flat, in 32 bits.

    Other processes have the rest, or (`copied`) the same.
    """

    start: int
    master: Tensor
    shape: torch.Size
    copied: bool

    def shaped(self, flat: Tensor) -> Tensor:
        """Some of these entries as a tensor with as many dims as the whole, by which masks know a matrix."""
        return flat.view(-1, *[1] * (len(self.shape) - 1))

    def part(self, whole: Tensor) -> Tensor:
        """These entries of a whole tensor, in memory of their own."""
        return self.shaped(whole.reshape(-1)[self.start : self.start + self.master.numel()].clone())


def spans(
    engine: Any, params: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], stage: int
) -> dict[str, Span]:
    """Each param's span; `shapes` are those of the state's params."""
    found = {}
    for name, param in params.items():
        if stage == 0:
            start, master = 0, param.data.view(-1)
        else:
            start, master = _of_stage3(engine.optimizer, param) if stage == 3 else _of_stage1(param)
        found[name] = Span(start, master, shapes[name], copied=stage == 0)
    return found


def _of_stage1(param: Any) -> tuple[int, Tensor]:
    found = param._hp_mapping
    if found is None:
        return 0, torch.empty(0, device=param.device)
    return found.lp_fragment_address.start, found.hp_fragment.detach()


def _of_stage3(optimizer: Any, param: Any) -> tuple[int, Tensor]:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
    start = dist.get_rank() * param.partition_numel()
    size = max(0, min(param.partition_numel(), param.ds_numel - start))
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return start, flat.detach()[offset : offset + size]


def cut(values: Any, places: Sequence[tuple[int, str]], found: Mapping[str, Span]) -> Any:
    """`values` with this process's part of each leaf at `places`, which has a param's shape."""
    leaves, spec = tree.flatten(values)
    for place, name in places:
        leaves[place] = found[name].part(leaves[place])
    return spec.unflatten(leaves)


def whole(values: Any, places: Sequence[tuple[int, str]], found: Mapping[str, Span]) -> Any:
    """The inverse of `cut`, on every process."""
    leaves, spec = tree.flatten(values)
    for place, name in places:
        leaves[place] = gathered(leaves[place], found[name])
    return spec.unflatten(leaves)


def gathered(part: Tensor, span: Span) -> Tensor:
    """The whole tensor of which this process has these entries, bitwise."""
    shape = span.shape
    out = torch.zeros(math.prod(shape), dtype=part.dtype, device=part.device)
    out[span.start : span.start + part.numel()].copy_(part.reshape(-1))
    if not span.copied:
        # As bytes, of which all but one process's are zero: a sum of floats would lose the sign of a zero.
        dist.all_reduce(out.view(torch.uint8))
    return out.view(shape)
