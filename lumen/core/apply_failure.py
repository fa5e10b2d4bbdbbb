"""Notes on errors of a model's forward pass: what about its params and arguments may be the cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lumen import tree
from lumen.core import _torch_compat


def explain_failure(
    error: Exception, module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Add notes to an error that `module(*args, **kwargs)` raised with these params and buffers."""
    if any(note in _ALL for note in getattr(error, "__notes__", ())):
        return
    for note in _notes(error, module, tensors, args, kwargs):
        error.add_note(note)


def _notes(
    error: Exception, module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[str]:
    leaves = tree.leaves((args, dict(kwargs)))
    own = next((t for t in tensors.values() if t.is_floating_point()), None)
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if str(error).startswith("vmap:") and hasattr(module, "set_attn_implementation"):
        yield _ATTENTION
    if _torch_compat.peek_interpreter_stack() is not None and writes_in_place(error):
        yield _WRITES_UNDER_VMAP
    if any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
        yield _NUMPY
    if own is not None and "dtype" in str(error):
        others = {t.dtype for t in inputs if t.is_floating_point() and t.dtype != own.dtype}
        if others and not torch.is_autocast_enabled(own.device.type):
            yield (
                f"the params are {own.dtype} and the model was given {', '.join(map(str, others))}, as NumPy makes"
                f" numbers: write x.to({own.dtype}), in the data set or in the step"
            )
    if own is not None and any(t.device != own.device for t in inputs):
        devices = ", ".join({str(t.device) for t in inputs})
        yield (
            f"the params are on {own.device} and the model was given tensors on {devices}: write"
            f" x.to({str(own.device)!r}), or net.to({devices!r}) before lm.TrainState.create. A Runner moves"
            " its batches"
        )
    if len(args) == 1 and not kwargs and isinstance(args[0], dict) and isinstance(error, AttributeError | TypeError):
        yield _DICT


def writes_in_place(error: Exception) -> bool:
    """Whether an error under vmap is torch's refusal to write values of one lane or row into what all share."""
    text = str(error)
    return "there exists a Tensor `other`" in text or "doesn't match the broadcast shape" in text


@contextmanager
def in_place_explained() -> Iterator[None]:
    """Around a vmap: add a note to such an error, unless it has one."""
    try:
        yield
    except RuntimeError as error:
        if writes_in_place(error) and _WRITES_UNDER_VMAP not in getattr(error, "__notes__", ()):
            error.add_note(_WRITES_UNDER_VMAP)
        raise


_WRITES_UNDER_VMAP = (
    "lm.ensemble and lm.dp_sgd run a step under vmap, where the values of one lane or row cannot be written into a"
    " tensor that all share. Write x = x + y in place of x += y, torch.where(mask, y, x) in place of x[mask] = y, and"
    " y.new_zeros(shape) in place of torch.zeros(shape) for a tensor that is to be filled from y"
)
_ATTENTION = (
    "lm.dp_sgd and lm.ensemble run a model under vmap, where transformers' attention cannot look whether a"
    " mask masks anything. Write net.set_attn_implementation('eager') before lm.pure(net); an encoder, as BERT,"
    " also needs its mask ready made: attention_mask[:, None, None, :].expand(-1, 1, T, -1).bool()"
)
_NUMPY = (
    "the model was given a NumPy array: write torch.from_numpy(x). An lm.Loader makes tensors of the arrays in its data"
)
_DICT = "the model was given a dict as one argument. To pass its entries by name: state.apply(params, **batch)"
_ALL = (_ATTENTION, _NUMPY, _DICT, _WRITES_UNDER_VMAP)
