"""What data reads from: the samplers and data sets inside a loader, which are told the epoch and may name a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from lumen.data import grain

_FEW = 64  # sources in one list; a longer one holds samples
_NAMES = (("num_replicas", "rank"), ("num_processes", "process_index"))  # torch's samplers; accelerate's


def nested(data: Any) -> list[Any]:
    """`data`, and the loaders, samplers and data sets it holds, however deep, each once.

    >>> from torch.utils.data import DataLoader, Subset
    >>> [type(each).__name__ for each in nested(DataLoader(Subset([1, 2], [0])))]
    ['DataLoader', 'Subset', 'SequentialSampler', 'BatchSampler']
    """
    found: dict[int, Any] = {}
    waiting = [data]
    while waiting:
        each = waiting.pop(0)
        if id(each) not in found:
            found[id(each)] = each
            waiting += _inside(each)
    return list(found.values())


def listeners(data: Any) -> list[Any]:
    """Those that shuffle, or choose, by the number of the epoch: they have a `set_epoch`."""
    return [each for each in nested(data) if callable(getattr(each, "set_epoch", None))]


def announce_epoch(data: Any, number: int) -> None:
    """Tell all of them that epoch `number` begins."""
    for each in listeners(data):
        each.set_epoch(number)


class Share(NamedTuple):
    """Which part of the rows something inside a loader says that it gives: that of `rank`, of `size`.

    `repeats` is how many of its rows are there a second time, so that all parts are equally long.
    """

    name: str
    rank: int
    size: int
    repeats: int


def shares(data: Any) -> list[Share]:
    """What the samplers and data sets of `data` say about that, as torch's `DistributedSampler` does."""
    return [share for each in nested(data) if (share := _share(each)) is not None]


def name_of(data: Any) -> str:
    """What data is called in a message: its type, and that of the data set in a DataLoader."""
    inner = f" over {type(data.dataset).__name__}" if isinstance(data, DataLoader) else ""
    return f"{type(data).__name__}{inner}"


def _share(thing: Any) -> Share | None:
    for size_name, rank_name in _NAMES:
        size, rank = getattr(thing, size_name, None), getattr(thing, rank_name, None)
        if isinstance(size, int) and isinstance(rank, int):
            return Share(
                type(thing).__name__, rank, size, _repeats(thing) if isinstance(thing, DistributedSampler) else 0
            )
    return None


def _repeats(sampler: Any) -> int:
    return max(0, int(sampler.total_size) - len(sampler.dataset))


def _inside(thing: Any) -> Iterator[Any]:
    for value in list(getattr(thing, "__dict__", {}).values()):
        yield from filter(_is_source, _members(value))


def _members(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) <= _FEW:
        return value
    return value.values() if isinstance(value, Mapping) and len(value) <= _FEW else [value]


def _is_source(value: Any) -> bool:
    known = isinstance(value, Dataset | Sampler | DataLoader) or hasattr(type(value), "set_epoch")
    return known or bool(grain.kind_of(value))
