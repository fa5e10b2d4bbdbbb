"""A torch DataLoader whose batches are cut by rank: the same order on all, each row on one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lumen.core import distributed
from lumen.data.fetch import emptied
from lumen.data.forks import quiet_forks
from lumen.data.resume import Keys, Start, entries, is_sequential, with_keys
from lumen.data.workers import is_live, restarted
from lumen.errors import BatchError


class RankBatches:
    """The part of one rank of each batch of `loader`, by the rule of `lm.Loader`: contiguous, and as even as possible.

    The loader's own sampler gives the order, drawn on each rank from the first one's random generators. A part without
    rows comes with the shapes of the batch's first row.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._keys = Keys()
        self._cut: DataLoader[Any] | None = None
        self._compared = False

    def epoch(self, start: Start, position: int, *, fresh_workers: bool) -> tuple[Start, Iterator[Any]]:
        """The parts of the batches from `position`, and the start of the order that all agreed on."""
        rank, size = distributed.rows()
        if fresh_workers and self._cut is not None:
            restarted(self._cut)
        start = self._agreed(start)
        # As in one process, the first rank's generators are after it where the order has left them.
        order = entries(self._loader, start, position, moves_on=not position and distributed.rank() == 0)
        first = next(order, None)
        self._compare(first)
        without_rows: deque[bool] = deque()  # workers run ahead of what is handed out
        self._keys.entries = _parts(first, order, rank, size, without_rows)
        if self._cut is None:
            persistent = self._loader.persistent_workers
            self._cut = with_keys(self._loader, self._keys, start.seed(position, rank), persistent=persistent)
        with quiet_forks():
            return start, _filtered(iter(self._cut), without_rows)

    @property
    def live(self) -> bool:
        """Whether worker processes wait for the next epoch."""
        return self._cut is not None and is_live(self._cut)

    def _agreed(self, start: Start) -> Start:
        """The first rank's start, where anything is drawn from it."""
        if distributed.is_dry_run() or is_sequential(self._loader):
            return start
        box = [start.state_dict()]
        dist.broadcast_object_list(box, src=0)
        return Start.of(box[0])

    def _compare(self, first: Any) -> None:
        """Raise `BatchError` where the ranks have other data sets, or draw other orders."""
        if distributed.is_dry_run() or (self._compared and is_sequential(self._loader)):
            return
        self._compared = True
        dataset: Any = self._loader.dataset
        mine = (len(dataset) if hasattr(dataset, "__len__") else None, _plain(first))
        found: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(found, mine)
        if any(each != found[0] for each in found):
            rows, orders = zip(*found, strict=True)
            what = f"data sets of {list(rows)} rows" if len(set(rows)) > 1 else f"orders that begin with {list(orders)}"
            raise BatchError(
                f"the ranks give this DataLoader {what}, and it cuts each batch by rank, which takes the same on all."
                " Where each rank has rows of its own write lm.data.per_rank(loader); a sampler that shuffles must draw"
                " from torch's, NumPy's or Python's global generator, its own `generator`, or the epoch."
            )


def _parts(first: Any, order: Iterator[Any], rank: int, size: int, without_rows: deque[bool]) -> Iterator[Any]:
    entry = first
    while entry is not None:
        if not isinstance(entry, list | tuple | Tensor) and not hasattr(entry, "__array__"):
            raise BatchError(
                f"this DataLoader has batch_size=None, and its sampler gives {entry!r}: what the data set reads for it"
                " cannot be cut by rank. Write DataLoader(dataset, batch_size=…), a batch_sampler, or"
                " lm.data.per_rank(loader) where each rank's sampler gives rows of its own."
            )
        start, stop = distributed.shard_bounds(len(entry), rank, size)
        without_rows.append(start == stop)
        yield entry[:1] if start == stop else entry[start:stop]
        entry = next(order, None)


def _filtered(batches: Iterator[Any], without_rows: deque[bool]) -> Iterator[Any]:
    for batch in batches:
        yield emptied(batch) if without_rows.popleft() else batch


def _plain(entry: Any) -> Any:
    return entry.tolist() if hasattr(entry, "tolist") else list(entry) if isinstance(entry, tuple) else entry
