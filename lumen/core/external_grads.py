"""Tensors other than params that a loss depends on and that require grad: in these an outer derivative may be taken."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.primitives import GradientCall
from lumen.core.wrapped_loss import user_loss
from lumen.errors import InexactWarning, LossError

_examined: set[CodeType] = set()
_nested: set[CodeType] = set()
_marking: set[CodeType] = set()


def found(call: GradientCall, objective: Tensor, live: Sequence[Tensor], may_matter: bool) -> bool:
    """Whether the gradient must stay differentiable in such tensors, found once for each loss function.

    Walking the graph costs as much as a small step, so it is done on a function's first call only, and where its
    closure holds a tensor that requires grad. Tensors that the loss has made itself, to take derivatives in them, do
    not count. Where it has made further arguments require grad, this is undone.
    """
    loss_fn = user_loss(call.loss_fn)
    code = getattr(loss_fn, "__code__", None)
    if code is None:
        return False
    if code not in _examined or (code not in _nested and _closes_over_live(loss_fn)):
        _examined.add(code)
        _examine(call, code, loss_fn, objective, live, may_matter)
    if code in _marking:
        for leaf in tree.tensors(call.extras):
            if leaf.requires_grad and leaf.is_leaf:
                leaf.requires_grad_(False)
    return may_matter and code in _nested


def _examine(
    call: GradientCall,
    code: CodeType,
    loss_fn: Callable[..., Any],
    objective: Tensor,
    live: Sequence[Tensor],
    may_matter: bool,
) -> None:
    own = {id(leaf) for leaf in live}
    extras = {id(leaf) for leaf in tree.tensors(call.extras)}
    inputs = extras | {id(leaf) for leaf in tree.tensors(call.batch)}
    reached = graph_leaves(objective)
    others = [leaf for leaf in reached if id(leaf) not in own]
    if others and len(others) == len(reached):
        _examined.discard(code)
        raise LossError(
            f"the loss of {loss_fn.__qualname__} does not depend on params, but on {len(others)} other tensors"
            f" that require grad (the first of shape {tuple(others[0].shape)}). Did it call the module itself?"
            " Write: out, buffers = state.apply(params, x)"
        )
    del reached
    if any(id(leaf) in extras for leaf in others):
        _marking.add(code)
    others = [leaf for leaf in others if id(leaf) not in inputs]
    outside = _referenced(others)
    if not outside:
        return
    if not may_matter:
        _examined.discard(code)
        return
    _nested.add(code)
    warnings.warn(
        f"the loss of {loss_fn.__qualname__} depends on {len(outside)} tensors that require grad and are not"
        f" among params (the first of shape {tuple(outside[0].shape)}). Gradients stay differentiable in"
        " them, at about twice the cost, and so do the params that they update. If that is not wanted, detach them or"
        " make them params. A loss that takes a derivative in x itself writes: x = x.detach().requires_grad_()",
        InexactWarning,
        stacklevel=5,
    )


def _referenced(leaves: list[Tensor]) -> list[Tensor]:
    """Those of the ends of a graph that something else refers to. The loss's own locals are gone when it returns."""
    probe = torch.zeros((), requires_grad=True) * 1
    counts = [*map(sys.getrefcount, leaves)]
    (unreferenced,) = map(sys.getrefcount, graph_leaves(probe))
    return [leaf for leaf, count in zip(leaves, counts, strict=True) if count > unreferenced]


def _closes_over_live(loss_fn: Callable[..., Any]) -> bool:
    for cell in getattr(loss_fn, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def graph_leaves(root: Tensor) -> list[Tensor]:
    """The tensors at the ends of the graph behind `root`."""
    visited: set[Any] = set()
    todo = [root.grad_fn]
    leaves = []
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo.extend(parent for parent, _ in node.next_functions)
    return leaves


@contextmanager
def explained(loss_fn: Callable[..., Any]) -> Iterator[None]:
    """Raise `LossError` for a loss that takes a derivative by autograd, which fails inside of torch.func."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "functorch" not in text and "not have been used in the graph" not in text:
            raise
        why = rules.splitter() or 'lm.ensemble, torch.func or engine="func"'
        raise LossError(
            f"the loss of {getattr(loss_fn, '__qualname__', repr(loss_fn))} calls requires_grad_() or"
            f" torch.autograd.grad, which torch refuses inside of torch.func, by which {why} computes gradients."
            " Write instead: slope = torch.func.grad(lambda x: state.apply(params, x)[0].sum())(x)"
        ) from error
