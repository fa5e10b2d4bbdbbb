"""Libraries that are installed only by those who want them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def require(module: str, sink: str) -> None:
    """Raise ImportError, with the command that helps, where `module` is not installed; does not load it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a directory ./wandb with old runs is no library
        raise ImportError(
            f"lm.sinks.{sink} needs {module}, which is not installed: pip install 'lumen-torch[{module}]'", name=module
        )


def load(module: str) -> Any:
    """The module, loaded on first use: these take a second or more."""
    return importlib.import_module(module)
