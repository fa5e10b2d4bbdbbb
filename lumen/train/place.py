"""`Placed`: a feed's batches as tensors on the state's device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core.step import device_of
from lumen.data.feed import Feed
from lumen.data.fetch import as_dict


class Placed:
    """Moves what is elsewhere, makes tensors of arrays and dicts of other mappings; else batches pass untouched."""

    def __init__(self, feed: Feed, state: Any) -> None:
        self.length = feed.length
        self.state_dict = feed.state_dict
        self.load_state_dict = feed.load_state_dict
        self._feed = feed
        self._device = device_of(state)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the first epoch, for what needs no more than some."""
        return self.epoch(0)

    def epoch(self, number: int, position: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from `position`."""
        batches = self._feed.epoch(number, position)
        first = next(batches, None)
        if first is None:
            return iter(())
        chained = itertools.chain([first], batches)
        return map(self._place, chained) if self._must_place(first) else chained

    def _must_place(self, batch: Any) -> bool:
        leaves = tree.leaves(batch)
        return as_dict(batch) is not batch or any(
            isinstance(x, np.ndarray) or (isinstance(x, Tensor) and x.device != self._device) for x in leaves
        )

    def _place(self, batch: Any) -> Any:
        def place(leaf: Any) -> Any:
            if isinstance(leaf, Tensor | np.ndarray):
                # CUDA copies what is not pinned before it returns; MPS reads it later, when it may have changed.
                return torch.as_tensor(leaf).to(self._device, non_blocking=self._device.type == "cuda")
            return leaf

        return tree.map(place, as_dict(batch))
