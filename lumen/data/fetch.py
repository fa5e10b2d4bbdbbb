"""Reads a batch by its row numbers: columns are indexed at once, samples are read one by one and collated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import length_hint
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset, default_collate, get_worker_info

from lumen import tree
from lumen.data import permutation
from lumen.data.messages import MOST_BYTES
from lumen.data.rng import Seeded
from lumen.data.samplers import Sampler
from lumen.errors import BatchError, printable

Collate = Callable[[list[Any]], Any]
Column = Tensor | np.ndarray[Any, Any]


class Rows(NamedTuple):
    """One rank's shard of a global batch: the positions `start` … `stop` - 1 of an epoch's order.

    `fill` is None, or the number of rows to pad it to: some rows are then repeated, and weights say which ones count.
    """

    epoch: int
    start: int
    stop: int
    fill: int | None = None


class Source(Protocol):
    """The source of batches."""

    def __len__(self) -> int:
        """The number of rows."""

    def read(self, rows: permutation.Indices, seed: int) -> Any:
        """The batch of these rows, in this order; its random numbers are a function of `seed`."""


class Fetch:
    """Batches by their rows: a pure function, of which each worker process has a copy."""

    def __init__(self, source: Source, sampler: Sampler, seed: int, listeners: Sequence[Any] = ()) -> None:
        self._source, self._sampler, self._seed = source, sampler, seed
        self._listeners, self._epoch = listeners, -1
        self._hash = 0  # of seed and epoch

    def __getitem__(self, key: Rows) -> Any:
        if key.epoch != self._epoch:
            self._begin(key.epoch)
        # Seeded by the first position rather than the batch's number, so that ranks draw different numbers.
        batch = self._source.read(self._rows(key), permutation.extended(self._hash, key.start))
        return batch if key.fill is None else _with_weight(batch, _weight(key))

    def _begin(self, epoch: int) -> None:
        for listener in self._listeners:  # here, as each worker process has its own copies
            listener.set_epoch(epoch)
        self._epoch, self._hash = epoch, permutation.hash64(self._seed, epoch)

    def stacked(self, keys: Sequence[Rows]) -> Any:
        """Several batches of the same size as one with a new leading dim; only columns can read them at once."""
        assert isinstance(self._source, Columns)
        rows = [self._rows(key) for key in keys]
        flat = self._source.read(np.concatenate(rows), 0)
        batches = tree.map(lambda leaf: leaf.unflatten(0, (len(rows), len(rows[0]))), flat)
        return batches if keys[0].fill is None else _with_weight(batches, torch.stack([_weight(key) for key in keys]))

    @property
    def stacks(self) -> bool:
        """Whether several batches can be read at once."""
        return isinstance(self._source, Columns) and self._sampler.fixed_size is not None

    def _rows(self, key: Rows) -> permutation.Indices:
        rows = self._sampler.rows(key.epoch, key.start, key.stop)
        if key.fill is None or key.fill == len(rows):
            return rows
        return np.resize(rows, key.fill) if len(rows) else np.zeros(key.fill, np.int64)


def _weight(key: Rows) -> Tensor:
    assert key.fill is not None
    return (torch.arange(key.fill) < key.stop - key.start).float()


def _with_weight(batch: Any, weight: Tensor) -> Any:
    """The batch with the weights of its rows: under "weight" in a dict, else as the last entry of a tuple."""
    if type(batch) is dict and "weight" not in batch:
        return {**batch, "weight": weight}
    if type(batch) is tuple:
        return *batch, weight
    if isinstance(batch, Tensor):
        return batch, weight
    kind = "a dict that has a 'weight'" if type(batch) is dict else f"a {type(batch).__name__}"
    raise BatchError(
        "Loader(pad=True) adds the weights of rows as batch['weight'] to a dict, or as the last entry to a tuple, but"
        f" this batch is {kind}. Give it another structure by collate=…, or rename that column."
    )


class Columns:
    """Equally long tensors and arrays: a batch takes one indexing operation for each."""

    def __init__(self, columns: Any) -> None:
        leaves, self._spec = tree.flatten(columns)
        names = tree.paths(columns)
        self._leaves = [_column(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
        lengths = [len(leaf) for leaf in self._leaves]
        if len(set(lengths)) > 1:
            sizes = ", ".join(f"{printable(name)}: {length}" for name, length in zip(names, lengths, strict=True))
            raise BatchError(f"Columns of a data set must be equally long; found {sizes}. Slice or repeat some.")
        self._length = lengths[0] if lengths else 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        """One row, for a `collate` that takes samples."""
        return tree.unflatten(self._spec, [torch.as_tensor(leaf[index]) for leaf in self._leaves])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several rows, from one indexing operation for each column."""
        rows = np.array(indices)
        leaves = [_take(leaf, rows, torch.from_numpy(rows)).unbind() for leaf in self._leaves]
        return [tree.unflatten(self._spec, row) for row in zip(*leaves, strict=True)]

    def read(self, rows: permutation.Indices, seed: int) -> Any:
        """The rows of each column; nothing in it is random."""
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
            if not len(rows):  # a rank without rows of this batch takes the shapes from any sample
                return without_rows(self._collated([0]))
            return self._collated(rows.tolist())

    def _collated(self, indices: list[int]) -> Any:
        samples = read_rows(self._dataset, indices)
        try:
            return as_dict(self._collate(samples))
        except Exception as error:
            _note(error, f"the batch of rows {indices}")
            raise


