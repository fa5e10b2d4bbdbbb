"""What a parallel transform tells others: that each process holds a part of the params, and which part of each leaf.

While its step runs, those who look at all params at once (clip, guard) join what they find over the processes: of one
transform, or of two, where what is a part by the inner one is cut once more by the outer. Between steps, those who read
or write the whole state (checkpoints) ask for a `ShardSpec` of each leaf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.collectives import pmax
from lumen.core.param_leaves import Path, key_paths, param_leaves

_KEYS = ("<shards>", "<shards within>")
_WHOLES = "<wholes>"


class Slice(NamedTuple):
    """A block of entries: where it begins in this process's tensor (`here`), in the `whole`, and its `size`."""

    here: tuple[int, ...]
    whole: tuple[int, ...]
    size: tuple[int, ...]


class ShardSpec(NamedTuple):
    """What a process's tensor is of a whole one of `shape`: the boxes that it consists of, none if it is empty.

    Of the processes that hold the same, one is the `owner`, which writes it.
    """

    shape: tuple[int, ...]
    boxes: tuple[Slice, ...]
    owner: bool


def rows_spec(shape: Sequence[int], start: int, stop: int, owner: bool) -> ShardSpec:
    """The spec of rows `start` to `stop` of a tensor of `shape`, which has dims.

    >>> rows_spec((5, 2), 3, 5, owner=True).boxes
    (Slice(here=(0, 0), whole=(3, 0), size=(2, 2)),)
    """
    zeros = (0,) * (len(shape) - 1)
    rows = Slice((0, *zeros), (start, *zeros), (stop - start, *shape[1:]))
    return ShardSpec(tuple(shape), (rows,) if stop > start else (), owner)


def composed(inner: ShardSpec, outer: ShardSpec) -> ShardSpec:
    """The piece that is made by `outer` of what was a piece by `inner` already.

    >>> rows = ShardSpec((8, 2), (Slice((0, 0), (4, 0), (4, 2)),), owner=True)
    >>> half = ShardSpec((4, 2), (Slice((0, 0), (2, 0), (2, 2)),), owner=True)
    >>> composed(rows, half).boxes
    (Slice(here=(0, 0), whole=(6, 0), size=(2, 2)),)
    """
    boxes = []
    for last in outer.boxes:
        for first in inner.boxes:
            low = tuple(map(max, last.whole, first.here))
            high = tuple(
                min(a + m, b + n) for a, m, b, n in zip(last.whole, last.size, first.here, first.size, strict=True)
            )
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = tuple(h + a - w for h, a, w in zip(last.here, low, last.whole, strict=True))
                whole = tuple(w + a - h for w, a, h in zip(first.whole, low, first.here, strict=True))
                boxes.append(Slice(here, whole, tuple(b - a for a, b in zip(low, high, strict=True))))
    return ShardSpec(inner.shape, tuple(boxes), inner.owner and outer.owner)


REPLICATED, FLAT = -1, -2  # in place of a dim


class LeafSpec(NamedTuple):
    """How a leaf of full shape `shape` is sharded: along `dim`, in `groups` equal blocks each of which is sharded.

    `dim` is `REPLICATED` where every rank has all of it, and `FLAT` where each has a span of its entries.
    """

    shape: tuple[int, ...]
    dim: int = REPLICATED
    groups: int = 1


class SpecTree:
    """How the leaves of a state are sharded: made once, by `init`, and kept in a transform's static slot.

    `params` has the spec of each param by its name, and `leaves` the param that each sharded leaf is laid out like, by
    the leaf's path. A leaf whose path is not there is replicated.
    """

    def __init__(self, params: Mapping[str, LeafSpec], leaves: Mapping[Path, str]) -> None:
        self.params, self.leaves = dict(params), dict(leaves)

    @classmethod
    def of(cls, state: Any, params: Mapping[str, LeafSpec], field: str | None = None) -> SpecTree:
        """The specs of a state whose params are about to be sharded by `params`; with `field`, of that field alone.

        Where a transform inside has sharded the state already, the same leaves are sharded once more.
        """
        inner = next(iter(_records(state).values()), None)
        shapes = {name: spec.shape for name, spec in params.items()}
        leaves = param_leaves(state, shapes) if inner is None else inner.specs.leaves
        return cls(params, {p: name for p, name in leaves.items() if name in params and field in (None, p[0])})

    def locate(self, values: Any, root: Path = ()) -> list[tuple[int, str]]:
        """The sharded leaves of `values`: their indices among `tree.leaves`, and the param that each is laid out like.

        `root` is the path of `values` in the state.
        """
        found = ((index, self.leaves.get(root + path)) for index, path in enumerate(key_paths(values)))
        return [(index, name) for index, name in found if name is not None]

    def including(self, leaves: Mapping[Path, str]) -> SpecTree:
        """The specs with `leaves` added, where the params that they are laid out like are sharded."""
        added = {path: name for path, name in leaves.items() if ("params", name) in self.leaves}
        return SpecTree(self.params, self.leaves | added) if added else self

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, SpecTree) and (self.params, self.leaves) == (other.params, other.leaves)

    def __hash__(self) -> int:
        return hash((len(self.leaves), *self.params))

    def __repr__(self) -> str:
        return f"SpecTree({len(self.params)} params, {len(self.leaves)} leaves)"


