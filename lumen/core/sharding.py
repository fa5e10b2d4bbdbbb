"""What a parallel transform tells others: that each process holds a part of the params, and which part of each leaf.

While its step runs, those who look at all params at once (clip, guard) join what they find over the processes; leaves
with dims are then this process's part, and a leaf without dims is the same everywhere. Between steps, those who read
or write the whole state (checkpoints) ask it for a `Piece` of each leaf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lumen.core import rules

_KEY = "<shards>"


class Box(NamedTuple):
    """A block of entries: where it begins in this process's tensor (`here`), in the `whole`, and its `size`."""

    here: tuple[int, ...]
    whole: tuple[int, ...]
    size: tuple[int, ...]


class Piece(NamedTuple):
    """What a process's tensor is of a whole one of `shape`: the boxes that it consists of, none if it is empty.

    Of the processes that hold the same, one is the `owner`, which writes it.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    owner: bool


def composed(inner: Piece, outer: Piece) -> Piece:
    """The piece that is made by `outer` of what was a piece by `inner` already.

    >>> rows = Piece((8, 2), (Box((0, 0), (4, 0), (4, 2)),), owner=True)
    >>> half = Piece((4, 2), (Box((0, 0), (2, 0), (2, 2)),), owner=True)
    >>> composed(rows, half).boxes
    (Box(here=(0, 0), whole=(6, 0), size=(2, 2)),)
    """
    boxes = []
    for last in outer.boxes:
        for first in inner.boxes:
            low = tuple(map(max, last.whole, first.here))
            high = tuple(
                min(a + m, b + n) for a, m, b, n in zip(last.whole, last.size, first.here, first.size, strict=True)
            )
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = tuple(h + a - w for h, a, w in zip(last.here, low, last.whole, strict=True))
                whole = tuple(w + a - h for w, a, h in zip(first.whole, low, first.here, strict=True))
                boxes.append(Box(here, whole, tuple(b - a for a, b in zip(low, high, strict=True))))
    return Piece(inner.shape, tuple(boxes), inner.owner and outer.owner)


class Shards(Protocol):
    """The processes that hold the parts."""

    index: int

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """`x` summed (`op="sum"`) or maximised (`op="max"`) over them; a new tensor."""


@contextmanager
def bound(shards: Shards) -> Iterator[None]:
    """While it is entered, trees of params and grads are parts, and `shards` can join what is said about them."""
    with rules.bound_axis(_KEY, shards):
        yield


def is_bound() -> bool:
    """Whether trees of params and grads are parts."""
    return rules.axis(_KEY) is not None


def norm(norms: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The L2 norm of everything, from the norm of each of this process's `leaves`."""
    shards: Shards | None = rules.axis(_KEY)
    if shards is not None:
        if shards.index:  # a whole leaf counts once
            norms = norms * torch.tensor([leaf.dim() > 0 for leaf in leaves], device=norms.device)
        return shards.reduce(norms.square().sum(), "sum").sqrt()
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def everywhere(flags: Tensor) -> Tensor:
    """Where each of the boolean `flags` is true on every process."""
    shards: Shards | None = rules.axis(_KEY)
    return flags if shards is None else shards.reduce((~flags).float(), "max") == 0
