"""How transforms shard a state: specs of its leaves, and reductions over the ranks that have the shards.

While a step runs, transforms that look at all params at once (clip, guard) reduce their values over the ranks: of one
transform, or of two where the outer one shards the shards of the inner one. Between steps, what reads or writes the
full state (checkpoints) asks for a `ShardSpec` of each leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.collectives import pmax, pmean
from lumen.core.param_leaves import Path, key_paths, param_leaves

_SHARDS = ("<shards>", "<shards within>")
_GATHERER = "<param gatherer>"
STATE_VIEW = "<state view>"


class Slice(NamedTuple):
    """A block of entries: its start in this rank's shard (`local`) and in the full tensor (`full`), and its `size`."""

    local: tuple[int, ...]
    full: tuple[int, ...]
    size: tuple[int, ...]


class ShardSpec(NamedTuple):
    """What a rank's tensor has of a full one of `shape`: the `boxes` that it consists of, none if it is empty.

    Of the ranks that have the same, one is the `owner`, which writes it.
    """

    shape: tuple[int, ...]
    boxes: tuple[Slice, ...]
    owner: bool


def rows_spec(shape: Sequence[int], start: int, stop: int, owner: bool) -> ShardSpec:
    """The spec of rows `start` to `stop` of a tensor of `shape`, which has dims.

    >>> rows_spec((5, 2), 3, 5, owner=True).boxes
    (Slice(local=(0, 0), full=(3, 0), size=(2, 2)),)
    """
    zeros = (0,) * (len(shape) - 1)
    rows = Slice((0, *zeros), (start, *zeros), (stop - start, *shape[1:]))
    return ShardSpec(tuple(shape), (rows,) if stop > start else (), owner)


def composed(inner: ShardSpec, outer: ShardSpec) -> ShardSpec:
    """The spec of a shard by `outer` of what is a shard by `inner`.

    >>> rows = ShardSpec((8, 2), (Slice((0, 0), (4, 0), (4, 2)),), owner=True)
    >>> half = ShardSpec((4, 2), (Slice((0, 0), (2, 0), (2, 2)),), owner=True)
    >>> composed(rows, half).boxes
    (Slice(local=(0, 0), full=(6, 0), size=(2, 2)),)
    """
    boxes = []
    for last in outer.boxes:
        for first in inner.boxes:
            low = tuple(map(max, last.full, first.local))
            high = tuple(
                min(a + m, b + n) for a, m, b, n in zip(last.full, last.size, first.local, first.size, strict=True)
            )
            if all(a < b for a, b in zip(low, high, strict=True)):
                local = tuple(h + a - w for h, a, w in zip(last.local, low, last.full, strict=True))
                full = tuple(w + a - h for w, a, h in zip(first.full, low, first.local, strict=True))
                boxes.append(Slice(local, full, tuple(b - a for a, b in zip(low, high, strict=True))))
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
        names = ((index, self.leaves.get(root + path)) for index, path in enumerate(key_paths(values)))
        return [(index, name) for index, name in names if name is not None]

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


def locate_all(state: Any, specs: Mapping[Path, SpecTree]) -> list[tuple[int, tuple[int, ...]]]:
    """The sharded leaves of a state by the specs of the training states in it, each at its path.

    They are given by their indices among `tree.leaves`, with the shape of the full leaf: the param's rows, and the
    leaf's own other dims, which are not sharded.
    """
    rows = {(*path, *leaf): s.params[name].shape[:1] for path, s in specs.items() for leaf, name in s.leaves.items()}
    leaves = zip(key_paths(state), tree.leaves(state), strict=True)
    return [(index, (*rows[path], *leaf.shape[1:])) for index, (path, leaf) in enumerate(leaves) if path in rows]


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
    """The ranks that have the shards of the params."""

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Whether this rank adds its tensor at `path` of a tree like params to a sum over all entries.

        Of ranks that have the same entries, one adds them.
        """

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum (`op="sum"`) or maximum (`op="max"`) of `x` over the ranks; a new tensor."""


