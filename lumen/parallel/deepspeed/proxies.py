"""Tensors that stand for values in a DeepSpeed engine: params of stage 3, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.tensor_proxy import TensorProxy, empty_meta
from lumen.errors import LossError
from lumen.parallel.lazy_param import LazyParam

_METADATA = {
    _torch_compat.tensor_version.__get__,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
}


class PartitionedParam(LazyParam):
    """A param of stage 3 in a state: it is gathered where it is used."""

    form = LazyParam.form | _METADATA


class EngineGrad(TensorProxy):
    """The gradient of one param, whose values are in the engine; the engine `does` the work of some transforms."""

    form = TensorProxy.form | _METADATA
    does = ("clip",)

    @classmethod
    def answered(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises `LossError`: the values are not here."""
        raise LossError(
            "a gradient was read whose values are in DeepSpeed's engine, in shards. Pass grads to state.apply_gradients"
            " unchanged. To read one: strategy = lm.deepspeed(...), and inside the step, on every rank,"
            ' strategy.gradient("head.weight"); its norm: strategy.engine.get_global_grad_norm() after the update.'
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<a gradient of shape {tuple(self.shape)}, in DeepSpeed's engine>"


def engine_grad(param: Tensor) -> Tensor:
    """The gradient of `param`, whose values are in the engine."""
    grad: Tensor = _torch_compat.make_subclass(EngineGrad, empty_meta(param.shape, param.dtype), False)
    return grad
