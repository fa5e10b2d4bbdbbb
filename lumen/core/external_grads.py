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
from lumen.errors import InexactWarning, LossError, ParamsError

examined: set[CodeType] = set()
"""The code of loss functions of which `examine` is not needed again, unless the closure holds a live tensor."""

nested: set[CodeType] = set()
"""Of these the gradient must stay differentiable in tensors outside of params."""

marking: set[CodeType] = set()
"""These make tensors of their further arguments require grad."""


def examine(
    call: GradientCall,
    code: CodeType,
    loss_fn: Callable[..., Any],
    objective: Tensor,
    live: Sequence[Tensor],
    may_matter: bool,
) -> None:
    """Find such tensors in the graph of a loss, and sort its `code` into the sets above.

    Tensors that the loss has made itself, to take derivatives in them, do not count.
    """
    examined.add(code)
    own = {id(leaf) for leaf in live}
    extras = {id(leaf) for leaf in tree.tensors(call.extras)}
    inputs = extras | {id(leaf) for leaf in tree.tensors(call.batch)}
    reached = graph_leaves(objective)
    others = [leaf for leaf in reached if id(leaf) not in own]
    if others and len(others) == len(reached):
        examined.discard(code)
        raise LossError(
            f"the loss of {loss_fn.__qualname__} does not depend on params, but on {len(others)} other tensors"
            f" that require grad (the first of shape {tuple(others[0].shape)}). Did it call the module itself?"
            " Write: out, buffers = state.apply(params, x)"
        )
    del reached
    if any(id(leaf) in extras for leaf in others):
        marking.add(code)
    others = [leaf for leaf in others if id(leaf) not in inputs]
    outside = _referenced(others)
    if not outside:
        return
    if not may_matter:
        examined.discard(code)
        return
    nested.add(code)
    warnings.warn(
        f"the loss of {loss_fn.__qualname__} depends on {len(outside)} tensors that require grad and are not"
        f" among params (the first of shape {tuple(outside[0].shape)}). Gradients stay differentiable in"
        " them, at about twice the cost, and so do the params that they update. If that is not wanted, detach them or"
        " make them params. A loss that takes a derivative in x itself writes: x = x.detach().requires_grad_()",
        InexactWarning,
        stacklevel=4,
    )


def unmark(extras: Any) -> None:
    """Have further arguments of a loss require grad no longer."""
    for leaf in tree.tensors(extras):
        if leaf.requires_grad and leaf.is_leaf:
            leaf.requires_grad_(False)


def _referenced(leaves: list[Tensor]) -> list[Tensor]:
    """Those of the ends of a graph that something else refers to. The loss's own locals are gone when it returns."""
    probe = torch.zeros((), requires_grad=True) * 1
    counts = [*map(sys.getrefcount, leaves)]
    (unreferenced,) = map(sys.getrefcount, graph_leaves(probe))
    return [leaf for leaf, count in zip(leaves, counts, strict=True) if count > unreferenced]


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


def is_old_function(error: RuntimeError) -> bool:
    """Whether torch.func met an `autograd.Function` of a model or library whose forward takes `ctx`."""
    return "override the setup_context staticmethod" in str(error)


def old_function(why: str) -> ParamsError:
    """What is raised for such a function where `why` runs the model inside of torch.func."""
    return ParamsError(
        "the model uses a torch.autograd.Function without setup_context, which torch refuses inside of torch.func, by"
        f" which {why} runs the model. Leave that out, or write the function with torch's own operations or with"
        " setup_context and generate_vmap_rule = True."
    )


@contextmanager
def explained(loss_fn: Callable[..., Any]) -> Iterator[None]:
    """Raise `LossError` for a loss that takes a derivative by autograd, which fails inside of torch.func.

    An `autograd.Function` of the model that fails there raises `ParamsError`.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        why = rules.splitter() or 'lm.ensemble, torch.func or engine="func"'
        if is_old_function(error):
            raise old_function(why) from error
        if "functorch" not in text and "not have been used in the graph" not in text:
            raise
        raise LossError(
            f"the loss of {getattr(loss_fn, '__qualname__', repr(loss_fn))} calls requires_grad_() or"
            f" torch.autograd.grad, which torch refuses inside of torch.func, by which {why} computes gradients."
            " Write instead: slope = torch.func.grad(lambda x: state.apply(params, x)[0].sum())(x)"
        ) from error
