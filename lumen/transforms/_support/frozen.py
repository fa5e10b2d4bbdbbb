"""Params that the state's optimizer freezes (`lm.optim.freeze`): their gradients must not count."""

from __future__ import annotations

from typing import Any

import torch

from lumen import tree


def frozen_params(tx: Any, params: Any) -> dict[str, bool]:
    """Whether an optimizer freezes each param, by path; {} if it cannot freeze any.

    >>> import lumen as lm, torch
    >>> frozen_params(lm.optim.freeze("a", lm.optim.sgd(0.1)), {"a": torch.ones(1), "b": torch.ones(1)})
    {'a': True, 'b': False}
    """
    unused_fn = getattr(tx, "unused_fn", None)
    if unused_fn is None or params is None:
        return {}
    return dict(zip(tree.paths(params), unused_fn(params), strict=True))


def without_frozen(grads: Any, frozen: dict[str, bool]) -> Any:
    """`grads` with zeros for frozen params, where `frozen` is about the same tree.

    >>> import torch
    >>> without_frozen({"a": torch.ones(1), "b": torch.ones(1)}, {"a": True, "b": False})
    {'a': tensor([0.]), 'b': tensor([1.])}
    """
    if not any(frozen.values()) or tree.paths(grads) != list(frozen):
        return grads
    leaves, spec = tree.flatten(grads)
    leaves = [torch.zeros_like(g) if f else g for g, f in zip(leaves, frozen.values(), strict=True)]
    return tree.unflatten(spec, leaves)
