"""Google's Grain: a pipeline at any epoch, the rows of one rank, and pipelines that repeat or skip rows.

A `MapDataset` has an element for every index, and its epochs follow one another: the indices from `number * len(data)`
on are epoch `number`. An `IterDataset` and a `DataLoader` begin each pass with the same order and the same random
numbers; here they begin with those of their epoch.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lumen import tree
from lumen.checkpoint import json_tree
from lumen.core import batching
from lumen.core.distributed import shard_bounds
from lumen.core.dtypes import as_bytes
from lumen.data.fetch import as_dict, without_rows
from lumen.data.permutation import hash64
from lumen.errors import BatchError

MAP, ITER, LOADER, ITERATOR = "MapDataset", "IterDataset", "DataLoader", "DatasetIterator"
_KINDS = {MAP: MAP, ITER: ITER, LOADER: LOADER, ITERATOR: ITERATOR, "DataLoaderIterator": ITERATOR}
_SPARSE = ("FilterMapDataset", "FlatMapMapDataset")  # some of their indices have no element
_ENDLESS = 2**48  # `repeat()` has sys.maxsize elements; batches and slices of it have fewer
_CACHED = ("_default_iterator",)  # the one iterator of an ElasticIterator


def kind_of(data: Any) -> str:
    """The kind of a Grain object: a `MapDataset`, an `IterDataset`, a `DataLoader` or an iterator; "" otherwise.

    It does not import Grain.

    >>> kind_of([1, 2])
    ''
    """
    for base in type(data).__mro__:
        if base.__name__ in _KINDS and _is_from_grain(base):
            return _KINDS[base.__name__]
    return ""


def length(data: Any) -> int | None:
    """The number of elements in an epoch of a `MapDataset`; None if it is endless, or if it skips some indices."""
    if kind_of(data) != MAP or any(type(node).__name__ in _SPARSE for node in nodes(data)):
        return None
    return None if _is_endless(data) else len(data)


def open_iterator(data: Any, number: int, shard: tuple[int, int] | None = None) -> Any:
    """Grain's iterator over epoch `number`; of a `MapDataset` with a `shard`, over the rows of a rank in each batch."""
    if kind_of(data) == LOADER:
        loader = copy.copy(data)
        loader._dataset = _at_epoch(data._dataset, number, {})
        return iter(loader)
    if shard is not None:
        return iter(_classes().rank_map(data, _rows_reader(data, number, *shard)))
    return iter(_at_epoch(data, number, {}))


def close(iterator: Any) -> None:
    """End the threads and processes of an iterator."""
    inner = iterator._iterator if type(iterator).__name__ == "DataLoaderIterator" else iterator
    inner.close()


def nodes(data: Any) -> list[Any]:
    """The data sets of a pipeline, each once, the last transformation first."""
    visited: dict[int, Any] = {}
    waiting = [data._dataset if kind_of(data) == LOADER else data]
    while waiting:
        node = waiting.pop(0)
        if id(node) not in visited:
            visited[id(node)] = node
            waiting += [parent for value in _attributes(node).values() for parent in _datasets_in(value)]
    return list(visited.values())


def layout(data: Any) -> list[str]:
    """A line for each node of the pipeline: its kind, length, seed and slice. The lines decide the order of rows."""
    lines = []
    for node in nodes(data):
        text = str(node) if type(node).__name__ == "SliceMapDataset" else type(node).__name__
        if kind_of(node) == MAP:
            text += f" of {len(node)}"
        seeds = [getattr(node, name, None) for name in ("_seed", "_seed_rng_seed")]
        lines.append(", seed ".join([text, *(str(seed) for seed in seeds if seed is not None)]))
    return lines


def first_records(data: Any) -> list[str]:
    """Digests of the first record of each source of a `MapDataset`, before any transformation."""
    sources = [node for node in nodes(data) if kind_of(node) == MAP and not getattr(node, "_parents", ())]
    return [_digest(node[0]) for node in sources if len(node)]


def declared_shard(data: Any) -> tuple[int, int] | None:
    """The shard index and count of a `DataLoader` or an `ElasticIterator`; None for a single shard."""
    options = getattr(data, "_shard_options", None)
    return None if options is None or options.shard_count == 1 else (options.shard_index, options.shard_count)


def flaw(data: Any) -> str:
    """Why an epoch of `data` does not have each row once; "" if no reason is known."""
    if kind_of(data) == ITERATOR:
        return (
            f"this {type(data).__name__} is an iterator of Grain, which can be read once. Give the data set or the"
            " loader that it came from. The run creates an iterator for each epoch, saves its state in checkpoints, and"
            " resumes from it."
        )
    if kind_of(data) == LOADER and (lost := _lost_records(data)):
        return lost
    pipeline = nodes(data)
    if any(type(node).__name__ == "ProcessPrefetchIterDataset" for node in pipeline) and not _flags_are_parsed():
        return (
            "Grain's worker processes read absl's flags, which this program has not parsed. Write"
            " `from absl import flags; flags.FLAGS.mark_as_parsed()` before the run, or start it by absl.app.run(main)."
        )
    return next((text for node in pipeline if (text := _uneven_windows(node))), "")


