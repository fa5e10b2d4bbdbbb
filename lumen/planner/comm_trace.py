"""`Sent`: a collective as torch's dispatcher sees it, what it carries, and between whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup, Work

from lumen import tree


class Sent(NamedTuple):
    """One collective: `nbytes` is what every process ends with or begins with, whichever is more."""

    kind: str
    nbytes: int
    ranks: tuple[int, ...]
    stage: str
    phase: str


class _Form(NamedTuple):
    """Where an operation of the dispatcher has its group and what it carries."""

    kind: str
    group: int
    payload: int | None  # the argument, or None for what it returns


# In place, by the names of `torch.ops.c10d`, and functional ones.
_FORMS: Mapping[str, _Form] = {
    "c10d::allreduce_": _Form("all-reduce", 1, 0),
    "c10d::allreduce_coalesced_": _Form("all-reduce", 1, 0),
    "c10d::broadcast_": _Form("broadcast", 1, 0),
    "c10d::reduce_": _Form("reduce", 1, 0),
    "c10d::send": _Form("send", 1, 0),
    "c10d::recv_": _Form("receive", 1, 0),
    "c10d::_allgather_base_": _Form("all-gather", 2, 0),
    "c10d::allgather_": _Form("all-gather", 2, 0),
    "c10d::allgather_into_tensor_coalesced_": _Form("all-gather", 2, 0),
    "c10d::_reduce_scatter_base_": _Form("reduce-scatter", 2, 1),
    "c10d::reduce_scatter_": _Form("reduce-scatter", 2, 1),
    "c10d::reduce_scatter_tensor_coalesced_": _Form("reduce-scatter", 2, 1),
    "c10d::alltoall_base_": _Form("all-to-all", 2, 1),
    "c10d::alltoall_": _Form("all-to-all", 2, 1),
    "c10d::gather_": _Form("gather", 2, 0),
    "c10d::scatter_": _Form("scatter", 2, 1),
    "_c10d_functional::all_reduce": _Form("all-reduce", 2, 0),
    "_c10d_functional::all_reduce_": _Form("all-reduce", 2, 0),
    "_c10d_functional::broadcast": _Form("broadcast", 2, 0),
    "_c10d_functional::broadcast_": _Form("broadcast", 2, 0),
    "_c10d_functional::all_gather_into_tensor": _Form("all-gather", 2, None),
    "_c10d_functional::reduce_scatter_tensor": _Form("reduce-scatter", 3, 0),
    "_c10d_functional::all_to_all_single": _Form("all-to-all", 3, 0),
}


def payload(name: str, args: Sequence[Any], out: Any) -> list[Tensor] | None:
    """The tensors that the operation `name` carries; None where it is no collective."""
    form = _FORMS.get(name)
    if form is None:
        return None
    return tree.tensors(out if form.payload is None else args[form.payload])


def read(name: str, args: Sequence[Any], carried: Sequence[Tensor], stage: str, phase: str) -> Sent:
    """The collective `name` with these arguments."""
    form = _FORMS[name]
    given = args[form.group]
    group = _resolve_process_group(given) if isinstance(given, str) else ProcessGroup.unbox(given)  # type: ignore[arg-type]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in carried)
    return Sent(form.kind, nbytes, tuple(dist.get_process_group_ranks(group)), stage, phase)


def work_of(out: Any) -> Any | None:
    """What a caller will wait for, None where there is nothing of the kind."""
    last = out[-1] if isinstance(out, list | tuple) and out else out
    return Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


def axes_of(ranks: Sequence[int], sizes: Mapping[str, int]) -> str:
    """The axes of a mesh along which the places of `ranks` differ, the last axis being the innermost.

    >>> axes_of([1, 5], {"data": 2, "shard": 4}), axes_of([4, 5, 6, 7], {"data": 2, "shard": 4})
    ('data', 'shard')
    """
    places = [_place(rank, sizes) for rank in ranks]
    names = [name for i, name in enumerate(sizes) if len({place[i] for place in places}) > 1]
    return "×".join(names) or "itself"


def _place(rank: int, sizes: Mapping[str, int]) -> list[int]:
    place: list[int] = []
    for size in reversed([*sizes.values()]):
        rank, here = divmod(rank, size)
        place.insert(0, here)
    return place
