"""Two tiers of tests: what `make test` runs, and the long forms that `make test-all` adds (LUMEN_TESTS=all)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

LONG = os.environ.get("LUMEN_TESTS") == "all"


def pick(short: T, long: T) -> T:
    """`short` under `make test`, `long` under `make test-all`."""
    return long if LONG else short


def in_turns(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Tuples of one entry of each axis: all of them under `make test-all`, else each entry at least once.

    The entries take turns, so that the n-th tuple has the n-th entry of each axis, counted round.

    >>> in_turns("ab", [1, 2, 3])  # doctest: +SKIP
    [('a', 1), ('b', 2), ('a', 3)]
    """
    if LONG:
        import itertools

        return list(itertools.product(*axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]