def advice(data: Any) -> str:
    """The fix for `data` that would give all processes the same rows."""
    if kind_of(data) == LOADER:
        return (
            "Write shard_options=grain.sharding.ShardOptions(shard_index=lm.rank(), shard_count=lm.world_size()) after"
            " lm.mesh() (ShardByJaxProcess counts JAX's processes, not torch's), or give the grain.MapDataset: each of"
            " its batches is sharded by rank."
        )
    return (
        "Give the grain.MapDataset, ….batch(…), whose batches are sharded by rank, or shard it before"
        " to_iter_dataset(), ds[lm.rank()::lm.world_size()], and write lm.data.per_rank(data)."
    )


def is_fixed(data: Any) -> bool:
    """Whether a `DataLoader` has a user's own sampler, whose order is the same in each epoch."""
    sampler = getattr(data, "_sampler", None)
    changes_by_epoch = _is_from_grain(type(sampler)) or hasattr(sampler, "set_epoch")
    return kind_of(data) == LOADER and not changes_by_epoch


def check_state(saved: Sequence[str], data: Any) -> None:
    """Raise `BatchError` if the layout of the pipeline is not the `saved` one of the checkpoint."""
    current = layout(data)
    if list(saved) == current:
        return
    pairs = [(old, new) for old, new in zip(saved, current, strict=False) if old != new]
    old, new = pairs[0] if pairs else (f"{len(saved)} transformations", f"{len(current)} transformations")
    raise BatchError(
        f"this Grain pipeline has {new}, and that of the checkpoint had {old}, so its state does not apply here. Build"
        " it with the same lengths, seeds and workers, or start a new run."
    )


# ---------------------------------------------------------------------------------------- the epoch


def _at_epoch(node: Any, number: int, copies: dict[int, Any]) -> Any:
    """A copy of the pipeline that ends in `node`, whose passes are epoch `number`; it shares its sources."""
    if id(node) not in copies:
        copies[id(node)] = _map_at_epoch(node, number) if kind_of(node) == MAP else _iter_at_epoch(node, number, copies)
    return copies[id(node)]


def _iter_at_epoch(node: Any, number: int, copies: dict[int, Any]) -> Any:
    copied = copy.copy(node)
    for name in _CACHED:
        vars(copied).pop(name, None)
    for name, value in _attributes(node).items():
        if next(_datasets_in(value), None) is not None:
            setattr(copied, name, _rebuilt(value, lambda parent: _at_epoch(parent, number, copies)))
    seed = getattr(node, "_seed", None)
    if number and seed is not None and _is_from_grain(type(node)):
        copied._seed = hash64(operator.index(seed), number) % 2**32
    return copied


def _map_at_epoch(node: Any, number: int) -> Any:
    if not number or _is_endless(node):
        return node
    if type(node).__name__ != "_SamplerMapDataset":
        return _classes().epoch_map(node, number)
    copied = copy.copy(node)
    copied._sampler = _sampler_at_epoch(node._sampler, number)
    return copied


def _sampler_at_epoch(sampler: Any, number: int) -> Any:
    """One of Grain's own samplers, starting after `number` passes of all its `num_epochs`."""
    if not _is_from_grain(type(sampler)):
        return sampler
    endless = copy.copy(sampler)
    endless._max_index = sys.maxsize
    return _classes().later_sampler(endless, number * len(sampler), sampler._num_records)


class _Classes(NamedTuple):
    epoch_map: Callable[[Any, int], Any]
    rank_map: Callable[[Any, Callable[[int], Any]], Any]
    later_sampler: Callable[[Any, int, int], Any]


@cache
def _classes() -> _Classes:
    """Subclasses of Grain's classes, defined here since Grain is imported on first use.

    Because they are local, worker processes get their code with the pipeline, and import neither this package nor torch
    for them.
    """
    import grain

    class EpochMapDataset(grain.MapDataset):  # type: ignore[misc]
        def __init__(self, parent: Any, number: int) -> None:
            super().__init__(parent)
            self._number = number

        def __len__(self) -> int:
            return len(self._parent)

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                return self.slice(index)
            return self._parent[index + self._number * len(self._parent)]

    class RankMapDataset(grain.MapDataset):  # type: ignore[misc]
        def __init__(self, parent: Any, read: Callable[[int], Any]) -> None:
            super().__init__(parent)
            self._read = read

        def __len__(self) -> int:
            return len(self._parent)

        def __getitem__(self, index: Any) -> Any:
            return self._read(index)

    class LaterSampler:
        def __init__(self, sampler: Any, offset: int, records: int) -> None:
            self._sampler, self._offset, self._records = sampler, offset, records

        def __getitem__(self, index: int) -> Any:
            metadata = self._sampler[index + self._offset]
            return replace(metadata, record_key=metadata.record_key % self._records)

    return _Classes(EpochMapDataset, RankMapDataset, LaterSampler)


