"""Objects that are values: frozen, and compared, hashed and printed by the arguments they were made with."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from lumen.core import arguments
from lumen.errors import ArgumentError, StepError

T = TypeVar("T")

_MANY = 4  # entries from which `repr` abbreviates a container of anything but literals
_KEYWORD_ONLY, _VAR_POSITIONAL = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
_ADDRESS: Any = object.__repr__
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


class ValueType(ABCMeta):
    """Records the arguments of each object that a class makes, and freezes the object once `__init__` has returned."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """A new object, frozen."""
        _check(cls, args, kwargs)
        new: Any = type.__call__(cls, *args, **kwargs)
        bound = inspect.signature(cls).bind(*args, **kwargs)
        bound.apply_defaults()
        settings = {name: _snapshot(value) for name, value in bound.arguments.items()}
        canonical = new._canonical()  # a subclass may take other arguments
        vars(new)["_settings"] = {name: canonical.get(name, value) for name, value in settings.items()}
        return new  # type: ignore[no-any-return]

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of `__init__`, which `inspect.signature` and help() would not see behind `__call__`."""
        makers = [inspect.getattr_static(cls, name) for name in ("__init__", "__new__")]
        own = [maker for maker in makers if maker not in (object.__init__, inspect.getattr_static(object, "__new__"))]
        if not own:
            return inspect.Signature()
        signature = inspect.signature(getattr(own[0], "__func__", own[0]))
        return signature.replace(parameters=[*signature.parameters.values()][1:])


