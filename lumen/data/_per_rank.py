"""`per_rank`: data of which each process has rows of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lumen.data.loader import Loader
from lumen.errors import BatchError


class PerRank:
    """What `per_rank` gives."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"lm.data.per_rank({type(self.data).__name__})"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def per_rank(data: Iterable[Any]) -> PerRank:
    """Say that `data` gives this process rows that no other process is given.

    Under several processes an `lm.Loader`, a `DataLoader` over a map-style data set and a Hugging Face stream are cut
    by rank. Of a list, a generator, or an iterable of another kind nobody knows whose rows it has: it is refused, until
    this says that they are this rank's alone. Nothing is cut then. All ranks must give equally many batches.

    Raises `BatchError` for an `lm.Loader`, which says it by its `rank` and `world`.

    >>> import lumen as lm, torch
    >>> mine = [torch.full((2,), float(lm.rank())) for _ in range(3)]
    >>> lm.data.per_rank(mine)
    lm.data.per_rank(list)
    """
    if isinstance(data, PerRank):
        return data
    if isinstance(data, Loader):
        raise BatchError(
            "an lm.Loader cuts each batch by rank. For a data set that has this rank's rows alone write"
            " lm.Loader(rows, batch_size=…, rank=0, world_size=1), with the batch size of one rank."
        )
    return PerRank(data)