def read_rows(dataset: Any, indices: list[int]) -> list[Any]:
    """These rows of a map-style data set; an exception gets a note that names the row."""
    return _get_items(dataset, indices) if hasattr(dataset, "__getitems__") else _get_one_by_one(dataset, indices)


def _get_items(dataset: Any, indices: list[int]) -> list[Any]:
    try:
        return list(dataset.__getitems__(indices))
    except Exception as error:
        _note(error, f"rows {indices}")
        raise


def _get_one_by_one(dataset: Any, indices: list[int]) -> list[Any]:
    remaining = iter(indices)
    try:
        return [dataset[index] for index in remaining]
    except Exception as error:
        _note(error, f"row {indices[-1 - length_hint(remaining)]}")
        raise


def source(dataset: Any, collate: Collate | None) -> Source:
    """The reader of `dataset`; raises BatchError for a data set without length or rows."""
    reader: Source
    if type(dataset) is TensorDataset and collate is None:  # a subclass may read its rows in another way
        reader = Columns(tuple(dataset.tensors))
    elif isinstance(dataset, Tensor | np.ndarray) or _is_tree(dataset):
        columns = Columns(dataset)
        reader = columns if collate is None else Samples(columns, collate)
    elif _is_map(dataset):
        _check_samples(dataset)
        reader = Samples(dataset, collate)
    else:
        raise BatchError(
            f"Loader got a {type(dataset).__name__}, which has no length or no row numbers. It takes a"
            " data set with __len__ and __getitem__, a list of samples, or a tree of equally long tensors or"
            " arrays. An iterable of batches needs no Loader: pass it to Runner.fit directly."
        )
    if len(reader) == 0:
        raise BatchError("Loader got a data set without rows; it needs at least one. Check where they were lost.")
    return reader


def row_reader(dataset: Any, name: str) -> Any:
    """`dataset` by single rows, also of columns; raises BatchError, which names it, for one without length or rows."""
    rows = Columns(dataset) if _is_tree(dataset) else dataset
    if not isinstance(rows, Columns) and not _is_map(rows):
        raise BatchError(
            f"{name} is a {type(dataset).__name__}, which has no length or no row numbers; it must be a data set with"
            " __len__ and __getitem__, a list of rows, or a tree of equally long tensors or arrays."
        )
    if len(rows) == 0:
        raise BatchError(f"{name} has no rows; it needs at least one. Leave it out, or check where they were lost.")
    return rows


def _check_samples(dataset: Any) -> None:
    """Raise BatchError for a list that is surely one of columns: two arrays of equally many rows, of other shapes."""
    if type(dataset) is not list or not 1 < len(dataset) <= 8:
        return
    if not all(isinstance(column, Tensor | np.ndarray) and column.ndim for column in dataset):
        return
    shapes, lengths = {tuple(column.shape) for column in dataset}, {len(column) for column in dataset}
    if len(shapes) > 1 and len(lengths) == 1:
        raise BatchError(
            f"Loader got a list of {len(dataset)} arrays, which is a list of samples, and samples of the shapes"
            f" {', '.join(str(tuple(column.shape)) for column in dataset)} do not make a batch. Columns go in a tuple:"
            " lm.Loader((x, y), batch_size=32)"
        )


