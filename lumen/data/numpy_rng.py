"""NumPy's global generator: replaced by another one for a while, and returned bit for bit.

Exchanging the bit generator behind NumPy's global functions copies nothing, but drops the second of a pair of normal
numbers, which NumPy keeps beside it. Only `np.random.get_state` says whether there is one, and it reads an MT19937 word
by word, in the time of half a batch. A draw says it as well, if it can be undone: the address of the state is public
(`BitGenerator.ctypes`), and its layout, which is not documented, is compared once with what NumPy itself reads.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import MT19937
from numpy.random.mtrand import get_bit_generator, set_bit_generator  # the stubs of numpy.random lack them

_WORDS = 624
_BYTES = 4 * (_WORDS + 1)  # the words, and the position in them
_spares: list[MT19937] = []  # not in use; making one takes longer than a batch


def replace() -> Callable[[], None]:
    """Put another bit generator behind NumPy's global functions; the function returned puts the caller's back."""
    caller = get_bit_generator()
    kept = _take_kept_normal(caller)
    spare = _spares.pop() if _spares else MT19937(0)
    set_bit_generator(spare)

    def restore() -> None:
        set_bit_generator(caller)
        if kept is not None:
            _keep_normal(kept)
        _spares.append(spare)

    return restore


def _take_kept_normal(generator: Any) -> float | None:
    """The normal number that NumPy keeps, or None. Whether it keeps one afterwards is undefined."""
    if type(generator) is not MT19937 or not _is_layout_known():
        state = np.random.get_state(legacy=False)  # noqa: NPY002
        return float(state["gauss"]) if state["has_gauss"] else None
    address = generator.ctypes.state_address
    before = ctypes.string_at(address, _BYTES)
    number = np.random.standard_normal()  # noqa: NPY002
    if ctypes.string_at(address, _BYTES) == before:
        return number
    ctypes.memmove(address, before, _BYTES)  # it was the first of a new pair
    return None


def _keep_normal(number: float) -> None:
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    np.random.set_state({**state, "has_gauss": 1, "gauss": number})  # noqa: NPY002


@functools.cache
def _is_layout_known() -> bool:
    """Whether the memory of an MT19937 is its 624 words and its position, after draws too."""
    generator = MT19937(0)
    generator.random_raw(_WORDS + 5)
    state: Any = generator.state["state"]
    expected = state["key"].tobytes() + int(state["pos"]).to_bytes(4, sys.byteorder)
    return bool(ctypes.string_at(generator.ctypes.state_address, _BYTES) == expected)
