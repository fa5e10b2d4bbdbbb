"""Which operations `lm.remat(save=...)` names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

from lumen.core import _torch_compat
from lumen.errors import HyperparameterError

Operator = Callable[..., Any]  # torch.ops.aten.mm, or one overload of it: torch.ops.aten.mm.default
Save = Literal["matmuls", "attention"] | Collection[Operator] | Callable[[Operator], bool]

_MATMULS = frozenset(
    (
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "convolution", "cudnn_convolution"),
        *("grouped_mm", "scaled_mm", "scaled_mm_v2", "scaled_grouped_mm", "int_mm"),  # some of them private
    )
)
_HELP = 'Write save="matmuls", save=[torch.ops.aten.mm, torch.ops.aten.addmm], or a function of an operator.'


def chooser(save: Save) -> Callable[[Operator], bool]:
    """Whether `save` names an operator, asked once for each.

    Raises `HyperparameterError` for a `save` that names none.

    >>> import torch
    >>> names = chooser("matmuls")
    >>> names(torch.ops.aten.addmm.default), names(torch.ops.aten.relu.default)
    (True, False)
    """
    if isinstance(save, str):
        if save not in _NAMED:
            raise HyperparameterError(f"remat(save={save!r}) is unknown. {_HELP}")
        return functools.cache(_NAMED[save])
    if is_operator(save):
        raise HyperparameterError(f"remat(save={save}) is one operator. Write save=[{save}] to keep its results.")
    if callable(save):
        return functools.cache(lambda operator: bool(save(operator)))
    return _collection([*save])


def _collection(operators: list[Any]) -> Callable[[Operator], bool]:
    wrong = [operator for operator in operators if not is_operator(operator)]
    if wrong or not operators:
        shown = repr(wrong[0]) if wrong else "nothing"
        raise HyperparameterError(f"remat(save=[...]) takes operators of torch, and got {shown}. {_HELP}")
    chosen = frozenset(operators)
    return lambda operator: operator in chosen or getattr(operator, "overloadpacket", None) in chosen


def is_operator(value: Any) -> bool:
    """Whether a value is an operator of torch, or the packet of its overloads."""
    return isinstance(value, _torch_compat.OperatorBase | _torch_compat.OpOverloadPacket)


def operator_name(operator: Any) -> str:
    """The name of an operator, without namespace and overload: "mm" of `torch.ops.aten.mm.default`."""
    name: str = operator.name() if callable(getattr(operator, "name", None)) else str(operator)
    return name.rpartition("::")[2].partition(".")[0]


def _is_attention(operator: Any) -> bool:
    """A fused attention: torch's own, or one that a package registered."""
    name = operator_name(operator)
    return ("attention" in name or "attn" in name) and "backward" not in name


def _is_matmul(operator: Any) -> bool:
    return operator_name(operator).lstrip("_") in _MATMULS or _is_attention(operator)


_NAMED: dict[str, Callable[[Any], bool]] = {"matmuls": _is_matmul, "attention": _is_attention}
