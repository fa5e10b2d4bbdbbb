"""Finds the samplers and data sets inside a loader: those with a `set_epoch`, and those with a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from lumen.data import grain
from lumen.data.webdataset import shuffle_epochs

_MAX_SOURCES = 64  # in one list; a longer one holds samples
_NAMES = (("num_replicas", "rank"), ("num_processes", "process_index"))  # torch's samplers; accelerate's


def nested(data: Any) -> list[Any]:
    """`data` and the loaders, samplers and data sets inside it, however deep, each once.

    >>> from torch.utils.data import DataLoader, Subset
    >>> [type(source).__name__ for source in nested(DataLoader(Subset([1, 2], [0])))]
    ['DataLoader', 'Subset', 'SequentialSampler', 'BatchSampler']
    """
    visited: dict[int, Any] = {}
    waiting = [data]
    while waiting:
        source = waiting.pop(0)
        if id(source) not in visited:
            visited[id(source)] = source
            waiting += _sources_in(source)
    return list(visited.values())


def listeners(data: Any) -> list[Any]:
    """The samplers and data sets inside `data` that depend on the number of the epoch: they have a `set_epoch`."""
    sources = nested(data)
    shuffles = [shuffle for source in sources for shuffle in shuffle_epochs(source)]
    return [*(source for source in sources if callable(getattr(source, "set_epoch", None))), *shuffles]


def set_epoch(data: Any, number: int) -> None:
    """Call `set_epoch(number)` on all `listeners`."""
    for listener in listeners(data):
        listener.set_epoch(number)


class Share(NamedTuple):
    """The shard of rows that a sampler or data set inside a loader declares: that of `rank`, of `size`.

    `repeats` is the number of rows that it repeats to make all shards equally long.
    """

    name: str
    rank: int
    size: int
    repeats: int


def shares(data: Any) -> list[Share]:
    """The shares that samplers and data sets inside `data` declare, as torch's `DistributedSampler` does."""
    return [share for source in nested(data) if (share := _share(source)) is not None]


def name_of(data: Any) -> str:
    """The name of data in messages: its type, and the type of a DataLoader's data set."""
    inner = f" over {type(data.dataset).__name__}" if isinstance(data, DataLoader) else ""
    return f"{type(data).__name__}{inner}"


def _share(source: Any) -> Share | None:
    for size_name, rank_name in _NAMES:
        size, rank = getattr(source, size_name, None), getattr(source, rank_name, None)
        if isinstance(size, int) and isinstance(rank, int):
            repeats = _repeats(source) if isinstance(source, DistributedSampler) else 0
            return Share(type(source).__name__, rank, size, repeats)
    return None


def _repeats(sampler: Any) -> int:
    return max(0, int(sampler.total_size) - len(sampler.dataset))


def _sources_in(source: Any) -> Iterator[Any]:
    for value in list(getattr(source, "__dict__", {}).values()):
        yield from filter(_is_source, _members(value))


def _members(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) <= _MAX_SOURCES:
        return value
    return value.values() if isinstance(value, Mapping) and len(value) <= _MAX_SOURCES else [value]


def _is_source(value: Any) -> bool:
    is_torch_source = isinstance(value, Dataset | Sampler | DataLoader)
    return is_torch_source or hasattr(type(value), "set_epoch") or bool(grain.kind_of(value))
