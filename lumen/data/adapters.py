"""`make_feed`: the `Feed` for each kind of data.

A `Loader` resumes exactly from any position, at no cost. Other data resumes as exactly as it can, and warns once if it
is inexact. With several processes each feed has the rows of this rank, or its data is rejected (`refusal`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from lumen.checkpoint import json_tree
from lumen.core import distributed
from lumen.data import grain
from lumen.data._per_rank import PerRank
from lumen.data.epoch_order import Start, draws_from_torch, resumed
from lumen.data.feed import Feed, begin_epoch, warn_inexact, warn_other_data
from lumen.data.forks import quiet_forks
from lumen.data.grain_adapter import GrainFeed
from lumen.data.hf_streams import buffered_rows, is_stream, order_of
from lumen.data.loader import Cursor, Loader
from lumen.data.nested import listeners, nested, shares
from lumen.data.rank_batches import RankBatches
from lumen.data.rank_split import assert_same_on_all_ranks, is_stateful_loader, is_table_loader, refusal, split_by_rank
from lumen.data.workers import is_live
from lumen.errors import BatchError

_END = object()


class _LoaderFeed(Feed):
    """A `Loader`, whose order is a function of (seed, epoch)."""

    data: Loader
    _is_foreign = False

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        if position and self._is_foreign:
            warn_other_data(self.data, position)
        return self.data.epoch(number, position)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        return self.data.stacked(number, position, stop, size)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        return {"order": self.data.state_dict(Cursor(epoch, position))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._is_foreign = "order" not in state
        if not self._is_foreign:
            self.data.load_state_dict(state["order"])


class _TableFeed(Feed):
    """A `DataLoader` over a map-style data set: its sampler is advanced without reading data."""

    data: DataLoader[Any]
    _start: Start | None = None
    _saved: Start | None = None
    _rank_batches: RankBatches | None = None  # if the loader has the rows of all ranks

    def __init__(self, data: Any, *, sharded: bool) -> None:
        super().__init__(data)
        self._rank_batches = RankBatches(data) if sharded else None

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        self._check_ranks(position)
        saved, self._saved = self._saved, None
        if position and saved is None and self._rank_batches is None:
            return super().epoch(number, position)
        is_restarted = begin_epoch(self.data, number)
        if position and saved is None:
            warn_other_data(self.data, position)
        elif position:
            self._warn_if_inexact()
        live = is_live(self.data) if self._rank_batches is None else self._rank_batches.live and not is_restarted
        self._start = saved if position and saved is not None else Start.capture(self.data, live)
        if self._rank_batches is not None:
            self._start, batches = self._rank_batches.epoch(self._start, position, restart=is_restarted)
            return batches
        with quiet_forks():
            return resumed(self.data, self._start, position) if position else iter(self.data)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        start = {"start": self._start.state_dict()} if position and self._start is not None else {}
        return start if self._rank_batches is not None else {**super().state_dict(epoch, position), **start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = Start.from_state(state["start"]) if "start" in state else None
        if self._rank_batches is None:
            super().load_state_dict(state)

    def _warn_if_inexact(self) -> None:
        if not self.data.in_order and self.data.num_workers:
            warn_inexact(
                "this run resumes within an epoch of a torch DataLoader with in_order=False: which of its batches came"
                " before the checkpoint is unknown, so some may be repeated and others skipped. Write in_order=True."
            )
        elif not draws_from_torch(self.data) and self._rank_batches is None:
            warn_inexact(
                "this run resumes within an epoch of a torch DataLoader whose sampler is not one of torch's: it has the"
                " order of the uninterrupted run only if it draws it as an epoch begins, from the global generators or"
                " the sampler's `generator`. An lm.Loader is exact."
            )
        elif self.data.num_workers:
            warn_inexact(
                "this run resumes within an epoch of a torch DataLoader with worker processes: the order of the rows is"
                " that of the uninterrupted run, but the data set's random numbers are not. An lm.Loader is exact."
            )


class _StatefulFeed(Feed):
    """Data that has its own state: torchdata's `StatefulDataLoader`, Hugging Face's `IterableDataset`."""

    _is_unsaved = False  # whether the checkpoint has no state of the data
    _has_warned = False
    _iterator: Iterator[Any] | None = None
    _count = 0  # batches of this epoch, including those before the checkpoint
    _ended = False
    _resumed_counts: tuple[int, int] | None = None  # batches of the resumed epoch before and after the checkpoint

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        if position and self._is_unsaved:
            return super().epoch(number, position)
        self._check_ranks(position)
        begin_epoch(self.data, number)
        self._iterator = iter(self._iterate())
        return self._counted(self._iterator, position)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        ranks = super().state_dict(epoch, position)
        if position and position != self._count:  # a step that unrolls has read more, so the state is a later one
            return ranks
        if not position and not self._is_over():
            return ranks
        try:
            return {**ranks, **_order(self.data), "state": json_tree.pack(self.data.state_dict())}
        except TypeError as error:
            if not self._has_warned:
                self._has_warned = True
                warn_inexact(f"the state of this {type(self.data).__name__} is not in the checkpoint: {error}.")
            return ranks

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._is_unsaved = "state" not in state
        if self._is_unsaved:
            return
        if state.get("shuffles", "") != _order(self.data).get("shuffles", ""):
            raise BatchError(
                "this stream is shuffled in another order than in the checkpoint, so its saved position is"
                " meaningless. Give the shuffle a seed: stream.shuffle(seed=0, buffer_size=…)."
            )
        self.data.load_state_dict(json_tree.unpack(state["state"]))
        self._warn_if_inexact()

    def _is_over(self) -> bool:
        """Whether the state at an epoch's end is to be saved, and says that the epoch is over.

        With `set_epoch` an epoch begins by its number. Without it, the next epoch would begin and end at a state that
        does not say so: torchdata's loader learns of the end only when it is asked for one more batch.
        """
        if listeners(self.data):
            return False
        if not is_stateful_loader(self.data) or self._iterator is None:
            return True
        is_complete = self.length is not None and self._count >= self.length
        return self._ended or (is_complete and next(self._iterator, _END) is _END)

    def _warn_if_inexact(self) -> None:
        buffered = sum(buffered_rows(source) for source in nested(self.data) if is_stream(source))
        if buffered:
            warn_inexact(
                f"this run resumes within an epoch of a stream with a shuffle buffer of {buffered} rows, which are in"
                " no checkpoint: up to as many rows of this epoch (for each worker process) are skipped, and the order"
                " of the others differs. An lm.Loader over a map-style data set shuffles exactly."
            )
        elif not listeners(self.data):
            warn_inexact(
                f"this {type(self.data).__name__} resumes from its own state; the order of its later epochs may differ"
                " from that of the uninterrupted run. An lm.Loader is exact."
            )
        elif not any(is_stream(source) for source in nested(self.data)):
            warn_inexact(
                f"this {type(self.data).__name__} resumes from its own state, which Lumen cannot check."
                " An lm.Loader is exact."
            )

    def _counted(self, batches: Iterator[Any], position: int) -> Iterator[Any]:
        """The batches; raises `BatchError` if a later epoch begins at the position of the checkpoint."""
        self._count, self._ended = position, False
        for batch in batches:
            self._count += 1
            yield batch
        self._ended = True
        count = self._count - position
        if position:
            self._resumed_counts = position, count
        elif self._resumed_counts is not None and count == self._resumed_counts[1]:
            before, after = self._resumed_counts
            raise BatchError(
                f"this {type(self.data).__name__} began a new epoch at batch {before}, the position of the checkpoint:"
                f" it gave {after} batches, and has {before + after}. Its source must start from the beginning in the"
                " next epoch; add a set_epoch(number) that drops the loaded state."
            )


class _RangeFeed(Feed):
    """A `range`, for a loop without data: each batch is a number, as a tensor, so that none of them is compiled in."""

    def _iterate(self) -> Iterator[Any]:
        return map(torch.tensor, self.data)


def make_feed(data: Iterable[Any]) -> Feed:
    """The `Feed` for `data`; raises `BatchError` for what has no batches, or rows of an unknown rank (`refusal`)."""
    message = refusal(data)
    if message:
        raise BatchError(message)
    is_marked = isinstance(data, PerRank)
    source: Any = data.data if isinstance(data, PerRank) else data
    if not is_marked and distributed.rows()[1] > 1:
        assert_same_on_all_ranks(source)
    if isinstance(source, Loader):
        return _LoaderFeed(source)
    if is_table_loader(source):
        return _TableFeed(source, sharded=distributed.world_size() > 1 and not is_marked and not shares(source))
    if grain.kind_of(source):
        is_map = grain.kind_of(source) == grain.MAP
        return GrainFeed(source, sharded=is_map and not is_marked and distributed.rows()[1] > 1)
    if isinstance(source, range):
        return _RangeFeed(source)
    if not is_marked:
        source = split_by_rank(source)
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return _StatefulFeed(source)
    return Feed(source)


def _order(data: Any) -> dict[str, str]:
    """The orders of the streams that `data` reads, to compare with those of a checkpoint."""
    orders = [order_of(source) for source in nested(data) if is_stream(source)]
    return {"shuffles": "/".join(orders)} if orders else {}
