"""Forks workers in a process that has loaded JAX for its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lumen.checkpoint import _orbax


@contextmanager
def quiet_forks() -> Iterator[None]:
    """Suppress JAX's warning that a fork may deadlock, if only checkpoints have loaded JAX.

    The warning is about locks that JAX's threads may hold during the fork; reading a data set does not take them. If
    the program itself has loaded JAX, its workers may use it, and the warning is shown.
    """
    with warnings.catch_warnings():
        if _orbax.loaded_here:
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        yield
