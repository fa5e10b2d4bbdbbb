"""The states of a metric as few tensors, for checkpoints: collected tensors become one, with a table of shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lumen.errors import MetricError
from lumen.metrics.template import StateSpec

_SHAPES = ":shapes"


def packed_names(spec: StateSpec) -> tuple[str, ...]:
    """The names of the tensors that `pack_state` returns for this state."""
    return (spec.key,) if spec.folds else (spec.key, spec.key + _SHAPES)


def pack_state(spec: StateSpec, content: Any, like: Tensor) -> dict[str, Tensor]:
    """A state as tensors by name; empty ones are on the device of `like`."""
    tensors = (content,) if spec.folds else _flatten(spec.key, content, like)
    return dict(zip(packed_names(spec), tensors, strict=True))


def unpack_state(spec: StateSpec, packed: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack_state`."""
    return packed[spec.key] if spec.folds else _unflatten(packed[spec.key], packed[spec.key + _SHAPES])


def _flatten(key: str, tensors: tuple[Any, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten several tensors into one, and return the table of their shapes."""
    kinds = {
        (tensor.dtype, tensor.dim()) if isinstance(tensor, Tensor) else type(tensor).__name__ for tensor in tensors
    }
    if len(kinds) > 1 or any(isinstance(kind, str) for kind in kinds):
        raise MetricError(
            f"the state {key!r} cannot be packed: its entries are not tensors of one dtype and number of dims, but"
            f" {', '.join(sorted(map(str, kinds)))}."
        )
    if not tensors:
        return like.new_zeros(0, dtype=torch.float32), like.new_zeros((0, 0))
    shapes = torch.tensor([tensor.shape for tensor in tensors], dtype=torch.int64)
    return torch.cat([tensor.reshape(-1) for tensor in tensors]), shapes.reshape(len(tensors), tensors[0].dim())


def _unflatten(flat: Tensor, shapes: Tensor) -> tuple[Tensor, ...]:
    sizes = [tuple(shape) for shape in shapes.tolist()]
    chunks = flat.split([int(torch.Size(size).numel()) for size in sizes])
    return tuple([chunk.reshape(size) for chunk, size in zip(chunks, sizes, strict=True)])
