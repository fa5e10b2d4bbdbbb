"""The labels of next-token prediction, made before a sequence is sharded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lumen.core.arguments import checked
from lumen.errors import BatchError


@checked
def shift_labels(input_ids: Tensor, documents: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
    """The token after each position, `[rows, positions]` like `input_ids`; `ignore_index` after the last one.

    Under `lm.context_parallel` each rank has some positions of a row, so the label of its last one is another rank's
    token: labels must be shifted in the step, before `lm.value_and_grad` is given the batch. Labels that differ from
    the tokens (-100 where the prompt is) may be shifted likewise. `documents` numbers the document of each position of
    packed rows: no label crosses from one to the next. A causal model of transformers takes the result as
    `model(..., labels=labels, shift_labels=labels)`.

    Raises `BatchError` for tensors of other shapes.

    >>> import lumen as lm, torch
    >>> lm.losses.shift_labels(torch.tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    >>> lm.losses.shift_labels(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]]))
    tensor([[   6, -100,    8, -100]])
    """
    if input_ids.dim() != 2:
        raise BatchError(f"shift_labels takes input_ids of shape [rows, positions], got {tuple(input_ids.shape)}.")
    labels = F.pad(input_ids[:, 1:], (0, 1), value=ignore_index)
    if documents is None:
        return labels
    if documents.shape != input_ids.shape:
        raise BatchError(
            f"shift_labels takes documents of the shape of input_ids, {tuple(input_ids.shape)}, got"
            f" {tuple(documents.shape)}."
        )
    ends = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    return labels.masked_fill(ends, ignore_index)