# ---------------------------------------------------------------------------------------- the rank


def _rows_reader(batches: Any, number: int, rank: int, size: int) -> Callable[[int], Any]:
    """Reads this rank's rows of a batch of epoch `number`; after a plain `batch` it reads no other rows."""
    offset = number * len(batches)
    read = _batch_of_rank if _is_plain_batch(batches) else _slice_of_batch
    return lambda index: read(batches, offset + index, rank, size)


def _is_plain_batch(dataset: Any) -> bool:
    """Whether it only stacks rows, so a shard of them can be stacked alone; a `batch_fn` may count or pad."""
    function = getattr(dataset, "_batch_fn", None)
    stacks = _is_from_grain(function) and getattr(function, "__name__", "") == "make_batch"
    return stacks and type(dataset).__name__ == "BatchMapDataset"


def _batch_of_rank(batches: Any, index: int, rank: int, size: int) -> Any:
    (records,) = batches.parents
    count, width = len(records), batches._batch_size
    epoch, position = divmod(index, len(batches))
    start, stop = shard_bounds(min(width, count - position * width), rank, size)
    first = epoch * count + position * width
    if start == stop:
        return without_rows(batches._batch_fn([records[first]]))
    return batches._batch_fn([records[row] for row in range(first + start, first + stop)])


def _slice_of_batch(batches: Any, index: int, rank: int, size: int) -> Any:
    batch = as_dict(batches[index])
    if batch is None:  # removed by a filter, on all ranks
        return None
    start, stop = shard_bounds(batching.count(batch), rank, size)
    return tree.map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor | np.ndarray) else leaf, batch)


# ---------------------------------------------------------------------------------------- inspection


def _is_from_grain(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "grain"


def _attributes(node: Any) -> dict[str, Any]:
    return {name: value for name, value in getattr(node, "__dict__", {}).items() if name not in _CACHED}


def _datasets_in(value: Any) -> Iterator[Any]:
    members: Any = [value]
    if isinstance(value, list | tuple):
        members = value if value and kind_of(value[0]) in (MAP, ITER) else ()  # others may hold millions of records
    elif isinstance(value, Mapping):
        members = value.values()
    return (member for member in members if kind_of(member) in (MAP, ITER))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    if kind_of(value):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _rebuilt(item, change) for name, item in value.items()}
    return type(value)(_rebuilt(item, change) for item in value) if isinstance(value, list | tuple) else value


def _is_endless(node: Any) -> bool:
    return len(node) >= _ENDLESS


def _uneven_windows(node: Any) -> str:
    """The flaw of a `WindowShuffleMapDataset` whose last window extends beyond the end of the epoch."""
    if type(node).__name__ != "WindowShuffleMapDataset" or _is_endless(node) or not len(node) % node._window_size:
        return ""
    window, length = node._window_size, len(node)
    return (
        f"Grain's WindowShuffleMapDataset with window_size={window} over {length} rows repeats some rows and skips"
        f" others, as {length} is no multiple of {window}. Write a window_size that divides the length, or"
        " ds.shuffle(seed=…)."
    )


def _flags_are_parsed() -> bool:
    from absl import flags

    return bool(flags.FLAGS.is_parsed())


def _lost_records(loader: Any) -> str:
    """The flaw of a `DataLoader` that drops the remainder of a division into shards without `drop_remainder`."""
    options, sampler = loader._shard_options, loader._sampler
    if options.shard_count == 1 or options.drop_remainder or not hasattr(sampler, "__len__"):
        return ""
    total = len(sampler)
    records = getattr(sampler, "_num_records", total)
    if total >= _ENDLESS or not (total % options.shard_count or records % options.shard_count):
        return ""
    return (
        f"this grain.DataLoader splits {records} records into {options.shard_count} shards of the same size, although"
        " drop_remainder is False: some rows would be skipped, or others repeated. Write drop_remainder=True if that is"
        " intended, or give the grain.MapDataset, ….batch(…), whose batches are sharded by rank, each row once."
    )


def _digest(record: Any) -> str:
    try:
        packed = json_tree.pack(record)
    except TypeError:
        return type(record).__name__
    digest = hashlib.sha256(packed["text"].encode())
    for tensor in packed["tensors"]:
        digest.update(as_bytes(tensor).numpy().tobytes())
    return digest.hexdigest()[:16]
