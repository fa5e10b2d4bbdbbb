"""Params of which this rank has a shard, gathered by the first function that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.tensor_proxy import TensorProxy
from lumen.errors import ParamsError


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
        for lazy in args:
            answer = getattr(lazy.source, "answer", None) if isinstance(lazy, LazyParam) else None
            result = NotImplemented if answer is None else answer(func, args)
            if result is not NotImplemented:
                return result
        args, kwargs = _torch_compat.torch_pytree.tree_map(unsharded, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Lazy({self.key}, shape={tuple(self.shape)}, dtype={self.dtype})"


def unsharded(value: Any) -> Any:
    """The full param of a `LazyParam`; any other value unchanged."""
    return value.source.unshard(value.key, value.shard) if isinstance(value, LazyParam) else value
