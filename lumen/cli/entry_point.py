"""What `train.py:make` names: a function in the user's own code, and what it returns."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lumen.errors import StepError

_FORM = "FILE.py:function or package.module:function"


def made_by(text: str) -> tuple[Any, Any, Any]:
    """The step, the state and the batch (None unless it gives one) that the function returns."""
    made = function(text)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise StepError(
            f"{text} must return (step, state), or (step, state, batch), but returned"
            f" {f'a tuple of {len(made)}' if isinstance(made, tuple) else type(made).__name__}."
        )
    step, state, *rest = made
    return step, state, rest[0] if rest else None


def function(text: str, taker: str = "--run") -> Callable[[], Any]:
    """The function that `text` names, for the option or command `taker`; raises `StepError` where there is none."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise StepError(f"{taker} takes {_FORM}, got {text!r}.")
    module = _file(Path(place), taker) if place.endswith(".py") else _module(place, taker)
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            key
            for key, each in vars(module).items()
            if callable(each) and getattr(each, "__module__", None) == module.__name__ and not key.startswith("_")
        ]
        raise StepError(f"{place} has no function {name!r}; it has {', '.join(own) or 'none'}.")
    return found  # type: ignore[no-any-return]


def _file(path: Path, taker: str) -> ModuleType:
    """The module in a file, imported under its own name, with its directory on the path, as when it is a script."""
    if not path.is_file():
        raise StepError(f"{taker}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.absolute().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str, taker: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise StepError(f"{taker}: there is no module {error.name!r} here; {taker} takes {_FORM}.") from error