def _check(cls: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise for arguments of a class of Lumen's that its annotations do not allow; others' annotations are theirs."""
    if not cls.__module__.startswith("lumen."):
        return
    if (args or kwargs) and not inspect.signature(cls).parameters:
        shown = ", ".join(
            [*(f"{value!r:.40}" for value in args), *(f"{key}={value!r:.40}" for key, value in kwargs.items())]
        )
        raise ArgumentError(f"lm.{cls.name} takes no arguments, and got {shown}. Write: lm.{cls.name}()")
    if "__init__" not in vars(cls):
        return
    wrong = arguments.mismatch(cls.__init__, (None, *args), kwargs, cls)
    if wrong is not None:
        arguments.refuse(cls, wrong, lambda: type.__call__(cls, *args, **kwargs))


class ValueObject(metaclass=ValueType):
    """Base of classes whose objects are values.

    The settings of an object are the arguments of its `__init__`, which may set any attributes; afterwards none can be
    set. Objects of one class are equal if their settings are: containers and tensors by value, functions by identity.

    >>> class scaled(ValueObject):
    ...     name = "scaled"
    ...     def __init__(self, factor, *, every=1):
    ...         self.factor = factor
    >>> scaled(2.0), scaled(2.0, every=3), scaled(2.0) == scaled(2.0), len({scaled(1.0), scaled(1.0)})
    (lm.scaled(2.0), lm.scaled(2.0, every=3), True, 1)
    >>> scaled(2.0).replace(every=5)
    lm.scaled(2.0, every=5)
    """

    name: str = "value"
    _unshown: ClassVar[tuple[str, ...]] = ()  # settings that `repr` leaves out
    _settings: Mapping[str, Any]

    def _canonical(self) -> Mapping[str, Any]:
        """By name, the canonical form of settings that can be written in several ways; it is compared and printed."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """Another object of the class, with some settings changed."""
        parameters = inspect.signature(type(self)).parameters
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, value in self._settings.items():
            kind = parameters[name].kind
            if kind is _VAR_POSITIONAL:
                args.extend(value)
            elif kind is _VAR_KEYWORD:
                kwargs.update(value)
            elif kind is _KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(changes.pop(name, value))
        return type(self)(*args, **{**kwargs, **changes})

    def __setattr__(self, name: str, value: Any) -> None:
        if "_settings" in vars(self):
            self._refuse(name)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        kind = type(self).__name__
        fix = f"Make a new one: {kind}.replace({name}=...)"
        if name not in self._settings:
            fix = (
                "What changes from step to step belongs in the state (lm.extend.add_slot), and what one step keeps"
                " on the host in a variable of `wrap` or `wrap_host`, outside the function that they return"
            )
        raise StepError(f"{kind}.{name} cannot be assigned: a transform does not change once it is made. {fix}.")

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or not isinstance(other, ValueObject):
            return NotImplemented
        return _same(self._settings, other._settings)

    def __hash__(self) -> int:
        return hash((type(self), _hash(self._settings)))

    def __repr__(self) -> str:
        is_named = "name" in vars(self) or "name" in vars(type(self))
        return f"lm.{self.name if is_named else type(self).__name__}({', '.join(_arguments(self))})"


def _arguments(value: ValueObject) -> list[str]:
    """The arguments that make this object, as they are written.

    Those equal to their defaults are left out, but for a leading one that is not None. One required argument, and those
    behind it, are written by position as far as nothing is left out before them; several required ones by name.
    """
    parameters = inspect.signature(type(value)).parameters
    plain = [p for p in parameters.values() if p.kind not in (_KEYWORD_ONLY, _VAR_POSITIONAL, _VAR_KEYWORD)]
    by_position = sum(p.default is p.empty for p in plain) < 2
    out = []
    for index, (name, setting) in enumerate(value._settings.items()):
        parameter = parameters[name]
        if parameter.kind is _VAR_POSITIONAL:
            out += [_text(item, name) for item in setting]
        elif parameter.kind is _VAR_KEYWORD:
            out += [f"{key}={_text(item, key)}" for key, item in setting.items()]
        elif _is_shown(value, parameter, setting, leading=index == 0):
            text = _text(setting, name)
            out.append(text if by_position and parameter in plain else f"{name}={text}")
        else:
            by_position = False
    return out


def _is_shown(value: ValueObject, parameter: inspect.Parameter, setting: Any, *, leading: bool) -> bool:
    if parameter.name in value._unshown or (parameter.name == "name" and setting == value.name):
        return False
    if leading and parameter.kind is not _KEYWORD_ONLY:
        return setting is not None or parameter.default is parameter.empty
    return parameter.default is parameter.empty or not _same(setting, parameter.default)


def _snapshot(value: Any) -> Any:
    """A copy of a setting, as its owner may still change a list."""
    if type(value) is dict:
        return {key: _snapshot(item) for key, item in value.items()}
    if type(value) in (list, set):
        return type(value)(map(_snapshot, value))
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _same_tensors(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "__array__") and hasattr(b, "__array__"):
        return type(a) is type(b) and _same_tensors(torch.as_tensor(a), torch.as_tensor(b))
    return bool(a == b)


def _same_tensors(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    return torch.equal(a, b)


def _hash(value: Any) -> int:
    """A hash that equal settings share; of tensors, which may change in place, and of other objects only the kind."""
    if isinstance(value, Tensor):
        return hash((value.dtype, value.shape))
    if isinstance(value, Mapping):
        return hash(frozenset((key, _hash(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return hash((type(value), *map(_hash, value)))
    try:
        return hash(value)
    except TypeError:
        return hash(type(value))


def _text(value: Any, name: str) -> str:
    """A setting as it is written, without addresses, which differ between processes."""
    if isinstance(value, dict | list | tuple) and len(value) >= _MANY and not _is_literal(value):
        return name
    if type(value) is dict:
        return "{" + ", ".join(f"{_text(key, name)}: {_text(item, name)}" for key, item in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(_text(item, name) for item in value) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(_text(item, name) for item in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    if callable(value) or type(value).__repr__ is _ADDRESS:
        return f"{type(value).__qualname__}(...)"
    return repr(value)


def _is_literal(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_literal(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    return type(value) in (bool, int, float, complex, str, bytes, type(None))
