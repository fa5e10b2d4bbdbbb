"""Sums of gradients that autograd adds to in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class GradSums:
    """Sums of the gradients of several calls in the same params, one for each leaf; None where there is none yet.

    Once opened they are the `.grad` of leaves that all further calls differentiate, to which autograd adds.
    """

    __slots__ = ("_sums", "_weights", "opened")

    def __init__(self, sums: Sequence[Tensor | None]) -> None:
        self._sums = sums
        self._weights: dict[int, Tensor] = {}
        self.opened: tuple[list[Tensor], Callable[[Sequence[Any]], Any]] | None = None

    def open(self, live: list[Tensor], rebuild: Callable[[Sequence[Any]], Any]) -> None:
        """Let autograd add what it computes in `live`, of which `rebuild` makes params."""
        for leaf, total in zip(live, self._sums, strict=True):
            leaf.grad = total
        self.opened = live, rebuild

    def add(self, grads: Sequence[Any]) -> None:
        """Add gradients out of place; a sum is in memory of its own, as autograd may hand out one tensor twice."""
        self._sums = [g.clone() if total is None else total + g for g, total in zip(grads, self.take(), strict=True)]

    def take(self) -> Sequence[Tensor | None]:
        """The sums so far; the next call opens them anew."""
        if self.opened is not None:
            live, _ = self.opened
            grads = [leaf.grad for leaf in live]
            # Of nn.Embedding(sparse=True): optimizers and collectives take dense ones.
            self._sums = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
            self.opened = None
        return self._sums

    def weight(self, rows: int, like: Tensor) -> Tensor:
        """A number of rows as a scalar, made once for all microbatches of this size."""
        weight = self._weights.get(rows)
        if weight is None or weight.dtype != like.dtype:
            weight = self._weights[rows] = like.detach().new_full((), rows)
        return weight
