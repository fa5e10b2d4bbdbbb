"""Casts of weights that come before a model is applied: of shards, so that fewer bytes are all-gathered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.primitives import ApplyCall
from lumen.transforms._support.casts import cast


def params_of(target: Any, kinds: tuple[type[nn.Module], ...], key: str) -> frozenset[str]:
    """The names of params of modules of these kinds, cached on `target` under `key`."""
    if key not in target.__dict__:
        target.__dict__[key] = frozenset(
            f"{prefix}.{name}" if prefix else name
            for prefix, module in target.module.named_modules()
            if isinstance(module, kinds)
            for name in _torch_compat.own_params(module)
        )
    return target.__dict__[key]  # type: ignore[no-any-return]


def matrices(call: ApplyCall, compute: torch.dtype) -> dict[str, Tensor]:
    """The params, with those cast that only matrix products read, judging by their modules and dims."""
    tables = params_of(call.target, (nn.Embedding, nn.EmbeddingBag), "_tables")
    return {k: cast(p, compute) if p.dim() > 1 and k not in tables else p for k, p in call.params.items()}


def frozen(call: ApplyCall, compute: torch.dtype) -> Mapping[str, Tensor]:
    """The buffers, with the frozen weights of linear layers cast, as autocast does it where they are used."""
    if not call.target.frozen:
        return call.buffers
    names = call.target.frozen & params_of(call.target, (nn.Linear,), "_linear_params")
    return {k: cast(b, compute) if k in names and b.dim() > 1 else b for k, b in call.buffers.items()}
