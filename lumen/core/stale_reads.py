"""Detects, on the first call, a step that reads from a module an attribute that only the state's copy has updated."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.closures import cell_value, codes_of
from lumen.core.module import Apply
from lumen.errors import PurityError


def applies_of(state: Any) -> list[Apply]:
    """The module functions in a state; each applies a copy of the user's module."""
    return [value for value in getattr(state, "__dict__", {}).values() if isinstance(value, Apply)]


def check_reads(step: Any, applies: Sequence[Apply]) -> None:
    """Raise `PurityError` where `step` reads from a module of the user's what a forward keeps on the copy of `applies`.

    There it is as it was before the first step: a side loss that is a constant zero, say.
    """
    copies = [sub.module for apply in applies for sub in apply.forms()]
    owners = {name: sub for module in copies for sub in module.modules() for name in _computed(sub)}
    step = getattr(step, "__func__", step)
    if not owners or not isinstance(step, types.FunctionType):
        return
    for attribute, module in _reads(step.__code__, _outside(step)):
        owner = owners.get(attribute)
        if owner is not None and any(type(sub) is type(owner) for sub in module.modules()):
            raise PurityError(
                f"the step reads {attribute!r} from a {type(module).__name__} outside of the state, where it stays what"
                f" it was: the state applies a copy, on which the forward of {type(owner).__name__} keeps it. Return it"
                " from inside the model, by a function defined outside of the step: def with_side(module, x): return"
                f" module(x), module.…{attribute}; then (out, side), buffers ="
                " state.apply_fn.calling(with_side)(params, state.buffers, x)"
            )


def modules_read(step: Any) -> list[nn.Module]:
    """The modules that a step takes from its closure or its globals."""
    step = getattr(step, "__func__", step)
    values = _outside(step)
    names = [name for code in codes_of(step.__code__) for name in (*code.co_names, *code.co_freevars)]
    return [*dict.fromkeys(values[name] for name in names if isinstance(values.get(name), nn.Module))]


def _outside(step: types.FunctionType) -> dict[str, Any]:
    """What a function can read beside its arguments, by name."""
    cells = zip(step.__code__.co_freevars, step.__closure__ or (), strict=True)
    return {**step.__globals__, **{name: cell_value(cell) for name, cell in cells}}


def _computed(module: nn.Module) -> Iterator[str]:
    """The attributes of a module that hold what was computed from params."""
    for name, value in vars(module).items():
        if name in _torch_compat.MODULE_TABLES:
            continue
        values = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        if any(isinstance(item, Tensor) and item.grad_fn is not None for item in values):
            yield name


def _reads(code: types.CodeType, values: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Attributes that a function reads beside a module that it takes from outside; in functions inside it too."""
    for inner in codes_of(code):
        loads = [(instruction.opname, instruction.argval) for instruction in dis.get_instructions(inner)]
        outside = [values.get(name) for op, name in loads if op in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF")]
        for module in outside:
            if isinstance(module, nn.Module):
                yield from ((name, module) for op, name in loads if op in ("LOAD_ATTR", "LOAD_METHOD"))
