"""`Memory`: every storage of this process, from where it is made to where it is let go.

What counts is what tensors hold. Memory that a kernel takes and gives back inside one operation, the interpreter's own,
and what an allocator keeps for later, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What a storage is for; where it serves two purposes the first counts.
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
    """Where a run is: its stage ("make", "init", "first step", "step"), the phase of the step, and the module in it."""

    stage: str
    phase: str
    module: str


@dataclass(slots=True)
class Block:
    """One storage: how large it was made, the tensor and the operation that it was made for, and where."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    made: Moment
    category: str | None = None
    name: str = ""
    host: bool = False  # whether it lies on the host, where the run is another device's

    def purpose(self) -> str:
        """Its category; what nobody claimed was made in a forward pass, or for the moment."""
        if self.category is not None:
            return self.category
        return "activations" if self.made.phase == "forward" else "temporary"


class Change(NamedTuple):
    """Bytes that a block took, or gave back where negative."""

    block: int
    nbytes: int
    moment: Moment


class _Held(NamedTuple):
    block: int
    nbytes: int
    watch: weakref.ref[Any]


class Peak(NamedTuple):
    """The largest sum of what was held at once: how much, where, and of what."""

    nbytes: int
    moment: Moment
    parts: Mapping[str, int]
    blocks: Sequence[Block]


@dataclass
class Memory:
    """All blocks, and all changes in their order; `now` is where the run is."""

    now: Moment = field(default_factory=lambda: Moment("make", "", ""))
    device: str = "cpu"  # the type of the device whose run it is
    blocks: list[Block] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    _held: dict[int, _Held] = field(default_factory=dict)  # by the address of the storage
    _copies: dict[int, int] = field(default_factory=dict)  # blocks, by the address of the storage that is copied
    _lent: dict[int, tuple[weakref.ref[Any], Sequence[Tensor]]] = field(default_factory=dict)  # by the id of the work

    def enter(self, moment: Moment) -> None:
        """Come to a new stage, with all that is held."""
        self.now = moment
        if self.blocks:
            self.changes.append(Change(0, 0, moment))

    def see(self, tensor: Tensor, operation: str) -> None:
        """Count the storage of `tensor`, unless it is known."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._held:
            return
        block, nbytes = len(self.blocks), storage.nbytes()
        self.blocks.append(Block(nbytes, tuple(tensor.shape), tensor.dtype, operation, self.now))
        self.blocks[-1].host = tensor.device.type != self.device
        self._held[address] = _Held(block, nbytes, weakref.ref(storage, lambda _: self._gone(address)))
        self.changes.append(Change(block, nbytes, self.now))

    def lend(self, work: Any, tensors: Sequence[Tensor]) -> None:
        """Hold `tensors` for as long as somebody has `work`, which waits for them, as the backends do."""
        key = id(work)

        def returned(_: object) -> None:
            del self._lent[key]

        self._lent[key] = weakref.ref(work, returned), tensors

    def copied(self, tensor: Tensor, operation: str) -> None:
        """Count as much as `tensor` has once more, where no tensor shows it, until it is `touched`."""
        block, nbytes = len(self.blocks), tensor.numel() * tensor.element_size()
        shape = tuple(tensor.shape)
        self.blocks.append(Block(nbytes, shape, tensor.dtype, operation, self.now, "communication"))
        self.changes.append(Change(block, nbytes, self.now))
        self._copies[tensor.untyped_storage()._cdata] = block

    def touched(self, tensors: Sequence[Tensor]) -> None:
        """An operation takes these: nothing that is on its way is copied any more."""
        for tensor in tensors:
            self._dropped(tensor.untyped_storage()._cdata)

    def _dropped(self, address: int) -> None:
        block = self._copies.pop(address, None)
        if block is not None:
            self.changes.append(Change(block, -self.blocks[block].nbytes, self.now))

    def claim(self, tensors: Sequence[Tensor], category: str, names: Sequence[str] = ()) -> None:
        """Say what the storages of `tensors` are for."""
        for place, tensor in enumerate(tensors):
            self.see(tensor, "")
            held = self._held.get(tensor.untyped_storage()._cdata)
            if held is None:
                continue
            block = self.blocks[held.block]
            if block.category is None or CATEGORIES.index(category) < CATEGORIES.index(block.category):
                block.category = category
                block.name = names[place] if names else ""

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Follow storages whose size is changed, as that of params that are gathered and let go.

        That is no operation of the dispatcher's, so the method itself is wrapped for as long as it is entered.
        """
        plain = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            out = plain(storage, size)
            self._resized(storage)
            return out

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]

    def _resized(self, storage: Any) -> None:
        held = self._held.get(storage._cdata)
        if held is None:
            return
        block = self.blocks[held.block]
        if block.category is None:
            block.category = "gathered params"
        nbytes = storage.nbytes()
        block.nbytes = max(block.nbytes, nbytes)
        if nbytes != held.nbytes:
            self.changes.append(Change(held.block, nbytes - held.nbytes, self.now))
            self._held[storage._cdata] = held._replace(nbytes=nbytes)

    def _gone(self, address: int) -> None:
        self._dropped(address)
        held = self._held.pop(address)
        if held.nbytes:
            self.changes.append(Change(held.block, -held.nbytes, self.now))

    def peak(self, *stages: str, host: bool = False) -> Peak:
        """The peak of those stages, by default of the whole run: of the device, or of the host beside it."""
        held = most = at = 0
        for place, change in enumerate(self.changes):
            if self.blocks[change.block].host != host and change.nbytes:
                continue
            held += change.nbytes
            if held > most and (not stages or change.moment.stage in stages):
                most, at = held, place + 1
        sizes: dict[int, int] = {}
        for change in self.changes[:at]:
            if self.blocks[change.block].host != host:
                continue
            sizes[change.block] = sizes.get(change.block, 0) + change.nbytes
        parts = dict.fromkeys(CATEGORIES, 0)
        for block, nbytes in sizes.items():
            parts[self.blocks[block].purpose()] += nbytes
        alive = sorted((block for block, nbytes in sizes.items() if nbytes), key=lambda block: -sizes[block])
        moment = self.changes[at - 1].moment if at else self.now
        return Peak(most, moment, parts, [self.blocks[block] for block in alive])

    def timeline(self, stage: str) -> list[tuple[Moment, dict[str, int]]]:
        """Bytes by category after each change of one stage."""
        found = []
        purposes = [block.purpose() for block in self.blocks]
        held = dict.fromkeys(CATEGORIES, 0)
        for change in self.changes:
            if not self.blocks[change.block].host:
                held[purposes[change.block]] += change.nbytes
            if change.moment.stage == stage:
                found.append((change.moment, held.copy()))
        return found