class ParamGatherer(Protocol):
    """Gathers params for rules that need full tensors; on every rank in the same order."""

    def shape(self, name: str) -> torch.Size:
        """The full shape of the param `name`."""

    def first_row(self, name: str) -> int:
        """The row of the full param `name` with which this rank's shard begins."""

    def gather(self, shards: Sequence[Tensor], shape: torch.Size) -> Sequence[Tensor]:
        """Full tensors of this shape from their shards; new tensors."""

    def shard(self, full: Tensor) -> Tensor:
        """This rank's shard, a view."""


def bound(shards: Shards, gatherer: ParamGatherer | None = None) -> AbstractContextManager[None]:
    """A context in which trees of params and grads are shards, and `shards` reduces values over the ranks."""
    free = next(key for key in _SHARDS if rules.axis(key) is None)
    return rules.bound_axes({free: shards} if gatherer is None else {free: shards, _GATHERER: gatherer})


class StateView(Protocol):
    """How the user's own step sees a sharded state, where that is not how the transforms around it see it."""

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` as a function of the state that the transforms see."""


def bound_view(view: StateView) -> AbstractContextManager[None]:
    """A context in which the user's step sees the state through `view`."""
    return rules.bound_axes({STATE_VIEW: view})


def viewed(step: Callable[..., Any]) -> Callable[..., Any]:
    """The user's `step` as a function of the state that the transforms around it see."""
    view: StateView | None = rules.axis(STATE_VIEW)
    return step if view is None else view.around(step)


class unbound:  # noqa: N801
    """A context in which trees of params and grads are full tensors again."""

    def __enter__(self) -> None:
        axes = rules.stack.axes
        self._hidden = {key: axes.pop(key) for key in (*_SHARDS, _GATHERER) if key in axes}

    def __exit__(self, *_exc: object) -> None:
        rules.stack.axes.update(self._hidden)


def _bound() -> list[Shards]:
    return [shards for key in _SHARDS if (shards := rules.axis(key)) is not None]


def param_gatherer() -> ParamGatherer | None:
    """The gatherer of the params here; None where they are not sharded."""
    return rules.axis(_GATHERER)


def norm(norms: Tensor, values: Any) -> Tensor:
    """The L2 norm of all entries on all ranks, from the norm of each of this rank's leaves of `values`."""
    bindings = _bound()
    total: Tensor
    if not bindings:
        total = torch.linalg.vector_norm(norms)
        return total
    named = list(zip(tree.paths(values), tree.leaves(values), strict=True))
    counted = [all(shards.counts(path, leaf) for shards in bindings) for path, leaf in named]
    total = (norms * torch.tensor(counted, device=norms.device)).square().sum()
    for shards in bindings:
        total = shards.reduce(total, "sum")
    return total.sqrt()


def all_ranks(flags: Tensor, apart: bool = False) -> Tensor:
    """Where each of the boolean `flags` is true on every rank that has a shard.

    With `apart` the flags depend on this rank's rows alone, and the ranks with other rows count too.
    """
    bindings, row_axes = _bound(), _row_axes() if apart else []
    if not bindings and not row_axes:
        return flags
    bad = (~flags).float()
    for shards in bindings:
        bad = shards.reduce(bad, "max")
    for axis in row_axes:
        bad = pmax(bad, axis)
    return bad == 0


def mean_of_ranks(values: Tensor, apart: bool) -> Tensor:
    """The mean of `values` over the ranks that have other rows, where those are `apart`; else `values`."""
    for axis in _row_axes() if apart else ():
        values = pmean(values, axis)
    return values


def is_collective(apart: bool = False) -> bool:
    """Whether `all_ranks` communicates here."""
    return bool(_bound() or (apart and _row_axes()))


def _row_axes() -> list[str]:
    """The axes over which ranks have other rows."""
    return [axis for axis in ("data", "shard") if getattr(rules.axis(axis), "process", False)]
