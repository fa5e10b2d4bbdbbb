"""The order in which transforms may be nested: the check at composition, and its message."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise, permutations
from typing import TYPE_CHECKING

from lumen.errors import OrderError

if TYPE_CHECKING:
    from lumen.core.step import Transform

# Outermost first. Each chain is checked by itself: it does not order transforms of another chain.
CHAINS: tuple[tuple[str, ...], ...] = (
    (
        *("compile", "unroll", "seeded", "ensemble", "sam", "parallel", "context", "tensor"),
        *("accumulate", "pipeline", "dp_sgd", "precision", "quantized_matmul", "remat", "chunked_logits"),
    ),
    ("compile", "unroll", "ensemble", "guard", "clip", "ema", "donate"),
    ("guard", "dp_sgd"),
)


def check(transforms: Sequence[Transform]) -> None:
    """Raise `OrderError` unless `transforms`, outermost first, are in an order in which all of them keep their laws."""
    names = [t.name for t in transforms]
    for name in names:
        if names.count(name) > 1:
            raise OrderError(f"{name} is applied twice to one step; apply it once, with the settings you want.")
    joining = [t for t in transforms if t.level == "parallel"]
    if len(joining) > 1:
        raise OrderError(
            f"{joining[0]!r} and {joining[1]!r} would both reduce the gradients of all rows. Leave one out; for"
            " replicated shards write lm.fsdp(lm.mesh(data=..., shard=...))."
        )
    for transform, other in permutations(transforms, 2):
        if other.name in transform.incompatible:
            raise OrderError(
                f"{other!r} cannot be combined with lm.{transform.name}: {transform.incompatible[other.name]}."
            )
    _check_enclosed(transforms)
    for chain in CHAINS:
        ranks = {level: rank for rank, level in enumerate(chain)}
        members = [t for t in transforms if t.level in ranks]
        for outer, inner in pairwise(members):
            if ranks[outer.level] > ranks[inner.level]:
                raise OrderError(_message(transforms, outer, inner))


def _check_enclosed(transforms: Sequence[Transform]) -> None:
    for outer, inner in combinations(transforms, 2):
        if outer.name in inner.encloses:
            raise OrderError(_message(transforms, outer, inner, inner.encloses[outer.name]))


def _message(transforms: Sequence[Transform], outer: Transform, inner: Transform, why: str = "") -> str:
    why = why or inner.reason or f"{inner.level} must be outside {outer.level}"
    fixed = sorted(transforms, key=_rank)
    nested = "step"
    for t in reversed(fixed):
        nested = f"{t!r}({nested})"
    return (
        f"{outer.name} is outside {inner.name}, but it must be inside: {why}.\n"
        f"Write: {nested}\n"
        f"or:    lm.compose({', '.join(map(repr, fixed))})(step)"
    )


def _rank(transform: Transform) -> tuple[int, int]:
    """A rank in one order for all chains: down to ensemble, then the second chain, then the first."""
    first, second = CHAINS[:2]
    outer = first[: first.index("ensemble") + 1]
    if transform.level in outer:
        return 0, outer.index(transform.level)
    if transform.level in second:
        return 1, second.index(transform.level)
    return 2, first.index(transform.level)
