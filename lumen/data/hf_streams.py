"""Hugging Face's `IterableDataset`: its split by process, its shuffle buffers and its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_MODULE = "datasets.iterable_dataset"


def is_stream(data: Any) -> bool:
    """Whether `data` is such a stream, without importing its package.

    >>> is_stream([1, 2])
    False
    """
    return any(kind.__name__ == "IterableDataset" and kind.__module__ == _MODULE for kind in type(data).__mro__)


def split_of(stream: Any) -> tuple[int, int] | None:
    """The rank and the world size that the stream was split for, or None."""
    split = stream._distributed
    return None if split is None else (split.rank, split.world_size)


def split(stream: Any, rank: int, size: int) -> Any:
    """The rows of `rank`: complete shards if their number is a multiple of `size`, else every `size`-th row."""
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(stream, rank=rank, world_size=size)


def buffered_rows(stream: Any) -> int:
    """The number of rows in its shuffle buffers, which its state does not include; 0 without a buffer."""
    operations = _operations(stream)
    return sum(op.buffer_size for op in operations if type(op).__name__ == "BufferShuffledExamplesIterable")


def order_of(stream: Any) -> str:
    """A digest of the random generators of its shuffles, which identifies the order."""
    generators = [op.generator.bit_generator.state for op in _operations(stream) if hasattr(op, "generator")]
    return hashlib.sha256(json.dumps(generators, default=repr).encode()).hexdigest()[:16]


def _operations(stream: Any) -> Iterator[Any]:
    """The operations of the stream on its shards, outermost first."""
    waiting = [stream._ex_iterable]
    while waiting:
        operation = waiting.pop(0)
        yield operation
        for value in vars(operation).values():
            members = value if isinstance(value, list | tuple) else [value]
            waiting += [item for item in members if type(item).__module__ == _MODULE and hasattr(item, "num_shards")]
