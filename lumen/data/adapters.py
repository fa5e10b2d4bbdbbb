"""`feed`: the `Feed` for whatever data a run is given.

A `Loader` goes on from any place exactly, at no cost. Other data does so as well as it can, and what cannot be exact
says so once. Under several processes each feed gives the rows of this rank, or its data is refused (`refusal`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from lumen.checkpoint import json_tree
from lumen.core import distributed
from lumen.data import grain
from lumen.data._per_rank import PerRank
from lumen.data.adapter import Feed, announce, say, say_foreign
from lumen.data.forks import quiet_forks
from lumen.data.grain_adapter import GrainFeed
from lumen.data.hf_streams import buffered_rows, is_stream, order_of
from lumen.data.loader import Cursor, Loader
from lumen.data.nested import listeners, nested, shares
from lumen.data.rank_batches import RankBatches
from lumen.data.rank_split import assert_same_on_all_ranks, is_stateful_loader, is_table_loader, refusal, split_by_rank
from lumen.data.resume import Start, is_known, resumed
from lumen.data.workers import is_live
from lumen.errors import BatchError

_END = object()


class _Ordered(Feed):
    """A `Loader`: its order is known from (seed, epoch)."""

    data: Loader
    _foreign = False

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        if position and self._foreign:
            say_foreign(self.data, position)
        return self.data.epoch(number, position)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        return self.data.stacked(number, position, stop, size)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        return {"order": self.data.state_dict(Cursor(epoch, position))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._foreign = "order" not in state
        if not self._foreign:
            self.data.load_state_dict(state["order"])


class _Torch(Feed):
    """A `DataLoader` over a map-style data set: its sampler is wound forward, without reading data."""

    data: DataLoader[Any]
    _start: Start | None = None
    _saved: Start | None = None
    _cut: RankBatches | None = None  # where a batch is that of all ranks

    def __init__(self, data: Any, *, cut: bool) -> None:
        super().__init__(data)
        self._cut = RankBatches(data) if cut else None

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        self._check_ranks(position)
        saved, self._saved = self._saved, None
        if position and saved is None and self._cut is None:
            return super().epoch(number, position)
        fresh = announce(self.data, number)
        if position and saved is None:
            say_foreign(self.data, position)
        elif position:
            self._confess()
        live = is_live(self.data) if self._cut is None else self._cut.live and not fresh
        self._start = saved if position and saved is not None else Start.here(self.data, live)
        if self._cut is not None:
            self._start, batches = self._cut.epoch(self._start, position, fresh_workers=fresh)
            return batches
        with quiet_forks():
            return resumed(self.data, self._start, position) if position else iter(self.data)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        start = {"start": self._start.state_dict()} if position and self._start is not None else {}
        return start if self._cut is not None else {**super().state_dict(epoch, position), **start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = Start.of(state["start"]) if "start" in state else None
        if self._cut is None:
            super().load_state_dict(state)

    def _confess(self) -> None:
        if not self.data.in_order and self.data.num_workers:
            say(
                "this run goes on within an epoch of a torch DataLoader with in_order=False: which of its batches came"
                " before the checkpoint is not known, so that some may come twice and others not. Write in_order=True."
            )
        elif not is_known(self.data) and self._cut is None:
            say(
                "this run goes on within an epoch of a torch DataLoader whose sampler is not one of torch's: its order"
                " is that of the uninterrupted run only if it is drawn as an epoch begins, from the global generators"
                " or the sampler's `generator`. An lm.Loader is exact."
            )
        elif self.data.num_workers:
            say(
                "this run goes on within an epoch of a torch DataLoader with worker processes: the order of the rows is"
                " that of the uninterrupted run, but what the data set draws at random is not. An lm.Loader is exact."
            )


class _Stateful(Feed):
    """Data that keeps its own place: torchdata's `StatefulDataLoader`, Hugging Face's `IterableDataset`."""

    _unsaved = False  # whether the checkpoint has no place
    _told = False
    _live: Iterator[Any] | None = None
    _given = 0  # batches of this epoch, those before a checkpoint too
    _ended = False
    _rest: tuple[int, int] | None = None  # of the epoch that was gone on with: batches before, and after

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        if position and self._unsaved:
            return super().epoch(number, position)
        self._check_ranks(position)
        announce(self.data, number)
        self._live = iter(self._pass())
        return self._counted(self._live, position)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        ranks = super().state_dict(epoch, position)
        if position and position != self._given:  # more was read, for a step that unrolls: its state is a later one
            return ranks
        if not position and not self._is_over():
            return ranks
        try:
            return {**ranks, **_order(self.data), "state": json_tree.pack(self.data.state_dict())}
        except TypeError as error:
            if not self._told:
                self._told = True
                say(f"the place of this {type(self.data).__name__} is not in the checkpoint: {error}.")
            return ranks

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._unsaved = "state" not in state
        if self._unsaved:
            return
        if state.get("shuffles", "") != _order(self.data).get("shuffles", ""):
            raise BatchError(
                "this stream is shuffled in another order than that of the checkpoint, so its place there means"
                " nothing. Give the shuffle a seed: stream.shuffle(seed=0, buffer_size=…)."
            )
        self.data.load_state_dict(json_tree.unpack(state["state"]))
        self._confess()

    def _is_over(self) -> bool:
        """Whether the state at an epoch's end is worth keeping, and says that the epoch is over.

        With `set_epoch` an epoch is begun by its number. Without it a state that says that the epoch is not over would
        have the next one begin, and end, there: torchdata's loader learns of the end by being asked for one batch more.
        """
        if listeners(self.data):
            return False
        if not is_stateful_loader(self.data) or self._live is None:
            return True
        whole = self.length is not None and self._given >= self.length
        return self._ended or (whole and next(self._live, _END) is _END)

    def _confess(self) -> None:
        buffered = sum(buffered_rows(each) for each in nested(self.data) if is_stream(each))
        if buffered:
            say(
                f"this run goes on within an epoch of a stream with a shuffle buffer of {buffered} rows, which are in"
                " no checkpoint: up to so many rows of this epoch (for each worker process) are not seen, and the order"
                " of the others is another one. An lm.Loader over a map-style set shuffles exactly."
            )
        elif not listeners(self.data):
            say(
                f"this {type(self.data).__name__} goes on as its own state says; the order of later epochs is its own"
                " affair, and may not be that of the uninterrupted run. An lm.Loader is exact."
            )
        elif not any(is_stream(each) for each in nested(self.data)):
            say(
                f"this {type(self.data).__name__} goes on as its own state says, which Lumen cannot check."
                " An lm.Loader is exact."
            )

    def _counted(self, batches: Iterator[Any], position: int) -> Iterator[Any]:
        """The batches; raises `BatchError` where an epoch begins where the one did that was gone on with."""
        self._given, self._ended = position, False
        for batch in batches:
            self._given += 1
            yield batch
        self._ended = True
        count = self._given - position
        if position:
            self._rest = position, count
        elif self._rest is not None and count == self._rest[1]:
            before, after = self._rest
            raise BatchError(
                f"this {type(self.data).__name__} began a new epoch at batch {before}, where the checkpoint was made:"
                f" it gave {after} batches, and has {before + after}. What it reads must start from its beginning in"
                " the next epoch; give it a set_epoch(number) that forgets the loaded state."
            )


def feed(data: Iterable[Any]) -> Feed:
    """The `Feed` for `data`; raises `BatchError` for what gives no batches, or is nobody's rows (`refusal`)."""
    refused = refusal(data)
    if refused:
        raise BatchError(refused)
    own = isinstance(data, PerRank)
    source: Any = data.data if isinstance(data, PerRank) else data
    if not own and distributed.rows()[1] > 1:
        assert_same_on_all_ranks(source)
    if isinstance(source, Loader):
        return _Ordered(source)
    if is_table_loader(source):
        return _Torch(source, cut=distributed.world_size() > 1 and not own and not shares(source))
    if grain.kind_of(source):
        return GrainFeed(source, cut=grain.kind_of(source) == grain.MAP and not own and distributed.rows()[1] > 1)
    if not own:
        source = split_by_rank(source)
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return _Stateful(source)
    return Feed(source)


def _order(data: Any) -> dict[str, str]:
    """What tells a stream's order from another's."""
    found = [order_of(each) for each in nested(data) if is_stream(each)]
    return {"shuffles": "/".join(found)} if found else {}
