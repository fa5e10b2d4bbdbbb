"""The global generators of torch, NumPy and Python: seeded for one batch, and returned to the caller's state."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator  # the stubs of numpy.random lack them
from torch.utils.data import get_worker_info


class Seeded:
    """Seeds the global generators of torch (CPU), NumPy and Python, and restores the caller's states on exit.

    Worker processes skip the restoring: nothing else draws from their generators.
    """

    __slots__ = ("_restore_fns", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        in_worker = get_worker_info() is not None
        restore_fns = () if in_worker else (_save_torch(), _save_python(), _replace_numpy())
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


_spare_generators: list[np.random.MT19937] = []  # those that no `Seeded` uses: to make one takes longer than a batch


def _replace_numpy() -> Callable[[], None]:
    """Put another bit generator behind NumPy's global functions; the function returned puts the caller's back.

    NumPy reads and writes a state word by word, so exchanging the generator saves half of the time. It drops the second
    of a pair of normal numbers, which NumPy keeps beside the generator: the state that was read puts it back.
    """
    caller_generator = get_bit_generator()
    caller_state = np.random.get_state(legacy=False)  # noqa: NPY002
    spare = _spare_generators.pop() if _spare_generators else np.random.MT19937(0)
    set_bit_generator(spare)

    def restore() -> None:
        set_bit_generator(caller_generator)
        if caller_state["has_gauss"]:
            np.random.set_state(caller_state)  # noqa: NPY002
        _spare_generators.append(spare)

    return restore
