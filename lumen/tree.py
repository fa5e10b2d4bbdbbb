"""Pytrees: the few operations that Lumen needs, built on optree under the namespace `lumen`.

Dicts keep their insertion order. This module sets that option at import, for the lifetime of the process: a spec
created under one order and used under another would silently permute leaves. `None` is an empty subtree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from lumen.errors import ArgumentError, printable

Spec = optree.PyTreeSpec

NAMESPACE = "lumen"

_insertion_order = optree.dict_insertion_ordered(True, namespace=NAMESPACE)
_insertion_order.__enter__()

IsLeaf = Callable[[Any], bool]


def flatten(tree: Any, is_leaf: IsLeaf | None = None) -> tuple[list[Any], Spec]:
    """The leaves of `tree`, depth first, and its spec for `unflatten`.

    >>> leaves, spec = flatten({"b": 1, "a": (2, None)})
    >>> leaves
    [1, 2]
    >>> unflatten(spec, leaves)
    {'b': 1, 'a': (2, None)}
    """
    return optree.tree_flatten(tree, is_leaf, namespace=NAMESPACE)


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    """The tree with structure `spec` and these leaves: the inverse of `flatten`.

    >>> unflatten(structure({"a": 0, "b": 0}), [1, 2])
    {'a': 1, 'b': 2}
    """
    if not isinstance(spec, Spec):
        raise ArgumentError(
            f"spec is of type {type(spec).__name__}; it is what lm.tree.flatten and lm.tree.structure return, and comes"
            " first: lm.tree.unflatten(spec, leaves)"
        )
    try:
        return spec.unflatten(leaves)
    except TypeError:
        if isinstance(leaves, Iterable):
            raise
        raise ArgumentError(f"leaves is {leaves!r:.40} of type {type(leaves).__name__}; it is a list.") from None


def leaves(tree: Any, is_leaf: IsLeaf | None = None) -> list[Any]:
    """The leaves of `tree`, depth first.

    >>> leaves({"b": 1, "a": (2, None)})
    [1, 2]
    """
    return optree.tree_leaves(tree, is_leaf, namespace=NAMESPACE)


def structure(tree: Any, is_leaf: IsLeaf | None = None) -> Spec:
    """The spec of `tree`; specs are equal if their structures and static fields are.

    >>> structure({"a": 0}) == structure({"a": 1}), structure({"a": 0}) == structure({"b": 0})
    (True, False)
    """
    return optree.tree_structure(tree, is_leaf, namespace=NAMESPACE)


def map(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf | None = None) -> Any:  # noqa: A001
    """Apply `fn` leaf by leaf to one tree, or to several of the same structure.

    >>> map(lambda x, y: x + y, {"a": 1}, {"a": 10})
    {'a': 11}
    """
    if not callable(fn):
        raise ArgumentError(
            f"fn is of type {type(fn).__name__}; it is a function of leaves, and comes first: lm.tree.map(fn, tree)"
        )
    return optree.tree_map(fn, tree, *rest, is_leaf=is_leaf, namespace=NAMESPACE)


def paths(tree: Any, is_leaf: IsLeaf | None = None) -> list[str]:
    """A readable dotted path for each leaf, in the order of `leaves`.

    >>> paths({"params": {"fc.weight": 0}, "slots": [1, 2]})
    ['params[fc.weight]', 'slots[0]', 'slots[1]']
    """
    accessors = optree.tree_accessors(tree, is_leaf, namespace=NAMESPACE)
    return [_path(accessor) for accessor in accessors]


def tensors(tree: Any) -> list[Tensor]:
    """The leaves of `tree` that are tensors, in the order of `leaves`.

    It walks the common containers in Python: a step calls this often on small trees, and between calls of torch a call
    of optree is several times as slow as in a tight loop.

    >>> import torch
    >>> tensors({"a": torch.tensor(1), "b": 2})
    [tensor(1)]
    """
    result: list[Tensor] = []
    _collect((tree,), result)
    return result


def first_tensor(tree: Any) -> Tensor | None:
    """The first leaf of `tree` that is a tensor, or None; the leaves after it are not visited.

    >>> import torch
    >>> first_tensor({"a": 2, "b": [torch.tensor(1), torch.tensor(3)]})
    tensor(1)
    """
    children = _children(tree)
    if children is None:
        return tree if isinstance(tree, Tensor) else next(iter(tensors(tree)), None)
    for child in children:
        first = child if type(child) is Tensor else first_tensor(child)
        if first is not None:
            return first
    return None


# The children of registered dataclasses, by type: see lumen.core.pytree_dataclass.
CHILDREN: dict[type, Callable[[Any], tuple[Any, ...]]] = {}
_PLAIN = frozenset({int, float, bool, str, type(None)})


def _children(node: Any) -> Iterable[Any] | None:
    """The children of a container of a common type, in order; None for anything else."""
    kind = type(node)
    if kind is dict:
        return node.values()  # type: ignore[no-any-return]
    if kind is tuple or kind is list:
        return node  # type: ignore[no-any-return]
    return CHILDREN[kind](node) if kind in CHILDREN else None


def _collect(nodes: Iterable[Any], result: list[Tensor]) -> None:
    """Append the tensors in `nodes` to `result`; one call for each container, none for its leaves."""
    for node in nodes:
        kind = type(node)
        if kind is Tensor:
            result.append(node)
        elif kind is dict:
            _collect(node.values(), result)
        elif kind is tuple or kind is list:
            _collect(node, result)
        elif kind in CHILDREN:
            _collect(CHILDREN[kind](node), result)
        elif kind not in _PLAIN:
            result.extend(leaf for leaf in leaves(node) if isinstance(leaf, Tensor))


def named_tensors(tree: Any) -> list[tuple[str, Tensor]]:
    """`(path, tensor)` for each leaf that is a tensor.

    >>> import torch
    >>> named_tensors({"params": {"fc.bias": torch.tensor(1)}, "name": "net"})
    [('params[fc.bias]', tensor(1))]
    """
    return [(path, leaf) for path, leaf in zip(paths(tree), leaves(tree), strict=True) if isinstance(leaf, Tensor)]


def nbytes(tree: Any) -> int:
    """The bytes of the tensors of `tree`; a tensor that occurs twice counts once.

    >>> import torch
    >>> x = torch.zeros(3)
    >>> nbytes({"x": x, "again": x})
    12
    """
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors(tree)}.values())


def select(where: Tensor, yes: Any, no: Any) -> Any:
    """Leaf by leaf, `yes` if the boolean scalar `where` is true, else `no`; computed on the device.

    >>> import torch
    >>> select(torch.tensor(False), {"x": torch.tensor(1)}, {"x": torch.tensor(2)})
    {'x': tensor(2)}
    """
    if not isinstance(where, Tensor):
        raise ArgumentError(
            f"where is {where!r:.40} of type {type(where).__name__}; it is a boolean scalar tensor, and a Python bool"
            " chooses itself: yes if where else no"
        )
    return map(lambda a, b: a if a is b or not isinstance(a, Tensor) else torch.where(where, a, b), yes, no)


def differences(expected: Any, actual: Any) -> list[str]:
    """The differences between two trees that should have the same structure, one line each, for an error message.

    >>> differences({"a": 1, "b": 2}, {"a": 1, "c": 2})
    ['missing b', 'unexpected c']
    """
    expected_paths, actual_paths = paths(expected), paths(actual)
    lines = [f"missing {printable(path)}" for path in expected_paths if path not in set(actual_paths)]
    lines += [f"unexpected {printable(path)}" for path in actual_paths if path not in set(expected_paths)]
    if not lines and structure(expected) != structure(actual):
        lines.append(printable(f"structure {structure(actual)} where {structure(expected)} was expected"))
    return lines


def _path(accessor: optree.PyTreeAccessor) -> str:
    text = ""
    for entry in accessor:
        if not text:
            text = str(entry.entry)
        elif isinstance(entry, optree.GetAttrEntry):
            text += f".{entry.entry}"
        else:
            text += f"[{entry.entry}]"
    return text
