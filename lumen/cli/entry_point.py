"""Load the function that `train.py:make` names from the user's code, and call it."""

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


def load_step(text: str) -> tuple[Any, Any, Any]:
    """The step, the state and the batch (None if absent) that the function returns."""
    result = load_function(text)()
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise StepError(
            f"{text} must return (step, state), or (step, state, batch), but returned"
            f" {f'a tuple of {len(result)}' if isinstance(result, tuple) else type(result).__name__}."
        )
    step, state, *batch = result
    return step, state, batch[0] if batch else None


def load_function(text: str, option: str = "--run") -> Callable[[], Any]:
    """The function that `text` names, for the option or command `option`; raises `StepError` if there is none."""
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name:
        raise StepError(f"{option} takes {_FORM}, got {text!r}.")
    module = _file(Path(source), option) if source.endswith(".py") else _module(source, option)
    target = getattr(module, name, None)
    if not callable(target):
        names = [
            attribute
            for attribute, value in vars(module).items()
            if callable(value)
            and getattr(value, "__module__", None) == module.__name__
            and not attribute.startswith("_")
        ]
        raise StepError(f"{source} has no function {name!r}; it has {', '.join(names) or 'none'}.")
    return target  # type: ignore[no-any-return]


def _file(path: Path, option: str) -> ModuleType:
    """The module in a file, imported under its own name, with its directory on the path, as if it ran as a script."""
    if not path.is_file():
        raise StepError(f"{option}: no such file: {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.absolute().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str, option: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import inside that module failed
        raise StepError(f"{option}: no module named {error.name!r}; {option} takes {_FORM}.") from error
