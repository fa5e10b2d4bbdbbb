"""Checkpoints without frozen params: a fingerprint checks that a resumed run has the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core.param_leaves import key_paths
from lumen.core.sharding import ShardSpec
from lumen.core.step import device_of
from lumen.errors import CheckpointError, CheckpointMismatchError


def without(state: Any) -> Any:
    """`state` without the buffers that are frozen parameters of the model."""
    frozen = state.apply_fn.frozen
    return state.replace(buffers={name: b for name, b in state.buffers.items() if name not in frozen})


def check(own: str, saved: str, path: Path | str) -> None:
    """Raise `CheckpointMismatchError` where the fingerprint in the checkpoint at `path` is not the run's `own`."""
    if own != saved:
        raise CheckpointMismatchError(
            f"{path} was saved without its frozen params, and those of this run are different. To resume from it, start"
            " with the same ones, in the same dtype."
        )


def with_frozen(state: Any, source: Any) -> Any:
    """`state`, with the frozen params that it lacks taken from the state `source`."""
    if not hasattr(state, "buffers") or state.buffers.keys() == source.buffers.keys():
        return state
    return state.replace(buffers={name: state.buffers.get(name, b) for name, b in source.buffers.items()})


def fingerprint(state: Any, specs: Mapping[int, ShardSpec]) -> str:
    """A digest of the names, dtypes, shapes and sums of bits of the frozen params.

    `specs` are those of the state's sharded leaves. Where frozen params are among them, all ranks call it together, and
    the digest is that of the full ones.

    Raises `CheckpointError` if one has another shape than in the model, and no spec.
    """
    if not hasattr(state, "apply_fn") or not hasattr(state, "buffers"):
        raise CheckpointError(
            "Checkpointer(..., frozen=False) looks for frozen params in the buffers of an lm.TrainState, and"
            f" {type(state).__name__} has none. Derive the state from it, or leave frozen=False out."
        )
    model = dict(state.apply_fn.module.named_parameters()) | dict(state.apply_fn.module.named_buffers())
    spec_of = {path: specs[index] for index, path in enumerate(key_paths(state)) if index in specs}
    frozen = {name: b for name, b in state.buffers.items() if name in state.apply_fn.frozen}
    sharded = {name: spec_of["buffers", name] for name in frozen if ("buffers", name) in spec_of}
    shapes = {name: tuple(sharded[name].shape if name in sharded else b.shape) for name, b in frozen.items()}
    for name, shape in shapes.items():
        if shape != model[name].shape:
            raise CheckpointError(
                f"Checkpointer(..., frozen=False) needs frozen params whose sharding is known, and {name!r} has the"
                f" shape {shape}, while the model has {tuple(model[name].shape)}. Save them: leave frozen=False out."
            )
    sums = {name: _sum_of_bits(b) for name, b in frozen.items()}
    sums |= _over_ranks({name: sums[name] if spec.owner else 0 for name, spec in sharded.items()}, device_of(state))
    descriptions = {name: (str(b.dtype), list(shapes[name]), sums[name]) for name, b in frozen.items()}
    return hashlib.sha256(json.dumps(descriptions, sort_keys=True).encode()).hexdigest()


def _over_ranks(sums: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """The sums over all ranks, each of which has its shards'."""
    if not sums:
        return {}
    totals = torch.tensor([*sums.values()], device=device)
    dist.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's memory read as integers of 16 bits (8 for bytes), computed on its device."""
    return int(tensor.detach().contiguous().view(-1).view(torch.int16 if tensor.itemsize > 1 else torch.int8).sum())
