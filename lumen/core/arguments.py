"""Arguments of the wrong type, refused by name with what was found, what is allowed and the line to write.

The allowed types are those of the annotations, and the line is the example in the docstring. `checked` marks a public
function, or a class for its constructor. A function's own words go first where they are about the same argument.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from lumen.core.annotations import allows, choices, is_function, public_name, signature_of, words
from lumen.errors import ArgumentError, LumenError

T = TypeVar("T", bound=Callable[..., Any])

_NEVER_CLASSES = ("lr", "schedule", "step", "loss_fn")  # functions for which a class is surely a mistake
# What to write for arguments of these types, by name.
_LINES = {
    "Every": "lm.Every(steps=1000)",
    "Until": "lm.Epochs(10)",
    "Checkpointer": 'lm.Checkpointer("runs/a")',
    "Validate": "lm.Validate(eval_step, val_loader)",
    "GradientTransformation": "lm.optim.adamw(1e-3)",
    "Optimizer": "lm.optim.adamw(1e-3)",
    "Mesh": "lm.mesh(data=-1)",
    "Module": "net",
}
# What other libraries call an argument, and what to write for it here.
_PEERS = {
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "num_train_epochs"), "until=lm.Epochs(10)"),
    **dict.fromkeys(("steps", "max_steps", "num_steps"), "until=lm.Steps(1000)"),
    **dict.fromkeys(("validation_data", "val_dataloaders", "eval_dataset"), "validate=lm.Validate(eval_step, loader)"),
    **dict.fromkeys(("train_dataloaders", "train_dataset"), "data=loader"),
    **dict.fromkeys(("learning_rate", "init_lr"), "lr=1e-3"),
    **dict.fromkeys(("b1", "b2", "beta_1", "beta_2", "beta1", "beta2"), "betas=(0.9, 0.999)"),
    **dict.fromkeys(("save_total_limit", "max_to_keep"), "keep=3"),
    **dict.fromkeys(("save_top_k",), "keep_best=3"),
    **dict.fromkeys(("max_norm", "gradient_clip_val"), "norm=1.0"),
    **dict.fromkeys(("reduction_factor", "factor"), "eta=3"),
    **dict.fromkeys(("min_resource", "grace_period"), "min_steps=100"),
    **dict.fromkeys(("max_resource", "max_t"), "max_steps=2700"),
    **dict.fromkeys(("metric",), 'monitor="val/loss"'),
}


class Mismatch(NamedTuple):
    """An argument of the wrong type: its name, its value, and the type that its annotation asks for."""

    name: str
    value: Any
    hint: Any


def checked(target: T) -> T:
    """A function, or a class, that raises `ArgumentError` for arguments of types that its annotations do not allow.

    It is called with a wrong argument first, to hear what it says itself, so that call must be without effects.

    >>> @checked
    ... def scale(factor: float) -> float:
    ...     return factor * 2
    >>> scale("3")
    Traceback (most recent call last):
        ...
    lumen.errors.ArgumentError: lm.scale: factor is '3', of type str; it takes a number.
    """
    return cast("T", _checked(target, has_effects=False))


def checked_first(target: T) -> T:
    """The same for a function with effects, which is not called with a wrong argument."""
    return cast("T", _checked(target, has_effects=True))


def _checked(target: Any, *, has_effects: bool) -> Any:
    if not inspect.isclass(target):
        return _wrapped(target, target, has_effects)
    kind: Any = target
    kind.__init__ = _wrapped(kind.__init__, kind, has_effects)
    return kind


def _wrapped(function: Callable[..., Any], shown: Any, has_effects: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        wrong = mismatch(function, args, kwargs, shown)
        if wrong is not None:
            refuse(shown, wrong, None if has_effects else lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    return run


def named_arguments(function: T) -> T:
    """A function that raises `ArgumentError` for arguments that it does not have; the others are its own business."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            mismatch(function, args, kwargs, function, names_only=True)
            raise

    return cast("T", run)


def check(function: Callable[..., Any], **values: Any) -> None:
    """Raise `ArgumentError` for a value that is not of the type of the parameter of this name of `function`."""
    _, hints = signature_of(function)
    for name, value in values.items():
        if not allows(hints[name], value):
            refuse(function, Mismatch(name, value, hints[name]), None)


