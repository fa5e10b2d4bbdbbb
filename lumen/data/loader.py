"""`Loader`: batches in an order that (seed, epoch) determines, from any position, on any number of ranks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lumen import tree
from lumen.core import distributed as processes
from lumen.core.arguments import checked
from lumen.data.arguments import SEEDS, integer
from lumen.data.fetch import Collate, Fetch, Rows, source
from lumen.data.make_sampler import Choice, make_sampler
from lumen.data.nested import listeners
from lumen.data.samplers import Sampler
from lumen.data.to_device import Move
from lumen.data.workers import Workers
from lumen.errors import BatchError

VERSION = 1  # of the order and of the state_dict


class Cursor(NamedTuple):
    """The position of the next batch: the epoch, and the number of its batches before this one.

    >>> import lumen as lm
    >>> lm.data.Cursor(epoch=2)
    Cursor(epoch=2, position=0)
    """

    epoch: int = 0
    position: int = 0


@checked
class Loader:
    """Batches of a data set, in a new order each epoch, and a cursor that is plain data.

    Each pass (`for batch in loader`) iterates over the remaining batches of the cursor's epoch, so the next pass is the
    next epoch. `epoch` and `stream` read from any position without moving the cursor. Live iterators do not disturb
    each other; the cursor follows the one that returned a batch last.

    Args:
        dataset: columns or samples. Columns are a tensor, an array, a `TensorDataset` or a tree (tuple, dict, …) of
            equally long tensors and arrays, and are indexed at once. Samples are a list or any data set with `__len__`
            and `__getitem__`, and are read one by one and collated.
        batch_size: the rows of one optimizer step over all ranks. The last batch of an epoch may be smaller; `pad` pads
            it. With `tokens`, the most rows of a batch, and may be left out.
        seed: determines the order together with the epoch. Together with the position, it also seeds the global
            generators of torch (CPU), NumPy and Python, from which a data set may draw; the caller's states are
            restored.
        shuffle: whether to reorder the rows.
        workers: the number of processes that prepare batches ahead; the batches do not depend on it.
        drop_last: whether to leave out a smaller last batch.
        pad: whether to pad a smaller last batch by repeating its rows, so that all batches have one shape, and nothing
            is compiled again. Each batch then says which rows count by weights of 1.0 or 0.0, float32, as
            `batch["weight"]` of a dict, or as the last entry of a tuple. With `lm.Mean.of(losses, batch["weight"])`
            the loss and its gradient are exactly those of the smaller batch. BatchNorm in training mode sees the
            repeated rows, and a loss that is a plain scalar counts them.
        collate: makes a batch of a list of samples; by default torch's `default_collate`, leaf by leaf.
        device: the device of the batches.
        rank: the shard of each global batch to read. Shards are contiguous and as even as possible (the rule of
            `torch.tensor_split`), and together they are the batch; some may have 0 rows. By default those of the last
            `lm.mesh`, or of `torch.distributed` if it is initialized, else 0 of 1.
        world_size: the number of shards; give both or neither.
        prefetch: the number of batches that each worker prepares ahead.
        lengths: the length of each row, [n] integers in the unit of `tokens`.
        tokens: batches of rows of similar length instead of equally many rows: as many as fit, where a batch costs its
            rows times its longest row, padding included, over all ranks. Rows differ in length, so `collate` pads
            them. Without `shuffle`, batches run from the longest rows to the shortest.
        weights: how often to draw each row, [n] numbers of at least 0 with any sum. An epoch has n independent draws
            with replacement, so a row may come several times, or not at all.

    Raises:
        BatchError: a data set without length or rows, columns that differ in length, arguments out of range; `pad`
            with `drop_last`, or with batches of a form to which no weights can be added; lengths or weights that are
            not one number for each row; a row longer than `tokens`; weights that are all 0, negative or not finite.

    >>> import lumen as lm
    >>> import torch
    >>> loader = lm.Loader({"x": torch.arange(5)}, batch_size=2, seed=0)
    >>> [batch["x"].tolist() for batch in loader]
    [[3, 4], [0, 2], [1]]
    >>> loader.cursor
    Cursor(epoch=1, position=0)
    >>> [batch["x"].tolist() for batch in loader.epoch(0, start=1)]
    [[0, 2], [1]]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        drop_last: bool = False,
        pad: bool = False,
        collate: Collate | None = None,
        device: torch.device | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch: int = 2,
        lengths: ArrayLike | None = None,
        tokens: int | None = None,
        weights: ArrayLike | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
        self.seed = integer("seed", seed, *SEEDS)
        reader = source(dataset, collate)
        self._rows = len(reader)
        choice = Choice(self.batch_size, self.seed, shuffle, drop_last, pad, lengths, tokens, weights)
        self._sampler = make_sampler(dataset, self._rows, choice)
        self._pad = pad
        self._share = _share(rank, world_size)
        self._move = None if device is None else Move(device)
        self._read = Fetch(reader, self._sampler, self.seed, listeners(dataset))
        self._fetch = _fetcher(self._read, workers, prefetch)
        self._workers = workers
        self._cursor = Cursor()
        self._order = {
            "version": VERSION,
            "seed": self.seed,
            "shuffle": bool(shuffle),
            "rows": self._rows,
            "batch_size": self.batch_size or 0,
            "drop_last": bool(drop_last),
            **self._sampler.identity(),
        }

    def __len__(self) -> int:
        """The number of batches in an epoch, the same on each rank."""
        return self._sampler.batches

    def __iter__(self) -> Iterator[Any]:
        """The remaining batches of the epoch; the cursor moves when a batch is returned, not when it is read."""
        return self._continue(self._walk(self._cursor, endless=False))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from position `start`, without reading those before.

        Raises BatchError for a negative epoch or a start outside [0, len(loader)].
        """
        return (batch for batch, _ in self._walk(self._check(epoch, start), endless=False))

    def stream(self, epoch: int = 0, position: int = 0) -> Iterator[tuple[Any, Cursor]]:
        """An endless iterator of batches, epoch after epoch, each with the cursor after it.

        Raises BatchError as `epoch` does.

        >>> import lumen as lm
        >>> import torch
        >>> stream = lm.Loader(torch.arange(4), batch_size=2).stream(epoch=7)
        >>> next(stream)[1], next(stream)[1]
        (Cursor(epoch=7, position=1), Cursor(epoch=8, position=0))
        """
        return self._walk(self._check(epoch, position), endless=True)

    def stacked(self, epoch: int, start: int, stop: int, size: Callable[[], int]) -> Iterator[tuple[Any, int]] | None:
        """The batches `start` to `stop` of an epoch, several at a time as one with a new leading dim, and their number.

        `size` is called before each group. If fewer full batches remain, they are returned one by one, without that
        dim. None if reading several at once gains nothing: for samples, and with worker processes.
        """
        return self._stacked(self._check(epoch, start), stop, size) if self._read.stacks and not self._workers else None

    def _stacked(self, at: Cursor, stop: int, size: Callable[[], int]) -> Iterator[tuple[Any, int]]:
        share = self._pass_share()
        epoch, position = at
        end = min(stop, self._sampler.batches)
        full = end if self._pad else min(end, self._rows // (self._sampler.fixed_size or 1))
        while position < end:
            count = size()
            if count == 1 or position + count > full:
                batch, count = self._read[_shard(self._sampler, epoch, position, share)], 1
            else:
                keys = [_shard(self._sampler, epoch, i, share) for i in range(position, position + count)]
                batch = self._read.stacked(keys)
            yield batch if self._move is None else _to_device(batch, self._move), count
            position += count

    @property
    def share(self) -> tuple[int, int] | None:
        """The `rank` and `world_size` of the arguments, or None if each pass takes those of the process group."""
        return self._share

    @property
    def cursor(self) -> Cursor:
        """The position at which the next pass starts."""
        return self._cursor

    def state_dict(self, cursor: Cursor | None = None) -> dict[str, int]:
        """The cursor, or another one such as `stream` returns, and everything that the order depends on."""
        return {**(self._cursor if cursor is None else cursor)._asdict(), **self._order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move the cursor to the position of `state_dict`, on any number of ranks and workers.

        Raises BatchError if the state belongs to another order; the cursor does not move then.
        """
        _check_order(state, self._order)
        self._cursor = self._check(state["epoch"], state["position"])

    def _continue(self, walk: Iterator[tuple[Any, Cursor]]) -> Iterator[Any]:
        for batch, after in walk:
            self._cursor = after
            yield batch

    def _walk(self, start: Cursor, *, endless: bool) -> Iterator[tuple[Any, Cursor]]:
        share = self._pass_share()
        pending: deque[Cursor] = deque()  # workers read ahead of the batches that are returned

        def keys() -> Generator[Rows]:
            for epoch in itertools.count(start.epoch) if endless else (start.epoch,):
                for position in range(start.position if epoch == start.epoch else 0, self._sampler.batches):
                    last = position + 1 == self._sampler.batches
                    pending.append(Cursor(epoch + 1) if last else Cursor(epoch, position + 1))
                    yield _shard(self._sampler, epoch, position, share)

        # Closed at once: otherwise worker processes that wait for the next pass would keep this loader alive.
        with closing(keys()) as pass_keys:
            for batch in self._fetch(pass_keys):
                yield batch if self._move is None else _to_device(batch, self._move), pending.popleft()

    def _pass_share(self) -> tuple[int, int, int | None]:
        """The rank, the world size, and with `pad` the rows of the shard of a full batch."""
        # Read at each pass, as a loader may be created before the process group.
        rank, world_size = self._share or processes.rows()
        start, stop = processes.shard_bounds(self._sampler.fixed_size or 0, rank, world_size)
        return rank, world_size, stop - start if self._pad else None

    def _check(self, epoch: int, position: int) -> Cursor:
        return Cursor(integer("epoch", epoch, 0, 2**63), integer("position", position, 0, self._sampler.batches + 1))


