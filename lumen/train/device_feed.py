"""`DeviceIterator`: the batches of a feed, as tensors on the state's device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core.step import device_of
from lumen.data.adapters import make_feed
from lumen.data.feed import Feed
from lumen.data.fetch import as_dict
from lumen.data.rank_split import refusal
from lumen.data.to_device import Move
from lumen.data.workers import release
from lumen.errors import BatchError
from lumen.train.distributed import ProcessGroupContext

_END = object()


def open_batches(data: Any, state: Any, group: ProcessGroupContext) -> DeviceIterator:
    """The batches of `data` for this process; raises `BatchError` on all ranks if one of them cannot use its data."""
    message = group.any_rank_value(refusal(data))
    if message:
        raise BatchError(message)
    return DeviceIterator(make_feed(data), state)


class DeviceIterator:
    """Moves batches to the device, and converts arrays to tensors and other mappings to dicts."""

    def __init__(self, feed: Feed, state: Any) -> None:
        self.length = feed.length
        self.state_dict = feed.state_dict
        self.load_state_dict = feed.load_state_dict
        self._feed = feed
        self._move = Move(device_of(state))

    def __iter__(self) -> Iterator[Any]:
        """The batches of the first epoch, for callers that need only a few."""
        return self.epoch(0)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        return self._moved(self._feed.epoch(number, position), lambda batch: batch, self._to_device)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        """Several batches at a time, as `Feed.stacked` returns them."""
        groups = self._feed.stacked(number, position, stop, size)
        if groups is None:
            return None
        return self._moved(groups, lambda pair: pair[0], lambda pair: (self._to_device(pair[0]), pair[1]))

    def _moved(self, items: Iterator[Any], batch_of: Callable[[Any], Any], move: Callable[[Any], Any]) -> Iterator[Any]:
        """The items, moved if the batch of the first one has to be: those of one data set are alike."""
        items = _releasing(items)
        first = next(items, _END)
        if first is _END:
            return iter(())
        chained = itertools.chain([first], items)
        return map(move, chained) if self._must_move(batch_of(first)) else chained

    def _must_move(self, batch: Any) -> bool:
        return as_dict(batch) is not batch or any(
            isinstance(x, np.ndarray) or (isinstance(x, Tensor) and x.device != self._move.device)
            for x in tree.leaves(batch)
        )

    def _to_device(self, batch: Any) -> Any:
        def convert(leaf: Any) -> Any:
            return self._move(torch.as_tensor(leaf)) if isinstance(leaf, Tensor | np.ndarray) else leaf

        return tree.map(convert, as_dict(batch))


def _releasing(items: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from items
    except Exception as error:
        release(error)
        raise
