"""Predictions: the outputs of a step over data, batch by batch or joined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked_first
from lumen.core.step import Transform, compose
from lumen.errors import BatchError
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext, join_world
from lumen.train.validate import evaluated, needed


@checked_first
def predict(
    step: Callable[[Any, Any], Any],
    state: Any,
    data: Iterable[Any],
    transforms: tuple[Transform, ...] = (),
    *,
    limit: int | None = None,
) -> Iterator[Any]:
    """The outputs of `step(state, batch)` for each batch of `data`, on the CPU, in evaluation mode.

    With several processes each gets the outputs of its own rows, which are sharded as those of training are.

    >>> import lumen as lm, torch
    >>> [len(outputs) for outputs in lm.predict(lambda state, batch: batch * 2, {}, [torch.ones(2), torch.ones(1)])]
    [2, 1]
    """
    join_world(transforms)
    run = compose(*needed(transforms))(lambda state, batch: (state, step(state, batch)))
    with torch.no_grad():
        state = evaluated(state)
    for batch in itertools.islice(open_batches(data, state, ProcessGroupContext(state)).epoch(0), limit):
        with torch.no_grad():
            _, outputs = run(state, batch)
        yield tree.map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, outputs)


def join_outputs(outputs: Iterable[Any]) -> Any:
    """Outputs of several batches as one tree: tensors joined along their first dim, lists appended.

    Raises `BatchError` for no outputs, and for outputs that differ in structure.
    """
    batches = list(outputs)
    if not batches:
        raise BatchError("there is nothing to predict on: the data gave no batch.")
    spec = tree.structure(batches[0], is_leaf=_is_list)
    for number, batch in enumerate(batches):
        if tree.structure(batch, is_leaf=_is_list) != spec:
            raise BatchError(
                f"the outputs of batch {number} have another structure than the first: "
                + "; ".join(tree.differences(batches[0], batch))
            )
    return tree.map(lambda *leaves: _join(leaves), *batches, is_leaf=_is_list)


def _join(leaves: tuple[Any, ...]) -> Any:
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return torch.cat([leaf if leaf.dim() else leaf[None] for leaf in leaves])
    if all(isinstance(leaf, list) for leaf in leaves):
        return list(itertools.chain.from_iterable(leaves))
    return list(leaves)


def _is_list(node: Any) -> bool:
    return isinstance(node, list)
