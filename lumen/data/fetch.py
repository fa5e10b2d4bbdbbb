"""From row numbers to a batch: whole columns indexed at once, or samples read one by one and collated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset, default_collate, get_worker_info

from lumen import tree
from lumen.data import permutation
from lumen.data.rng import Seeded
from lumen.errors import BatchError, printable

Collate = Callable[[list[Any]], Any]
Column = Tensor | np.ndarray[Any, Any]


class Rows(NamedTuple):
    """One rank's part of a global batch: the positions `start` … `stop` - 1 of an epoch's order.

    `fill` is None, or as how many rows it is to come: some are then repeated, and the batch tells which count.
    """

    epoch: int
    start: int
    stop: int
    fill: int | None = None


class Source(Protocol):
    """What batches are read from."""

    def __len__(self) -> int:
        """The number of rows."""

    def read(self, rows: permutation.Indices, seed: int) -> Any:
        """The batch of these rows, in this order; whatever is random in it is a function of `seed`."""


class Fetch:
    """Batches by their rows: a pure function that worker processes get a copy of."""

    def __init__(self, source: Source, seed: int, shuffle: bool, listeners: Sequence[Any] = ()) -> None:
        self._source, self._seed, self._shuffle = source, seed, shuffle
        self._length = len(source)
        self._listeners, self._epoch = listeners, -1

    def __getitem__(self, key: Rows) -> Any:
        if self._listeners and key.epoch != self._epoch:
            for each in self._listeners:  # here, as a worker process has its own copy of them
                each.set_epoch(key.epoch)
            self._epoch = key.epoch
        # The first position, and not the batch's number, so that ranks draw different numbers.
        batch = self._source.read(self._rows(key), permutation.hash64(self._seed, key.epoch, key.start))
        return batch if key.fill is None else _with_weight(batch, _weight(key))

    def stacked(self, keys: Sequence[Rows]) -> Any:
        """Several batches of equally many rows as one with a new leading dim, read at once: of columns only."""
        assert isinstance(self._source, Columns)
        parts = [self._rows(key) for key in keys]
        read = self._source.read(np.concatenate(parts), 0)
        batches = tree.map(lambda leaf: leaf.unflatten(0, (len(parts), len(parts[0]))), read)
        return batches if keys[0].fill is None else _with_weight(batches, torch.stack([_weight(key) for key in keys]))

    @property
    def stacks(self) -> bool:
        """Whether batches can be read stacked."""
        return isinstance(self._source, Columns)

    def _rows(self, key: Rows) -> permutation.Indices:
        rows = permutation.rows(self._length, self._seed if self._shuffle else None, key.epoch, key.start, key.stop)
        if key.fill is None or key.fill == len(rows):
            return rows
        return np.resize(rows, key.fill) if len(rows) else np.zeros(key.fill, np.int64)


def _weight(key: Rows) -> Tensor:
    assert key.fill is not None
    return (torch.arange(key.fill) < key.stop - key.start).float()


def _with_weight(batch: Any, weight: Tensor) -> Any:
    """The batch with the weights of its rows: under "weight" in a dict, else as the last of a tuple."""
    if type(batch) is dict and "weight" not in batch:
        return {**batch, "weight": weight}
    if type(batch) is tuple:
        return *batch, weight
    if isinstance(batch, Tensor):
        return batch, weight
    found = "a dict that has a 'weight'" if type(batch) is dict else f"a {type(batch).__name__}"
    raise BatchError(
        "Loader(pad=True) tells which rows count as batch['weight'] of a dict, or as the last of a tuple; this batch"
        f" is {found}. Give it another form by collate=…, or rename that column."
    )


class Columns:
    """Equally long tensors and arrays: a batch takes one indexing operation for each."""

    def __init__(self, columns: Any) -> None:
        leaves, self._spec = tree.flatten(columns)
        names = tree.paths(columns)
        self._leaves = [_column(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
        lengths = [len(leaf) for leaf in self._leaves]
        if len(set(lengths)) > 1:
            found = ", ".join(f"{printable(name)}: {length}" for name, length in zip(names, lengths, strict=True))
            raise BatchError(f"Columns of a data set must be equally long; found {found}. Cut or repeat some.")
        self._length = lengths[0] if lengths else 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        """One row, for a `collate` that takes samples."""
        return tree.unflatten(self._spec, [torch.as_tensor(leaf[index]) for leaf in self._leaves])

    def read(self, rows: permutation.Indices, seed: int) -> Any:
        """The rows of each column; nothing here is random."""
        index = torch.from_numpy(rows)
        return tree.unflatten(self._spec, [_take(leaf, rows, index) for leaf in self._leaves])


class Samples:
    """A map-style data set, or a list: samples are read one by one and collated."""

    def __init__(self, dataset: Any, collate: Collate | None) -> None:
        self._dataset, self._collate = dataset, collate or _stack

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, rows: permutation.Indices, seed: int) -> Any:
        """The collated samples; an exception gets a note that names the row."""
        with Seeded(seed):
            if not len(rows):  # a rank without a part of this batch: the shapes are those of any sample
                return emptied(self._batch([0]))
            return self._batch(rows.tolist())

    def _batch(self, indices: list[int]) -> Any:
        samples = self._at_once(indices) if hasattr(self._dataset, "__getitems__") else self._each(indices)
        try:
            return as_dict(self._collate(samples))
        except Exception as error:
            _note(error, f"the batch of rows {indices}")
            raise

    def _at_once(self, indices: list[int]) -> list[Any]:
        try:
            return list(self._dataset.__getitems__(indices))
        except Exception as error:
            _note(error, f"rows {indices}")
            raise

    def _each(self, indices: list[int]) -> list[Any]:
        samples: list[Any] = []
        dataset = self._dataset
        try:
            for index in indices:
                samples.append(dataset[index])  # noqa: PERF401 (their number tells which one failed)
        except Exception as error:
            _note(error, f"row {indices[len(samples)]}")
            raise
        return samples


def source(dataset: Any, collate: Collate | None) -> Source:
    """What reads `dataset`; raises BatchError for what has no length or no rows."""
    found: Source
    if type(dataset) is TensorDataset and collate is None:  # a subclass may read its rows in another way
        found = Columns(tuple(dataset.tensors))
    elif isinstance(dataset, Tensor | np.ndarray) or _is_tree(dataset):
        columns = Columns(dataset)
        found = columns if collate is None else Samples(columns, collate)
    elif _is_map(dataset):
        found = Samples(dataset, collate)
    else:
        raise BatchError(
            f"Loader got a {type(dataset).__name__}, which has no length or no row numbers. It takes a"
            " data set with __len__ and __getitem__, a list of samples, or a tree of equally long tensors or"
            " arrays. An iterable of batches needs no Loader: pass it to Runner.fit directly."
        )
    if len(found) == 0:
        raise BatchError("Loader got a data set without rows; it takes at least one. Check where they get lost.")
    return found


def _note(error: Exception, what: str) -> None:
    error.add_note(f"Raised while the Loader read {what} of its data set.")


def as_dict(batch: Any) -> Any:
    """A batch that is a mapping of its own kind, as transformers' BatchEncoding, as a dict: others are no trees."""
    if type(batch) is dict or not isinstance(batch, Mapping):
        return batch
    return dict(batch) if tree.structure(batch).is_leaf() else batch