def _note(error: Exception, what: str) -> None:
    error.add_note(f"Raised while the Loader read {what} of its data set.")


def as_dict(batch: Any) -> Any:
    """The batch as a dict, if it is a mapping that is no pytree, such as transformers' BatchEncoding."""
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
        fix = "x.to_numpy()" if hasattr(leaf, "to_numpy") else "torch.tensor(...), or pass a list of samples"
        raise BatchError(
            f"{where} is a {type(leaf).__name__}; columns are tensors or numpy arrays: convert it with {fix}."
        )
    if leaf.ndim == 0:
        raise BatchError(f"{where} is 0-d and has no rows; expand it to one value a row, or leave it out.")
    if isinstance(leaf, Tensor):
        return leaf.detach()
    try:
        torch.from_numpy(np.empty(0, leaf.dtype))
    except TypeError as error:
        raise BatchError(f"{where} is of {leaf.dtype}, which torch does not have; convert it with .astype.") from error
    return np.asarray(leaf)  # a memory map stays one, and reads rows from its file when they are needed


def _take(column: Column, rows: permutation.Indices, index: Tensor) -> Tensor:
    if isinstance(column, Tensor):
        return column.index_select(0, index.to(column.device))
    return torch.from_numpy(column.take(rows, axis=0))


def _stack(samples: Sequence[Any]) -> Any:
    """Torch's collation leaf by leaf, so that samples may be any trees, and tuples stay tuples."""
    if _are_flat(samples):  # the common case, in half the time; zip raises for samples of different lengths
        return tuple(map(_collate_leaves, zip(*samples, strict=True)))
    try:
        return tree.map(lambda *leaves: _collate_leaves(leaves), samples[0], *samples[1:])
    except (ValueError, RuntimeError, OverflowError) as error:
        raise BatchError(
            f"the samples of a batch do not stack: {str(error).splitlines()[0].rstrip('.')}. Texts and other rows of"
            " different lengths are padded by a function of the samples: lm.Loader(rows, batch_size=32,"
            " collate=transformers.DataCollatorWithPadding(tokenizer))"
        ) from error


def _collate_leaves(leaves: tuple[Any, ...]) -> Any:
    """`default_collate` of leaves of the same position, with a faster path for the usual types."""
    kind = type(leaves[0])
    if kind is Tensor and _stacks_here(leaves[0], len(leaves)):
        return torch.stack(leaves)
    if {*map(type, leaves)} == {kind}:
        if kind in _NUMBERS:
            return torch.from_numpy(np.array(leaves, _NUMBERS[kind]))
        if kind is np.ndarray and leaves[0].dtype.kind in "biufc":
            return _collate_leaves(tuple(map(torch.as_tensor, leaves)))
    return default_collate(list(leaves))


def _stacks_here(leaf: Tensor, count: int) -> bool:
    """Whether to stack such leaves in the memory of this process, not in memory that workers share."""
    if leaf.layout is not torch.strided or leaf.is_nested:
        return False
    return count * leaf.nbytes <= MOST_BYTES or get_worker_info() is None


def _are_flat(samples: Sequence[Any]) -> bool:
    """Whether all samples are tuples, and the first one contains only tensors, arrays and numbers."""
    first = samples[0]
    return type(first) is tuple and {*map(type, first)} <= _LEAVES and bool(first) and {*map(type, samples)} == {tuple}


_NUMBERS: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_}
_LEAVES = frozenset((Tensor, np.ndarray, *_NUMBERS))


def without_rows(batch: Any) -> Any:
    """A batch of one row without its row; raises `BatchError` if nothing in it has rows."""
    batch = as_dict(batch)
    if not any(_has_rows(leaf) for leaf in tree.leaves(batch)):
        raise BatchError(
            f"this rank has no rows of a batch, and a {type(batch).__name__} without tensors or arrays of rows cannot"
            " be made empty. Use a collate that returns tensors, or a batch size that is a multiple of the number of"
            " processes and drop_last=True."
        )
    return tree.map(lambda leaf: leaf[:0] if _has_rows(leaf) else leaf, batch)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0
