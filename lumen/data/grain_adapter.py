"""The `Feed` of Google's Grain: its iterators' own states, and epochs that are begun by their numbers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lumen.checkpoint import json_tree
from lumen.core import distributed
from lumen.data import grain
from lumen.data.adapter import Feed, after, announce, say

_KEPT = 1024  # states, more than a step that unrolls reads at a time


class GrainFeed(Feed):
    """A pipeline of Grain: its iterator says where it is, and an epoch is begun by its number.

    The state after each batch is kept, since several may be read before the first of them is trained on.
    """

    _saved: Any = None

    def __init__(self, data: Any, *, cut: bool) -> None:
        super().__init__(data)
        self.length = grain.length(data)
        self._cut = cut  # where a batch is that of all ranks
        self._states: deque[tuple[int, Any]] = deque(maxlen=_KEPT)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        self._check_ranks(position)
        announce(self.data, number)
        if number and grain.is_fixed(self.data):
            say(
                f"the sampler of this grain.DataLoader, a {type(self.data._sampler).__name__}, has no"
                " set_epoch(number): each epoch has one order, and the same random numbers."
            )
        saved, self._saved = self._saved, None
        self._states.clear()
        iterator = grain.open_iterator(self.data, number, distributed.rows() if self._cut else None)
        if not position:
            return self._tracked(iterator, 0)
        if saved is None:
            say(
                f"this run goes on at batch {position} of its data, a grain {type(self.data).__name__}, whose state is"
                " not in the checkpoint: the batches before are read again and dropped."
            )
            return after(self._tracked(iterator, 0), position, self.data)
        iterator.set_state(saved)
        self._states.append((position, saved))
        return self._tracked(iterator, position)

    def state_dict(self, epoch: int, position: int) -> dict[str, Any]:
        """The iterator's own state after `position` batches, and the pipeline that it is of."""
        ranks = {} if self._cut else super().state_dict(epoch, position)
        if not position:
            return ranks
        state = dict(self._states)[position]
        try:
            return {**ranks, "position": json_tree.pack({"pipeline": grain.layout(self.data), "state": state})}
        except TypeError as error:  # that of an iterator of the user's
            say(f"the state of this grain {type(self.data).__name__} is not in the checkpoint: {error}.")
            return ranks

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make ready to go on from there; raises `BatchError` for another pipeline."""
        if not self._cut:
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