def _is_tree(dataset: Any) -> bool:
    return not isinstance(dataset, list) and not tree.structure(dataset).is_leaf()


def _is_map(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset):
        return False
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _column(leaf: Any, name: str) -> Column:
    where = f"Column {printable(name)} of the data set" if name else "The data set"
    if not isinstance(leaf, Tensor | np.ndarray):
        raise BatchError(
            f"{where} is a {type(leaf).__name__}; columns are tensors or numpy arrays: convert it with"
            " torch.tensor(...), or pass a list of samples."
        )
    if leaf.ndim == 0:
        raise BatchError(f"{where} is 0-d and has no rows; expand it to one value a row, or leave it out.")
    if isinstance(leaf, Tensor):
        return leaf.detach()
    try:
        torch.from_numpy(np.empty(0, leaf.dtype))
    except TypeError as error:
        raise BatchError(f"{where} is of {leaf.dtype}, unknown to torch; convert it with .astype.") from error
    return np.asarray(leaf)  # a memory map stays one: rows are read from the file as they are needed


def _take(column: Column, rows: permutation.Indices, index: Tensor) -> Tensor:
    if isinstance(column, Tensor):
        return column.index_select(0, index.to(column.device))
    return torch.from_numpy(column.take(rows, axis=0))


def _stack(samples: Sequence[Any]) -> Any:
    """Torch's collation leaf by leaf, so that samples may be any trees, and tuples stay tuples."""
    if _are_flat(samples):  # the common case, in half the time; zip refuses samples of other lengths
        return tuple(map(_collated, zip(*samples, strict=True)))
    return tree.map(lambda *leaves: default_collate(list(leaves)), samples[0], *samples[1:])


def _collated(leaves: tuple[Any, ...]) -> Any:
    """What `default_collate` makes of equal leaves of samples, the usual ones on a shorter way."""
    kind = type(leaves[0])
    if {*map(type, leaves)} == {kind}:
        if kind in _NUMBERS:
            return torch.from_numpy(np.array(leaves, _NUMBERS[kind]))
        if kind is Tensor and get_worker_info() is None and leaves[0].layout is torch.strided:
            return torch.stack(leaves)
    return default_collate(list(leaves))


def _are_flat(samples: Sequence[Any]) -> bool:
    """Whether they are tuples of leaves, which in the first are tensors, arrays and numbers."""
    first = samples[0]
    return type(first) is tuple and {*map(type, first)} <= _LEAVES and bool(first) and {*map(type, samples)} == {tuple}


_NUMBERS: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_}
_LEAVES = frozenset((Tensor, np.ndarray, *_NUMBERS))


def emptied(batch: Any) -> Any:
    """A batch of one row without it; raises `BatchError` where nothing in it has rows that could be left out."""
    batch = as_dict(batch)
    if not any(_has_rows(leaf) for leaf in tree.leaves(batch)):
        raise BatchError(
            f"this rank has no rows of a batch, which is a {type(batch).__name__} without tensors or arrays of rows, so"
            " it cannot be given without them. Use a collate that gives tensors, a batch size that is a multiple of the"
            " number of processes, and drop_last=True."
        )
    return tree.map(lambda leaf: leaf[:0] if _has_rows(leaf) else leaf, batch)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0
