"""Going on in the middle of a torch DataLoader's epoch: the same order, without reading what came before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

# In the order in which DataLoader takes them.
_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "pin_memory_device",
)


class Start(NamedTuple):
    """The random generators that an epoch's order is drawn from, as they were before it."""

    shared: Tensor
    own: dict[str, Tensor]

    @classmethod
    def here(cls, loader: DataLoader[Any]) -> Start:
        """As they are now."""
        return cls(torch.get_rng_state(), {name: each.get_state() for name, each in _generators(loader).items()})

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Start:
        """What `state_dict` gave."""
        return cls(state["shared"], dict(state.get("own", {})))

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"shared": self.shared, "own": self.own} if self.own else {"shared": self.shared}

    def set(self, loader: DataLoader[Any]) -> None:
        """Put them back."""
        torch.set_rng_state(self.shared)
        for name, each in _generators(loader).items():
            if name in self.own:
                each.set_state(self.own[name])


def resumed(loader: DataLoader[Any], start: Start, position: int) -> Iterator[Any]:
    """The batches of `loader` from `position`, in the order of the epoch that began at `start`.

    Torch's global generator is left as it was: between batches it belongs to the step and the data set.
    """
    batched = loader.batch_sampler is not None
    skip = _Skip(loader.batch_sampler if batched else loader.sampler, position)
    settings = {name: getattr(loader, name) for name in _SETTINGS}
    order = {"batch_sampler": skip} if batched else {"sampler": skip, "batch_size": None}
    wound = DataLoader(loader.dataset, **order, **settings)
    now = torch.get_rng_state()
    try:
        start.set(loader)
        batches = iter(wound)
        skip.wind()
    finally:
        torch.set_rng_state(now)
    return batches


class _Skip:
    """A sampler without its first `count` entries."""

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler, self._count = sampler, count
        self._rest: Iterator[Any] | None = None

    def wind(self) -> None:
        """Draw the order now, rather than when the first batch is wanted."""
        if self._rest is None:
            entries = iter(self._sampler)
            first = next(itertools.islice(entries, self._count, None), None)
            self._rest = entries if first is None else itertools.chain([first], entries)

    def __iter__(self) -> Iterator[Any]:
        # Lazily, as torch's own samplers draw: only after DataLoader has drawn the seed of its workers.
        self.wind()
        assert self._rest is not None
        yield from self._rest

    def __len__(self) -> int:
        return len(self._sampler) - self._count


def _generators(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    """The generators that a loader and its samplers have of their own, each once."""
    found: dict[str, torch.Generator] = {}
    batch_sampler = loader.batch_sampler
    places = {"loader": loader, "sampler": loader.sampler, "batch_sampler": batch_sampler}
    places["batch_sampler.sampler"] = getattr(batch_sampler, "sampler", None)
    for name, place in places.items():
        generator = getattr(place, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found.values()):
            found[name] = generator
    return found
