"""The order of a torch DataLoader's epoch, drawn without reading data: from any batch on, and by all ranks alike."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lumen.checkpoint import rng
from lumen.data.permutation import hash64
from lumen.errors import BatchError

# In the order in which DataLoader takes them.
SETTINGS = (
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
# They draw from torch's generators alone, and as an epoch begins.
_KNOWN = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    BatchSampler,
    DistributedSampler,
    list,
    tuple,
    range,
    Tensor,
)
_KNOWN_MODULE = "torchdata.stateful_dataloader.sampler"
_END = object()


class Start(NamedTuple):
    """The random generators that an epoch's order is drawn from, as they were before it.

    `shared` is torch's global one, `own` those of the loader and its samplers, `others` NumPy's and Python's, kept
    where a sampler may draw from them. `workers` is what the loader draws beside the order: for new worker processes
    (2), for an epoch in this process (1), or nothing, where its workers live on (0).
    """

    shared: Tensor
    own: dict[str, Tensor]
    others: dict[str, Any]
    workers: int

    @classmethod
    def here(cls, loader: DataLoader[Any], live: bool) -> Start:
        """As they are now; whether the loader's workers are `live` and go on with this epoch."""
        others = {} if is_known(loader) else {name: rng.capture()[name] for name in ("numpy", "python")}
        workers = 0 if live else 2 if loader.num_workers else 1
        own = {name: each.get_state() for name, each in _generators(loader).items()}
        return cls(torch.get_rng_state(), own, others, workers)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Start:
        """What `state_dict` gave."""
        others = {name: state[name] for name in ("numpy", "python") if name in state}
        return cls(state["shared"], dict(state.get("own", {})), others, state.get("workers", 1))

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        own = {"own": self.own} if self.own else {}
        return {"shared": self.shared, **own, **self.others, "workers": self.workers}

    def seed(self, *words: int) -> int:
        """A seed that follows from this start and from `words`."""
        return hash64(zlib.crc32(self.shared.numpy().tobytes()), *words)

    @contextmanager
    def put_back(self, loader: DataLoader[Any], moves_on: bool) -> Iterator[None]:
        """Have all generators as they were, and after it the global ones as they are now, unless they move on."""
        for name, each in _generators(loader).items():
            if name in self.own:
                each.set_state(self.own[name])
        with _global({"torch": self.shared, **self.others}, moves_on):
            yield


def entries(loader: DataLoader[Any], start: Start, position: int, *, moves_on: bool = False) -> Iterator[Any]:
    """What the sampler of `loader` gives from `position` on, in the epoch that began at `start`.

    The global generators are left as they are, since between batches they belong to the step and the data set, or, as
    an epoch begins, where they are after it (`moves_on`). A sampler that is not one of torch's may draw from them
    in the middle of an epoch: it draws on where it has left off.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    with start.put_back(loader, moves_on):
        order = iter(sampler)
        if start.workers:  # what a new iterator of torch draws as a seed for its workers
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        if start.workers == 2:
            order = iter(sampler)
        for number in range(position):
            if next(order, _END) is _END:
                raise BatchError(
                    f"the order of this {type(loader).__name__} ended after {number} batches, and the run goes on at"
                    f" batch {position}: its data set, or its batch size, is another than that of the checkpoint."
                )
        first = next(order, _END)
        if first is _END:
            return iter(())
        rest = order if is_known(loader) else _Apart(order)
    return itertools.chain([first], rest)


def resumed(loader: DataLoader[Any], start: Start, position: int) -> Iterator[Any]:
    """The batches of `loader` from `position`, in the order of the epoch that began at `start`."""
    keys = Keys(entries(loader, start, position))
    return iter(with_keys(loader, keys, start.seed(position), persistent=False))


class Keys:
    """A sampler that gives what it was handed."""

    def __init__(self, entries: Iterator[Any] | None = None) -> None:
        self.entries = iter(()) if entries is None else entries

    def __iter__(self) -> Iterator[Any]:
        return self.entries


def with_keys(loader: DataLoader[Any], keys: Keys, seed: int, *, persistent: bool) -> DataLoader[Any]:
    """`loader` with another order; `seed` is that of its workers."""
    settings = {name: getattr(loader, name) for name in SETTINGS}
    settings["generator"] = torch.Generator().manual_seed(seed)  # else torch would draw the seed of workers once more
    order = {"sampler": keys, "batch_size": None} if loader.batch_sampler is None else {"batch_sampler": keys}
    return DataLoader(loader.dataset, **order, **settings, persistent_workers=persistent)


def is_known(loader: DataLoader[Any]) -> bool:
    """Whether the order is drawn as an epoch begins, from torch's generators alone.

    >>> is_known(DataLoader([1, 2, 3], shuffle=True))
    True
    """
    samplers = [loader.sampler, *([] if loader.batch_sampler is None else [loader.batch_sampler])]
    samplers += [inner for each in samplers if (inner := getattr(each, "sampler", None)) is not None]
    return all(type(each) in _KNOWN or type(each).__module__ == _KNOWN_MODULE for each in samplers)


def is_sequential(loader: DataLoader[Any]) -> bool:
    """Whether nothing is drawn for the order."""
    return type(loader.sampler) is SequentialSampler and type(loader.batch_sampler) in (BatchSampler, type(None))


class _Apart:
    """The rest of an order, each entry drawn from global generators of its own."""

    def __init__(self, order: Iterator[Any]) -> None:
        self._order = order
        self._states = _states()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with _global(self._states):
            entry = next(self._order)
            self._states = _states()
        return entry


def _states() -> dict[str, Any]:
    captured = rng.capture()
    return {name: captured[name] for name in ("torch", "numpy", "python")}


@contextmanager
def _global(states: Mapping[str, Any], moves_on: bool = False) -> Iterator[None]:
    """Set the host's global generators that `states` names, and put them back as they were, unless they move on."""
    if states.keys() == {"torch"}:  # the usual case, in a twentieth of the time
        now = torch.get_rng_state()
        torch.set_rng_state(states["torch"])
        try:
            yield
        finally:
            if not moves_on:
                torch.set_rng_state(now)
        return
    before = _states()
    rng.restore({**before, **states, "cuda": {}})
    try:
        yield
    finally:
        if not moves_on:
            rng.restore({**before, "cuda": {}})


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
