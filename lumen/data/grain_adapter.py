"""The `Feed` of Google's Grain: its iterators' own states, and epochs that begin by their numbers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lumen.checkpoint import json_tree
from lumen.core import distributed
from lumen.data import grain
from lumen.data.feed import Feed, begin_epoch, skip_to, warn_inexact

_MAX_STATES = 1024  # more than a step that unrolls reads at a time


class GrainFeed(Feed):
    """A pipeline of Grain: its iterator has a state, and an epoch begins by its number.

    It stores the state after each batch, since several may be read before the first of them is trained on.
    """

    _saved: Any = None

    def __init__(self, data: Any, *, sharded: bool) -> None:
        super().__init__(data)
        self.length = grain.length(data)
        self._sharded = sharded  # whether a batch has the rows of all ranks
        self._states: deque[tuple[int, Any]] = deque(maxlen=_MAX_STATES)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        self._check_ranks(position)
        begin_epoch(self.data, number)
        if number and grain.is_fixed(self.data):
            warn_inexact(
                f"the sampler of this grain.DataLoader, a {type(self.data._sampler).__name__}, has no"
                " set_epoch(number): all epochs have the same order and the same random numbers."
            )
        saved, self._saved = self._saved, None
        self._states.clear()
        iterator = grain.open_iterator(self.data, number, distributed.rows() if self._sharded else None)
        if not position:
            return self._tracked(iterator, 0)
        if saved is None:
            warn_inexact(
                f"this run resumes at batch {position} of its data, a grain {type(self.data).__name__}, whose state is"
                " not in the checkpoint: the batches before it are read again and dropped."
            )
            return skip_to(self._tracked(iterator, 0), position, self.data)
        iterator.set_state(saved)
        self._states.append((position, saved))
        return self._tracked(iterator, position)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        """The iterator's own state after `position` batches, and the layout of its pipeline."""
        ranks = {} if self._sharded else super().state_dict(epoch, position)
        if not position:
            return ranks
        state = dict(self._states)[position]
        try:
            return {**ranks, "position": json_tree.pack({"pipeline": grain.layout(self.data), "state": state})}
        except TypeError as error:  # a state of the user's own iterator
            warn_inexact(f"the state of this grain {type(self.data).__name__} is not in the checkpoint: {error}.")
            return ranks

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Prepare to resume from the saved position; raises `BatchError` for another pipeline."""
        if not self._sharded:
            super().load_state_dict(state)
        self._saved = None
        if "position" in state:
            saved = json_tree.unpack(state["position"])
            grain.check_state(saved["pipeline"], self.data)
            self._saved = saved["state"]

    def _tracked(self, iterator: Any, position: int) -> Iterator[Any]:
        try:
            for number, batch in enumerate(iterator, position + 1):
                self._states.append((number, copy.deepcopy(iterator.get_state())))
                yield batch
        finally:
            grain.close(iterator)
