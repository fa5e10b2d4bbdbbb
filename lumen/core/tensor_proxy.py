"""Proxies for tensors that are not here: shape and dtype are known, any other function is answered elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat, distributed, rules


def empty_meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without memory, outside of any graph that is being traced."""
    if not rules.is_tracing():
        with distributed.real_tensors():
            return torch.empty(shape, dtype=dtype, device="meta")
    with _torch_compat.disable_proxy_modes_tracing(), _torch_compat.unset_fake_temporarily():
        return torch.empty(shape, dtype=dtype, device="meta")


class TensorProxy(Tensor):
    """A tensor of which only the `form` is known; `answered` computes any other torch function of it."""

    form: frozenset[Any] = frozenset({
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
    })  # fmt: skip

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in cls.form:
            with _torch_compat.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.answered(func, args, kwargs or {})

    @classmethod
    def answered(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a torch function of such tensors."""
        raise NotImplementedError
