"""Hugging Face's `IterableDataset`: its split by process, its shuffle buffers, and the order it was given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_MODULE = "datasets.iterable_dataset"


def is_stream(data: Any) -> bool:
    """Whether `data` is one, without importing its package.

    >>> is_stream([1, 2])
    False
    """
    return any(kind.__name__ == "IterableDataset" and kind.__module__ == _MODULE for kind in type(data).__mro__)


def split_of(stream: Any) -> tuple[int, int] | None:
    """The rank and the number of parts that it was split for, or None."""
    split = stream._distributed
    return None if split is None else (split.rank, split.world_size)


def split(stream: Any, rank: int, size: int) -> Any:
    """The part of `rank`: whole shards where their number is a multiple of `size`, else every `size`-th row."""
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(stream, rank=rank, world_size=size)


def buffered_rows(stream: Any) -> int:
    """How many rows its shuffle buffers hold, which are in no state of it; 0 without one."""
    return sum(
        each.buffer_size for each in _operations(stream) if type(each).__name__ == "BufferShuffledExamplesIterable"
    )


def order_of(stream: Any) -> str:
    """A digest of all random generators of its shuffles: another one is another order."""
    generators = [each.generator.bit_generator.state for each in _operations(stream) if hasattr(each, "generator")]
    return hashlib.sha256(json.dumps(generators, default=repr).encode()).hexdigest()[:16]


def _operations(stream: Any) -> Iterator[Any]:
    """What the stream does with its shards, outermost first."""
    waiting = [stream._ex_iterable]
    while waiting:
        each = waiting.pop(0)
        yield each
        for value in vars(each).values():
            members = value if isinstance(value, list | tuple) else [value]
            waiting += [one for one in members if type(one).__module__ == _MODULE and hasattr(one, "num_shards")]
