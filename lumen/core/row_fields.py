"""The leaves of a state that `lm.row_field()` declares: one entry for each row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lumen import tree


class _Missing:
    """In place of a row leaf that was split off: no tensor, and the same on every rank."""

    def __repr__(self) -> str:
        return "a row field"


_MISSING = _Missing()


def indices(state: Any) -> list[int]:
    """The positions of the row leaves among `tree.leaves(state)`.

    >>> import lumen as lm, torch
    >>> @lm.dataclass
    ... class Memory:
    ...     age: torch.Tensor
    ...     cells: dict[str, torch.Tensor] = lm.row_field()
    >>> memory = Memory(torch.zeros(()), cells={"h": torch.zeros(4, 2), "c": torch.zeros(4, 2)})
    >>> indices({"step": torch.zeros(()), "memory": memory})
    [2, 3]
    """
    return [index for index, is_row in enumerate(_flags(state)) if is_row]


def named(state: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for each row leaf."""
    positions = indices(state)
    if not positions:
        return []
    paths, leaves = tree.paths(state), tree.leaves(state)
    return [(paths[index], leaves[index]) for index in positions]


def split_off(state: Any) -> tuple[Any, list[Any]]:
    """`state` without its row leaves, which are replaced by what is no tensor, and these leaves in order."""
    leaves, spec = tree.flatten(state)
    positions = indices(state)
    rows = [leaves[index] for index in positions]
    for index in positions:
        leaves[index] = _MISSING
    return spec.unflatten(leaves), rows


def joined(state: Any, rows: Sequence[Any]) -> Any:
    """`state` with `rows` as its row leaves: the inverse of `split_off`."""
    leaves, spec = tree.flatten(state)
    for index, leaf in zip(indices(state), rows, strict=True):
        leaves[index] = leaf
    return spec.unflatten(leaves)


def declared(node: Any) -> frozenset[str]:
    """The names of the row fields of a node of an `lm.dataclass` class; none of anything else."""
    names: frozenset[str] = getattr(type(node), "_row_fields_", frozenset())
    return names


def _flags(node: Any) -> list[bool]:
    """For each leaf of `node`, whether it is a row leaf."""
    flags: list[bool] = []
    for child in tree.leaves(node, is_leaf=lambda child: bool(declared(child))):
        names = declared(child)
        if not names:
            flags.append(False)
            continue
        for name in type(child)._dynamic_fields_:
            value = getattr(child, name)
            flags += [True] * len(tree.leaves(value)) if name in names else _flags(value)
    return flags
