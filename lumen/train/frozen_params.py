"""Checkpoints without frozen weights: what never changes is where it came from, and is only recognized again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumen.errors import CheckpointError, CheckpointMismatchError


def without(state: Any, saved: str | None = None, path: Path | None = None) -> Any:
    """`state` with those of its buffers that the model has as frozen parameters left out.

    Raises `CheckpointMismatchError` where they are not those by whose fingerprint `path` was `saved`.
    """
    if saved is not None and saved != fingerprint(state):
        raise CheckpointMismatchError(
            f"{path} was saved without its frozen weights, and those of this run are others. Begin with the same ones,"
            " in the same dtype, to go on from there."
        )
    frozen = state.apply_fn.frozen
    return state.replace(buffers={name: b for name, b in state.buffers.items() if name not in frozen})


def with_those_of(state: Any, whole: Any) -> Any:
    """`state`, made by `without` or whole itself, with the frozen weights that it lacks taken from `whole`."""
    if not hasattr(state, "buffers") or state.buffers.keys() == whole.buffers.keys():
        return state
    return state.replace(buffers={name: state.buffers.get(name, b) for name, b in whole.buffers.items()})


def fingerprint(state: Any) -> str:
    """Tells frozen weights from others: a digest of their names, dtypes, shapes and sums over their bits.

    Raises `CheckpointError` where the state holds parts of them.
    """
    if not hasattr(state, "apply_fn") or not hasattr(state, "buffers"):
        raise CheckpointError(
            "Checkpointer(..., frozen=False) finds frozen weights in the buffers of an lm.TrainState, and"
            f" {type(state).__name__} has none. Derive the state from it, or leave frozen=False out."
        )
    shapes = {name: p.shape for name, p in state.apply_fn.module.named_parameters()}
    said = {}
    for name, tensor in state.buffers.items():
        if name not in state.apply_fn.frozen:
            continue
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"Checkpointer(..., frozen=False) needs frozen weights whole, and {name!r} is of shape"
                f" {tuple(tensor.shape)}, where the model has {tuple(shapes[name])}. Save them: leave frozen=False out."
            )
        said[name] = str(tensor.dtype), list(tensor.shape), _sum_of_bits(tensor)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's memory read as integers of 16 bits (8 for bytes); computed where it is."""
    return int(tensor.detach().contiguous().view(-1).view(torch.int16 if tensor.itemsize > 1 else torch.int8).sum())
