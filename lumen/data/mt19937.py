"""NumPy's default bit generator, with a state that can leave out its 624 words, which NumPy copies one by one.

NumPy's global functions keep the second of a pair of normal numbers beside their bit generator. Only
`np.random.get_state` and `set_state` reach it, by way of the generator's `state`, which a subclass may override.
"""

from __future__ import annotations

import sys
from threading import get_ident
from typing import Any

import numpy as np
from numpy.random.mtrand import get_bit_generator  # the stubs of numpy.random lack it


class MT19937(np.random.MT19937):
    """NumPy's generator, whose states and copies are NumPy's; it has the same name because states carry it.

    A thread that sets `reader` to its identifier reads states without the words. To set such a state leaves them.
    """

    reader = 0
    replaced: Any = None  # kept alive: its address may be in use

    @property
    def state(self) -> Any:
        """NumPy's dict; `state["state"]` is None without the words."""
        return {"bit_generator": "MT19937", "state": None} if self.reader == get_ident() else super().state

    @state.setter
    def state(self, value: Any) -> None:
        if type(value) is not dict or value.get("state", ()) is not None:
            np.random.MT19937.state.__set__(self, value)  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        return _copy(np.random.MT19937(0), self).__reduce__()


def caller_generator() -> Any:
    """The bit generator behind NumPy's global functions, or in its place an `MT19937` in the same state.

    It is the same one if it is of another kind, or if anything else refers to it: so nobody can tell the two apart, or
    draw from one and not from the other.
    """
    holder: list[Any] = [get_bit_generator()]
    if type(holder[0]) is not np.random.MT19937 or _references(holder) > _UNSHARED:
        return holder[0]
    seeds: Any = holder[0].seed_seq  # a type that the stubs do not take
    equal = _copy(MT19937(seeds), holder[0])
    equal.replaced = holder[0]
    return equal


def _copy(copy: Any, generator: Any) -> Any:
    copy.state = generator.state
    return copy


def _references(holder: list[Any]) -> int:
    return sys.getrefcount(holder[0])


_UNSHARED = _references([np.random.MT19937(0)]) + 1  # the other reference is NumPy's
