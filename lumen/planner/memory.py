"""`MemoryTracker`: every tensor storage of this process, from its allocation to its release.

Only the storages of tensors count. Memory that a kernel uses within one operation, memory of the interpreter and the
cache of an allocator are not recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core import _torch_compat

# The purposes of storages; of two purposes the first counts.
CATEGORIES = (
    "params",
    "optimizer",
    "other state",
    "batch",
    "gradients",
    "gathered params",
    "communication",
    "activations",
    "temporary",
)


class Moment(NamedTuple):
    """The position of a run: its stage ("make", "init", "first step", "step"), the phase of the step, the module."""

    stage: str
    phase: str
    module: str


@dataclass(slots=True)
class MemoryBlock:
    """One storage: its largest size, the tensor and the operation that it was created for, and when."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    created: Moment
    category: str | None = None
    name: str = ""
    host: bool = False  # whether it is on the host while the run is on another device

    def purpose(self) -> str:
        """Its category; unclaimed storages are activations if created in a forward pass, else temporary."""
        if self.category is not None:
            return self.category
        return "activations" if self.created.phase == "forward" else "temporary"


class Change(NamedTuple):
    """Bytes that a block allocated, or freed if negative."""

    block: int
    nbytes: int
    moment: Moment


class _LiveStorage(NamedTuple):
    block: int
    nbytes: int
    ref: weakref.ref[Any]


class Peak(NamedTuple):
    """The peak memory: its size, when it occurred, its bytes `by_category`, and its blocks."""

    nbytes: int
    moment: Moment
    by_category: Mapping[str, int]
    blocks: Sequence[MemoryBlock]


@dataclass
class MemoryTracker:
    """All blocks, and all changes in order; `now` is the current position of the run."""

    now: Moment = field(default_factory=lambda: Moment("make", "", ""))
    device: str = "cpu"  # the device type of the run
    blocks: list[MemoryBlock] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    _live: dict[int, _LiveStorage] = field(default_factory=dict)  # by the address of the storage
    _copies: dict[int, int] = field(default_factory=dict)  # blocks, by the address of the copied storage
    # By the id of the `Work` handle that waits for the tensors.
    _retained: dict[int, tuple[weakref.ref[Any], Sequence[Tensor]]] = field(default_factory=dict)

    def enter(self, moment: Moment) -> None:
        """Start a new stage with the live blocks."""
        self.now = moment
        if self.blocks:
            self.changes.append(Change(0, 0, moment))

    def record(self, tensor: Tensor, operation: str, *, host: bool = False) -> None:
        """Record the storage of `tensor`, unless it already is; `host` if it is on the host wherever the run is."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        address = _torch_compat.storage_id(storage)
        if address in self._live:
            return
        block, nbytes = len(self.blocks), storage.nbytes()
        self.blocks.append(MemoryBlock(nbytes, tuple(tensor.shape), tensor.dtype, operation, self.now))
        self.blocks[-1].host = host or tensor.device.type != self.device
        self._live[address] = _LiveStorage(block, nbytes, weakref.ref(storage, lambda _: self._record_free(address)))
        self.changes.append(Change(block, nbytes, self.now))

    def retain(self, work: Any, tensors: Sequence[Tensor]) -> None:
        """Keep `tensors` alive as long as `work`, which waits for them, as the backends do."""
        key = id(work)

        def release(_: object) -> None:
            del self._retained[key]

        self._retained[key] = weakref.ref(work, release), tensors

    def add_copy(self, tensor: Tensor, operation: str) -> None:
        """Record a hidden copy of `tensor` in a backend, until `drop_copies` is called for it."""
        block, nbytes = len(self.blocks), tensor.numel() * tensor.element_size()
        shape = tuple(tensor.shape)
        self.blocks.append(MemoryBlock(nbytes, shape, tensor.dtype, operation, self.now, "communication"))
        self.changes.append(Change(block, nbytes, self.now))
        self._copies[_torch_compat.storage_id(tensor.untyped_storage())] = block

    def drop_copies(self, tensors: Sequence[Tensor]) -> None:
        """An operation uses these tensors, so their collectives are done and hidden copies are freed."""
        for tensor in tensors:
            self._drop_copy(_torch_compat.storage_id(tensor.untyped_storage()))

    def _drop_copy(self, address: int) -> None:
        block = self._copies.pop(address, None)
        if block is not None:
            self.changes.append(Change(block, -self.blocks[block].nbytes, self.now))

    def claim(self, tensors: Sequence[Tensor], category: str, names: Sequence[str] = ()) -> None:
        """Set the category of the storages of `tensors`."""
        for index, tensor in enumerate(tensors):
            self.record(tensor, "")
            storage = self._live.get(_torch_compat.storage_id(tensor.untyped_storage()))
            if storage is None:
                continue
            block = self.blocks[storage.block]
            if block.category is None or CATEGORIES.index(category) < CATEGORIES.index(block.category):
                block.category = category
                block.name = names[index] if names else ""

    @contextmanager
    def track_resizes(self) -> Iterator[None]:
        """Record storages that are resized, such as those of params that are all-gathered and freed.

        Resizing is not a dispatched operation, so the method is patched inside this context.
        """
        original = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = original(storage, size)
            self._record_resize(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _record_resize(self, storage: Any) -> None:
        live = self._live.get(_torch_compat.storage_id(storage))
        if live is None:
            return
        block = self.blocks[live.block]
        if block.category is None:
            block.category = "gathered params"
        nbytes = storage.nbytes()
        block.nbytes = max(block.nbytes, nbytes)
        if nbytes != live.nbytes:
            self.changes.append(Change(live.block, nbytes - live.nbytes, self.now))
            self._live[_torch_compat.storage_id(storage)] = live._replace(nbytes=nbytes)

    def _record_free(self, address: int) -> None:
        self._drop_copy(address)
        live = self._live.pop(address)
        if live.nbytes:
            self.changes.append(Change(live.block, -live.nbytes, self.now))

    def peak(self, *stages: str, host: bool = False) -> Peak:
        """The peak of these stages (by default of all), on the device or on the host."""
        live = highest = end = 0
        for index, change in enumerate(self.changes):
            if self.blocks[change.block].host != host and change.nbytes:
                continue
            live += change.nbytes
            if live > highest and (not stages or change.moment.stage in stages):
                highest, end = live, index + 1
        sizes: dict[int, int] = {}
        for change in self.changes[:end]:
            if self.blocks[change.block].host != host:
                continue
            sizes[change.block] = sizes.get(change.block, 0) + change.nbytes
        by_category = dict.fromkeys(CATEGORIES, 0)
        for block, nbytes in sizes.items():
            by_category[self.blocks[block].purpose()] += nbytes
        alive = sorted((block for block, nbytes in sizes.items() if nbytes), key=lambda block: -sizes[block])
        moment = self.changes[end - 1].moment if end else self.now
        return Peak(highest, moment, by_category, [self.blocks[block] for block in alive])

    def timeline(self, stage: str) -> list[tuple[Moment, dict[str, int]]]:
        """Bytes by category after each change in one stage."""
        points = []
        purposes = [block.purpose() for block in self.blocks]
        by_category = dict.fromkeys(CATEGORIES, 0)
        for change in self.changes:
            if not self.blocks[change.block].host:
                by_category[purposes[change.block]] += change.nbytes
            if change.moment.stage == stage:
                points.append((change.moment, by_category.copy()))
        return points
