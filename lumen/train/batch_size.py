"""Counts the rows and tokens of a batch from its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.errors import BatchError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def count_rows(batch: Any, stacked: bool = False) -> int:
    """The size of the first dim of the batch's first tensor, or 0 without a tensor; of `stacked` batches the first two.

    It runs at each step, so it looks into dicts and tuples without listing their leaves.
    """
    node = batch
    while type(node) in (dict, tuple, list) and node:
        node = next(iter(node.values())) if type(node) is dict else node[0]
    if not isinstance(node, Tensor):
        node = next(iter(tree.tensors(batch)), None)
    if node is None or not node.dim():
        return 0
    rows: int = node.shape[0]
    return rows * int(node.shape[1]) if stacked and node.dim() > 1 else rows


def count_tokens(batch: Any) -> int:
    """The number of elements of the first integer tensor in `batch`; raises `BatchError` without one."""
    for leaf in tree.tensors(batch):
        if leaf.dtype in _INTEGERS:
            return leaf.numel()
    raise BatchError(
        "tokens are counted in the batch's first integer tensor, and this batch has none. Say how to count them:"
        " lm.Runner(step, tokens=lambda batch: batch['x'].numel())"
    )


TokenCount = Callable[[Any], int]