def mismatch(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], shown: Any, names_only: bool = False
) -> Mismatch | None:
    """The first argument whose type the annotation does not allow; None if all may be right.

    Raises `ArgumentError` for missing and unknown arguments of `shown`, the function or class that the message names.
    """
    signature, hints = signature_of(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(_unbound(shown, signature, args, kwargs, str(error))) from None
    if names_only:
        return None
    for name, value in bound.arguments.items():
        parameter, hint = signature.parameters[name], hints[name]
        if parameter.kind is parameter.VAR_KEYWORD or value is parameter.default:
            continue
        for item in value if parameter.kind is parameter.VAR_POSITIONAL else (value,):
            if not allows(hint, item) or _is_no_function(hint, name, item):
                return Mismatch(name, item, hint)
    return None


def _is_no_function(hint: Any, name: str, value: Any) -> bool:
    """Whether a value can be called, and is surely not meant as a function of this name."""
    if isinstance(value, Tensor) or not callable(value) or not is_function(hint):
        return False
    is_class = name in _NEVER_CLASSES and inspect.isclass(value)
    return is_class or isinstance(value, nn.Module) or hasattr(value, "wrap_host")


def refuse(shown: Any, wrong: Mismatch, call: Callable[[], Any] | None) -> NoReturn:
    """Raise `ArgumentError` for an argument of the wrong type, or what `call` says of it itself.

    `shown` is the function or class that the message names.
    """
    if _are_params(wrong.value) and public_name(shown).startswith("lm.optim."):
        raise ArgumentError(_without_params(shown)) from None
    try:
        if call is not None:
            call()
    except LumenError as error:
        if isinstance(error, TypeError | ValueError) and _is_about(str(error), shown, wrong):
            raise
    except Exception:
        pass  # it stumbled over the argument
    raise ArgumentError(_message(shown, *wrong)) from None


def _is_about(message: str, shown: Any, wrong: Mismatch) -> bool:
    """Whether a message names the argument, or the function, and what was found."""
    values = [wrong.value, *(wrong.value if type(wrong.value) in (list, tuple) else ())]
    kinds = [value if inspect.isclass(value) else type(value) for value in values]
    texts = [*(repr(value)[:40] for value in values), *(kind.__name__ for kind in kinds)]
    names = rf"\b({wrong.name.removesuffix('s')}\w?|{shown.__name__})\b"  # of betas, also beta1
    return bool(re.search(names, message)) and any(text in message for text in texts)


def _unbound(
    shown: Any, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], problem: str
) -> str:
    """What is wrong with the arguments of a call that does not fit the signature, and what to write."""
    names = [name for name in signature.parameters if name not in ("self", "cls")]
    own = args[1:] if "self" in signature.parameters else args
    if own and _are_params(own[0]):
        return _without_params(shown)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = [] if takes_any else [name for name in kwargs if name not in names]
    if unknown:
        problem = f"there is no argument {unknown[0]!r}"
    peers = [line for name, line in _PEERS.items() if name in kwargs and line.partition("=")[0] in names]
    line = ", ".join(peers) or _example(shown)
    text = f"{public_name(shown)}: {problem}; it takes {', '.join(names) or 'no arguments'}."
    return f"{text} Write: {line}" if line else text


def _are_params(value: Any) -> bool:
    """Whether a value is what torch's optimizers take first: the parameters of a module."""
    first = next(iter(value), None) if isinstance(value, list | tuple) else None
    return inspect.isgenerator(value) or isinstance(first, nn.Parameter)


def _without_params(shown: Any) -> str:
    name = public_name(shown)
    return (
        f"{name} takes no params, as torch's optimizers do: it gets them with the state."
        f" Write: state = lm.TrainState.create(net, {name}(1e-3))"
    )


def _message(shown: Any, name: str, value: Any, hint: Any) -> str:
    line = _unpacked(shown, name, value) or _line(hint, name, value) or _default(shown, name) or _example(shown)
    text = f"{public_name(shown)}: {name} is {describe(value)}; it takes {words(hint)}."
    return f"{text} Write: {line}" if line else text


def describe(value: Any) -> str:
    """A value in a message: as it is written if that is short, with its type.

    >>> describe(5), describe(torch.nn.Linear), describe(torch.nn.Linear(1, 1))
    ('5, of type int', 'the class Linear', 'an object of type Linear')
    """
    if value is None:
        return "None"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', value)}"
    if isinstance(value, bool | int | float | str | bytes):
        return f"{value!r:.60}, of type {type(value).__name__}"
    if type(value) in (list, tuple) and value:
        return f"a {type(value).__name__} with {describe(value[0])}"
    return f"an object of type {type(value).__name__}"


def _line(hint: Any, name: str, value: Any) -> str | None:
    """What to write for this argument, where its type tells."""
    if int in choices(hint) and hasattr(value, "__len__") and not isinstance(value, str):
        return f"{name}=len({type(value).__name__.lower()})"
    kind = value if inspect.isclass(value) else type(value)
    if issubclass(kind, torch.optim.Optimizer):
        return f"lm.optim.from_torch(torch.optim.{kind.__name__}, lr=1e-3)"
    for choice in choices(hint):
        line = _LINES.get(getattr(choice, "__name__", "")) if inspect.isclass(choice) else None
        if line is not None and not typing.get_args(choice):
            return f"{name}={line}"
    return None


def _unpacked(shown: Any, name: str, value: Any) -> str | None:
    """The call with the list unpacked, where a function takes one argument after another and was given a list."""
    parameter = inspect.signature(shown).parameters.get(name)
    is_rest = parameter is not None and parameter.kind is parameter.VAR_POSITIONAL
    return f"{public_name(shown)}(*{name})" if is_rest and isinstance(value, list | tuple) else None


def _default(shown: Any, name: str) -> str | None:
    """An argument with its default, where that is written in one word."""
    parameter = inspect.signature(shown).parameters.get(name)
    is_short = parameter is not None and isinstance(parameter.default, bool | int | float | str)
    return f"{name}={parameter.default!r}" if parameter is not None and is_short else None


def _example(shown: Any) -> str | None:
    """The call in the example of a docstring."""
    called = re.escape(shown.__name__)
    for line in re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", shown.__doc__ or "", flags=re.MULTILINE):
        match = re.search(rf"(?:\w+\.)*\b{called}\(", line)
        if match is not None and (call := _balanced(line[match.start() :])):
            return call
    return None


def _balanced(text: str) -> str | None:
    """`text` up to the parenthesis that closes its first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ")]}":
            return text[: position + 1]
    return None
