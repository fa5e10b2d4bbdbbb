"""`BatchStream`: the batches of epoch after epoch, which can be read again from an earlier position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lumen.data import Cursor
from lumen.errors import BatchError
from lumen.train.device_feed import DeviceIterator

_END = object()


class BatchStream:
    """Reads batches from any position; one that continues where the last read ended opens nothing anew."""

    def __init__(self, feed: DeviceIterator) -> None:
        self.position = Cursor()
        self._feed = feed
        self._batches: Iterator[Any] | None = None

    def read(self, start: Cursor, count: int) -> Iterator[Any]:
        """`count` batches from `start`; `position` is then that of the next one."""
        if self._batches is None or start != self.position:
            self._seek(start)
        for _ in range(count):
            yield self._next()

    def _seek(self, position: Cursor) -> None:
        self.position = position
        self._batches = None  # closed before its successor opens: both may have workers
        self._batches = self._feed.epoch(*position)

    def _next(self) -> Any:
        batch = next(self._batches or iter(()), _END)
        if batch is _END:
            self._seek(Cursor(self.position.epoch + 1))
            batch = next(self._batches or iter(()), _END)
        if batch is _END:
            raise BatchError(
                f"the data gave no batch in epoch {self.position.epoch}: it is empty, or it is a generator or an"
                " iterator that was used before, which has one epoch. Give data that can be iterated again, such as"
                " an lm.Loader."
            )
        self.position = self.position._replace(position=self.position.position + 1)
        return batch
