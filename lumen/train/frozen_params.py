"""Checkpoints without frozen params: a fingerprint checks that a resumed run has the same ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumen.errors import CheckpointError, CheckpointMismatchError


def without(state: Any, saved: str | None = None, path: Path | None = None) -> Any:
    """`state` without the buffers that are frozen parameters of the model.

    Raises `CheckpointMismatchError` if their fingerprint is not the one that was `saved` in the checkpoint at `path`.
    """
    if saved is not None and saved != fingerprint(state):
        raise CheckpointMismatchError(
            f"{path} was saved without its frozen params, and those of this run are different. To resume from it, start"
            " with the same ones, in the same dtype."
        )
    frozen = state.apply_fn.frozen
    return state.replace(buffers={name: b for name, b in state.buffers.items() if name not in frozen})


def with_frozen(state: Any, source: Any) -> Any:
    """`state`, with the frozen params that it lacks taken from the state `source`."""
    if not hasattr(state, "buffers") or state.buffers.keys() == source.buffers.keys():
        return state
    return state.replace(buffers={name: state.buffers.get(name, b) for name, b in source.buffers.items()})


def fingerprint(state: Any) -> str:
    """A digest of the names, dtypes, shapes and sums of bits of the frozen params.

    Raises `CheckpointError` if they are sharded.
    """
    if not hasattr(state, "apply_fn") or not hasattr(state, "buffers"):
        raise CheckpointError(
            "Checkpointer(..., frozen=False) looks for frozen params in the buffers of an lm.TrainState, and"
            f" {type(state).__name__} has none. Derive the state from it, or leave frozen=False out."
        )
    shapes = {name: p.shape for name, p in state.apply_fn.module.named_parameters()}
    descriptions = {}
    for name, tensor in state.buffers.items():
        if name not in state.apply_fn.frozen:
            continue
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"Checkpointer(..., frozen=False) needs unsharded frozen params, and {name!r} has the shape"
                f" {tuple(tensor.shape)}, while the model has {tuple(shapes[name])}. Save them: leave frozen=False out."
            )
        descriptions[name] = str(tensor.dtype), list(tensor.shape), _sum_of_bits(tensor)
    return hashlib.sha256(json.dumps(descriptions, sort_keys=True).encode()).hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's memory read as integers of 16 bits (8 for bytes), computed on its device."""
    return int(tensor.detach().contiguous().view(-1).view(torch.int16 if tensor.itemsize > 1 else torch.int8).sum())
