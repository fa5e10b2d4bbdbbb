"""`CollectiveCall`: a collective as torch's dispatcher sees it, with its payload and its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from lumen import tree
from lumen.core import _torch_compat


class CollectiveCall(NamedTuple):
    """One collective: `nbytes` is the size of its input or its output on a rank, whichever is larger."""

    kind: str
    nbytes: int
    ranks: tuple[int, ...]
    stage: str
    phase: str


class _Signature(NamedTuple):
    """The arguments of a dispatched operation that hold its process group and its payload."""

    kind: str
    group: int
    payload: int | None  # the index of the argument, or None for the result


# The in-place collectives of `torch.ops.c10d`, and the functional ones.
_SIGNATURES: Mapping[str, _Signature] = {
    "c10d::allreduce_": _Signature("all-reduce", 1, 0),
    "c10d::allreduce_coalesced_": _Signature("all-reduce", 1, 0),
    "c10d::broadcast_": _Signature("broadcast", 1, 0),
    "c10d::reduce_": _Signature("reduce", 1, 0),
    "c10d::send": _Signature("send", 1, 0),
    "c10d::recv_": _Signature("receive", 1, 0),
    "c10d::_allgather_base_": _Signature("all-gather", 2, 0),
    "c10d::allgather_": _Signature("all-gather", 2, 0),
    "c10d::allgather_into_tensor_coalesced_": _Signature("all-gather", 2, 0),
    "c10d::_reduce_scatter_base_": _Signature("reduce-scatter", 2, 1),
    "c10d::reduce_scatter_": _Signature("reduce-scatter", 2, 1),
    "c10d::reduce_scatter_tensor_coalesced_": _Signature("reduce-scatter", 2, 1),
    "c10d::alltoall_base_": _Signature("all-to-all", 2, 1),
    "c10d::alltoall_": _Signature("all-to-all", 2, 1),
    "c10d::gather_": _Signature("gather", 2, 0),
    "c10d::scatter_": _Signature("scatter", 2, 1),
    "_c10d_functional::all_reduce": _Signature("all-reduce", 2, 0),
    "_c10d_functional::all_reduce_": _Signature("all-reduce", 2, 0),
    "_c10d_functional::broadcast": _Signature("broadcast", 2, 0),
    "_c10d_functional::broadcast_": _Signature("broadcast", 2, 0),
    "_c10d_functional::all_gather_into_tensor": _Signature("all-gather", 2, None),
    "_c10d_functional::reduce_scatter_tensor": _Signature("reduce-scatter", 3, 0),
    "_c10d_functional::all_to_all_single": _Signature("all-to-all", 3, 0),
}


def payload(name: str, args: Sequence[Any], result: Any) -> list[Tensor] | None:
    """The tensors that the operation `name` sends or receives; None if it is not a collective."""
    signature = _SIGNATURES.get(name)
    if signature is None:
        return None
    return tree.tensors(result if signature.payload is None else args[signature.payload])


def collective_call(
    name: str, args: Sequence[Any], tensors: Sequence[Tensor], stage: str, phase: str
) -> CollectiveCall:
    """The call of the collective `name` with these arguments."""
    signature = _SIGNATURES[name]
    group_arg = args[signature.group]
    is_name = isinstance(group_arg, str)
    group = _torch_compat.resolve_process_group(group_arg) if is_name else ProcessGroup.unbox(group_arg)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return CollectiveCall(signature.kind, nbytes, tuple(dist.get_process_group_ranks(group)), stage, phase)


def work_of(result: Any) -> Any | None:
    """The `Work` handle in the result of a collective, or None."""
    last = result[-1] if isinstance(result, list | tuple) and result else result
    return Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


def axes_of(ranks: Sequence[int], sizes: Mapping[str, int]) -> str:
    """The axes of a mesh along which the coordinates of `ranks` differ; the last axis is the innermost.

    >>> axes_of([1, 5], {"data": 2, "shard": 4}), axes_of([4, 5, 6, 7], {"data": 2, "shard": 4})
    ('data', 'shard')
    """
    coordinates = [_coordinates(rank, sizes) for rank in ranks]
    names = [name for i, name in enumerate(sizes) if len({point[i] for point in coordinates}) > 1]
    return "×".join(names) or "itself"


def _coordinates(rank: int, sizes: Mapping[str, int]) -> list[int]:
    coordinates: list[int] = []
    for size in reversed([*sizes.values()]):
        rank, index = divmod(rank, size)
        coordinates.insert(0, index)
    return coordinates
