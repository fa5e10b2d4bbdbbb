"""The global generators of torch, NumPy and Python: seeded for one batch, and returned to the caller's state."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.utils.data import get_worker_info

from lumen.data import numpy_rng


class Seeded:
    """Seeds the global generators of torch (CPU), NumPy and Python, and restores the caller's states on exit.

    Worker processes skip the restoring: nothing else draws from their generators.
    """

    __slots__ = ("_restore_fns", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        in_worker = get_worker_info() is not None
        restore_fns = () if in_worker else (_save_torch(), _save_python(), numpy_rng.replace())
        self._restore_fns: tuple[Callable[[], object], ...] = restore_fns
        torch.default_generator.manual_seed(self._seed)  # torch.manual_seed would seed the accelerators as well
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)  # noqa: NPY002 (the one that user code draws from)

    def __exit__(self, *_: object) -> None:
        for restore in self._restore_fns:
            restore()


def _save_torch() -> Callable[[], object]:
    return partial(torch.set_rng_state, torch.get_rng_state())


def _save_python() -> Callable[[], object]:
    return partial(random.setstate, random.getstate())
