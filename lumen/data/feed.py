"""`Feed`: the batches of any data, epoch by epoch, and the position to resume from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from types import GeneratorType
from typing import Any

from torch.utils.data import DataLoader

from lumen.core import distributed
from lumen.data.forks import quiet_forks
from lumen.data.hf_streams import is_stream
from lumen.data.nested import listeners, name_of, set_epoch
from lumen.data.workers import restart_workers
from lumen.errors import BatchError, InexactWarning

_ONE_SHOT_MODULES = ("builtins", "itertools")  # their iterators can be read once
_END = object()


class Feed:
    """Batches of any re-iterable data. To resume within an epoch, it reads the earlier batches again and drops them.

    `length` is the number of batches in an epoch, or None if that is unknown.
    """

    _saved_ranks = ""  # "rank/size" in the checkpoint, if its rows were sharded differently

    def __init__(self, data: Any) -> None:
        self.data = data
        self.length = length(data)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        self._check_ranks(position)
        begin_epoch(self.data, number)
        if number and is_one_shot(self.data):
            return iter(())
        if not position:
            return self._iterate()
        if not isinstance(self.data, Sequence):
            warn_inexact(
                f"this run resumes at batch {position} of its data, a {type(self.data).__name__}, which cannot start"
                " there: the batches before it are read again and dropped. The run is exact only if each pass has"
                " the same order. An lm.Loader resumes at once, and exactly."
            )
        return skip_to(self._iterate(), position, self.data)

    def stacked(
        self, number: int, position: int, stop: int, size: Callable[[], int]
    ) -> Iterator[tuple[Any, int]] | None:
        """Like `epoch`, but `size()` batches at a time, stacked, with their number; None if the data does not stack."""
        return None

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        """What `load_state_dict` needs to resume from this position: plain data and tensors."""
        return {"ranks": ranks()} if distributed.rows()[1] > 1 else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Prepare to resume from the saved position."""
        saved = state.get("ranks", "0/1")
        self._saved_ranks = saved if saved != ranks() else ""

    def _iterate(self) -> Iterator[Any]:
        if isinstance(self.data, DataLoader):
            with quiet_forks():
                return iter(self.data)
        return iter(self.data)

    def _check_ranks(self, position: int) -> None:
        """Raise `BatchError` for a resume within an epoch whose rows were sharded over other ranks."""
        saved_ranks, self._saved_ranks = self._saved_ranks, ""
        if position and saved_ranks:
            raise BatchError(
                f"this run resumes at batch {position} of an epoch as one of {distributed.rows()[1]} ranks with their"
                f" own rows, and the checkpoint was saved by {saved_ranks.partition('/')[2]}: which rows remain of this"
                f" {name_of(self.data)} is unknown. Resume with the same number of processes, or from a checkpoint at"
                " the end of an epoch (Every(epochs=1)). An lm.Loader and a map-style DataLoader resume in any world."
            )


def begin_epoch(data: Any, number: int) -> bool:
    """Set the epoch of samplers and data sets; returns whether persistent workers had to be restarted."""
    set_epoch(data, number)
    if not isinstance(data, DataLoader) or not data.persistent_workers:
        return False
    # A worker has a copy of the data set. Hugging Face's streams share the number of the epoch with all processes.
    is_stale = any(not is_stream(listener) for listener in listeners(data.dataset))
    if is_stale:
        restart_workers(data)
    return is_stale


def ranks() -> str:
    """The shard of rows of this process, as "rank/size"."""
    return "{}/{}".format(*distributed.rows())


def is_one_shot(data: Any) -> bool:
    """Whether the data can be read only once: a generator, or an iterator of Python's own."""
    return isinstance(data, GeneratorType) or (
        type(data).__module__ in _ONE_SHOT_MODULES and isinstance(data, Iterator) and iter(data) is data
    )


def skip_to(batches: Iterator[Any], position: int, data: Any) -> Iterator[Any]:
    """The batches from `position` on; raises `BatchError` if there are fewer."""
    for number in range(position):
        if next(batches, _END) is _END:
            raise BatchError(
                f"this run resumes at batch {position} of an epoch, and its {name_of(data)} ended after {number}: it is"
                " not the data of the checkpoint, or a one-shot iterator that was used before. Create a new one."
            )
    yield from batches


def warn_other_data(data: Any, position: int) -> None:
    """Warn that the checkpoint was saved with data of another kind."""
    warn_inexact(
        f"this run resumes at batch {position} of an epoch of its {name_of(data)}, and the checkpoint was saved with"
        " data of another kind: the batches after this position are not those that remained. Resume with the same data."
    )


def warn_inexact(text: str) -> None:
    """Warn that a resume is not exact."""
    warnings.warn(text, InexactWarning, stacklevel=3)


def length(data: Any) -> int | None:
    """The number of batches in an epoch, or None if it is unknown."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset
        return None
