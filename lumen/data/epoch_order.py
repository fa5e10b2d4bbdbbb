"""Draws the order of a torch DataLoader's epoch without reading data, from any batch on, and on all ranks."""

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

# In the order of DataLoader's arguments.
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
# They draw only from torch's generators, when an epoch begins.
_TORCH_SAMPLERS = (
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
_TORCHDATA_SAMPLERS = "torchdata.stateful_dataloader.sampler"
_END = object()


class Start(NamedTuple):
    """The random generators that an epoch's order is drawn from, as they were before it.

    `shared` is torch's global one, `own` those of the loader and its samplers, `host` NumPy's and Python's, if a
    sampler may draw from them. `workers` says what the loader draws besides the order: seeds for new worker processes
    (2), one for an epoch in this process (1), or nothing for workers that are running (0).
    """

    shared: Tensor
    own: dict[str, Tensor]
    host: dict[str, Any]
    workers: int

    @classmethod
    def capture(cls, loader: DataLoader[Any], live: bool) -> Start:
        """The generators now; `live` says whether the loader's workers are running."""
        host = {} if draws_from_torch(loader) else {name: rng.capture()[name] for name in ("numpy", "python")}
        workers = 0 if live else 2 if loader.num_workers else 1
        own = {name: generator.get_state() for name, generator in _generators(loader).items()}
        return cls(torch.get_rng_state(), own, host, workers)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Start:
        """The inverse of `state_dict`."""
        host = {name: state[name] for name in ("numpy", "python") if name in state}
        return cls(state["shared"], dict(state.get("own", {})), host, state.get("workers", 1))

    def state_dict(self) -> dict[str, Any]:
        """The generators as plain data and tensors."""
        own = {"own": self.own} if self.own else {}
        return {"shared": self.shared, **own, **self.host, "workers": self.workers}

    def seed(self, *words: int) -> int:
        """A seed that follows from this start and from `words`."""
        return hash64(zlib.crc32(self.shared.numpy().tobytes()), *words)

    @contextmanager
    def restored(self, loader: DataLoader[Any], keep: bool) -> Iterator[None]:
        """Restore all generators for the block; afterwards the global ones return to the caller's states, or `keep`."""
        for name, generator in _generators(loader).items():
            if name in self.own:
                generator.set_state(self.own[name])
        with _global_rng({"torch": self.shared, **self.host}, keep):
            yield


def entries(loader: DataLoader[Any], start: Start, position: int, *, keep: bool = False) -> Iterator[Any]:
    """The entries of the sampler of `loader` from `position` on, in the epoch that began at `start`.

    The global generators return to the caller's states, since between batches they belong to the step and the data set.
    With `keep`, as an epoch begins, they stay where drawing the order has left them. A sampler that is not one of
    torch's may draw from them in the middle of an epoch: it then draws from states of its own.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    with start.restored(loader, keep):
        order = iter(sampler)
        if start.workers:  # the seed that a new iterator of torch draws for its workers
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        if start.workers == 2:
            order = iter(sampler)
        for number in range(position):
            if next(order, _END) is _END:
                raise BatchError(
                    f"the order of this {type(loader).__name__} ended after {number} batches, and the run resumes at"
                    f" batch {position}: its data set or batch size differs from that of the checkpoint."
                )
        first = next(order, _END)
        if first is _END:
            return iter(())
        remaining = order if draws_from_torch(loader) else _IsolatedOrder(order)
    return itertools.chain([first], remaining)


def resumed(loader: DataLoader[Any], start: Start, position: int) -> Iterator[Any]:
    """The batches of `loader` from `position`, in the order of the epoch that began at `start`."""
    sampler = PresetSampler(entries(loader, start, position))
    return iter(with_sampler(loader, sampler, start.seed(position), persistent=False))


class PresetSampler:
    """A sampler of preset entries."""

    def __init__(self, entries: Iterator[Any] | None = None) -> None:
        self.entries = iter(()) if entries is None else entries

    def __iter__(self) -> Iterator[Any]:
        return self.entries


def with_sampler(loader: DataLoader[Any], sampler: PresetSampler, seed: int, *, persistent: bool) -> DataLoader[Any]:
    """`loader` with another order; `seed` seeds its workers."""
    settings = {name: getattr(loader, name) for name in SETTINGS}
    settings["generator"] = torch.Generator().manual_seed(seed)  # otherwise torch draws another seed
    is_batched = loader.batch_sampler is not None
    order = {"batch_sampler": sampler} if is_batched else {"sampler": sampler, "batch_size": None}
    return DataLoader(loader.dataset, **order, **settings, persistent_workers=persistent)


def draws_from_torch(loader: DataLoader[Any]) -> bool:
    """Whether the order is drawn only from torch's generators, when an epoch begins.

    >>> draws_from_torch(DataLoader([1, 2, 3], shuffle=True))
    True
    """
    samplers = [loader.sampler, *([] if loader.batch_sampler is None else [loader.batch_sampler])]
    samplers += [inner for sampler in samplers if (inner := getattr(sampler, "sampler", None)) is not None]
    return all(type(s) in _TORCH_SAMPLERS or type(s).__module__ == _TORCHDATA_SAMPLERS for s in samplers)


def is_sequential(loader: DataLoader[Any]) -> bool:
    """Whether the order draws no random numbers."""
    return type(loader.sampler) is SequentialSampler and type(loader.batch_sampler) in (BatchSampler, type(None))


class _IsolatedOrder:
    """The remaining entries of an order, drawn from states of the global generators that nothing else uses."""

    def __init__(self, order: Iterator[Any]) -> None:
        self._order = order
        self._states = _host_rng()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with _global_rng(self._states):
            entry = next(self._order)
            self._states = _host_rng()
        return entry


def _host_rng() -> dict[str, Any]:
    captured = rng.capture()
    return {name: captured[name] for name in ("torch", "numpy", "python")}


@contextmanager
def _global_rng(states: Mapping[str, Any], keep: bool = False) -> Iterator[None]:
    """Set the host's global generators in `states`, and restore the caller's states afterwards, unless `keep`."""
    if states.keys() == {"torch"}:  # the usual case, twenty times as fast
        caller_state = torch.get_rng_state()
        torch.set_rng_state(states["torch"])
        try:
            yield
        finally:
            if not keep:
                torch.set_rng_state(caller_state)
        return
    before = _host_rng()
    rng.restore({**before, **states, "cuda": {}})
    try:
        yield
    finally:
        if not keep:
            rng.restore({**before, "cuda": {}})


def _generators(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    """The generators of a loader and its samplers, each once."""
    generators: dict[str, torch.Generator] = {}
    batch_sampler = loader.batch_sampler
    owners = {"loader": loader, "sampler": loader.sampler, "batch_sampler": batch_sampler}
    owners["batch_sampler.sampler"] = getattr(batch_sampler, "sampler", None)
    for name, owner in owners.items():
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in generators.values()):
            generators[name] = generator
    return generators
