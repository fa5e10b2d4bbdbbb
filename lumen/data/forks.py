"""Forking workers in a process whose checkpoints have loaded JAX."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lumen.checkpoint import _orbax


@contextmanager
def quiet_forks() -> Iterator[None]:
    """Leave out JAX's warning that a fork may deadlock, where JAX is here only because checkpoints are written.

    It speaks of locks that JAX's threads may hold in that moment; nothing that reads a data set asks for them. Where
    the program itself has loaded JAX, its workers may use it, and the warning stays.
    """
    with warnings.catch_warnings():
        if _orbax.loaded_here:
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        yield
