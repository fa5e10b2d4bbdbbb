"""What a data set draws from the global generators: seeded for a batch, and the caller's left as they were."""

from __future__ import annotations

import _random
import ctypes
import random
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from torch.utils.data import get_worker_info


class Seeded:
    """Torch's (CPU), NumPy's and Python's global generators, seeded inside and after it as they were.

    In a worker process they are only seeded: nobody else uses them there.
    """

    __slots__ = ("_give_back", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        lent = () if get_worker_info() is not None else (_lend_torchs(), _lend_pythons(), _lend_numpys())
        self._give_back: tuple[Callable[[], object], ...] = lent
        _seed(self._seed)

    def __exit__(self, *_: object) -> None:
        for give_back in self._give_back:
            give_back()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _lend_torchs() -> Callable[[], object]:
    generator = torch.default_generator
    return partial(generator.set_state, generator.get_state())


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


def _lend_pythons() -> Callable[[], None]:
    """Keep the state of Python's global generator; the call that is returned sets it again.

    `getstate` makes a tuple of 625 numbers, and `setstate` reads it: 22 µs for both. The words themselves, which lie
    behind the head of the generator's object, are copied in one, where this Python keeps them so.
    """
    generator: Any = getattr(random.seed, "__self__", None)
    plain = type(generator) is random.Random  # a subclass may keep more
    if not plain or not _has_words():
        return partial(random.setstate, random.getstate())
    words, gauss = _words(generator), generator.gauss_next
    kept = words.raw

    def give_back() -> None:
        words.raw = kept
        generator.gauss_next = gauss

    return give_back


def _words(generator: _random.Random) -> Any:
    """The memory of a generator's state, which is read and written in place."""
    head = object.__basicsize__
    size = _random.Random.__basicsize__ - head
    return (ctypes.c_char * size).from_address(id(generator) + head)


@cache
def _has_words() -> bool:
    """Whether to copy the words of one generator into another gives it the other's state, whole."""
    if sys.implementation.name != "cpython":
        return False
    one, other = random.Random(1), random.Random(2)
    one.random()
    _words(other).raw = _words(one).raw
    return one.getstate() == other.getstate() and one.random() == other.random()
