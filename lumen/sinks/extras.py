"""Optional dependencies."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lumen.core.versions import install_extra


def require(module: str, sink: str) -> None:
    """Raise ImportError with the command to install `module` if it is missing; does not import it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a directory ./wandb with old runs is not the package
        raise ImportError(
            f"lm.sinks.{sink} needs {module}, which is not installed: {install_extra(sink.lower())}", name=module
        )


def load(module: str) -> Any:
    """Import the module on first use, because it takes a second or more."""
    return importlib.import_module(module)
