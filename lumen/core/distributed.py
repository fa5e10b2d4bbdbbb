"""Rank and world size: the one module that asks `torch.distributed` for them.

Processes that compute the same rows together (along a mesh's axes `pipeline`, `context` and `tensor`) receive the same
rows. They are next to each other by rank, and count once wherever rows are split or results are summed over rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from lumen.core import _torch_compat


def is_distributed() -> bool:
    """Whether this process belongs to a group of several, or of one that was set up as a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 alone, and before `lm.mesh` or a parallel transform has joined the processes.

    >>> import lumen as lm
    >>> if lm.rank() == 0:
    ...     print("once, however many processes there are")
    once, however many processes there are
    """
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are; 1 alone, and before they are joined.

    >>> import lumen as lm
    >>> lm.world_size()
    1
    """
    return dist.get_world_size() if is_distributed() else 1


_row_replicas = 1
_planned: tuple[Callable[[], Any], bool] = (lambda: None, False)  # the world that was looked at last, and the answer


def row_replicas() -> int:
    """How many processes are handed the same rows; 1 where each has rows of its own."""
    return _row_replicas if is_distributed() else 1


def set_row_replicas(processes: int) -> None:
    """From now on, each `processes` that follow each other by rank are handed the same rows, as a mesh declares."""
    global _row_replicas
    _row_replicas = processes


def rows() -> tuple[int, int]:
    """The index of this process's shard of rows, and the number of shards.

    >>> rows()
    (0, 1)
    """
    return rank() // row_replicas(), world_size() // row_replicas()


def shard_bounds(count: int, rank: int, size: int) -> tuple[int, int]:
    """The first of `count` rows in the shard of `rank`, of `size`, and the row after its last.

    Shards are contiguous and as even as possible, the first ones longer.

    >>> [shard_bounds(5, rank, 3) for rank in range(3)]
    [(0, 2), (2, 4), (4, 5)]
    """
    rows, extra = divmod(count, size)
    start = rank * rows + min(rank, extra)
    return start, start + rows + (rank < extra)


def store(prefix: str) -> Store:
    """The keys below `prefix` that all processes share, over a connection of its own: its waits hold up no one else."""
    shared = PrefixStore(prefix, _torch_compat.get_default_store())
    own: Store = shared.clone()  # type: ignore[attr-defined]
    return own


def is_dry_run() -> bool:
    """Whether the other processes are only thought of, as in `lm.plan`: nothing is sent, and tensors have no values.

    So what compares processes, or reads a number from a tensor to go by it, must do without.
    """
    global _planned
    world = dist.group.WORLD if dist.is_available() else None
    if world is None:
        return False
    if _planned[0]() is not world:  # asked several times a step: torch takes a while to name its backend
        _planned = weakref.ref(world), dist.get_backend() == dist.Backend.FAKE
    return _planned[1]


def real_tensors() -> AbstractContextManager[object]:
    """While it is entered, new tensors have values, also where a run is only planned."""
    if not is_dry_run():
        return nullcontext()
    return _torch_compat.unset_fake_temporarily()  # type: ignore[no-any-return]
