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
from lumen.core.dtypes import NARROW
from lumen.errors import HyperparameterError


class Autocast:
    """Autocast to `dtype`, for the device on which params and inputs are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    @contextlib.contextmanager
    def over(self, params: Any, inputs: Any) -> Iterator[None]:
        """Each operation in the dtype that torch gives it."""
        device = _device_of(params, inputs)
        if not torch.amp.is_autocast_available(device):
            raise HyperparameterError(
                f"torch has no autocast for devices of the kind {device!r}. Write lm.precision(..., cast='model')."
            )
        _check_params(params)
        # Torch keeps what it casts for as long as one context lasts. Without that, numbers are the same in every mode
        # (a traced step, lanes of a vmap, a recomputation), and what is cast without gradients is not used with them.
        with torch.autocast(device, self._dtype, cache_enabled=False), _promoting():
            yield


def is_on(params: Any, inputs: Any) -> bool:
    """Whether autocast is on where these are."""
    return torch.is_autocast_enabled(_device_of(params, inputs))


def _device_of(params: Any, inputs: Any) -> str:
    """Where it computes: params may rest on the host."""
    kinds = [
        _local_shard(tensor).device.type for tensor in map(tree.first_tensor, (inputs, params)) if tensor is not None
    ]
    return next((kind for kind in kinds if kind != "cpu"), "cpu")


def _local_shard(tensor: Tensor) -> Tensor:
    """The tensor itself, or what is here of one that is gathered when it is used."""
    while hasattr(tensor, "shard"):
        tensor = tensor.shard
    return tensor


def _check_params(params: Any) -> None:
    first = tree.first_tensor(params)
    if first is None or first.dtype is not torch.float64:
        return
    if all(leaf.dtype is torch.float64 for leaf in tree.tensors(params) if leaf.is_floating_point()):
        raise HyperparameterError(
            "torch.autocast leaves float64 as it is, and the params are that. Prepare the state, which makes them"
            ' float32 for "bf16" and "fp16": state = step.init(state); or write lm.precision(..., cast="model").'
        )


def _promoting() -> contextlib.AbstractContextManager[Any]:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return contextlib.nullcontext()
    return _Promoting()


class _Promoting(TorchFunctionMode):
    """Norms in the widest of their dtypes: under vmap torch has no rule for the mixed ones that autocast leaves."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MIXED:
            narrow = {x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype in NARROW}
            if narrow:
                args = tuple([_wide(value) for value in args])
                kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_MIXED = frozenset({
    F.layer_norm,
    F.batch_norm,
    F.instance_norm,
    torch.layer_norm,
    torch.batch_norm,
    torch.instance_norm,
})  # fmt: skip


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


_MISMATCH = re.compile(r"dtype|scalar type|should be the same", re.IGNORECASE)


@contextlib.contextmanager
def explained(transform: Any, why: str) -> Iterator[None]:
    """Say, where torch finds tensors of different dtypes, what that has to do with `transform`.

    >>> with explained("lm.precision('bf16')", "Write float32."):
    ...     torch.ones(2, 2) @ torch.ones(2, 2).half()
    Traceback (most recent call last):
        ...
    RuntimeError: expected m1 and m2 to have the same dtype, but got: float != c10::Half
    Under lm.precision('bf16') the model met tensors of different dtypes: Write float32.
    """
    try:
        yield
    except RuntimeError as error:
        if "double" in str(error).lower():
            why = "autocast leaves float64 as it is. Give the model x.float(), or write cast='model'."
        if _MISMATCH.search(str(error)):
            error.add_note(f"Under {transform} the model met tensors of different dtypes: {why}")
        raise
