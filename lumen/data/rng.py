"""The global generators of torch, NumPy and Python: seeded for one batch, and returned to the caller's state."""

from __future__ import annotations

import random
from threading import get_ident
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator  # the stubs of numpy.random lack them
from torch.utils.data import get_worker_info

from lumen.data.mt19937 import MT19937, caller_generator


class Seeded:
    """Seeds the global generators of torch (CPU), NumPy and Python, and restores the caller's states on exit.

    Worker processes skip the restoring: nothing else draws from their generators.
    """

    __slots__ = ("_caller", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        in_worker = get_worker_info() is not None
        self._caller = None if in_worker else (_torch.get_state(), random.getstate(), _replace_numpy())
        _torch.manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)  # noqa: NPY002 (the one that user code draws from)

    def __exit__(self, *_: object) -> None:
        if self._caller is not None:
            torch_state, python_state, numpy_state = self._caller
            _torch.set_state(torch_state)
            random.setstate(python_state)
            _restore_numpy(*numpy_state)


_torch = torch.default_generator  # torch.manual_seed would seed the accelerators as well
_spares: list[MT19937] = []  # bit generators that no `Seeded` uses: to make one takes longer than a batch


def _replace_numpy() -> tuple[Any, dict[str, Any], MT19937]:
    """Put a spare bit generator behind NumPy's global functions; returns the caller's, its state, and the spare one.

    NumPy reads and writes a state word by word, so the generator is exchanged instead. That drops the second of a pair
    of normal numbers, which NumPy keeps beside the generator: the state has it.
    """
    if type(caller := get_bit_generator()) is MT19937:
        caller.reader = get_ident()
        state = np.random.get_state(legacy=False)  # noqa: NPY002
        caller.reader = 0
    else:
        del caller
        state, caller = np.random.get_state(legacy=False), caller_generator()  # noqa: NPY002
    spare = _spares.pop() if _spares else MT19937(0)
    set_bit_generator(spare)
    return caller, state, spare


def _restore_numpy(caller: Any, state: dict[str, Any], spare: MT19937) -> None:
    set_bit_generator(caller)
    if state["has_gauss"]:
        np.random.set_state(state)  # noqa: NPY002
    _spares.append(spare)