def _check_order(state: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    """Raise BatchError unless `state` belongs to this order."""
    missing = [name for name in (*Cursor._fields, *order) if name not in state]
    if missing:
        raise BatchError(f"The state lacks {', '.join(missing)}; pass what Loader.state_dict returned.")
    saved = {name: value for name, value in state.items() if name not in Cursor._fields}
    differences = [f"{name}={saved[name]} (here {order.get(name)})" for name in saved if saved[name] != order.get(name)]
    if differences:
        raise BatchError(
            f"The state belongs to another order: {', '.join(differences)}. To continue it, create the Loader with the"
            " same values; to start over, do not load the state."
        )


def _shard(sampler: Sampler, epoch: int, position: int, share: tuple[int, int, int | None]) -> Rows:
    first, last = sampler.bounds(epoch, position)
    rank, world_size, fill = share
    if world_size == 1:
        return Rows(epoch, first, last, fill)
    start, stop = processes.shard_bounds(last - first, rank, world_size)
    return Rows(epoch, first + start, first + stop, fill)


def _to_device(batch: Any, move: Move) -> Any:
    return tree.map(lambda leaf: move(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def _fetcher(fetch: Fetch, workers: int, prefetch: int) -> Callable[[Iterable[Rows]], Iterator[Any]]:
    count, ahead = integer("workers", workers, 0), integer("prefetch", prefetch, 1)
    return Workers(fetch, count, ahead).map if count else lambda keys: map(fetch.__getitem__, keys)


def _share(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise BatchError(f"Loader got rank={rank} and world_size={world_size}; give both or neither.")
    world_size = integer("world_size", world_size, 1)
    return integer("rank", rank, 0, world_size), world_size
