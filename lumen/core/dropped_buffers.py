"""Detects, on the first call, a step that drops the buffers that its models have changed."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumen import tree
from lumen.core import _torch_compat, rules
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.stale_reads import modules_read
from lumen.errors import InexactWarning, printable

_SHOWN = 3
_WRITE = (
    "Write out, buffers = state.apply(params, x) and return loss, lm.Aux(buffers=buffers) in the loss function, and"
    " state.apply_gradients(grads, buffers=aux.buffers) with the aux of lm.value_and_grad(loss_fn, has_aux=True)"
)


class _Change(NamedTuple):
    """A buffer that a model has changed: that of the model's class, its name, and the tensor that it started from."""

    model: str
    name: str
    start: Tensor


class BufferChanges:
    """The buffers that the models of one step have changed; its `rule` observes APPLY."""

    def __init__(self, step: Any) -> None:
        self._changes: list[_Change] = []
        modules = modules_read(step) if isinstance(step, types.FunctionType | types.MethodType) else ()
        self._outside = [(module, name, b, _torch_compat.version_of(b)) for module, name, b in _buffers_of(modules)]

    def rule(self, next: Next, call: ApplyCall) -> Any:
        """APPLY: record the buffers that the model changes."""
        result = next(call)
        if call.buffers and not (rules.is_weightless() or _is_mapped()):
            model = type(call.target.module).__name__
            for name, buffer in result[1].items():
                start = call.buffers[name]
                if name not in call.target.frozen and _differ(buffer, start):
                    self._changes.append(_Change(model, name, start))
        return result

    def warn_dropped(self, step: str, state: Any) -> None:
        """Warn of buffers that are in the new `state` what they were, and of those of a module outside of it."""
        kept = {id(leaf) for leaf in tree.tensors(state)}
        models = {change.model for change in self._changes if id(change.start) not in kept}
        dropped = [change for change in self._changes if id(change.start) in kept and change.model not in models]
        if dropped:
            _warn(
                f"the step {step} drops the buffers that the forward pass of {dropped[0].model} has changed"
                f" ({_listed(change.name for change in dropped)}): they stay as they were. {_WRITE}. If they are meant"
                " to stay, apply the model in evaluation mode: state.eval()."
            )
        for module, name, buffer, version in self._outside:
            if _torch_compat.version_of(buffer) != version:
                _warn(
                    f"the step {step} ran a {type(module).__name__} outside of the state, which changed its buffer"
                    f" {printable(name)!r}; that of the state stays as it was. {_WRITE}."
                )
                return


def _warn(message: str) -> None:
    warnings.warn(message, InexactWarning, stacklevel=5)


def _listed(names: Iterator[str]) -> str:
    unique = [printable(name) for name in dict.fromkeys(names)]
    return ", ".join(map(repr, unique[:_SHOWN])) + ", …" * (len(unique) > _SHOWN)


def _buffers_of(modules: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in modules:
        for name, buffer in module.named_buffers():
            yield module, name, buffer


def _is_mapped() -> bool:
    return _torch_compat.peek_interpreter_stack() is not None


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have other values; False for those without any."""
    if a is b or a.is_meta or {type(a), type(b)} != {Tensor}:
        return False
    return a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b)
