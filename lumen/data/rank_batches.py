"""A torch DataLoader whose batches are sharded by rank: all ranks have the same order, and each row is on one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lumen.core import distributed
from lumen.data.epoch_order import PresetSampler, Start, entries, is_sequential, with_sampler
from lumen.data.fetch import without_rows
from lumen.data.forks import quiet_forks
from lumen.data.workers import is_live, restart_workers
from lumen.errors import BatchError


class RankBatches:
    """One rank's shards of the batches of `loader`. As in `lm.Loader`, they are contiguous and as even as possible.

    The loader's own sampler decides the order, which each rank draws from the random generators of rank 0. A shard
    without rows takes its shapes from the batch's first row.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._sampler = PresetSampler()
        self._loader_of_rank: DataLoader[Any] | None = None
        self._compared = False

    def epoch(self, start: Start, position: int, *, restart: bool) -> tuple[Start, Iterator[Any]]:
        """The common start of the order, and the shards of the batches from `position` on."""
        rank, size = distributed.rows()
        if restart and self._loader_of_rank is not None:
            restart_workers(self._loader_of_rank)
        start = self._broadcast(start)
        # As in a single process, drawing the order advances the generators of rank 0.
        order = entries(self._loader, start, position, keep=not position and distributed.rank() == 0)
        first = next(order, None)
        self._check_same_order(first)
        is_empty: deque[bool] = deque()  # workers read ahead of the batches that are returned
        self._sampler.entries = _shards(first, order, rank, size, is_empty)
        if self._loader_of_rank is None:
            persistent = self._loader.persistent_workers
            self._loader_of_rank = with_sampler(
                self._loader, self._sampler, start.seed(position, rank), persistent=persistent
            )
        with quiet_forks():
            return start, _without_placeholders(iter(self._loader_of_rank), is_empty)

    @property
    def live(self) -> bool:
        """Whether worker processes wait for the next epoch."""
        return self._loader_of_rank is not None and is_live(self._loader_of_rank)

    def _broadcast(self, start: Start) -> Start:
        """The start of rank 0, unless nothing is drawn from it."""
        if distributed.is_dry_run() or is_sequential(self._loader):
            return start
        objects = [start.state_dict()]
        dist.broadcast_object_list(objects, src=0)
        return Start.from_state(objects[0])

    def _check_same_order(self, first: Any) -> None:
        """Raise `BatchError` if the ranks have different data sets, or draw different orders."""
        if distributed.is_dry_run() or (self._compared and is_sequential(self._loader)):
            return
        self._compared = True
        dataset: Any = self._loader.dataset
        own_rows = len(dataset) if hasattr(dataset, "__len__") else None
        by_rank: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(by_rank, (own_rows, _plain(first)))
        if any(entry != by_rank[0] for entry in by_rank):
            rows, orders = zip(*by_rank, strict=True)
            what = f"data sets of {list(rows)} rows" if len(set(rows)) > 1 else f"orders that begin with {list(orders)}"
            raise BatchError(
                f"the ranks have {what} in this DataLoader. Its batches are sharded by rank, so all ranks need the"
                " same. If each rank has its own rows, write lm.data.per_rank(loader). A sampler that shuffles must"
                " draw from torch's, NumPy's or Python's global generator, its own `generator`, or the epoch."
            )


def _shards(first: Any, order: Iterator[Any], rank: int, size: int, is_empty: deque[bool]) -> Iterator[Any]:
    entry = first
    while entry is not None:
        if not isinstance(entry, list | tuple | Tensor) and not hasattr(entry, "__array__"):
            raise BatchError(
                f"this DataLoader has batch_size=None, and its sampler gives {entry!r}: what the data set reads for it"
                " cannot be sharded by rank. Write DataLoader(dataset, batch_size=…) or a batch_sampler; if each rank's"
                " sampler gives its own rows, write lm.data.per_rank(loader)."
            )
        start, stop = distributed.shard_bounds(len(entry), rank, size)
        is_empty.append(start == stop)
        yield entry[:1] if start == stop else entry[start:stop]
        entry = next(order, None)


def _without_placeholders(batches: Iterator[Any], is_empty: deque[bool]) -> Iterator[Any]:
    for batch in batches:
        yield without_rows(batch) if is_empty.popleft() else batch


def _plain(entry: Any) -> Any:
    return entry.tolist() if hasattr(entry, "tolist") else list(entry) if isinstance(entry, tuple) else entry
