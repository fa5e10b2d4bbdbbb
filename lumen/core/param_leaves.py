"""Which leaves of a state are laid out like one of its params, so that they are sharded with it.

This is declared, and never read off a leaf's path: `params` are the params themselves, the buffers that the model calls
frozen are params too, `lm.extend.param_field()` declares fields of slots and of states, and `opt_state` has what the
optimizer keeps for each param. Everything else is replicated, also where names and shapes coincide.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor

from lumen import tree
from lumen.core import row_fields

Path = tuple[Any, ...]
Shapes = Mapping[str, Sequence[int]]


def key_paths(values: Any) -> list[Path]:
    """The field names, keys and indices that lead to each leaf, in the order of `tree.leaves`.

    >>> key_paths({"mu": {"fc.weight": 0}, "counts": (1, 2)})
    [('mu', 'fc.weight'), ('counts', 0), ('counts', 1)]
    """
    return optree.tree_paths(values, namespace=tree.NAMESPACE)


def param_leaves(state: Any, shapes: Shapes) -> dict[Path, str]:
    """The param that a leaf of `state` is laid out like, by the leaf's path.

    `shapes` has the shapes of the params that count. A leaf that belongs to a param and has another shape, such as a
    row of Adafactor's moments, is not laid out like it; one that is declared to have the param's rows is, along the
    first dim.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1, bias=False), lm.optim.adam(1e-3))
    >>> for path, name in param_leaves(state, {"weight": (1, 2)}).items():
    ...     print(path, name)
    ('params', 'weight') weight
    ('opt_state', 'mu', 'weight') weight
    ('opt_state', 'nu', 'weight') weight
    """
    names = [name for entry, child in _children(state) for name in _names_in_field(state, entry, child, shapes)]
    leaves = zip(key_paths(state), tree.leaves(state), names, _has_rows(state), strict=True)
    return {
        path: name
        for path, leaf, name, has_rows in leaves
        if name is not None and name in shapes and isinstance(leaf, Tensor) and _is_like(leaf, shapes[name], has_rows)
    }


def _is_like(leaf: Tensor, shape: Sequence[int], has_rows: bool) -> bool:
    dims = 1 if has_rows else None
    return tuple(leaf.shape)[:dims] == tuple(shape)[:dims]


def _has_rows(node: Any) -> list[bool]:
    """Whether each leaf is in a field that is declared to have the rows of a param."""
    if _is_leaf(node):
        return [False]
    declared: frozenset[str] = getattr(type(node), "_param_row_fields_", frozenset())
    flags: list[bool] = []
    for entry, child in _children(node):
        flags += [True] * len(tree.leaves(child)) if entry in declared else _has_rows(child)
    return flags


def _names_in_field(state: Any, field: str, value: Any, names: Collection[str]) -> list[str | None]:
    """The param of each leaf of one field of a state."""
    if field in row_fields.declared(state):
        return _none_for(value)
    if field == "params":
        return _keyed(value)
    if field == "buffers":
        frozen: Collection[str] = getattr(getattr(state, "apply_fn", None), "frozen", ())
        return [name if name in frozen else None for name in _keyed(value)]
    if field == "opt_state":
        return names_in_optimizer_state(value, names)
    return _keyed(value) if field in _declared(state) else _in_declared_fields(value)


def _in_declared_fields(node: Any) -> list[str | None]:
    """The param of each leaf of a slot, or of a field that a subclass adds: of declared fields alone."""
    if _is_leaf(node):
        return [None]
    declared, rows = _declared(node), row_fields.declared(node)
    names: list[str | None] = []
    for entry, child in _children(node):
        if entry in rows:
            names += _none_for(child)
        else:
            names += _keyed(child) if entry in declared else _in_declared_fields(child)
    return names


def names_in_optimizer_state(node: Any, names: Collection[str]) -> list[str | None]:
    """The param of each leaf of an optimizer's state.

    What an optimizer keeps for params it keeps by their names: in a dict with a tensor, or a subtree of tensors, for
    each param, or for some of them (`lm.optim.partition`). Where such dicts are nested, the innermost counts.
    """
    if _is_leaf(node):
        return [None]
    children = list(_children(node))
    below = [name for _, child in children for name in names_in_optimizer_state(child, names)]
    by_param = type(node) is dict and all(entry in names for entry, _ in children)
    return _keyed(node) if by_param and not any(name is not None for name in below) else below


def _keyed(node: Any) -> list[str | None]:
    """The key above each leaf of a dict that has a leaf, or a subtree, for each param."""
    if type(node) is not dict:
        return _none_for(node)
    return [name for name, child in node.items() for _ in tree.leaves(child)]


def _none_for(node: Any) -> list[str | None]:
    return [None] * len(tree.leaves(node))


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    children, _, entries, _ = optree.tree_flatten_one_level(node, namespace=tree.NAMESPACE)
    return zip(entries, children, strict=True)


def _is_leaf(node: Any) -> bool:
    return optree.tree_is_leaf(node, namespace=tree.NAMESPACE)


def _declared(node: Any) -> frozenset[str]:
    declared: frozenset[str] = getattr(type(node), "_param_fields_", frozenset())
    return declared
