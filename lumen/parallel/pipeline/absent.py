"""Values of other stages: shape, dtype and device are known, and whatever is computed from one is absent, too.

A stage runs the model's own forward pass. Where that reads a param, or an activation, of another stage, it gets an
`Absent`. So a result that is a plain tensor has been computed from what the stage has, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.tensor_proxy import TensorProxy, empty_meta
from lumen.errors import LossError

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITES = frozenset(
    [
        "__setitem__",
        *(f"__i{name}__" for name in _OPERATORS),
    ]
)


class Absent(TensorProxy):
    """A tensor that depends on params or activations of `stages`; `fake` has its form."""

    fake: Tensor
    mode: Any
    stages: frozenset[int]

    @classmethod
    def of(cls, fake: Tensor, stages: Iterable[int], mode: Any) -> Absent:
        """An absent value like `fake`, a tensor of the `FakeTensorMode` `mode`."""
        absent: Absent = _torch_compat.make_subclass(cls, empty_meta(fake.shape, fake.dtype), False)
        absent.fake, absent.stages, absent.mode = fake, frozenset(stages), mode
        return absent

    @classmethod
    def answered(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The form of the function's result."""
        values = [x for x in _torch_compat.torch_pytree.tree_leaves((args, kwargs)) if isinstance(x, Absent)]
        mode, stages = values[0].mode, frozenset().union(*(x.stages for x in values))
        _note_write(func, args, kwargs, stages)
        args, kwargs = _torch_compat.torch_pytree.tree_map(_form, (args, kwargs))
        try:
            with (
                torch.no_grad(),
                _torch_compat.disable_current_modes(),
                mode,
            ):  # nothing is computed, so nothing counted
                result = func(*args, **kwargs)
        except (_torch_compat.DataDependentOutputException, _torch_compat.DynamicOutputShapeException) as error:
            raise LossError(
                f"lm.pipeline runs the model on one stage after the other, and {_name(func)} decides by values of"
                f" stage {_listed(stages)}, which another process has. Compute it without reading values in Python."
            ) from error

        def absent(x: Any) -> Any:
            return Absent.of(x, stages, mode) if isinstance(x, Tensor) else x

        return _torch_compat.torch_pytree.tree_map(absent, result)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent(shape={tuple(self.shape)}, dtype={self.dtype}, stages={sorted(self.stages)})"


def _form(value: Any) -> Any:
    return value.fake if isinstance(value, Absent) else value


def _name(func: Any) -> str:
    return getattr(func, "__name__", repr(func))


def _listed(stages: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(stages)))


def _note_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stages: frozenset[int]) -> None:
    """Raise `LossError` for a write of an absent value into a tensor that is here, which would look unchanged."""
    name = _name(func)
    writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    written = [args[0]] if writes and args else []
    written += [kwargs["out"]] if kwargs.get("out") is not None else []
    for tensor in written:
        if isinstance(tensor, Absent):
            tensor.stages |= stages
        elif isinstance(tensor, Tensor):
            raise LossError(
                f"{name} writes values of stage {_listed(stages)} into a tensor in place, which lm.pipeline cannot"
                " follow from stage to stage. Compute a new tensor instead, such as torch.cat or torch.where."
            )
