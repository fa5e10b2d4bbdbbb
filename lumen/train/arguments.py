"""Arguments of the Runner of the wrong kind: each is refused by name, with the line to write."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lumen.core import _torch_compat
from lumen.core.arguments import check
from lumen.core.nested_states import train_states
from lumen.core.step import Transform
from lumen.errors import InexactWarning, StepError
from lumen.train.callbacks import Callback
from lumen.train.checkpointer import Checkpointer
from lumen.train.validate import Validate


def check_runner(transforms: Any, sinks: Any, callbacks: Any, checkpoint: Any) -> None:
    """Raise `StepError` for arguments of `lm.Runner` that are not what they must be.

    >>> import lumen as lm
    >>> check_runner([lm.donate], (), (), None)
    Traceback (most recent call last):
        ...
    lumen.errors.StepError: transforms has the class donate; give an object of it: transforms=[lm.donate(...)].
    """
    for transform in _objects("transforms", transforms, Transform, "[lm.donate()]"):
        if not isinstance(transform, Transform):
            _refuse("transforms", transform, "transforms, as in transforms=[lm.donate(), lm.accumulate(4)]")
    for sink in _objects("sinks", sinks, None, '[lm.sinks.JSONL("runs/a/metrics.jsonl")]'):
        if not callable(getattr(sink, "log", None)):
            _refuse("sinks", sink, 'sinks, as in sinks=[lm.sinks.JSONL("runs/a/metrics.jsonl")]')
    for callback in _objects("callbacks", callbacks, Callback, '[lm.EarlyStop(monitor="val/loss")]'):
        if not isinstance(callback, Callback):
            _refuse("callbacks", callback, 'callbacks, as in callbacks=[lm.EarlyStop(monitor="val/loss")]')
    if checkpoint is not None and not isinstance(checkpoint, Checkpointer):
        _refuse("checkpoint", checkpoint, 'an lm.Checkpointer: checkpoint=lm.Checkpointer("runs/a")')


def check_fit(
    state: Any, validate: Any, resume: Any, fit: Callable[..., Any] | None = None, **others: Any
) -> list[Validate]:
    """The validations; raises `StepError` or `ArgumentError` for arguments of `Runner.fit` that are not right.

    `others` are arguments of `fit` that have no message of their own.
    """
    check_state(state)
    _warn_evaluating(state)
    validations = [] if validate is None else [validate] if isinstance(validate, Validate) else _list(validate)
    for validation in validations:
        if not isinstance(validation, Validate):
            _refuse("validate", validation, "an lm.Validate, or several: validate=lm.Validate(eval_step, val_loader)")
    if resume is None or isinstance(resume, bool):
        _refuse("resume", resume, '"never", "auto" or the path of a checkpoint: resume="auto"')
    if fit is not None:
        check(fit, resume=resume, **others)
    return validations


def check_state(state: Any) -> None:
    """Raise `StepError` for a module where a state is expected."""
    if isinstance(state, nn.Module):
        raise StepError(
            f"the state is a module, {type(state).__name__}. Make a state of it, with an optimizer:"
            " state = lm.TrainState.create(net, lm.optim.adamw(1e-3))"
        )


def _warn_evaluating(state: Any) -> None:
    """Warn of a model that would train in evaluation mode, as `from_pretrained` returns it."""
    for _, inner in train_states(state):
        module = inner.apply_fn.module
        other = [m for m in module.modules() if isinstance(m, _torch_compat.BatchNorm) or bool(getattr(m, "p", False))]
        if other and not module.training:
            warnings.warn(
                f"the model {type(module).__name__} trains in evaluation mode, as from_pretrained returns it:"
                f" {type(other[0]).__name__} does what it does in evaluation. Write net.train() before"
                " lm.TrainState.create(net, tx). If it is meant, call eval() on its submodules, not on itself.",
                InexactWarning,
                stacklevel=4,
            )


def _objects(name: str, values: Any, kind: type | None, example: str) -> list[Any]:
    """The entries of a list; a single object, a string or a class is an error."""
    single = isinstance(values, str) or (kind is not None and isinstance(values, kind)) or hasattr(values, "log")
    if single or not isinstance(values, Iterable):
        raise StepError(f"{name} takes a list, not {_describe(values)}. Write {name}={example}.")
    entries = list(values)
    for entry in entries:
        if inspect.isclass(entry):
            raise StepError(
                f"{name} has the class {entry.__name__}; give an object of it: {name}=[lm.{entry.__name__}(...)]."
            )
    return entries


def _list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StepError(f"{name} has {_describe(value)}; it takes {expected}.")


def _describe(value: Any) -> str:
    """A value in a message: what is short to read, and else its type."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    short = value is None or isinstance(value, str | int | float | Transform)
    return f"{value!r:.60}" if short else f"an object of type {type(value).__name__}"
