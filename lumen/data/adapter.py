"""`Feed`: batches of whatever data a run is given, epoch by epoch, and the place to go on from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from types import GeneratorType
from typing import Any

from torch.utils.data import DataLoader

from lumen.core import distributed
from lumen.data.forks import quiet_forks
from lumen.data.hf_streams import is_stream
from lumen.data.nested import announce_epoch, listeners, name_of
from lumen.data.workers import restarted
from lumen.errors import BatchError, InexactWarning

_SPENT = ("builtins", "itertools")  # whose iterators cannot begin anew
_END = object()


class Feed:
    """Batches of any re-iterable data; going on within an epoch reads the earlier batches again and drops them.

    `length` is the number of batches in an epoch where that is known.
    """

    _other_ranks = ""  # the world of the checkpoint, where its rows were spread in another way

    def __init__(self, data: Any) -> None:
        self.data = data
        self.length = length(data)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        self._check_ranks(position)
        announce(self.data, number)
        if number and is_spent(self.data):
            return iter(())
        if not position:
            return self._pass()
        if not isinstance(self.data, Sequence):
            say(
                f"this run goes on at batch {position} of its data, a {type(self.data).__name__}, which cannot start"
                " there: the batches before are read again and dropped. The run is exact only if each pass gives"
                " them in the same order. An lm.Loader goes on at once, and exactly."
            )
        return after(self._pass(), position, self.data)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        """Like `epoch`, `size()` batches at a time, stacked, and how many they are; None where data has no such way."""
        return None

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from there, the place that was reached: plain data and tensors."""
        return {"ranks": ranks()} if distributed.rows()[1] > 1 else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make ready to go on from there."""
        saved = state.get("ranks", "0/1")
        self._other_ranks = saved if saved != ranks() else ""

    def _pass(self) -> Iterator[Any]:
        if isinstance(self.data, DataLoader):
            with quiet_forks():
                return iter(self.data)
        return iter(self.data)

    def _check_ranks(self, position: int) -> None:
        """Raise `BatchError` where rows that were spread over other ranks would go on within an epoch."""
        other, self._other_ranks = self._other_ranks, ""
        if position and other:
            raise BatchError(
                f"this run goes on at batch {position} of an epoch as one of {distributed.rows()[1]} ranks with rows of"
                f" its own, and the checkpoint was made by {other.partition('/')[2]}: which rows are left of this"
                f" {name_of(self.data)} is not known. Go on with as many processes, or from a checkpoint of an"
                " epoch's end (Every(epochs=1)). An lm.Loader, and a map-style DataLoader, go on in any world."
            )


def announce(data: Any, number: int) -> bool:
    """Tell what shuffles by the number of the epoch; whether worker processes that live on had to end for it."""
    announce_epoch(data, number)
    if not isinstance(data, DataLoader) or not data.persistent_workers:
        return False
    # A worker has a copy of the data set. Hugging Face's keep the number where all processes see it.
    stale = any(not is_stream(each) for each in listeners(data.dataset))
    if stale:
        restarted(data)
    return stale


def ranks() -> str:
    """Whose rows this process's own data gives: "rank/size"."""
    return "{}/{}".format(*distributed.rows())


def is_spent(data: Any) -> bool:
    """Whether a second pass gives nothing, and never will: a generator, or an iterator of Python's own."""
    return isinstance(data, GeneratorType) or (
        type(data).__module__ in _SPENT and isinstance(data, Iterator) and iter(data) is data
    )


def after(batches: Iterator[Any], position: int, data: Any) -> Iterator[Any]:
    """The batches from `position` on; raises `BatchError` where there are fewer."""
    for number in range(position):
        if next(batches, _END) is _END:
            raise BatchError(
                f"this run goes on at batch {position} of an epoch, and its {name_of(data)} ended after {number}: it is"
                " not the data of the checkpoint, or a one-shot iterator that was used before. Make it anew."
            )
    yield from batches


def say_foreign(data: Any, position: int) -> None:
    """Warn that the checkpoint was made with data of another kind."""
    say(
        f"this run goes on at batch {position} of an epoch of its {name_of(data)}, and the checkpoint was made with"
        " data of another kind: the batches after that place are not those that were left. Go on with the same data."
    )


def say(text: str) -> None:
    """Warn of what is not exact."""
    warnings.warn(text, InexactWarning, stacklevel=3)


def length(data: Any) -> int | None:
    """The number of batches in an epoch, where data knows it."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset
        return None
