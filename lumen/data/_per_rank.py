"""`per_rank`: marks data whose rows belong to this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lumen.core.arguments import checked
from lumen.data.loader import Loader
from lumen.errors import BatchError


class PerRank:
    """Data that `per_rank` has marked."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"lm.data.per_rank({type(self.data).__name__})"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


@checked
def per_rank(data: Iterable[Any]) -> PerRank:
    """Mark `data` as this process's own: no other process gets the same rows.

    With several processes an `lm.Loader`, a `DataLoader` over a map-style data set and a Hugging Face stream are
    sharded by rank. For a list, a generator or any other iterable it is unknown whether the ranks have the same rows,
    so it is rejected, unless this marks it. It is not sharded then, and all ranks must have the same number of batches.

    Raises `BatchError` for an `lm.Loader`, whose arguments `rank` and `world_size` say the same.

    >>> import lumen as lm, torch
    >>> batches = [torch.full((2,), float(lm.rank())) for _ in range(3)]
    >>> lm.data.per_rank(batches)
    lm.data.per_rank(list)
    """
    if isinstance(data, PerRank):
        return data
    if isinstance(data, Loader):
        raise BatchError(
            "an lm.Loader shards each batch by rank. For a data set that has only this rank's rows write"
            " lm.Loader(rows, batch_size=…, rank=0, world_size=1), with the batch size of one rank."
        )
    return PerRank(data)
