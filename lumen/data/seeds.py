"""What a data set draws from the global generators: seeded for a batch, and the caller's left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from torch.utils.data import get_worker_info


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's (CPU), NumPy's and Python's global generators, seeded inside and after it as they were.

    In a worker process they are only seeded: nobody else uses them there.
    """
    if get_worker_info() is not None:
        _seed(seed)
        yield
        return
    torchs, pythons, give_back = torch.get_rng_state(), random.getstate(), _lend_numpys()
    _seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torchs)
        random.setstate(pythons)
        give_back()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


class _Stateless:
    """Stands in for a bit generator where only what NumPy keeps beside one is asked for."""

    @property
    def state(self) -> dict[str, Any]:
        return {"bit_generator": ""}


_OWN, _NONE = np.random.MT19937(0), _Stateless()


def _lend_numpys() -> Callable[[], None]:
    """Put a generator of ours in the place of NumPy's global one; the call that is returned undoes it.

    NumPy copies the state of a generator word by word: 0.1 ms to save it and set it again, more than it takes to
    collate a batch of small samples. To exchange the generator takes a hundredth of that, but forgets the second number
    of a pair of normal ones, which NumPy keeps beside it and shows together with its state. So it is asked for this
    while the generator is one without a state.
    """
    kept: Any = mtrand._rand
    callers = mtrand.get_bit_generator()
    if callers is _OWN or getattr(kept, "_bit_generator", None) is not callers:  # a loader in a loader; another NumPy
        return partial(np.random.set_state, np.random.get_state())  # noqa: NPY002
    kept._bit_generator = _NONE
    try:
        beside = kept.get_state(legacy=False)
    finally:
        kept._bit_generator = callers
    mtrand.set_bit_generator(_OWN)

    def give_back() -> None:
        mtrand.set_bit_generator(callers)
        if beside["has_gauss"]:
            whole: dict[str, Any] = mtrand.get_state(legacy=False)
            np.random.set_state({**whole, "has_gauss": 1, "gauss": beside["gauss"]})  # noqa: NPY002

    return give_back
