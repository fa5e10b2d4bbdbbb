"""Proxies for tensors that are not here: shape and dtype are known, any other function is answered elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lumen.core import _torch_compat, distributed
from lumen.errors import ParamsError


def empty_meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    with distributed.real_tensors():
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


class GatherSource(Protocol):
    """Gathers full params from shards."""

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory."""

    def unshard(self, name: str, shard: Tensor) -> Tensor:
        """The full param `name`."""


class LazyParam(TensorProxy):
    """A param of which this rank has a shard; the first torch function that takes it gathers the full param."""

    form = TensorProxy.form | {Tensor.is_floating_point}
    shard: Tensor
    key: str
    source: GatherSource

    @classmethod
    def of(cls, source: GatherSource, name: str, shard: Tensor) -> LazyParam:
        """The param `name`, as the loss function or a module outside its unit sees it."""
        lazy: LazyParam = _torch_compat.make_subclass(cls, source.empty_meta(name, shard.dtype), False)
        lazy.shard, lazy.key, lazy.source = shard, name, source
        return lazy

    @classmethod
    def answered(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the function of full params."""
        if func is torch.autograd.grad:
            raise ParamsError(
                "torch.autograd.grad was given params of which a rank has a shard only. Differentiate params by"
                " lm.value_and_grad(loss_fn)(params, batch), which gathers them, or use lm.fsdp(stage=2)."
            )
        args, kwargs = _torch_compat.torch_pytree.tree_map(unsharded, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Lazy({self.key}, shape={tuple(self.shape)}, dtype={self.dtype})"


def unsharded(value: Any) -> Any:
    """The full param of a `LazyParam`; any other value unchanged."""
    return value.source.unshard(value.key, value.shard) if isinstance(value, LazyParam) else value
