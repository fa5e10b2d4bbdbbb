"""What a parallel transform tells those who look at all params at once: that each process holds a part of them.

Leaves with dims are then this process's rows of the whole; a leaf without dims is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lumen.core import rules

_KEY = "<shards>"


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
