"""`torch.autocast` around losses and models, wherever they run: eager, traced, or under `torch.func`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.dtypes import NARROW
from lumen.errors import HyperparameterError


class Autocast:
    """Autocast to `dtype` on the device of params and inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    @contextlib.contextmanager
    def context(self, params: Any, inputs: Any) -> Iterator[None]:
        """Run each operation in the dtype that `torch.autocast` chooses for it."""
        device = _device_of(params, inputs)
        if not torch.amp.is_autocast_available(device):
            raise HyperparameterError(
                f"torch has no autocast for device type {device!r}. Write lm.precision(..., cast='model')."
            )
        _check_params(params)
        # Torch's cache would keep cast weights until the context ends. Without it, all modes (traced steps, lanes of a
        # vmap, recomputation) give the same numbers, and a weight cast under no_grad is not reused where it needs grad.
        with torch.autocast(device, self._dtype, cache_enabled=False), _widen_norms():
            yield


def is_autocast_on(params: Any, inputs: Any) -> bool:
    """Whether autocast is on for the device of params and inputs."""
    return torch.is_autocast_enabled(_device_of(params, inputs))


def _device_of(params: Any, inputs: Any) -> str:
    """The type of the device that computes, which is not the host if only the params are there."""
    types = [
        _local_shard(tensor).device.type for tensor in map(tree.first_tensor, (inputs, params)) if tensor is not None
    ]
    return next((device for device in types if device != "cpu"), "cpu")


def _local_shard(tensor: Tensor) -> Tensor:
    """The tensor itself, or the local shard of a param that is all-gathered when it is used."""
    while hasattr(tensor, "shard"):
        tensor = tensor.shard
    return tensor


def _check_params(params: Any) -> None:
    first = tree.first_tensor(params)
    if first is None or first.dtype is not torch.float64:
        return
    if all(leaf.dtype is torch.float64 for leaf in tree.tensors(params) if leaf.is_floating_point()):
        raise HyperparameterError(
            "torch.autocast does not cast float64, the dtype of these params. Prepare the state, which casts them to"
            ' float32 for "bf16" and "fp16": state = step.init(state); or write lm.precision(..., cast="model").'
        )


def _widen_norms() -> contextlib.AbstractContextManager[Any]:
    if _torch_compat.peek_interpreter_stack() is None:
        return contextlib.nullcontext()
    return _WidenNorms()


class _WidenNorms(TorchFunctionMode):
    """Widens the inputs of norms: torch's batching rules do not accept the mixed dtypes that autocast passes on."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            narrow = {x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype in NARROW}
            if narrow:
                args = tuple([_widened(value) for value in args])
                kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_NORMS = frozenset({
    F.layer_norm,
    F.batch_norm,
    F.instance_norm,
    torch.layer_norm,
    torch.batch_norm,
    torch.instance_norm,
})  # fmt: skip


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


_MISMATCH = re.compile(r"dtype|scalar type|should be the same", re.IGNORECASE)


@contextlib.contextmanager
def explain_dtype_mismatch(transform: Any, why: str) -> Iterator[None]:
    """Add a note to torch's errors about mixed dtypes: how `transform` relates to them, and what to do.

    >>> with explain_dtype_mismatch("lm.precision('bf16')", "Write float32."):
    ...     torch.ones(2, 2) @ torch.ones(2, 2).half()
    Traceback (most recent call last):
        ...
    RuntimeError: expected m1 and m2 to have the same dtype, but got: float != c10::Half
    Under lm.precision('bf16') the model combined tensors of different dtypes: Write float32.
    """
    try:
        yield
    except RuntimeError as error:
        if "double" in str(error).lower():
            why = "autocast does not cast float64. Give the model x.float(), or write cast='model'."
        if _MISMATCH.search(str(error)):
            error.add_note(f"Under {transform} the model combined tensors of different dtypes: {why}")
        raise