class ShardingSlot:
    """Base of the static slots in which transforms record how they shard a state.

    `owner` is the name of the transform, where that is not the name of the slot; `specs` is None for row fields.
    """

    owner: str
    specs: SpecTree | None = None


def extend_specs(state: Any, slot: str) -> Any:
    """`state` with specs for a slot that was added after the state was sharded: what is like params is sharded, too."""
    records = _records(state)
    if not records:
        return state
    shapes = {name: p.shape for name, p in state.params.items()}  # of this rank's shards, as in the slot
    leaves = {path: name for path, name in param_leaves(state, shapes).items() if path[:2] == ("slots", slot)}
    extended = {key: record.replace(specs=record.specs.including(leaves)) for key, record in records.items()}
    return state.replace(slots={**state.slots, **extended})


def _records(state: Any) -> dict[str, Any]:
    """The slots of `state` with specs, that of the innermost transform first."""
    slots = getattr(state, "slots", None) or {}
    return {key: slot for key, slot in slots.items() if isinstance(slot, ShardingSlot) and slot.specs is not None}


class Shards(Protocol):
    """The processes that hold the parts."""

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Whether this process's tensor at `path` of a tree like params adds to a sum over all entries.

        One process adds what several hold alike.
        """

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum (`op="sum"`) or maximum (`op="max"`) of `x` over them; a new tensor."""


class ParamGatherer(Protocol):
    """What makes parts whole, for rules that need it; on every process in the same order."""

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole param `name`."""

    def gather(self, parts: Sequence[Tensor], shape: torch.Size) -> Sequence[Tensor]:
        """Whole tensors of this shape from their parts, in memory of their own."""

    def part(self, whole: Tensor) -> Tensor:
        """This process's part, a view."""


def bound(shards: Shards, wholes: ParamGatherer | None = None) -> AbstractContextManager[None]:
    """While it is entered, trees of params and grads are parts, and `shards` can join what is said about them."""
    free = next(key for key in _KEYS if rules.axis(key) is None)
    return rules.bound_axes({free: shards} if wholes is None else {free: shards, _WHOLES: wholes})


def _bound() -> list[Shards]:
    return [shards for key in _KEYS if (shards := rules.axis(key)) is not None]


def wholes() -> ParamGatherer | None:
    """What makes parts whole here, None where nothing is cut."""
    return rules.axis(_WHOLES)


def norm(norms: Tensor, values: Any) -> Tensor:
    """The L2 norm of everything, from the norm of each of this process's leaves of `values`."""
    found = _bound()
    total: Tensor
    if not found:
        total = torch.linalg.vector_norm(norms)
        return total
    named = list(zip(tree.paths(values), tree.leaves(values), strict=True))
    counted = [all(shards.counts(path, leaf) for shards in found) for path, leaf in named]
    total = (norms * torch.tensor(counted, device=norms.device)).square().sum()
    for shards in found:
        total = shards.reduce(total, "sum")
    return total.sqrt()


def all_ranks(flags: Tensor, apart: bool = False) -> Tensor:
    """Where each of the boolean `flags` is true on every process that holds a part.

    With `apart` they were found on this process's rows alone, and those with other rows are asked too.
    """
    found, others = _bound(), _other_rows() if apart else []
    if not found and not others:
        return flags
    bad = (~flags).float()
    for shards in found:
        bad = shards.reduce(bad, "max")
    for axis in others:
        bad = pmax(bad, axis)
    return bad == 0


def is_collective(apart: bool = False) -> bool:
    """Whether `all_ranks` asks other processes here."""
    return bool(_bound() or (apart and _other_rows()))


def _other_rows() -> list[str]:
    """The axes over which processes have other rows."""
    return [axis for axis in ("data", "shard") if getattr(rules.axis(axis), "process", False)]
