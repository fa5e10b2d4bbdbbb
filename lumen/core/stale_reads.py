"""A step that reads from a module what the state's own copy of it has kept: found when the step is first called."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.module import Apply
from lumen.errors import PurityError


def applies_of(state: Any) -> list[Apply]:
    """The functions of modules that a state holds; each applies a copy of the user's module."""
    return [value for value in getattr(state, "__dict__", {}).values() if isinstance(value, Apply)]


def check_reads(step: Any, applies: Sequence[Apply]) -> None:
    """Raise `PurityError` where `step` reads from a module of the user's what a forward keeps on the copy of `applies`.

    There it is as it was before the first step: a side loss that is a constant zero, say.
    """
    step = getattr(step, "__func__", step)
    copies = [each.module for apply in applies for each in apply.forms()]
    kept = {name: each for module in copies for each in module.modules() for name in _kept(each)}
    if not kept or not isinstance(step, types.FunctionType):
        return
    cells = zip(step.__code__.co_freevars, step.__closure__ or (), strict=True)
    known = {**step.__globals__, **{name: _content(cell) for name, cell in cells}}
    for attribute, module in _reads(step.__code__, known):
        owner = kept.get(attribute)
        if owner is not None and any(type(each) is type(owner) for each in module.modules()):
            raise PurityError(
                f"the step reads {attribute!r} from a {type(module).__name__} outside of the state, where it stays what"
                f" it was: the state applies a copy, on which the forward of {type(owner).__name__} keeps it. Return it"
                " from inside the model, by a function defined outside of the step: def with_side(module, x): return"
                f" module(x), module.…{attribute}; then (out, side), buffers ="
                " state.apply_fn.calling(with_side)(params, state.buffers, x)"
            )


def _kept(module: nn.Module) -> Iterator[str]:
    """The attributes of a module that hold what was computed from params."""
    for name, value in vars(module).items():
        if name in _torch_compat.MODULE_TABLES:
            continue
        values = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        if any(isinstance(each, Tensor) and each.grad_fn is not None for each in values):
            yield name


def _reads(code: types.CodeType, known: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Attributes that a function reads beside a module that it takes from outside; in functions inside it too."""
    loads = [(each.opname, each.argval) for each in dis.get_instructions(code)]
    outside = [known.get(name) for op, name in loads if op in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF")]
    for module in outside:
        if isinstance(module, nn.Module):
            yield from ((name, module) for op, name in loads if op in ("LOAD_ATTR", "LOAD_METHOD"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _reads(constant, known)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
