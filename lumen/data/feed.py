"""`Feed`: batches of whatever data a run is given, epoch by epoch, and the place to go on from.

A `Loader` goes on from any place exactly, at no cost. Other data does so as well as it can, and what cannot be exact
says so once.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lumen.checkpoint import plain
from lumen.data.forks import quiet_forks
from lumen.data.loader import Cursor, Loader
from lumen.data.skip import Start, resumed
from lumen.errors import BatchError, InexactWarning


class Feed:
    """Batches of any re-iterable data; going on within an epoch reads the earlier batches again and drops them.

    `length` is the number of batches in an epoch where that is known.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.length = _length(data)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        if position and not isinstance(self.data, Sequence):
            warnings.warn(
                f"this run goes on at batch {position} of its data, a {type(self.data).__name__}, which cannot start"
                " there: the batches before are read again and dropped. The run is exact only if each pass gives"
                " them in the same order. An lm.Loader goes on at once, and exactly.",
                InexactWarning,
                stacklevel=2,
            )
        return itertools.islice(iter(self.data), position, None)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        """Like `epoch`, `size()` batches at a time, stacked, and how many they are; None where data has no such way."""
        return None

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from there, the place that was reached: plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make ready to go on from there."""


class _Ordered(Feed):
    """A `Loader`: its order is known from (seed, epoch)."""

    data: Loader

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        return self.data.epoch(number, position)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        return self.data.stacked(number, position, stop, size)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        return {"order": self.data.state_dict(Cursor(epoch, position))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.data.load_state_dict(state["order"])


class _Torch(Feed):
    """A `DataLoader` over a map-style data set: its sampler is wound forward, without reading data."""

    data: DataLoader[Any]
    _start: Start | None = None
    _saved: Start | None = None

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        _set_epoch(self.data, number)
        saved, self._saved = self._saved, None
        if not position or saved is None:
            self._start = Start.here(self.data)
            with quiet_forks():
                return itertools.islice(iter(self.data), position, None)
        if self.data.num_workers:
            warnings.warn(
                "this run goes on within an epoch of a torch DataLoader with worker processes: the order of the rows is"
                " that of the uninterrupted run, but what the data set draws at random is not. An lm.Loader is exact.",
                InexactWarning,
                stacklevel=2,
            )
        self._start = saved
        with quiet_forks():
            return resumed(self.data, saved, position)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        return {"start": self._start.state_dict()} if position and self._start is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = Start.of(state["start"]) if "start" in state else None


class _Stateful(Feed):
    """Data that keeps its own place: torchdata's `StatefulDataLoader`, Hugging Face's `IterableDataset`."""

    _unsaved = False

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        _set_epoch(self.data, number)
        if position and self._unsaved:
            return super().epoch(number, position)
        return iter(self.data)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        # With `set_epoch`, an epoch is begun by its number; the state at an end would only say that it is over.
        if not position and hasattr(self.data, "set_epoch"):
            return {}
        try:
            return {"state": plain.pack(self.data.state_dict())}
        except TypeError as error:
            if not self._unsaved:
                self._unsaved = True
                warnings.warn(
                    f"the place of this {type(self.data).__name__} is not in the checkpoint: {error}.",
                    InexactWarning,
                    stacklevel=2,
                )
            return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._unsaved = "state" not in state
        if self._unsaved:
            return
        self.data.load_state_dict(plain.unpack(state["state"]))
        if not hasattr(self.data, "set_epoch"):
            warnings.warn(
                f"this {type(self.data).__name__} goes on exactly to the end of its epoch; the order of later epochs is"
                " its sampler's own affair, and may not be that of the uninterrupted run. An lm.Loader is exact.",
                InexactWarning,
                stacklevel=2,
            )


def feed(data: Iterable[Any]) -> Feed:
    """The `Feed` for `data`; raises `BatchError` for what gives no batches."""
    if isinstance(data, Loader):
        return _Ordered(data)
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        return _Stateful(data)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return _Torch(data)
    if isinstance(data, str | bytes | Mapping) or not hasattr(data, "__iter__"):
        raise BatchError(
            f"the data must be an lm.Loader or an iterable of batches, not {type(data).__name__}."
            " For tensors in memory write lm.Loader(data, batch_size=64)."
        )
    return Feed(data)


def _set_epoch(data: Any, number: int) -> None:
    """Tell what shuffles by the number of the epoch, as torch's DistributedSampler and Hugging Face's sets do."""
    for part in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        announce = getattr(part, "set_epoch", None)
        if announce is not None:
            announce(number)


def _length(data: Any) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset
        return None
